"""Samples as torch data sets, in batches, and exactly where a training stopped."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from itertools import islice
from typing import Any, Generic, TypeVar, get_args

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from pipeline.epoch_order import EpochOrder, Rows, Steps
from pipeline.errors import PipelineError, UsageError
from pipeline.samples import OnError, Samples

VERSION = 1
AHEAD = 2
"""Batches that each thread may be ahead."""


B = TypeVar("B", bound=tuple[Any, ...])


class TorchSamples(Dataset[B], Generic[B]):
    """Samples as tensors: a map-style data set for any ``DataLoader``.

    An item is a named tuple whose last field is ``key``; a batch is the same with tensors of a
    batch, and a list of keys.

    Attributes:
        samples: what it is of.
        epoch: of what there is in several views, the one that items show.
        on_error: ``raise``, or ``skip`` for samples that cannot be read to be left out.
    """

    def __init__(self, samples: Samples, on_error: OnError = "raise") -> None:
        if on_error not in get_args(OnError):
            raise UsageError(
                f"There is no on_error={on_error!r}.",
                hint="Give 'raise' or 'skip'.",
                code="bad-loader",
            )
        self.samples, self.on_error, self.epoch = samples, on_error, 0

    @abstractmethod
    def batch(self, rows: Rows, epoch: int) -> B:
        """Some samples, in the order of ``rows`` int64 (n,), as tensors (n, ...)."""

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def keys(self) -> list[str]:
        """The samples' keys, in order."""
        return self.samples.keys

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by label."""
        return self.samples.classes

    def set_epoch(self, epoch: int) -> None:
        """Choose the view that items show: epoch e shows view e mod V of every image."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> B:
        found = self.__getitems__([range(len(self))[index]])
        if not found:
            raise UsageError(
                f"The sample {index} cannot be read.",
                hint="Open the data with on_error='raise' to be told why.",
                code="bad-sample",
                where=self.samples.place,
            )
        return found[0]

    def __getitems__(self, rows: Sequence[int]) -> list[B]:
        """Several items at once, as a ``DataLoader`` asks for them."""
        return items_of(self.batch(np.asarray(rows, np.int64), self.epoch))

    def stream(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        window: int | None = None,
        rank: int | None = None,
        world: int | None = None,
        drop_last: bool = False,
        threads: int = 0,
    ) -> BatchStream[B]:
        """Batches of an epoch after the other, for ``DataLoader(stream, batch_size=None)``.

        Args:
            batch_size: samples of a batch of one rank.
            seed: of the order.
            shuffle: whether every epoch has an order of its own.
            window: shards whose samples are mixed with one another, and held in memory; as many as
                come to 512 MB, at most 16, where not given.
            rank: of this process; that of ``torch.distributed`` where not given.
            world: how many ranks there are; likewise.
            drop_last: leave out the last batches where not all of them are full.
            threads: that prepare batches ahead, where there are no worker processes.
        """
        order = EpochOrder(self.samples.counts(), seed, self.samples.hold(window), shuffle)
        own, all_ranks = _ranks(rank, world)
        return BatchStream(self, order, batch_size, own, all_ranks, drop_last, threads)

    def loader(
        self,
        batch_size: int,
        *,
        num_workers: int = 0,
        threads: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        window: int | None = None,
        rank: int | None = None,
        world: int | None = None,
        drop_last: bool = False,
        **options: Any,
    ) -> Loader[B]:
        """A ``DataLoader`` of batches that knows where it is.

        Args:
            batch_size: samples of a batch of one rank.
            num_workers: processes that prepare batches; of use where Python itself takes long, as
                in some transforms.
            threads: that prepare batches in this process, where there are no others; one for each
                core where not given.
            seed: of the order.
            shuffle: whether every epoch has an order of its own.
            window: shards whose samples are mixed with one another, and held in memory; as many as
                come to 512 MB, at most 16, where not given.
            rank: of this process; that of ``torch.distributed`` where not given.
            world: how many ranks there are; likewise.
            drop_last: leave out the last batches where not all of them are full.
            options: other options of ``torch.utils.data.DataLoader``, such as ``pin_memory``.
        """
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        stream = self.stream(
            batch_size,
            seed=seed,
            shuffle=shuffle,
            window=window,
            rank=rank,
            world=world,
            drop_last=drop_last,
            threads=(cores or 1) if threads is None else threads,
        )
        return Loader(stream, num_workers=num_workers, **options)


