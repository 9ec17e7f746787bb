"""Figures, tables and foreign text on a terminal."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.errors import UsageError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def printable(line: str) -> str:
    """A line that moves no cursor and changes no colour: keys and names are what others wrote."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode()
                   for c in line)  # fmt: skip


def flat(values: Any, name: str = "") -> dict[str, Any]:
    """Nested mappings and lists as one mapping with names such as ``image.size``."""
    if isinstance(values, Mapping) and values:
        items = list(values.items())
    elif isinstance(values, list) and any(isinstance(item, Mapping | list) for item in values):
        items = list(enumerate(values))
    else:
        return {name: values}
    return {
        path: value
        for key, item in items
        for path, value in flat(item, f"{name}.{key}" if name else str(key)).items()
    }


def grid(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines with columns of one width, indented by two."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[c.ljust(w) for c, w in zip(row, widths, strict=True)] for row in rows]
    return [f"  {'  '.join(row)}".rstrip() for row in padded]


def tallied(counts: Mapping[str, int]) -> str:
    """Counts by reason in one line."""
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items())


def human(size: int) -> str:
    """A number of bytes for people."""
    number = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.1f} TB"


def parse_bytes(text: int | str) -> int:
    """``100MB``, ``1.5 GB`` or a plain number, as bytes; K, M, G and T are powers of 1,000.

    Raises:
        UsageError: it is none of these.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]?)b?\s*", str(text).lower())
    if not found or (size := int(float(found[1]) * _UNITS[found[2]])) < 1:
        raise UsageError(
            f"'{text}' is no number of bytes.",
            hint="Write it as 100MB, 1.5GB or 250000.",
            code="bad-bytes",
        )
    return size
