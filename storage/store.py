"""Where files lie: a folder on a disk, or a prefix of an object store."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import RunError


@dataclass(frozen=True)
class FileInfo:
    """A file as a listing shows it.

    Attributes:
        name: path relative to the store, with ``/``.
        bytes: size.
        version: changes when the file does: modification time, or the object store's ETag.
    """

    name: str
    bytes: int
    version: str

    @property
    def mark(self) -> list[object]:
        """What tells one version of the file from another, wherever it lies."""
        return [self.name.rpartition("/")[2], self.bytes, self.version]

    def has(self, *extensions: str) -> bool:
        """Whether the name ends with one of the extensions, in small or capital letters."""
        return self.name.lower().endswith(tuple(f".{extension}" for extension in extensions))


class Store(ABC):
    """Files by name below one place. Small, picklable, and opens nothing before it is used.

    Whoever writes uses ``create``, which never replaces, or ``replace``, which does so in one step;
    in both a file is there whole or not at all.
    """

    url: str

    @abstractmethod
    def files(self) -> list[FileInfo]:
        """Every file below, sorted by name; empty where there is no such place."""

    def sizes(self) -> Iterator[tuple[str, int]]:
        """Name and size in bytes of every file below, in any order."""
        return ((info.name, info.bytes) for info in self.files())

    @abstractmethod
    def info(self, name: str) -> FileInfo | None:
        """What a listing says of one file; ``None`` where there is no such file."""

    @abstractmethod
    def open(self, name: str) -> BinaryIO:
        """A file for reading, with ``seek``. Raises FileNotFoundError."""

    @abstractmethod
    def create(self, name: str, file: Path) -> None:
        """Put a copy of the local ``file`` under ``name``, durably.

        Raises:
            FileExistsError: the name is taken.
        """

    @abstractmethod
    def replace(self, name: str, data: bytes, *, durable: bool = True) -> None:
        """Put ``data`` in place of whatever ``name`` was, in one step.

        Without ``durable`` a power failure may take it away again.
        """

    @abstractmethod
    def link(self, name: str, source: Store) -> None:
        """Give the file ``name`` of another store of this kind that name here as well.

        Its bytes do not travel: it is a second name on a disk, a copy within an object store.

        Raises:
            FileExistsError: the name is taken.
            FileNotFoundError: there is no such file.
        """

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove a file; one that is not there is no error."""

    @abstractmethod
    def below(self, name: str) -> Store:
        """The store of a folder in this one."""

    @property
    @abstractmethod
    def parent(self) -> Store:
        """The store of the folder that this one lies in."""

    def beside(self, name: str) -> Store:
        """The store of a folder next to this one."""
        return self.parent.below(name)

    @abstractmethod
    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A local folder to write in; it is removed at the end, whatever happens.

        Raises:
            FileNotFoundError: at the end, where another has cleared it away: what was read from it
                may be a part of what was written.
        """

    @abstractmethod
    @contextmanager
    def fetched(self, names: Sequence[str]) -> Iterator[Path]:
        """A local folder in which the named files lie."""

    def writing_in(self, name: str) -> Store:
        """This store, with what is not finished yet in its folder ``name`` if it must be in one."""
        return self

    def clear(self) -> None:  # noqa: B027 - an object store keeps nothing unfinished
        """Remove what writers that died have left unfinished."""

    def remove(self) -> None:
        """Delete every file."""
        for file in self.files():
            self.delete(file.name)

    def read(self, name: str) -> bytes:
        """A whole file. Raises FileNotFoundError."""
        with self.open(name) as file:
            return file.read()

    def read_many(self, names: Sequence[str]) -> list[bytes]:
        """Several whole files."""
        return [self.read(name) for name in names]

    def __str__(self) -> str:
        return self.url


@dataclass(frozen=True)
class LocalStore(Store):
    """A folder. Files are published by hard link, which never replaces, and synced to disk."""

    root: Path
    unfinished: Path | None = None
    """Folder on the same file system for what is being written; ``root`` where not given."""

    @property
    def url(self) -> str:  # type: ignore[override]
        return str(self.root)

    def files(self) -> list[FileInfo]:
        found = (FileInfo(name, s.st_size, str(s.st_mtime_ns)) for name, s in self._walk())
        return sorted(found, key=lambda info: info.name)

    def sizes(self) -> Iterator[tuple[str, int]]:
        return ((name, status.st_size) for name, status in self._walk())

    def _walk(self) -> Iterator[tuple[str, os.stat_result]]:
        folders = [""] if self.root.is_dir() else []
        while folders:
            folder = folders.pop()
            with os.scandir(self.root / folder) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(f"{folder}{entry.name}/")
                    elif entry.is_file():
                        yield f"{folder}{entry.name}", entry.stat()

    def info(self, name: str) -> FileInfo | None:
        path = self.root / name
        if not path.is_file():
            return None
        status = path.stat()
        return FileInfo(name, status.st_size, str(status.st_mtime_ns))

    def open(self, name: str) -> BinaryIO:
        return (self.root / name).open("rb")

    def create(self, name: str, file: Path) -> None:
        final = self.root / name
        make_folder(final.parent)
        sync(file)
        os.link(file, final)
        sync(final.parent)

    def link(self, name: str, source: Store) -> None:
        if not isinstance(source, LocalStore):
            raise TypeError("a file on a disk is linked to one on the same disk")
        final = self.root / name
        make_folder(final.parent)
        os.link(source.root / name, final)
        sync(final.parent)

    def replace(self, name: str, data: bytes, *, durable: bool = True) -> None:
        final = self.root / name
        make_folder(final.parent)
        folder = self.unfinished or final.parent
        make_folder(folder)
        temporary = folder / f".{final.name}.{uuid.uuid4().hex}"
        try:
            with temporary.open("wb") as file:
                file.write(data)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            temporary.replace(final)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        if durable:
            sync(final.parent)

    def delete(self, name: str) -> None:
        path = self.root / name
        path.unlink(missing_ok=True)
        for parent in path.parents:
            if parent == self.root:
                break
            with suppress(OSError):  # other files lie in it, or it was never there
                parent.rmdir()

    def remove(self) -> None:
        if self.root.exists():
            shutil.rmtree(self.root)

    def below(self, name: str) -> LocalStore:
        return LocalStore(self.root / name, self.unfinished)

    @property
    def parent(self) -> LocalStore:
        return LocalStore(self.root.parent, self.unfinished)

    def writing_in(self, name: str) -> LocalStore:
        return LocalStore(self.root, self.root / name)

    def clear(self) -> None:
        if self.unfinished:
            # Away in one step: a writer that lives on finds all that it wrote, or nothing.
            with suppress(FileNotFoundError):
                self.unfinished.rename(self.unfinished.with_suffix(f".{uuid.uuid4().hex}"))
            for left in self.unfinished.parent.glob(f"{self.unfinished.name}.*"):
                shutil.rmtree(left, ignore_errors=True)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        # Not in the system's folder for such: a hard link cannot cross file systems.
        path = (self.unfinished or self.root) / uuid.uuid4().hex
        path.mkdir(parents=True)
        handle = os.open(path, os.O_RDONLY)
        try:
            yield path
            # Held open, so that no other folder can have its number.
            if not path.exists() or not os.path.samestat(path.stat(), os.fstat(handle)):
                gone = "The folder was cleared away while it was written"
                raise FileNotFoundError(errno.ENOENT, gone, str(path))
        finally:
            os.close(handle)
            shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def fetched(self, names: Sequence[str]) -> Iterator[Path]:
        yield self.root


def open_store(place: str | Path | Store) -> Store:
    """The store at a path or URL.

    Raises:
        UsageError: the URL's protocol needs a package that is not installed.
    """
    if isinstance(place, Store):
        return place
    protocol, found, rest = str(place).partition("://")
    if not found or protocol == "file":
        return LocalStore(Path(rest if found else place).absolute())
    from pipeline.storage.object_store import ObjectStore, file_system

    file_system(protocol)
    return ObjectStore(str(place).rstrip("/"))


def storage_error(error: OSError, where: str | None = None) -> RunError:
    """What a user is told when a disk or a network does not do what it was asked."""
    place = f" ('{error.filename}')" if error.filename else ""
    full = error.errno in {errno.ENOSPC, errno.EDQUOT}
    todo = "Make room there" if full else "Check the disk, the network and your rights there"
    return RunError(
        f"A file could not be read or written: {error.strerror or error}{place}.",
        hint=f"{todo}; then start the same command again: what is finished is kept.",
        code="storage-error",
        where=where,
    )


def sync(path: Path) -> None:
    """Have the system write a file or a folder's entries to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, durably."""
    missing = []
    for folder in (path, *path.parents):
        if folder.exists():
            break
        missing.append(folder)
    if not missing:
        return
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)
