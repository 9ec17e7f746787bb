"""Which samples go on."""

from __future__ import annotations

import hashlib
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.stage import ShardContext
from pipeline.stages.select import Columns, Keep, Split
from pipeline.testing import check_stage

KEYS = st.lists(st.text(max_size=20), max_size=30, unique=True)


def table_of(keys: list[str]) -> pa.Table:
    labels = pa.array(range(len(keys)), pa.int64())
    return pa.table({"key": pa.array(keys, pa.string()), "label": labels})


def belongs_to_test(key: str) -> bool:
    """The rule, written another way: the first eight hexadecimal digits, modulo five."""
    return int(hashlib.sha256(key.encode("utf-8")).hexdigest()[:8], 16) % 5 == 0


def part(name: Any, keys: list[str]) -> list[str]:
    found: list[str] = Split(name)(table_of(keys), ShardContext("0", 0))["key"].to_pylist()
    return found


@given(KEYS)
def test_the_split_follows_the_digest_of_the_key(keys: list[str]) -> None:
    assert part("test", keys) == [key for key in keys if belongs_to_test(key)]
    assert part("train", keys) == [key for key in keys if not belongs_to_test(key)]


@given(KEYS, KEYS, st.integers())
def test_a_sample_stays_where_it_is_when_others_come(
    keys: list[str], more: list[str], seed: int
) -> None:
    both = list(dict.fromkeys(more + keys))
    moved = Split("test")(table_of(both), ShardContext("other", seed))["key"].to_pylist()
    assert set(part("test", keys)) == set(moved) & set(keys)


def test_known_keys() -> None:
    tested = [row for row in range(40) if f"digit-{row:04d}" in part("test", [f"digit-{row:04d}"])]
    expected = [row for row in range(40) if belongs_to_test(f"digit-{row:04d}")]
    assert tested == expected
    assert len(expected) > 0
    shares = [belongs_to_test(f"sample-{row}") for row in range(20000)]
    assert abs(sum(shares) / 20000 - 0.2) < 0.01


@pytest.mark.parametrize("stage", [Split("train"), Split("test"), Keep(("b", "d", "x"))])
def test_what_is_left_out_is_counted(stage: Any) -> None:
    context = ShardContext("0", 0)
    check_stage(stage, table_of(list("abcdefghij")), context)
    assert list(context.filtered) == ["not selected" if isinstance(stage, Keep) else "other split"]


def test_keep_keeps_the_order_of_the_table() -> None:
    table = table_of(list("abcde"))
    kept = Keep(("e", "b", "nothing"))(table, ShardContext("0", 0))
    assert kept.to_pylist() == [{"key": "b", "label": 1}, {"key": "e", "label": 4}]
    context = ShardContext("0", 0)
    assert Keep(())(table, context).num_rows == 0
    assert context.filtered == {"not selected": 5}


def test_columns_are_chosen_in_order() -> None:
    stage = Columns(("label", "key"))
    result = check_stage(stage, table_of(list("abc")), ShardContext("0", 0))
    assert result.column_names == ["label", "key"]
