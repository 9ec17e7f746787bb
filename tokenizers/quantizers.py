"""From vectors to tokens and back: bits, signs, levels and codes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.codecs.codebook import nearest_code
from pipeline.errors import UsageError
from pipeline.tokenizers.config import (
    BernoulliConfig,
    FSQConfig,
    QuantizerConfig,
    SignConfig,
    VQConfig,
)
from pipeline.tokenizers.tokens import TokenForm, form_of_bits, form_of_vocabulary

_LEAST_SHARE = 1e-20
"""Of a code in a batch, in the moving average."""


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
    """How many vectors an image has, and how wide they are before and after.

    Of a grid all places are alike, and count as one.
    """

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
        standardize: whether mean and variance are so.
    """

    def __init__(self, shape: Shape, numbers: int, *, standardize: bool = True) -> None:
        super().__init__()
        self.narrow = nn.Linear(shape.inputs, numbers)
        self.places = shape.tokens * numbers
        norm = nn.BatchNorm1d(self.places, affine=False)
        self.standard: nn.Module = norm if standardize else nn.Identity()
        self.widen = nn.Linear(numbers, shape.outputs)

    def numbers(self, hidden: Tensor) -> Tensor:
        """What is quantized, float (n, N, numbers)."""
        inner = self.narrow(hidden)
        return cast("Tensor", self.standard(inner.reshape(-1, self.places)).view_as(inner))

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
    """The nearest code of a codebook.

    Codes that are projected begin with mean 0 and variance 1 in every direction, as vectors do that
    are standardised: so most are near to some vector from the first step on. From then on each
    moves with every step, whether it was chosen or not, since all share one linear map.
    """

    def __init__(self, config: VQConfig, shape: Shape) -> None:
        super().__init__(shape, config.width, standardize=config.standardize)
        self.config = config
        count, width = config.vocabulary, config.width
        if config.codes == "projected":
            features = config.features or width
            self.project = nn.Linear(features, width)
            self.register_buffer("frozen", torch.randn(count, features))
            nn.init.eye_(self.project.weight)
            nn.init.zeros_(self.project.bias)
        elif config.codes == "ema":
            # Sums of vectors and how many there were, each as a share of a batch.
            self.register_buffer("sums", torch.randn(count, width) / count)
            self.register_buffer("share", torch.full((count,), 1 / count))
        elif config.metric == "cosine":
            self.codebook = nn.Parameter(F.normalize(torch.randn(count, width)))
        else:
            self.codebook = nn.Parameter(torch.empty(count, width).uniform_(-1 / count, 1 / count))
        self._known: Tensor | None = None

    frozen: Tensor
    sums: Tensor
    share: Tensor

    @torch.no_grad()
    def freeze(self, codes: Tensor) -> None:
        """Take the codes of a codebook (K, features), which are standardised.

        Raises:
            UsageError: they are not as many or not as wide as the configuration says.
        """
        if codes.shape != self.frozen.shape:
            wanted, given = (" x ".join(map(str, t.shape)) for t in (self.frozen, codes))
            raise UsageError(
                f"The codebook has {given} numbers, and the tokenizer is for {wanted}.",
                hint="Give a codebook of that size, or set vocabulary and features to its own.",
                code="other-codebook",
            )
        x = codes.float()
        x = (x - x.mean(0)) / x.std(0).clamp_min(1e-6)
        self.frozen.copy_(x)
        # The directions of most variance, each with variance 1, and from the first again where
        # there are fewer than numbers.
        values, vectors = torch.linalg.eigh((x.T @ x / len(x)).double())
        values, vectors = values.flip(0), vectors.flip(1)
        whole = vectors * values.clamp_min(1e-4 * values[0]).rsqrt()
        columns = torch.arange(self.config.width) % whole.shape[1]
        self.project.weight.copy_(whole[:, columns].T)

    def codes(self) -> Tensor:
        """The codes as they are compared, (K, width)."""
        fixed = not (self.training or torch.is_grad_enabled() or torch.compiler.is_exporting())
        device = self.widen.weight.device
        if fixed and self._known is not None and self._known.device == device:
            return self._known
        if self.config.codes == "projected":
            with torch.autocast(device.type, enabled=False):
                codes = self.project(self.frozen)
        elif self.config.codes == "ema":
            codes = self.sums / self.share[:, None]
        else:
            codes = self.codebook
        codes = F.normalize(codes, dim=-1) if self.config.metric == "cosine" else codes
        if fixed:
            self._known = codes
        return codes

    def train(self, mode: bool = True) -> VQ:
        """Codes are made once for all that is evaluated."""
        self._known = None
        return super().train(mode)

    def form(self, max_tokens: int) -> TokenForm:
        return form_of_vocabulary(self.config.vocabulary, max_tokens)

    def forward(self, hidden: Tensor) -> Quantized:
        config = self.config
        inner = self.numbers(hidden).float()
        if config.metric == "cosine":
            inner = F.normalize(inner, dim=-1)
        codes = self.codes().float()
        ids = nearest_code(inner, codes)
        chosen = F.embedding(ids, codes)
        losses = {}
        if self.training:
            total = config.commitment_weight * F.mse_loss(inner, chosen.detach())
            if config.codes != "ema":
                total = total + config.codebook_weight * F.mse_loss(chosen, inner.detach())
            losses["codebook"] = total
        through = inner + (chosen - inner).detach()
        if self.training and config.codes == "ema":
            self._average(inner.detach().flatten(0, -2), ids.flatten())
        return Quantized(self.widen(through.to(hidden.dtype)), ids, None, losses)

    @torch.no_grad()
    def _average(self, vectors: Tensor, ids: Tensor) -> None:
        """Move codes towards the means of the vectors that chose them.

        Shares of a batch, so that workers that average what changed have what one would.
        """
        step, weight = 1 - self.config.decay, 1 / len(vectors)
        share = torch.zeros_like(self.share).index_add_(0, ids, ids.new_ones(len(ids)) * weight)
        sums = torch.zeros_like(self.sums).index_add_(0, ids, vectors * weight)
        # A code that nothing chooses stays where it is; its share is kept from vanishing.
        live = (share > 0) | (self.share > _LEAST_SHARE)
        self.share.copy_(torch.where(live, self.share.lerp(share, step), self.share))
        self.sums.copy_(torch.where(live[:, None], self.sums.lerp(sums, step), self.sums))

    def levels(self, values: Tensor) -> Tensor:
        return F.embedding(values, self.codes())


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
