"""The one training loop: epochs, schedule, checkpoints and exact resume."""

from __future__ import annotations

import hashlib
import io
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import pyarrow as pa
import torch
from torch import Tensor, nn

from pipeline.backbones import ModelSpec
from pipeline.config import TrainConfig
from pipeline.device import default_device
from pipeline.digest import seed_for
from pipeline.storage.store import Store

log = logging.getLogger(__name__)
B = TypeVar("B")


class Training(Protocol[B]):
    """A model and its data, ready to train. Everything random comes from the epoch's number."""

    @property
    def spec(self) -> ModelSpec: ...
    @property
    def model(self) -> nn.Module: ...
    @property
    def config(self) -> TrainConfig: ...
    @property
    def steps(self) -> int:
        """Optimisation steps an epoch."""

    def batches(self, epoch: int) -> Iterator[B]:
        """The batches of an epoch (0-based), the same whenever they are asked for."""

    def loss(self, batch: B) -> Tensor:
        """Mean loss of a batch, a scalar."""

    def evaluate(self) -> dict[str, Any]:
        """Metrics of the model as it is."""


class TrainingTask(Protocol):
    """A frozen dataclass that says what to train; its fields and ``version`` are its identity."""

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
    """The state of one training between epochs: a SHA-256 (32 bytes) and what torch saved.

    Args:
        store: where it lies.
        name: the unit of work that it belongs to.
    """

    store: Store
    name: str

    @property
    def _file(self) -> str:
        return f"{self.name}.pt"

    def read(self, device: torch.device) -> dict[str, Any] | None:
        """The state last written; ``None`` where there is none, or not the bytes that were."""
        if self.store.info(self._file) is None:
            return None
        data = self.store.read(self._file)
        if hashlib.sha256(data[32:]).digest() != data[:32]:
            log.warning("%s: the checkpoint is damaged, training begins anew", self.name)
            return None
        found: dict[str, Any] = torch.load(
            io.BytesIO(data[32:]), map_location=device, weights_only=True
        )
        return found

    def write(self, state: Mapping[str, Any]) -> None:
        """Put ``state`` in place of the last one."""
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        data = buffer.getvalue()
        self.store.replace(self._file, hashlib.sha256(data).digest() + data)

    def delete(self) -> None:
        self.store.delete(self._file)


def train(
    task: TrainingTask, inputs: Mapping[str, pa.Table], seed: int, checkpoint: Checkpoint
) -> Trained[Any]:
    """Train to the end, from ``checkpoint`` where one is there.

    A run that was stopped and resumed gives the same weights as one that was not: the checkpoint
    holds model and optimiser, and everything random is drawn anew from (seed, epoch).
    """
    device = default_device()
    torch.manual_seed(seed_for(seed, "init"))
    training = task.prepare(inputs, seed, device)
    model, config = training.model.to(device), training.config
    if device.type == "cuda":
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = _optimizer(model, config)
    losses: list[float] = []
    if state := checkpoint.read(device):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        losses = state["losses"]
        log.info(
            "%s: training goes on from epoch %d of %d", checkpoint.name, len(losses), config.epochs
        )
    total = config.epochs * training.steps
    for epoch in range(len(losses), config.epochs):
        torch.manual_seed(seed_for(seed, "epoch", epoch))
        model.train()
        epoch_losses = []
        for index, batch in enumerate(training.batches(epoch)):
            done = (epoch * training.steps + index) / total
            for group in optimizer.param_groups:
                group["lr"] = config.lr * 0.5 * (1 + math.cos(math.pi * done))
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = training.loss(batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            epoch_losses.append(loss.detach())
        losses.append(float(torch.stack(epoch_losses).mean()))
        if (epoch + 1) % config.checkpoint_epochs == 0 and epoch + 1 < config.epochs:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            checkpoint.write({**state, "losses": losses})
            log.info(
                "%s: checkpoint at epoch %d of %d", checkpoint.name, len(losses), config.epochs
            )
    model.eval()
    with torch.inference_mode():
        metrics = training.evaluate()
    return Trained(training, losses, metrics)


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
