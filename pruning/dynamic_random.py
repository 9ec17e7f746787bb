"""Another random subset in every epoch: the baseline of dynamic pruning."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from pipeline.pruning.draws import draw
from pipeline.pruning.sampler import DynamicSampler, Flags, Losses, Rows, check_share


class DynamicRandom(DynamicSampler):
    """A fresh random part of all samples in every epoch.

    Source: Okanovic et al., "Repeated Random Sampling for Minimizing the Time-to-Accuracy of
    Learning", 2023; here each epoch is drawn without regard to the ones before.

    Args:
        samples: as for :class:`~pipeline.pruning.sampler.DynamicSampler`.
        epochs: of the whole training.
        saving: share that is left out; every epoch has as many samples, to one.
        seed, rank, world, drop_last: as for the base.
    """

    def __init__(
        self,
        samples: int | Sequence[str] | pa.Array,
        epochs: int,
        *,
        saving: float = 0.5,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = False,
    ) -> None:
        check_share("saving", saving, 1)
        super().__init__(
            samples, epochs, saving=saving, seed=seed, rank=rank, world=world, drop_last=drop_last
        )

    def _planned(self) -> list[int]:
        return self._even_lengths()

    def _choose(self, epoch: int) -> Flags:
        flags = np.ones(self.samples, np.bool_)
        draw(flags, self.lengths[epoch], self._seed_for("draw"))
        return flags

    def _weights(self, rows: Rows) -> Losses:
        return np.ones(len(rows), np.float32)
