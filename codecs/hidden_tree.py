"""Symbols that depend on one another, through a tree of hidden states."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, cast

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter1d
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import minimum_spanning_tree

from pipeline.clustering.threads import Threads
from pipeline.codecs import tree_kernels as kernels
from pipeline.codecs.entropy import Symbols
from pipeline.codecs.rans import CorruptError, check, from_bytes, to_bytes
from pipeline.codecs.tables import NIBBLE, TOTAL, Ints, escape_digits, frequencies
from pipeline.errors import RunError

Floats = npt.NDArray[np.floating[Any]]

LEVELS = 8
"""Steps that symbols are cut to when it is asked which depend on one another."""
ASKED = 4000
"""Samples from which that is found."""
PARTS = 4
"""Parts of a batch that are counted apart: fixed, so that sums do not depend on threads."""


@dataclass(frozen=True, eq=False)
class HiddenTree:
    """A tree over a sample's D symbols: each has a hidden state that depends on its parent's.

    What a symbol is likely to be, all earlier ones given, needs two messages an edge, so that a
    sample takes O(D K^2) for K states. Coding is in integers alone: equal bytes on every machine.
    Source: Liu, Mandt and Van den Broeck, "Lossless Compression with Probabilistic Circuits", 2022.

    Attributes:
        order: int32 (D,), the symbol of each node; nodes come in the order of a depth-first walk.
        parent: int32 (D,), of each node, smaller than its own number; the root, node 0, has 0.
        root: uint16 (K,), weights of the root's states.
        transition: uint16 (D, K, K), of a node's state (last) for its parent's; node 0 has none.
        emission: uint16 (D, V, K), of a symbol for a state; the last is the escape.
        offset: the least symbol.
        shape: of a sample.
    """

    order: npt.NDArray[np.int32]
    parent: npt.NDArray[np.int32]
    root: npt.NDArray[np.uint16]
    transition: npt.NDArray[np.uint16]
    emission: npt.NDArray[np.uint16]
    offset: int
    shape: tuple[int, ...]

    codec: ClassVar[int] = 2

    def __post_init__(self) -> None:
        nodes, states = len(self.order), len(self.root)
        shapes = (nodes, states, states), (nodes, self.emission.shape[1], states)
        if (self.transition.shape, self.emission.shape) != shapes or states < 2:
            raise _bad("its arrays are not of one size")
        if math.prod(self.shape) != nodes or (np.sort(self.order) != np.arange(nodes)).any():
            raise _bad("it does not have a node for each symbol")
        if self.parent.shape != (nodes,) or self.parent[0] != 0 or not _depth_first(self.parent):
            raise _bad("its nodes are no tree in the order of a walk")
        sums = (self.root, 0), (self.transition[1:], 2), (self.emission, 1)
        for values, axis in sums:
            if values.size and (values.min() < 1 or (values.sum(axis, np.int64) != TOTAL).any()):
                raise _bad(f"weights are not positive with the sum {TOTAL:,}")

    @classmethod
    def fit(
        cls,
        symbols: Ints,
        *,
        states: int = 16,
        epochs: int = 12,
        batch: int = 500,
        pseudocount: float = 0.01,
        seed: int = 0,
        threads: int | None = None,
    ) -> HiddenTree:
        """Find the tree of most mutual information, and by expectation-maximisation its weights.

        Source: Chow and Liu, "Approximating discrete probability distributions with dependence
        trees", 1968; steps from 0.5 to 0.05 of what a batch says.

        Args:
            symbols: (N, *shape), from which it is made.
            states: K.
            epochs: of expectation-maximisation.
            batch: samples of a step.
            pseudocount: added to what is expected of each transition.
            seed: of the start and of batches.
            threads: the result does not depend on them.
        """
        shape = tuple(symbols.shape[1:])
        flat = symbols.reshape(len(symbols), -1)
        offset = int(flat.min())
        values = (flat - offset).astype(np.int32)
        size = int(values.max()) + 2
        order, parent = chow_liu(values, size)
        values = np.ascontiguousarray(values[:, order])
        draw = np.random.default_rng(seed)
        parts = Weights.start(values, size, states, draw)
        count = max(1, len(values) // batch)
        for epoch in range(epochs):
            rows = draw.permutation(len(values))
            for index in range(count):
                step = 0.5 * 0.1 ** ((epoch * count + index) / max(1, epochs * count - 1))
                part = values[rows[index * batch : (index + 1) * batch]]
                parts.improve(part, parent, step, pseudocount, threads)
        return cls.of(parts, order, parent, offset, shape)

    @classmethod
    def of(
        cls,
        weights: Weights,
        order: npt.NDArray[np.int32],
        parent: npt.NDArray[np.int32],
        offset: int,
        shape: tuple[int, ...],
    ) -> HiddenTree:
        """The tree in integers."""

        def whole(values: Floats) -> npt.NDArray[np.uint16]:
            """Last axis in integers."""
            rows = values.reshape(-1, values.shape[-1]).astype(np.float64)
            made = np.stack([frequencies(row) for row in rows]).astype(np.uint16)
            return made.reshape(values.shape)

        emission = whole(np.ascontiguousarray(weights.emission.transpose(0, 2, 1)))
        transition = whole(weights.transition)
        return cls(
            order,
            parent,
            whole(weights.root),
            transition,
            np.ascontiguousarray(emission.transpose(0, 2, 1)),
            offset,
            shape,
        )

    @cached_property
    def digest(self) -> str:
        about = f"tree {self.offset} {self.shape} {self.emission.shape}".encode()
        parts = [self.order.astype("<i4"), self.parent.astype("<i4")]
        parts += [v.astype("<u2") for v in (self.root, self.transition, self.emission)]
        return hashlib.sha256(about + b"".join(p.tobytes() for p in parts)).hexdigest()

    @cached_property
    def _arrays(self) -> tuple[Any, ...]:
        """What the compiled loops are given."""
        last = np.arange(len(self.parent), dtype=np.int32)
        for i in range(len(last) - 1, 0, -1):
            last[self.parent[i]] = max(last[self.parent[i]], last[i])
        zero = np.zeros_like(self.emission[:, :1], np.uint32)
        below = np.cumsum(self.emission, 1, dtype=np.uint32)
        cumulative = np.ascontiguousarray(np.concatenate([zero, below], 1))
        root = self.root.astype(np.uint32)
        return self.parent, last, root, self.transition, self.emission, cumulative

    def encode(self, symbols: Symbols) -> bytes:
        low, size, _ = self._slots(symbols)
        words = np.empty(low.size, np.uint32)
        at, state = kernels.push(low, size, 2**31 | check(symbols), words)
        return b"\1" + to_bytes(int(state), words[at:])

    def decode(self, data: bytes, count: int) -> Symbols:
        if data[:1] != b"\1":
            raise CorruptError
        state, words = from_bytes(data[1:])
        samples = np.empty((count, len(self.order)), np.int64)
        words = words.astype(np.uint32)
        at, state = kernels.pull(words, np.uint64(state), *self._arrays, samples)  # type: ignore[call-arg]
        samples += self.offset
        if at != len(words) or np.abs(samples).max(initial=0) > 2**31:
            raise CorruptError
        found = np.empty_like(samples, np.int32)
        found[:, self.order] = samples
        if int(state) != 2**31 | check(found):
            raise CorruptError
        return found

    def bits(self, symbols: Ints) -> float:
        return float((kernels.PRECISION - np.log2(self._slots(symbols)[1])).sum())

    def typical(self) -> Symbols:
        state = np.zeros((len(self.parent), len(self.root)))
        state[0] = self.root
        for node in range(1, len(state)):
            state[node] = state[self.parent[node]] @ self.transition[node] / TOTAL
        likely = np.einsum("nz,nvz->nv", state, self.emission[:, :-1].astype(np.float64))
        found = np.empty(len(state), np.int32)
        found[self.order] = likely.argmax(1) + self.offset
        return found

    def escapes(self, symbols: Ints) -> int:
        return self._slots(symbols)[2]

    def _slots(self, symbols: Ints) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32], int]:
        """Where each symbol lies in 2^24 slots, how many it has, and how many were escapes.

        The digits of a symbol that the tree does not know follow the escape.
        """
        places = symbols[:, self.order].astype(np.int64) - self.offset
        escape = self.emission.shape[1] - 1
        outside = (places < 0) | (places >= escape)
        samples = np.where(outside, escape, places).astype(np.int32)
        made = [np.empty(samples.shape, np.uint32) for _ in range(2)]
        kernels.slots(samples, *self._arrays, *made)
        low, size = (values.ravel() for values in made)
        rows = np.flatnonzero(outside)
        if len(rows):
            digits = [escape_digits(int(p), escape) for p in places.ravel()[rows]]
            where = np.repeat(rows + 1, [len(d) for d in digits])
            each = 2 ** (kernels.PRECISION - NIBBLE)
            low = np.insert(low, where, np.concatenate(digits).astype(np.uint32) * np.uint32(each))
            size = np.insert(size, where, np.uint32(each))
        return low, size, len(rows)

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Arrays by name, for a file."""
        names = ("order", "parent", "root", "transition", "emission")
        about = np.array([self.offset, *self.shape], np.int64)
        return {**{name: getattr(self, name) for name in names}, "about": about}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> HiddenTree:
        """What :meth:`to_arrays` gave.

        Raises:
            RunError: they are no tree.
        """
        try:
            offset, *shape = arrays["about"].tolist()
            order, parent = (arrays[name].astype(np.int32) for name in ("order", "parent"))
            root, transition, emission = (
                arrays[name].astype(np.uint16) for name in ("root", "transition", "emission")
            )
            return cls(order, parent, root, transition, emission, offset, tuple(shape))
        except (KeyError, ValueError, IndexError) as error:
            raise _bad(f"{error}") from error


