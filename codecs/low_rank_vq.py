"""Weights as codes: low-rank vectors clustered together (LR²VQ), and what they take.

Source: Zhu, Zhou and Zhong, "Learning Low-Rank Representations for Model Compression", 2023. A
weight is cut into sub-vectors of m numbers, each of which is basis @ z with z of d numbers; the z
of a layer share a codebook of k codes. With d = m it is product quantization.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field
from torch import nn

from pipeline.config import Config
from pipeline.errors import UsageError

Floats = npt.NDArray[np.float32]
HALF = 16
"""Bits of a number of a codebook or a basis."""
_FULL = 32


class CodeConfig(Config):
    """How the weights of a network are coded."""

    k: int = Field(default=256, ge=2, le=65536, description="codes of a layer")
    m: int = Field(
        default=8,
        ge=1,
        description="numbers of a sub-vector: the largest divisor of a row up to this",
    )
    m_pointwise: int | None = Field(
        default=None, ge=1, description="the same, of 1 x 1 convolutions; as others where not given"
    )
    m_linear: int | None = Field(
        default=None, ge=1, description="the same, of linear layers; as others where not given"
    )
    k_linear: int | None = Field(default=None, ge=2, le=65536, description="codes of linear layers")
    d: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto",
        description="numbers of a code: as many in every layer, or estimated for each",
    )
    tolerance: float = Field(
        default=0.05,
        ge=0,
        description="of the estimate: the least d whose error is so little above that of d = m",
    )
    low_rank_error: float = Field(
        default=0.25,
        ge=0,
        le=1,
        description="of the estimate: share of a layer's energy that low rank may leave out",
    )
    skip: tuple[str, ...] = Field(default=(), description="names of layers that stay as they are")
    skip_first: bool = Field(default=True, description="the first convolution stays as it is")


@dataclass(frozen=True)
class CodedLayer:
    """How one weight is coded.

    Attributes:
        name: of its layer.
        shape: of the weight.
        m: numbers of a sub-vector.
        k: codes.
        d: numbers of a code.
    """

    name: str
    shape: tuple[int, ...]
    m: int
    k: int
    d: int

    @property
    def vectors(self) -> int:
        """Sub-vectors of the weight."""
        return math.prod(self.shape) // self.m

    @property
    def code_bits(self) -> int:
        """Bits of a code."""
        return max(1, (self.k - 1).bit_length())

    @property
    def bits(self) -> dict[str, int]:
        """Bits of codes, codebook and basis; with d = m there is no basis."""
        basis = self.m * self.d * HALF if self.d < self.m else 0
        codes = self.vectors * self.code_bits
        return {"codes": codes, "codebook": self.k * self.d * HALF, "basis": basis}

    @property
    def ratio(self) -> float:
        """Bits of the weight in float32 over those of its code."""
        return math.prod(self.shape) * _FULL / sum(self.bits.values())


def sub_vectors(weight: Floats, m: int) -> Floats:
    """A weight (out, ...) as rows (n, m): its own rows, each cut into sub-vectors."""
    return np.ascontiguousarray(weight.reshape(-1, m), np.float32)


def largest_divisor(row: int, most: int) -> int:
    """The largest divisor of ``row`` that is no more than ``most``."""
    return next(m for m in range(min(row, most), 0, -1) if row % m == 0)


def usable_codes(k: int, vectors: int) -> int:
    """``k``, or the largest power of two that leaves four sub-vectors a code, at least 2."""
    return max(2, min(k, 1 << max(vectors // 4, 1).bit_length() - 1))


@dataclass(frozen=True)
class Left:
    """A layer that stays as it is, and why."""

    name: str
    why: str


def plan_layers(model: nn.Module, config: CodeConfig) -> tuple[list[CodedLayer], list[Left]]:
    """Which layers of a network are coded and how, with d = m; and which stay as they are.

    Convolutions and linear layers are coded, except the first convolution, layers that are named,
    those that share their weight with another, and those that would take no less.

    Raises:
        UsageError: a weight is not finite, a named layer does not exist, or nothing is left.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }
    unknown = [name for name in config.skip if name not in layers]
    if unknown:
        raise UsageError(
            f"The network has no layer '{unknown[0]}' that could be coded.",
            hint=f"Its convolutions and linear layers are {', '.join(list(layers)[:8])}, ...",
            code="unknown-layer",
        )
    shared = [id(layer.weight) for layer in layers.values()]
    first = next((n for n, layer in layers.items() if isinstance(layer, nn.Conv2d)), None)
    coded, left = [], []
    for name, layer in layers.items():
        weight = layer.weight
        if not bool(weight.isfinite().all()):
            raise UsageError(
                f"The weight of '{name}' is not finite.",
                hint="Give a checkpoint of a training that did not diverge.",
                code="not-finite",
            )
        made = _layer(name, layer, config)
        if name in config.skip:
            left.append(Left(name, "named"))
        elif name == first and config.skip_first:
            left.append(Left(name, "first"))
        elif shared.count(id(weight)) > 1:
            left.append(Left(name, "shared"))
        elif made.ratio <= 1:
            left.append(Left(name, "small"))
        else:
            coded.append(made)
    if not coded:
        raise UsageError(
            "No layer of the network would be smaller.",
            hint="Lower k, raise m, or leave fewer layers out.",
            code="nothing-to-code",
        )
    return coded, left


