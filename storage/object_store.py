"""Stores in object stores, through fsspec."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, cast

from pipeline.errors import PipelineError, RunError, UsageError
from pipeline.storage.store import FileInfo, Store

WRITABLE = ("s3", "s3a", "gs", "gcs", "memory")
"""Protocols with a conditional put; only with one can two writers never overwrite each other."""


@dataclass(frozen=True)
class ObjectStore(Store):
    """A prefix in anything that fsspec opens: ``s3://``, ``gs://``, ``hf://``, ``https://``.

    Credentials and endpoints come from the environment, as each protocol's own tools take them.
    Objects appear whole; ``create`` is a conditional put, in parts where the file is large.
    """

    url: str

    @property
    def _fs(self) -> Any:
        return file_system(self.url.partition("://")[0])

    def _path(self, name: str = "") -> str:
        return f"{self.url}/{name}" if name else self.url

    @contextmanager
    def _asking(self, name: str = "") -> Iterator[Any]:
        """The file system; what it raises becomes an error that says what to do."""
        try:
            yield self._fs
        except (FileNotFoundError, FileExistsError, PipelineError):
            raise
        except Exception as error:
            raise RunError(
                f"The storage did not do what it was asked: {type(error).__name__}: {error}.",
                hint="Check the address, the credentials and the rights that they give; then start "
                "the same command again.",
                code="storage-error",
                where=self._path(name),
            ) from error

    def files(self) -> list[FileInfo]:
        with self._asking() as fs:
            root = fs._strip_protocol(self.url)  # noqa: SLF001 - part of its plug-in API
            found = fs.find(root, detail=True)
        infos = [_info(path.removeprefix(root).lstrip("/"), item) for path, item in found.items()]
        return sorted((info for info in infos if info.name), key=lambda info: info.name)

    def info(self, name: str) -> FileInfo | None:
        try:
            with self._asking(name) as fs:
                found = fs.info(self._path(name))
        except FileNotFoundError:
            return None
        return None if found.get("type") == "directory" else _info(name, found)

    def open(self, name: str) -> BinaryIO:
        with self._asking(name) as fs:
            return cast("BinaryIO", fs.open(self._path(name), "rb"))

    def read(self, name: str) -> bytes:
        with self._asking(name) as fs:
            return cast("bytes", fs.cat_file(self._path(name)))

    def read_many(self, names: Sequence[str]) -> list[bytes]:
        if not names:
            return []
        # Many small objects are fetched at once: one after the other each waits for the network.
        # Not by 'cat', which takes the brackets in a name for a pattern.
        with self._asking() as fs:
            paths = [self._path(name) for name in names]
            found = fs.cat_ranges(paths, None, None, on_error="raise")
            for data in found:
                if isinstance(data, BaseException):
                    raise data
            return list(found)

    def create(self, name: str, file: Path) -> None:
        self._check_writable()
        with self._asking(name) as fs:
            fs.put_file(str(file), self._path(name), mode="create")

    def link(self, name: str, source: Store) -> None:
        self._check_writable()
        if self.info(name) is not None:
            raise FileExistsError(name)
        with self._asking(name) as fs:
            fs.cp_file(f"{source.url}/{name}", self._path(name))

    def replace(self, name: str, data: bytes, *, durable: bool = True) -> None:
        self._check_writable()
        with self._asking(name) as fs:
            fs.pipe_file(self._path(name), data)

    def _check_writable(self) -> None:
        protocol = self.url.partition("://")[0]
        if protocol not in WRITABLE:
            raise UsageError(
                f"Nothing can be written to '{protocol}://'.",
                hint="Choose a local folder, or one at s3:// or gs://.",
                code="unwritable-output",
                where=self.url,
            )

    def delete(self, name: str) -> None:
        try:
            with self._asking(name) as fs:
                fs.rm_file(self._path(name))
        except FileNotFoundError:
            return

    def below(self, name: str) -> ObjectStore:
        return ObjectStore(self._path(name))

    @property
    def parent(self) -> ObjectStore:
        return ObjectStore(self.url.rpartition("/")[0])

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)

    @contextmanager
    def fetched(self, names: Sequence[str]) -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as folder:
            for name in names:
                path = Path(folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                with self._asking(name) as fs:
                    fs.get_file(self._path(name), str(path))
            yield Path(folder)


def _info(name: str, found: dict[str, Any]) -> FileInfo:
    marks = ("ETag", "etag", "sha256", "blob_id", "md5Hash", "LastModified", "mtime", "created")
    version = next((found[mark] for mark in marks if found.get(mark)), "")
    if isinstance(version, datetime):  # some file systems list a time in another form than 'info'
        version = version.timestamp()
    return FileInfo(name, int(found["size"] or 0), str(version))


@lru_cache(maxsize=16)
def file_system(protocol: str) -> Any:
    """The fsspec file system of a protocol.

    Raises:
        UsageError: it needs a package that is not installed, or there is none.
    """
    import fsspec

    try:
        # Listings are not remembered: other processes write to the same place.
        return fsspec.filesystem(protocol, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise UsageError(
            f"URLs of '{protocol}://' cannot be opened: {error}.",
            hint="Install the file system's package: s3fs for s3, gcsfs for gs, huggingface_hub "
            "for hf, aiohttp for https.",
            code="missing-file-system",
        ) from error
