"""Figures, tables and foreign text on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


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
