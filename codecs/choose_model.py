"""Which entropy model symbols are coded with: by what it saves, and what it takes itself."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy.typing as npt

from pipeline.codecs.entropy import EntropyModel, StaticModel
from pipeline.codecs.hidden_tree import HiddenTree
from pipeline.codecs.tables import Ints, Tables

Kind = Literal["prior", "channel", "position", "tree"]
HELD_OUT = 5
"""One sample in so many is kept to measure what a model is worth."""
LEAST_FOR_TREE = 1000
"""Samples below which a tree is not tried."""
MOST_FOR_TREE = 2**24
"""Weights of a tree, at most, that is tried."""
STATES = 16


@dataclass(frozen=True)
class Candidate:
    """What a model is worth.

    Attributes:
        kind: of the model.
        sample: mean bytes of a sample that it has not seen.
        model: bytes of the model itself, compressed.
        total: bytes of all samples and the model.
    """

    kind: str
    sample: float
    model: int
    total: float


def choose_model(
    symbols: Ints, samples: int, prior: Tables | None = None, kind: Kind | Literal["auto"] = "auto"
) -> tuple[EntropyModel, list[Candidate]]:
    """The model with which ``samples`` samples and itself take the fewest bytes.

    Tables of the learned prior, tables that are counted, for each channel and for each position,
    and a hidden tree are tried on samples that were kept out; the best is made again from all.

    Args:
        symbols: (N, C, ...) of training.
        samples: that are to be coded.
        prior: tables that training has learned, one a channel.
        kind: the only one that is tried.
    """
    shape = tuple(symbols.shape[1:])
    held = symbols[::HELD_OUT]
    rest = [n for n in range(len(symbols)) if n % HELD_OUT] or [0]
    makers = _makers(symbols, prior, kind)
    found = []
    for name, make in makers.items():
        model = make(symbols[rest])
        size = _size(model)
        each = model.bits(held.reshape(len(held), -1)) / 8 / len(held)
        found.append(Candidate(name, each, size, each * samples + size))
    best = min(found, key=lambda one: one.total)
    if best.kind == "prior" and prior is not None:
        return StaticModel(prior, StaticModel.pattern_of(shape), shape), found
    return makers[best.kind](symbols), found


def model_from_arrays(arrays: Mapping[str, npt.NDArray[Any]]) -> EntropyModel:
    """A model from its ``to_arrays``.

    Raises:
        RunError: they are none.
    """
    return (
        HiddenTree.from_arrays(arrays) if "emission" in arrays else StaticModel.from_arrays(arrays)
    )


def _makers(
    symbols: Ints, prior: Tables | None, kind: str
) -> dict[str, Callable[[Ints], StaticModel | HiddenTree]]:
    shape = tuple(symbols.shape[1:])
    size, count = symbols[0].size, int(symbols.max()) - int(symbols.min()) + 2
    makers: dict[str, Callable[[Ints], StaticModel | HiddenTree]] = {"channel": StaticModel.counted}
    if prior is not None:
        learned = StaticModel(prior, StaticModel.pattern_of(shape), shape)
        makers["prior"] = lambda _: learned
    if size <= 2**16:
        makers["position"] = lambda x: StaticModel.counted(x, positions=True)
    small = size * STATES * (STATES + count) <= MOST_FOR_TREE
    if kind == "tree" or (small and len(symbols) >= LEAST_FOR_TREE):
        makers["tree"] = lambda x: HiddenTree.fit(x, states=STATES)
    return makers if kind == "auto" else {kind: makers[kind]}


def _size(model: StaticModel | HiddenTree) -> int:
    return len(zlib.compress(b"".join(a.tobytes() for a in model.to_arrays().values()), 9))
