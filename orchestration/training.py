"""The one training loop: epochs, schedule, checkpoints and exact resume."""

from __future__ import annotations

import io
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import pyarrow as pa
import torch
from torch import Tensor, nn

from pipeline.backbones import ModelSpec
from pipeline.config import TrainConfig
from pipeline.device import default_device
from pipeline.digest import seed_for
from pipeline.errors import RunError
from pipeline.orchestration.group import ALONE, Group
from pipeline.storage.atomic import with_digest, without_digest
from pipeline.storage.models import weights_of
from pipeline.storage.store import Store

log = logging.getLogger(__name__)
B = TypeVar("B", bound=tuple[Tensor, ...])


class Training(Protocol[B]):
    """A model and its data, ready to train.

    With several workers each prepares the same training and computes the loss of its rows.
    """

    @property
    def spec(self) -> ModelSpec: ...
    @property
    def model(self) -> nn.Module: ...
    @property
    def config(self) -> TrainConfig: ...
    @property
    def steps(self) -> int:
        """Optimisation steps an epoch."""

    def batch(self, epoch: int, index: int) -> B:
        """A batch of an epoch (both 0-based): tensors of equally many rows.

        It is the same whenever it is asked for: what is random in it comes from the training's
        seed, ``epoch`` and ``index``, by a generator of its own.
        """

    def loss(self, batch: B) -> Tensor:
        """Mean loss of the rows of a batch, a scalar; random numbers are torch's default ones."""

    def evaluate(self) -> dict[str, Any]:
        """Metrics of the model as it is."""


class TrainingTask(Protocol):
    """A frozen dataclass that says what to train; its fields and ``version`` are its identity."""

    @property
    def workers(self) -> int:
        """Processes that share every batch."""

    def prepare(
        self, inputs: Mapping[str, pa.Table], seed: int, device: torch.device
    ) -> Training[Any]:
        """Build the model and load the data."""


@dataclass(frozen=True)
class Trained(Generic[B]):
    """What a training gives: the model, the mean loss of each epoch and the final metrics."""

    training: Training[B]
    losses: list[float]
    metrics: dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """The state of one training between two steps: a SHA-256 (32 bytes) and what torch saved.

    Args:
        store: where it lies.
        name: the unit of work that it belongs to.
    """

    store: Store
    name: str

    @property
    def _file(self) -> str:
        return f"{self.name}.pt"

    def read(self) -> dict[str, Any] | None:
        """The state last written; ``None`` where there is none, or not the bytes that were."""
        if self.store.info(self._file) is None:
            return None
        data = without_digest(self.store.read(self._file))
        if data is None:
            log.warning("%s: the checkpoint is damaged, training begins anew", self.name)
            return None
        found: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        return found

    def write(self, state: Mapping[str, Any]) -> None:
        """Put ``state`` in place of the last one."""
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        self.store.replace(self._file, with_digest(buffer.getvalue()))

    def write_snapshot(self, epoch: int, weights: bytes) -> None:
        """Keep the weights after an epoch, counted from 1."""
        self.store.replace(self._snapshot(epoch), with_digest(weights))

    def read_snapshot(self, epoch: int) -> bytes:
        """The weights after an epoch.

        Raises:
            RunError: they are damaged.
        """
        weights = without_digest(self.store.read(self._snapshot(epoch)))
        if weights is None:
            raise RunError(
                f"The weights of '{self.name}' after epoch {epoch} are damaged.",
                hint="Delete the folder of checkpoints, so that the training begins anew.",
                code="damaged-snapshot",
                where=f"{self.store}/{self._snapshot(epoch)}",
            )
        return weights

    def _snapshot(self, epoch: int) -> str:
        return f"{self.name}-epoch-{epoch:05d}"

    def delete(self) -> None:
        """Delete it, and the weights that were kept beside it."""
        self.store.delete(self._file)
        for info in self.store.files():
            if info.name.startswith(f"{self.name}-epoch-"):
                self.store.delete(info.name)


