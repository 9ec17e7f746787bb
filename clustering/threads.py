"""Ranges of rows done at the same time by compiled loops that do not hold the GIL."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

T = TypeVar("T")


class Threads:
    """A pool of threads; of one thread it is the calling one.

    Args:
        count: how many; the cores that this process may use where not given.
    """

    def __init__(self, count: int | None = None) -> None:
        allowed = getattr(os, "sched_getaffinity", None)
        cores = len(allowed(0)) if allowed else os.cpu_count() or 1
        self.count = count or cores
        self._pool = ThreadPoolExecutor(self.count) if self.count > 1 else None

    def split(self, work: Callable[[int, int], T], total: int, least: int = 1) -> list[T]:
        """``work(lo, hi)`` for ranges that make up 0 to ``total``, in their order.

        Args:
            work: does a range.
            total: end of the last range.
            least: what is not worth a thread of its own.
        """
        parts = min(self.count, total // max(least, 1))
        if self._pool is None or parts < 2:
            return [work(0, total)] if total else []
        edges = [total * part // parts for part in range(parts + 1)]
        return list(self._pool.map(work, edges, edges[1:]))

    def each(self, work: Callable[[int], T], total: int) -> list[T]:
        """``work(i)`` for each i below ``total``, in their order."""
        if self._pool is None:
            return [work(i) for i in range(total)]
        return list(self._pool.map(work, range(total)))

    def __enter__(self) -> Threads:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._pool:
            self._pool.shutdown()
