"""Directories that say what they hold: a manifest, written last, and the files it lists."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.digest import dumps
from pipeline.errors import RunError, UsageError
from pipeline.storage.atomic import FileEntry, write_atomic
from pipeline.storage.formats import Format, formats
from pipeline.storage.source import Shard, Source

MANIFEST = "manifest.json"
VERSION = 1


@dataclass(frozen=True)
class Artifact:
    """A directory and its manifest. Readers follow the manifest, never a listing."""

    path: Path
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, path: Path) -> Artifact:
        """Read the manifest in ``path``.

        Raises:
            UsageError: there is none, or it is of another format or version.
        """
        try:
            manifest = json.loads((path / MANIFEST).read_bytes())
            version = manifest["format_version"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                "There is no finished output of this pipeline here.",
                hint="Give the folder that a run wrote; a run that was stopped is finished by "
                "starting it again.",
                code="no-manifest",
                where=str(path),
            ) from error
        if version != VERSION:
            raise UsageError(
                f"This output has format version {version}; this release reads {VERSION}.",
                hint="Open it with the release that wrote it.",
                code="format-version",
                where=str(path),
            )
        return cls(path, manifest)

    @classmethod
    def exists(cls, path: Path) -> bool:
        """Whether ``path`` was finished."""
        return (path / MANIFEST).is_file()

    @classmethod
    def finish(cls, path: Path, manifest: Mapping[str, Any], scratch: Path) -> Artifact:
        """Write the manifest, by way of the folder ``scratch``: now the artifact is there."""
        full = {"format_version": VERSION, **manifest}
        write_atomic(path / MANIFEST, dumps(full), scratch)
        return cls(path, json.loads(dumps(full)))

    @property
    def identity(self) -> str:
        """Digest of the configuration and inputs that made this artifact."""
        return str(self.manifest["identity"])

    @property
    def shards(self) -> list[Mapping[str, Any]]:
        """The shard records, in order; a run has none."""
        return list(self.manifest.get("shards", ()))

    @property
    def metrics(self) -> Mapping[str, Any]:
        """What a fitted artifact measured of itself."""
        return dict(self.shards[0]["metrics"])

    @cached_property
    def files(self) -> dict[str, FileEntry]:
        """Every listed file by path; one that several shards share is there once."""
        groups = [self.manifest.get("files", ()), *(shard["files"] for shard in self.shards)]
        return {entry["path"]: FileEntry(**entry) for group in groups for entry in group}

    def product(self, role: str) -> Artifact:
        """The artifact that a published run names ``role``, once its manifest was checked.

        Raises:
            RunError: that manifest is missing or damaged.
        """
        return Artifact.open(self.file(f"{self.manifest['products'][role]}/{MANIFEST}").parent)

    def file(self, name: str) -> Path:
        """The path of a file that the manifest lists, once its digest was checked.

        Raises:
            RunError: it is not listed, missing, or has other bytes.
        """
        entry = self.files.get(name)
        if entry and entry.intact(self.path):
            return self.path / name
        raise RunError(
            f"The file '{name}' of this artifact is missing or damaged.",
            hint="Delete the artifact's folder and run again to make it anew.",
            code="damaged-artifact",
            where=str(self.path),
        )


class ArtifactSource(Source):
    """The shards of an artifact made by a map step; those that came out empty are left out.

    Args:
        artifact: a finished artifact of kind ``table``.
    """

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        return tuple(
            Shard(
                name=record["name"],
                identity=f"{self.artifact.identity}/{record['name']}",
                rows=record["rows"],
                location={"files": record["files"], "offset": record["offset"]},
            )
            for record in self.artifact.shards
            if record["rows"]
        )

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.artifact.manifest["classes"])

    @cached_property
    def identity(self) -> str:
        return self.artifact.identity

    @cached_property
    def _format(self) -> Format:
        spec = dict(self.artifact.manifest["writer"])
        return formats.get(spec.pop("name"))(**spec)

    def read(self, shard: Shard) -> pa.Table:
        for entry in shard.location["files"]:
            self.artifact.file(entry["path"])
        return self._format.read(
            self.artifact.path, shard.name, shard.location["offset"], shard.rows or 0
        )

    def bytes(self) -> int:
        """Size of the files, in bytes."""
        return sum(entry.bytes for entry in self.artifact.files.values())


def writer_spec(writer: Format) -> dict[str, Any]:
    """How a manifest names the format, so that :class:`ArtifactSource` finds it again."""
    return {"name": writer.name, **asdict(writer)}
