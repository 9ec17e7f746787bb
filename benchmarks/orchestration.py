"""What a run costs beside its work: with a million shards, beside a bare loop, and on Ray.

Scale: shards that hold one row each and no work. All but the last hundredth are finished; a fresh
process then plans the rest, resumes up to the first missing shard, or asks for the status. Up to
10,000 shards a run has done them; more are written into the ledger as a run leaves them, each with
a file of its own (a hard link). Memory is the peak of the process over its peak for 1,000 shards;
bytes a shard are those that it grew by from the size before, for each shard more.

Overhead: 200 Parquet files of JPEGs, decoded and scaled to 256 x 256 pixels, by a run and by a loop
that reads, decodes and writes to the disk the same. Ray: the same run with one and two workers of
one cluster, which is started before. These take turns; the medians are compared. The images are
``<data>/imagenette/train-*`` where there is such, else made: 400 x 500 pixels, smooth with noise.

    python benchmarks/orchestration.py [--data shared/data] [--quick] [--json] [--only scale]
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from pipeline.orchestration.executor import Executor, Record, Resources, Unit, Work
from pipeline.orchestration.ledger import PART
from pipeline.orchestration.local_executor import LocalExecutor
from pipeline.orchestration.memory import WORK, StepFolders, read_steps
from pipeline.orchestration.plan import Planner
from pipeline.orchestration.ray_executor import RayExecutor
from pipeline.orchestration.run import Run, open_run
from pipeline.orchestration.status import status
from pipeline.orchestration.steps import shard_units
from pipeline.stage import ShardContext
from pipeline.stages.decode import Decode
from pipeline.storage.artifact import Artifact
from pipeline.storage.formats import Region
from pipeline.storage.parquet import ParquetFormat, ParquetSource
from pipeline.storage.records import to_records
from pipeline.storage.source import Shard, Source
from pipeline.storage.store import LocalStore, Store, sync

FINISHED = 0.99
BY_A_RUN = 10_000  # shards up to which a run does them; a tenth of it with --quick
LINKS = 50_000  # of one file; ext4 has 65,000 at most
MILLION = 1_000_000
SECONDS = {"plan": 30.0, "resume": 30.0, "status": 10.0}  # at most, for a million shards
BYTES = {"plan": 300.0, "resume": 300.0, "status": 100.0}  # at most, for each further shard

SIZE = 256
SHARDS = 200
WARM = 8  # shards of the turn that is not counted; on Ray all, so that every worker begins

Turn = Callable[[ParquetSource, Path], None]
"""Goes through all shards of a source once and writes to an empty folder."""


@dataclass(frozen=True)
class Target:
    """A figure and what it is to be, at most or at least."""

    name: str
    target: float
    measured: float
    least: bool = False

    @property
    def met(self) -> bool:
        return self.measured >= self.target if self.least else self.measured <= self.target


@dataclass(frozen=True)
class NumberedShards(Sequence[Shard]):
    """Shards that are made when they are asked for."""

    length: int

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Shard]:
        return map(_numbered, range(self.length))

    @overload
    def __getitem__(self, index: int) -> Shard: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Shard]: ...
    def __getitem__(self, index: int | slice) -> Shard | Sequence[Shard]:
        numbers = range(self.length)[index]
        return _numbered(numbers) if isinstance(numbers, int) else [*map(_numbered, numbers)]


def _numbered(number: int) -> Shard:
    return Shard(f"{number:08d}", f"shard-{number:08d}", 1, {"number": number}, 1)


@dataclass(frozen=True)
class OneRow(Source):
    """A source of shards with one row each."""

    count: int

    @property
    def shards(self) -> Sequence[Shard]:
        return NumberedShards(self.count)

    @property
    def classes(self) -> tuple[str, ...]:
        return ()

    def read(self, shard: Shard) -> pa.Table:
        return pa.table({"key": [shard.name]})


class EnoughError(Exception):
    """So many units were asked for as were to be done."""


class Stopping(LocalExecutor):
    """Does so many units and stops at the next one."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self._units = units

    def run(self, work: Work, units: Iterable[Unit], resources: Resources) -> Iterator[Record]:
        rest = iter(units)
        yield from super().run(work, islice(rest, self._units), resources)
        next(rest)
        raise EnoughError


