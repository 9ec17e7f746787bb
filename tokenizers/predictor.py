"""Error curves from one pass of the encoder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import pyarrow as pa
import torch
import torch.nn.functional as F
from safetensors.torch import load
from torch import Tensor, nn

from pipeline.config import TrainConfig
from pipeline.draws import batch_rows
from pipeline.tensors import to_numpy

_HIDDEN = 128


@dataclass(frozen=True)
class PredictorSpec:
    """Shape of a :class:`CurvePredictor`.

    Attributes:
        inputs: numbers of a summary.
        lengths: the lengths whose errors are predicted.
    """

    inputs: int
    lengths: tuple[int, ...]


class CurvePredictor(nn.Module):
    """Summaries (n, D) of pictures to the logarithms (n, G) of their errors at G lengths."""

    def __init__(self, spec: PredictorSpec) -> None:
        super().__init__()
        self.spec = spec
        outputs = len(spec.lengths)
        self.register_buffer("centre", torch.zeros(spec.inputs))
        self.register_buffer("spread", torch.ones(spec.inputs))
        self.register_buffer("usual", torch.zeros(outputs))
        self.grow = nn.Linear(spec.inputs, _HIDDEN)
        self.shrink = nn.Linear(_HIDDEN, outputs)

    centre: Tensor
    spread: Tensor
    usual: Tensor

    def forward(self, summary: Tensor) -> Tensor:
        scaled = (summary.float() - self.centre) / self.spread
        return cast("Tensor", self.usual + self.shrink(F.gelu(self.grow(scaled))))

    def curves(self, summary: Tensor) -> Tensor:
        """Predicted mean squared errors (n, G)."""
        return self.forward(summary).exp()


def load_predictor(config: bytes, weights: bytes) -> CurvePredictor:
    """A predictor in evaluation mode from its specification as JSON and its safetensors."""
    fields = json.loads(config)
    predictor = CurvePredictor(PredictorSpec(fields["inputs"], tuple(fields["lengths"])))
    predictor.load_state_dict(load(weights))
    return predictor.eval().requires_grad_(requires_grad=False)


@dataclass(frozen=True)
class TrainPredictor:
    """Fit a predictor to the columns ``summary`` (n, D) and ``curve`` (n, G) of ``train``."""

    lengths: tuple[int, ...]
    config: TrainConfig

    version: ClassVar[int] = 1

    @property
    def workers(self) -> int:
        return self.config.workers

    def prepare(
        self, inputs: Mapping[str, pa.Table], seed: int, device: torch.device
    ) -> PredictorTraining:
        sets = {name: _columns(table, device) for name, table in inputs.items()}
        summary, curve = sets["train"]
        model = CurvePredictor(PredictorSpec(summary.shape[1], self.lengths))
        model.centre.copy_(summary.mean(0))
        model.spread.copy_(summary.std(0, correction=0) + 1e-6)
        model.usual.copy_(curve.log().mean(0))
        nn.init.zeros_(model.shrink.weight)
        nn.init.zeros_(model.shrink.bias)
        return PredictorTraining(model.to(device), self.config, sets, seed)


def _columns(table: pa.Table, device: torch.device) -> tuple[Tensor, Tensor]:
    summary, curve = (torch.from_numpy(to_numpy(table[n]).copy()) for n in ("summary", "curve"))
    return summary.to(device), curve.clamp_min(1e-8).to(device)


@dataclass(frozen=True)
class PredictorTraining:
    """Squared errors of logarithms."""

    model: CurvePredictor
    config: TrainConfig
    sets: Mapping[str, tuple[Tensor, Tensor]]
    seed: int

    @property
    def spec(self) -> PredictorSpec:
        return self.model.spec

    @property
    def steps(self) -> int:
        return max(1, len(self.sets["train"][0]) // self.config.batch_size)

    def batch(self, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        summary, curve = self.sets["train"]
        size = self.config.batch_size
        rows = batch_rows(len(summary), size, self.seed, epoch, index, summary.device)
        return summary[rows], curve[rows]

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        summary, curve = batch
        return F.mse_loss(self.model(summary), curve.log())

    def evaluate(self) -> dict[str, Any]:
        """Share of the curves' variance, beyond that of their means, that is explained."""
        summary, curve = self.sets.get("test", self.sets["train"])
        logs = curve.log()
        left = (self.model(summary) - logs).square().mean(0)
        explained = 1 - left / logs.var(0, correction=0).clamp_min(1e-12)
        return {"explained": explained.mean().item()}
