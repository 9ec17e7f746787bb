"""When something is due, and what to do about it. Nothing here looks at a clock or a disk."""

from __future__ import annotations

import re
import shlex
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError
from pydantic import AwareDatetime, Field, field_validator, model_validator

from pipeline.config import Config

ON_TIME = timedelta(minutes=5)
"""A run that starts no later than this after its due time is not missed."""
UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
LARGEST_SHIFT = timedelta(hours=26)
"""No change of clocks is larger: Samoa left out a day, which is the record."""
DAY = timedelta(days=1)
SECOND = timedelta(seconds=1)


class Schedule(Config):
    """A command of ``pipeline`` and when to run it."""

    cron: str = Field(description="five fields: minute, hour, day of month, month, day of week")
    timezone: str = Field(
        default="UTC", description="IANA name of the zone that the cron fields count in"
    )
    run: str | tuple[str, ...] = Field(description="the arguments of 'pipeline'")
    start: AwareDatetime | None = Field(
        default=None, description="nothing is due until after this time"
    )
    missed: Literal["skip", "run-once", "run-all"] = Field(
        default="run-once", description="what to do about due times at which nothing could run"
    )
    overlap: Literal["forbid", "replace", "allow"] = Field(
        default="forbid",
        description="what to do while an earlier run of this schedule is still going",
    )
    deadline: str | None = Field(
        default=None, description="how late a run may start: a number and s, m, h or d, such as 6h"
    )

    @field_validator("cron")
    @classmethod
    def _cron_holds(cls, cron: str) -> str:
        if len(cron.split()) != 5:
            raise ValueError("a cron expression has five fields, such as '30 2 * * *'")
        try:
            first = next(CronSim(cron, datetime(2000, 1, 1)), None)
        except CronSimError as error:
            raise ValueError(f"this is no cron expression: {error}") from None
        if first is None:
            raise ValueError("this cron expression never comes due")
        return cron

    @field_validator("timezone")
    @classmethod
    def _zone_exists(cls, name: str) -> str:
        try:
            ZoneInfo(name)
        except (KeyError, ValueError, OSError):
            raise ValueError("there is no such time zone; write it as Europe/Berlin") from None
        return name

    @field_validator("deadline")
    @classmethod
    def _deadline_holds(cls, text: str | None) -> str | None:
        if text is not None and not re.fullmatch(r"[1-9]\d{0,8}[smhd]", text):
            raise ValueError("write it as a number and s, m, h or d, such as 90m or 6h")
        return text

    @model_validator(mode="after")
    def _policies_agree(self) -> Schedule:
        if (self.missed, self.overlap) == ("run-all", "replace"):
            raise ValueError("'missed: run-all' runs each to its end, which 'overlap: replace' "
                             "would not let it; choose one of them")  # fmt: skip
        if not self.words:
            raise ValueError("'run' holds no command")
        return self

    @property
    def words(self) -> list[str]:
        """The arguments of ``pipeline``, one by one."""
        return shlex.split(self.run) if isinstance(self.run, str) else list(self.run)

    @property
    def latest(self) -> timedelta | None:
        """How late a run may start; ``None`` where it may always."""
        unit = self.deadline and UNITS[self.deadline[-1]]
        given = timedelta(**{unit: int(self.deadline[:-1])}) if self.deadline and unit else None
        if self.missed == "skip":
            return min(ON_TIME, given or ON_TIME)
        return given


def due_times(schedule: Schedule, after: datetime, until: datetime) -> Iterator[datetime]:
    """Every due time in (``after``, ``until``], strictly increasing, in UTC.

    The cron expression says what a clock on the wall of the zone shows when the run is due. Where
    the clock is changed, this follows Debian's cron:

    - A job at fixed times (neither minute nor hour begins with ``*``) runs once for each time of
      its list: one that the clock leaves out is due at the first moment after the gap, one that
      comes twice is due the first time only. Of a day that is left out altogether nothing is due.
    - Any other job is due whenever the clock shows a time that matches: never within a gap, and
      twice where the hour comes twice, so that ``*/15 * * * *`` is always 15 minutes.
    """
    zone = ZoneInfo(schedule.timezone)
    fixed = not any(field.startswith("*") for field in schedule.cron.split()[:2])
    # The library walks the calendar without a zone; it is exact there, and not everywhere with one.
    walls = CronSim(schedule.cron, after.astimezone(zone).replace(tzinfo=None) - LARGEST_SHIFT)
    last = after.astimezone(UTC)
    for moment in _in_order(_moments(wall, zone, fixed) for wall in walls):
        if moment > until:
            return
        if moment > last:
            yield moment
            last = moment


def _in_order(moments: Iterator[list[datetime]]) -> Iterator[datetime]:
    """Moments by wall time as moments in their order: a repeated hour is held back."""
    second: deque[datetime] = deque()
    for found in moments:
        if found:
            while second and second[0] < found[0]:
                yield second.popleft()
            yield found[0]
            second.extend(found[1:])
    yield from second


def _moments(wall: datetime, zone: ZoneInfo, fixed: bool) -> list[datetime]:
    """When the clock of the zone shows ``wall``, or what stands for it."""
    first, second = (wall.replace(tzinfo=zone, fold=fold).astimezone(UTC) for fold in (0, 1))
    if first <= second:
        return [first] if fixed or first == second else [first, second]
    # Left out: with the old offset it would be later than the change, with the new one earlier.
    if not fixed or first - second >= DAY:
        return []
    offset = first.astimezone(zone).utcoffset()
    while first - second > SECOND:
        middle = second + (first - second) // SECOND // 2 * SECOND
        if middle.astimezone(zone).utcoffset() == offset:
            first = middle
        else:
            second = middle
    return [first]


@dataclass(frozen=True)
class Decision:
    """What becomes of a due time.

    Attributes:
        due: the due time.
        run: whether it is run; if not, it is recorded as skipped.
        reason: why, as a clause.
        count: how many due times this stands for, ``due`` being the last of them.
    """

    due: datetime
    run: bool
    reason: str
    count: int = 1


def decide(
    schedule: Schedule, due: Sequence[datetime], now: datetime, going: datetime | None
) -> list[Decision]:
    """What becomes of the due times that nothing was decided about yet, in their order.

    Args:
        schedule: its policies count.
        due: due times up to ``now``, in order.
        now: the present time.
        going: due time of an earlier run of this schedule that is still going.

    Returns:
        Nothing where nothing is due, or where what is due has to wait for its turn.
    """
    if not due:
        return []
    if going and schedule.overlap == "forbid":
        if schedule.missed == "run-all":
            return []
        reason = f"the run due {going:%Y-%m-%d %H:%M} UTC is still going"
        return [Decision(due[-1], run=False, reason=reason, count=len(due))]
    latest = schedule.latest
    timely = [each for each in due if latest is None or now - each <= latest]
    chosen = timely if schedule.missed == "run-all" else timely[-1:]
    decisions = [
        Decision(each, run=True, reason="due" if now - each <= ON_TIME else "due and missed")
        for each in chosen
    ]
    if left := due[: len(due) - len(chosen)]:
        if left[-1] in timely:
            reason = "a later due time is run in its place"
        elif schedule.missed == "skip":
            reason = "missed, and missed runs are skipped"
        else:
            reason = f"missed by more than the deadline of {schedule.deadline}"
        decisions.insert(0, Decision(left[-1], run=False, reason=reason, count=len(left)))
    return decisions