def step(run: Run, shards: int) -> None:
    run.map("copy", OneRow(shards), [], to=ParquetFormat())


def begin(out: Store, shards: int, units: int) -> None:
    """Begin, or go on with, the run of the empty step, and leave it after so many units."""
    with suppress(EnoughError), open_run(out, Stopping(units)) as run:
        step(run, shards)


def folders_of(out: Store) -> StepFolders:
    (folder,) = read_steps(out.below(WORK))
    return StepFolders.of(out, folder)


def fill(out: LocalStore, shards: int, first: int, last: int) -> None:
    """Write the records of finished shards, each with one file, as a run leaves them."""
    folders = folders_of(out)
    folder = Path(folders.artifact.url)
    sample = next(to_records(next(folders.ledger.tables())))
    (entry,) = sample["files"]
    file = folder / entry["path"]

    def record(unit: Any) -> Record:
        nonlocal file
        path = folder / f"{unit.name}.parquet"
        if not path.exists():
            if unit.index % LINKS:
                os.link(file, path)
            else:
                file = Path(shutil.copy(file, path))
        # Another digest for each, as of real files: they take their room.
        checksum = hashlib.sha256(unit.name.encode()).hexdigest()
        files = [{**entry, "path": path.name, "sha256": checksum}]
        own = {"index": unit.index, "name": unit.name, "identity": unit.identity}
        return {**sample, **own, "offset": unit.region.offset, "files": files}

    units = islice(shard_units(NumberedShards(shards), ParquetFormat(), ""), first, last)
    while records := [record(unit) for unit in islice(units, PART)]:
        if len(records) == PART:
            folders.ledger.compact(records)
        else:  # what no part was made of yet
            for one in records:
                folders.ledger.write(one)


def plan(out: Store, shards: int) -> None:
    planner = Planner(out, LocalExecutor())
    planner.follow(lambda run: step(run, shards))
    (found,) = planner.plans
    assert found.missing == shards - int(shards * FINISHED)


def resume(out: Store, shards: int) -> None:
    begin(out, shards, 0)


def ask(out: Store, shards: int) -> None:
    (found,) = status(out).steps
    assert found.done == int(shards * FINISHED)


def finish(out: Store, shards: int) -> None:
    folders = folders_of(out.writing_in(f"{WORK}/unfinished"))
    records = folders.ledger.collect()
    assert records.num_rows == shards
    Artifact.finish(folders.artifact, {"kind": "table"}, records)


PARTS: dict[str, Callable[[Store, int], None]] = {
    "plan": plan,
    "resume": resume,
    "status": ask,
    "finish": finish,
}


def peak() -> int:
    """Most memory that this process had, in bytes."""
    # 'getrusage' begins with the peak of the process that started this one.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def measured_here(part: str, out: Path, shards: int) -> None:
    began = time.perf_counter()
    PARTS[part](LocalStore(out), shards)
    print(json.dumps([time.perf_counter() - began, peak()]))


def measured(part: str, out: Path, shards: int, rounds: int = 1) -> tuple[float, float]:
    """Seconds and peak of memory in bytes of a part, in fresh processes: medians."""
    command = [sys.executable, __file__, "--part", part, str(out), str(shards)]
    found = [
        json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        for _ in range(rounds)
    ]
    seconds, memory = zip(*found, strict=True)
    return statistics.median(seconds), statistics.median(memory)


