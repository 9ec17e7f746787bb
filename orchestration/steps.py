"""The work of a step on one unit: read, compute, write aside, publish, commit."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa

from pipeline.device import reproducible
from pipeline.errors import RunError
from pipeline.orchestration.checkpoint import Checkpoint
from pipeline.orchestration.executor import Record, Rest
from pipeline.orchestration.memory import StepFolders
from pipeline.orchestration.screen import screen, tally, with_reasons
from pipeline.stage import ShardContext, Stage
from pipeline.storage.artifact import quarantine_file
from pipeline.storage.atomic import publish
from pipeline.storage.formats import Format, Region
from pipeline.storage.parquet import write_table
from pipeline.storage.source import Shard, Source


@dataclass(frozen=True)
class ShardUnit:
    """One shard of a map step: what is read, and where in the output its rows will lie.

    Attributes:
        index: place of the shard in its step.
        identity: digest of all that the shard's output depends on.
    """

    index: int
    shard: Shard
    region: Region
    identity: str

    @property
    def name(self) -> str:
        return self.shard.name


def shard_units(shards: Sequence[Shard], writer: Format, work: str) -> Iterator[ShardUnit]:
    """The units of a map step, in order.

    Args:
        shards: of the source.
        writer: the format that they are written in.
        work: digest of all that the output depends on beside the shards.

    Raises:
        RunError: the format needs shards of one known size, and these are not.
    """
    # Where row counts are unknown, formats that need no regions get meaningless ones.
    most, total = _regular_rows(shards, writer.name) if writer.regular else (0, 0)
    offset = 0
    for index, shard in enumerate(shards):
        region = Region(shard.name, offset, most, total)
        # What others a shard stands among counts only where they share files.
        place = f"{offset}/{most}/{total}" if writer.regular else ""
        parts = f"{work}\n{shard.identity}\n{shard.name}\n{place}"
        identity = hashlib.sha256(parts.encode()).hexdigest()
        yield ShardUnit(index, shard, region, identity)
        offset += shard.rows or 0


def _regular_rows(shards: Sequence[Shard], name: str) -> tuple[int, int]:
    """Rows of every shard but the last, and of all."""
    rows = [shard.rows for shard in shards]
    known = [count for count in rows if count is not None]
    if len(known) < len(rows) or len({*known[:-1]}) > 1 or known[-1:] > known[:1]:
        raise RunError(
            f"The format '{name}' needs shards of one known size.",
            hint="Write this data set as parquet or webdataset.",
            code="ragged-shards",
        )
    return (known[0] if known else 0), sum(known)


def timed(began: float) -> dict[str, float]:
    """When a unit was finished, and its seconds since ``began`` (monotonic)."""
    return {"at": time.time(), "seconds": time.monotonic() - began}


@dataclass(frozen=True)
class MapWork:
    """Runs the stages of a map step on one shard.

    ``checkpoint_seconds`` is the time between two checkpoints of a stage that writes such; 0 has
    it write one after every step.
    """

    folders: StepFolders
    source: Source
    stages: tuple[Stage, ...]
    writer: Format
    seed: int
    threads: int
    checkpoint_seconds: float = 600.0

    def __call__(self, unit: ShardUnit) -> Rest:
        began = time.monotonic()
        checkpoint = Checkpoint(
            self.folders.work.below("checkpoints"), unit.name, self.checkpoint_seconds
        )
        with ExitStack() as stack:
            folder = stack.enter_context(self.folders.work.scratch())
            record = self._compute(unit, folder, checkpoint)
            # Published by whoever calls that; dropped without a call, the folder goes too.
            return partial(self._publish, record, folder, began, checkpoint, stack.pop_all())

    def _compute(self, unit: ShardUnit, folder: Path, checkpoint: Checkpoint) -> Record:
        shard, region = unit.shard, unit.region
        context = ShardContext(unit.name, self.seed, checkpoint)
        with reproducible(self.threads):
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
                path = folder / quarantine_file(unit.name)
                path.parent.mkdir(exist_ok=True)
                write_table(bad, path)
        return {
            "index": unit.index,
            "name": unit.name,
            "identity": unit.identity,
            "rows": table.num_rows,
            "bytes": table.nbytes,
            "offset": region.offset,
            "counts": {
                "in": given.num_rows,
                "out": table.num_rows,
                "filtered": context.filtered,
                "quarantined": tally(bad["reason"].to_pylist()),
            },
            "metrics": context.metrics,
        }

    def _publish(
        self,
        record: Record,
        folder: Path,
        began: float,
        checkpoint: Checkpoint,
        scratch: ExitStack,
    ) -> Record:
        if "files" not in record:  # else only the record could not be written
            files = publish(folder, self.folders.artifact)
            scratch.close()  # raises where it was cleared away
            record["files"] = [vars(entry) for entry in files]
        record |= timed(began)
        self.folders.ledger.write(record)
        checkpoint.delete()
        return record


def _set_aside(given: pa.Table, context: ShardContext) -> pa.Table:
    """The rows, as they were read, of the samples that stages put into quarantine."""
    if not context.bad:
        return with_reasons(given.slice(0, 0), [], [])
    keys = given["key"].to_pylist()
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
    return with_reasons(given, rows, [(i["reason"], i["detail"]) for i in context.bad])


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
