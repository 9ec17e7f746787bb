"""The file that schedules are written in: a YAML mapping of names to schedules."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline.config import build
from pipeline.errors import UsageError
from pipeline.orchestration.schedule import Schedule
from pipeline.storage.locks import waiting_lock
from pipeline.storage.store import LocalStore

NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,50}[a-z0-9])?")
"""What Kubernetes takes as the name of a CronJob, which the other schedulers take too."""


class ScheduleFile:
    """Schedules by name, in a file that people write in as well.

    Args:
        place: the file; it need not be there yet.

    Raises:
        UsageError: it is a URL.
    """

    def __init__(self, place: str | Path) -> None:
        if "://" in str(place):
            raise UsageError(
                "Schedules are kept in a file on a disk, since an object store has no lock.",
                hint="Give --file a path on a local or shared file system.",
                code="schedules-not-local",
                where=str(place),
            )
        self.path = Path(place).absolute()
        self.runs = self.path.with_name(f"{self.path.stem}.runs")
        """Folder of what is known of the runs."""

    def read(self) -> dict[str, Schedule]:
        """Every schedule, in the order of the file; none where there is no file.

        Raises:
            UsageError: the file or a schedule in it does not hold.
        """
        return {name: self.build(name, values) for name, values in self._values().items()}

    def add(self, name: str, values: Mapping[str, Any], *, replace: bool) -> Schedule:
        """Write a schedule into the file; all else in it, comments too, stays as it is.

        Raises:
            UsageError: the name is taken, or the schedule does not hold.
        """
        with waiting_lock(self.runs / "lock"):
            old = self._values()
            if name in old and not replace:
                raise UsageError(
                    f"There is a schedule named '{name}' already.",
                    hint="Choose another name, or put this one in its place with --replace.",
                    code="schedule-exists",
                    where=str(self.path),
                )
            schedule = self.build(name, values)
            text = self._without(name) if name in old else self._text()
            text += "" if not text or text.endswith("\n") else "\n"
            text += yaml.safe_dump({name: dict(values)}, sort_keys=False, width=10_000)
            self._write(text, {**{k: v for k, v in old.items() if k != name}, name: dict(values)})
        return schedule

    def remove(self, name: str) -> None:
        """Take a schedule out of the file; what is known of its runs is kept.

        Raises:
            UsageError: there is no such schedule.
        """
        with waiting_lock(self.runs / "lock"):
            old = self._values()
            self.check(name, old)
            self._write(self._without(name), {k: v for k, v in old.items() if k != name})

    def build(self, name: str, values: Any) -> Schedule:
        """A schedule from what is written of it. Raises UsageError where it does not hold."""
        if not NAME.fullmatch(name):
            raise UsageError(
                f"'{name}' cannot be the name of a schedule.",
                hint="Use up to 52 small letters, digits and hyphens, such as 'nightly-check'.",
                code="bad-schedule",
                where=str(self.path),
            )
        try:
            return build(Schedule, values)
        except UsageError as error:
            raise UsageError(
                error.message.replace("The configuration", f"The schedule '{name}'", 1),
                hint="A schedule has cron and run, and may have timezone, start, missed, overlap "
                "and deadline.",
                code="bad-schedule",
                where=str(self.path),
            ) from error

    def check(self, name: str, known: Mapping[str, Any]) -> None:
        """Raise UsageError where ``name`` is none of the ``known`` schedules."""
        if name not in known:
            raise UsageError(
                f"There is no schedule named '{name}'.",
                hint=f"Known are: {', '.join(known) or 'none'}.",
                code="unknown-schedule",
                where=str(self.path),
            )

    def _text(self) -> str:
        try:
            return self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return ""

    def _values(self) -> dict[str, Any]:
        try:
            values = yaml.safe_load(self._text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = str(error).replace("\n", " ")
            raise self._unreadable(f"The schedule file cannot be read: {reason}.") from error
        if values is None:
            return {}
        if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
            raise self._unreadable("The schedule file does not hold a mapping of names.")
        return values

    def _unreadable(self, message: str) -> UsageError:
        return UsageError(
            message,
            hint="Write each schedule as a name with cron and run below it, and put quotes around "
            "the cron expression.",
            code="bad-schedule-file",
            where=str(self.path),
        )

    def _without(self, name: str) -> str:
        """The text of the file without one of its schedules."""
        text = self._text()
        lines = text.splitlines(keepends=True)
        found = yaml.compose(text)
        keys = [key for key, _ in found.value] if found else []
        starts = [key.start_mark.line for key in keys]
        first = next(key.start_mark.line for key in keys if key.value == name)
        end = min((line for line in starts if line > first), default=len(lines))
        # A comment above the next schedule is about that one.
        while end > first + 1 and end < len(lines) and lines[end - 1].startswith(("#", "\n")):
            end -= 1
        return "".join(lines[:first] + lines[end:])

    def _write(self, text: str, expected: Mapping[str, Any]) -> None:
        try:
            same = (yaml.safe_load(text) or {}) == expected
        except yaml.YAMLError:
            same = False
        if not same:  # written in another style than ours; its comments cannot be kept
            text = yaml.safe_dump(dict(expected), sort_keys=False, width=10_000)
        LocalStore(self.path.parent).replace(self.path.name, text.encode())
