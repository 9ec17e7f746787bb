"""The processes that train one model together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.errors import RunError

T = TypeVar("T")
LOST = "worker-lost"
"""Code of the error of a worker that another one left alone."""


@dataclass(frozen=True)
class Group:
    """One of several processes that do the same training, each on its share of every batch.

    With more than one, ``torch.distributed`` is set up before.

    Attributes:
        rank: which one this is, from 0.
        world: how many there are.
    """

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that reads and writes for all."""
        return self.rank == 0

    def share(self, batch: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], float]:
        """This process's rows of a batch, and what part of all rows they are.

        Raises:
            RunError: there are more processes than rows.
        """
        rows = len(batch[0])
        if rows < self.world:
            raise RunError(
                f"A batch of {rows} samples cannot be shared among {self.world} workers.",
                hint="Set the training's 'workers' lower, or its 'batch_size' higher.",
                code="small-batch",
            )
        own = tuple(torch.tensor_split(part, self.world)[self.rank] for part in batch)
        return own, len(own[0]) / rows

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Put the sums over all processes in the tensors' place, in one exchange.

        Raises:
            RunError: another process has gone.
        """
        bucket = torch.cat([tensor.reshape(-1) for tensor in tensors])
        try:
            dist.all_reduce(bucket)
        except RuntimeError as error:
            raise _lost(error) from error
        parts = torch.split(bucket, [tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def from_first(self, read: Callable[[], T]) -> T:
        """What ``read`` gives in the first process, which alone calls it.

        Raises:
            RunError: another process has gone.
        """
        if self.world == 1:
            return read()
        found = [read() if self.first else None]
        try:
            dist.broadcast_object_list(found, src=0)
        except RuntimeError as error:
            raise _lost(error) from error
        return found[0]  # type: ignore[return-value]


ALONE = Group()


def _lost(error: RuntimeError) -> RunError:
    return RunError(
        f"A worker of the training lost another one: {str(error).splitlines()[0]}.",
        hint="Start the same command again: the training goes on from its last checkpoint.",
        code=LOST,
    )
