"""Files found below a folder, in one order everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def files_below(root: Path, extensions: frozenset[str]) -> list[Path]:
    """Regular files below ``root`` with one of ``extensions``, sorted by relative path."""
    found = [
        path
        for path in root.rglob("*")
        if path.suffix.lower().removeprefix(".") in extensions
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
    ]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def shard_names(paths: Sequence[Path]) -> list[str]:
    """A name for each file: its stem, after its number where two files have the same stem."""
    stems = [path.stem for path in paths]
    if len(set(stems)) == len(stems):
        return stems
    return [f"{number:05d}-{stem}" for number, stem in enumerate(stems)]


def file_identity(path: Path) -> list[object]:
    """What tells one version of a file from another without reading it: name, size and mtime."""
    status = path.stat()
    return [path.name, status.st_size, status.st_mtime_ns]
