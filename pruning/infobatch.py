"""InfoBatch: some of the well-learned samples are left out, and the others count for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Unpack

import numpy as np
import pyarrow as pa

from pipeline.clustering.compiled import compiled
from pipeline.errors import UsageError
from pipeline.pruning.draws import draw
from pipeline.pruning.sampler import (
    Common,
    DynamicSampler,
    Flags,
    Losses,
    Rows,
    active_epochs,
    check_share,
    even_parts,
)

_MOST = 0.9
"""Share of the well-learned samples that may be left out."""


class InfoBatch(DynamicSampler):
    """Leave out a share of the samples whose loss is below the mean; the last epochs see all.

    Source: Qin et al., "InfoBatch: Lossless Training Speed Up by Unbiased Dynamic Data Pruning",
    ICLR 2024. Of the m samples whose last loss lies below the mean, floor((1 - ``prune``) m) are
    drawn for the epoch and weigh m over their number; all others weigh 1. So the expected sum of
    weighted gradients is that of all samples. Samples that were never seen count as above the mean.
    While all losses are equal, nothing is left out.

    With ``saving``, the epochs after the first and before annealing leave out equally many. Where
    fewer than 10/9 of that number lie below the mean, the lowest losses beyond it count as low too.

    Args:
        samples: as for :class:`~pipeline.pruning.sampler.DynamicSampler`.
        epochs: of the whole training.
        prune: share of the low samples that is left out, 0 to 0.9; not used with ``saving``.
        anneal: share of the epochs after which all samples are seen, with weight 1.
        common: options that all samplers have.
    """

    def __init__(
        self,
        samples: int | Sequence[str] | pa.Array,
        epochs: int,
        *,
        prune: float = 0.5,
        anneal: float = 0.875,
        **common: Unpack[Common],
    ) -> None:
        check_share("prune", prune, _MOST)
        check_share("anneal", anneal, 1)
        self.prune, self._active = prune, active_epochs(epochs, anneal)
        self._border, self._inclusive, self._low, self._kept = -np.inf, False, 0, 0
        method = {"prune": prune, "anneal": anneal}
        super().__init__(samples, epochs, method, **common)

    def _planned(self) -> list[int] | None:
        if self.saving is None:
            return None
        total = round(self.saving * self.samples * self.epochs)
        pruned = max(self._active - 1, 0)
        most = math.floor(_MOST * self.samples)
        if total > pruned * most:
            reach = pruned * most / (self.samples * self.epochs)
            raise UsageError(
                f"{100 * self.saving:g}% of all samples cannot be saved: {pruned} of "
                f"{self.epochs} epochs may leave out {100 * _MOST:g}% each.",
                hint=f"The most that can be saved is saving={math.floor(reach * 1e4) / 1e4:g}.",
                code="saving-out-of-reach",
            )
        left_out = even_parts(total, pruned) if pruned else []
        rest = self.epochs - 1 - pruned
        return [self.samples - n for n in (0, *left_out, *[0] * rest)]

    def _choose(self, epoch: int) -> Flags:
        flags = np.ones(self.samples, np.bool_)
        self._border, self._inclusive, self._low, self._kept = -np.inf, False, 0, 0
        if epoch >= self._active:
            return flags
        count, total, least, greatest = _known(self._before)
        if self._lengths is None:
            if count and least < greatest:
                self._border = total / count
                self._low = _mark_low(self._before, self._border, self._inclusive, flags)
                self._kept = math.floor(round((1 - self.prune) * self._low, 9))
                self._kept = max(self._kept, min(self._low, 1))
        elif left_out := self.samples - self._lengths[epoch]:
            self._widen(left_out, total / count if count else np.inf, flags)
            self._kept = self._low - left_out
        if self._low:
            draw(flags, self._kept, self._seed_for("draw"))
            _add_high(self._before, self._border, self._inclusive, flags)
        return flags

    def _widen(self, left_out: int, mean: float, flags: Flags) -> None:
        """Mark the losses below the mean, and more of the lowest where these are too few."""
        self._border = mean
        self._low = _mark_low(self._before, mean, self._inclusive, flags)
        wanted = min(math.ceil(round(left_out / _MOST, 6)), self.samples)
        if self._low < wanted:
            # Never seen is above all that was.
            ordered = np.where(np.isnan(self._before), np.float32(np.inf), self._before)
            self._border, self._inclusive = (
                float(np.partition(ordered, wanted - 1)[wanted - 1]),
                True,
            )
            self._low = _mark_low(self._before, self._border, self._inclusive, flags)

    def _weights(self, rows: Rows) -> Losses:
        weights = np.ones(len(rows), np.float32)
        if self._kept:
            some = np.empty(len(rows), np.bool_)
            _mark_low(self._before[rows], self._border, self._inclusive, some)
            weights[some] = self._low / self._kept
        return weights


@compiled
def _known(losses: Any) -> tuple[int, float, float, float]:
    """Of the losses that are not NaN: their number, sum (float64), least and greatest."""
    count, total, low, high = 0, 0.0, np.inf, -np.inf
    for i in range(losses.shape[0]):
        loss = np.float64(losses[i])
        if not np.isnan(loss):
            count += 1
            total += loss
            low, high = min(low, loss), max(high, loss)
    return count, total, low, high


@compiled
def _is_low(loss: Any, border: float, inclusive: bool) -> bool:
    if np.isnan(loss):
        return inclusive and border == np.inf
    return loss < border or (inclusive and loss == border)


@compiled
def _mark_low(losses: Any, border: float, inclusive: bool, flags: Any) -> int:
    """Set the flags of low losses and no others; their number."""
    count = 0
    for i in range(losses.shape[0]):
        flags[i] = _is_low(np.float64(losses[i]), border, inclusive)
        count += flags[i]
    return count


@compiled
def _add_high(losses: Any, border: float, inclusive: bool, flags: Any) -> None:
    """Set the flags of all losses that are not low."""
    for i in range(losses.shape[0]):
        if not _is_low(np.float64(losses[i]), border, inclusive):
            flags[i] = True
