"""The training loop: its schedule, its optimisers and its exact resume."""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pytest
import torch
from samples import image_table, keyed, local_run
from torch import Tensor, nn

from pipeline.backbones import ModelSpec
from pipeline.config import TrainConfig
from pipeline.dataset_distill.config import SqueezeConfig
from pipeline.dataset_distill.squeeze import Squeeze
from pipeline.device import reproducible
from pipeline.digest import digest
from pipeline.errors import RunError
from pipeline.labelled_images import ImageConfig
from pipeline.orchestration import checkpoint, training
from pipeline.orchestration.checkpoint import Checkpoint
from pipeline.orchestration.fit import Fit
from pipeline.orchestration.local_executor import LocalExecutor
from pipeline.orchestration.training import Trained, train
from pipeline.storage.models import read_model, read_spec
from pipeline.storage.source import TableSource
from pipeline.storage.store import LocalStore
from pipeline.testing import tree_digest

STOP_AT: set[tuple[int, int]] = set()
"""Batches that cannot be had, by epoch and place."""
EPOCHS, STEPS = 3, 4
BOUNDARIES = range(1, EPOCHS * STEPS)


class Noisy(nn.Module):
    """A network with everything that has a state: BatchNorm, dropout and decayed weights."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(nn.functional.dropout(self.norm(x), 0.3, self.training))


@dataclass(frozen=True)
class Task:
    """Fits the network above to random data."""

    config: TrainConfig
    note: str = ""
    workers: int = 1

    version: ClassVar[int] = 1

    def prepare(self, inputs: Mapping[str, pa.Table], seed: int, device: torch.device) -> Any:
        return Session(Noisy(), self.config)


@dataclass
class Session:
    model: nn.Module
    config: TrainConfig
    steps: int = STEPS
    modes: list[bool] = field(default_factory=list)

    def batch(self, epoch: int, index: int) -> tuple[Tensor]:
        if (epoch, index) in STOP_AT:
            raise OSError("the power went out")
        generator = torch.Generator().manual_seed(100 * epoch + index)
        return (torch.randn(8, 3, generator=generator),)

    def loss(self, batch: tuple[Tensor]) -> Tensor:
        self.modes.append(self.model.training)
        return nn.functional.cross_entropy(self.model(batch[0]), (batch[0][:, 0] > 0).long())

    def evaluate(self) -> dict[str, Any]:
        return {"training": self.model.training, "gradients": torch.is_grad_enabled()}


@pytest.fixture(autouse=True)
def _power(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(training, "default_device", lambda: torch.device("cpu"))
    STOP_AT.clear()
    with reproducible(threads=1):
        yield
    STOP_AT.clear()


def kept(folder: Path, name: str, every: float = 600.0) -> Checkpoint:
    return Checkpoint(LocalStore(folder), name, every)


def state(trained: Trained[Any]) -> dict[str, bytes]:
    tensors = trained.training.model.state_dict()
    return {name: value.numpy().tobytes() for name, value in tensors.items()}


def config(**values: Any) -> TrainConfig:
    return TrainConfig(**{"epochs": EPOCHS, "lr": 0.05, **values})


def stopped(task: Task, folder: Path, done: int, every: float = 0.0) -> None:
    """Train until ``done`` steps are done, and fail in the next one."""
    STOP_AT.add(divmod(done, STEPS))
    with pytest.raises(OSError, match="power"):
        train(task, {}, 7, kept(folder, "stopped", every))
    STOP_AT.clear()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_training_stopped_between_any_two_steps_ends_with_the_same_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, optimizer: Literal["sgd", "adamw"]
) -> None:
    caplog.set_level(logging.INFO)
    task = Task(config(optimizer=optimizer))
    whole = train(task, {}, 7, kept(tmp_path, "whole"))
    for done in BOUNDARIES:
        caplog.clear()
        stopped(task, tmp_path, done)
        torch.manual_seed(done)
        resumed = train(task, {}, 7, kept(tmp_path, "stopped"))
        assert state(resumed) == state(whole), done
        assert resumed.losses == whole.losses
        assert len(resumed.training.modes) == EPOCHS * STEPS - done
        epoch, step = (done - 1) // STEPS + 1, (done - 1) % STEPS + 1
        place = f"epoch {epoch} of {EPOCHS}, step {step} of {STEPS}"
        assert f"stopped: checkpoint at {place}" in caplog.messages
        assert caplog.messages[-1] == f"stopped: training goes on from {place}"
        (tmp_path / "stopped.pt").unlink()


def test_a_training_stopped_again_and_again_ends_with_the_same_weights(tmp_path: Path) -> None:
    task = Task(config())
    whole = train(task, {}, 7, kept(tmp_path, "whole"))
    for done in BOUNDARIES:
        stopped(task, tmp_path, done)
    resumed = train(task, {}, 7, kept(tmp_path, "stopped", 0))
    assert len(resumed.training.modes) == 1
    again = train(task, {}, 7, kept(tmp_path, "stopped"))
    assert not again.training.modes
    for one in (resumed, again):
        assert (state(one), one.losses) == (state(whole), whole.losses)
        assert one.metrics == whole.metrics


def test_checkpoints_are_the_given_seconds_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    clock = itertools.count()
    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    task = Task(config())
    train(task, {}, 7, kept(tmp_path, "a", 5))
    # The clock goes on by one whenever it is asked: at the start, at each step, at each checkpoint.
    places = ["epoch 2 of 3, step 1 of 4", "epoch 3 of 3, step 2 of 4"]
    assert caplog.messages == [f"a: checkpoint at {place}" for place in places]
    whole = train(task, {}, 7, kept(tmp_path, "b", 1000))
    assert not (tmp_path / "b.pt").exists()
    stopped(task, tmp_path, 8, every=5)
    resumed = train(task, {}, 7, kept(tmp_path, "stopped", 1000))
    assert len(resumed.training.modes) == 7
    assert state(resumed) == state(whole)


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
import test_training as here

def loss(self, batch, real=here.Session.loss):
    if len(self.modes) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, batch)

here.Session.loss = loss
here.training.default_device = lambda: torch.device("cpu")
with here.reproducible(threads=1):
    here.train(here.Task(here.config()), {}, 7, here.kept(Path(sys.argv[1]), "killed", 0))
"""


