"""Locks on local files. The kernel lets go of them when the last process that holds them dies."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pipeline.storage.store import make_folder


@contextmanager
def waiting_lock(path: Path) -> Iterator[None]:
    """Hold the lock on ``path``, waiting for whoever holds it now. For short sections only."""
    make_folder(path.parent)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def try_lock(path: Path) -> BinaryIO | None:
    """The file ``path`` locked for as long as it stays open; ``None`` where it is held.

    A child process that inherits the file holds the lock with us, and after us.
    """
    make_folder(path.parent)
    file = path.open("a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock on ``path``. Nothing is written: who asks may only read."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return False
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
