"""Files that appear whole or not at all, and records that show when they are damaged."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.digest import dumps
from pipeline.errors import RunError, UsageError
from pipeline.storage.locks import try_lock
from pipeline.storage.store import LocalStore, Store

TRIES, PAUSE = 5, 0.1
"""How often, and how many seconds apart, a lock is asked for: one who only looks holds it too."""
SEAL, END = b',\n  "sha256": "', b"\n}\n"


@dataclass(frozen=True)
class FileEntry:
    """One published file: path relative to its artifact, size in bytes and SHA-256 (hex)."""

    path: str
    bytes: int
    sha256: str

    @classmethod
    def of(cls, store: Store, name: str) -> FileEntry:
        """Measure a file, reading it through."""
        with store.open(name) as file:
            checksum, size = hashlib.sha256(), 0
            while block := file.read(2**20):
                checksum.update(block)
                size += len(block)
        return cls(name, size, checksum.hexdigest())

    def present(self, store: Store) -> bool:
        """Whether the file is there with its size (its bytes are not read)."""
        found = store.info(self.path)
        return found is not None and found.bytes == self.bytes

    def intact(self, store: Store) -> bool:
        """Whether the file is there with its size and, read through, its digest."""
        return self.present(store) and FileEntry.of(store, self.path) == self


def publish(attempt: Path, destination: Store) -> list[FileEntry]:
    """Give every file below the local folder ``attempt`` its name in ``destination``.

    Nothing is ever replaced. A name that is taken by the same bytes is left as it is: so two
    attempts at one shard, on one machine or two, need no lock to agree.

    Raises:
        RunError: a name is taken by other bytes.
    """
    local = LocalStore(attempt)
    entries = [FileEntry.of(local, info.name) for info in local.files()]
    for entry in entries:
        try:
            destination.create(entry.path, attempt / entry.path)
        except FileExistsError:
            if not entry.intact(destination):
                raise RunError(
                    "A file of this shard is there already with other bytes than the ones just "
                    "computed.",
                    hint="It was written by another version or on other hardware, or is damaged: "
                    "'pipeline repair' takes damaged files out; or choose another output folder.",
                    code="commit-conflict",
                    where=f"{destination}/{entry.path}",
                ) from None
    return entries


def seal(record: Mapping[str, Any]) -> bytes:
    """``record`` as JSON bytes with the SHA-256 of all else in a last field ``sha256``."""
    body = dumps(record)
    return body.removesuffix(END) + SEAL + hashlib.sha256(body).hexdigest().encode() + b'"' + END


def unseal(data: bytes) -> dict[str, Any]:
    """The record that :func:`seal` wrote.

    Raises:
        ValueError: the bytes are not those that were written.
    """
    start, found, rest = data.rpartition(SEAL)
    body = start + END
    if not found or rest != hashlib.sha256(body).hexdigest().encode() + b'"' + END:
        raise ValueError("its bytes do not match its digest, or it is no record of this pipeline")
    record: dict[str, Any] = json.loads(body)
    return record


def with_digest(data: bytes) -> bytes:
    """Bytes behind their SHA-256 (32 bytes)."""
    return hashlib.sha256(data).digest() + data


def without_digest(data: bytes) -> bytes | None:
    """The bytes that :func:`with_digest` was given; ``None`` where they are not those."""
    return data[32:] if hashlib.sha256(data[32:]).digest() == data[:32] else None


@contextmanager
def exclusive(store: Store) -> Iterator[None]:
    """Hold a local folder for this process; the kernel lets go of it when the process dies.

    An object store has no such lock, and there nothing is held: see
    :func:`pipeline.orchestration.live.hold`, which knows both.

    Raises:
        UsageError: the folder cannot be made or written.
        RunError: another process holds it.
    """
    if not isinstance(store, LocalStore):
        yield
        return
    folder = store.root
    try:
        for left in reversed(range(TRIES)):
            if lock := try_lock(folder / "lock"):
                break
            if left:
                time.sleep(PAUSE)
    except OSError as error:
        raise UsageError(
            f"The output folder cannot be written: {error.strerror or error}.",
            hint="Choose an output folder that you can write.",
            code="unwritable-output",
            where=str(folder.parent),
        ) from error
    if lock is None:
        raise RunError(
            "Another run is writing this output folder.",
            hint="Wait until it ends, or choose another output folder.",
            code="output-busy",
            where=str(folder.parent),
        )
    with lock:
        yield