def test_a_training_killed_within_an_epoch_ends_with_the_same_weights(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    whole = train(Task(config()), {}, 7, kept(tmp_path, "whole"))
    resumed = train(Task(config()), {}, 7, kept(tmp_path, "killed"))
    assert len(resumed.training.modes) == EPOCHS * STEPS - 6
    assert (state(resumed), resumed.losses) == (state(whole), whole.losses)


def test_weights_follow_the_seed_alone(tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = train(Task(config()), {}, 7, kept(tmp_path, "a"))
    torch.manual_seed(2)
    second = train(Task(config()), {}, 7, kept(tmp_path, "b"))
    other = train(Task(config()), {}, 8, kept(tmp_path, "c"))
    assert state(first) == state(second)
    assert state(first) != state(other)


def test_random_numbers_differ_from_step_to_step(tmp_path: Path) -> None:
    drawn = []

    class Drawing(Session):
        def loss(self, batch: tuple[Tensor]) -> Tensor:
            drawn.append(torch.rand(()).item())
            return super().loss(batch)

    task = type("Given", (), {"prepare": lambda *_: Drawing(Noisy(), config())})()
    train(task, {}, 7, kept(tmp_path, "a"))
    assert len(set(drawn)) == EPOCHS * STEPS


@pytest.mark.parametrize("place", [0, 31, 32, 40, -1])
def test_a_damaged_checkpoint_leads_to_training_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, place: int
) -> None:
    task = Task(config())
    whole = train(task, {}, 7, kept(tmp_path, "whole"))
    stopped(task, tmp_path, 6)
    path = tmp_path / "stopped.pt"
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)
    resumed = train(task, {}, 7, kept(tmp_path, "stopped"))
    assert "the checkpoint is damaged, the work begins anew" in caplog.text
    assert len(resumed.training.modes) == EPOCHS * STEPS
    assert state(resumed) == state(whole)


def without(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda found: found.pop(name)


@pytest.mark.parametrize(
    "change",
    [
        without("done"),
        without("optimizer"),
        lambda found: found["model"].pop("linear.bias"),
        lambda found: found["model"].update({"linear.bias": torch.zeros(3)}),
        lambda found: found.update(more=1),
    ],
)
def test_a_checkpoint_of_something_else_leads_to_training_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: Callable[[dict[str, Any]], object]
) -> None:
    task = Task(config())
    whole = train(task, {}, 7, kept(tmp_path, "whole"))
    stopped(task, tmp_path, 6)
    place = kept(tmp_path, "stopped")
    found = place.read()
    assert found is not None
    change(found)
    place.write(found)
    resumed = train(task, {}, 7, place)
    assert "the checkpoint does not fit the model, training begins anew" in caplog.text
    assert len(resumed.training.modes) == EPOCHS * STEPS
    assert state(resumed) == state(whole)


def test_a_training_that_diverges_says_so(tmp_path: Path) -> None:
    class Diverging(Session):
        def loss(self, batch: tuple[Tensor]) -> Tensor:
            return super().loss(batch) / 0

    task = type("Given", (), {"prepare": lambda *_: Diverging(Noisy(), config())})()
    with pytest.raises(RunError, match=r"'a' diverged: in epoch 1 .* 'lr' lower"):
        train(task, {}, 7, kept(tmp_path, "a"))


