"""SeTa: a window that slides from easy to hard samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.clustering.compiled import compiled
from pipeline.clustering.kmeans_1d import KMeans1D
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
)

Doubles = npt.NDArray[np.float64]


class SeTa(DynamicSampler):
    """Train on a window of loss clusters that slides from the easiest to the hardest, and back.

    Source: Zhou et al., "Scale Efficient Training for Large Datasets", CVPR 2025, arXiv 2503.13385.
    In each epoch floor((1 - ``prune``) N) samples are drawn at random and their last losses are cut
    into ``groups`` clusters (k-means in one dimension). With w = round(``window`` x ``groups``),
    half to even, and s = groups - w, epoch n > 0 trains on the groups from n mod (s + 1) on, w of
    them in order of loss: the window slides with a period of s + 1 epochs. The first epoch trains
    on all that was drawn. So do the last ones, after ``anneal``, each on a fresh draw. With one
    group this is a random subset.

    Samples that were never seen count as harder than all others. Where there are fewer distinct
    losses than groups, each is a group of its own and the window is cut from these; while all are
    equal, an epoch is what was drawn.

    With ``saving``, all epochs are equally long: a random part of a window that is larger, or a
    smaller one with the samples that are next to it in order of loss.

    Losses are not weighted, so easy and hard samples count by how often they are seen. With
    ``unbiased`` each weighs 1 over its group's share of epochs: over s + 1 epochs in a row, with
    losses that stay as they are, the expected sum of weights of every sample is s + 1.

    Args:
        samples: as for :class:`~pipeline.pruning.sampler.DynamicSampler`.
        epochs: of the whole training.
        prune: share of the samples that is left out at random, 0 to 0.99.
        groups: clusters of losses.
        window: share of the groups that an epoch trains on; at least one.
        anneal: share of the epochs after which the window is over.
        unbiased: weigh losses; not with ``saving``, which changes how often a sample is seen.
        common: options that all samplers have.
    """

    def __init__(
        self,
        samples: int | Sequence[str] | pa.Array,
        epochs: int,
        *,
        prune: float = 0.1,
        groups: int = 5,
        window: float = 0.9,
        anneal: float = 0.875,
        unbiased: bool = False,
        **common: Unpack[Common],
    ) -> None:
        check_share("prune", prune, 0.99)
        check_share("window", window, 1)
        check_share("anneal", anneal, 1)
        if groups < 1 or (unbiased and common.get("saving") is not None):
            raise UsageError(
                "SeTa needs at least one group, and no weights are known for epochs of a length "
                "that is given.",
                hint="Check groups, and leave unbiased or saving out.",
                code="bad-sampler",
            )
        self.prune, self.groups, self.window = prune, groups, window
        self.unbiased, self._active = unbiased, active_epochs(epochs, anneal)
        self._borders: Doubles | None = None
        method = {
            "prune": prune,
            "groups": groups,
            "window": window,
            "anneal": anneal,
            "unbiased": unbiased,
        }
        super().__init__(samples, epochs, method, **common)

    @property
    def _drawn(self) -> int:
        """Samples that are drawn at random, before the window."""
        return max(math.floor(round((1 - self.prune) * self.samples, 9)), 1)

    def _planned(self) -> list[int] | None:
        return None if self.saving is None else self._even_lengths()

    def _choose(self, epoch: int) -> Flags:
        length = self._lengths[epoch] if self._lengths else None
        flags = np.ones(self.samples, np.bool_)
        self._borders = None
        if epoch == 0 or epoch >= self._active:
            draw(flags, length or self._drawn, self._seed_for("draw"))
            return flags
        draw(flags, max(self._drawn, length or 0), self._seed_for("draw"))
        losses = self._before[flags]
        seen = losses[~np.isnan(losses)] if np.isnan(losses).any() else losses
        if not len(seen):
            if length:
                draw(flags, length, self._seed_for("fit"))
            return flags
        self._borders = _borders(seen, min(self.groups, len(seen)))
        start, width = self._window(epoch)
        low = self._borders[start - 1] if start else -np.inf
        end = start + width - 1
        high = self._borders[end] if end < len(self._borders) else np.inf
        if length is None:
            _keep_between(self._before, low, high, flags)
        else:
            inside = int(_count_between(losses, low, high))
            if inside < length:
                low, high = _widened(losses, low, high, length - inside)
            _keep_between(self._before, low, high, flags)
            draw(flags, length, self._seed_for("fit"))
        return flags

    def _window(self, epoch: int) -> tuple[int, int]:
        """The first group of an epoch's window, and the number of its groups."""
        groups = 1 if self._borders is None else len(self._borders) + 1
        width = max(round(self.window * groups), 1)
        return epoch % (groups - width + 1), width

    def _weights(self, rows: Rows) -> Losses:
        if not self.unbiased or self._borders is None:
            return np.ones(len(rows), np.float32)
        losses, groups = self._before[rows].astype(np.float64), len(self._borders) + 1
        group = np.searchsorted(self._borders, losses, "left")
        group[np.isnan(losses)] = groups - 1
        _, width = self._window(0)
        starts = groups - width + 1
        # Windows that a group lies in: their first group is no later, and no more than w before.
        first = np.maximum(group - width + 1, 0)
        times = np.minimum(group, starts - 1) - first + 1
        share = self._drawn / self.samples * times / starts
        return (1 / share).astype(np.float32)


def _borders(losses: Losses, groups: int) -> Doubles:
    """Borders between clusters of losses; a loss on a border belongs to the cluster below."""
    made = KMeans1D(groups, compute_labels=False).fit(losses)
    # Of fewer distinct losses than clusters, the last clusters are empty and stand on one place.
    centers = np.unique(made.cluster_centers_)
    borders: Doubles = (centers[1:] + centers[:-1]) / 2
    return borders


def _widened(losses: Losses, low: float, high: float, more: int) -> tuple[float, float]:
    """A wider range (low, high] that holds ``more`` losses beyond it at least, from both sides."""
    values = np.where(np.isnan(losses), np.float32(np.inf), losses)
    below, above = values[values <= low], values[values > high]
    over = min(more - more // 2, len(above))
    under = min(more - over, len(below))
    over = more - under
    if over:
        high = float(np.partition(above, over - 1)[over - 1])
    if under:
        # The range is open below.
        least = np.partition(below, len(below) - under)[len(below) - under]
        low = float(np.nextafter(least, np.float32(-np.inf)))
    return low, high


@compiled
def _between(loss: float, low: float, high: float) -> bool:
    """Whether a loss lies in (low, high]; what was never seen lies above all."""
    return (low < loss <= high) or (np.isnan(loss) and high == np.inf)


@compiled
def _keep_between(losses: Any, low: float, high: float, flags: Any) -> None:
    for i in range(losses.shape[0]):
        if flags[i] and not _between(np.float64(losses[i]), low, high):
            flags[i] = False


@compiled
def _count_between(losses: Any, low: float, high: float) -> int:
    count = 0
    for i in range(losses.shape[0]):
        count += _between(np.float64(losses[i]), low, high)
    return count
