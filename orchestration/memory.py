"""What a run remembers beside its output: the steps that it came to, and of each what is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.orchestration.ledger import Ledger
from pipeline.storage.atomic import seal, unseal
from pipeline.storage.store import Store

WORK = ".run"
"""Folder of an output for what is no part of it."""
PLAN, STEPS = "plan.json", "steps.json"


@dataclass(frozen=True)
class StepFolders:
    """Where one step keeps what.

    Attributes:
        artifact: published files.
        work: everything else; never part of the output.
    """

    artifact: Store
    work: Store

    @classmethod
    def of(cls, out: Store, step: str) -> StepFolders:
        """Those of a step of the output ``out``."""
        return cls(out.below(step), out.below(WORK).below(step))

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.work.below("ledger"), self.artifact)


def write_plan(work: Store, step: str, identity: str, total: int) -> None:
    """Say what a step is to do; forget what was done where that was something else."""
    data = seal({"step": step, "identity": identity, "shards": total})
    before = read_plan(work)
    if before and before["identity"] != identity:
        work.below("ledger").remove()
    if work.info(PLAN) is None or work.read(PLAN) != data:
        work.replace(PLAN, data)


def read_plan(work: Store) -> dict[str, Any] | None:
    """What a step set out to do: its name, its identity and its shards."""
    return _sealed(work, PLAN)


def write_steps(work: Store, steps: Sequence[str]) -> None:
    """Say which steps a run has come to: their folders, in order."""
    work.replace(STEPS, seal({"steps": steps}))


def read_steps(work: Store) -> list[str]:
    """The folders of the steps that the last run came to, in order."""
    found = _sealed(work, STEPS)
    return found["steps"] if found else []


def _sealed(work: Store, name: str) -> dict[str, Any] | None:
    try:
        return unseal(work.read(name))
    except (FileNotFoundError, ValueError):
        return None
