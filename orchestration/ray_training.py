"""One training on several workers, by Ray Train."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, get_context
from ray.train.torch import TorchConfig, TorchTrainer

from pipeline.errors import RunError
from pipeline.orchestration.executor import PAUSES, Record, Resources, failed, is_passing
from pipeline.orchestration.fit import FitUnit, FitWork
from pipeline.orchestration.group import LOST, Group

PASSING = "passing"
"""In the record of an error: whether infrastructure failed, and may not at the next attempt."""


def train_on_ray(work: FitWork, unit: FitUnit, workers: int, resources: Resources) -> Record:
    """Train one model on several workers of the Ray cluster that this process is connected to.

    Every worker makes the call that a training in process is, with its place among them; the first
    one publishes the model and writes the ledger. Only the record comes back.

    What a disk or a network failed to do is tried again, as in process; the loss of a worker is
    left to the caller. Every attempt goes on from the training's own checkpoint.

    Args:
        work: the fit step.
        unit: the model.
        workers: how many processes share every batch.
        resources: what each of them needs.

    Returns:
        The unit's record, with ``error`` in it where a worker failed or was lost.
    """
    pauses = iter(PAUSES)
    while True:
        record = _attempt(work, unit, workers, resources)
        if not record.pop(PASSING, False) or (pause := next(pauses, None)) is None:
            return record
        time.sleep(pause)


def _attempt(work: FitWork, unit: FitUnit, workers: int, resources: Resources) -> Record:
    try:
        return _train(work, unit, workers, resources)
    except Exception as error:  # noqa: BLE001 - becomes a record, as in process
        return failed(error, unit.name)


def _train(work: FitWork, unit: FitUnit, workers: int, resources: Resources) -> Record:
    each = _bundle(resources)
    _check_room(each, workers)
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    # Ray Train wants a folder of its own; nothing is kept in it.
    with tempfile.TemporaryDirectory() as folder:
        trainer = TorchTrainer(
            _worker,
            train_loop_config={"work": work, "unit": unit},
            # NCCL does not let two workers share a GPU.
            torch_config=TorchConfig(backend="nccl" if resources.gpus >= 1 else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=workers, use_gpu=resources.gpus > 0, resources_per_worker=each
            ),
            run_config=RunConfig(
                name="training",
                storage_path=folder,
                failure_config=FailureConfig(
                    max_failures=0, controller_failure_limit=0, max_preemption_failures=0
                ),
            ),
        )
        try:
            result = trainer.fit()
        except (TrainingFailedError, RayError) as error:
            return _told(error)
    record: Record = json.loads(result.return_value)
    return record


class _WorkerError(Exception):
    """Carries the record of a unit that failed, as JSON."""


def _worker(config: Mapping[str, Any]) -> str:
    work: FitWork = config["work"]
    unit: FitUnit = config["unit"]
    context = get_context()
    try:
        return json.dumps(work(unit, Group(context.get_world_rank(), context.get_world_size())))
    except Exception as error:
        # Not tried again here: the other workers are in the middle of what they share with this
        # one, and wait for it, until Ray Train sees the error and ends them all.
        record = {**failed(error, unit.name), PASSING: is_passing(error)}
        raise _WorkerError(json.dumps(record)) from error


def _told(error: TrainingFailedError | RayError) -> Record:
    """The record of the worker that failed first, as far as that can be told.

    Raises:
        RunError: none of them left one.
    """
    failures = list(getattr(error, "worker_failures", {}).values())
    records = [json.loads(str(one)) for one in failures if isinstance(one, _WorkerError)]
    causes = [record for record in records if record["error"]["code"] != LOST]
    silent = [str(one) for one in failures if not isinstance(one, _WorkerError)]
    told = causes or ([] if silent else records)
    if told:
        return dict(told[0])
    again = "Start the same command again: the training goes on from its last checkpoint."
    if silent:
        raise RunError(
            f"A worker of the training died: {silent[0].splitlines()[0]}",
            hint=f"{again} If it ran out of memory, ask for smaller batches, or fewer workers.",
            code=LOST,
        ) from error
    raise RunError(
        f"Ray Train could not carry the training out: {' '.join(str(error).split())[:300]}.",
        hint=again,
        code="ray-train",
    ) from error


def _bundle(resources: Resources) -> dict[str, float]:
    """What Ray sets aside for one worker."""
    wanted = {"CPU": resources.threads, "GPU": resources.gpus, "memory": resources.memory}
    return {name: amount for name, amount in wanted.items() if amount}


def _check_room(each: Mapping[str, float], workers: int) -> None:
    """Ray would wait for ever.

    Raises:
        RunError: the cluster is too small.
    """
    cluster = ray.cluster_resources()
    for name, amount in each.items():
        if amount * workers > cluster.get(name, 0):
            raise RunError(
                f"{workers} workers with {amount:g} {name} each do not fit the Ray cluster, which "
                f"has {cluster.get(name, 0):g}.",
                hint="Ask for fewer workers, threads or GPUs, or name a larger cluster with "
                "--address.",
                code="small-cluster",
            )
