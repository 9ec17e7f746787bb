"""Units one after the other in this process; starts at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from pipeline.errors import UsageError
from pipeline.orchestration.executor import Record, Resources, Unit, Work, attempts
from pipeline.storage.store import Store


class LocalExecutor:
    """Runs everything in this process: a unit that kills its worker kills the run."""

    def __init__(self, address: str | None = None, workers: int | None = None) -> None:
        if address or workers:
            raise UsageError(
                "The local executor has one worker, in this process, and joins no cluster.",
                hint="Add --executor ray, or leave out --address and --workers.",
                code="bad-executor-option",
            )

    def run(self, work: Work, units: Iterable[Unit], resources: Resources) -> Iterator[Record]:
        return attempts(work, units)

    def train(self, work: Any, unit: Any, workers: int, resources: Resources) -> Record:
        raise UsageError(
            f"A training with {workers} workers runs on Ray.",
            hint="Add --executor ray, or set the training's workers to 1.",
            code="needs-ray",
        )

    def gpus(self) -> float:
        return 0.0

    def check_output(self, out: Store) -> None:
        """The only worker is this process."""

    def close(self) -> None:
        """Nothing is held."""