def scale(options: argparse.Namespace) -> list[Target]:
    sizes = [10**power for power in range(3, 6 if options.quick else 7)]
    found: dict[str, list[tuple[float, float]]] = {part: [] for part in SECONDS}
    print("scale: shards without work, 99 % of them finished")
    for shards in sizes:
        with tempfile.TemporaryDirectory() as work:
            out, done = LocalStore(Path(work) / "out"), int(shards * FINISHED)
            begin(out, shards, 1)  # what is imported late is imported now
            began = time.perf_counter()
            if shards <= (BY_A_RUN // 10 if options.quick else BY_A_RUN):
                begin(out, shards, done - 1)
                spent = time.perf_counter() - began
                print(f"{shards:9,} done by a run: {spent / done * 1e3:.2f} ms a shard")
            else:
                fill(out, shards, 0, done)
                spent = time.perf_counter() - began
                print(f"{shards:9,} written into the ledger, with their files, in {spent:.0f} s")
            for part in SECONDS:
                found[part].append(measured(part, out.root, shards, 1 if options.quick else 3))
            if shards == sizes[-1]:
                fill(out, shards, done, shards)
                finishing = measured("finish", out.root, shards)
    print(f"{'part':8}{'shards':>10}{'seconds':>9}{'growth':>9}{'MB more':>9}{'bytes/shard':>13}")
    targets = []
    for part, rows in found.items():
        print(f"{part:8}{sizes[0]:10,}{rows[0][0]:9.2f}")
        each = 0.0
        for (fewer, shards), (before, now) in zip(pairwise(sizes), pairwise(rows), strict=True):
            more, each = now[1] - rows[0][1], (now[1] - before[1]) / (shards - fewer)
            growth = f"{now[0] / before[0]:7.1f} x{more / 1e6:9.1f}{each:13.0f}"
            print(f"{part:8}{shards:10,}{now[0]:9.2f}{growth}")
        limit = SECONDS[part] * sizes[-1] / MILLION
        targets.append(Target(f"{part} of {sizes[-1]:,} shards (s)", limit, rows[-1][0]))
        name = f"memory of {part} from {sizes[-2]:,} to {sizes[-1]:,} shards (bytes a shard)"
        targets.append(Target(name, BYTES[part], each))
    more = (finishing[1] - found["resume"][0][1]) / 1e6
    print(f"{'finish':8}{sizes[-1]:10,}{finishing[0]:9.2f}{'':9}{more:9.1f}")
    return targets


def pictures(data: Path | None) -> list[bytes]:
    """JPEGs."""
    if data:
        store = LocalStore(data / "imagenette")
        files = [info for info in store.files() if info.name.startswith("train-")]
        real = ParquetSource(store, tuple(files))
        return [jpeg for table in real.tables() for jpeg in table["image"].to_pylist()]
    random, made = np.random.default_rng(0), []
    for _ in range(64):
        coarse = Image.fromarray(random.integers(0, 256, (8, 10, 3), np.uint8))
        smooth = np.asarray(coarse.resize((500, 400), Image.Resampling.BICUBIC), np.float32)
        noisy = (smooth + random.normal(0, 4, smooth.shape)).clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noisy).save(buffer, "jpeg", quality=90)
        made.append(buffer.getvalue())
    return made


def written(jpegs: Iterable[bytes], images: int, folder: Path) -> ParquetSource:
    """A source of 200 shards, each a file."""
    endless = cycle(jpegs)
    for shard in range(SHARDS):
        keys = [f"{shard:03d}-{image:03d}" for image in range(images)]
        table = pa.table({"key": keys, "image": [*islice(endless, images)]})
        pq.write_table(table, folder / f"{shard:03d}.parquet")
    store = LocalStore(folder)
    return ParquetSource(store, tuple(store.files()))


def bare(source: ParquetSource, out: Path) -> None:
    """What one would write without a run."""
    stage, writer = Decode(SIZE, 3), ParquetFormat()
    for shard in source.shards:
        table = stage(source.read(shard), ShardContext(shard.name, 0))
        writer.write(table, out, Region(shard.name, 0, 0, 0))
        sync(out / f"{shard.name}.parquet")


