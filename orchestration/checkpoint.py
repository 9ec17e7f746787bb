"""The state of work that takes long, kept while it goes on."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from pipeline.errors import RunError
from pipeline.storage.atomic import with_digest, without_digest
from pipeline.storage.store import Store

log = logging.getLogger(__name__)


@dataclass
class Checkpoint:
    """The state of one unit of work between two steps: a SHA-256 (32 bytes) and what torch saved.

    Args:
        store: where it lies.
        name: the unit of work that it belongs to.
        every: seconds from one checkpoint to the next; with 0 there is one after every step.
    """

    store: Store
    name: str
    every: float = 600.0
    _written: float = field(default_factory=lambda: time.monotonic(), repr=False)  # noqa: PLW0108
    _there: bool = field(default=False, repr=False)

    @property
    def due(self) -> bool:
        """Whether it is time to write one."""
        return time.monotonic() - self._written >= self.every

    @property
    def _file(self) -> str:
        return f"{self.name}.pt"

    def read(self) -> dict[str, Any] | None:
        """The state last written; ``None`` where there is none, or not the bytes that were."""
        if self.store.info(self._file) is None:
            return None
        self._there = True
        data = without_digest(self.store.read(self._file))
        if data is None:
            log.warning("%s: the checkpoint is damaged, the work begins anew", self.name)
            return None
        found: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        return found

    def write(self, state: Mapping[str, Any]) -> None:
        """Put ``state`` in place of the last one."""
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        self.store.replace(self._file, with_digest(buffer.getvalue()))
        self._there, self._written = True, time.monotonic()

    def write_snapshot(self, epoch: int, weights: bytes) -> None:
        """Keep the weights after an epoch, counted from 1."""
        self.store.replace(self._snapshot(epoch), with_digest(weights))

    def read_snapshot(self, epoch: int) -> bytes:
        """The weights after an epoch.

        Raises:
            RunError: they are damaged.
        """
        weights = without_digest(self.store.read(self._snapshot(epoch)))
        if weights is None:
            raise RunError(
                f"The weights of '{self.name}' after epoch {epoch} are damaged.",
                hint="Delete the folder of checkpoints, so that the training begins anew.",
                code="damaged-snapshot",
                where=f"{self.store}/{self._snapshot(epoch)}",
            )
        return weights

    def _snapshot(self, epoch: int) -> str:
        return f"{self.name}-epoch-{epoch:05d}"

    def delete(self, snapshots: int = 0) -> None:
        """Delete what was read or written, and the weights after so many epochs."""
        if self._there:
            self.store.delete(self._file)
        for epoch in range(1, snapshots + 1):
            self.store.delete(self._snapshot(epoch))
