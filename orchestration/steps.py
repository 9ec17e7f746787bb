"""The work of a step on one unit: read, compute, write aside, publish, commit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, repeat
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.device import reproducible
from pipeline.digest import dumps, seed_for
from pipeline.errors import RunError
from pipeline.orchestration.ledger import Ledger
from pipeline.orchestration.training import Checkpoint, TrainingTask, train
from pipeline.stage import ShardContext, Stage
from pipeline.storage.artifact import quarantine_file
from pipeline.storage.atomic import publish
from pipeline.storage.formats import Format, Region
from pipeline.storage.models import write_model
from pipeline.storage.parquet import write_table
from pipeline.storage.source import Shard, Source
from pipeline.storage.store import Store

DUPLICATE = "duplicate-key"
BAD_LABEL = "bad-label"


@dataclass(frozen=True)
class StepFolders:
    """Where one step keeps what.

    Attributes:
        artifact: published files.
        work: everything else; never part of the output.
    """

    artifact: Store
    work: Store

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.work.below("ledger"), self.artifact)

    def checkpoint(self, unit: str) -> Checkpoint:
        return Checkpoint(self.work.below("checkpoints"), unit)


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
        with reproducible(self.threads), self.folders.work.scratch() as folder:
            given = self.source.read(shard)
            table, bad = screen(given, self.source)
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
            bad = pa.concat_tables([bad, _set_aside(given, context)])
            if bad.num_rows:
                path = folder / quarantine_file(unit)
                path.parent.mkdir(exist_ok=True)
                write_table(bad, path)
            record = {
                "name": unit,
                "rows": table.num_rows,
                "bytes": table.nbytes,
                "offset": region.offset,
                "files": [vars(entry) for entry in publish(folder, self.folders.artifact)],
                "counts": {
                    "in": given.num_rows,
                    "out": table.num_rows,
                    "filtered": context.filtered,
                    "quarantined": tally(bad["reason"].to_pylist()),
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
        with reproducible(self.threads), self.folders.work.scratch() as folder:
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
        checkpoint.delete()
        return record


def screen(table: pa.Table, source: Source) -> tuple[pa.Table, pa.Table]:
    """Split what a source gave into samples, and rows that are none with ``reason`` and ``detail``.

    Not a sample is a row with an ``error`` (``unreadable``), one without image or label where the
    source has such (``no-image``, ``no-label``), with a label that no class has (``bad-label``), or
    with the key of an earlier row of its shard (``duplicate-key``).

    Raises:
        RunError: not one label belongs to a class, so that the class names must be wrong.
    """
    problems: dict[int, tuple[str, str]] = {}
    for rows, reason, details in _problems(table, len(source.classes)):
        for row, detail in zip(rows, details, strict=False):
            problems.setdefault(row, (reason, detail))
    bad = sorted(problems)
    good = table
    if bad:
        every = pa.array(range(table.num_rows), pa.int64())
        good = table.filter(pc.invert(pc.is_in(every, pa.array(bad, pa.int64()))))
    if "error" in table.column_names:
        good = good.drop_columns(["error"])
    return good, _with_reasons(table, bad, [problems[row] for row in bad])


def _problems(table: pa.Table, classes: int) -> Iterator[tuple[Sequence[int], str, Iterable[str]]]:
    """Rows, reason and details of what is wrong; of a row with several the first counts."""
    names = set(table.column_names)
    if "error" in names:
        rows = pc.indices_nonzero(pc.is_valid(table["error"])).to_pylist()
        yield rows, "unreadable", table["error"].take(pa.array(rows, pa.int64())).to_pylist()
    if "image" in names:
        yield _rows(pc.is_null(table["image"])), "no-image", repeat("The sample has no image.")
    if "label" in names and classes:
        labels, missing = table["label"], pc.is_null(table["label"])
        yield _rows(missing), "no-label", repeat("The sample has no label.")
        wrong = pc.fill_null(pc.or_(pc.less(labels, 0), pc.greater_equal(labels, classes)), False)
        # Of one sample alone it cannot be told whether it or the list of names is wrong.
        if len(table) > 1 and pc.any(wrong).as_py() and pc.all(pc.or_(wrong, missing)).as_py():
            raise _wrong_labels(labels, classes)
        yield _rows(wrong), "bad-label", repeat(f"Labels go from 0 to {classes - 1}.")
    if "key" in names:
        keys = table["key"].to_pylist()
        if len(set(keys)) < len(keys):
            first = {key: row for row, key in reversed(list(enumerate(keys)))}
            again = [row for row, key in enumerate(keys) if first[key] != row]
            yield again, DUPLICATE, repeat("An earlier sample of the shard has this key.")


def _rows(mask: Any) -> list[int]:
    return cast("list[int]", pc.indices_nonzero(mask).to_pylist())


def _wrong_labels(labels: pa.ChunkedArray, classes: int) -> RunError:
    low, high = pc.min_max(labels).as_py().values()
    return RunError(
        f"The labels of this shard are from {low} to {high}; there are {classes} classes.",
        hint="Labels count from 0; name every class in classes.txt, one a line.",
        code="bad-labels",
    )


def _set_aside(given: pa.Table, context: ShardContext) -> pa.Table:
    """The rows, as they were read, of the samples that stages put into quarantine."""
    keys = given["key"].to_pylist() if context.bad else []
    # Of a key that is there twice the first row is the one that stages saw.
    row_of = {key: row for row, key in reversed(list(enumerate(keys)))}
    for item in context.bad:
        if item["key"] not in row_of:
            raise RunError(
                f"A stage put the sample '{item['key']}' into quarantine, which it never got.",
                hint="A stage reports the key that came in with the sample.",
                code="lost-samples",
            )
    rows = [row_of[item["key"]] for item in context.bad]
    return _with_reasons(given, rows, [(i["reason"], i["detail"]) for i in context.bad])


def _with_reasons(table: pa.Table, rows: list[int], problems: list[tuple[str, str]]) -> pa.Table:
    chosen = table.take(pa.array(rows, pa.int64()))
    for index, name in enumerate(("reason", "detail")):
        column = pa.array([problem[index] for problem in problems], pa.string())
        chosen = chosen.append_column(name, column)
    return chosen


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


def tally(reasons: Sequence[str]) -> dict[str, int]:
    """How often each reason is there, by reason."""
    return {reason: reasons.count(reason) for reason in sorted(set(reasons))}
