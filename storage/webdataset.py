"""WebDataset: tar files whose members share a key and differ in their extension."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import pyarrow as pa

from pipeline.digest import digest
from pipeline.errors import RunError
from pipeline.storage.classes import numbered
from pipeline.storage.formats import Region
from pipeline.storage.image_column import encoded, extension_of
from pipeline.storage.images import EXTENSIONS
from pipeline.storage.source import ROW, Shard, Source, shard_names
from pipeline.storage.store import FileInfo, Store, storage_error
from pipeline.storage.tar import TarError, open_tar, read_members
from pipeline.tensors import is_tensor, tensor_column, to_numpy

Sample = dict[str, bytes | None]
Members = dict[str, bytes]


def read_samples(file: BinaryIO, name: str) -> list[tuple[str, Sample]]:
    """The samples of a tar file: key, and bytes by extension, in the order of first members.

    Members of one sample may lie apart. A member that is there twice begins another sample of the
    same key. What is not a regular file has no bytes. A member whose name has no extension or
    begins with a dot belongs to no sample: README, ``._1.png``.

    Raises:
        TarError: the archive is damaged.
    """
    samples: dict[str, Sample] = {}
    again: list[tuple[str, Sample]] = []
    for member in read_members(open_tar(file, name)):
        stem, dot, extension = member.name.rpartition("/")[2].partition(".")
        if not stem or not dot:
            continue
        key = member.name[: len(member.name) - len(extension) - 1]
        sample = samples.setdefault(key, {})
        if extension.lower() in sample:
            again.append((key, {extension.lower(): member.data}))
        else:
            sample[extension.lower()] = member.data
    return [*samples.items(), *again]


@dataclass(frozen=True)
class WebDatasetSource(Source):
    """Tar shards, optionally gzipped.

    The label comes from the member ``cls`` (a decimal number) or from ``label`` in ``json``. A
    sample without an image keeps what it has in its place, so that nothing is lost.
    """

    store: Store
    files: tuple[FileInfo, ...]
    class_names: tuple[str, ...] = ()

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Names by label; where none were given the numbers up to the highest label there is."""
        if self.class_names:
            return self.class_names
        return numbered(max(map(self._top_label, self.shards), default=-1), str(self.store))

    def lean(self) -> WebDatasetSource:
        return replace(self, files=(), class_names=self.classes)

    def _top_label(self, shard: Shard) -> int:
        labels = (label_of(sample) for _, sample in self._samples(shard))
        return max((label for label in labels if label is not None), default=-1)

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        return tuple(
            Shard(name, digest(info.mark, "webdataset"), None, {"file": info.name}, info.bytes)
            for name, info in zip(shard_names(self.files), self.files, strict=True)
        )

    def read(self, shard: Shard) -> pa.Table:
        samples = self._samples(shard)
        columns: dict[str, list[Any]] = {
            "key": [key for key, _ in samples],
            "image": [_image_of(sample) for _, sample in samples],
        }
        if not self.classes:
            return pa.table(columns, pa.schema([ROW.field("key"), ROW.field("image")]))
        columns["label"] = [label_of(sample) for _, sample in samples]
        return pa.table(columns, ROW)

    def _samples(self, shard: Shard) -> list[tuple[str, Sample]]:
        name = shard.location["file"]
        with _whole(f"{self.store}/{name}"), self.store.open(name) as file:
            return read_samples(file, name)


def label_of(sample: Sample) -> int | None:
    """The label that a sample states, or ``None`` where that is no whole number of 64 bits."""
    try:
        if "cls" in sample:
            label = int(sample["cls"] or b"")
        else:
            stated = json.loads(sample["json"] or b"")["label"]
            label = int(stated)
            if isinstance(stated, bool) or (isinstance(stated, float) and stated != label):
                return None
    except (KeyError, ValueError, TypeError, OverflowError, RecursionError):
        return None
    return label if abs(label) < 2**63 else None


def _image_of(sample: Sample) -> bytes | None:
    others = [name for name in sample if name not in {"cls", "json"}]
    images = [name for name in others if name.rpartition(".")[2] in EXTENSIONS]
    # 'png' is the image rather than 'depth.jpg'.
    chosen = sorted(images or others, key=lambda name: (name.count("."), name))
    return sample[chosen[0]] if chosen else None


