"""Run what is due, once. What has to be remembered lies on disk, see ``schedule_runs``.

Two ticks at once share the work: whatever one has taken, the other leaves alone.
"""

from __future__ import annotations

import bisect
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pipeline.orchestration.schedule import ON_TIME, Decision, Schedule, decide, due_times
from pipeline.orchestration.schedule_runs import Claim, Record, Runs, ended, kill_group

log = logging.getLogger(__name__)
PATIENCE = timedelta(seconds=30)
"""How long a run that is told to stop may take before it is killed."""
POLL = 0.05  # seconds
AGAIN = "it was interrupted and is taken up again"


def pipeline_command(words: Sequence[str]) -> list[str]:
    """The command ``pipeline`` of this installation."""
    # -P: what lies beside the schedules is never imported.
    return [sys.executable, "-P", "-m", "pipeline.cli", *words]


@dataclass(frozen=True)
class Tick:
    """The schedules of one file, at one moment.

    Attributes:
        schedules: by name.
        root: folder of their runs, with a folder for each schedule.
        now: the moment; what comes due later is left to the next tick.
        cwd: working directory of the runs.
        command: the words of a schedule as a command line.
        patience: how long a run that is told to stop may take.
    """

    schedules: Mapping[str, Schedule]
    root: Path
    now: datetime
    cwd: Path
    command: Callable[[Sequence[str]], list[str]] = pipeline_command
    patience: timedelta = PATIENCE

    def runs(self, name: str) -> Runs:
        return Runs(self.root / name)

    def decisions(self, name: str) -> list[Decision]:
        """What is to be done about a schedule now; interrupted runs first."""
        runs, schedule = self.runs(name), self.schedules[name]
        with runs.guard():
            going, interrupted = runs.open()
            waiting = going and schedule.overlap == "forbid"
            again = [Decision(due, run=True, reason=AGAIN) for due in interrupted if not waiting]
            return again + self._new(runs, schedule, going)

    def run(self) -> list[tuple[str, Record]]:
        """Run what is due, one after the other by due time, and give what became of it.

        Raises:
            KeyboardInterrupt: it was told to stop; the run is stopped and is taken up again by the
                next tick.
        """
        done: list[tuple[str, Record]] = []
        queue: list[tuple[datetime, str, Claim]] = []

        def take(name: str) -> None:
            records, claim = self._take(name)
            done.extend((name, record) for record in records)
            if claim:
                bisect.insort(queue, (claim.due, name, claim), key=lambda item: item[:2])

        try:
            # All are taken before the first is run, so that no other tick runs them meanwhile.
            for name in self.schedules:
                take(name)
            while queue:
                _, name, claim = queue[0]
                done.append((name, self._run(name, claim)))
                queue.pop(0)
                take(name)
        finally:
            for _, _, claim in queue:
                claim.release()
        return done

    def _new(self, runs: Runs, schedule: Schedule, going: list[datetime]) -> list[Decision]:
        after = runs.settled_until(schedule.start, self.now - ON_TIME)
        due = list(due_times(schedule, after, self.now))
        return decide(schedule, due, self.now, going[-1] if going else None)

    def _take(self, name: str) -> tuple[list[Record], Claim | None]:
        """Record what is not to be run, and claim the next that is."""
        runs, schedule = self.runs(name), self.schedules[name]
        records: list[Record] = []
        with runs.guard():
            if not schedule.start:
                runs.begin(self.now - ON_TIME)
            going, interrupted = runs.open()
            decisions = self._new(runs, schedule, going)
            replacing = schedule.overlap == "replace" and any(each.run for each in decisions)
            for due in interrupted:
                if replacing or (runs.folder_of(due) / "replaced").exists():
                    reason = "it was interrupted, and a later run took its place"
                    records.append(runs.settle(Record(due.isoformat(), "replaced", reason)))
                elif not (going and schedule.overlap == "forbid"):
                    return records, runs.claim(due, AGAIN)
            for decision in decisions:
                if decision.run:
                    if replacing:
                        for due in going:
                            runs.mark_replaced(due)
                    return records, runs.claim(decision.due, decision.reason)
                day = decision.due.isoformat()
                record = Record(day, "skipped", decision.reason, decision.count)
                records.append(runs.settle(record))
        return records, None

    def _run(self, name: str, claim: Claim) -> Record:
        runs = claim.runs
        if self.schedules[name].overlap == "replace":
            self._stop_earlier(runs, claim.due)
        started = datetime.now(UTC)
        process = None
        try:
            with runs.guard():
                if claim.replaced:
                    reason = "a later run took its place before it began"
                    return runs.settle(Record(claim.due.isoformat(), "replaced", reason))
                process = self._start(name, claim)
            exit_code = _wait(process)
            with runs.guard():
                record = runs.settle(ended(claim, started, exit_code))
                process.wait()
        except BaseException:
            if process:
                self._stop(process)
            raise
        finally:
            claim.release()
        log.info("%s: %s, exit code %d", name, record.outcome, exit_code)
        return record

    def _start(self, name: str, claim: Claim) -> subprocess.Popen[bytes]:
        log.info("%s: running what was due %s", name, f"{claim.due:%Y-%m-%d %H:%M} UTC")
        with (claim.folder / "log.txt").open("ab") as output:
            # The run holds the lock too: it is not taken up again as long as it lives.
            process = subprocess.Popen(  # noqa: S603 - the command of this installation
                self.command(self.schedules[name].words),
                cwd=self.cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[claim.lock.fileno()],
            )
        claim.started(process.pid)
        return process

    def _stop(self, process: subprocess.Popen[bytes]) -> None:
        kill_group(process.pid, signal.SIGINT)
        try:
            process.wait(self.patience.total_seconds())
        except BaseException:  # noqa: BLE001 - out of patience, ours or theirs who stop us again
            kill_group(process.pid, signal.SIGKILL)
            process.wait()

    def _stop_earlier(self, runs: Runs, before: datetime) -> None:
        """Stop every earlier run of a schedule that is going on this machine."""
        began = time.monotonic()
        told: set[int] = set()
        while True:
            killing = time.monotonic() - began > self.patience.total_seconds()
            with runs.guard():
                earlier = [due for due in runs.open()[0] if due < before]
                groups = {group for due in earlier if (group := runs.group(due))}
                for group in groups if killing else groups - told:
                    kill_group(group, signal.SIGKILL if killing else signal.SIGINT)
            told |= groups
            if not groups:
                return
            time.sleep(POLL)


def _wait(process: subprocess.Popen[bytes]) -> int:
    """The exit code of a process, which stays a zombie so that nothing else gets its number."""
    if not hasattr(os, "waitid"):  # macOS, before Python 3.13
        return process.wait()
    found = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert found  # noqa: S101 - None is for WNOHANG
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
