"""Units on Ray Data: one unit is one block and one task."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa

from pipeline.errors import RunError
from pipeline.orchestration.executor import Record, Resources, Unit, Work, attempt


def _do(units: pa.Table, work: Work) -> pa.Table:
    records = [json.dumps(attempt(work, unit)) for unit in units["unit"].to_pylist()]
    return pa.table({"record": records})


class RayExecutor:
    """Runs units on a Ray cluster; only their records travel to the driver.

    Ray is started, or joined, when the first unit is to be done.

    Args:
        address: the cluster to join; without it one is started on this machine.
        workers: tasks that run at once; without it as many as there are CPUs for.
    """

    def __init__(self, address: str | None = None, workers: int | None = None) -> None:
        self._address = address
        self._workers = workers
        self._ray: Any = None

    def run(self, work: Work, units: Iterable[Unit], resources: Resources) -> Iterator[Record]:
        threads = resources.threads
        units = list(units)
        ray = self._start(threads)
        cpus = int(ray.cluster_resources().get("CPU", 1))
        workers = self._workers or max(1, cpus // threads)
        rows = ray.data.from_items(
            [{"unit": unit} for unit in units], override_num_blocks=len(units)
        ).map_batches(
            # Tasks, not actors: Ray keeps a task's process for the next step, with all that it has
            # imported and loaded, while a pool of actors is started anew for each.
            _do,
            fn_args=(work,),
            compute=ray.data.TaskPoolStrategy(size=min(workers, len(units))),
            num_cpus=threads,
            batch_size=None,
            batch_format="pyarrow",
        )
        for row in rows.iter_rows():
            yield json.loads(row["record"])

    def _start(self, threads: int) -> Any:
        if self._ray is not None:
            return self._ray
        import ray

        # A cluster of our own is made large enough for what was asked: Ray would wait for ever.
        cpus = max(os.cpu_count() or 1, threads * (self._workers or 1))
        try:
            ray.init(
                address=self._address,
                num_cpus=None if self._address else cpus,
                include_dashboard=None if self._address else False,
                logging_level=logging.ERROR,
                log_to_driver=False,
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise RunError(
                f"No Ray cluster answers: {error}.",
                hint="Check --address, or leave it out to start one on this machine.",
                code="no-cluster",
            ) from error
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.target_max_block_size = None
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        self._ray = ray
        return ray

    def close(self) -> None:
        if self._ray is not None:
            self._ray.shutdown()
            self._ray = None