@contextmanager
def _whole(where: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise storage_error(error, where) from error
    except TarError as error:
        raise RunError(
            f"The tar file cannot be read: {error}.",
            hint="Fetch or write this shard anew.",
            code="damaged-tar",
            where=where,
        ) from error


@dataclass(frozen=True)
class WebDatasetFormat:
    """One or more tars a shard: image, tensors as ``npy``, label as ``cls``, other columns as JSON.

    The member of a tensor column has the column's name, as in ``tokens.npy``. Time, owner and mode
    of every member are fixed. A member's name is the key without an image's extension; other dots
    are written as ``%2E`` (and a percent sign as ``%25``), since readers take the key up to the
    first dot. The JSON member holds the key as it is.

    Args:
        max_bytes: a tar that would hold more bytes of images and tensors is followed by another; 0
            for no limit.
    """

    max_bytes: int = 0

    name: ClassVar[str] = "webdataset"
    regular: ClassVar[bool] = False

    def write(self, table: pa.Table, directory: Path, region: Region) -> None:
        stems = _stems(table["key"].to_pylist())
        size, part, tar = 0, 0, _create(directory / f"{region.name}.tar")
        for stem, (members, told) in zip(stems, members_of(table), strict=True):
            own = sum(len(data) for data in members.values())
            if size and 0 < self.max_bytes < size + own:
                tar.close()
                size, part = 0, part + 1
                tar = _create(directory / f"{region.name}-{part:03d}.tar")
            size += own
            for extension, data in (members | told).items():
                _add(tar, f"{stem}.{extension}", data)
        tar.close()

    def read(self, directory: Path, name: str, offset: int, rows: int) -> pa.Table:
        records: list[dict[str, Any]] = []
        part = 0
        while len(records) < rows:
            path = directory / (f"{name}-{part:03d}.tar" if part else f"{name}.tar")
            if not path.is_file():
                break
            with _whole(str(path)), path.open("rb") as file:
                samples = read_samples(file, path.name)
            records += [_record(sample) for _, sample in samples]
            part += 1
        if len(records) != rows:
            raise RunError(
                f"There are {len(records)} samples where the manifest says {rows}.",
                hint="Fetch or write this shard anew.",
                code="damaged-tar",
                where=str(directory / f"{name}.tar"),
            )
        first = records[0].items() if records else ()
        arrays = [column for column, value in first if isinstance(value, np.ndarray)]
        tensors = {column: np.stack([r.pop(column) for r in records]) for column in arrays}
        table = pa.Table.from_pylist(records)
        for column, values in tensors.items():
            table = table.append_column(column, tensor_column(values))
        return table


def members_of(table: pa.Table) -> Iterator[tuple[Members, Members]]:
    """The members of each sample by extension: images and tensors, and what is told of them."""
    heavy = [f.name for f in table.schema if is_tensor(f.type) or f.name == "image"]
    others = table.drop_columns(heavy).to_pylist()
    columns = [_members(name, table[name]) for name in heavy]
    for other, *members in zip(others, *columns, strict=True):
        told = {"json": json.dumps(other, sort_keys=True).encode()}
        if isinstance(other.get("label"), int):
            told = {"cls": str(other["label"]).encode(), **told}
        yield dict(members), told


def _members(name: str, column: pa.ChunkedArray) -> Iterator[tuple[str, bytes]]:
    """Extension and bytes of a column's member of each sample."""
    if name == "image":
        yield from ((extension_of(data), data) for data in encoded(column))
        return
    for value in to_numpy(column):
        file = io.BytesIO()
        np.save(file, value, allow_pickle=False)
        yield f"{name}.npy", file.getvalue()


def _record(sample: Sample) -> dict[str, Any]:
    """The columns of a sample that :class:`WebDatasetFormat` wrote."""
    arrays = {
        name.removesuffix(".npy"): np.load(io.BytesIO(data or b""), allow_pickle=False)
        for name, data in sample.items()
        if name.endswith(".npy")
    }
    images = {n: d for n, d in sample.items() if n.rpartition(".")[2] not in {"npy", "cls", "json"}}
    image = {"image": next(iter(images.values()))} if images else {}
    return {**json.loads(sample["json"] or b""), **image, **arrays}


def _stems(keys: list[str]) -> list[str]:
    short = [key[: key.rindex(".")] if _is_image(key) else key for key in keys]
    count = Counter(short)
    # a.jpg and a.png would become one sample: then both keep their extension.
    chosen = [s if count[s] == 1 else key for s, key in zip(short, keys, strict=True)]
    if len(set(chosen)) < len(chosen):
        chosen = keys
    return [_escaped(stem) for stem in chosen]


def _is_image(key: str) -> bool:
    stem, dot, extension = key.rpartition(".")
    return bool(dot and stem) and not stem.endswith("/") and extension.lower() in EXTENSIONS


def _escaped(stem: str) -> str:
    escaped = stem.replace("%", "%25").replace(".", "%2E").replace("\0", "%00")
    # An absolute name is a trap for those who extract the tar, and a hidden one is no sample.
    if escaped.startswith("/"):
        escaped = "%2F" + escaped[1:]
    if escaped.endswith("/"):
        escaped = escaped[:-1] + "%2F"
    return escaped or "%"


def _create(path: Path) -> tarfile.TarFile:
    return tarfile.open(path, "w", format=tarfile.PAX_FORMAT)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mode = 0o644
    tar.addfile(info, io.BytesIO(data))
