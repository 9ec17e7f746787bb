"""Units on Ray Data: one unit is one block, worked on by a pool of actors."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from pipeline.errors import RunError
from pipeline.orchestration.executor import Work, attempt


class _Worker:
    """Keeps the work, and so what it has loaded, from unit to unit."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def __call__(self, units: pa.Table) -> pa.Table:
        records = [json.dumps(attempt(self.work, unit)) for unit in units["unit"].to_pylist()]
        return pa.table({"record": records})


class RayExecutor:
    """Runs units on a Ray cluster; only their records travel to the driver.

    Args:
        address: the cluster to join; without it one is started on this machine.
        workers: actors a step may use at once; without it as many as there are CPUs for.
    """

    def __init__(self, address: str | None = None, workers: int | None = None) -> None:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray

        self._ray = ray
        self._workers = workers
        try:
            ray.init(
                address=address,
                num_cpus=None if address else max(workers or 0, os.cpu_count() or 1),
                include_dashboard=False if address is None else None,
                logging_level=logging.ERROR,
                log_to_driver=False,
                configure_logging=True,
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

    def run(self, work: Work, units: Sequence[str], threads: int) -> Iterator[dict[str, Any]]:
        data = self._ray.data
        cpus = int(self._ray.cluster_resources().get("CPU", 1))
        workers = self._workers or max(1, cpus // threads)
        rows = data.from_arrow([pa.table({"unit": [unit]}) for unit in units]).map_batches(
            _Worker,
            fn_constructor_args=(work,),
            compute=data.ActorPoolStrategy(min_size=1, max_size=min(workers, len(units))),
            num_cpus=min(threads, cpus),
            batch_size=None,
            batch_format="pyarrow",
        )
        for row in rows.iter_rows():
            yield json.loads(row["record"])

    def close(self) -> None:
        self._ray.shutdown()
