"""Units on Ray: each done, however its worker ends, and each tried as often as it deserves."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import RunError
from pipeline.orchestration import executor as units_module
from pipeline.orchestration import ray_executor
from pipeline.orchestration.executor import Record, Resources
from pipeline.orchestration.ray_executor import RayExecutor
from pipeline.storage.object_store import ObjectStore


@dataclass(frozen=True)
class Job:
    index: int
    name: str


def jobs(count: int) -> list[Job]:
    return [Job(index, f"u{index:04d}") for index in range(count)]


@dataclass(frozen=True)
class Marking:
    """Writes a file for every attempt; ``fate`` is called with how many there were before."""

    folder: Path
    fates: dict[str, Callable[[int], object]]
    seconds: float = 1.0

    def __call__(self, unit: Job) -> Record:
        before = len(list(self.folder.glob(f"{unit.name}.*")))
        (self.folder / f"{unit.name}.{before}.{os.getpid()}").touch()
        gpu = os.environ.get("CUDA_VISIBLE_DEVICES")
        if unit.name in self.fates:
            self.fates[unit.name](before)
        return {"name": unit.name, "pid": os.getpid(), "gpu": gpu, "seconds": self.seconds}


def attempts(folder: Path) -> Counter[str]:
    return Counter(path.name.partition(".")[0] for path in folder.iterdir())


def die(before: int) -> None:
    os._exit(1)


def crash(before: int) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def die_once(before: int) -> None:
    if not before:
        os._exit(1)


def complain(before: int) -> None:
    raise ValueError("never")


def leave(before: int) -> None:
    sys.exit(3)


def flaky(before: int) -> None:
    if not before:
        raise OSError(errno.EIO, "Input/output error")


def full(before: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units_module, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(ray_executor, "PAUSES", (0.0,))


@pytest.fixture(scope="module")
def ray_on_two() -> Iterator[RayExecutor]:
    """An executor of two workers on a cluster of its own that believes in two GPUs."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        real = ray.init
        patch.setattr(ray, "init", lambda **options: real(num_cpus=2, num_gpus=2, **options))
        # Workers find this module where this process does.
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        executor = RayExecutor(workers=2)
        executor._start()
    yield executor
    executor.close()


def by_name(records: Iterator[Record]) -> dict[str, Record]:
    found = list(records)
    assert len({record["name"] for record in found}) == len(found)
    return {record["name"]: record for record in found}


@pytest.mark.parametrize("gpus", [0, 1])
def test_every_unit_gives_one_record_whatever_becomes_of_its_worker(
    ray_on_two: RayExecutor, tmp_path: Path, gpus: int
) -> None:
    fates = {
        "u0001": complain,
        "u0003": die_once,
        "u0005": die,
        "u0006": crash,
        "u0007": leave,
        "u0008": flaky,
        "u0009": full,
    }
    work = Marking(tmp_path, fates)
    found = by_name(ray_on_two.run(work, jobs(12), Resources(gpus=gpus)))
    assert sorted(found) == [job.name for job in jobs(12)]
    codes = {name: record["error"]["code"] for name, record in found.items() if "error" in record}
    failed = {"u0001": "stage-failed", "u0007": "stage-failed", "u0009": "storage-error"}
    assert codes == {"u0005": "kills-worker", "u0006": "kills-worker", **failed}
    expected = Counter({job.name: 1 for job in jobs(12)})
    # A disk that fails is no matter of workers: that one tries again by itself.
    expected.update({"u0003": 1, "u0005": 2, "u0006": 2, "u0008": 1})
    assert attempts(tmp_path) == expected
    message = found["u0006"]["error"]["message"]
    assert "The worker died 3 times over this shard" in message
    assert "\n" not in message


@pytest.mark.parametrize("gpus", [0, 1])
def test_short_units_share_a_block_but_not_the_fate_of_a_killer(
    ray_on_two: RayExecutor, tmp_path: Path, gpus: int
) -> None:
    work = Marking(tmp_path, {"u0010": die}, seconds=0.04)
    found = by_name(ray_on_two.run(work, jobs(48), Resources(gpus=gpus)))
    assert sorted(found) == [job.name for job in jobs(48)]
    assert [name for name, record in found.items() if "error" in record] == ["u0010"]
    # Eight show how short they are; of the others five are a block, and the third kills it.
    again = {"u0008": 1, "u0009": 1, "u0010": 2}
    assert attempts(tmp_path) == Counter(job.name for job in jobs(48)) + Counter(again)


def test_actors_hold_a_gpu_and_tasks_none(ray_on_two: RayExecutor, tmp_path: Path) -> None:
    work = Marking(tmp_path, {})
    whole = list(ray_on_two.run(work, jobs(6), Resources(gpus=1)))
    assert {record["gpu"] for record in whole} <= {"0", "1"}
    assert len({record["pid"] for record in whole}) <= 2
    shared = list(ray_on_two.run(work, jobs(6), Resources(gpus=0.5, workers=1)))
    assert len({record["pid"] for record in shared}) == 1
    none = list(ray_on_two.run(work, jobs(2), Resources()))
    assert not any(record["gpu"] for record in none)


