"""Nearest centroids, distances and sums of rows in a GPU's memory: kernels written in Triton.

The N x K matrix of distances is written nowhere: a program holds a block of rows against one block
of centroids after another and keeps the least score of each row. Scores tell which centroid is
nearest and nothing else; distances are measured from the rows afterwards.

Sums are float64. The rows of a cluster are added in an order that their numbers fix, in pieces of
a fixed size: no atomic operation, so the sums of one data set are the same bits in each run,
however programs are scheduled.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl

PRECISIONS = ("ieee", "tf32x3", "tf32", "bf16")
"""What products are made in: float32; three tf32 products, nearly that; or rounded operands."""

PIECE = 1024
"""Rows that one program adds up: fixed, so that a sum depends on the data alone."""

_TILE = 2048
"""Values that a program adds up or compares at a time."""

_SAMPLE = 4096

_SHORT = 2**15
"""Fewer clusters have numbers of 16 bits, the number after the last one too."""


def _jit(function: Callable[..., None]) -> Any:
    """A kernel: compiled when it is first called, or interpreted."""
    return triton.jit(function)


@_jit
def _nearest(
    x: tl.tensor,
    centre: tl.tensor,
    centroids: tl.tensor,
    half: tl.tensor,
    labels: tl.tensor,
    count: tl.tensor,
    clusters: tl.tensor,
    columns: tl.tensor,
    width: tl.constexpr,  # noqa: ARG001
    precision: tl.constexpr,
    native: tl.constexpr,
    block_d: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
) -> None:
    """Label a block of rows with the centroid of least score, the first of several.

    Args:
        x: float32 (N, D).
        centre: float32 (D,), taken off rows, so that little cancels where they lie far from 0.
        centroids: float32 (K, D), less ``centre``.
        half: float32 (K,), half their squared norms.
        labels: int32 (N,), written.
        count: N.
        clusters: K.
        columns: D.
        width: what a block of centroids may have: what configurations are chosen by.
        precision: one of :data:`PRECISIONS`.
        native: there are products of bfloat16.
        block_d: columns of a block.
        block_n: rows of a block.
        block_k: centroids of a block.
    """
    rows = tl.program_id(0).to(tl.int64) * block_n + tl.arange(0, block_n)
    inside = rows < count
    least = tl.full((block_n,), float("inf"), tl.float32)
    label = tl.zeros((block_n,), tl.int32)
    for first in range(0, clusters, block_k):
        numbers = first + tl.arange(0, block_k)
        known = numbers < clusters
        product = tl.zeros((block_n, block_k), tl.float32)
        for start in range(0, columns, block_d):
            column = start + tl.arange(0, block_d)
            used = column < columns
            a = tl.load(
                x + rows[:, None] * columns + column[None, :],
                mask=inside[:, None] & used[None, :],
                other=0.0,
            )
            a -= tl.load(centre + column, mask=used, other=0.0)[None, :]
            b = tl.load(
                centroids + numbers[None, :].to(tl.int64) * columns + column[:, None],
                mask=known[None, :] & used[:, None],
                other=0.0,
            )
            if precision == "bf16":
                a, b = a.to(tl.bfloat16), b.to(tl.bfloat16)
                if not native:
                    a, b = a.to(tl.float32), b.to(tl.float32)
                product = tl.dot(a, b, product)
            else:
                product = tl.dot(a, b, product, input_precision=precision)
        # Beyond the last centroid a score is infinite.
        score = tl.load(half + numbers, mask=known, other=float("inf"))[None, :] - product
        low, lane = tl.min(score, 1, return_indices=True, return_indices_tie_break_left=True)
        # A later block takes over only where it is nearer: ties stay with the lower number.
        label = tl.where(low < least, first + lane, label)
        least = tl.minimum(low, least)
    tl.store(labels + rows, label, mask=inside)


@_jit
def _measure(
    x: tl.tensor,
    centroids: tl.tensor,
    labels: tl.tensor,
    near: tl.tensor,
    count: tl.tensor,
    columns: tl.tensor,
    block_n: tl.constexpr,
    block_d: tl.constexpr,
) -> None:
    """Write ``sum((x - c)^2)`` of a block of rows, c the centroid a row is labelled with.

    Args:
        x: float32 (N, D).
        centroids: float32 (K, D).
        labels: int32 (N,).
        near: float32 (N,), written.
        count: N.
        columns: D.
        block_n: rows of a block.
        block_d: columns of a block.
    """
    rows = tl.program_id(0).to(tl.int64) * block_n + tl.arange(0, block_n)
    inside = rows < count
    own = tl.load(labels + rows, mask=inside, other=0).to(tl.int64)
    total = tl.zeros((block_n, block_d), tl.float32)
    for start in range(0, columns, block_d):
        column = start + tl.arange(0, block_d)
        mask = inside[:, None] & (column < columns)[None, :]
        a = tl.load(x + rows[:, None] * columns + column[None, :], mask=mask, other=0.0)
        b = tl.load(centroids + own[:, None] * columns + column[None, :], mask=mask, other=0.0)
        total += (a - b) * (a - b)
    tl.store(near + rows, tl.sum(total, 1), mask=inside)


@_jit
def _add_rows(
    x: tl.tensor,
    weights: tl.tensor,
    order: tl.tensor,
    offsets: tl.tensor,
    starts: tl.tensor,
    owners: tl.tensor,
    parts: tl.tensor,
    part_weights: tl.tensor,
    clusters: tl.tensor,
    columns: tl.tensor,
    piece: tl.constexpr,
    block_n: tl.constexpr,
    block_d: tl.constexpr,
) -> None:
    """Add up ``weights * x`` over a piece of a cluster's rows, for a block of columns.

    Args:
        x: float32 (N, D).
        weights: float32 (N,).
        order: int64 (N,), numbers of rows, cluster by cluster.
        offsets: int64 (K + 1,), where each cluster's rows begin in ``order``.
        starts: int64 (K + 1,), where each cluster's pieces begin.
        owners: int64 (P,), each piece's cluster; K where there is no such piece.
        parts: float64 (P, D), written.
        part_weights: float64 (P,), the sum of the weights, written.
        clusters: K.
        columns: D.
        piece: rows of a piece.
        block_n: rows added at a time.
        block_d: columns of a block.
    """
    number = tl.program_id(0).to(tl.int64)
    owner = tl.load(owners + number)
    if owner < clusters:
        first = tl.load(offsets + owner) + (number - tl.load(starts + owner)) * piece
        size = tl.minimum(tl.load(offsets + owner + 1) - first, piece)
        column = tl.program_id(1) * block_d + tl.arange(0, block_d)
        used = column < columns
        total = tl.zeros((block_n, block_d), tl.float64)
        weight = tl.zeros((block_n,), tl.float64)
        for start in range(0, size, block_n):
            place = start + tl.arange(0, block_n)
            inside = place < size
            rows = tl.load(order + first + place, mask=inside, other=0)
            w = tl.load(weights + rows, mask=inside, other=0.0).to(tl.float64)
            a = tl.load(
                x + rows[:, None] * columns + column[None, :],
                mask=inside[:, None] & used[None, :],
                other=0.0,
            )
            total += a.to(tl.float64) * w[:, None]
            weight += w
        tl.store(parts + number * columns + column, tl.sum(total, 0), mask=used)
        if tl.program_id(1) == 0:
            tl.store(part_weights + number, tl.sum(weight, 0))


@_jit
def _add_parts(
    parts: tl.tensor,
    part_weights: tl.tensor,
    starts: tl.tensor,
    sums: tl.tensor,
    sum_weights: tl.tensor,
    columns: tl.tensor,
    block_n: tl.constexpr,
    block_d: tl.constexpr,
) -> None:
    """Add up the pieces of a cluster, for a block of columns.

    Args:
        parts: float64 (P, D).
        part_weights: float64 (P,).
        starts: int64 (K + 1,), where each cluster's pieces begin.
        sums: float64 (K, D), written.
        sum_weights: float64 (K,), written.
        columns: D.
        block_n: pieces added at a time.
        block_d: columns of a block.
    """
    cluster = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(starts + cluster), tl.load(starts + cluster + 1)
    column = tl.program_id(1) * block_d + tl.arange(0, block_d)
    used = column < columns
    total = tl.zeros((block_n, block_d), tl.float64)
    weight = tl.zeros((block_n,), tl.float64)
    for start in range(begin, end, block_n):
        place = start + tl.arange(0, block_n)
        inside = place < end
        total += tl.load(
            parts + place[:, None] * columns + column[None, :],
            mask=inside[:, None] & used[None, :],
            other=0.0,
        )
        weight += tl.load(part_weights + place, mask=inside, other=0.0)
    tl.store(sums + cluster * columns + column, tl.sum(total, 0), mask=used)
    if tl.program_id(1) == 0:
        tl.store(sum_weights + cluster, tl.sum(weight, 0))


NATIVE = isinstance(_nearest, triton.JITFunction)
"""Kernels are compiled for a GPU; else Triton's interpreter runs them, in main memory."""


