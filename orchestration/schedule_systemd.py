"""Schedules as systemd timers, which wake ``pipeline schedule tick``.

A timer may elapse more often than something is due, never less: the tick decides.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from cronsim import CronSim

from pipeline.orchestration.schedule import Schedule

DAYS = ["Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat"]


def systemd_units(name: str, schedule: Schedule, wake: Sequence[str]) -> dict[str, str]:
    """A service that runs the command line ``wake``, and its timer; texts by file name."""
    notes = [
        "# The second OnCalendar wakes it where a change of clocks makes systemd leave a time out,",
        "# and to take up a run that was interrupted. What is due is decided by the command.",
    ]
    if schedule.overlap != "forbid":
        notes += [
            f"# systemd starts no service twice: 'overlap: {schedule.overlap}' has no effect here.",
            "# Use 'pipeline schedule serve' for it.",
        ]
    times = "\n".join(f"OnCalendar={each}" for each in _calendar(schedule))
    # systemd reads % and $ itself.
    words = " ".join(_quoted(word) for word in wake)
    service = (
        f"[Unit]\nDescription=pipeline schedule {name}\nWants=network-online.target\n"
        f"After=network-online.target\n\n[Service]\nType=oneshot\nExecStart={words}\n"
        # The run is told to stop by the tick, which waits for it.
        "KillMode=mixed\nTimeoutStopSec=90\n"
    )
    timer = (
        "\n".join(notes) + f"\n[Unit]\nDescription=pipeline schedule {name}\n\n[Timer]\n{times}\n"
        f"Persistent={'false' if schedule.missed == 'skip' else 'true'}\nAccuracySec=1s\n\n"
        "[Install]\nWantedBy=timers.target\n"
    )
    return {f"pipeline-{name}.service": service, f"pipeline-{name}.timer": timer}


def _quoted(word: str) -> str:
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"' if re.search(r"[\s\"'\\;]", word) or not word else escaped


def _calendar(schedule: Schedule) -> list[str]:
    """``OnCalendar`` expressions that elapse at every due time, and at others."""
    cron = CronSim(schedule.cron, datetime(2000, 1, 1))
    zone = ZoneInfo(schedule.timezone)
    months = _listed(cron.months, 12)
    clock = f"{_listed(cron.hours, 24)}:{_listed(cron.minutes, 60)}:00 {schedule.timezone}"
    every_day = cron.days == set(range(1, 32))
    every_weekday = set(range(7)) <= cron.weekdays
    dates = [_date(day) for day in sorted(cron.days) if day < 0]
    if plain := {day for day in cron.days if day > 0}:
        dates.append("*" if every_day else _listed(plain, 32))
    weeks = [("", "")] if every_weekday else _weeks(cron.weekdays)
    lines = []
    if cron.day_and or every_day or every_weekday:
        for date in dates:
            for days, within in weeks:
                if within and date != "*":
                    within = ""  # noqa: PLW2901 - wider than asked for, which does no harm
                lines.append(f"{days}*-{months}{_joined(within or date)} {clock}")
    else:
        lines += [f"*-{months}{_joined(date)} {clock}" for date in dates]
        lines += [f"{days}*-{months}{_joined(within or '*')} {clock}" for days, within in weeks]
    # In UTC no time is left out. A zone may be half or a quarter of an hour off, now or in summer.
    offsets = {
        (datetime(2026, month, 1, tzinfo=zone).utcoffset() or timedelta()) // timedelta(minutes=1)
        for month in range(1, 13)
    }
    minutes = {(minute - offset) % 60 for minute in cron.minutes for offset in offsets}
    return [*lines, f"*-*-* *:{_listed(minutes | {0, 30}, 60)}:00 UTC"]


def _joined(date: str) -> str:
    return date if date.startswith("~") else f"-{date}"


def _date(day: int) -> str:
    """The last day of the month, or one of its last three, of which one is the last weekday."""
    return "~01" if day == CronSim.LAST else "~03/1"


def _weeks(weekdays: set[Any]) -> list[tuple[str, str]]:
    """Days of the week, with the days of the month that they have to fall on."""
    plain = sorted({day % 7 for day in weekdays if isinstance(day, int)})
    found = [(",".join(DAYS[day] for day in plain) + " ", "")] if plain else []
    for day, nth in sorted(each for each in weekdays if isinstance(each, tuple)):
        within = "~07/1" if nth == CronSim.LAST else f"{nth * 7 - 6:02}..{min(nth * 7, 31):02}"
        found.append((f"{DAYS[day % 7]} ", within))
    return found


def _listed(values: set[int], size: int) -> str:
    full = len(values) == size
    return "*" if full else ",".join(f"{value:02}" for value in sorted(values))
