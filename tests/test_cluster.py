"""A cluster of several nodes on one machine, one of which is lost in the middle of a run."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from samples import encoded, pixels

import pipeline
from pipeline.errors import RunError
from pipeline.orchestration.executor import Record, Resources
from pipeline.orchestration.ray_executor import RayExecutor
from pipeline.storage.store import LocalStore
from pipeline.testing.trees import tree_digest

SHARDS, ROWS = 30, 4


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


def found_in(out: Path) -> list[tuple[str, int]]:
    """Keys and labels of a converted data set, as pyarrow and tarfile see them."""
    product = json.loads((out / "manifest.json").read_bytes())["products"]["dataset"]
    samples = []
    for path in sorted((out / product).rglob("*.parquet")):
        if "quarantine" in path.parts:
            continue
        table = pq.read_table(path)
        samples += zip(table["key"].to_pylist(), table["label"].to_pylist(), strict=True)
    for path in sorted((out / product).rglob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.rpartition(".")
                file = tar.extractfile(member)
                if extension == "cls" and file:
                    samples.append((key, int(file.read())))
    return samples


class LoseNode(threading.Thread):
    """Kills a node of a cluster as soon as ``ready`` says so, and adds another for it."""

    def __init__(self, cluster: Any, node: Any, ready: Any) -> None:
        super().__init__(daemon=True)
        self.cluster, self.node, self.ready, self.lost = cluster, node, ready, False

    def run(self) -> None:
        while not self.ready():
            time.sleep(0.02)
        self.cluster.remove_node(self.node, allow_graceful=False)
        self.lost = True


@dataclass(frozen=True)
class Job:
    index: int
    name: str


@dataclass(frozen=True)
class Slow:
    """Notes every attempt; some take so long that a node is lost under them."""

    folder: Path
    seconds: float

    def __call__(self, unit: Job) -> Record:
        before = len(list(self.folder.glob(f"{unit.name}.*")))
        (self.folder / f"{unit.name}.{before}").touch()
        time.sleep(self.seconds)
        return {"name": unit.name}


@pytest.mark.parametrize("gpus", [0, 1])
def test_units_of_a_lost_node_are_done_elsewhere_and_not_held_against_them(
    cluster: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, gpus: int
) -> None:
    nodes = [cluster.add_node(num_cpus=1, num_gpus=1) for _ in range(2)]
    loser = LoseNode(cluster, nodes[0], lambda: len(list(tmp_path.iterdir())) >= 4)
    loser.start()
    executor = RayExecutor(cluster.address)
    try:
        work, units = Slow(tmp_path, 0.5), [Job(index, f"u{index:02d}") for index in range(16)]
        records = list(executor.run(work, units, Resources(gpus=gpus)))
    finally:
        executor.close()
    loser.join()
    assert loser.lost
    assert sorted(record["name"] for record in records) == [unit.name for unit in units]
    assert not [record for record in records if "error" in record]
    attempts = Counter(path.name.partition(".")[0] for path in tmp_path.iterdir())
    assert max(attempts.values()) == 2
    assert "when a node was lost" in caplog.text


@pytest.mark.parametrize("fmt", ["parquet", "webdataset"])
def test_a_run_that_loses_a_node_ends_whole(
    cluster: Any, shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, fmt: str
) -> None:
    pipeline.run("convert", str(shards), out=tmp_path / "local", config={"format": fmt})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    out = tmp_path / "ray"
    committed = lambda: len(list(out.glob(".run/*/ledger/*"))) >= 3  # noqa: E731
    loser = LoseNode(cluster, nodes[0], committed)
    loser.start()
    with caplog.at_level(logging.INFO):
        pipeline.run(
            "convert",
            str(shards),
            out=out,
            config={"format": fmt},
            executor="ray",
            address=cluster.address,
        )
    loser.join()
    assert loser.lost
    samples = found_in(out)
    assert len(samples) == SHARDS * ROWS
    assert dict(samples) == EXPECTED
    assert tree_digest(out) == tree_digest(tmp_path / "local")


def test_an_output_that_a_node_does_not_see_is_refused(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.add_node(num_cpus=1)
    executor = RayExecutor(cluster.address)
    try:
        out = LocalStore(tmp_path / "out").writing_in(".run/unfinished")
        executor.check_output(out)
        assert not list((tmp_path / "out").rglob("*.*"))
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
        monkeypatch.setattr(pipeline, "__version__", "0.0.0")
        with pytest.raises(RunError, match="it has version") as error:
            executor.check_output(out)
        assert error.value.code == "unable-nodes"
    finally:
        executor.close()


def test_a_cluster_that_is_not_there_is_one_clear_paragraph() -> None:
    with pytest.raises(RunError) as error:
        RayExecutor("127.0.0.1:1").check_output(LocalStore(Path("/nowhere")))
    assert error.value.code == "no-cluster"