def test_no_part_of_a_checkpoint_is_taken_for_one(tmp_path: Path) -> None:
    place = kept(tmp_path, "a")
    assert place.read() is None
    place.write({"losses": [1.0], "x": torch.arange(3)})
    data = (tmp_path / "a.pt").read_bytes()
    found = place.read()
    assert found is not None
    assert found["x"].tolist() == [0, 1, 2]
    for size in (0, 1, 31, 32, 33, len(data) // 2, len(data) - 1):
        (tmp_path / "a.pt").write_bytes(data[:size])
        assert place.read() is None
    place.delete()
    place.delete()
    assert not (tmp_path / "a.pt").exists()


def test_a_fit_without_a_checkpoint_ends_well(tmp_path: Path) -> None:
    settings = config(epochs=1, batch_size=10)
    task = Squeeze(SqueezeConfig(backbone="convnet3", train=settings), SMALL, 2)
    artifact = local_run(tmp_path).fit("teacher", task, train=pictures(), test=pictures())
    assert artifact.metrics["images"] == 30


def test_training_and_evaluation_have_their_modes(tmp_path: Path) -> None:
    trained = train(Task(config()), {}, 7, kept(tmp_path, "a"))
    assert trained.training.modes == [True] * (EPOCHS * STEPS)
    assert trained.metrics == {"training": False, "gradients": False}
    assert trained.losses[-1] < trained.losses[0]


def test_an_epoch_is_told_by_its_mean_loss(tmp_path: Path) -> None:
    told = []

    class Telling(Session):
        def loss(self, batch: tuple[Tensor]) -> Tensor:
            loss = super().loss(batch)
            told.append(loss.item())
            return loss

    task = type("Given", (), {"prepare": lambda *_: Telling(Noisy(), config())})()
    losses = train(task, {}, 7, kept(tmp_path, "a")).losses
    assert losses == pytest.approx(np.reshape(told, (EPOCHS, STEPS)).mean(1), rel=1e-12)


def test_no_epochs_leave_the_weights_as_they_were_made(tmp_path: Path) -> None:
    session = Session(Noisy(), config().model_copy(update={"epochs": 0}))
    before = {name: value.clone() for name, value in session.model.state_dict().items()}
    task = type("Given", (), {"prepare": lambda *_: session})()
    assert train(task, {}, 7, kept(tmp_path, "a")).losses == []
    assert all(torch.equal(before[n], v) for n, v in session.model.state_dict().items())


class Slope(nn.Module):
    """A vector and a matrix whose gradients are constants."""

    def __init__(self) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.tensor([1.0, -2.0]))
        self.matrix = nn.Parameter(torch.tensor([[3.0, -1.0]]))


@dataclass
class Descent(Session):
    def loss(self, batch: tuple[Tensor]) -> Tensor:
        return 0.3 * self.model.vector.sum() - 0.2 * self.model.matrix.sum()  # type: ignore[operator]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weights_follow_the_equations_of_the_optimiser_and_a_cosine(
    tmp_path: Path, optimizer: Literal["sgd", "adamw"]
) -> None:
    settings = config(epochs=4, optimizer=optimizer, lr=0.1, weight_decay=0.5)
    session = Descent(Slope(), settings)
    task = type("Given", (), {"prepare": lambda *_: session})()
    train(task, {}, 7, kept(tmp_path, "a"))
    for name, start, slope, decay in (
        ("vector", [1.0, -2.0], 0.3, 0.0),
        ("matrix", [[3.0, -1.0]], -0.2, 0.5),
    ):
        expected = descend(np.array(start), slope, decay, optimizer, 0.1, 4 * STEPS)
        found = session.model.get_parameter(name).detach().numpy()
        assert np.allclose(found, expected, rtol=1e-5, atol=1e-6), name


def descend(
    w: np.ndarray[Any, Any], slope: float, decay: float, optimizer: str, peak: float, steps: int
) -> np.ndarray[Any, Any]:
    """Nesterov's SGD with momentum 0.9 or AdamW, in float64, under a cosine from ``peak``."""
    momentum, square = np.zeros_like(w), np.zeros_like(w)
    for step in range(steps):
        lr = peak * (1 + math.cos(math.pi * step / steps)) / 2
        if optimizer == "sgd":
            g = slope + decay * w
            momentum = 0.9 * momentum + g
            w = w - lr * (g + 0.9 * momentum)
            continue
        w = w * (1 - lr * decay)
        momentum = 0.9 * momentum + 0.1 * slope
        square = 0.999 * square + 0.001 * slope**2
        m, v = momentum / (1 - 0.9 ** (step + 1)), square / (1 - 0.999 ** (step + 1))
        w = w - lr * m / (np.sqrt(v) + 1e-8)
    return w


