"""The work of a step that trains models: one unit is one model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import pyarrow as pa

from pipeline.device import reproducible
from pipeline.digest import dumps, seed_for
from pipeline.orchestration.checkpoint import Checkpoint
from pipeline.orchestration.executor import Record
from pipeline.orchestration.group import ALONE, Group
from pipeline.orchestration.memory import StepFolders
from pipeline.orchestration.steps import timed
from pipeline.orchestration.training import TrainingTask, train
from pipeline.storage.atomic import publish
from pipeline.storage.models import snapshot_file, write_model
from pipeline.storage.source import Source


@dataclass(frozen=True)
class Fit:
    """A training task and the sources it learns from, by the name the task knows them by.

    With ``snapshots`` the weights after every epoch are published beside the last ones.
    """

    task: TrainingTask
    inputs: Mapping[str, Source] = field(default_factory=dict)
    snapshots: bool = False


@dataclass(frozen=True)
class FitUnit:
    """One model of a fit step."""

    index: int
    name: str


@dataclass(frozen=True)
class FitWork:
    """Trains one model of a fit step.

    Attributes:
        folders: of the step.
        fits: what to train, by the name of the unit.
        seed: of the step.
        threads: CPU threads of one worker.
        checkpoint_seconds: time between two checkpoints; 0 writes one after every step.
    """

    folders: StepFolders
    fits: Mapping[str, Fit]
    seed: int
    threads: int
    checkpoint_seconds: float = 600.0

    def __call__(self, unit: FitUnit, group: Group = ALONE) -> Record:
        """Train a model, and publish it; of several workers the first one does, others say nothing.

        Args:
            unit: the model.
            group: the workers that train it; each makes this very call.
        """
        began, name = time.monotonic(), unit.name
        fit = self.fits[name]
        checkpoint = Checkpoint(
            self.folders.work.below("checkpoints"), name, self.checkpoint_seconds
        )
        with reproducible(self.threads), self.folders.work.scratch() as folder:
            inputs = {
                role: pa.concat_tables(source.tables()) for role, source in fit.inputs.items()
            }
            seed = seed_for(self.seed, name)
            result = train(fit.task, inputs, seed, checkpoint, group, snapshots=fit.snapshots)
            if not group.first:
                return {}
            (folder / name).mkdir()
            write_model(folder / name, result.training.model, result.training.spec)
            epochs = len(result.losses) if fit.snapshots else 0
            for epoch in range(1, epochs + 1):
                (folder / snapshot_file(name, epoch)).write_bytes(checkpoint.read_snapshot(epoch))
            history = {"loss": result.losses, "evaluations": result.evaluations}
            (folder / name / "history.json").write_bytes(dumps(history))
            record = {
                "index": unit.index,
                "name": name,
                "files": [vars(entry) for entry in publish(folder, self.folders.artifact)],
                "metrics": result.metrics,
                **timed(began),
            }
        self.folders.ledger.write(record)
        checkpoint.delete(epochs)
        return record