def items_of(batch: B) -> list[B]:
    """The samples of a batch one by one."""
    kind: Any = type(batch)
    return [kind(*item) for item in zip(*batch, strict=True)]


def _ranks(rank: int | None, world: int | None) -> tuple[int, int]:
    together = torch.distributed
    if rank is None and world is None and together.is_available() and together.is_initialized():
        return together.get_rank(), together.get_world_size()
    own, all_ranks = rank or 0, 1 if world is None else world
    if not 0 <= own < all_ranks:
        raise UsageError(
            f"There is no rank {own} of {all_ranks}.",
            hint="Ranks count from 0; give both rank and world.",
            code="bad-loader",
        )
    return own, all_ranks


class BatchStream(IterableDataset[B], Generic[B]):
    """The batches of an epoch, each made by one of the workers of a ``DataLoader``.

    The order of all samples is a function of seed and epoch. Step by step, all ranks together take
    the next samples of it, so what was seen after some steps is all before one position: a state
    is an epoch and a position, and goes on with any other batch size, number of ranks and workers.

    Attributes:
        data: the samples.
        epoch: whose batches an iteration gives.
        position: from which it gives them.
    """

    def __init__(
        self,
        data: TorchSamples[B],
        order: EpochOrder,
        batch_size: int,
        rank: int,
        world: int,
        drop_last: bool,
        threads: int,
    ) -> None:
        if min(batch_size, order.window) < 1 or threads < 0:
            raise UsageError(
                "Batches and windows have at least one sample or shard, and no fewer than 0 "
                "threads make them.",
                hint="Check batch_size, window and threads.",
                code="bad-loader",
            )
        self.data, self.order, self.batch_size = data, order, batch_size
        self.rank, self.world, self.drop_last, self.threads = rank, world, drop_last, threads
        self.epoch = self.position = 0

    @property
    def steps(self) -> Steps:
        """The batches that are left of the epoch."""
        return Steps(
            len(self.order), self.position, self.batch_size, self.rank, self.world, self.drop_last
        )

    def __len__(self) -> int:
        return len(self.steps)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch. Of the one that it is in, what is left stays."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def __iter__(self) -> Iterator[B]:
        worker = get_worker_info()
        part, parts = (worker.id, worker.num_workers) if worker else (0, 1)
        make = partial(self._batch, self.steps, self.epoch)
        numbers = iter(range(part, len(self), parts))
        return _ahead(make, numbers, 0 if worker else self.threads)

    def _batch(self, steps: Steps, epoch: int, step: int) -> B:
        return self.data.batch(self.order.rows(epoch, *steps.span(step)), epoch)

    def state_dict(self, batches: int = 0) -> dict[str, Any]:
        """Where the training is: plain types.

        Args:
            batches: that this rank has been given since the iteration began. A ``DataLoader`` with
                workers is ahead of the training and does not say; :class:`Loader` counts.
        """
        epoch, position = self._settled(self.epoch, self.steps.reached(batches))
        return {**self._own(), "epoch": epoch, "position": position}

    def _settled(self, epoch: int, position: int) -> tuple[int, int]:
        """Where the next batch is: where none is left, at the beginning of the next epoch."""
        left = len(self.order) - position
        over = left < (self.batch_size * self.world if self.drop_last else 1)
        return (epoch + 1, 0) if over else (epoch, position)

    def _own(self) -> dict[str, Any]:
        order = {name: value for name, value in asdict(self.order).items() if name != "counts"}
        return {"version": VERSION, "data": self.data.samples.identity, **order}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, with any batch size and any number of ranks and workers.

        Raises:
            UsageError: it is the state of other data, or of another order.
        """
        own = self._own()
        other = [name for name, value in own.items() if state.get(name) != value]
        if other:
            name = other[0]
            raise UsageError(
                f"The state is of another loader: its {name} is {state.get(name)!r}, and here it "
                f"is {own[name]!r}.",
                hint="Open the same data with the same seed, shuffle and window; batch size, ranks "
                "and workers may differ.",
                code="other-loader",
            )
        self.epoch, self.position = self._settled(state["epoch"], state["position"])


def _ahead(make: partial[B], numbers: Iterator[int], threads: int) -> Iterator[B]:
    """What ``make`` gives for each number, in order, made by threads that may be ahead."""
    if not threads:
        yield from map(make, numbers)
        return
    # Each of its own: what a thread computes is too small to be shared out.
    with ThreadPoolExecutor(threads, "batches", partial(threadpool_limits, 1, "openmp")) as pool:
        waiting: deque[Future[B]] = deque()
        try:
            waiting.extend(pool.submit(make, n) for n in islice(numbers, AHEAD * threads))
            while waiting:
                found = waiting.popleft().result()
                waiting.extend(pool.submit(make, n) for n in islice(numbers, 1))
                yield found
        finally:
            for one in waiting:
                one.cancel()


class _Told(IterableDataset[Any]):
    """A stream whose errors are its last item: raised in a worker, they become a RuntimeError."""

    def __init__(self, stream: BatchStream[Any]) -> None:
        self.stream = stream

    def __len__(self) -> int:
        return len(self.stream)

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self.stream
        except PipelineError as error:
            yield error


class Loader(DataLoader[B]):
    """A ``DataLoader`` over a :class:`BatchStream`, which counts what the training was given.

    Each iteration is one epoch, and after it comes the next.

    Attributes:
        skipped: samples that could not be read and were left out, as ``on_error="skip"`` asks for.
    """

    def __init__(self, stream: BatchStream[B], *, num_workers: int = 0, **options: Any) -> None:
        if options.get("persistent_workers") or not options.get("in_order", True):
            raise UsageError(
                "A loader whose workers stay, or give batches out of order, does not know where it "
                "is.",
                hint="Leave persistent_workers and in_order as they are; threads, which are the "
                "default, need no start at all.",
                code="bad-loader",
            )
        super().__init__(_Told(stream), batch_size=None, num_workers=num_workers, **options)
        self.stream, self.skipped, self._given = stream, 0, 0

    @property
    def epoch(self) -> int:
        """The epoch that an iteration gives."""
        return self.stream.epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch. Of the one that it is in, what is left stays."""
        if epoch != self.epoch:
            self._given = 0
        self.stream.set_epoch(epoch)

    def __len__(self) -> int:
        """Batches that are left of the epoch."""
        return len(self.stream)

    def __iter__(self) -> Iterator[B]:  # type: ignore[override]
        steps, self._given = self.stream.steps, 0
        for batch in super().__iter__():
            if isinstance(batch, PipelineError):
                raise batch
            low, high = steps.span(self._given)
            self.skipped += high - low - len(batch[-1])
            self._given += 1
            if len(batch[-1]):
                yield batch
        self.stream.epoch, self.stream.position, self._given = self.epoch + 1, 0, 0

    def state_dict(self) -> dict[str, Any]:
        """Where the training is, the batch that it was given last among what it has seen."""
        return self.stream.state_dict(self._given)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, with any batch size and any number of ranks and workers.

        Raises:
            UsageError: it is the state of other data, or of another order.
        """
        self.stream.load_state_dict(state)
        self._given = 0
