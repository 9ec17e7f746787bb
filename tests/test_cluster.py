"""A cluster of several nodes on one machine, one of which is lost in the middle of a run."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from samples import encoded, pixels

from pipeline.errors import RunError
from pipeline.orchestration.executor import Executor, Record, Resources, Unit, Work
from pipeline.orchestration.local_executor import LocalExecutor
from pipeline.orchestration.ray_executor import RayExecutor
from pipeline.orchestration.run import open_run
from pipeline.stages.encode import Encode
from pipeline.storage.open_source import open_source
from pipeline.storage.parquet import ParquetFormat
from pipeline.storage.store import LocalStore
from pipeline.storage.webdataset import WebDatasetFormat
from pipeline.testing.trees import tree_digest

SHARDS, ROWS = 16, 4


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without CPUs, so that the driver's node does no work, and two workers."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "num_gpus": 0})
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A WebDataset of small pictures, written by ``tarfile``."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for row, image in enumerate(pixels(ROWS, size=8, seed=shard)):
                for extension, data in (
                    ("png", encoded(image)),
                    ("cls", str((shard + row) % 3).encode()),
                ):
                    member = tarfile.TarInfo(f"s{shard:03d}r{row}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return folder


EXPECTED = {
    f"s{shard:03d}r{row}": (shard + row) % 3 for shard in range(SHARDS) for row in range(ROWS)
}


def found_in(out: Path, product: str, extension: str) -> list[tuple[str, int]]:
    """Keys and labels of a product, as pyarrow and tarfile see them."""
    folder = json.loads((out / "manifest.json").read_bytes())["products"][product]
    samples: list[tuple[str, int]] = []
    for path in sorted((out / folder).glob(f"*.{extension}")):
        if extension == "parquet":
            table = pq.read_table(path)
            samples += zip(table["key"].to_pylist(), table["label"].to_pylist(), strict=True)
            continue
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, kind = member.name.rpartition(".")
                file = tar.extractfile(member)
                if kind == "cls" and file:
                    samples.append((key, int(file.read())))
    return samples


@dataclass(frozen=True)
class Stuck:
    """Work whose fourth unit notes where it is and does not come back."""

    work: Work
    note: Path

    def __call__(self, unit: Any) -> Record:
        if unit.index == 3 and not self.note.exists():
            import ray

            part = self.note.with_suffix(".part")
            part.write_text(ray.get_runtime_context().get_node_id())
            part.rename(self.note)
            time.sleep(3600)
        return self.work(unit)


ZOMBIE = """
import json, pickle, sys, time
from pathlib import Path
from pipeline.orchestration.executor import attempts
work, unit, out = pickle.loads(Path(sys.argv[1]).read_bytes())
while not Path(out, "manifest.json").exists():
    time.sleep(0.1)
