"""SIGKILL of drivers, of workers and of everything at once, on Ray."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pytest
from faults import FORMATS, Sort, samples

from pipeline.orchestration import ray_executor
from pipeline.orchestration.executor import Executor, Record, Resources, Rest, Unit, Work
from pipeline.orchestration.local_executor import LocalExecutor
from pipeline.orchestration.memory import StepFolders
from pipeline.orchestration.ray_executor import RayExecutor
from pipeline.orchestration.run import Run, open_run
from pipeline.orchestration.steps import MapWork
from pipeline.stage import ShardContext
from pipeline.storage.parquet import ParquetFormat
from pipeline.storage.store import FileInfo, LocalStore, Store
from pipeline.testing.trees import tree_digest

POINTS = (
    "scratch made",
    "files written",
    "some files created",
    "all files created",
    "record written",
)
"""Moments of a worker's protocol, in their order: with the second, nothing has its name yet; with
the fourth, the record is not there yet."""

SOURCE = samples(5, 5, 5, 5, 5, 5, 5)
TAG = "PIPELINE_TEST_KILL"
"""Environment variable that tells which processes a driver and its Ray have started."""
WORKING = "ray::_do"
"""What a worker of Ray calls itself while it works on a shard."""
PATIENCE = 300.0


@dataclass(frozen=True)
class Fuse:
    """Kills its process at a moment, once: whoever makes the file ``mark`` dies."""

    mark: Path
    point: str

    def burn(self, point: str) -> None:
        if point != self.point:
            return
        with suppress(FileExistsError):
            self.mark.open("x").close()
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class DeadlyStore(Store):
    """Forwards to another store, and dies at a moment of a worker's protocol."""

    inner: Store
    fuse: Fuse

    @property
    def url(self) -> str:  # type: ignore[override]
        return self.inner.url

    def files(self) -> list[FileInfo]:
        return self.inner.files()

    def info(self, name: str) -> FileInfo | None:
        return self.inner.info(name)

    def open(self, name: str) -> Any:
        return self.inner.open(name)

    def create(self, name: str, file: Path) -> None:
        self.fuse.burn("files written")
        self.inner.create(name, file)
        self.fuse.burn("some files created")

    def link(self, name: str, source: Store) -> None:
        self.inner.link(name, source)

    def replace(self, name: str, data: bytes, *, durable: bool = True) -> None:
        self.fuse.burn("all files created")
        self.inner.replace(name, data, durable=durable)
        self.fuse.burn("record written")

    def delete(self, name: str) -> None:
        self.inner.delete(name)

    @property
    def parent(self) -> DeadlyStore:
        return replace(self, inner=self.inner.parent)

    def below(self, name: str) -> DeadlyStore:
        return replace(self, inner=self.inner.below(name))

    def beside(self, name: str) -> DeadlyStore:
        return replace(self, inner=self.inner.beside(name))

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        with self.inner.scratch() as folder:
            self.fuse.burn("scratch made")
            yield folder

    @contextmanager
    def fetched(self, names: Any) -> Iterator[Path]:
        with self.inner.fetched(names) as folder:
            yield folder


@dataclass(frozen=True)
class Deadly:
    """Work in whose first shards the worker is killed, in each at another moment."""

    work: MapWork
    marks: Path

    def __call__(self, unit: Any) -> Rest:
        if unit.index >= len(POINTS):
            return self.work(unit)
        folders, point = self.work.folders, POINTS[unit.index]
        fuse = Fuse(self.marks / point, point)
        wrapped = StepFolders(DeadlyStore(folders.artifact, fuse), DeadlyStore(folders.work, fuse))
        return replace(self.work, folders=wrapped)(unit)


class DeadlyRay(RayExecutor):
    """Ray, on which the first shards of the first step kill their workers."""

    def __init__(self, address: str, marks: Path) -> None:
        super().__init__(address)
        self.marks = marks

    def run(self, work: Work, units: Iterable[Unit], resources: Resources) -> Iterator[Record]:
        assert isinstance(work, MapWork)
        first = work.folders.artifact.url.rpartition("/")[2].startswith("first-")
        return super().run(Deadly(work, self.marks) if first else work, units, resources)


@dataclass(frozen=True)
class Slow:
    """A stage that leaves time to be killed."""

    version: ClassVar[int] = 1

    def __call__(self, table: pa.Table, context: ShardContext) -> pa.Table:
        time.sleep(0.2)
        return table


def small_run(out: Path, executor: Executor) -> Run:
    """Two steps over seven shards; of some samples are filtered, of some put into quarantine."""
    with open_run(LocalStore(out), executor, max_bad=1.0) as run:
        first = run.map("first", SOURCE, [Slow(), Sort("kkbkf")], to=FORMATS["webdataset"])
        second = run.map("second", first, [Slow(), Sort("kkkb")], to=ParquetFormat())
        run.publish("dataset", {"first": first.artifact, "second": second.artifact}, {}, b"<html>")
        return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("whole")
    small_run(out, LocalExecutor())
    return tree_digest(out)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster that outlives its drivers."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv(TAG, "cluster")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 0})
        patch.delenv(TAG)
        yield cluster.address
        cluster.shutdown()


def unfinished(out: Path) -> list[str]:
    return [path.name for path in out.glob(".run/unfinished/*")]


