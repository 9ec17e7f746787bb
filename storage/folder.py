"""Image folders: one sub-folder a class, or a list of files with their classes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import pyarrow as pa

from pipeline.digest import digest
from pipeline.errors import RunError
from pipeline.storage.formats import Region
from pipeline.storage.image_column import encoded, extension_of
from pipeline.storage.images import EXTENSIONS
from pipeline.storage.parquet import read_table, write_table
from pipeline.storage.source import ROW, Shard, Source
from pipeline.storage.store import FileInfo, Store, storage_error

SHARD_ROWS = 1024
INDEX = ".index"
LONGEST = 250  # bytes of a file's name that every file system takes


@dataclass(frozen=True)
class FolderSource(Source):
    """Image files in their order, cut into shards of 1,024. The key is the path in ``store``.

    Args:
        store: the folder.
        files: the image files in it.
        classes: names by label. None where the images have no labels.
        class_of: class name of each file; the first part of its path where not given. A file of no
            known class has no label.
    """

    store: Store
    files: tuple[FileInfo, ...]
    classes: tuple[str, ...] = ()
    class_of: tuple[str, ...] | None = None

    @cached_property
    def _classes_of(self) -> Sequence[str]:
        return self.class_of or [sys.intern(first_folder(file)) for file in self.files]

    def lean(self) -> FolderSource:
        return replace(self, files=(), class_of=None)

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        return tuple(self._shard(start) for start in range(0, len(self.files), SHARD_ROWS))

    def _shard(self, start: int) -> Shard:
        files = self.files[start : start + SHARD_ROWS]
        classes = self._classes_of[start : start + SHARD_ROWS]
        # One text, since there may be millions of files; no name or version holds a NUL.
        facts = [f"{f.name}\0{f.bytes}\0{f.version}" for f in files]
        identity = digest("\0".join([*facts, *classes]))
        size = sum(file.bytes for file in files)
        place: dict[str, Any] = {"names": [file.name for file in files]}
        if self.classes:
            place["classes"] = list(classes)
        return Shard(f"{start // SHARD_ROWS:05d}", identity, len(files), place, size)

    def read(self, shard: Shard) -> pa.Table:
        names = shard.location["names"]
        # A name that is no UTF-8 has its other bytes by their codes.
        keys = [name.encode(errors="backslashreplace").decode() for name in names]
        columns: dict[str, Any] = {"key": keys, "image": self._images(names)}
        if not self.classes:
            return pa.table(columns, pa.schema([ROW.field("key"), ROW.field("image")]))
        label = {name: index for index, name in enumerate(self.classes)}
        columns["label"] = [label.get(name) for name in shard.location["classes"]]
        return pa.table(columns, ROW)

    def _images(self, names: Sequence[str]) -> list[bytes]:
        try:
            return self.store.read_many(names)
        except OSError as error:
            raise storage_error(error, str(self.store)) from error


def first_folder(file: FileInfo) -> str:
    """The first folder of the path of a file; empty where it lies in none."""
    return file.name.partition("/")[0] if "/" in file.name else ""


@dataclass(frozen=True)
class FolderFormat:
    """Each image as a file ``<class>/<key>``, as it is; keys and other columns below ``.index``.

    A key that begins with its class's folder is not put into it once more, and one that has an
    image's extension gets no other. What a path must not have in a key is escaped with ``%``.

    Args:
        classes: names of the folders by label.
    """

    classes: tuple[str, ...] = ()

    name: ClassVar[str] = "folder"
    regular: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))

    def write(self, table: pa.Table, directory: Path, region: Region) -> None:
        names = []
        others = table.drop_columns(["image"])
        for row, data in zip(others.to_pylist(), encoded(table["image"]), strict=True):
            names.append(self._path(row["key"], row.get("label"), data))
            path = directory / names[-1]
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("xb") as file:
                    file.write(data)
            except (FileExistsError, NotADirectoryError):
                raise RunError(
                    f"Two samples would be the file '{names[-1]}', or one a folder of the other.",
                    hint="Give every sample a key of its own, or choose another format.",
                    code="duplicate-keys",
                ) from None
        (directory / INDEX).mkdir()
        index = others.append_column("file_name", pa.array(names, pa.string()))
        write_table(index, directory / INDEX / f"{region.name}.parquet")

    def read(self, directory: Path, name: str, offset: int, rows: int) -> pa.Table:
        index = read_table(directory / INDEX / f"{name}.parquet")
        images = [(directory / path).read_bytes() for path in index["file_name"].to_pylist()]
        table = index.drop_columns(["file_name"])
        return table.append_column("image", pa.array(images, pa.binary()))

    def _path(self, key: str, label: object, data: bytes) -> str:
        folder = self.classes[label] if isinstance(label, int) and self.classes else ""
        parts = [_safe(part) for part in key.split("/")]
        if folder and (len(parts) == 1 or parts[0] != _safe(folder)):
            parts.insert(0, _safe(folder))
        if PurePosixPath(key).suffix.lower().removeprefix(".") not in EXTENSIONS:
            parts[-1] += f".{extension_of(data)}"
        return "/".join(parts)


def _safe(part: str) -> str:
    """A path's part that names something in its folder and nowhere else."""
    part = part.replace("\0", "%00").replace("\\", "%5C")
    if not part.strip(".") or part.startswith("."):
        part = part.replace(".", "%2E") or "%"
    if len(part.encode()) > LONGEST:
        short = part.encode()[: LONGEST - 70].decode(errors="ignore")
        suffix = PurePosixPath(part).suffix
        part = f"{short}-{digest(part)}" + (suffix if len(suffix) < 6 else "")
    return part
