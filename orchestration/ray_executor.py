"""Units on a Ray cluster: what is tried again, how often, and when it is given up."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from pipeline.errors import RunError
from pipeline.orchestration.executor import KILLS, Record, Resources, Unit, Work
from pipeline.storage.store import Store

if TYPE_CHECKING:
    from pipeline.orchestration.ray_data import How

log = logging.getLogger(__name__)

WINDOW = 2048
"""Units that are handed to Ray at a time: it takes 1 ms and 10 KB of this process for each."""

ATTEMPTS = 3
"""Workers that a unit may kill."""

PAUSES = (1.0, 4.0, 16.0)
"""Seconds before units whose worker died are tried again; the last holds for all that follow."""

LOSSES = 10
"""Passes in a row that may lose a node or the connection and finish nothing."""


@dataclass
class _Attempt:
    """What became of an attempt at some units.

    Attributes:
        killers: the units whose worker died with no node or connection lost.
        disturbed: whether a node or the connection was lost.
        cause: what Ray says of it.
    """

    killers: list[str] = field(default_factory=list)
    disturbed: bool = False
    cause: str = ""


class RayExecutor:
    """Runs units on a Ray cluster; only their records travel to this process.

    Ray is started, or joined, when it is first needed. A unit whose worker died is done again, at
    most three times, the last time with no other unit beside it; the loss of a node is not its
    fault. What a worker has committed is found by the next attempt, and changed by none.

    Args:
        address: the cluster to join; without it one is started on this machine.
        workers: units that run at once where a step does not say it; as many as there is room for
            where neither does.
    """

    def __init__(self, address: str | None = None, workers: int | None = None) -> None:
        self._address = address
        self._workers = workers
        self._cluster: Any = None

    def run(self, work: Work, units: Iterable[Unit], resources: Resources) -> Iterator[Record]:
        from ray import cloudpickle

        sent = cloudpickle.dumps(work)
        rest = iter(units)
        while window := list(islice(rest, WINDOW)):
            yield from self._finish(sent, window, resources)

    def train(self, work: Any, unit: Any, workers: int, resources: Resources) -> Record:
        self._start()
        from pipeline.orchestration.group import LOST
        from pipeline.orchestration.ray_training import train_on_ray

        for lost in range(ATTEMPTS - 1):
            record = train_on_ray(work, unit, workers, resources)
            if record.get("error", {}).get("code") != LOST:
                return record
            log.warning("%s: a worker of the training was lost; it goes on", unit.name)
            time.sleep(PAUSES[min(lost, len(PAUSES) - 1)])
        return train_on_ray(work, unit, workers, resources)

    def gpus(self) -> float:
        return float(self._start().ray.cluster_resources().get("GPU", 0.0))

    def check_output(self, out: Store) -> None:
        if out.url.startswith("memory:"):
            raise RunError(
                "What a worker of Ray writes to its own memory is seen by no other process.",
                hint="Give a folder or an object store, such as s3://bucket/run.",
                code="not-shared",
                where=out.url,
            )
        if self._address is not None:
            self._start().check_nodes(out)

    def close(self) -> None:
        if self._cluster is not None:
            self._cluster.ray.shutdown()
            self._cluster = None

    def _start(self) -> Any:
        if self._cluster is None:
            from pipeline.orchestration import ray_cluster

            # What Ray writes to the terminal is for those who want to know everything.
            ray_cluster.start(self._address, verbose=log.isEnabledFor(logging.DEBUG))
            self._cluster = ray_cluster
        return self._cluster

    def _finish(self, work: bytes, units: Sequence[Unit], resources: Resources) -> Iterator[Record]:
        """The records of some units, however many passes over them it takes."""
        missing = {unit.name: unit for unit in units}
        kills: Counter[str] = Counter()
        tries = losses = 0
        while missing:
            if tries:
                time.sleep(PAUSES[min(tries, len(PAUSES)) - 1])
            tries += 1
            # The last attempt of a unit is made alone, when all others are done: what killed its
            # workers may have been the memory that its neighbours took.
            together = [u for u in missing.values() if kills[u.name] < ATTEMPTS - 1]
            left = len(missing)
            for group in [together] if together else [[unit] for unit in missing.values()]:
                attempt = _Attempt()
                yield from self._try(work, group, resources, missing, attempt)
                for name in attempt.killers:
                    kills[name] += 1
                    if kills[name] == ATTEMPTS:
                        del missing[name]
                        yield _killer(name, attempt.cause)
                if attempt.disturbed:
                    break
            losses = losses + 1 if len(missing) == left and attempt.disturbed else 0
            if losses > LOSSES:
                raise _no_cluster(attempt.cause)

    def _try(
        self,
        work: bytes,
        units: Sequence[Unit],
        resources: Resources,
        missing: dict[str, Unit],
        attempt: _Attempt,
    ) -> Iterator[Record]:
        """Try every unit once; what is done is no longer ``missing``."""
        from pipeline.orchestration.ray_data import one_pass

        cluster = self._start()
        before = set(cluster.nodes())
        causes: list[str] = []
        try:
            for record in one_pass(work, units, self._how(resources), causes):
                if missing.pop(record["name"], None):
                    yield record
        except cluster.ray.exceptions.RayError as error:
            attempt.disturbed = True
            causes.append(f"{type(error).__name__}: {error}")
        lost = [unit.name for unit in units if unit.name in missing]
        if lost:
            attempt.cause = _commonest(causes)
            attempt.disturbed |= not before <= cluster.answering()
            attempt.killers = [] if attempt.disturbed else lost
            whose = " when a node was lost" if attempt.disturbed else ""
            log.warning("%d shards lost their worker%s: %s", len(lost), whose, attempt.cause)

    def _how(self, resources: Resources) -> How:
        """What one unit takes, and how many there may be at a time."""
        from pipeline.orchestration.ray_data import How

        workers = resources.workers or self._workers
        cpus: float = resources.threads
        if self._address is None:
            # Ray would wait for ever for more than there is; threads can share.
            share = (os.cpu_count() or 1) / (workers or 1)
            cpus = min(cpus, int(share) if share >= 1 else share)
        room = self._start().room(resources, cpus)
        if not room:
            error = self._start().no_room(resources)
            if self._address is None:
                raise error
            log.warning("%s", error)  # a cluster that grows may get such a node
        return How(cpus, resources.gpus, resources.memory, workers, room)


def _commonest(causes: Sequence[str]) -> str:
    """The commonest cause, on one line."""
    common = Counter(" ".join(cause.split())[:300].rstrip(". ") for cause in causes).most_common(1)
    return common[0][0] if common else "Ray does not say why"


def _killer(name: str, cause: str) -> Record:
    return {
        "name": name,
        "error": {
            "message": f"The worker died {ATTEMPTS} times over this shard, the last time with no "
            f"other beside it: {cause}.",
            "hint": "It may need more memory than there is, or hold data that crashes a decoder. "
            "'pipeline retry' takes it up again.",
            "code": KILLS,
            "where": name,
        },
    }


def _no_cluster(cause: str) -> RunError:
    return RunError(
        f"The Ray cluster lost nodes {LOSSES} times in a row and nothing was finished: {cause}.",
        hint="Look after the cluster; then start the same command again: what is finished is kept.",
        code="cluster-lost",
    )