def check_finished(out: Path, whole: dict[str, str]) -> None:
    """What holds when a run has ended; what killed workers left is cleared away by the next."""
    assert tree_digest(out) == whole
    assert small_run(out, LocalExecutor()).executed == 0
    assert unfinished(out) == []
    assert tree_digest(out) == whole


def last_log(out: Path) -> str:
    log = max(out.glob(".run/logs/*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    return log.read_text()


def found_finished(out: Path) -> bool:
    """Whether the last start found shards that an earlier one had finished."""
    return "shards found finished" in last_log(out)


def test_a_worker_killed_at_every_point_is_made_good_within_the_run(
    address: str, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_executor, "PAUSES", (0.0,))
    out, marks = tmp_path / "out", tmp_path / "marks"
    marks.mkdir()
    run = small_run(out, DeadlyRay(address, marks))
    assert sorted(path.name for path in marks.iterdir()) == sorted(POINTS)
    assert run.executed == 2 * len(SOURCE.shards)
    assert last_log(out).count("5 shards lost their worker") == 1
    # The last two moments are past the scratch folder's removal.
    assert len(unfinished(out)) == len(POINTS[:3])
    check_finished(out, whole)


def drive(out: str, address: str) -> None:
    """A driver: what the processes below run."""
    small_run(Path(out), RayExecutor(address or None, workers=2))


@contextmanager
def driver(out: Path, address: str = "") -> Iterator[subprocess.Popen[bytes]]:
    """A driver in a session of its own, on a cluster or with a Ray of its own.

    It has finished its first shard when it is given; at the end it is gone.
    """
    script = "import sys; from test_kill_ray import drive; drive(*sys.argv[1:])"
    out.mkdir()
    errors = out.with_suffix(".err")
    with errors.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(out), address],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), TAG: out.name},
            stderr=file,
            start_new_session=True,
        )
    try:
        wait_until(lambda: process.poll() is not None or [*out.glob(".run/*/ledger/shards/*")])
        assert process.poll() is None, errors.read_text()
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def processes(tag: str) -> dict[int, str]:
    """Processes that live and were started under a tag, and what they call themselves."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended just now, or is another user's
            if f"{TAG}={tag}\0".encode() in (place / "environ").read_bytes():
                title = (place / "cmdline").read_bytes().partition(b"\0")[0]
                found[int(place.name)] = title.decode(errors="replace")
    return found


def wait_until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def kill_driver(out: Path, address: str, after: float) -> bool:
    """Kill a driver some seconds after its first shard; whether it was in time."""
    with driver(out, address) as process:
        time.sleep(after)
        process.kill()
        return process.wait() == -signal.SIGKILL


def kill_group(out: Path, after: float) -> bool:
    """Kill a driver and the daemons of its Ray; whether it was in time."""
    with driver(out) as process:
        time.sleep(after)
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait() == -signal.SIGKILL


def kill_worker(out: Path, address: str, after: float) -> bool:
    """Kill a worker of a driver, which goes on to its end; whether there was one at work."""
    with driver(out, address) as process:
        time.sleep(after)
        working = [pid for pid, name in processes("cluster").items() if name.startswith(WORKING)]
        for pid in working[:1]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert process.wait(PATIENCE) == 0, out.with_suffix(".err").read_text()
    return bool(working)


@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_driver_is_succeeded_by_another(
    address: str, whole: dict[str, str], tmp_path: Path, number: int
) -> None:
    out = tmp_path / uuid.uuid4().hex
    assert kill_driver(out, address, random.Random(number).uniform(0.0, 0.5))
    small_run(out, RayExecutor(address))
    assert found_finished(out)
    check_finished(out, whole)


def test_nothing_is_left_of_a_group_that_was_killed(whole: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / uuid.uuid4().hex
    assert kill_group(out, 0.2)
    # At once, while workers may still be at it: they see only later that their node is gone.
    small_run(out, LocalExecutor())
    assert found_finished(out)
    wait_until(lambda: not processes(out.name))
    check_finished(out, whole)


@pytest.mark.slow
def test_killed_at_random_times(address: str, whole: dict[str, str], tmp_path: Path) -> None:
    """Drivers, workers and groups in turn; PIPELINE_KILLS says how many, else 100."""
    times, moments = int(os.environ.get("PIPELINE_KILLS", "100")), random.Random(0)
    kills, recovered = Counter[str](), Counter[str]()
    for number in range(times):
        out, after = tmp_path / uuid.uuid4().hex, moments.uniform(0.0, 1.5)
        kind = ("driver", "worker", "group")[number % 3]
        if kind == "worker":
            kills[kind] += kill_worker(out, address, after)
            recovered[kind] += "lost their worker" in last_log(out)
        else:
            done = kill_driver(out, address, after) if kind == "driver" else kill_group(out, after)
            kills[kind] += done
            small_run(out, RayExecutor(address) if number % 2 else LocalExecutor())
            recovered[kind] += done and found_finished(out)
            wait_until(lambda out=out: not processes(out.name))
        check_finished(out, whole)
    print(f"of {times} runs were killed {dict(kills)}; recovered {dict(recovered)}")
    assert kills.total() >= 0.6 * times
    assert recovered.total() >= 0.4 * times
