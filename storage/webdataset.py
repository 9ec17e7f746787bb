"""WebDataset: tar files whose members share a key and differ in their extension."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from pipeline.digest import digest
from pipeline.errors import RunError
from pipeline.storage.formats import Region
from pipeline.storage.images import EXTENSIONS, encode_png
from pipeline.storage.listing import file_identity, shard_names
from pipeline.storage.source import Shard, Source
from pipeline.tensors import is_tensor, to_numpy

MAX_MEMBER_BYTES = 256 * 2**20
STARTS = {
    b"\x89PNG": "png",
    b"\xff\xd8": "jpg",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"II*\0": "tif",
    b"MM\0*": "tif",
    b"P5": "pgm",
    b"P6": "ppm",
}


def read_samples(path: Path) -> Iterator[dict[str, bytes | str]]:
    """The samples of a tar file as ``{"__key__": ..., extension: bytes, ...}``.

    Members are read to memory and never extracted; whatever is not a regular file is left out.

    Raises:
        RunError: the tar is damaged, a member is too large or a sample's members lie apart.
    """
    sample: dict[str, bytes | str] = {}
    seen: set[str] = set()
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isreg():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if member.size > MAX_MEMBER_BYTES:
                    raise _damaged(path, f"member '{member.name[:80]}' has {member.size} bytes")
                if key != sample.get("__key__"):
                    if sample:
                        yield sample
                    if key in seen:
                        raise _damaged(path, f"the members of sample '{key[:80]}' lie apart")
                    seen.add(key)
                    sample = {"__key__": key}
                file = tar.extractfile(member)
                data = file.read() if file else b""
                if len(data) != member.size:
                    raise _damaged(path, f"member '{member.name[:80]}' is cut short")
                sample[extension.lower()] = data
            end = tar.offset
        _check_end(path, end)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    if sample:
        yield sample


def _check_end(path: Path, offset: int) -> None:
    # tarfile takes a damaged or missing header for the end of the archive.
    with path.open("rb") as file:
        file.seek(offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise _damaged(path, f"it breaks off at byte {offset}")


def _damaged(path: Path, what: str) -> RunError:
    return RunError(
        f"The tar file cannot be read: {what}.",
        hint="Fetch or write this shard anew.",
        code="damaged-tar",
        where=str(path),
    )


@dataclass(frozen=True)
class WebDatasetSource(Source):
    """Tar shards by path.

    The label comes from the member ``cls`` (a decimal number) or from ``label`` in ``json``.
    """

    paths: tuple[Path, ...]
    class_names: tuple[str, ...] = ()

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Names by label; where none were given the numbers up to the highest label there is."""
        if self.class_names:
            return self.class_names
        top = max(
            (_label(sample, path) for path in self.paths for sample in read_samples(path)),
            default=-1,
        )
        return tuple(str(label) for label in range(top + 1))

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        return tuple(
            Shard(name, digest(file_identity(path), "webdataset"), None, {"path": str(path)})
            for name, path in zip(shard_names(self.paths), self.paths, strict=True)
        )

    def read(self, shard: Shard) -> pa.Table:
        path = Path(shard.location["path"])
        rows = [_row(sample, path) for sample in read_samples(path)]
        return pa.Table.from_pylist(rows, schema=ROW)


ROW = pa.schema({"key": pa.string(), "image": pa.binary(), "label": pa.int64()})


def _row(sample: dict[str, Any], path: Path) -> dict[str, Any]:
    image = next((sample[name] for name in sorted(sample) if name in EXTENSIONS), None)
    return {"key": sample["__key__"], "image": image, "label": _label(sample, path)}


def _label(sample: dict[str, Any], path: Path) -> int:
    try:
        return int(sample["cls"] if "cls" in sample else json.loads(sample["json"])["label"])
    except (KeyError, ValueError, TypeError) as error:
        raise _damaged(path, f"sample '{sample['__key__']}' has no label") from error


@dataclass(frozen=True)
class WebDatasetFormat:
    """One tar a shard: the image as PNG, the other columns as JSON.

    Time, owner and mode of every member are fixed. A dot in a key is written as ``%2E`` (and a
    percent sign as ``%25``), since readers take the key up to the first dot; the JSON member holds
    the key as it is.
    """

    name: ClassVar[str] = "webdataset"
    regular: ClassVar[bool] = False

    def write(self, table: pa.Table, directory: Path, region: Region) -> None:
        images = table["image"]
        pixels = to_numpy(images) if is_tensor(images.type) else None
        others = table.drop_columns(["image"]).to_pylist()
        with tarfile.open(directory / f"{region.name}.tar", "w", format=tarfile.PAX_FORMAT) as tar:
            for row, other in enumerate(others):
                stem = other["key"].replace("%", "%25").replace(".", "%2E")
                data = images[row].as_py() if pixels is None else encode_png(pixels[row])
                _add(tar, f"{stem}.{_extension(data)}", data)
                _add(tar, f"{stem}.json", json.dumps(other, sort_keys=True).encode())

    def read(self, directory: Path, name: str, offset: int, rows: int) -> pa.Table:
        path = directory / f"{name}.tar"
        records = []
        for sample in read_samples(path):
            image = next(data for part, data in sample.items() if part not in {"__key__", "json"})
            records.append({**json.loads(sample["json"]), "image": image})
        if len(records) != rows:
            raise _damaged(path, f"{len(records)} samples where the manifest says {rows}")
        return pa.Table.from_pylist(records)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mode = 0o644
    tar.addfile(info, io.BytesIO(data))


def _extension(data: bytes) -> str:
    if data[8:12] == b"WEBP":
        return "webp"
    return next((name for start, name in STARTS.items() if data.startswith(start)), "bin")
