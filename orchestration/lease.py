"""Who writes an output: a record that its holder renews, and whether that holder still lives."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from pipeline.digest import dumps
from pipeline.errors import RunError
from pipeline.storage.store import Store
from pipeline.terminal import printable

log = logging.getLogger(__name__)
BEAT = 10.0
"""Seconds from one sign of life to the next."""
EXPIRES = 60.0
"""Seconds after which a holder that gave no sign of life may be gone."""
WATCH = 25.0
"""Seconds for which such a holder is watched before it is taken for gone."""
LEASE = re.compile(r"\d{9}\.json")

held_here: set[str] = set()
"""Runs of this very process that hold something now."""


def now() -> str:
    """The time: ISO 8601, UTC, milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@dataclass(frozen=True)
class Holder:
    """Who holds an output.

    Attributes:
        run: a name that no other run has.
        command: what it does, for people: ``run distill``, ``gc``.
        executor: where it works on shards.
        host: name of the computer.
        pid: its process there.
        machine: what tells apart the computers, their starts and their containers, within which a
            process id means something; empty where the system does not say.
        process: when the process was started, since ids are used again; empty likewise.
        started: when it took the output.
        beat: its last sign of life.
    """

    run: str
    command: str
    executor: str
    host: str
    pid: int
    machine: str
    process: str
    started: str = field(default_factory=now)
    beat: str = field(default_factory=now)

    @classmethod
    def here(cls, command: str, executor: str) -> Holder:
        """A run that this process begins now."""
        run, pid, host = uuid.uuid4().hex[:12], os.getpid(), socket.gethostname()
        return cls(run, command, executor, host, pid, machine(), process_state(pid)[1])

    @classmethod
    def parse(cls, data: bytes) -> Holder | None:
        """What a file says; ``None`` where it is no such record."""
        try:
            found = cls(**json.loads(data))
            datetime.fromisoformat(found.beat)
            return found if int(found.pid) > 0 else None
        except (TypeError, ValueError, AttributeError):
            return None

    def renewed(self) -> bytes:
        """The record with a sign of life."""
        return dumps(vars(replace(self, beat=now())))

    @property
    def silent(self) -> float:
        """Seconds since its last sign of life, if its clock and ours agree."""
        return (datetime.now(UTC) - datetime.fromisoformat(self.beat)).total_seconds()

    @property
    def fresh(self) -> bool:
        """Whether the last sign of life is of now; one of the future is of another clock."""
        return abs(self.silent) < EXPIRES

    @property
    def dead(self) -> bool:
        """Whether it is certain that the holder is gone. Only its own computer can say so."""
        if not self.machine or self.machine != machine():
            return False
        state, started = process_state(self.pid)
        if not state or state in "ZX" or (started and started != self.process):
            return True
        return self.pid == os.getpid() and self.run not in held_here

    def __str__(self) -> str:
        since = datetime.fromisoformat(self.started)
        who = printable(f"'{self.command}' on {self.host}, process {self.pid}")
        return (
            f"{who}, since {since:%Y-%m-%d %H:%M:%S} UTC, last sign of life "
            f"{max(0, self.silent):.0f} s ago"
        )


@cache
def machine() -> str:
    """This computer, this start of it, and this container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{socket.gethostname()} {boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def process_state(pid: int) -> tuple[str, str]:
    """State of a process and when it was started; two empty texts where there is none such."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return "", ""
    except PermissionError:
        pass  # it is another user's
    try:
        # The name may hold anything, blanks and brackets too; fields follow its last bracket.
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except OSError:
        return "?", ""
    return fields[0], fields[19]


def names(store: Store) -> list[str]:
    """What lies in ``store``, sorted."""
    while True:
        with suppress(FileNotFoundError):  # one went away while they were looked through
            return [info.name for info in store.files()]


def leases(found: Sequence[str]) -> list[str]:
    """Those of the names that are of leases, the newest last."""
    return [name for name in found if LEASE.fullmatch(name)]


def read(store: Store, name: str) -> Holder | None:
    """The holder that a lease names; ``None`` where there is none any more."""
    try:
        return Holder.parse(store.read(name))
    except FileNotFoundError:
        return None


def newest(store: Store, found: Sequence[str]) -> tuple[str, Holder | None]:
    """Name and holder of the newest lease; an empty name where there is none."""
    name = next(reversed(leases(found)), "")
    return name, read(store, name) if name else None


def take(store: Store, me: Holder, *, alone: bool) -> str:
    """Become the holder; the name of the new lease.

    A lease is never replaced by another's: the next one has the next number and is created, never
    replacing, so of several that find a dead holder one succeeds it.

    Args:
        store: where leases lie.
        me: the new holder.
        alone: nobody else can live, whatever the leases say: a lock is held.

    Raises:
        RunError: another holds it.
    """
    while True:
        found = names(store)
        last, holder = newest(store, found)
        if holder and not alone and _alive(store, last, holder):
            raise busy(holder, store)
        name = f"{int(last[:9] or 0) + 1:09d}.json"
        try:
            _create(store, name, me.renewed(), alone=alone)
        except FileExistsError:
            continue
        for old in found:  # what was asked of earlier runs goes with them
            if LEASE.fullmatch(old) or old.endswith(".cancel"):
                store.delete(old)
        return name


def _create(store: Store, name: str, data: bytes, *, alone: bool) -> None:
    if alone:
        store.replace(name, data, durable=False)
        return
    with store.scratch() as folder:
        (folder / name).write_bytes(data)
        store.create(name, folder / name)


def _alive(store: Store, name: str, holder: Holder) -> bool:
    """Whether the holder of a lease may be alive."""
    if holder.dead:
        return False
    if holder.fresh:
        return True
    # Clocks may differ: what counts is whether it gives a sign of life.
    log.info("held by %s: waiting up to %.0f s for another", holder, WATCH)
    end = time.monotonic() + WATCH
    while time.monotonic() < end:
        time.sleep(min(1.0, WATCH / 5))
        found = read(store, name)
        if found != holder:
            return found is not None
    return False


def busy(holder: Holder, store: Store) -> RunError:
    """What the second of two is told."""
    return RunError(
        f"Another process is writing this output: {holder}.",
        hint="Wait until it ends, stop it with 'pipeline cancel', or choose another output.",
        code="output-busy",
        where=output_of(store),
    )


def output_of(store: Store) -> str:
    """The output that a folder of a run's memory belongs to, for people."""
    return store.url.partition("/.run")[0]
