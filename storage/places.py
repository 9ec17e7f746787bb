"""What a path or URL of data stands for: a folder, a file, or a range of files."""

from __future__ import annotations

import re
from pathlib import Path

from pipeline.errors import UsageError
from pipeline.storage.store import FileInfo, LocalStore, Store, open_store

FILES = re.compile(r"\.(tar|tar\.gz|tgz|parquet|npz|txt)$", re.IGNORECASE)
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
MAX_RANGE = 10**6


def resolve(place: str | Path | Store) -> tuple[Store, list[FileInfo] | None]:
    """The store at a path or URL, and where that names single files these.

    Raises:
        UsageError: files of a range are not there.
    """
    store = open_store(place)
    folder, _, last = store.url.rpartition("/")
    local = isinstance(store, LocalStore)
    single = Path(store.url).is_file() if local else FILES.search(last)
    ranges = RANGE.search(last) and not (local and Path(store.url).exists())
    if not single and not ranges:
        return store, None
    parent = open_store(folder or "/")
    names = expand(last) if ranges else [last]
    infos = {name: parent.info(name) for name in names}
    missing = [name for name, info in infos.items() if info is None]
    if missing == [last]:
        return store, None  # a folder with the name of a file
    if missing:
        raise UsageError(
            f"{len(missing)} of {len(names)} files are not there: {', '.join(missing[:5])}.",
            hint="Check the range in the path.",
            code="no-data",
            where=str(place),
        )
    return parent, [info for info in infos.values() if info]


def expand(name: str) -> list[str]:
    """``a{08..10}b`` as the names ``a08b``, ``a09b``, ``a10b``."""
    found = RANGE.search(name)
    if not found:
        return [name]
    low, high = found.groups()
    if not 0 <= int(high) - int(low) < MAX_RANGE:
        raise UsageError(
            f"The range {found.group()} is empty or too long.",
            hint="Write the lower number first, as in train-{0000..0146}.tar.",
            code="bad-range",
            where=name,
        )
    before, rests = name[: found.start()], expand(name[found.end() :])
    numbers = range(int(low), int(high) + 1)
    return [f"{before}{number:0{len(low)}d}{rest}" for number in numbers for rest in rests]
