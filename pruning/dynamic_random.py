"""Another random subset in every epoch: the baseline of dynamic pruning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import numpy as np
import pyarrow as pa

from pipeline.pruning.draws import draw
from pipeline.pruning.sampler import Common, DynamicSampler, Flags, Losses, Rows


class DynamicRandom(DynamicSampler):
    """A fresh random part of all samples in every epoch.

    Source: Okanovic et al., "Repeated Random Sampling for Minimizing the Time-to-Accuracy of
    Learning", 2023; here each epoch is drawn without regard to the ones before.

    Args:
        samples: as for :class:`~pipeline.pruning.sampler.DynamicSampler`.
        epochs: of the whole training.
        common: options that all samplers have. Half of the samples are left out where ``saving``
            is not given; every epoch has as many, to one.
    """

    def __init__(
        self,
        samples: int | Sequence[str] | pa.Array,
        epochs: int,
        **common: Unpack[Common],
    ) -> None:
        options: Common = {"saving": 0.5, **common}
        super().__init__(samples, epochs, {}, **options)

    def _planned(self) -> list[int]:
        return self._even_lengths()

    def _choose(self, epoch: int) -> Flags:
        flags = np.ones(self.samples, np.bool_)
        draw(flags, self.lengths[epoch], self._seed_for("draw"))
        return flags

    def _weights(self, rows: Rows) -> Losses:
        return np.ones(len(rows), np.float32)
