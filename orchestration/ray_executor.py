"""Units on a Ray cluster: what is tried again, how often, and when it is given up."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from statistics import median_low
from typing import TYPE_CHECKING, Any

from pipeline.errors import RunError
from pipeline.orchestration.executor import KILLS, Record, Resources, Unit, Work
from pipeline.storage.store import Store

if TYPE_CHECKING:
    from pipeline.orchestration.ray_tasks import How, Team

log = logging.getLogger(__name__)

WINDOW = 2048
"""Units that are handed to Ray at a time."""

BLOCK_SECONDS = 0.2
"""Units that are shorter share a block, up to this: a block costs this process a millisecond."""

SHARE = 4
"""Blocks of a window for each worker, at least: so that none waits long for the others."""

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
        causes: what Ray says of it.
    """

    killers: list[str] = field(default_factory=list)
    disturbed: bool = False
    causes: list[str] = field(default_factory=list)

    @property
    def cause(self) -> str:
        """The commonest cause, on one line."""
        lines = Counter(" ".join(cause.split())[:300].rstrip(". ") for cause in self.causes)
        return lines.most_common(1)[0][0] if lines else "Ray does not say why"


class RayExecutor:
    """Runs units on a Ray cluster; only their records travel to this process.

    Ray is started, or joined, when it is first needed. Where units prove to be very short, a worker
    is given a few at once, as a block. A unit whose worker died is done again, as
    a block of its own, at most three times, the last time with no other beside it; the loss of a
    node is not its fault. What a worker has committed is found by the next attempt, and changed by
    none.

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

        self._start()
        from pipeline.orchestration.ray_tasks import Team

        how, rest = self._how(resources), iter(units)
        count, size = SHARE * self._at_once(how), 1
        with closing(Team.of(cloudpickle.dumps(work), how)) as team:
            while window := list(islice(rest, count)):
                even = len(window) // (SHARE * self._at_once(how))
                seconds = []
                for record in self._finish(team, window, max(1, min(size, even))):
                    seconds.append(record.get("seconds", BLOCK_SECONDS))
                    yield record
                size = round(BLOCK_SECONDS / max(median_low(seconds), 1e-3))
                count = WINDOW

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

    def _finish(self, team: Team, units: Sequence[Unit], size: int) -> Iterator[Record]:
        """The records of some units, however many passes over them it takes.

        In the first one ``size`` units are a block; after that each is one, so that it shows which
        of them kills its worker.
        """
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
                each = size if tries == 1 else 1
                passed = team.one_pass(group, each, self._at_once(team.how), attempt.causes)
                yield from self._watched(passed, group, missing, attempt)
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

    def _watched(
        self,
        passed: Iterator[Record],
        units: Sequence[Unit],
        missing: dict[str, Unit],
        attempt: _Attempt,
    ) -> Iterator[Record]:
        """The records of a pass over some units; what is done is no longer ``missing``."""
        cluster = self._start()
        before = set(cluster.nodes())
        try:
            for record in passed:
                if missing.pop(record["name"], None):
                    yield record
        except cluster.ray.exceptions.RayError as error:
            attempt.disturbed = True
            attempt.causes.append(f"{type(error).__name__}: {error}")
        lost = [unit.name for unit in units if unit.name in missing]
        if lost:
            attempt.disturbed |= not before <= cluster.answering()
            attempt.killers = [] if attempt.disturbed else lost
            whose = " when a node was lost" if attempt.disturbed else ""
            log.warning("%d shards lost their worker%s: %s", len(lost), whose, attempt.cause)

    def _how(self, resources: Resources) -> How:
        """What Ray is to set aside for one unit."""
        from pipeline.orchestration.ray_tasks import How

        workers = resources.workers or self._workers
        cpus: float = resources.threads
        if self._address is None:
            # Ray would wait for ever for more than there is; threads can share.
            share = (os.cpu_count() or 1) / (workers or 1)
            cpus = min(cpus, int(share) if share >= 1 else share)
        return How(resources, cpus, workers)

    def _at_once(self, how: How) -> int:
        """How many units there may be at a time, as far as is known."""
        room = self._start().room(how.resources, how.cpus)
        if not room:
            error = self._start().no_room(how.resources)
            if self._address is None:
                raise error
            log.warning("%s", error)  # a cluster that grows may get such a node
        return int(max(1, min(how.workers or room, room)))


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
