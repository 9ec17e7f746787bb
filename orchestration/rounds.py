"""Steps that go through all shards again and again: parts of them at the same time, then a join."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from safetensors.numpy import load

from pipeline.digest import dumps
from pipeline.orchestration.executor import Record
from pipeline.orchestration.memory import StepFolders
from pipeline.orchestration.steps import timed
from pipeline.storage.array_artifact import FILE, Arrays, to_bytes
from pipeline.storage.atomic import publish, with_digest, without_digest
from pipeline.storage.features import read_columns
from pipeline.storage.source import Shard, Source, TableSource
from pipeline.storage.store import Store

log = logging.getLogger(__name__)

STATE = "state"
_SEED = ".seed"
"""The only array of the state before a single round."""


class RoundsTask(Protocol):
    """A frozen dataclass that says what to find; its fields and ``version`` are its identity.

    A state is arrays by name. Nothing else passes from one round to the next, and what a part
    returns depends on its shards and the state alone. A class attribute ``model = True`` says that
    a part runs a network: it is given a GPU where there is one.
    """

    def begin(self, seed: int) -> Arrays:
        """The state before the first round."""

    def part(self, state: Arrays, shards: Iterable[tuple[Any, ...]], threads: int) -> Arrays:
        """What some shards say to a state; each is its name and an array for every column."""

    def join(self, state: Arrays, parts: Iterator[Arrays], threads: int) -> Arrays:
        """The state after a round, from what its parts returned, in order."""

    def done(self, state: Arrays) -> bool:
        """Whether nothing is left to do."""

    def result(self, state: Arrays) -> tuple[Arrays, dict[str, Any]]:
        """What is published, and metrics of plain JSON types."""


ONE_ROUND = TableSource((("all", pa.table({"key": ["all"]})),))
"""The shards of a task that needs none."""


class OneRound(ABC):
    """A task that is done by one worker in one go; what it needs is in its fields."""

    @abstractmethod
    def compute(self, seed: int, threads: int) -> Arrays:
        """What is published.

        Args:
            seed: below 2^32.
            threads: CPU threads.
        """

    @abstractmethod
    def metrics(self, arrays: Arrays) -> dict[str, Any]:
        """What is told of the arrays, as plain JSON types."""

    def begin(self, seed: int) -> Arrays:
        """The state before the round."""
        return {_SEED: np.array([seed % 2**32])}

    def part(self, state: Arrays, shards: Iterable[tuple[Any, ...]], threads: int) -> Arrays:
        """All of it."""
        return self.compute(int(state[_SEED][0]), threads)

    def join(self, state: Arrays, parts: Iterator[Arrays], threads: int) -> Arrays:
        """The only part."""
        return dict(next(parts))

    def done(self, state: Arrays) -> bool:
        """Whether the round is over."""
        return _SEED not in state

    def result(self, state: Arrays) -> tuple[Arrays, dict[str, Any]]:
        """The arrays, and what is told of them."""
        return state, self.metrics(state)


@dataclass(frozen=True)
class PartUnit:
    """Some shards of a source, which one worker goes through in order."""

    index: int
    name: str
    shards: tuple[Shard, ...]


def part_units(shards: Sequence[Shard], parts: int) -> list[PartUnit]:
    """Shards in so many parts, each of shards that follow one another."""
    listed = list(shards)
    edges = [len(listed) * part // parts for part in range(parts + 1)]
    return [
        PartUnit(index, f"part-{index:05d}", tuple(listed[lo:hi]))
        for index, (lo, hi) in enumerate(pair for pair in pairwise(edges) if pair[0] < pair[1])
    ]


@dataclass(frozen=True)
class PartWork:
    """Goes through the shards of one part.

    Attributes:
        folders: of the round.
        task: what to find.
        source: what the shards are of.
        columns: whose values are taken.
        threads: CPU threads.
    """

    folders: StepFolders
    task: RoundsTask
    source: Source
    columns: tuple[str, ...]
    threads: int

    def __call__(self, unit: PartUnit) -> Record:
        began = time.monotonic()
        state = _state(self.folders.work)
        arrays = self.task.part(state, self._arrays(unit), self.threads)
        with self.folders.work.scratch() as folder:
            (folder / f"{unit.name}.safetensors").write_bytes(to_bytes(arrays))
            files = [vars(entry) for entry in publish(folder, self.folders.artifact)]
        record = {"index": unit.index, "name": unit.name, "files": files, **timed(began)}
        self.folders.ledger.write(record)
        return record

    def _arrays(self, unit: PartUnit) -> Iterator[tuple[Any, ...]]:
        for shard in unit.shards:
            yield shard.name, *read_columns(self.source, shard, self.columns)


@dataclass(frozen=True)
class StateFile:
    """The state of a round: a SHA-256 (32 bytes), and arrays as safetensors.

    Args:
        store: where it lies.
    """

    store: Store

    def read(self) -> Arrays | None:
        """The state last written; ``None`` where there is none, or not the bytes that were."""
        if self.store.info(STATE) is None:
            return None
        data = without_digest(self.store.read(STATE))
        if data is None:
            log.warning("The state of the last round is damaged: it begins anew.")
            return None
        return dict(load(data))

    def write(self, state: Arrays) -> None:
        """Put ``state`` in place of the last one."""
        self.store.replace(STATE, with_digest(to_bytes(state)))


@dataclass(frozen=True)
class ResultWork:
    """Publishes what the rounds found."""

    folders: StepFolders
    task: RoundsTask
    state: Arrays

    def __call__(self, unit: PartUnit) -> Record:
        arrays, metrics = self.task.result(self.state)
        with self.folders.work.scratch() as folder:
            (folder / FILE).write_bytes(to_bytes(arrays))
            (folder / "metrics.json").write_bytes(dumps(metrics))
            files = [vars(entry) for entry in publish(folder, self.folders.artifact)]
        record = {"index": 0, "name": unit.name, "files": files, "metrics": metrics}
        self.folders.ledger.write({**record, **timed(time.monotonic())})
        return record


@dataclass(frozen=True)
class Rounds:
    """The rounds of a step: each has a folder, with the state it begins with and what parts return.

    Args:
        store: where the folders lie.
    """

    store: Store

    def folders(self, number: int) -> StepFolders:
        """Where a round keeps what."""
        work = self.store.below(f"{number:05d}")
        return StepFolders(work.below("parts"), work)

    def finish(
        self,
        task: RoundsTask,
        units: Sequence[PartUnit],
        seed: int,
        threads: int,
        go: Callable[[int, StepFolders], object],
    ) -> Arrays:
        """Go on from the last round that has a state until the task is done; its last state.

        Args:
            task: what to find.
            units: all parts, in order.
            seed: of the task.
            threads: for the join.
            go: does the missing parts of a round, given its number and folders.
        """
        number, state = self._latest() or (0, task.begin(seed))
        if not number:
            self._write(0, state)
        while not task.done(state):
            folders = self.folders(number)
            go(number, folders)
            state = task.join(state, read_parts(folders, units), threads)
            number += 1
            self._write(number, state)
        return state

    def _latest(self) -> tuple[int, Arrays] | None:
        """The last round that has a state, and that state."""
        names = [info.name for info in self.store.files() if info.name.endswith(f"/{STATE}")]
        for number in sorted((int(name.partition("/")[0]) for name in names), reverse=True):
            state = StateFile(self.folders(number).work).read()
            if state is not None:
                return number, state
        return None

    def _write(self, number: int, state: Arrays) -> None:
        """Begin a round; the one before it is over."""
        StateFile(self.folders(number).work).write(state)
        if number:
            self.folders(number - 1).work.remove()


def read_parts(folders: StepFolders, units: Iterable[PartUnit]) -> Iterator[Arrays]:
    """What the parts of a round returned, in order, one at a time."""
    for unit in units:
        yield load(folders.artifact.read(f"{unit.name}.safetensors"))


@lru_cache(maxsize=1)
def _state(work: Store) -> Arrays:
    """The state of a round, read once a process."""
    state = StateFile(work).read()
    if state is None:
        # The round is over, and its folder gone: an attempt that outlived it.
        raise FileNotFoundError(work.url)
    return state
