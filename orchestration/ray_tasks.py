"""Units as tasks and actors of Ray."""

from __future__ import annotations

import pickle
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import RayError

from pipeline.orchestration.executor import Record, Resources, Unit, attempts, failed

Block = list[tuple[str, bytes]]
"""Units that are done one after the other: name and pickle of each."""
STARTS = 3
"""Actors that may die before they were given a block."""


@dataclass(frozen=True)
class How:
    """What Ray sets aside for a unit.

    Attributes:
        resources: what its step asks for.
        cpus: CPUs, or the share of one.
        workers: units at a time; as many as there is room for where not given.
    """

    resources: Resources
    cpus: float
    workers: int | None

    @property
    def options(self) -> dict[str, Any]:
        """The same in Ray's words."""
        gpus, memory = self.resources.gpus, self.resources.memory
        needs: dict[str, Any] = {"num_cpus": self.cpus, "num_gpus": gpus}
        needs |= {"memory": memory} if memory else {}
        return {**needs, "scheduling_strategy": "SPREAD"}


class Team(ABC):
    """The workers of a step.

    Attributes:
        how: what each of their units is given.
        doing: what does a block, by the reference to what will come of it.
        starting: workers that cannot do one yet, by the reference to their first word.
    """

    def __init__(self, how: How) -> None:
        self.how = how
        self.doing: dict[Any, Any] = {}
        self.starting: dict[Any, Any] = {}

    @classmethod
    def of(cls, work: bytes, how: How) -> Team:
        """Those that do ``work``, pickled."""
        # Tasks, where they will do: Ray keeps a task's process for the next step, with all that it
        # has imported and loaded, while an actor is started anew. An actor keeps its GPU.
        return _Actors(work, how) if how.resources.gpus else _Tasks(work, how)

    def one_pass(
        self, units: Sequence[Unit], size: int, at_once: int, causes: list[str]
    ) -> Iterator[Record]:
        """Try every unit once; the records of those whose worker lived, as they are done.

        Args:
            units: what is to be done.
            size: units of a block.
            at_once: blocks for which there is room.
            causes: is filled with what Ray says of the others.

        Raises:
            RayError: the pass could not be carried to its end.
        """
        blocks: deque[Block] = deque()
        for first in range(0, len(units), size):
            block = units[first : first + size]
            blocks.append([(unit.name, cloudpickle.dumps(unit)) for unit in block])
        self.gather(min(at_once, len(blocks)))
        self.begin(blocks)
        while self.doing or (self.starting and blocks):
            refs = [*self.doing, *self.starting]
            ray.wait(refs, num_returns=1)
            # All that have ended by now: to look at many takes long.
            for ref in ray.wait(refs, num_returns=len(refs), timeout=0)[0]:
                try:
                    found, lost = ray.get(ref), False
                except RayError as error:
                    causes.append(f"{type(error).__name__}: {error}")
                    found, lost = [], True
                self.ended(ref, lost=lost)
                self.begin(blocks)
                yield from found

    @abstractmethod
    def gather(self, most: int) -> None:
        """Be so many for the pass that begins."""

    @abstractmethod
    def begin(self, blocks: deque[Block]) -> None:
        """Begin as many of the blocks as can be; they are taken away."""

    @abstractmethod
    def ended(self, ref: Any, *, lost: bool) -> None:
        """What was ``doing`` or ``starting`` is so no more; whether its process is lost."""

    @abstractmethod
    def close(self) -> None:
        """Leave nothing running."""


class _Tasks(Team):
    def __init__(self, work: bytes, how: How) -> None:
        super().__init__(how)
        self._work = ray.put(work)
        self._task = ray.remote(_do).options(max_retries=0, **how.options)

    def gather(self, most: int) -> None:
        """Ray does, and tells a cluster that grows of those that wait."""

    def begin(self, blocks: deque[Block]) -> None:
        most = self.how.workers
        while blocks and (most is None or len(self.doing) < most):
            self.doing[self._task.remote(self._work, blocks.popleft())] = self._task

    def ended(self, ref: Any, *, lost: bool) -> None:
        del self.doing[ref]

    def close(self) -> None:
        for ref in self.doing:
            ray.cancel(ref, force=True)


class _Actors(Team):
    def __init__(self, work: bytes, how: How) -> None:
        super().__init__(how)
        self._work = ray.put(work)
        self._actor = ray.remote(_Actor).options(max_restarts=0, max_task_retries=0, **how.options)
        self._idle: list[Any] = []
        self._most = self._starts = 0

    def gather(self, most: int) -> None:
        self._most, self._starts = most, STARTS
        while len(self._idle) > most:
            ray.kill(self._idle.pop())

    def begin(self, blocks: deque[Block]) -> None:
        while blocks and self._idle:
            actor = self._idle.pop()
            self.doing[actor.do.remote(blocks.popleft())] = actor
        # A block is given to none that may have to wait for a GPU.
        while len(self.starting) < min(len(blocks), self._most - len(self.doing)) and self._starts:
            actor = self._actor.remote(self._work)
            self.starting[actor.here.remote()] = actor

    def ended(self, ref: Any, *, lost: bool) -> None:
        starts = ref in self.starting
        actor = self.starting.pop(ref) if starts else self.doing.pop(ref)
        if not lost:
            self._idle.append(actor)
            return
        ray.kill(actor)
        self._starts -= starts

    def close(self) -> None:
        for actor in (*self._idle, *self.doing.values(), *self.starting.values()):
            ray.kill(actor)


class _Actor:
    """A worker that keeps its GPU."""

    def __init__(self, work: bytes) -> None:
        self._work = work

    def here(self) -> list[Record]:
        return []

    def do(self, block: Block) -> list[Record]:
        return _do(self._work, block)


def _do(work: bytes, block: Block) -> list[Record]:
    # Unpickled here and not by Ray, for which a plug-in that is missing is the death of a task.
    try:
        call, units = pickle.loads(work), [pickle.loads(unit) for _, unit in block]  # noqa: S301
    except Exception as error:  # noqa: BLE001
        return [failed(error, name) for name, _ in block]
    return list(attempts(call, units))
