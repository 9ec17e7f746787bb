"""``pipeline schedule``: what the command line does with schedules.

Each function takes the parsed options and gives an exit code, a summary of plain JSON types, and
the same as text.
"""

from __future__ import annotations

import contextlib
import io
import logging
import signal
import subprocess
import time
from argparse import Namespace
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from pipeline.errors import PipelineError, UsageError
from pipeline.orchestration.schedule import Schedule, due_times
from pipeline.orchestration.schedule_export import export
from pipeline.orchestration.schedule_file import ScheduleFile
from pipeline.orchestration.schedule_runs import Runs
from pipeline.orchestration.schedule_tick import PATIENCE, Tick, pipeline_command
from pipeline.storage.store import LocalStore
from pipeline.terminal import grid

log = logging.getLogger(__name__)
Done = tuple[int, Any, str]
LONGEST_SLEEP = timedelta(minutes=1)
"""How long ``serve`` may take to see that the file has changed."""
HORIZON = timedelta(days=366 * 50)
"""How far ahead the next due time is looked for."""


def run_add(options: Namespace) -> Done:
    """``pipeline schedule add``."""
    file = ScheduleFile(options.file)
    values = {
        "cron": options.cron,
        "timezone": options.timezone,
        "run": options.run,
        "start": (options.start or datetime.now(UTC)).isoformat(timespec="seconds"),
        "missed": options.missed,
        "overlap": options.overlap,
        **({"deadline": options.deadline} if options.deadline else {}),
    }
    check_command(options.name, file.build(options.name, values).words)
    schedule = file.add(options.name, values, replace=options.replace)
    coming = _shown(next_due(schedule, datetime.now(UTC)), schedule)
    return 0, {"name": options.name, **values, "next": coming}, f"{options.name}: next {coming}"


def run_remove(options: Namespace) -> Done:
    """``pipeline schedule remove``."""
    ScheduleFile(options.file).remove(options.name)
    return 0, {"removed": options.name}, f"{options.name}: removed. Its records are kept."


def run_list(options: Namespace) -> Done:
    """``pipeline schedule list``."""
    file, now = ScheduleFile(options.file), datetime.now(UTC)
    rows = []
    table = [["NAME", "CRON", "ZONE", "NEXT", "LAST"]]
    for name, schedule in file.read().items():
        last = Runs(file.runs / name).last()
        coming = _shown(next_due(schedule, now), schedule)
        told = f"{last.outcome}, due {last.due[:16]}Z" if last else "none yet"
        table.append([name, schedule.cron, schedule.timezone, coming, told])
        rows.append(
            {
                "name": name,
                "cron": schedule.cron,
                "timezone": schedule.timezone,
                "next": coming,
                "last": last.__dict__ if last else None,
                "run": schedule.words,
            }
        )
    return 0, rows, "\n".join(grid(table)) if rows else f"There is no schedule in {file.path}."


def run_tick(options: Namespace) -> Done:
    """``pipeline schedule tick``: exit code 1 where a run failed."""
    tick = _tick(ScheduleFile(options.file), options.now or datetime.now(UTC), options.only)
    if options.dry_run:
        rows = [
            {"name": name, "due": each.due.isoformat(), "run": each.run, "reason": each.reason,
             "count": each.count}
            for name in tick.schedules for each in tick.decisions(name)
        ]  # fmt: skip
        lines = [
            f"{row['name']}: would {'run' if row['run'] else 'skip'} what was due {row['due']}: "
            f"{row['reason']}" + (f" ({row['count']} due times)" if row["count"] != 1 else "")
            for row in rows
        ]
        return 0, rows, "\n".join(lines) or "Nothing is due."
    with _stoppable():
        done = tick.run()
    lines = [f"{n}: {r.outcome}, due {r.due[:16]}Z: {r.reason}" for n, r in done]
    failed = any(record.outcome == "failed" for _, record in done)
    summary = [{"name": name, **record.__dict__} for name, record in done]
    return int(failed), summary, "\n".join(lines) or "Nothing is due."


