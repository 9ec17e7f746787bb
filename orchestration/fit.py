"""The work of a step that trains models: one unit is one model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pyarrow as pa

from pipeline.device import reproducible
from pipeline.digest import dumps, seed_for
from pipeline.orchestration.executor import Record
from pipeline.orchestration.steps import StepFolders
from pipeline.orchestration.training import TrainingTask, train
from pipeline.storage.atomic import publish
from pipeline.storage.models import write_model
from pipeline.storage.source import Source


@dataclass(frozen=True)
class Fit:
    """A training task and the sources it learns from, by the name the task knows them by."""

    task: TrainingTask
    inputs: Mapping[str, Source] = field(default_factory=dict)


@dataclass(frozen=True)
class FitUnit:
    """One model of a fit step."""

    index: int
    name: str


@dataclass(frozen=True)
class FitWork:
    """Trains one model of a fit step."""

    folders: StepFolders
    fits: Mapping[str, Fit]
    seed: int
    threads: int

    def __call__(self, unit: FitUnit) -> Record:
        name = unit.name
        fit = self.fits[name]
        checkpoint = self.folders.checkpoint(name)
        with reproducible(self.threads), self.folders.work.scratch() as folder:
            inputs = {
                role: pa.concat_tables(source.tables()) for role, source in fit.inputs.items()
            }
            result = train(fit.task, inputs, seed_for(self.seed, name), checkpoint)
            (folder / name).mkdir()
            write_model(folder / name, result.training.model, result.training.spec)
            (folder / name / "history.json").write_bytes(dumps({"loss": result.losses}))
            record = {
                "index": unit.index,
                "name": name,
                "files": [vars(entry) for entry in publish(folder, self.folders.artifact)],
                "metrics": result.metrics,
            }
        self.folders.ledger.write(name, record)
        checkpoint.delete()
        return record