SMALL = ImageConfig(size=8, channels=1, mean=(0.5,), std=(0.25,))


def squeeze(**values: Any) -> Squeeze:
    settings = config(epochs=3, batch_size=10, **values)
    return Squeeze(SqueezeConfig(backbone="convnet3", train=settings), SMALL, 2)


def test_identity_of_a_task_follows_its_configuration() -> None:
    task = squeeze()
    others = [
        squeeze(lr=0.06),
        squeeze(optimizer="sgd"),
        Squeeze(task.config, SMALL.model_copy(update={"flip": False}), 2),
        Squeeze(task.config, SMALL, 3),
        Squeeze(task.config.model_copy(update={"backbone": "resnet20"}), SMALL, 2),
    ]
    assert digest(task) == digest(squeeze())
    assert len({digest(one) for one in (task, *others)}) == 1 + len(others)


def pictures() -> TableSource:
    class Fixed(TableSource):
        identity = "fixed"

    return Fixed((("0", image_table(30, channels=1)),), ("a", "b"))


def test_a_fit_is_found_and_its_model_can_be_read(tmp_path: Path) -> None:
    inputs = {"train": pictures(), "test": pictures()}
    artifact = local_run(tmp_path).fit("teacher", squeeze(), **inputs)
    assert 0 <= artifact.metrics["accuracy"] <= 100
    assert artifact.metrics["images"] == 30
    before = tree_digest(tmp_path)
    run = local_run(tmp_path)
    assert run.fit("teacher", squeeze(), **inputs).identity == artifact.identity
    assert run.executed == 0
    assert tree_digest(tmp_path) == before
    model = read_model(artifact, torch.device("cpu"))
    assert read_spec(artifact) == ModelSpec("convnet3", 2, 1, (0.5,), (0.25,))
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model(torch.zeros(1, 1, 8, 8)).shape == (1, 2)


def test_a_stopped_fit_goes_on_and_writes_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.dataset_distill.squeeze import SqueezeTraining

    inputs = {"train": pictures(), "test": pictures()}
    fits = {name: Fit(squeeze(lr=lr), inputs) for name, lr in (("a", 0.01), ("b", 0.02))}
    local_run(tmp_path / "whole").fit_each("models", fits)
    often = {"checkpoint_seconds": 0.0}
    loss, seen = SqueezeTraining.loss, []

    def failing(self: SqueezeTraining, batch: Any) -> Tensor:
        seen.append(batch)
        if len(seen) == 8:  # in the last epoch of the first model
            raise OSError("the power went out")
        return loss(self, batch)

    monkeypatch.setattr(SqueezeTraining, "loss", failing)
    with pytest.raises(RunError, match=r"1 of 2 .* the power went out"):
        local_run(tmp_path / "stopped", **often).fit_each("models", fits)
    assert [p.name for p in (tmp_path / "stopped" / ".run").rglob("*.pt")] == ["a.pt"]
    seen.clear()
    run = local_run(tmp_path / "stopped")
    run.fit_each("models", fits)
    assert (run.executed, len(seen)) == (1, 2)
    assert tree_digest(tmp_path / "stopped") == tree_digest(tmp_path / "whole")
    assert not list((tmp_path / "stopped" / ".run").rglob("*.pt"))


def test_seed_threads_and_inputs_are_part_of_a_fit(tmp_path: Path) -> None:
    def identity(**options: Any) -> str:
        source = options.pop("source", keyed(2))
        run = local_run(tmp_path, **options)
        run.executor = Refuse()  # type: ignore[assignment]
        with pytest.raises(IdentityError) as error:
            run.fit("teacher", squeeze(), train=source)
        return str(error.value)

    given = ({}, {"seed": 1}, {"threads": 2}, {"source": keyed(3)}, {})
    seen = [identity(**options) for options in given]
    assert len(set(seen[:4])) == 4
    assert seen[4] == seen[0]


class IdentityError(Exception):
    """Carries the folder that a step would write."""


class Refuse(LocalExecutor):
    def run(self, work: Any, units: Any, resources: Any) -> Any:
        raise IdentityError(str(work.folders.artifact))


def test_weights_are_safetensors_without_time_or_place(tmp_path: Path) -> None:
    inputs = {"train": pictures(), "test": pictures()}
    digests = set()
    for name in "ab":
        artifact = local_run(tmp_path / name).fit("teacher", squeeze(), **inputs)
        data = artifact.read("model/weights.safetensors")
        digests.add(hashlib.sha256(data).hexdigest())
    assert len(digests) == 1
