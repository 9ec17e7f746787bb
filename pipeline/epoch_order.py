"""In which order samples are seen in an epoch, and who sees which."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from pipeline.digest import seed_for
from pipeline.draws import uniform

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class EpochOrder:
    """The order of n samples that lie in shards: a function of seed and epoch alone.

    Shards come in random order, and the samples of ``window`` of them at a time are mixed: so few
    shards have to be at hand at once. Where there are no more shards than that, every order of all
    samples is possible.

    Args:
        counts: samples of each shard, without empty ones.
        seed: of the order.
        window: shards that are mixed with one another.
        shuffle: whether there is an order of its own for each epoch, or that of the data set.
    """

    counts: tuple[int, ...]
    seed: int = 0
    window: int = 16
    shuffle: bool = True

    def __len__(self) -> int:
        return sum(self.counts)

    def rows(self, epoch: int, start: int, stop: int) -> Rows:
        """The samples at the positions from ``start`` to before ``stop`` of an epoch."""
        if not self.shuffle:
            return np.arange(start, stop)
        pools, starts = _pools(self, epoch)
        first = int(np.searchsorted(starts, start, "right")) - 1
        found = [np.empty(0, np.int64)]
        for number in range(first, len(pools)):
            if starts[number] >= stop:
                break
            pool = _pool(self, epoch, number)
            found.append(pool[max(0, start - starts[number]) : stop - starts[number]])
        return np.concatenate(found)


def _shuffled(count: int, seed: int) -> Rows:
    # By draws of our own: the same order with any release of NumPy.
    return np.argsort(uniform(np.uint64(seed), np.arange(count, dtype=np.uint64)), kind="stable")


@lru_cache(maxsize=4)
def _pools(order: EpochOrder, epoch: int) -> tuple[list[Rows], Rows]:
    """The shards of each pool, and the position at which it begins; and the end."""
    shards = _shuffled(len(order.counts), seed_for(order.seed, "shards", epoch))
    pools = [shards[i : i + order.window] for i in range(0, len(shards), order.window)]
    counts = np.array(order.counts, np.int64)
    return pools, np.cumsum([0, *(int(counts[pool].sum()) for pool in pools)])


@lru_cache(maxsize=4)
def _pool(order: EpochOrder, epoch: int, number: int) -> Rows:
    """The samples of a pool, mixed."""
    ends = np.cumsum(order.counts)
    shards = _pools(order, epoch)[0][number]
    rows = np.concatenate([np.arange(ends[s] - order.counts[s], ends[s]) for s in shards.tolist()])
    return rows[_shuffled(len(rows), seed_for(order.seed, "samples", epoch, number))]


@dataclass(frozen=True)
class Steps:
    """The batches of the rest of an epoch, of one of several ranks.

    In a step all ranks together take the next ``world`` x ``batch_size`` positions. So whatever the
    topology, what was seen after some steps is all before one position; and from there others may
    go on. Of the last step, which is not full, all ranks get as many as one another, or one less.

    Args:
        samples: of the epoch.
        start: position of the first that is left.
        batch_size: of one rank.
        rank, world: which rank, and how many there are.
        drop_last: leave out the last step where it is not full.
    """

    samples: int
    start: int
    batch_size: int
    rank: int = 0
    world: int = 1
    drop_last: bool = False

    def __len__(self) -> int:
        left, whole = self.samples - self.start, self.batch_size * self.world
        steps, over = divmod(left, whole)
        # Where fewer are left over than there are ranks, some have nothing to do in that step.
        return steps + (not self.drop_last and over > self.rank)

    def span(self, step: int) -> tuple[int, int]:
        """Positions, from and to before, of this rank's batch."""
        whole = self.batch_size * self.world
        first = self.start + step * whole
        count = min(whole, self.samples - first)
        share, over = divmod(count, self.world)
        low = first + self.rank * share + min(self.rank, over)
        return low, low + share + (self.rank < over)

    def reached(self, steps: int) -> int:
        """The position that all ranks have come to after some steps."""
        return min(self.samples, self.start + steps * self.batch_size * self.world)