def _layer(name: str, layer: nn.Conv2d | nn.Linear, config: CodeConfig) -> CodedLayer:
    most, k = config.m, config.k
    if isinstance(layer, nn.Linear):
        most, k = config.m_linear or most, config.k_linear or k
    elif layer.kernel_size == (1, 1):
        most = config.m_pointwise or most
    shape = tuple(layer.weight.shape)
    m = largest_divisor(math.prod(shape[1:]), most)
    return CodedLayer(name, shape, m, usable_codes(k, math.prod(shape) // m), m)


@dataclass(frozen=True)
class Directions:
    """Orthonormal directions of most energy of sub-vectors, without their mean taken off.

    Attributes:
        basis: float64 (m, m), columns in order.
        energy: float64 (m,), sum of squares along each.
    """

    basis: npt.NDArray[np.float64]
    energy: npt.NDArray[np.float64]

    @classmethod
    def of(cls, vectors: Floats) -> Directions:
        x = vectors.astype(np.float64)
        energy, basis = np.linalg.eigh(x.T @ x)
        return cls(basis[:, ::-1], np.maximum(energy[::-1], 0.0))

    def low_rank_error(self, d: int) -> float:
        """Share of the energy that the first d directions leave out."""
        return float(self.energy[d:].sum() / max(self.energy.sum(), 1e-300))


@dataclass(frozen=True)
class Clustered:
    """Codes of some layers.

    Attributes:
        codes: int32 (n,) of each layer.
        codebooks: float32 (k, d) of each.
        errors: sum of squared distances of each.
    """

    codes: list[npt.NDArray[np.int32]]
    codebooks: list[Floats]
    errors: list[float]


def cluster(
    vectors: Sequence[Floats], counts: Sequence[int], seed: int, threads: int | None = None
) -> Clustered:
    """k-means of the vectors of every layer, those of one width together.

    Args:
        vectors: float32 (n, d) of each layer; d may differ.
        counts: codes of each.
        seed: of the starts.
        threads: as many as there are cores where not given.
    """
    from pipeline.clustering.batched_kmeans import BatchedKMeans

    codes = [np.empty(0, np.int32)] * len(vectors)
    books, errors = [np.empty((0, 0), np.float32)] * len(vectors), [0.0] * len(vectors)
    for width in sorted({x.shape[1] for x in vectors}):
        own = [n for n, x in enumerate(vectors) if x.shape[1] == width]
        edges = np.concatenate([[0], np.cumsum([len(vectors[n]) for n in own])])
        rows = np.concatenate([vectors[n] for n in own])
        made = BatchedKMeans([counts[n] for n in own], random_state=seed, n_jobs=threads)
        made.fit(rows, offsets=edges)
        for place, number in enumerate(own):
            codes[number] = made.labels_[edges[place] : edges[place + 1]]
            start, stop = made.center_offsets_[place : place + 2]
            books[number] = made.cluster_centers_[start:stop]
            errors[number] = float(made.inertia_[place])
    return Clustered(codes, books, errors)


@dataclass(frozen=True)
class Curve:
    """Errors of a layer by d from 1 to m, as shares of its weights' energy.

    Attributes:
        low_rank: what d directions leave out.
        clustering: what k codes leave out of what is left, before anything is trained.
    """

    low_rank: tuple[float, ...]
    clustering: tuple[float, ...]


def error_curves(
    weights: Mapping[str, Floats],
    layers: Sequence[CodedLayer],
    seed: int,
    threads: int | None = None,
) -> list[Curve]:
    """The two errors of every layer for every d."""
    found: list[list[tuple[float, float]]] = [[] for _ in layers]
    split = [sub_vectors(weights[layer.name], layer.m) for layer in layers]
    directions = [Directions.of(x) for x in split]
    for d in range(1, max(layer.m for layer in layers) + 1):
        own = [n for n, layer in enumerate(layers) if d <= layer.m]
        inside = [(split[n] @ directions[n].basis[:, :d]).astype(np.float32) for n in own]
        made = cluster(inside, [layers[n].k for n in own], seed, threads)
        for place, number in enumerate(own):
            energy = max(float(directions[number].energy.sum()), 1e-300)
            low = directions[number].low_rank_error(d)
            found[number].append((low, made.errors[place] / energy))
    return [Curve(*zip(*rows, strict=True)) for rows in found]


def estimate(curve: Curve, config: CodeConfig) -> int:
    """The least d whose errors come to no more than 1 + ``tolerance`` times those of d = m.

    Their sum falls with d, since a codebook of less width is one of more as well: there is no
    least, but a bend, after which more numbers a code buy little. What low rank leaves out can be
    learned again by training, and what clustering leaves out cannot, so the bend is early enough.
    Up to a point: where few codes leave out most of the weights, low rank could too and the sum
    would hardly tell, but a network of which little is left learns nothing again.
    """
    pairs = list(zip(curve.low_rank, curve.clustering, strict=True))
    total = (1 + config.tolerance) * sum(pairs[-1])
    most = config.low_rank_error
    return next(d for d, pair in enumerate(pairs, 1) if sum(pair) <= total and pair[0] <= most)


def choose_widths(
    layers: Sequence[CodedLayer], curves: Sequence[Curve], config: CodeConfig
) -> list[CodedLayer]:
    """The layers with the numbers of a code that are asked for, or estimated.

    An estimate with which a basis would cost more than narrow codes save is d = m.
    """
    found = []
    for layer, curve in zip(layers, curves, strict=True):
        d = estimate(curve, config) if config.d == "auto" else min(config.d, layer.m)
        narrow, whole = replace(layer, d=d), replace(layer, d=layer.m)
        found.append(whole if config.d == "auto" and narrow.ratio < whole.ratio else narrow)
    return found