@dataclass
class Weights:
    """Probabilities of a tree while they are found: root (K,), transition and emission."""

    root: Floats
    transition: Floats
    emission: Floats

    @classmethod
    def start(
        cls,
        values: npt.NDArray[np.int32],
        size: int,
        states: int,
        draw: np.random.Generator,
        dtype: type[np.floating[Any]] = np.float32,
    ) -> Weights:
        """From histograms of symbols, half of them smoothed, and noise that tells states apart."""
        nodes = values.shape[1]
        counted = np.stack([np.bincount(column, minlength=size) for column in values.T])
        shares = counted / len(values)
        shares = 0.5 * shares + 0.5 * gaussian_filter1d(shares, min(4, size / 8), axis=1)
        shares = shares + 1e-4 / size
        emission = shares[:, :, None] * draw.uniform(0.3, 1.3, (nodes, size, states))
        transition = draw.uniform(0.2, 1.2, (nodes, states, states))
        root = draw.uniform(0.2, 1.2, states)
        made = (root / root.sum(), transition / transition.sum(2, keepdims=True))
        return cls(*(a.astype(dtype) for a in (*made, emission / emission.sum(1, keepdims=True))))

    def improve(
        self,
        values: npt.NDArray[np.int32],
        parent: npt.NDArray[np.int32],
        step: float,
        pseudocount: float,
        threads: int | None = None,
    ) -> float:
        """A step of expectation-maximisation towards what samples (n, D) say.

        Returns:
            their log-likelihood before it.
        """
        edges = [len(values) * part // PARTS for part in range(PARTS + 1)]
        counts = [
            (np.zeros_like(self.transition), np.zeros_like(self.emission)) for _ in range(PARTS)
        ]

        def expect(part: int) -> float:
            own = values[edges[part] : edges[part + 1]]
            given = self.root, self.transition, self.emission
            return float(kernels.expect(own, parent, *given, *counts[part]))

        with Threads(threads) as pool:
            found = pool.each(expect, PARTS)
        transition, emission = (sum(c[which] for c in counts) for which in (0, 1))
        transition, emission = cast("Floats", transition), cast("Floats", emission)
        transition += pseudocount
        emission += pseudocount / 16
        root = transition[0, 0] / transition[0, 0].sum()
        transition[0] = 1  # a root has no parent
        transition /= transition.sum(2, keepdims=True)
        emission /= emission.sum(1, keepdims=True)
        new = Weights(root, transition, emission)
        for name, value in vars(self).items():
            value += np.asarray(step, value.dtype) * (getattr(new, name) - value)  # noqa: PLW2901
        return sum(found)


def chow_liu(
    values: npt.NDArray[np.int32], size: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """The tree over symbols that has most mutual information, from its centre, depth first.

    Args:
        values: (N, D), from 0; the first 4,000 count.
        size: V.

    Returns:
        the symbol of each node, and each node's parent; both int32 (D,).
    """
    values = values[:ASKED]
    rows, nodes = values.shape
    levels = min(LEVELS, size)
    # Steps that hold alike many of all values, those that are frequent by themselves.
    edges = np.unique(np.quantile(values, np.arange(1, levels) / levels, method="lower"))
    cut = np.searchsorted(edges, values, "left") if size > LEVELS else values
    levels = int(cut.max()) + 1
    each_hot = np.zeros((rows, nodes, levels), np.float32)
    np.put_along_axis(each_hot, cut[..., None], 1, 2)
    hot = each_hot.reshape(rows, -1)
    alone = hot.mean(0)
    entropy = _information(alone).reshape(nodes, levels).sum(1)
    # H(a) + H(b) - H(a, b), some nodes at a time: all pairs of levels at once are large.
    mutual = np.zeros((nodes, nodes))
    each = max(1, 2**24 // (nodes * levels * levels))
    for start in range(0, nodes, each):
        part = hot[:, start * levels : (start + each) * levels]
        joint = (part.T @ hot / rows).reshape(-1, levels, nodes, levels)
        together = _information(joint).sum((1, 3))
        own = entropy[start : start + each]
        mutual[start : start + each] = own[:, None] + entropy - together
    # A weight of 0 is no edge to the library, and all nodes are to be joined.
    weights = -(np.maximum(mutual, 0) + 1e-6)
    np.fill_diagonal(weights, 0)
    tree = minimum_spanning_tree(csr_matrix(weights)).tocoo()
    near: list[list[int]] = [[] for _ in range(nodes)]
    for a, b in zip(tree.row.tolist(), tree.col.tolist(), strict=True):
        near[a].append(b)
        near[b].append(a)
    return _walk(near, _centre(near))


def _information(p: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """-p log2 p."""
    safe = np.maximum(p, 1e-12)
    return cast("npt.NDArray[np.float64]", -safe * np.log2(safe))


def _centre(near: list[list[int]]) -> int:
    """The middle of a longest path."""

    def paths(start: int) -> list[int]:
        """From ``start`` to a node that is farthest."""
        before, turn = {start: -1}, [start]
        for node in turn:
            for other in sorted(near[node]):
                if other not in before:
                    before[other] = node
                    turn.append(other)
        path = [turn[-1]]
        while before[path[-1]] >= 0:
            path.append(before[path[-1]])
        return path

    path = paths(paths(0)[0])
    return path[len(path) // 2]


def _walk(near: list[list[int]], start: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    order: list[int] = []
    parent: list[int] = []
    stack = [(start, 0, -1)]
    while stack:
        node, up, before = stack.pop()
        number = len(order)
        order.append(node)
        parent.append(up)
        stack += [(other, number, node) for other in sorted(near[node])[::-1] if other != before]
    return np.array(order, np.int32), np.array(parent, np.int32)


def _depth_first(parent: npt.NDArray[np.int32]) -> bool:
    """Whether each node comes after its parent, and with all that is below it."""
    path = [0]
    for node, up in enumerate(parent.tolist()):
        if node:
            while path and path[-1] != up:
                path.pop()
            if not path:
                return False
            path.append(node)
    return True


def _bad(why: str) -> RunError:
    return RunError(
        f"This is no tree of symbols: {why}.",
        hint="Make it with HiddenTree.fit, or fetch the file again.",
        code="bad-tree",
    )
