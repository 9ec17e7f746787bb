"""Files that appear whole or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import RunError, UsageError


@dataclass(frozen=True)
class FileEntry:
    """One published file: path relative to its artifact, size in bytes and SHA-256 (hex)."""

    path: str
    bytes: int
    sha256: str

    @classmethod
    def of(cls, root: Path, path: Path) -> FileEntry:
        """Measure ``path``, which lies below ``root``."""
        with path.open("rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(path.relative_to(root).as_posix(), path.stat().st_size, checksum)

    def present(self, root: Path) -> bool:
        """Whether the file is there with its size (its bytes are not read)."""
        path = root / self.path
        return path.is_file() and path.stat().st_size == self.bytes

    def intact(self, root: Path) -> bool:
        """Whether the file is there with its size and, read through, its digest."""
        return self.present(root) and FileEntry.of(root, root / self.path) == self


def write_atomic(path: Path, data: bytes, scratch: Path | None = None) -> None:
    """Write ``data`` and put it in place of whatever ``path`` was, durably and in one step.

    Args:
        path: the file.
        data: its bytes.
        scratch: folder on the same file system for the unfinished file, which stays there if the
            process dies; beside ``path`` where not given.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if scratch:
        scratch.mkdir(parents=True, exist_ok=True)
    temporary = (scratch or path.parent) / f".{path.name}.{uuid.uuid4().hex}"
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync(path.parent)


def publish(attempt: Path, destination: Path) -> list[FileEntry]:
    """Give every file below ``attempt`` its final name below ``destination``, never replacing.

    A name that is taken by the same bytes is left as it is, so two attempts at one shard agree.

    Raises:
        RunError: a name is taken by other bytes.
    """
    destination.mkdir(parents=True, exist_ok=True)
    files = sorted(path for path in attempt.rglob("*") if path.is_file())
    entries = [FileEntry.of(attempt, path) for path in files]
    for path in files:
        _sync(path)
    folders = {destination}
    for entry in entries:
        final = destination / entry.path
        final.parent.mkdir(parents=True, exist_ok=True)
        folders.add(final.parent)
        try:
            os.link(attempt / entry.path, final)
        except FileExistsError:
            if FileEntry.of(destination, final) != entry:
                raise RunError(
                    "A file of this shard is there already with other bytes than the ones just "
                    "computed.",
                    hint="It was written by another version or on other hardware: delete it, or "
                    "choose another --out, and run again.",
                    code="commit-conflict",
                    where=str(final),
                ) from None
    for folder in folders:
        _sync(folder)
    return entries


@contextmanager
def attempt_folder(parent: Path) -> Iterator[Path]:
    """An empty folder that is removed at the end, whatever happens."""
    path = parent / uuid.uuid4().hex
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process; the kernel lets go of it when the process dies.

    Raises:
        UsageError: the folder cannot be made or written.
        RunError: another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock: Any = (folder / "lock").open("a+")
    except OSError as error:
        raise UsageError(
            f"The output folder cannot be written: {error.strerror or error}.",
            hint="Choose a folder that you can write with --out.",
            code="unwritable-output",
            where=str(folder.parent),
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                "Another run is writing this output folder.",
                hint="Wait until it ends, or choose another folder with --out.",
                code="output-busy",
                where=str(folder.parent),
            ) from None
        yield


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
