"""The work of a step on one unit: read, compute, write aside, publish, commit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.device import reproducible
from pipeline.digest import dumps, seed_for
from pipeline.errors import RunError
from pipeline.orchestration.ledger import Ledger
from pipeline.orchestration.training import TrainingTask, train
from pipeline.stage import ShardContext, Stage
from pipeline.storage.atomic import attempt_folder, publish
from pipeline.storage.formats import Format, Region
from pipeline.storage.models import write_model
from pipeline.storage.source import Shard, Source

BAD_ROW = pa.schema(
    {"key": pa.string(), "reason": pa.string(), "detail": pa.string(), "data": pa.binary()}
)


@dataclass(frozen=True)
class StepFolders:
    """Where one step keeps what.

    Attributes:
        artifact: published files.
        work: everything else; never part of the output.
    """

    artifact: Path
    work: Path

    @property
    def attempts(self) -> Path:
        return self.work / "attempts"

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.work / "ledger", self.artifact)

    def checkpoint(self, unit: str) -> Path:
        return self.work / "checkpoints" / f"{unit}.pt"


@dataclass(frozen=True)
class MapWork:
    """Runs the stages of a map step on one shard."""

    folders: StepFolders
    source: Source
    stages: tuple[Stage, ...]
    writer: Format
    seed: int
    threads: int

    @cached_property
    def _plan(self) -> dict[str, tuple[Shard, Region]]:
        shards = self.source.shards
        rows = [shard.rows or 0 for shard in shards]
        ragged = None in {s.rows for s in shards} or len({*rows[:-1]}) > 1 or rows[-1:] > rows[:1]
        if self.writer.regular and ragged:
            raise RunError(
                f"The format '{self.writer.name}' needs shards of one known size.",
                hint="Write this data set as parquet or webdataset.",
                code="ragged-shards",
            )
        # Where row counts are unknown, formats that need no regions get meaningless ones.
        ends = list(accumulate(rows))
        return {
            shard.name: (shard, Region(shard.name, end - count, rows[0], ends[-1]))
            for shard, count, end in zip(shards, rows, ends, strict=True)
        }

    def __call__(self, unit: str) -> dict[str, Any]:
        shard, region = self._plan[unit]
        context = ShardContext(unit, self.seed)
        with reproducible(self.threads), attempt_folder(self.folders.attempts) as folder:
            table = self.source.read(shard)
            _check_labels(table, self.source)
            rows_in = table.num_rows
            for stage in self.stages:
                table = _apply(stage, table, context)
            if self.writer.regular and table.num_rows != shard.rows:
                raise RunError(
                    f"The shard was planned with {shard.rows} rows and came out with "
                    f"{table.num_rows}; the format '{self.writer.name}' cannot hold that.",
                    hint="Write this data set as parquet or webdataset.",
                    code="ragged-shards",
                )
            if table.num_rows:
                self.writer.write(table, folder, region)
            if context.bad:
                (folder / "quarantine").mkdir()
                bad = pa.Table.from_pylist(context.bad, schema=BAD_ROW)
                pq.write_table(bad, folder / "quarantine" / f"{unit}.parquet")
            record = {
                "name": unit,
                "rows": table.num_rows,
                "offset": region.offset,
                "files": [vars(entry) for entry in publish(folder, self.folders.artifact)],
                "counts": {
                    "in": rows_in,
                    "out": table.num_rows,
                    "filtered": context.filtered,
                    "quarantined": _tally(context),
                },
                "metrics": context.metrics,
            }
        self.folders.ledger.write(unit, record)
        return record


@dataclass(frozen=True)
class Fit:
    """A training task and the sources it learns from, by the name the task knows them by."""

    task: TrainingTask
    inputs: Mapping[str, Source] = field(default_factory=dict)


@dataclass(frozen=True)
class FitWork:
    """Trains one model of a fit step."""

    folders: StepFolders
    fits: Mapping[str, Fit]
    seed: int
    threads: int

    def __call__(self, unit: str) -> dict[str, Any]:
        fit = self.fits[unit]
        checkpoint = self.folders.checkpoint(unit)
        with reproducible(self.threads), attempt_folder(self.folders.attempts) as folder:
            inputs = {
                name: pa.concat_tables(source.tables()) for name, source in fit.inputs.items()
            }
            result = train(fit.task, inputs, seed_for(self.seed, unit), checkpoint)
            (folder / unit).mkdir()
            write_model(folder / unit, result.training.model, result.training.spec)
            (folder / unit / "history.json").write_bytes(dumps({"loss": result.losses}))
            record = {
                "name": unit,
                "files": [vars(entry) for entry in publish(folder, self.folders.artifact)],
                "metrics": result.metrics,
            }
        self.folders.ledger.write(unit, record)
        checkpoint.unlink(missing_ok=True)
        return record


def _check_labels(table: pa.Table, source: Source) -> None:
    if not source.classes or "label" not in table.column_names or not table.num_rows:
        return
    labels = table["label"]
    limits = pc.min_max(labels)
    low, high = limits["min"].as_py(), limits["max"].as_py()
    if labels.null_count or low < 0 or high >= len(source.classes):
        found = f"from {low} to {high}" + (", and some are missing" * bool(labels.null_count))
        raise RunError(
            f"The labels of this shard are {found}; there are {len(source.classes)} classes.",
            hint="Labels count from 0; name every class in classes.txt, one a line.",
            code="bad-labels",
        )


def _apply(stage: Stage, table: pa.Table, context: ShardContext) -> pa.Table:
    before = len(context.bad) + sum(context.filtered.values())
    result = stage(table, context)
    left_out = len(context.bad) + sum(context.filtered.values()) - before
    if table.num_rows != result.num_rows + left_out:
        raise RunError(
            f"The stage {type(stage).__name__} took {table.num_rows} samples, gave "
            f"{result.num_rows} and accounted for {left_out} left out.",
            hint="A stage reports every sample that it leaves out to its context.",
            code="lost-samples",
        )
    return result


def _tally(context: ShardContext) -> dict[str, int]:
    reasons = [row["reason"] for row in context.bad]
    return {reason: reasons.count(reason) for reason in sorted(set(reasons))}
