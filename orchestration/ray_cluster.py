"""A Ray cluster as the Ray executor sees it: joined or started, its nodes, and what they reach."""

from __future__ import annotations

import logging
import os
import socket
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline import __version__
from pipeline.errors import RunError
from pipeline.orchestration.executor import Resources
from pipeline.storage.store import LocalStore, Store

PATIENCE = 60.0
"""Seconds in which a node that is alive answers."""


def start(address: str | None, *, verbose: bool) -> None:
    """Join the cluster at ``address``, or start one on this machine.

    Raises:
        RunError: no cluster answers.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not verbose:
        # Ray prints what its daemons say of workers that died to the standard output, and has no
        # public switch for it.
        ray._private.worker._worker_logs_enabled = False  # noqa: SLF001
    with warnings.catch_warnings():
        if not verbose:
            warnings.simplefilter("ignore")
        try:
            _call(address)
            ray.init(
                # Whatever RAY_ADDRESS says: a cluster is joined where one is named.
                address=address or "local",
                include_dashboard=None if address else False,
                logging_level=logging.INFO if verbose else logging.ERROR,
                log_to_driver=verbose,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise RunError(
                f"No Ray cluster answers: {error}.",
                hint="Check --address, or leave it out to start one on this machine.",
                code="no-cluster",
            ) from error


def _call(address: str | None) -> None:
    """Ray takes minutes to find that nobody is there. Raises OSError."""
    host, _, port = (address or "").rpartition(":")
    if host and port.isdecimal() and "//" not in host:
        socket.create_connection((host.strip("[]"), int(port)), PATIENCE).close()


def nodes() -> dict[str, dict[str, Any]]:
    """The nodes that Ray takes to be alive, by identity."""
    return {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}


def room(resources: Resources, cpus: float) -> int:
    """How many units fit the cluster at a time, were nothing else running on it."""
    wanted = {"CPU": cpus, "GPU": resources.gpus, "memory": resources.memory}
    total = 0
    for node in nodes().values():
        has: Mapping[str, float] = node["Resources"]
        fits = [has.get(name, 0.0) / amount for name, amount in wanted.items() if amount]
        total += int(min(fits, default=0.0) + 1e-9)
    return total


def no_room(resources: Resources) -> RunError:
    """The error of a unit that no node could ever take."""
    wanted = f"{resources.threads} CPU"
    wanted += f", {resources.gpus:g} GPU" if resources.gpus else ""
    wanted += f", {resources.memory / 2**30:.1f} GiB of memory" if resources.memory else ""
    there = "; ".join(
        f"{has.get('CPU', 0):g} CPU, {has.get('GPU', 0):g} GPU, "
        f"{has.get('memory', 0) / 2**30:.1f} GiB"
        for has in (node["Resources"] for node in nodes().values())
    )
    return RunError(
        f"No node of the Ray cluster has what one shard of this step is to get: {wanted}. "
        f"There is: {there or 'no node'}.",
        hint="Ask for fewer threads, GPUs or memory in the configuration, or name a larger "
        "cluster with --address.",
        code="no-room",
    )


def ask(function: Any, *arguments: Any) -> dict[str, Any]:
    """Call ``function`` on every node: what each answered, an exception where it did not."""
    remote = ray.remote(num_cpus=0, max_retries=0)(function)
    asked = {
        node: remote.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
        ).remote(*arguments)
        for node in nodes()
    }
    done, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=PATIENCE)
    answers: dict[str, Any] = {}
    for node, ref in asked.items():
        try:
            answers[node] = ray.get(ref) if ref in done else TimeoutError("It does not answer")
        except Exception as error:  # noqa: BLE001 - told, or taken as a node that is gone
            answers[node] = error
    return answers


def _here() -> bool:
    return True


def answering() -> set[str]:
    """The nodes that are alive indeed: Ray notices a node that is gone after half a minute."""
    return {node for node, answer in ask(_here).items() if answer is True}


def _probe(folder: Path | None, token: str) -> tuple[str, str | None]:
    """On a node: the version of this package, and why ``folder`` is not the driver's."""
    problem = None
    if folder is not None:
        try:
            if (folder / token).read_text() != token:
                problem = "it has another folder of that name"
            beside = folder / f"{token}.{uuid.uuid4().hex}"
            beside.touch()
            beside.unlink()
        except OSError as error:
            problem = error.strerror or str(error)
    return __version__, problem


@contextmanager
def _token(out: Store) -> Iterator[tuple[Path | None, str]]:
    token = uuid.uuid4().hex
    if not isinstance(out, LocalStore):
        yield None, token
        return
    folder = out.unfinished or out.root
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / token
    try:
        path.write_text(token)
        yield folder, token
    finally:
        path.unlink(missing_ok=True)


def check_nodes(out: Store) -> None:
    """Make sure that every node sees ``out`` and has this version of this package.

    Raises:
        RunError: one does not.
    """
    with _token(out) as (folder, token):
        answers = ask(_probe, folder, token)
    known = nodes()
    unable, blind = [], []
    for node, answer in answers.items():
        name = known.get(node, {}).get("NodeManagerHostname", node[:12])
        name = f"{name} ({node[:8]})"
        if isinstance(answer, Exception):
            unable.append(f"{name}: {str(answer).strip().splitlines()[-1]}")
        elif answer[0] != __version__:
            unable.append(f"{name}: it has version {answer[0]}, not {__version__}")
        elif answer[1]:
            blind.append(f"{name}: {answer[1]}")
    if unable:
        raise RunError(
            f"{len(unable)} of {len(answers)} nodes of the Ray cluster cannot do this work: "
            f"{'; '.join(unable)}.",
            hint="Install the same version of this package on every node.",
            code="unable-nodes",
        )
    if blind:
        raise RunError(
            f"{len(blind)} of {len(answers)} nodes of the Ray cluster cannot use the output "
            f"folder: {'; '.join(blind)}.",
            hint="Workers write the output themselves: give an object store, such as "
            "--out s3://bucket/run, or a folder that is mounted on every node.",
            code="not-shared",
            where=str(out),
        )
