"""Which rows of a source are samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import RunError
from pipeline.storage.source import Source

DUPLICATE = "duplicate-key"
BAD_LABEL = "bad-label"


def screen(table: pa.Table, source: Source) -> tuple[pa.Table, pa.Table]:
    """Split what a source gave into samples, and rows that are none with ``reason`` and ``detail``.

    Not a sample is a row with an ``error`` (``unreadable``), one without image or label where the
    source has such (``no-image``, ``no-label``), with a label that no class has (``bad-label``), or
    with the key of an earlier row of its shard (``duplicate-key``).

    Raises:
        RunError: not one label belongs to a class, so that the class names must be wrong.
    """
    problems: dict[int, tuple[str, str]] = {}
    for rows, reason, details in _problems(table, len(source.classes)):
        for row, detail in zip(rows, details, strict=False):
            problems.setdefault(row, (reason, detail))
    bad = sorted(problems)
    good = table
    if bad:
        every = pa.array(range(table.num_rows), pa.int64())
        good = table.filter(pc.invert(pc.is_in(every, pa.array(bad, pa.int64()))))
    if "error" in table.column_names:
        good = good.drop_columns(["error"])
    return good, with_reasons(table, bad, [problems[row] for row in bad])


def _problems(table: pa.Table, classes: int) -> Iterator[tuple[Sequence[int], str, Iterable[str]]]:
    """Rows, reason and details of what is wrong; of a row with several the first counts."""
    names = set(table.column_names)
    if "error" in names:
        rows = pc.indices_nonzero(pc.is_valid(table["error"])).to_pylist()
        yield rows, "unreadable", table["error"].take(pa.array(rows, pa.int64())).to_pylist()
    if "image" in names:
        yield _rows(pc.is_null(table["image"])), "no-image", repeat("The sample has no image.")
    if "label" in names and classes:
        labels, missing = table["label"], pc.is_null(table["label"])
        yield _rows(missing), "no-label", repeat("The sample has no label.")
        wrong = pc.fill_null(pc.or_(pc.less(labels, 0), pc.greater_equal(labels, classes)), False)
        # Of one sample alone it cannot be told whether it or the list of names is wrong.
        if len(table) > 1 and pc.any(wrong).as_py() and pc.all(pc.or_(wrong, missing)).as_py():
            raise _wrong_labels(labels, classes)
        yield _rows(wrong), BAD_LABEL, repeat(f"Labels go from 0 to {classes - 1}.")
    if "key" in names:
        keys = table["key"].to_pylist()
        if len(set(keys)) < len(keys):
            first = {key: row for row, key in reversed(list(enumerate(keys)))}
            again = [row for row, key in enumerate(keys) if first[key] != row]
            yield again, DUPLICATE, repeat("An earlier sample of the shard has this key.")


def _rows(mask: Any) -> list[int]:
    return cast("list[int]", pc.indices_nonzero(mask).to_pylist())


def _wrong_labels(labels: pa.ChunkedArray, classes: int) -> RunError:
    low, high = pc.min_max(labels).as_py().values()
    return RunError(
        f"The labels of this shard are from {low} to {high}; there are {classes} classes.",
        hint="Labels count from 0; name every class in classes.txt, one a line.",
        code="bad-labels",
    )


def with_reasons(table: pa.Table, rows: list[int], problems: list[tuple[str, str]]) -> pa.Table:
    """The given rows with ``reason`` and ``detail``, as quarantine keeps them."""
    chosen = table.take(pa.array(rows, pa.int64()))
    for index, name in enumerate(("reason", "detail")):
        column = pa.array([problem[index] for problem in problems], pa.string())
        chosen = chosen.append_column(name, column)
    return chosen


def tally(reasons: Sequence[str]) -> dict[str, int]:
    """How often each reason is there, by reason."""
    return {reason: reasons.count(reason) for reason in sorted(set(reasons))}
