"""Samples in quarantine, taken up once more."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import pyarrow as pa

from pipeline.digest import digest
from pipeline.orchestration.screen import BAD_LABEL, DUPLICATE, tally
from pipeline.storage.artifact import Artifact, ArtifactSource, quarantine_file
from pipeline.storage.atomic import FileEntry
from pipeline.storage.parquet import read_table
from pipeline.storage.source import Shard, Source

SETTLED = frozenset({DUPLICATE, BAD_LABEL})
"""Reasons that lie in the source itself; its identity would be another, had they gone away."""


@dataclass(frozen=True)
class RetrySource(Source):
    """The chosen samples of a source, in shards of their own.

    Args:
        base: the source that they were first read from.
        chosen: key and reason of each sample by the shard that it lies in.
        number: counts the rounds; it is part of the shards' names.
    """

    base: Source
    chosen: Mapping[str, Sequence[tuple[str, str]]]
    number: int

    @property
    def classes(self) -> tuple[str, ...]:
        return self.base.classes

    @property
    def retried(self) -> dict[str, int]:
        """How many samples are taken up, by reason."""
        return tally([reason for samples in self.chosen.values() for _, reason in samples])

    def __len__(self) -> int:
        return sum(map(len, self.chosen.values()))

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        shards = []
        for shard in self.base.shards:
            if shard.name in self.chosen:
                identity = digest(shard.identity, self.chosen[shard.name], self.number)
                # A round that chose other samples and was stopped left shards of other names.
                name = f"{shard.name}-retry{self.number}-{identity[:8]}"
                place = {"base": asdict(shard), "keys": [key for key, _ in self.chosen[shard.name]]}
                shards.append(Shard(name, identity, location=place))
        return tuple(shards)

    def lean(self) -> RetrySource:
        return replace(self, base=self.base.lean(), chosen={})

    def read(self, shard: Shard) -> pa.Table:
        table = self.base.take(Shard(**shard.location["base"]), shard.location["keys"])
        # Later rows of the same key are accounted for already, as duplicates.
        first = {key: row for row, key in reversed(list(enumerate(table["key"].to_pylist())))}
        return table.take(pa.array(sorted(first.values()), pa.int64()))


def in_quarantine(artifact: Artifact, reasons: Collection[str]) -> dict[str, list[tuple[str, str]]]:
    """Key and reason of the samples that are still in quarantine, by the shard they were read from.

    What no second look can change is left out.

    Args:
        artifact: of a map step, with what earlier rounds made of its quarantine.
        reasons: those that count; all where there is none.
    """
    found: dict[tuple[str, str], str] = {}
    for number, part in enumerate(ArtifactSource(artifact).artifacts):
        taken_up = part.manifest.get("retried", {})
        found = {place: reason for place, reason in found.items() if reason not in taken_up}
        for record in part.records():
            shard = record["name"].rpartition(f"-retry{number}-")[0] if number else record["name"]
            for entry in record["files"]:
                if entry["path"] != quarantine_file(record["name"]):
                    continue
                with part.checked([FileEntry(**entry)]) as folder:
                    rows = read_table(folder / entry["path"]).select(["key", "reason"])
                for key, reason in zip(*rows.to_pydict().values(), strict=True):
                    if reason not in SETTLED:
                        found[shard, key] = reason
    chosen: dict[str, list[tuple[str, str]]] = {}
    for (shard, key), reason in found.items():
        if not reasons or reason in reasons:
            chosen.setdefault(shard, []).append((key, reason))
    return chosen