def _config(block_n: int, block_k: int, warps: int, stages: int) -> Any:
    shape = {"block_n": block_n, "block_k": block_k}
    return triton.Config(shape, num_warps=warps, num_stages=stages)


# Blocks of columns are no part of a configuration: float32 products are added in one order in all
# of them, so the fastest one on a machine does not decide where a row goes that lies between two.
_CONFIGS = [
    _config(128, 16, 4, 3),
    _config(128, 32, 4, 3),
    _config(64, 64, 4, 3),
    _config(128, 64, 8, 3),
    _config(64, 128, 8, 3),
    _config(128, 128, 8, 3),
    _config(128, 128, 8, 4),
    _config(64, 256, 8, 3),
]


def _fitting(configs: list[Any], arguments: dict[str, Any], **options: Any) -> list[Any]:
    """Configurations without a block that is mostly beyond the last centroid."""
    width = {**arguments, **options}["width"]
    return [config for config in configs if width // 4 <= config.kwargs["block_k"] <= width]


_nearest_tuned: Any = triton.autotune(
    configs=_CONFIGS if NATIVE else [_config(64, 16, 4, 1)],
    key=["columns", "width", "precision"],
    prune_configs_by={"early_config_prune": _fitting},
)(_nearest)


def nearest(
    x: torch.Tensor, centroids: torch.Tensor, centre: torch.Tensor, precision: str = "ieee"
) -> torch.Tensor:
    """The nearest centroid of each row, the first of several: int32 (N,).

    Args:
        x: float32 (N, D), contiguous.
        centroids: float32 (K, D).
        centre: float32 (D,), near the middle of the rows.
        precision: one of :data:`PRECISIONS`; only with ``"ieee"`` are products those of float32.
    """
    count, columns = x.shape
    clusters = len(centroids)
    # The kernel takes the centre off rows in the same way.
    moved = (centroids - centre).contiguous()
    half = moved.double().square().sum(1).mul_(0.5).float()
    labels = torch.empty(count, dtype=torch.int32, device=x.device)

    def grid(config: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(count, config["block_n"]),)

    with on_device(x):
        _nearest_tuned[grid](
            x,
            centre,
            moved,
            half,
            labels,
            count,
            clusters,
            columns,
            width=_power(clusters, 16, 256),
            precision=precision,
            native=NATIVE,
            block_d=_power(columns, 16, 32),
        )
    return labels


def measure(
    x: torch.Tensor, centroids: torch.Tensor, labels: torch.Tensor, near: torch.Tensor
) -> None:
    """Write the squared distance of each row from the centroid it is labelled with.

    Args:
        x: float32 (N, D), contiguous.
        centroids: float32 (K, D).
        labels: int32 (N,).
        near: float32 (N,), written.
    """
    count, columns = x.shape
    block_d = _power(columns, 1, 64)
    block_n = _TILE // block_d
    with on_device(x):
        _measure[(triton.cdiv(count, block_n),)](
            x,
            centroids.contiguous(),
            labels,
            near,
            count,
            columns,
            block_n=block_n,
            block_d=block_d,
        )


def sum_rows(
    x: torch.Tensor, weights: torch.Tensor, labels: torch.Tensor, clusters: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums of ``weights * x`` and of ``weights`` over each cluster's rows.

    Args:
        x: float32 (N, D), contiguous.
        weights: float32 (N,).
        labels: int32 (N,), from 0 to below ``clusters``.
        clusters: K.

    Returns:
        float64 (K, D) and float64 (K,).
    """
    count, columns = x.shape
    # A radix sort of half as many digits, where labels fit.
    keys = labels.to(torch.int16) if clusters < _SHORT else labels
    keys, order = torch.sort(keys, stable=True)
    numbers = torch.arange(clusters + 1, dtype=keys.dtype, device=x.device)
    offsets = torch.searchsorted(keys, numbers)
    pieces = (offsets.diff() + (PIECE - 1)) // PIECE
    starts = torch.nn.functional.pad(pieces.cumsum(0), (1, 0))
    # How many pieces there are is not asked, since the answer would have to be waited for: there
    # are no more than these.
    most = count // PIECE + min(count, clusters)
    owners = torch.searchsorted(starts, torch.arange(most, device=x.device), right=True) - 1
    parts, part_weights = _doubles(x, most, columns), _doubles(x, most)
    sums, sum_weights = _doubles(x, clusters, columns), _doubles(x, clusters)
    # Chosen by the columns alone: with the blocks the order of adding would change.
    block_d = _power(columns, 1, 64)
    block_n = min(_TILE // block_d, PIECE)
    blocks = triton.cdiv(columns, block_d)
    with on_device(x):
        _add_rows[(most, blocks)](
            x,
            weights,
            order,
            offsets,
            starts,
            owners,
            parts,
            part_weights,
            clusters,
            columns,
            piece=PIECE,
            block_n=block_n,
            block_d=block_d,
        )
        _add_parts[(clusters, blocks)](
            parts,
            part_weights,
            starts,
            sums,
            sum_weights,
            columns,
            block_n=16,
            block_d=block_d,
        )
    return sums, sum_weights


def middle(x: torch.Tensor) -> torch.Tensor:
    """The row of a sample that is nearest to its mean: float32 (D,).

    A row and not the mean: where values are whole numbers, or steps of one size, differences from
    it are exact, and so are ties.
    """
    sample = x[:: max(1, len(x) // _SAMPLE)]
    apart = sample.double() - sample.mean(0, dtype=torch.float64)
    return sample[apart.square_().sum(1).argmin()].clone()


def _doubles(x: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float64, device=x.device)


def on_device(x: torch.Tensor) -> AbstractContextManager[Any]:
    """Kernels start on the device where the rows lie, whichever is the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _power(value: int, least: int, most: int) -> int:
    """The power of two that is no less than ``value``, between two others."""
    return min(max(1 << (value - 1).bit_length(), least), most)
