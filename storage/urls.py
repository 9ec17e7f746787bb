"""Lists of URLs: images that are fetched when their shard is read."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property

import pyarrow as pa

from pipeline.digest import digest
from pipeline.errors import UsageError
from pipeline.storage.source import Shard, Source
from pipeline.storage.store import Store, open_store

SHARD_ROWS = 1000
CONNECTIONS = 32
ATTEMPTS = 3
MAX_BYTES = 256 * 2**20
REMOTE = ("http", "https", "s3", "gs", "hf")
SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "url": pa.string(),
        "image": pa.binary(),
        "label": pa.int64(),
        "error": pa.string(),
    }
)


@dataclass(frozen=True)
class UrlSource(Source):
    """Runs of 1,000 URLs; the key is the URL. What cannot be fetched has an ``error`` instead.

    Args:
        store: the folder of the list; what is not a URL is a path in it.
        urls: in their order.
        labels: of the URLs, ``None`` where one has none; not given where none has any.
        classes: names by label.
    """

    store: Store
    urls: tuple[str, ...]
    labels: tuple[int | None, ...] | None = None
    classes: tuple[str, ...] = ()

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        return tuple(self._shard(start) for start in range(0, len(self.urls), SHARD_ROWS))

    def _shard(self, start: int) -> Shard:
        urls = self.urls[start : start + SHARD_ROWS]
        labels = self.labels and self.labels[start : start + SHARD_ROWS]
        identity = digest(urls, labels)
        place = {"urls": list(urls), "labels": labels and list(labels)}
        return Shard(f"{start // SHARD_ROWS:05d}", identity, len(urls), place)

    def lean(self) -> UrlSource:
        return replace(self, urls=(), labels=None)

    def read(self, shard: Shard) -> pa.Table:
        return self._fetch(shard, range(len(shard.location["urls"])))

    def take(self, shard: Shard, keys: Sequence[str]) -> pa.Table:
        wanted, urls = frozenset(keys), shard.location["urls"]
        return self._fetch(shard, [row for row, url in enumerate(urls) if url in wanted])

    def _fetch(self, shard: Shard, rows: Sequence[int]) -> pa.Table:
        urls = [shard.location["urls"][row] for row in rows]
        labels = shard.location["labels"]
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            found = list(pool.map(self._get, urls))
        columns = {
            "key": urls,
            "url": urls,
            "image": [data for data, _ in found],
            "label": [labels[row] if labels else None for row in rows],
            "error": [error for _, error in found],
        }
        table = pa.table(columns, SCHEMA)
        return table if labels else table.drop_columns(["label"])

    def _get(self, url: str) -> tuple[bytes | None, str | None]:
        if refusal := _refusal(url):
            return None, refusal
        folder, _, name = url.rpartition("/") if "://" in url else ("", "", url)
        problem = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(2**attempt / 8)
            try:
                store = open_store(folder) if folder else self.store
                with store.open(name) as file:
                    data = file.read(MAX_BYTES + 1)
            except Exception as error:  # noqa: BLE001 - every protocol has errors of its own
                cause = _first_cause(error)
                problem = f"{type(cause).__name__}: {cause}"
                if _is_final(cause):
                    break
            else:
                large = len(data) > MAX_BYTES
                return (None, f"more than {MAX_BYTES:,} bytes") if large else (data, None)
        return None, problem


def _refusal(url: str) -> str | None:
    """Why this is never fetched."""
    protocol, remote, rest = url.partition("://")
    if not remote:
        outside = not url or url.startswith("/") or ".." in url.split("/")
        return "a path in a list must lie below the list's own folder" if outside else None
    if protocol not in REMOTE:
        return f"'{protocol}://' is not fetched; accepted are {', '.join(REMOTE)}"
    place, _, name = rest.rpartition("/")
    return None if place and name else "this URL names no file"


def _first_cause(error: BaseException) -> BaseException:
    """What an error was made of: fsspec calls whatever a web server answers a missing file."""
    while error.__cause__:
        error = error.__cause__
    return error


def _is_final(error: BaseException) -> bool:
    """Whether asking again is of no use: a wrong address, or a server that says no."""
    status = getattr(error, "status", 0)
    refused = 400 <= status < 500 and status not in {408, 429}
    kinds = (ValueError, UsageError, FileNotFoundError, IsADirectoryError, PermissionError)
    return refused or isinstance(error, kinds)
