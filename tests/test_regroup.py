"""Samples in other shards, and in another order."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layouts import InMemory, column, pictures, rows_of
from samples import keyed

from pipeline.storage.regroup import ChosenSource, EvenSource, GroupedSource, cut, find_places
from pipeline.storage.source import Shard, Source, TableSource
from pipeline.testing import check_source

SIZES = st.lists(st.integers(0, 5), min_size=1, max_size=6)


def chosen(base: Source, *keys: str) -> ChosenSource:
    places = find_places(base)
    return ChosenSource(base, tuple(places[key] for key in keys), 2)


def test_chosen_samples_come_in_the_order_of_the_keys() -> None:
    base = keyed(3, 3)
    source = chosen(base, "k5", "k0", "k3", "k1", "k2")
    assert column(source, "key") == ["k5", "k0", "k3", "k1", "k2"]
    assert column(source, "label") == [1, 0, 1, 1, 0]
    assert [shard.rows for shard in source.shards] == [2, 2, 1]
    assert source.classes == base.classes
    swapped = chosen(base, "k0", "k5", "k3", "k1", "k2")
    assert swapped.identity != source.identity
    assert swapped.shards[1] == source.shards[1]
    # It is that of the shards which the samples lie in, whatever else there is.
    assert chosen(keyed(3, 3, 1), "k5", "k0").identity == chosen(base, "k5", "k0").identity
    assert chosen(keyed(3, 4), "k5", "k0").identity != chosen(base, "k5", "k0").identity


def test_cut_keeps_every_item() -> None:
    assert cut("abcdefg", 3) == ["abc", "def", "g"]
    assert cut("abc", 3) == ["abc"]
    assert cut("", 3) == []


@given(sizes=SIZES, rows=st.integers(1, 9))
def test_even_shards_hold_every_row_in_order(sizes: list[int], rows: int) -> None:
    base = keyed(*sizes)
    source = EvenSource(base, rows)
    assert [shard.rows for shard in source.shards[:-1]] == [rows] * (len(source.shards) - 1)
    assert sum(shard.rows or 0 for shard in source.shards) == sum(sizes)
    if sum(sizes):
        assert rows_of(source) == rows_of(base)
        check_source(source)
    else:
        assert source.shards == ()


class Unknown(TableSource):
    """Shards whose rows and bytes are not known, or whose bytes are their rows."""

    sized = False

    @property
    def shards(self) -> tuple[Shard, ...]:  # type: ignore[override]
        return tuple(
            Shard(
                s.name,
                s.identity,
                s.rows if self.sized else None,
                {},
                s.rows if self.sized else None,
            )
            for s in super().shards
        )


class Sized(Unknown):
    sized = True


def test_even_shards_need_known_rows() -> None:
    with pytest.raises(ValueError, match="rows"):
        assert EvenSource(Unknown(keyed(2, 3).parts), 2).shards


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=8), most=st.integers(1, 12))
def test_groups_are_as_large_as_they_may_be(sizes: list[int], most: int) -> None:
    base = Sized(keyed(*sizes).parts, ("0", "1"))
    source = GroupedSource(base, most)
    assert rows_of(source) == rows_of(base)
    check_source(source)
    found = [shard.bytes or 0 for shard in source.shards]
    members = [len(shard.location["members"]) for shard in source.shards]
    assert all(size <= most or count == 1 for size, count in zip(found, members, strict=True))
    firsts = [shard.location["members"][0]["bytes"] or 0 for shard in source.shards]
    pairs = zip(found, firsts[1:], strict=False)
    assert all(size + following > most for size, following in pairs)
    assert [shard.rows for shard in source.shards] == found


def test_shards_of_unknown_size_stay_alone() -> None:
    source = GroupedSource(Unknown(keyed(2, 3, 1).parts, ("0", "1")), 100)
    assert [(shard.rows, shard.bytes) for shard in source.shards] == [(None, None)] * 3
    assert rows_of(source) == rows_of(keyed(2, 3, 1))


def test_the_identity_of_a_group_is_that_of_its_members() -> None:
    first = GroupedSource(Sized(keyed(2, 3).parts), 5).shards
    again = GroupedSource(Sized(keyed(2, 3, 4).parts), 5).shards
    other = GroupedSource(Sized(keyed(3, 2).parts), 5).shards
    assert first[0].identity == again[0].identity != other[0].identity
    assert (
        GroupedSource(Sized(keyed(2, 3).parts), 3).identity
        != GroupedSource(Sized(keyed(2, 3).parts), 5).identity
    )


def test_rows_that_lack_values_are_passed_on() -> None:
    table = pa.table({"key": ["a", "b"], "image": pa.array([None, b"x"]), "error": ["gone", None]})
    base = InMemory((("0", table.slice(0, 1)), ("1", table.slice(1))))
    for source in (
        GroupedSource(base, 1),
        EvenSource(base, 2),
        ChosenSource(base, ((0, 0), (1, 0)), 2),
    ):
        assert rows_of(source) == table.to_pylist()


def test_tensors_can_be_regrouped() -> None:
    base = pictures(3, 0, 4)
    for source in (GroupedSource(base, 1), EvenSource(base, 2)):
        check_source(source)
