"""From vectors to tokens and back: bits, signs, levels and codes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.tokenizers.config import (
    BernoulliConfig,
    FSQConfig,
    QuantizerConfig,
    SignConfig,
    VQConfig,
)
from pipeline.tokenizers.tokens import TokenForm, form_of_bits, form_of_vocabulary

_NEAREST = 2**24
"""Distances that are in memory at a time."""


@dataclass(frozen=True)
class Quantized:
    """What a quantizer makes of a batch.

    Attributes:
        vectors: float (n, N, width), for the decoder; the gradient passes.
        values: the tokens, uint8 (n, N, B) or int64 (n, N).
        soft: float (n, N, B) in [-1, 1], bits before they were decided, with their gradient;
            ``None`` where there are no bits.
        losses: scalars by name, already weighted.
    """

    vectors: Tensor
    values: Tensor
    soft: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Shape:
    """How many vectors an image has, and how wide they are before and after."""

    tokens: int
    inputs: int
    outputs: int


class Quantizer(nn.Module, ABC):
    """Vectors (n, N, width) to tokens, and tokens to vectors.

    What is quantized has mean 0 and variance 1 over images, for each place of each token by itself:
    from the first step on a bit is 1 for about half of the images, and levels and codes are used.
    Without it most of them are the same for all images until the encoder has learnt otherwise.

    Args:
        shape: tokens, and width of the encoder's and the decoder's vectors.
        numbers: numbers that are quantized of each vector.
    """

    def __init__(self, shape: Shape, numbers: int) -> None:
        super().__init__()
        self.narrow = nn.Linear(shape.inputs, numbers)
        self.standard = nn.BatchNorm1d(shape.tokens * numbers, affine=False)
        self.widen = nn.Linear(numbers, shape.outputs)

    def numbers(self, hidden: Tensor) -> Tensor:
        """What is quantized, float (n, N, numbers)."""
        inner = self.narrow(hidden)
        return cast("Tensor", self.standard(inner.flatten(1)).view_as(inner))

    @abstractmethod
    def form(self, max_tokens: int) -> TokenForm:
        """What a token is."""

    @abstractmethod
    def forward(self, hidden: Tensor) -> Quantized:
        """Quantize, with a gradient that passes straight through."""

    @abstractmethod
    def levels(self, values: Tensor) -> Tensor:
        """The numbers that tokens stand for, float (n, N, numbers)."""

    def vectors(self, values: Tensor) -> Tensor:
        """Tokens as the decoder sees them, float (n, N, width)."""
        return cast("Tensor", self.widen(self.levels(values)))

    def values(self, hidden: Tensor) -> Tensor:
        """The tokens of vectors."""
        return self.forward(hidden).values


class Bernoulli(Quantizer):
    """Bits of which each adds a vector of its own (Instella-T2I, equation of its quantizer).

    While training a bit is drawn with the probability sigmoid(z / T), and the gradient is that of
    sigmoid(z); afterwards it is 1 where z is above 0.
    """

    def __init__(self, config: BernoulliConfig, shape: Shape) -> None:
        super().__init__(shape, config.bits)
        self.config = config

    def form(self, max_tokens: int) -> TokenForm:
        return form_of_bits(self.config.bits, max_tokens)

    def forward(self, hidden: Tensor) -> Quantized:
        logits = self.numbers(hidden)
        share = torch.sigmoid(logits)
        if self.training:
            bits = torch.bernoulli(torch.sigmoid(logits / self.config.temperature))
        else:
            bits = (logits > 0).to(logits.dtype)
        through = bits.detach() + share - share.detach()
        losses = {}
        if self.config.certainty_weight:
            losses["certainty"] = self.config.certainty_weight * (share * (1 - share)).mean()
        return Quantized(self.widen(through), bits.to(torch.uint8), 2 * share - 1, losses)

    def levels(self, values: Tensor) -> Tensor:
        return values.to(self.widen.weight.dtype)


class Sign(Quantizer):
    """Signs, of a vector on the unit sphere (BSQ) or of one anywhere (LFQ).

    The entropy of soft bits factorises: a code's probability is the product of its bits'. That of a
    batch is of groups of bits, drawn anew each time, since bits that are copies of one another have
    all the entropy that bits by themselves can have.
    """

    def __init__(self, config: SignConfig, shape: Shape) -> None:
        super().__init__(shape, config.bits)
        self.config = config
        self.scale = 1 / math.sqrt(config.bits) if config.kind == "bsq" else 1.0

    def form(self, max_tokens: int) -> TokenForm:
        return form_of_bits(self.config.bits, max_tokens)

    def forward(self, hidden: Tensor) -> Quantized:
        inner = self.numbers(hidden)
        if self.config.kind == "bsq":
            inner = F.normalize(inner, dim=-1)
        bits = inner > 0
        signs = torch.where(bits, self.scale, -self.scale).to(inner.dtype)
        through = inner + (signs - inner).detach()
        # The softmax over all 2^B codes, with squared distances or products as logits.
        share = torch.sigmoid(4 * self.config.inverse_temperature * inner * self.scale)
        losses = {}
        if self.config.commitment_weight:
            far = (inner - signs.detach()).square().sum(-1).mean()
            losses["commitment"] = self.config.commitment_weight * far
        if self.config.entropy_weight:
            losses["entropy"] = self.config.entropy_weight * self._entropy(share)
        return Quantized(self.widen(through), bits.to(torch.uint8), 2 * share - 1, losses)

    def _entropy(self, share: Tensor) -> Tensor:
        """That of a sample less that of the batch, in bits a token."""
        size = self.config.group
        own = _binary_entropy(share).sum(-1).mean()
        order = torch.randperm(self.config.bits, device=share.device)
        batch = share.new_zeros(())
        for group in torch.split(order, size):
            joint = torch.ones_like(share[..., :1])
            for bit in group.tolist():
                p = share[..., bit, None]
                joint = torch.cat([joint * (1 - p), joint * p], -1)
            mean = joint.flatten(0, -2).mean(0).clamp_min(1e-12)
            batch = batch - (mean * mean.log2()).sum()
        return own - batch

    def levels(self, values: Tensor) -> Tensor:
        return torch.where(values > 0, self.scale, -self.scale).to(self.widen.weight.dtype)


class FSQ(Quantizer):
    """Each number squashed and rounded to one of its levels; an id is their mixed-radix number."""

    def __init__(self, config: FSQConfig, shape: Shape) -> None:
        super().__init__(shape, len(config.levels))
        self.config = config
        count = torch.tensor(config.levels)
        basis = [1]
        for level in config.levels[:-1]:
            basis.append(basis[-1] * level)
        self.register_buffer("count", count, persistent=False)
        self.register_buffer("basis", torch.tensor(basis), persistent=False)
        bound = (count - 1) * (1 - 1e-3) / 2
        offset = torch.where(count % 2 == 0, 0.5, 0.0)
        self.register_buffer("bound", bound, persistent=False)
        self.register_buffer("offset", offset, persistent=False)
        self.register_buffer("shift", torch.atanh(offset / bound), persistent=False)
        self.register_buffer("middle", count // 2, persistent=False)

    count: Tensor
    basis: Tensor
    bound: Tensor
    offset: Tensor
    shift: Tensor
    middle: Tensor

    def form(self, max_tokens: int) -> TokenForm:
        return form_of_vocabulary(math.prod(self.config.levels), max_tokens)

    def forward(self, hidden: Tensor) -> Quantized:
        inner = torch.tanh(self.numbers(hidden) + self.shift) * self.bound - self.offset
        rounded = inner + (inner.round() - inner).detach()
        digits = rounded.detach().round().to(torch.int64) + self.middle
        return Quantized(self.widen(rounded / self.middle), (digits * self.basis).sum(-1))

    def levels(self, values: Tensor) -> Tensor:
        digits = (values[..., None] // self.basis) % self.count
        numbers = (digits - self.middle).to(self.widen.weight.dtype)
        return numbers / self.middle


class VQ(Quantizer):
    """The nearest code of a codebook, where vectors and codes have length 1."""

    def __init__(self, config: VQConfig, shape: Shape) -> None:
        super().__init__(shape, config.width)
        self.config = config
        self.codebook = nn.Parameter(F.normalize(torch.randn(config.vocabulary, config.width)))

    def form(self, max_tokens: int) -> TokenForm:
        return form_of_vocabulary(self.config.vocabulary, max_tokens)

    def forward(self, hidden: Tensor) -> Quantized:
        inner = F.normalize(self.numbers(hidden), dim=-1)
        codes = F.normalize(self.codebook, dim=-1)
        ids = nearest(inner.detach(), codes.detach())
        chosen = F.embedding(ids, codes)
        far = (chosen - inner.detach()).square().sum(-1).mean()
        commitment = (chosen.detach() - inner).square().sum(-1).mean()
        losses = {"codebook": far + self.config.commitment_weight * commitment}
        return Quantized(self.widen(inner + (chosen - inner).detach()), ids, None, losses)

    def levels(self, values: Tensor) -> Tensor:
        return F.embedding(values, F.normalize(self.codebook, dim=-1))


def nearest(vectors: Tensor, codes: Tensor) -> Tensor:
    """Id of the nearest code of each vector, the lowest of equal ones; int64 (...).

    Vectors (..., d) and codes (K, d) are compared in float32, some vectors at a time.
    """
    flat, codes = vectors.reshape(-1, vectors.shape[-1]).float(), codes.float()
    lengths = codes.square().sum(1)
    # A graph for any number of vectors cannot be cut into parts.
    whole = torch.compiler.is_exporting()
    parts = [flat] if whole else torch.split(flat, max(1, _NEAREST // len(codes)))
    found = [torch.addmm(lengths, part, codes.T, alpha=-2).argmin(1) for part in parts]
    return torch.cat(found).view(vectors.shape[:-1])


def _binary_entropy(p: Tensor) -> Tensor:
    p = p.clamp(1e-6, 1 - 1e-6)
    return -(p * p.log2() + (1 - p) * (1 - p).log2())


def build_quantizer(config: QuantizerConfig, shape: Shape) -> Quantizer:
    """The quantizer between an encoder and a decoder."""
    if isinstance(config, BernoulliConfig):
        return Bernoulli(config, shape)
    if isinstance(config, SignConfig):
        return Sign(config, shape)
    if isinstance(config, FSQConfig):
        return FSQ(config, shape)
    return VQ(config, shape)


def decorrelation(soft: Tensor, columns: int = 512) -> Tensor:
    """How far bits say the same: the mean excess of squared correlations over a quarter.

    It is of pairs of up to ``columns`` bits of an image, drawn anew each time. Correlations below a
    half, most of which are chance in a small batch, cost nothing.

    Args:
        soft: (n, N, B) in [-1, 1].
        columns: bits that are looked at, at most.
    """
    flat = soft.flatten(1)
    if flat.shape[1] > columns:
        flat = flat[:, torch.randperm(flat.shape[1], device=flat.device)[:columns]]
    centred = flat - flat.mean(0)
    unit = centred / (centred.norm(dim=0) + 1e-6)
    squared = (unit.T @ unit).square()
    pairs = squared.shape[0] * (squared.shape[0] - 1)
    excess = F.relu(squared - 0.25).sum() - F.relu(squared.diagonal() - 0.25).sum()
    return cast("Tensor", excess / max(pairs, 1))
