"""One writer at a time, and how to stop it.

On a disk a lock of the kernel keeps others out; it dies with its holder. An object store has no
such lock. There a *lease* does: a small object that its holder renews every few seconds. It is an
economy, so that two drivers do not do the same work twice, and not what makes an output right:
files are published by creating, never replacing, and two that both think they hold the output agree
or one of them stops. A lease is in the hands of its holder until

- the holder deletes it, at its end or when an error ends it;
- its process is gone, as far as its own computer can tell: then at once;
- it gave no sign of life for :data:`~pipeline.orchestration.lease.EXPIRES` seconds and then, under
  the eyes of who wants it, for another :data:`~pipeline.orchestration.lease.WATCH`. A wrong clock
  only makes this slower.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FrameType

from pipeline.digest import dumps
from pipeline.errors import PipelineError, RunError, UsageError
from pipeline.orchestration import lease
from pipeline.orchestration.lease import Holder
from pipeline.storage.atomic import exclusive
from pipeline.storage.locks import is_locked
from pipeline.storage.store import LocalStore, Store
from pipeline.terminal import printable

log = logging.getLogger(__name__)
LIVE = "live"
"""Folder of a run's memory with its lease."""
POLL, POLL_REMOTE = 1.0, 5.0
"""Seconds from one look for a cancel to the next, on a disk and in an object store."""
SIGNAL = signal.SIGURG
"""Interrupts the main thread. Not SIGINT, which a command in the background may have to ignore;
one that comes late does no harm, since nobody else listens to it."""


@dataclass
class Hold:
    """An output in the hands of this run.

    Attributes:
        run: the run's name, which no other has.
        stopped: why the run has to end; ``None`` while it need not.
    """

    store: Store
    me: Holder
    lease: str
    stopped: RunError | None = None
    _end: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    @property
    def run(self) -> str:
        return self.me.run

    def check(self) -> None:
        """Called between shards, for runs that are not in the main thread.

        Raises:
            RunError: the run was cancelled, or another has taken the output.
        """
        if self.stopped:
            raise self.stopped

    def begin(self) -> None:
        """Give signs of life and look for a cancel, from another thread."""
        self._thread = threading.Thread(target=self._live, daemon=True, name="live")
        self._thread.start()

    def end(self) -> None:
        """Let go of the output."""
        self._end.set()
        if self._thread:
            self._thread.join(lease.EXPIRES)
        try:
            holder = lease.read(self.store, self.lease)
            if holder and holder.run == self.run:
                self.store.delete(self.lease)
            self.store.delete(f"{self.run}.cancel")
        except (OSError, PipelineError) as error:
            # What went wrong before is what the user has to know.
            log.warning("the output could not be let go of: %s", error)

    def interrupted(self, number: int, frame: FrameType | None) -> None:
        """Handle :data:`SIGNAL`."""
        if self.stopped and not self._end.is_set():
            raise KeyboardInterrupt

    def _live(self) -> None:
        failing, beat = False, time.monotonic()
        poll = POLL if isinstance(self.store, LocalStore) else POLL_REMOTE
        while not self._end.wait(poll):
            try:
                if not self.stopped:
                    self._look()
                if time.monotonic() - beat >= lease.BEAT and not self._lost():
                    self.store.replace(self.lease, self.me.renewed(), durable=False)
                    beat = time.monotonic()
                failing = False
            except (OSError, PipelineError) as error:
                if not failing:
                    log.warning("no sign of life could be given, trying again: %s", error)
                failing = True

    def _look(self) -> None:
        """Stop the run if it was cancelled, or if another has taken the output."""
        names = lease.names(self.store)
        if f"{self.run}.cancel" in names:
            try:
                by = json.loads(self.store.read(f"{self.run}.cancel"))
                who = printable(f" by process {by['pid']} on {by['host']}")
            except (KeyError, TypeError, ValueError):
                who = ""
            self._stop(
                f"The run was cancelled{who}.",
                "The same command goes on from here: what is finished is kept.",
                "cancelled",
            )
            return
        name, holder = lease.newest(self.store, names)
        if holder and holder.run != self.run and name >= self.lease:
            self._stop(
                f"Another process has taken this output, as this one gave no sign of life: "
                f"{holder}.",
                "Leave it to the other; or cancel that one and start the same command again.",
                "lost-output",
            )

    def _lost(self) -> bool:
        return self.stopped is not None and self.stopped.code == "lost-output"

    def _stop(self, message: str, hint: str, code: str) -> None:
        self.stopped = RunError(message, hint=hint, code=code, where=lease.output_of(self.store))
        log.warning("%s", message)
        if signal.getsignal(SIGNAL) == self.interrupted:
            # Sent to that very thread, whatever it waits for ends.
            signal.pthread_kill(threading.main_thread().ident or 0, SIGNAL)


@contextmanager
def hold(work: Store, command: str, executor: str = "local") -> Iterator[Hold]:
    """Be the only one who writes an output.

    Args:
        work: the folder of the output for a run's memory.
        command: what is done, for people: ``run distill``, ``gc``.
        executor: where shards are worked on.

    Raises:
        UsageError: the output cannot be written.
        RunError: another holds it; or, from within, it was cancelled or taken by another.
    """
    me = Holder.here(command, executor)
    store, local = work.below(LIVE), isinstance(work, LocalStore)
    with _locked(work, store):
        lease.held_here.add(me.run)
        try:
            taken = Hold(store, me, lease.take(store, me, alone=local))
            try:
                with _listening(taken):
                    yield taken
            except KeyboardInterrupt:
                if taken.stopped:
                    raise taken.stopped from None
                raise
            finally:
                taken.end()
        finally:
            lease.held_here.discard(me.run)


@contextmanager
def _locked(work: Store, store: Store) -> Iterator[None]:
    """The kernel's lock, where there is one; who has it already is told by its lease."""
    with ExitStack() as stack:
        try:
            stack.enter_context(exclusive(work))
        except RunError as error:
            other = lease.newest(store, lease.names(store))[1]
            raise lease.busy(other, store) if other else error from None
        yield


@contextmanager
def _listening(taken: Hold) -> Iterator[None]:
    """Let the run be interrupted, where Python can do that: in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        taken.begin()
        yield
        return
    before = signal.signal(SIGNAL, taken.interrupted)
    try:
        taken.begin()
        yield
    finally:
        signal.signal(SIGNAL, before or signal.SIG_DFL)


def holder(work: Store) -> Holder | None:
    """Who writes an output now; ``None`` where nobody does. Disturbs nobody.

    In an object store a holder counts that gave a sign of life within the last minute, by clocks
    that agree, and whose process is not known to be gone.
    """
    if isinstance(work, LocalStore) and not is_locked(work.root / "lock"):
        return None
    store = work.below(LIVE)
    found = lease.newest(store, lease.names(store))[1]
    alive = found and not found.dead and (isinstance(work, LocalStore) or found.fresh)
    return found if alive else None


def cancel(work: Store) -> Holder:
    """Ask the run that writes an output to stop; it does within seconds. Whom was asked.

    Raises:
        UsageError: nobody writes it.
    """
    found = holder(work)
    if found is None:
        raise UsageError(
            "Nothing is running on this output.",
            hint="'pipeline status' says how far it came; the same command goes on from there.",
            code="not-running",
            where=lease.output_of(work),
        )
    request = {"host": socket.gethostname(), "pid": os.getpid(), "time": lease.now()}
    work.below(LIVE).replace(f"{found.run}.cancel", dumps(request))
    return found
