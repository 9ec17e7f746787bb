"""How far a run is: read from its memory, whether it works, has ended or was killed."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.errors import UsageError
from pipeline.orchestration.lease import Holder
from pipeline.orchestration.ledger import Ledger, Totals
from pipeline.orchestration.live import holder
from pipeline.orchestration.memory import WORK, read_plan, read_steps
from pipeline.storage.artifact import Artifact
from pipeline.storage.store import Store

RECENT = 600.0
"""Seconds in which something was finished, for a rate to say anything of now."""


@dataclass(frozen=True)
class StepStatus:
    """How far one step is.

    Attributes:
        step: its name.
        folder: where its output lies.
        state: ``finished``, ``working``, ``stopped`` or ``failed``.
        shards: how many it has.
        done: how many are finished.
        failed: the errors of the shards in quarantine, by name.
        totals: what the finished ones come to.
        rate: samples a second over the time in which shards were finished.
        eta: seconds that the rest takes at the rate of shards until now.
    """

    step: str
    folder: str
    state: str
    shards: int
    done: int
    failed: dict[str, str]
    totals: Totals
    rate: float | None
    eta: float | None


@dataclass(frozen=True)
class Status:
    """How far a run is.

    Attributes:
        state: ``running``; ``published`` where the last step that began is finished and the
            output is there; else ``stopped``.
        holder: who runs it.
        steps: those that have begun, in order.
    """

    state: str
    holder: Holder | None
    steps: list[StepStatus]

    def summary(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)


def status(out: Store) -> Status:
    """Read how far the run in the output folder ``out`` is.

    Raises:
        UsageError: no run was started there.
    """
    work = out.below(WORK)
    folders, found = read_steps(work), holder(work)
    if not folders and found is None:
        raise UsageError(
            "No run was started in this folder.",
            hint="Give the folder that was given with --out.",
            code="no-run",
            where=str(out),
        )
    plans = [(folder, read_plan(work.below(folder))) for folder in folders]
    steps = [_step(out, folder, plan, running=found is not None) for folder, plan in plans if plan]
    if found:
        state = "running"
    else:
        ended = all(step.state == "finished" for step in steps)
        state = "published" if ended and Artifact.exists(out) else "stopped"
    return Status(state, found, steps)


def _step(out: Store, folder: str, plan: dict[str, Any], *, running: bool) -> StepStatus:
    place = out.below(folder)
    ledger = Ledger(out.below(WORK).below(folder).below("ledger"), place)
    totals, shards = ledger.totals(), plan["shards"]
    failed = {name: error["message"] for name, error in ledger.failed().items()}
    span = totals.last - totals.first
    if Artifact.exists(place):
        state = "finished"
    elif failed:
        state = "failed"
    else:
        state = "working" if running else "stopped"
    rate = totals.counts["in"] / span if span > 0 and totals.rows else None
    eta = None
    if state == "working" and span > 0 and time.time() - totals.last < RECENT:
        eta = span / totals.shards * (shards - totals.shards)
    return StepStatus(plan["step"], folder, state, shards, totals.shards, failed, totals, rate, eta)