def by_run(executor: Executor, workers: int | None = None) -> Turn:
    def turn(source: ParquetSource, out: Path) -> None:
        resources = {"pixels": Resources(workers=workers)}
        with open_run(LocalStore(out), executor, resources=resources) as run:
            run.map("pixels", source, [Decode(SIZE, 3)], to=ParquetFormat())

    return turn


class KeptRay(RayExecutor):
    """A cluster that goes on when a run ends."""

    def close(self) -> None:
        """The next turn needs it."""

    def shut_down(self) -> None:
        super().close()


def alternately(
    turns: dict[str, Turn], source: ParquetSource, rounds: int, warm: int
) -> dict[str, list[float]]:
    """Seconds of each turn, after one over the first shards that is not counted."""
    found: dict[str, list[float]] = {name: [] for name in turns}
    for index in range(rounds + 1):
        # There and back, so that none always comes after the same.
        for name in turns if index % 2 else reversed(turns):
            # Anew, so that nothing is known of it.
            given = replace(source) if index else replace(source, files=source.files[:warm])
            with tempfile.TemporaryDirectory() as out:
                began = time.perf_counter()
                turns[name](given, Path(out))
                found[name] += [time.perf_counter() - began] if index else []
    for name, seconds in found.items():
        spread = f"({min(seconds):.2f} to {max(seconds):.2f})"
        print(f"{name:28}{statistics.median(seconds):8.2f} s {spread}")
    return found


def overhead(source: ParquetSource, rounds: int) -> list[Target]:
    print("overhead: one process, seconds for 200 shards, median over turns (least to most)")
    turns: dict[str, Turn] = {"run, local executor": by_run(LocalExecutor()), "bare loop": bare}
    run, loop = map(statistics.median, alternately(turns, source, rounds, WARM).values())
    return [Target("a run over a bare loop (x)", 1.05, run / loop)]


def on_ray(source: ParquetSource, rounds: int) -> list[Target]:
    print("Ray: seconds for 200 shards, median over turns (least to most)")
    executor = KeptRay()
    try:
        turns = {f"run, Ray, workers={n}": by_run(executor, n) for n in (2, 1)}
        two, one = map(statistics.median, alternately(turns, source, rounds, SHARDS).values())
    finally:
        executor.shut_down()
    return [Target("Ray with 2 workers over 1 (x)", 1.7, one / two, least=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("PIPELINE_DATA"))
    parser.add_argument("--quick", action="store_true", help="up to 100,000 shards, fewer turns")
    parser.add_argument("--json", action="store_true", help="end with a line of JSON")
    names = ("scale", "overhead", "ray")
    parser.add_argument("--only", choices=names, action="append", help="all unless given")
    parser.add_argument("--part", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        part, out, shards = options.part
        measured_here(part, Path(out), int(shards))
        return
    chosen = options.only or names
    targets = scale(options) if "scale" in chosen else []
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    with tempfile.TemporaryDirectory() as folder:
        images, rounds = (16, 3) if options.quick else (32, 7)
        data = Path(options.data) if options.data else None
        source = written(pictures(data), images, Path(folder))
        # Ray's processes keep a core busy: it comes last.
        targets += overhead(source, rounds) if "overhead" in chosen else []
        targets += on_ray(source, rounds) if "ray" in chosen else []
    for target in targets:
        told = f"target {'at least' if target.least else 'at most'} {target.target:g}"
        print(f"{target.name}: {target.measured:.2f}, {told}, {'met' if target.met else 'missed'}")
    if options.json:
        keys = ("name", "target", "measured", "met")
        print(json.dumps({"targets": [{key: getattr(t, key) for key in keys} for t in targets]}))


if __name__ == "__main__":
    main()