done = json.dumps(list(attempts(work, [unit])))
Path(sys.argv[1] + ".done").write_text(done)
"""


@dataclass(frozen=True)
class Orphaning:
    """The first worker dies at a unit; a process that it leaves behind does it when all is over."""

    work: Work
    note: Path
    out: Path

    def __call__(self, unit: Any) -> Record:
        if unit.index == 1 and not self.note.exists():
            self.note.write_bytes(pickle.dumps((self.work, unit, self.out)))
            subprocess.Popen([sys.executable, "-c", ZOMBIE, self.note], start_new_session=True)
            os._exit(1)
        return self.work(unit)


class Disturbed(RayExecutor):
    """Puts something between Ray and the work of every step."""

    def __init__(self, address: str, notes: Path, between: Callable[[Work, Path], Work]) -> None:
        super().__init__(address)
        self.notes, self.between, self.steps = notes, between, 0
        notes.mkdir()

    def run(self, work: Work, units: Iterable[Unit], resources: Resources) -> Iterator[Record]:
        self.steps += 1
        return super().run(self.between(work, self.notes / f"note{self.steps}"), units, resources)


def losing(cluster: Any, *notes: Path) -> threading.Thread:
    """Kill, with no word of warning, each node on which a unit that a note tells of is stuck."""

    def lose() -> None:
        for note in notes:
            while not note.exists():
                time.sleep(0.05)
            stuck = note.read_text()
            (node,) = [node for node in cluster.worker_nodes if node.node_id == stuck]
            cluster.remove_node(node, allow_graceful=False)

    thread = threading.Thread(target=lose, daemon=True)
    thread.start()
    return thread


@dataclass(frozen=True)
class Job:
    index: int
    name: str


@dataclass(frozen=True)
class Marking:
    """Notes every attempt."""

    folder: Path

    def __call__(self, unit: Job) -> Record:
        (self.folder / f"{unit.name}.{uuid.uuid4().hex}").touch()
        return {"name": unit.name}


@pytest.mark.parametrize("gpus", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_units_of_a_lost_node_are_done_elsewhere_and_not_held_against_them(
    cluster: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, gpus: int
) -> None:
    for _ in range(2):
        cluster.add_node(num_cpus=1, num_gpus=1)
    notes, marks = tmp_path / "notes", tmp_path / "marks"
    marks.mkdir()
    executor = Disturbed(cluster.address, notes, Stuck)
    loser = losing(cluster, notes / "note1")
    units = [Job(index, f"u{index:02d}") for index in range(16)]
    try:
        records = list(executor.run(Marking(marks), units, Resources(gpus=gpus)))
    finally:
        executor.close()
    loser.join()
    assert sorted(record["name"] for record in records) == [unit.name for unit in units]
    assert not [record for record in records if "error" in record]
    attempts = Counter(path.name.partition(".")[0] for path in marks.iterdir())
    assert set(attempts) == {unit.name for unit in units}
    assert "when a node was lost" in caplog.text


def two_steps(source: Path, out: Path, executor: Executor) -> None:
    found = open_source(source, "train")
    assert found
    with open_run(LocalStore(out), executor) as run:
        table = run.map("table", found, [Encode("png")], to=ParquetFormat())
        tars = run.map("tars", table, [], to=WebDatasetFormat(3))
        products = {"table": table.artifact, "tars": tars.artifact}
        run.publish("dataset", products, {}, b"<html>")


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("whole")
    two_steps(shards, out, LocalExecutor())
    return tree_digest(out)


def test_a_run_that_loses_two_nodes_ends_whole(
    cluster: Any, shards: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    for _ in range(3):
        cluster.add_node(num_cpus=1)
    out, notes = tmp_path / "out", tmp_path / "notes"
    executor = Disturbed(cluster.address, notes, Stuck)
    loser = losing(cluster, notes / "note1", notes / "note2")
    two_steps(shards, out, executor)
    loser.join()
    log = "".join(path.read_text() for path in out.glob(".run/logs/*"))
    assert log.count("when a node was lost") == 2  # something was done again
    for product, extension in (("table", "parquet"), ("tars", "tar")):
        samples = found_in(out, product, extension)
        assert len(samples) == SHARDS * ROWS
        assert dict(samples) == EXPECTED
    assert tree_digest(out) == whole


def test_a_late_attempt_that_outlives_the_run_changes_nothing(
    cluster: Any, shards: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    cluster.add_node(num_cpus=2)
    out, notes = tmp_path / "out", tmp_path / "notes"
    two_steps(shards, out, Disturbed(cluster.address, notes, partial(Orphaning, out=out)))
    deadline = time.monotonic() + 60
    while len(done := list(notes.glob("*.done"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(0.5)
    assert ["error" in json.loads(path.read_text()) for path in done] == [False, False]
    assert tree_digest(out) == whole


def test_an_output_that_a_node_does_not_see_is_refused(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.add_node(num_cpus=1)
    executor = RayExecutor(cluster.address)
    try:
        out = LocalStore(tmp_path / "out").writing_in(".run/unfinished")
        executor.check_output(out)
        assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
        from pipeline.orchestration import ray_cluster

        real = ray_cluster.ask

        def elsewhere(function: Any, folder: Path, token: str) -> Any:
            return real(function, tmp_path / "nowhere", token)

        monkeypatch.setattr(ray_cluster, "ask", elsewhere)
        with pytest.raises(RunError, match="cannot use the output folder") as error:
            executor.check_output(out)
        assert error.value.code == "not-shared"
        assert "2 of 2 nodes" in error.value.message
        assert "No such file or directory" in error.value.message
        monkeypatch.setattr(ray_cluster, "__version__", "0.0.0")
        with pytest.raises(RunError, match="it has version") as error:
            executor.check_output(out)
        assert error.value.code == "unable-nodes"
    finally:
        executor.close()


def test_a_cluster_that_is_not_there_is_one_clear_paragraph() -> None:
    with pytest.raises(RunError) as error:
        RayExecutor("127.0.0.1:1").check_output(LocalStore(Path("/nowhere")))
    assert error.value.code == "no-cluster"