def run_serve(options: Namespace) -> Done:
    """``pipeline schedule serve``: tick whenever something is due, until told to stop."""
    file = ScheduleFile(options.file)
    file.read()  # what does not hold now is said now
    log.info("serving the schedules of %s", file.path)
    ticks: list[subprocess.Popen[bytes]] = []
    with _stoppable():
        try:
            while True:
                ticks = [tick for tick in ticks if tick.poll() is None]
                wake = _serve_once(file, datetime.now(UTC), ticks)
                time.sleep(max(0.0, (wake - datetime.now(UTC)).total_seconds()))
        except KeyboardInterrupt:
            log.info("stopping; what was interrupted goes on with the next start")
        finally:
            for tick in ticks:
                tick.send_signal(signal.SIGINT)
            for tick in ticks:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    tick.wait(2 * PATIENCE.total_seconds())
    return 0, {}, ""


def run_export(options: Namespace) -> Done:
    """``pipeline schedule export``."""
    file = ScheduleFile(options.file)
    known = file.read()
    if options.name:
        file.check(options.name, known)
    texts: dict[str, str] = {}
    for name, schedule in known.items():
        if options.name in (None, name):
            check_command(name, schedule.words)
            wake = ["schedule", "tick", "--file", str(file.path), "--only", name]
            texts |= export(options.to, name, schedule, pipeline_command(wake), options.image)
    if options.out:
        store = LocalStore(Path(options.out).absolute())
        for title, text in texts.items():
            store.replace(title, text.encode())
        return 0, sorted(texts), "\n".join(str(store.root / title) for title in texts)
    return 0, texts, "\n".join(f"# {title}\n{text}" for title, text in texts.items())


def check_command(name: str, words: list[str]) -> None:
    """Raise UsageError where ``pipeline`` would not understand a schedule's command."""
    from pipeline.options import make_parser

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            make_parser().parse_args(words)
        reason = "schedules cannot be nested" if words[0] == "schedule" else ""
    except SystemExit as stop:
        reason = said.getvalue().strip().splitlines()[-1] if stop.code else "it only prints help"
    if reason:
        raise UsageError(
            f"The command of the schedule '{name}' does not hold: {reason}.",
            hint="Give 'run' the words that follow 'pipeline', such as 'verify out --deep'.",
            code="bad-schedule",
            where=" ".join(words),
        )


def next_due(schedule: Schedule, now: datetime) -> datetime | None:
    """The first due time after ``now``; ``None`` where none is near."""
    after = max(now, schedule.start or now)
    return next(due_times(schedule, after, after + HORIZON), None)


def _shown(due: datetime | None, schedule: Schedule) -> str:
    return due.astimezone(ZoneInfo(schedule.timezone)).isoformat() if due else "never"


def _tick(file: ScheduleFile, now: datetime, only: str | None = None) -> Tick:
    schedules = file.read()
    if only:
        file.check(only, schedules)
        schedules = {only: schedules[only]}
    for name, schedule in schedules.items():
        check_command(name, schedule.words)
    return Tick(schedules, file.runs, now, cwd=file.path.parent)


def _serve_once(
    file: ScheduleFile, now: datetime, ticks: list[subprocess.Popen[bytes]]
) -> datetime:
    """Start a tick if something is to be done, and give the time to look again."""
    wake = now + LONGEST_SLEEP
    try:
        tick = _tick(file, now)
        if any(tick.decisions(name) for name in tick.schedules):
            words = ["schedule", "tick", "--file", str(file.path)]
            # In a process of its own, as cron would: nothing that happens to it stops us.
            ticks.append(subprocess.Popen(pipeline_command(words), start_new_session=True))  # noqa: S603
        soon = (next(due_times(each, now, wake), wake) for each in tick.schedules.values())
        wake = min(soon, default=wake)
    except (PipelineError, OSError) as error:
        log.error("%s", error)  # noqa: TRY400 - without a traceback
    return wake


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Have SIGTERM, and SIGINT where it is ignored, stop us as Ctrl-C does."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    old = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
