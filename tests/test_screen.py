"""Rows of a source that are no samples."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layouts import InMemory
from samples import image_table, local_run

from pipeline.errors import RunError
from pipeline.orchestration.screen import screen
from pipeline.storage.artifact import ArtifactSource
from pipeline.storage.parquet import ParquetFormat, read_table
from pipeline.storage.source import ROW

SCHEMA = pa.schema([*ROW, pa.field("error", pa.string())])
CLASSES = ("a", "b")


def of(table: pa.Table, classes: tuple[str, ...] = CLASSES) -> InMemory:
    return InMemory((("0", table),), classes)


def row(
    key: str, image: bytes | None = b"x", label: int | None = 0, error: str | None = None
) -> Any:
    return {"key": key, "image": image, "label": label, "error": error}


REASONS = [
    (row("b", error="HTTP 404"), "unreadable", "HTTP 404"),
    (row("b", error=""), "unreadable", ""),
    (row("b", None, None, "gone"), "unreadable", "gone"),
    (row("a", None, 9, "gone"), "unreadable", "gone"),
    (row("b", None), "no-image", "has no image"),
    (row("b", None, None), "no-image", "has no image"),
    (row("b", b"x", None), "no-label", "has no label"),
    (row("b", b"x", 2), "bad-label", "from 0 to 1"),
    (row("b", b"x", -1), "bad-label", "from 0 to 1"),
    (row("a", b"y", 1), "duplicate-key", "earlier sample"),
    (row("a", b"y", None), "no-label", "has no label"),
]


@pytest.mark.parametrize(("wrong", "reason", "detail"), REASONS)
def test_each_reason_is_given_with_the_row_as_it_was(wrong: Any, reason: str, detail: str) -> None:
    table = pa.Table.from_pylist([row("a"), wrong, row("c")], SCHEMA)
    good, bad = screen(table, of(table))
    assert good.to_pylist() == [{"key": key, "image": b"x", "label": 0} for key in ("a", "c")]
    (found,) = bad.to_pylist()
    assert detail in found.pop("detail")
    assert found.pop("reason") == reason
    assert found == wrong


VALUES = st.builds(
    row,
    st.sampled_from("abcdefgh"),
    st.sampled_from([b"", b"x", None]),
    st.sampled_from([0, 1, 1, 1, -1, 2, None]),
    st.sampled_from([None, None, None, "gone", ""]),
)


def expected(rows: list[Any]) -> list[str | None]:
    """The reason of each row, by the words of the docstring."""
    found: list[str | None] = []
    for index, item in enumerate(rows):
        if item["error"] is not None:
            found.append("unreadable")
        elif item["image"] is None:
            found.append("no-image")
        elif item["label"] is None:
            found.append("no-label")
        elif item["label"] not in {0, 1}:
            found.append("bad-label")
        else:
            again = item["key"] in [other["key"] for other in rows[:index]]
            found.append("duplicate-key" if again else None)
    return found


@given(rows=st.lists(VALUES, max_size=12))
def test_no_row_is_lost_and_the_order_is_kept(rows: list[Any]) -> None:
    table = pa.Table.from_pylist(rows, SCHEMA)
    labels = [item["label"] for item in rows if item["label"] is not None]
    if len(rows) > 1 and labels and not {0, 1} & set(labels):
        with pytest.raises(RunError, match="bad-labels"):
            screen(table, of(table))
        return
    good, bad = screen(table, of(table))
    reasons = expected(rows)
    kept = [item for item, reason in zip(rows, reasons, strict=True) if reason is None]
    assert good.to_pylist() == [
        {name: item[name] for name in ("key", "image", "label")} for item in kept
    ]
    assert [
        {name: value for name, value in item.items() if name != "detail"}
        for item in bad.to_pylist()
    ] == [{**item, "reason": reason} for item, reason in zip(rows, reasons, strict=True) if reason]


def test_labels_that_are_all_beyond_the_classes_stop_the_run() -> None:
    table = pa.Table.from_pylist(
        [row("a", label=7), row("b", label=9), row("c", label=None)], SCHEMA
    )
    with pytest.raises(RunError, match=r"from 7 to 9; there are 2 classes.*bad-labels"):
        screen(table, of(table))
    assert screen(table, of(table, ()))[1].num_rows == 0


@pytest.mark.parametrize("columns", [["key"], ["key", "label"], ["image"], ["label", "key"]])
def test_columns_that_are_not_there_are_not_missed(columns: list[str]) -> None:
    table = image_table(4).select(columns)
    good, bad = screen(table, of(table))
    assert good.equals(table)
    assert bad.num_rows == 0
    assert bad.column_names == [*columns, "reason", "detail"]


def test_without_labels_rows_need_none() -> None:
    table = image_table(4).drop_columns(["label"])
    assert screen(table, of(table, ()))[0].num_rows == 4


def test_an_empty_shard_has_nothing_wrong() -> None:
    table = SCHEMA.empty_table()
    good, bad = screen(table, of(table))
    assert (good.num_rows, bad.num_rows) == (0, 0)


def test_tensors_are_kept_as_they_are() -> None:
    table = image_table(4).set_column(0, "key", pa.array(["a", "b", "a", "d"]))
    good, bad = screen(table, of(table))
    assert good.equals(table.take(pa.array([0, 1, 3])))
    assert bad.select(table.column_names).equals(table.take(pa.array([2])))


def test_what_was_screened_lies_in_quarantine_with_its_bytes(tmp_path: Any) -> None:
    rows = [
        row("a"),
        row("b", b"kept", None),
        row("c", None),
        row("d", error="gone"),
        row("a", b"2"),
    ]
    table = pa.Table.from_pylist(rows, SCHEMA)
    step = local_run(tmp_path, max_bad=4).map("step", of(table), [], to=ParquetFormat())
    assert isinstance(step, ArtifactSource)
    assert step.artifact.manifest["counts"] == {
        "in": 5,
        "out": 1,
        "filtered": {},
        "quarantined": {"unreadable": 1, "no-image": 1, "no-label": 1, "duplicate-key": 1},
    }
    bad = read_table(next(tmp_path.glob("step-*/quarantine/0.parquet")))
    assert bad.select(SCHEMA.names).to_pylist() == rows[1:]
    assert bad["reason"].to_pylist() == ["no-label", "no-image", "unreadable", "duplicate-key"]


def test_too_many_rows_that_are_none_stop_the_run(tmp_path: Any) -> None:
    rows = [row("a"), row("b", None)]
    table = pa.Table.from_pylist(rows, SCHEMA)
    with pytest.raises(RunError, match=r"1 no-image.*too-many-bad"):
        local_run(tmp_path).map("step", of(table), [], to=ParquetFormat())
