"""BatchNorm statistics of each class, over shards that stay where they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipeline.backbones import Teachers
from pipeline.dataset_distill.batchnorm import Targets, bn_layers
from pipeline.device import default_device, in_batches, reproducible
from pipeline.labelled_images import ImageConfig, normalise

Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class ClassStatistics:
    """A step in one round: mean and variance of each BatchNorm layer's input, class by class.

    Its columns are images (uint8) and labels. Layers of all teachers lie beside one another, L
    channels in all.

    Source: LPLD (Xiao and He, "Are Large-scale Soft Labels Necessary for Large-scale Dataset
    Distillation?", 2024), which finds them in one more epoch over the data.

    Args:
        teachers: whose layers are looked at.
        image: size, channels and normalisation of the images.
        classes: C.
    """

    teachers: Teachers
    image: ImageConfig
    classes: int

    version: ClassVar[int] = 1
    model: ClassVar[bool] = True

    def begin(self, seed: int) -> Arrays:
        """The state before the round."""
        return {"count": np.zeros(0, np.int64)}

    def done(self, state: Arrays) -> bool:
        """Whether the round is over."""
        return len(state["count"]) > 0

    def result(self, state: Arrays) -> tuple[Arrays, dict[str, Any]]:
        """``mean`` and ``variance``, float32 (C, L), and how many samples each class has."""
        count = np.maximum(state["count"], 1)[:, None]
        mean = state["sum"] / count
        variance = np.maximum(state["square"] / count - mean**2, 0)
        arrays = {"mean": mean.astype(np.float32), "variance": variance.astype(np.float32)}
        return arrays, {"samples": [int(n) for n in state["count"]]}

    def part(self, state: Arrays, shards: Iterable[tuple[Any, ...]], threads: int) -> Arrays:
        """Sums over some shards, each a name, images (n, S, S, channels) and labels (n,)."""
        device = default_device()
        with reproducible(threads):
            networks = self.teachers.networks(device)
            width = sum(layer.num_features for net in networks for layer in bn_layers(net))
            found = {
                "count": np.zeros(self.classes, np.int64),
                "sum": np.zeros((self.classes, width)),
                "square": np.zeros((self.classes, width)),
            }
            for _, images, labels in shards:
                x = normalise(images, self.image, device)
                both = np.concatenate(
                    [in_batches(_Moments(n), x).cpu().numpy() for n in networks], 2
                )
                found["count"] += np.bincount(labels, minlength=self.classes)
                np.add.at(found["sum"], labels, both[:, 0])
                np.add.at(found["square"], labels, both[:, 1])
        return found

    def join(self, state: Arrays, parts: Iterator[Arrays], threads: int) -> Arrays:
        """The sums of all parts."""
        total = {name: values.copy() for name, values in next(parts).items()}
        for part in parts:
            for name, values in part.items():
                total[name] += values
        return total


class _Moments:
    """Means of the inputs of a network's layers, and of their squares, over space: (B, 2, L)."""

    def __init__(self, network: nn.Module) -> None:
        self._network, self._layers = network, bn_layers(network)

    def __call__(self, x: Tensor) -> Tensor:
        found: dict[int, Tensor] = {}

        def look(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            a = inputs[0].float()
            found[id(layer)] = torch.stack([a.mean((2, 3)), a.square().mean((2, 3))], 1)

        handles = [layer.register_forward_pre_hook(look) for layer in self._layers]
        try:
            self._network(x)
        finally:
            for handle in handles:
                handle.remove()
        return torch.cat([found[id(layer)] for layer in self._layers], 2)


def targets_of(statistics: Arrays, label: int, networks: Iterable[nn.Module]) -> list[Targets]:
    """One class's statistics for each layer of each network, as :class:`ClassStatistics` found."""
    start, found = 0, list[Targets]()
    for network in networks:
        edges = np.cumsum([start, *(layer.num_features for layer in bn_layers(network))]).tolist()
        arrays = [torch.from_numpy(statistics[name][label]) for name in ("mean", "variance")]
        found.append([(arrays[0][lo:hi], arrays[1][lo:hi]) for lo, hi in pairwise(edges)])
        start = edges[-1]
    return found
