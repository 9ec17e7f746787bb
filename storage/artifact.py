"""Places that say what they hold: a manifest, written last, and the files it lists.

The manifest of a step is small, however many shards there are: it lists a table, the index, that
holds a record of each (see :mod:`pipeline.storage.records`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.digest import dumps
from pipeline.errors import RunError, UsageError
from pipeline.storage.atomic import FileEntry, seal, unseal
from pipeline.storage.formats import Format, formats
from pipeline.storage.records import RECORDS, RecordedShards, to_records, write_records
from pipeline.storage.source import Shard, Source
from pipeline.storage.store import LocalStore, Store, storage_error

MANIFEST = "manifest.json"
INDEX = "shards.index"
SNAPSHOTS = "snapshots"
"""Folder of an output with earlier manifests, each in a folder of its own."""
VERSION = 3


@dataclass(frozen=True)
class Artifact:
    """A store and its manifest. Readers follow the manifest, never a listing."""

    store: Store
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, store: Store) -> Artifact:
        """Read the manifest in ``store``: of an output, of a step, or of an earlier snapshot.

        Raises:
            UsageError: there is none, or it is of another format version.
            RunError: it is damaged or cannot be read.
        """
        try:
            manifest = unseal(store.read(MANIFEST))
            _check_names(manifest)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UsageError(
                "There is no finished output of this pipeline here.",
                hint="Give the folder that a run wrote; a run that was stopped is finished by "
                "starting it again.",
                code="no-manifest",
                where=str(store),
            ) from error
        except OSError as error:
            raise storage_error(error, str(store)) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _bad_manifest(store, error) from error
        if manifest["format_version"] != VERSION:
            raise UsageError(
                f"This output has format version {manifest['format_version']}; this release reads "
                f"{VERSION}.",
                hint="Open it with the release that wrote it.",
                code="format-version",
                where=str(store),
            )
        # What an earlier manifest names lies where the present one names it.
        earlier = store.url.rpartition("/")[0].endswith(f"/{SNAPSHOTS}")
        return cls(store.parent.parent if earlier else store, manifest)

    @classmethod
    def exists(cls, store: Store) -> bool:
        """Whether the artifact was finished."""
        return store.info(MANIFEST) is not None

    @classmethod
    def finish(
        cls, store: Store, manifest: Mapping[str, Any], records: pa.Table | None = None
    ) -> Artifact:
        """Write the index of ``records`` and then the manifest: now the artifact is there."""
        if records is not None:
            entry = _write_index(store, records)
            manifest = {**manifest, "shards": records.num_rows, "files": [vars(entry)]}
        data = seal({"format_version": VERSION, **manifest})
        store.replace(MANIFEST, data)
        return cls(store, unseal(data))

    @property
    def name(self) -> str:
        """The last part of its path or URL."""
        return self.store.url.rstrip("/").rpartition("/")[2]

    @property
    def identity(self) -> str:
        """Digest of the configuration and inputs that made this artifact."""
        return str(self.manifest["identity"])

    @cached_property
    def sha256(self) -> str:
        """Of what the manifest says: another one is another output, whatever made it."""
        return hashlib.sha256(dumps(self.manifest)).hexdigest()

    @property
    def shards(self) -> int:
        """How many shards there are; a run has none."""
        return int(self.manifest.get("shards", 0))

    def records_table(self) -> pa.Table:
        """The records of the shards, in order.

        Raises:
            RunError: the index is missing or damaged.
        """
        if not self.shards:
            return RECORDS.empty_table()
        with self.checked([self._listed(INDEX)]) as folder:
            try:
                table = pq.read_table(folder / INDEX, schema=RECORDS)
                files = pc.list_flatten(table["files"]).combine_chunks()
                _check_paths(files.field("path").to_pylist())
            except (ValueError, pa.ArrowException) as error:
                raise _bad_manifest(self.store, error) from error
        return table

    def records(self) -> Iterator[dict[str, Any]]:
        """The records of the shards, in order. Raises as :meth:`records_table`."""
        yield from to_records(self.records_table())

    @cached_property
    def metrics(self) -> Mapping[str, Any]:
        """What a fitted artifact measured of itself."""
        return dict(next(self.records())["metrics"])

    @property
    def own(self) -> list[FileEntry]:
        """The files that the manifest itself lists: of a step its index."""
        return [FileEntry(**entry) for entry in self.manifest.get("files", ())]

    def _listed(self, name: str) -> FileEntry:
        for entry in self.own:
            if entry.path == name:
                return entry
        raise self._damaged(name)

    @cached_property
    def files(self) -> dict[str, FileEntry]:
        """Every listed file by path; one that several shards share is there once."""
        shards = (entry for record in self.records() for entry in record["files"])
        own = {entry.path: entry for entry in self.own}
        return own | {entry["path"]: FileEntry(**entry) for entry in shards}

    def adds_to(self, base: Artifact) -> bool:
        """Whether this artifact was made to add to ``base``, as that is now."""
        return self.manifest.get("base_sha256") == base.sha256

    @property
    def products(self) -> Mapping[str, str]:
        """Of a run: the folder of each product by its role."""
        return dict(self.manifest.get("products", {}))

    def product(self, role: str) -> Artifact:
        """The artifact that a published run names ``role``, once its manifest was checked.

        Raises:
            RunError: that manifest is missing or damaged.
        """
        folder = self.products[role]
        with self.checked([self._listed(f"{folder}/{MANIFEST}")]):
            return Artifact.open(self.store.below(folder))

    @contextmanager
    def checked(self, entries: Sequence[FileEntry]) -> Iterator[Path]:
        """A local folder with files whose digests were checked just now.

        Raises:
            RunError: a file is missing or has other bytes.
        """
        for entry in entries:
            if not entry.present(self.store):
                raise self._damaged(entry.path)
        with self.store.fetched([entry.path for entry in entries]) as folder:
            for entry in entries:
                if not entry.intact(LocalStore(folder)):
                    raise self._damaged(entry.path)
            yield folder

    def read(self, name: str) -> bytes:
        """The bytes of a listed file, checked.

        Raises:
            RunError: it is not listed, missing, or has other bytes.
        """
        entry = self.files.get(name)
        if entry is None:
            raise self._damaged(name)
        with self.checked([entry]) as folder:
            return (folder / name).read_bytes()

    def _damaged(self, name: str) -> RunError:
        return RunError(
            f"The file '{name}' of this artifact is missing or damaged.",
            hint="'pipeline repair' on the run's folder takes it out and makes it anew.",
            code="damaged-artifact",
            where=str(self.store),
        )


class ArtifactSource(Source):
    """The shards of an artifact made by a map step; those that came out empty are left out.

    An artifact that takes up an earlier one's quarantine names it as its ``base``: the base's
    shards come first.

    Args:
        artifact: a finished artifact of kind ``table``.
    """

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact

    @cached_property
    def artifacts(self) -> tuple[Artifact, ...]:
        """The artifacts that the shards lie in: the first base, what was added, and so on."""
        found = [self.artifact]
        while base := found[0].manifest.get("base"):
            if base in {part.name for part in found}:
                raise RunError(
                    "The manifest names itself as what it adds to.",
                    hint="Make this output anew; it was not written by a run.",
                    code="damaged-manifest",
                    where=str(self.artifact.store),
                )
            below = Artifact.open(self.artifact.store.beside(base))
            if not found[0].adds_to(below):
                raise RunError(
                    f"The output that this one adds to ('{base}') is not the one that it was.",
                    hint="'pipeline repair' on the run's folder brings both together again.",
                    code="damaged-artifact",
                    where=str(self.artifact.store),
                )
            found.insert(0, below)
        return tuple(found)

    @cached_property
    def shards(self) -> Sequence[Shard]:
        parts = []
        for number, artifact in enumerate(self.artifacts):
            table = artifact.records_table()
            table = table.filter(pc.greater(table["rows"], 0))
            column = pa.repeat(pa.scalar(number, pa.int64()), table.num_rows)
            parts.append(table.append_column("artifact", column))
        return RecordedShards(pa.concat_tables(parts))

    def lean(self) -> ArtifactSource:
        source = ArtifactSource(self.artifact)
        source.__dict__["artifacts"] = self.artifacts
        return source

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.artifact.manifest["classes"])

    @cached_property
    def identity(self) -> str:
        return self.artifact.identity

    def read(self, shard: Shard) -> pa.Table:
        place = shard.location
        artifact = self.artifacts[place["artifact"]]
        spec = dict(artifact.manifest["writer"])
        fmt: Format = formats.get(spec.pop("name"))(**spec)
        entries = [FileEntry(*entry) for entry in place["files"]]
        data = [entry for entry in entries if entry.path != quarantine_file(shard.name)]
        with artifact.checked(data) as folder:
            return fmt.read(folder, shard.name, place["offset"], shard.rows or 0)

    def bytes(self) -> int:
        """Size of the files, in bytes."""
        return sum(e.bytes for artifact in self.artifacts for e in artifact.files.values())


def _bad_manifest(store: Store, error: Exception) -> RunError:
    return RunError(
        f"The manifest is damaged: {error}.",
        hint="'pipeline repair' takes damaged files out and makes them anew.",
        code="damaged-manifest",
        where=f"{store}/{MANIFEST}",
    )


def _write_index(store: Store, records: pa.Table) -> FileEntry:
    with store.scratch() as folder:
        path = folder / INDEX
        write_records(records, path)
        entry = FileEntry.of(LocalStore(folder), INDEX)
        try:
            store.create(INDEX, path)
        except FileExistsError:
            if not entry.intact(store):
                # Of a run that died before the manifest, or was repaired: nobody reads it.
                store.delete(INDEX)
                store.create(INDEX, path)
    return entry


def _check_names(manifest: Mapping[str, Any]) -> None:
    """Raise ValueError where a manifest, which anybody may have written, names a place outside."""
    folders = [*manifest.get("products", {}).values(), *manifest.get("steps", ())]
    folders += [manifest["base"]] if "base" in manifest else []
    _check_paths([entry["path"] for entry in manifest.get("files", ())] + folders)
    if any("/" in folder or folder == "." for folder in folders):
        raise ValueError("it names a folder that is not beside it")


def _check_paths(names: Sequence[str]) -> None:
    for name in names:
        if not name or name.startswith("/") or "\0" in name or ".." in name.split("/"):
            raise ValueError(f"'{name}' is no name of a file in it")


def quarantine_file(unit: str) -> str:
    """Where a shard's samples in quarantine lie in its artifact."""
    return f"quarantine/{unit}.parquet"


def writer_spec(writer: Format) -> dict[str, Any]:
    """How a manifest names the format, so that :class:`ArtifactSource` finds it again."""
    return {"name": writer.name, **asdict(writer)}
