"""Several workers: what one would have computed, the same after an interruption; on Ray Train."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.backbones import ModelSpec
from pipeline.config import TrainConfig
from pipeline.errors import RunError
from pipeline.orchestration.executor import Record, Resources
from pipeline.orchestration.fit import Fit, FitUnit, FitWork
from pipeline.orchestration.group import ALONE, LOST, Group
from pipeline.orchestration.memory import StepFolders
from pipeline.storage.store import LocalStore

UNIT = FitUnit(0, "model")
EPOCHS, STEPS, ROWS = 2, 3, 7
Kind = Literal["plain", "noisy"]


class Plain(nn.Module):
    """In float64, without anything that looks at the whole batch; one weight is of no use."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(3, 5).double(), nn.Linear(5, 2).double()
        self.unused = nn.Linear(3, 3).double()
        self.register_buffer("constant", torch.tensor([0.1, -torch.inf], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.out(torch.tanh(self.hidden(x.double())))
        return hidden


class Noisy(nn.Module):
    """With BatchNorm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.linear(nn.functional.dropout(self.norm(x), 0.3, self.training))
        return found


@dataclass(frozen=True)
class Task:
    """Fits one of the networks above to random data.

    Where ``dies`` names a file that is there, the last worker removes it and ends in the fourth
    step: as if it were killed, or with an error.
    """

    kind: Kind
    optimizer: Literal["adamw", "sgd"] = "sgd"
    dies: str = ""
    how: Literal["killed", "error"] = "killed"
    rows: int = ROWS
    workers: int = 2

    version: ClassVar[int] = 1

    def prepare(self, inputs: Mapping[str, pa.Table], seed: int, device: torch.device) -> Any:
        settings = TrainConfig(epochs=EPOCHS, optimizer=self.optimizer, lr=0.05)
        model = Plain() if self.kind == "plain" else Noisy()
        return Session(model.to(device), settings, self, device)


@dataclass
class Session:
    model: nn.Module
    config: TrainConfig
    task: Task
    device: torch.device
    steps: int = STEPS
    seen: int = 0

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec("none", 2, 1, (0.5,), (0.5,))

    def batch(self, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(100 * epoch + index)
        x = torch.randn(self.task.rows, 3, generator=generator).to(self.device)
        return x, (x[:, 0] > 0).long()

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.seen += 1
        if self.seen == 4 and self.task.dies and dist.get_rank() == dist.get_world_size() - 1:
            flag = Path(self.task.dies)
            if flag.exists():
                flag.unlink()
                if self.task.how == "killed":
                    os._exit(1)
                raise ValueError("seven is not a prime")
        x, labels = batch
        return nn.functional.cross_entropy(self.model(x), labels)

    def evaluate(self) -> dict[str, Any]:
        return {"seen": self.seen}


def fit_work(out: Path, task: Task) -> FitWork:
    folders = StepFolders(
        LocalStore(out / "artifact").writing_in(str(out / "unfinished")), LocalStore(out / "work")
    )
    return FitWork(folders, {UNIT.name: Fit(task)}, seed=7, threads=1, checkpoint_seconds=0)


def made(out: Path) -> tuple[dict[str, Tensor], list[float]]:
    """Weights of a fit, and its losses."""
    folder = out / "artifact" / UNIT.name
    history = json.loads((folder / "history.json").read_bytes())
    return load_file(folder / "weights.safetensors"), history["loss"]


def same(one: Path, other: Path) -> bool:
    (first, history), (second, losses) = made(one), made(other)
    assert first.keys() == second.keys()
    return history == losses and all(torch.equal(first[name], second[name]) for name in first)


def worker(rank: int, world: int, folder: Path, works: Mapping[str, FitWork]) -> None:
    """Do every fit, and keep what this worker's model came to."""
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
    from pipeline.orchestration import fit

    real = fit.train

    def keeping(*args: Any, **options: Any) -> Any:
        trained = real(*args, **options)
        torch.save(trained.training.model.state_dict(), folder / f"{name}-{rank}.pt")
        return trained

    fit.train = keeping
    for name, work in works.items():  # noqa: B007 - `keeping` looks at it
        record = work(UNIT, group=Group(rank, world))
        assert bool(record) == (rank == 0)


def together(folder: Path, works: Mapping[str, FitWork], world: int = 2) -> None:
    """Do fits on several processes of this machine."""
    folder.mkdir()
    context = multiprocessing.get_context("spawn")
    given = [(rank, world, folder, works) for rank in range(world)]
    processes = [context.Process(target=worker, args=one) for one in given]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * world


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with fits by two workers that nothing interrupted."""
    out = tmp_path_factory.mktemp("two")
    works = {
        "sgd": fit_work(out / "sgd", Task("plain", "sgd")),
        "adamw": fit_work(out / "adamw", Task("plain", "adamw")),
        "noisy": fit_work(out / "noisy", Task("noisy")),
    }
    together(out / "kept", works)
    return out


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_two_workers_compute_what_one_does(
    trained: Path, tmp_path: Path, optimizer: Literal["sgd", "adamw"]
) -> None:
    fit_work(tmp_path, Task("plain", optimizer))(UNIT)
    (one, history), (two, losses) = made(tmp_path), made(trained / optimizer)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-9, atol=1e-12)
    assert np.allclose(history, losses, rtol=1e-9)
    for name in ("unused.weight", "unused.bias", "constant"):
        assert torch.equal(one[name], two[name])


@pytest.mark.parametrize("name", ["sgd", "adamw", "noisy"])
def test_all_workers_end_with_the_same_model(trained: Path, name: str) -> None:
    first, second = (torch.load(trained / "kept" / f"{name}-{rank}.pt") for rank in range(2))
    published, _ = made(trained / name)
    for key, value in published.items():
        assert torch.equal(first[key], value)
        assert torch.equal(second[key], value)


def test_running_statistics_are_those_of_the_workers_by_rows(trained: Path) -> None:
    mean, var = torch.zeros(3), torch.ones(3)
    task = Task("noisy").prepare({}, 0, torch.device("cpu"))
    for number in range(EPOCHS * STEPS):
        x, _ = task.batch(*divmod(number, STEPS))
        shares = [x[:4], x[4:]]
        mean = 0.9 * mean + 0.1 * sum(len(s) / 7 * s.mean(0) for s in shares)
        var = 0.9 * var + 0.1 * sum(len(s) / 7 * s.var(0) for s in shares)
    published, _ = made(trained / "noisy")
    torch.testing.assert_close(published["norm.running_mean"], mean)
    torch.testing.assert_close(published["norm.running_var"], var)


def test_shares_hold_every_row_once() -> None:
    batch = (torch.arange(7), torch.arange(14).view(7, 2))
    shares = [Group(rank, 3).share(batch) for rank in range(3)]
    for part in range(2):
        assert torch.equal(torch.cat([own[part] for own, _ in shares]), batch[part])
    assert [weight for _, weight in shares] == [3 / 7, 2 / 7, 2 / 7]
    with pytest.raises(RunError, match="batch of 2 samples cannot be shared among 3 workers"):
        Group(2, 3).share((torch.arange(2),))
    assert ALONE.from_first(lambda: 5) == 5


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        ray.init(
            num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
        )
        yield
        ray.shutdown()


@pytest.mark.usefixtures("ray_cluster")
def test_a_worker_that_is_killed_costs_nothing_but_time(trained: Path, tmp_path: Path) -> None:
    from pipeline.orchestration.ray_training import train_on_ray

    flag, out = tmp_path / "flag", tmp_path / "out"
    flag.touch()
    work = fit_work(out, Task("noisy", dies=str(flag)))
    record = train_on_ray(work, UNIT, 2, Resources(threads=1))
    assert not flag.exists(), record
    assert record["name"] == UNIT.name
    assert record["error"]["code"] == LOST
    assert "Start the same command again" in record["error"]["hint"]
    assert (out / "work" / "checkpoints" / "model.pt").exists()
    assert not list(work.folders.ledger.finished())
    assert not (out / "artifact" / UNIT.name).exists()
    record = train_on_ray(work, UNIT, 2, Resources(threads=1))
    assert "error" not in record
    assert record["metrics"] == {"seen": EPOCHS * STEPS - 3}
    assert same(out, trained / "noisy")
    assert [table["name"].to_pylist() for table in work.folders.ledger.finished()] == [["model"]]
    assert not (out / "work" / "checkpoints" / "model.pt").exists()


@pytest.mark.usefixtures("ray_cluster")
def test_a_cluster_that_is_too_small_is_told_at_once(tmp_path: Path) -> None:
    from pipeline.orchestration.ray_training import train_on_ray

    work = fit_work(tmp_path, Task("plain"))
    error = train_on_ray(work, UNIT, 3, Resources(threads=2))["error"]
    assert error["message"].startswith("3 workers with 2 CPU each do not fit the Ray cluster")
    assert error["code"] == "small-cluster"
    error = train_on_ray(work, UNIT, 1, Resources(gpus=1))["error"]
    assert error["message"].endswith("GPU each do not fit the Ray cluster, which has 0.")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_an_error_of_one_worker_is_told_as_in_process(tmp_path: Path) -> None:
    from pipeline.orchestration.ray_training import train_on_ray

    flag = tmp_path / "flag"
    flag.touch()
    work = fit_work(tmp_path, Task("noisy", dies=str(flag), how="error"))
    error = train_on_ray(work, UNIT, 2, Resources(threads=1))["error"]
    assert error["message"] == "ValueError: seven is not a prime."
    assert (error["code"], error["where"]) == ("stage-failed", UNIT.name)
    assert "in loss" in error["traceback"]


def test_the_error_that_is_told_is_the_one_that_led_to_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.train import WorkerGroupError

    from pipeline.orchestration import ray_training as here

    def raised(work: object) -> Exception:
        context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
        monkeypatch.setattr(here, "get_context", lambda: context)
        with pytest.raises(here._WorkerError) as caught:
            here._worker({"work": work, "unit": UNIT})
        return caught.value

    def fails(error: Exception) -> Any:
        def work(unit: FitUnit, group: Group) -> Record:
            raise error

        return work

    left = raised(fails(RunError("Left alone.", hint="Again.", code=LOST)))
    wrong = raised(fails(ValueError("seven is not a prime")))
    dead = RuntimeError("A health check failed.\nMore")
    for failures in ({0: left, 1: wrong}, {0: wrong, 1: left}, {0: dead, 1: wrong}):
        error = here._told(WorkerGroupError("", failures))["error"]
        assert error["message"] == "ValueError: seven is not a prime."
        assert "in work" in error["traceback"]
    assert here._told(WorkerGroupError("", {0: left, 1: left}))["error"]["message"] == "Left alone."
    with pytest.raises(RunError, match="died: A health check failed") as caught:
        here._told(WorkerGroupError("", {0: left, 1: dead}))
    assert caught.value.code == LOST


def test_what_a_disk_failed_to_do_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.orchestration import ray_training as here

    def attempt(*_: object) -> Record:
        return dict(records.pop(0))

    monkeypatch.setattr(here, "_attempt", attempt)
    monkeypatch.setattr(here, "PAUSES", (0.0, 0.0))
    given = (fit_work(tmp_path, Task("plain")), UNIT, 2, Resources())
    passing = {"name": "model", "error": {}, "passing": True}
    records = [passing, {"name": "model"}]
    assert here.train_on_ray(*given) == {"name": "model"}
    records = [passing] * 4
    assert here.train_on_ray(*given) == {"name": "model", "error": {}}
    assert len(records) == 1
    lasting = {"name": "model", "error": {}, "passing": False}
    records = [lasting, passing]
    assert here.train_on_ray(*given) == {"name": "model", "error": {}}
    assert len(records) == 1


def test_a_worker_that_lost_another_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("Connection closed by peer\nand more")

    monkeypatch.setattr(dist, "all_reduce", broken)
    monkeypatch.setattr(dist, "broadcast_object_list", broken)
    for call in (lambda g: g.sum([torch.ones(1)]), lambda g: g.from_first(lambda: 1)):
        with pytest.raises(RunError, match="lost another one: Connection closed by peer") as caught:
            call(Group(0, 2))
        assert caught.value.code == LOST
