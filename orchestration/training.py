"""The one training loop: epochs, schedule, checkpoints and exact resume."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import pyarrow as pa
import torch
from torch import Tensor, nn

from pipeline.config import TrainConfig
from pipeline.device import default_device
from pipeline.digest import seed_for
from pipeline.errors import RunError
from pipeline.orchestration.checkpoint import Checkpoint
from pipeline.orchestration.group import ALONE, Group
from pipeline.storage.models import weights_of

log = logging.getLogger(__name__)
B = TypeVar("B", bound=tuple[Tensor, ...])


class Training(Protocol[B]):
    """A model and its data, ready to train.

    With several workers each prepares the same training and computes the loss of its rows.
    """

    @property
    def spec(self) -> Any:
        """How to build the model anew: a dataclass of plain JSON types."""

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
    """What a training gives.

    Attributes:
        training: with the model as it is at the end.
        losses: mean loss of each epoch.
        evaluations: (epochs done, metrics) in the course of the training; the last are final.
    """

    training: Training[B]
    losses: list[float]
    evaluations: list[tuple[int, dict[str, Any]]]

    @property
    def metrics(self) -> dict[str, Any]:
        """What was measured at the end; empty on a worker that is not the first."""
        return self.evaluations[-1][1] if self.evaluations else {}


def train(
    task: TrainingTask,
    inputs: Mapping[str, pa.Table],
    seed: int,
    checkpoint: Checkpoint,
    group: Group = ALONE,
    *,
    snapshots: bool = False,
) -> Trained[Any]:
    """Train to the end, from ``checkpoint`` where one is there.

    A run that was stopped and resumed gives the same weights as one that was not. Learning rate,
    batch and random numbers follow from the number of the step; the checkpoint holds that number,
    model, optimiser, averaged weights and what was measured.

    With ``ema`` in its configuration, what is measured and given is the moving average of weights
    and running statistics.

    Several workers compute the gradient of the same mean loss, with sums split otherwise. A layer
    that looks at the whole batch sees the rows of its worker: BatchNorm normalises by them, and its
    running statistics are those of the workers, averaged by rows after every step.

    Args:
        task: what to train.
        inputs: its data by role.
        seed: of the training.
        checkpoint: where its state is kept; deleting it at the end is up to the caller.
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
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = _optimizer(model, config)
    average = _Average(model, config.ema)
    done, losses, evaluations = 0, list[float](), list[tuple[int, dict[str, Any]]]()
    running = torch.zeros((), dtype=torch.float64, device=device)  # sum of the epoch's losses
    state = group.from_first(checkpoint.read)
    if state and not _fits(state, model):
        log.warning("%s: the checkpoint does not fit the model, training begins anew", name)
    elif state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.load(state["average"])
        done, losses, evaluations = state["done"], state["losses"], state["evaluations"]
        running.copy_(state["running"])
        log.info("%s: training goes on from %s", name, _place(done, steps, config.epochs))
    total = config.epochs * steps
    measured = {config.epochs * (n + 1) // config.evaluations for n in range(config.evaluations)}
    model.train()
    for number in range(done, total):
        epoch, index = divmod(number, steps)
        # Drawn anew for each step: nothing of the generators has to be kept, on any worker.
        torch.manual_seed(seed_for(seed, "step", number, group.rank))
        for parameters in optimizer.param_groups:
            parameters["lr"] = config.lr * _rate(
                number, total, config.warmup_epochs * steps, config
            )
        optimizer.zero_grad(set_to_none=True)
        running += _gradients(training, training.batch(epoch, index), group)
        optimizer.step()
        average.update(number)
        # A GPU is waited for at the end of an epoch and for a checkpoint, and nowhere else.
        if index + 1 == steps:
            losses.append(_finite(float(running) / steps, name, epoch))
            running.zero_()
            if snapshots and group.first:
                checkpoint.write_snapshot(epoch + 1, weights_of(model))
            if epoch + 1 in measured and epoch + 1 < config.epochs and group.first:
                with average.in_place():
                    evaluations.append((epoch + 1, _evaluated(training)))
        if group.first and checkpoint.due:
            states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            rest = {"done": number + 1, "losses": losses, "running": running}
            rest |= {"average": average.values, "evaluations": evaluations}
            checkpoint.write({**states, **rest})
            log.info("%s: checkpoint at %s", name, _place(number + 1, steps, config.epochs))
    average.put()
    if group.first:
        evaluations.append((config.epochs, _evaluated(training)))
    model.eval()
    return Trained(training, losses, evaluations)


def _evaluated(training: Training[Any]) -> dict[str, Any]:
    training.model.eval()
    with torch.inference_mode():
        metrics = training.evaluate()
    training.model.train()
    return metrics


def _rate(step: int, total: int, warmup: int, config: TrainConfig) -> float:
    """Share of the peak learning rate: a linear warm-up, then a cosine."""
    if step < warmup:
        return 0.01 + 0.99 * step / warmup
    done = (step - warmup) / max(total - warmup, 1)
    return 0.5 * (1 + math.cos(math.pi * done / config.zeta))


class _Average:
    """The exponential moving average of a model's weights and running statistics.

    Its decay grows from 0.1 to ``decay``, so that the first weights are soon forgotten; with 0
    there is no average. ``values`` is what a checkpoint keeps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._own = [v for v in model.state_dict().values() if v.is_floating_point()]
        self.values = [v.clone() for v in self._own] if decay else []

    def load(self, values: list[Tensor]) -> None:
        """Go on from what a checkpoint kept."""
        for value, kept in zip(self.values, values, strict=True):
            value.copy_(kept)

    def update(self, step: int) -> None:
        """Take in the weights after a step, counted from 0."""
        if self.values:
            weight = 1 - min(self._decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(self.values, self._own, weight)

    def put(self) -> None:
        """Give the averages to the model."""
        for own, value in zip(self._own, self.values, strict=False):
            own.copy_(value)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The averages in the model's place for a while."""
        before = [own.clone() for own in self._own] if self.values else []
        self.put()
        yield
        for own, value in zip(self._own, before, strict=False):
            own.copy_(value)


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


_KEPT = {"model", "optimizer", "done", "losses", "running", "average", "evaluations"}


def _fits(state: Mapping[str, Any], model: nn.Module) -> bool:
    """Whether a checkpoint is one of this loop and of this model."""
    if state.keys() != _KEPT:
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
