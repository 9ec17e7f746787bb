"""What is known of the runs of one schedule: a folder for each due time.

``<schedules>.runs/<schedule>/<due time>/`` holds

- ``lock``, held by the process that runs it and by the run itself; it says which process group;
- ``log.txt``, what the run printed;
- ``replaced``, where a later run has taken its place;
- ``result.json``, written when it ended. A folder without one that nobody holds is a run that
  was interrupted: it is taken up again.

Every change is made while the schedule's own ``lock`` is held, for moments only.
"""

from __future__ import annotations

import os
import shutil
import socket
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.storage.atomic import seal, unseal
from pipeline.storage.locks import is_locked, try_lock, waiting_lock
from pipeline.storage.store import LocalStore

KEPT = 1000
"""Records kept for each schedule. The latest says what is settled, so it is never deleted."""
STAMP = "%Y%m%dT%H%M%SZ"


@dataclass(frozen=True)
class Record:
    """How a due time ended.

    Attributes:
        due: ISO time, as are ``started`` and ``ended``.
        outcome: ``done``, ``failed``, ``replaced`` or ``skipped``.
        reason: why it was run or not.
        count: how many due times were skipped with it, itself included; 1 for a run.
        exit_code: of the command; negative for a signal.
    """

    due: str
    outcome: str
    reason: str
    count: int = 1
    exit_code: int | None = None
    started: str | None = None
    ended: str | None = None


class Claim:
    """A due time that this process, and nobody else, may run."""

    def __init__(self, runs: Runs, due: datetime, reason: str, lock: BinaryIO) -> None:
        self.runs, self.due, self.reason, self.lock = runs, due, reason, lock
        self.folder = runs.folder_of(due)
        self.lock.truncate(0)

    def started(self, group: int) -> None:
        """Note the process group of the run, for whoever has to stop it."""
        self.lock.write(f"{group} {socket.gethostname()}".encode())
        self.lock.flush()

    @property
    def replaced(self) -> bool:
        """Whether a later run has taken its place."""
        return (self.folder / "replaced").exists()

    def release(self) -> None:
        """Let go of it. Without a record, whoever looks next takes it up again."""
        self.lock.close()


class Runs:
    """The runs of one schedule.

    Args:
        folder: where they are kept; made when something is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def guard(self) -> AbstractContextManager[None]:
        """Held around everything that looks at runs or changes them."""
        return waiting_lock(self.folder / "lock")

    def folder_of(self, due: datetime) -> Path:
        return self.folder / due.astimezone(UTC).strftime(STAMP)

    def known(self) -> list[datetime]:
        """Due times that something was decided about, in order."""
        found = []
        for path in self.folder.iterdir() if self.folder.is_dir() else []:
            with suppress(ValueError):
                found.append(datetime.strptime(path.name, STAMP).replace(tzinfo=UTC))
        return sorted(found)

    def settled_until(self, start: datetime | None, otherwise: datetime) -> datetime:
        """The time up to which nothing is left to decide.

        That is the latest due time that has a folder; before there is one, the ``start`` of the
        schedule, or what :meth:`begin` was told first, or ``otherwise``.
        """
        since = self.folder / "since"
        if known := self.known():
            return max(known[-1], start or known[-1])
        if start:
            return start
        return datetime.fromisoformat(since.read_text()) if since.exists() else otherwise

    def begin(self, since: datetime) -> None:
        """Note when a schedule without a ``start`` was looked at first."""
        if not (self.folder / "since").exists():
            text = since.astimezone(UTC).isoformat()
            LocalStore(self.folder).replace("since", text.encode())

    def open(self) -> tuple[list[datetime], list[datetime]]:
        """Due times without a record: those that are going, and those that were interrupted."""
        going: list[datetime] = []
        interrupted: list[datetime] = []
        for due in self.known():
            folder = self.folder_of(due)
            if not (folder / "result.json").exists():
                (going if is_locked(folder / "lock") else interrupted).append(due)
        return going, interrupted

    def claim(self, due: datetime, reason: str) -> Claim | None:
        """Take a due time; ``None`` where another process has it."""
        lock = try_lock(self.folder_of(due) / "lock")
        return Claim(self, due, reason, lock) if lock else None

    def settle(self, record: Record) -> Record:
        """Write the record of a due time, and delete the oldest ones."""
        folder = self.folder_of(datetime.fromisoformat(record.due))
        LocalStore(folder).replace("result.json", seal(record.__dict__))
        for due in self.known()[:-KEPT]:
            old = self.folder_of(due)
            if (old / "result.json").exists():
                # Renamed first: half of a folder would look like an interrupted run.
                old.rename(old.with_name(f"old-{old.name}"))
        for old in self.folder.glob("old-*"):
            shutil.rmtree(old, ignore_errors=True)
        return record

    def record(self, due: datetime) -> Record | None:
        """The record of a due time; ``None`` where it has none.

        One that is damaged counts: what it was about is not run again.
        """
        try:
            values: dict[str, Any] = unseal((self.folder_of(due) / "result.json").read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:
            return Record(due.isoformat(), "unknown", "its record is damaged")
        return Record(**{name: value for name, value in values.items() if name != "sha256"})

    def last(self) -> Record | None:
        """The latest record; one without an outcome is still going or was interrupted."""
        if not (known := self.known()):
            return None
        if found := self.record(known[-1]):
            return found
        going, _ = self.open()
        outcome = "going" if known[-1] in going else "interrupted"
        return Record(known[-1].isoformat(), outcome, "")

    def mark_replaced(self, due: datetime) -> None:
        """Have the run of ``due``, going or interrupted, give way to a later one."""
        LocalStore(self.folder_of(due)).replace("replaced", b"")

    def group(self, due: datetime) -> int | None:
        """The process group of the run of ``due`` on this machine, while it is going.

        The lock is looked at first: the number of a process that ended may be another's by now.
        """
        path = self.folder_of(due) / "lock"
        if not is_locked(path):
            return None
        number, _, host = path.read_text().partition(" ")
        return int(number) if number and host == socket.gethostname() else None


def ended(claim: Claim, started: datetime, exit_code: int) -> Record:
    """The record of a run that ended."""
    return Record(
        due=claim.due.isoformat(),
        outcome="done" if exit_code == 0 else "replaced" if claim.replaced else "failed",
        reason=claim.reason,
        exit_code=exit_code,
        started=started.isoformat(timespec="seconds"),
        ended=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def kill_group(group: int, signal: int) -> None:
    """Signal every process of a run; that there are none any more is no error."""
    with suppress(ProcessLookupError):
        os.killpg(group, signal)
