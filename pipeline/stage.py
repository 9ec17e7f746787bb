"""The stage contract: one Arrow table in, one Arrow table out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa


class StateKeeper(Protocol):
    """Where a stage that works long on a shard keeps its state, to go on from after a kill."""

    @property
    def due(self) -> bool:
        """Whether it is time to write."""

    def read(self) -> dict[str, Any] | None:
        """The state last written: tensors and plain types; ``None`` where there is none."""

    def write(self, state: Mapping[str, Any]) -> None:
        """Put ``state`` in place of the last one."""


@dataclass
class ShardContext:
    """What a stage knows about the shard at hand, and where it reports what it left out.

    ``seed`` belongs to (run, step); a stage adds the sample's key to it, never a worker's number.
    ``checkpoint``, where there is one, takes the state of a stage that works long on a shard: with
    it or without, the stage gives the same table.
    """

    shard: str
    seed: int
    checkpoint: StateKeeper | None = None
    filtered: dict[str, int] = field(default_factory=dict)
    bad: list[dict[str, str]] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)

    def filter(self, reason: str, rows: int = 1) -> None:
        """Count ``rows`` samples left out on purpose."""
        if rows:
            self.filtered[reason] = self.filtered.get(reason, 0) + rows

    def quarantine(self, key: str, reason: str, detail: str) -> None:
        """Set a bad sample aside; it is kept as it came into the step, with its original bytes.

        Args:
            key: the sample's key.
            reason: a short stable code such as ``decode-error``.
            detail: one sentence for a person.
        """
        self.bad.append({"key": key, "reason": reason, "detail": detail})


class Stage(Protocol):
    """A frozen dataclass that maps one shard's table to another.

    Its fields and its class attribute ``version`` make up its identity: whoever changes what a
    stage writes raises ``version``. A class attribute ``model = True`` says that it runs a network:
    its shards are then given a GPU where there is one. Every row that comes in must go out, or be
    reported to the context as filtered or quarantined.
    """

    def __call__(self, table: pa.Table, context: ShardContext) -> pa.Table: ...