@pytest.mark.parametrize(
    ("resources", "asked"),
    [
        (Resources(gpus=3), "3 GPU"),
        (Resources(memory=2**50), "1048576.0 GiB"),
    ],
)
def test_what_no_node_has_is_refused(
    ray_on_two: RayExecutor, tmp_path: Path, resources: Resources, asked: str
) -> None:
    with pytest.raises(RunError, match="No node of the Ray cluster has") as error:
        list(ray_on_two.run(Marking(tmp_path, {}), jobs(2), resources))
    assert error.value.code == "no-room"
    assert asked in error.value.message
    assert not attempts(tmp_path)


def test_more_threads_than_there_are_cpus_share_them(
    ray_on_two: RayExecutor, tmp_path: Path
) -> None:
    found = by_name(ray_on_two.run(Marking(tmp_path, {}), jobs(3), Resources(threads=64)))
    assert len(found) == 3


def slow(before: int) -> None:
    time.sleep(2)


def test_records_come_as_they_are_done_and_units_are_taken_as_needed(
    ray_on_two: RayExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_executor, "SHARE", 2)
    taken = []

    def lazily() -> Iterator[Job]:
        for job in jobs(1000):
            taken.append(job)
            yield job

    work = Marking(tmp_path, {"u0003": slow})
    records = ray_on_two.run(work, lazily(), Resources())
    first = list(islice(records, 3))
    assert "u0003" not in {record["name"] for record in first}
    assert len(taken) == 4
    assert next(records)["name"] == "u0003"
    records.close()  # type: ignore[attr-defined]


def forever(before: int) -> None:
    time.sleep(3600)


def test_an_interrupt_leaves_nothing_running(ray_on_two: RayExecutor, tmp_path: Path) -> None:
    work = Marking(tmp_path, {f"u{i:04d}": forever for i in range(2, 40)})
    records = ray_on_two.run(work, jobs(40), Resources())
    next(records)
    start = time.monotonic()
    records.close()  # type: ignore[attr-defined]
    again = by_name(ray_on_two.run(Marking(tmp_path, {}), jobs(4), Resources()))
    assert len(again) == 4
    assert time.monotonic() - start < 60


def test_a_plugin_that_workers_do_not_have_is_an_error_of_its_shards(
    ray_on_two: RayExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "absent_plugin.py").write_text("def work(unit): return {'name': unit.name}\n")
    monkeypatch.syspath_prepend(tmp_path)
    from absent_plugin import work  # type: ignore[import-not-found]

    found = by_name(ray_on_two.run(work, jobs(2), Resources()))
    assert [record["error"]["code"] for record in found.values()] == ["stage-failed"] * 2
    assert "absent_plugin" in found["u0000"]["error"]["message"]


@pytest.mark.parametrize(("lost", "tries"), [(1, 2), (2, 3), (3, 3)])
def test_a_training_that_lost_a_worker_goes_on(
    ray_on_two: RayExecutor, monkeypatch: pytest.MonkeyPatch, lost: int, tries: int
) -> None:
    from pipeline.orchestration import ray_training
    from pipeline.orchestration.group import LOST

    calls = []

    def train(work: Any, unit: Job, workers: int, resources: Resources) -> Record:
        calls.append(workers)
        if len(calls) <= lost:
            return {"name": unit.name, "error": {"code": LOST}}
        return {"name": unit.name}

    monkeypatch.setattr(ray_training, "train_on_ray", train)
    record = ray_on_two.train(None, Job(0, "model"), 2, Resources())
    assert ("error" in record) == (lost == 3)
    assert calls == [2] * tries


def test_a_store_in_memory_is_refused() -> None:
    with pytest.raises(RunError, match="seen by no other process"):
        RayExecutor().check_output(ObjectStore("memory://out"))


SCRIPT = """
import sys, time
from pathlib import Path
from test_ray_executor import Marking, complain, die_once, forever, jobs
from pipeline.orchestration.executor import Resources
from pipeline.orchestration.ray_executor import RayExecutor

folder, fate = Path(sys.argv[1]), {"forever": forever, "die_once": die_once}[sys.argv[2]]
executor = RayExecutor(workers=2)
for record in executor.run(Marking(folder, {"u0001": fate}), jobs(4), Resources()):
    pass
executor.close()
"""


def script(folder: Path, fate: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), fate],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_ray_is_quiet(tmp_path: Path) -> None:
    process = script(tmp_path, "die_once")
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert attempts(tmp_path)["u0001"] == 2
    # What this package itself says when nobody configured logging.
    assert output.count("\n") == output.count("1 shards lost their worker") == 1, output


def test_a_driver_that_is_killed_takes_its_cluster_with_it(tmp_path: Path) -> None:
    process = script(tmp_path, "forever")
    while not (marks := list(tmp_path.glob("u0001.*"))):
        assert process.poll() is None
        time.sleep(0.1)
    process.kill()
    process.communicate()
    worker = int(marks[0].name.rpartition(".")[2])
    deadline = time.monotonic() + 60
    while Path(f"/proc/{worker}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