def train(
    task: TrainingTask,
    inputs: Mapping[str, pa.Table],
    seed: int,
    checkpoint: Checkpoint,
    every: float = 600.0,
    group: Group = ALONE,
    *,
    snapshots: bool = False,
) -> Trained[Any]:
    """Train to the end, from ``checkpoint`` where one is there.

    A run that was stopped and resumed gives the same weights as one that was not. Learning rate,
    batch and random numbers follow from the number of the step; the checkpoint holds that number,
    model, optimiser and losses.

    Several workers compute the gradient of the same mean loss, with sums split otherwise. A layer
    that looks at the whole batch sees the rows of its worker: BatchNorm normalises by them, and its
    running statistics are those of the workers, averaged by rows after every step.

    Args:
        task: what to train.
        inputs: its data by role.
        seed: of the training.
        checkpoint: where its state is kept; deleting it at the end is up to the caller.
        every: seconds from one checkpoint to the next; with 0 there is one after every step.
        group: the workers. The first one writes checkpoints and measures; others have no metrics.
        snapshots: whether the weights after every epoch are kept beside the checkpoint.

    Raises:
        RunError: the loss is not finite, a batch has fewer rows than there are workers, or a
            worker was lost.
    """
    device, name = default_device(), checkpoint.name
    torch.manual_seed(seed_for(seed, "init"))
    training = task.prepare(inputs, seed, device)
    model, config, steps = training.model.to(device), training.config, training.steps
    if device.type == "cuda":
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = _optimizer(model, config)
    done, losses = 0, list[float]()
    running = torch.zeros((), dtype=torch.float64, device=device)  # sum of the epoch's losses
    state = group.from_first(checkpoint.read)
    if state and not _fits(state, model):
        log.warning("%s: the checkpoint does not fit the model, training begins anew", name)
    elif state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done, losses = state["done"], state["losses"]
        running.copy_(state["running"])
        log.info("%s: training goes on from %s", name, _place(done, steps, config.epochs))
    total, saved = config.epochs * steps, time.monotonic()
    model.train()
    for number in range(done, total):
        epoch, index = divmod(number, steps)
        # Drawn anew for each step: nothing of the generators has to be kept, on any worker.
        torch.manual_seed(seed_for(seed, "step", number, group.rank))
        for parameters in optimizer.param_groups:
            parameters["lr"] = config.lr * 0.5 * (1 + math.cos(math.pi * number / total))
        optimizer.zero_grad(set_to_none=True)
        running += _gradients(training, training.batch(epoch, index), group)
        optimizer.step()
        # A GPU is waited for at the end of an epoch and for a checkpoint, and nowhere else.
        if index + 1 == steps:
            losses.append(_finite(float(running) / steps, name, epoch))
            running.zero_()
            if snapshots and group.first:
                checkpoint.write_snapshot(epoch + 1, weights_of(model))
        if group.first and time.monotonic() - saved >= every:
            states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            rest = {"done": number + 1, "losses": losses, "running": running}
            checkpoint.write({**states, **rest})
            saved = time.monotonic()
            log.info("%s: checkpoint at %s", name, _place(number + 1, steps, config.epochs))
    model.eval()
    with torch.inference_mode():
        metrics = training.evaluate() if group.first else {}
    return Trained(training, losses, metrics)


def _gradients(training: Training[Any], batch: tuple[Tensor, ...], group: Group) -> Tensor:
    """Leave the gradients of a batch's mean loss in the model's parameters, and return the loss.

    They are summed by hand rather than by ``DistributedDataParallel``, which acts only where its
    own ``forward`` is called; a task's loss may call its model in any way, and how often it likes.
    """
    model = training.model
    if group.world == 1:
        loss = _loss(training, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()
    own, weight = group.share(batch)
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    before = [buffer.clone() for buffer in buffers]
    loss = _loss(training, own) * weight
    loss.backward()  # type: ignore[no-untyped-call]
    loss = loss.detach()
    # Changes rather than values: a constant stays as it is, to the last bit and if it is infinite.
    changes = [
        torch.where(buffer == old, 0.0, weight * (buffer - old))
        for buffer, old in zip(buffers, before, strict=True)
    ]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    group.sum([loss, *gradients, *changes])
    for buffer, old, change in zip(buffers, before, changes, strict=True):
        buffer.copy_(old + change)
    return loss


def _loss(training: Training[Any], batch: tuple[Tensor, ...]) -> Tensor:
    kind = batch[0].device.type
    with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
        return training.loss(batch)


def _fits(state: Mapping[str, Any], model: nn.Module) -> bool:
    """Whether a checkpoint is one of this loop and of this model."""
    if state.keys() != {"model", "optimizer", "done", "losses", "running"}:
        return False
    kept, own = ({n: t.shape for n, t in s.items()} for s in (state["model"], model.state_dict()))
    return kept == own


def _place(done: int, steps: int, epochs: int) -> str:
    epoch, step = divmod(done - 1, steps)
    return f"epoch {epoch + 1} of {epochs}, step {step + 1} of {steps}"


def _finite(loss: float, name: str, epoch: int) -> float:
    if math.isfinite(loss):
        return loss
    raise RunError(
        f"The training of '{name}' diverged: in epoch {epoch + 1} the loss was no finite number.",
        hint="Set the training's 'lr' lower.",
        code="diverged",
    )


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    # Biases and normalisation scales are not decayed.
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.ndim > 1]},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            groups, config.lr, momentum=0.9, nesterov=True, weight_decay=config.weight_decay
        )
    return torch.optim.AdamW(groups, config.lr, weight_decay=config.weight_decay)
