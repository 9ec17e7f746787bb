"""A store that keeps what it fetches on a local disk."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pipeline.digest import digest
from pipeline.storage.store import FileInfo, Store, make_folder

NAME = 64
"""Length of a kept file's name: a SHA-256 in hexadecimal digits."""
LEFT_SECONDS = 24 * 3600
"""After which what is not a kept file is of a process that was killed."""


@dataclass(frozen=True)
class CachedStore(Store):
    """Another store whose files are read from a local folder once they were fetched.

    A kept file counts for one version of one file, so it is never stale. Several processes may
    share the folder. The files used longest ago go first.

    Args:
        base: where the files lie.
        folder: where they are kept.
        max_bytes: of all kept files. One that is larger is kept until the next is fetched.
    """

    base: Store
    folder: Path
    max_bytes: int

    @property
    def url(self) -> str:  # type: ignore[override]
        return self.base.url

    def files(self) -> list[FileInfo]:
        return self.base.files()

    def info(self, name: str) -> FileInfo | None:
        return self.base.info(name)

    def read(self, name: str) -> bytes:
        return self.base.read(name)

    def read_many(self, names: Sequence[str]) -> list[bytes]:
        return self.base.read_many(names)

    def open(self, name: str) -> BinaryIO:
        with self.fetched([name]) as folder:
            return (folder / name).open("rb")

    def create(self, name: str, file: Path) -> None:
        self.base.create(name, file)

    def replace(self, name: str, data: bytes, *, durable: bool = True) -> None:
        self.base.replace(name, data, durable=durable)

    def link(self, name: str, source: Store) -> None:
        self.base.link(name, source)

    def delete(self, name: str) -> None:
        self.base.delete(name)

    def below(self, name: str) -> CachedStore:
        return CachedStore(self.base.below(name), self.folder, self.max_bytes)

    @property
    def parent(self) -> CachedStore:
        return CachedStore(self.base.parent, self.folder, self.max_bytes)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        with self.base.scratch() as folder:
            yield folder

    @contextmanager
    def fetched(self, names: Sequence[str]) -> Iterator[Path]:
        make_folder(self.folder)
        # Links of its own: another process may take a file out at any time.
        with tempfile.TemporaryDirectory(dir=self.folder, prefix="reading-") as place:
            for name in names:
                path = Path(place, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                self._put(name, path)
            yield Path(place)

    def _put(self, name: str, path: Path) -> None:
        info = self.base.info(name)
        if info is None:
            raise FileNotFoundError(name)
        kept = self.folder / digest(self.url, name, info.bytes, info.version)
        try:
            os.link(kept, path)
            os.utime(kept)
        except FileNotFoundError:
            with self.base.fetched([name]) as folder:
                shutil.copyfile(folder / name, path)
            unfinished = self.folder / f"unfinished-{uuid.uuid4().hex}"
            os.link(path, unfinished)
            unfinished.replace(kept)
            self._make_room(kept.name)

    def _make_room(self, newest: str) -> None:
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    status = entry.stat()
                    if len(entry.name) == NAME:
                        found.append((status.st_mtime_ns, entry.name, status.st_size))
                    elif time.time() - status.st_mtime > LEFT_SECONDS:
                        _remove(Path(entry.path))
        total = sum(size for _, _, size in found)
        for _, name, size in sorted(found):
            if total <= self.max_bytes:
                break
            if name != newest:
                (self.folder / name).unlink(missing_ok=True)
                total -= size


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
