"""What every kind of data set promises as a source, on a disk and in an object store."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from layouts import LAYOUTS, Layout, column, pictures, rows_of, upload, write_images
from samples import image_table, keyed

from pipeline.storage.digits import open_digits
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.open_source import open_source
from pipeline.storage.regroup import ChosenSource, EvenSource, GroupedSource
from pipeline.storage.source import Shard, Source, TableSource
from pipeline.storage.store import Store
from pipeline.testing import check_source

EACH = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def split_of(place: str | Path | Store, layout: Layout, split: str) -> Source:
    where = f"{place}/{layout.place}" if layout.place else str(place)
    source = open_source(where, split)
    assert source
    return source


@EACH
def test_it_keeps_the_contract(layout: Layout, tmp_path: Path) -> None:
    layout.write(tmp_path)
    for split, rows in layout.rows.items():
        source = split_of(tmp_path, layout, split)
        check_source(source, may_lack=layout.may_lack)
        assert len(rows_of(source)) == rows
    for split in {"train", "test"} - layout.rows.keys():
        assert open_source(tmp_path / layout.place, split) is None


@EACH
def test_it_is_the_same_in_an_object_store(layout: Layout, tmp_path: Path, s3: ObjectStore) -> None:
    layout.write(tmp_path)
    upload(tmp_path, s3)
    for split in layout.rows:
        there = split_of(s3, layout, split)
        check_source(there, may_lack=layout.may_lack)
        here = split_of(tmp_path, layout, split)
        assert there.classes == here.classes
        assert [shard.name for shard in there.shards] == [shard.name for shard in here.shards]
        assert rows_of(there) == rows_of(here)


@EACH
def test_a_source_that_was_used_travels_to_another_process(layout: Layout, tmp_path: Path) -> None:
    layout.write(tmp_path)
    source = split_of(tmp_path, layout, "train")
    before = rows_of(source)
    assert rows_of(pickle.loads(pickle.dumps(source))) == before


@EACH
def test_shards_can_be_grouped(layout: Layout, tmp_path: Path) -> None:
    layout.write(tmp_path)
    source = split_of(tmp_path, layout, "train")
    for size in (1, 2**30):
        grouped = GroupedSource(source, size)
        check_source(grouped, may_lack=layout.may_lack)
        assert rows_of(grouped) == rows_of(source)


MADE: dict[str, Callable[[], Source]] = {
    "digits": open_digits,
    "table": lambda: keyed(2, 3),
    "tensors": lambda: pictures(3, 0, 4, 1),
    "chosen": lambda: ChosenSource(
        pictures(3, 0, 4, 1), ((2, 3), (0, 1), (3, 0), (0, 0), (2, 0)), 2
    ),
    "grouped": lambda: GroupedSource(pictures(3, 0, 4, 1), 1),
    "even": lambda: EvenSource(pictures(3, 0, 4, 1), 3),
    "even grouped chosen": lambda: EvenSource(
        GroupedSource(ChosenSource(pictures(3, 0, 4, 1), ((2, 3), (0, 1), (3, 0)), 2), 1), 1
    ),
}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_sources_without_files_keep_the_contract(make: Callable[[], Source]) -> None:
    check_source(make())


class Wrong(TableSource):
    """A source with one thing wrong."""

    fault: str

    @property
    def shards(self) -> tuple[Shard, ...]:  # type: ignore[override]
        sizes = {"size": 0, "no size": -1}
        return tuple(replace(shard, bytes=sizes.get(self.fault, 1)) for shard in super().shards)

    def read(self, shard: Shard) -> pa.Table:
        table = super().read(shard)
        for name in ("image", "label"):
            if self.fault == f"null {name}":
                nulls = pa.nulls(len(table), pa.binary() if name == "image" else pa.int64())
                table = table.set_column(table.column_names.index(name), name, nulls)
        return table

    def take(self, shard: Shard, keys: Any) -> pa.Table:
        table = super().take(shard, keys)
        if self.fault == "take none":
            return table.slice(0, 0)
        if self.fault == "take all":
            return self.read(shard)
        if self.fault == "take columns":
            return table.drop_columns(["label"])
        return table.sort_by([("key", "descending")]) if self.fault == "take order" else table


FAULTS = ["size", "no size", "null image", "null label", "take none", "take all", "take columns"]


@pytest.mark.parametrize("fault", [*FAULTS, "take order"])
def test_a_wrong_source_is_seen(fault: str) -> None:
    source = Wrong((("0", image_table(5)),), ("a", "b"))
    object.__setattr__(source, "fault", "")
    check_source(source)
    object.__setattr__(source, "fault", fault)
    with pytest.raises(AssertionError, match=r"bytes|missing|'take'"):
        check_source(source)
    if fault.startswith("null"):
        check_source(source, may_lack=[fault.split()[1]])


@pytest.mark.parametrize("text", ["label", "image"])
def test_what_may_be_lacking_is_still_checked(text: str) -> None:
    table = image_table(3)
    wrong = table.set_column(2, "label", pa.array([0, 7, None], pa.int64()))
    with pytest.raises(AssertionError, match=r"label 7|label is missing"):
        check_source(TableSource((("0", wrong),), ("a", "b")), may_lack=[text])


def test_shards_of_one_table_have_their_own_identity() -> None:
    first, second = keyed(2, 3).shards
    assert first.identity != second.identity
    assert keyed(2, 3).identity == keyed(2, 3).identity
    assert keyed(2, 3).identity != TableSource(keyed(2, 3).parts, ("x", "y")).identity
    assert column(keyed(2, 3), "key") == [f"k{row}" for row in range(5)]


# Identity


SHARDED = [name for name, layout in LAYOUTS.items() if layout.files]


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_same_files_elsewhere_are_the_same_data(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    layout.write(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there")  # keeps the times of files
    for split in layout.rows:
        here, there = (split_of(tmp_path / place, layout, split) for place in ("here", "there"))
        assert here.identity == there.identity
        assert here.shards == there.shards


@pytest.mark.parametrize("name", SHARDED)
def test_a_file_that_is_touched_changes_its_own_shards(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    layout.write(tmp_path)
    before = split_of(tmp_path, layout, "train")
    changed: set[str] = set()
    for file in layout.files:
        os.utime(tmp_path / file, ns=(1, len(changed) + 1))
        after = split_of(tmp_path, layout, "train")
        pairs = zip(before.shards, after.shards, strict=True)
        now = {new.name for old, new in pairs if new.identity != old.identity} - changed
        assert now, f"{file} was touched"
        assert before.identity != after.identity
        changed |= now
    assert changed == {shard.name for shard in before.shards}


def test_a_touched_image_changes_its_own_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.storage.folder.SHARD_ROWS", 2)
    write_images(tmp_path, *(f"c{row}/{row}.png" for row in range(6)))
    before = open_source(tmp_path, "train")
    (tmp_path / "c2/2.png").write_bytes(b"other")
    after = open_source(tmp_path, "train")
    assert before
    assert after
    pairs = zip(before.shards, after.shards, strict=True)
    assert [old.identity == new.identity for old, new in pairs] == [True, False, True]


def test_an_object_that_is_replaced_changes_its_own_shard(tmp_path: Path, s3: ObjectStore) -> None:
    LAYOUTS["tars"].write(tmp_path)
    upload(tmp_path, s3)
    before = open_source(s3, "train")
    s3.replace("1.tar", (tmp_path / "0.tar").read_bytes())
    after = open_source(s3, "train")
    assert before
    assert after
    pairs = zip(before.shards, after.shards, strict=True)
    assert [old.identity == new.identity for old, new in pairs] == [True, False]


@pytest.mark.parametrize("name", ["class_folders", "tars", "binary_parquet", "gray_npz", "mnist"])
def test_class_names_are_part_of_the_identity(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    layout.write(tmp_path)
    (tmp_path / "classes.txt").unlink(missing_ok=True)
    place = f"{tmp_path}/{layout.place}"
    if name == "class_folders":
        first, second = (open_source(place, "train", names) for names in (("a", "b"), ("b", "a")))
        assert first
        assert second
        assert first.shards == second.shards
    else:
        if name == "binary_parquet":
            names = ("ant", "bee", "cat", "dog"), ("ant", "bee", "cat")
        else:
            names = ("x", "y", "z"), ("x", "y", "w")
        first, second = (open_source(place, "train", given) for given in names)
        assert first
        assert second
    assert first.identity != second.identity


def test_a_class_that_is_renamed_changes_its_shards(tmp_path: Path) -> None:
    write_images(tmp_path, "a/1.png", "b/2.png")
    before = open_source(tmp_path, "train")
    (tmp_path / "b").rename(tmp_path / "c")
    after = open_source(tmp_path, "train")
    assert before
    assert after
    assert before.shards[0].identity != after.shards[0].identity


def test_a_list_of_labels_that_changes_changes_the_shards(tmp_path: Path) -> None:
    layout = LAYOUTS["tiny_imagenet"]
    layout.write(tmp_path)
    before = split_of(tmp_path, layout, "test")
    path = tmp_path / "tiny-imagenet-200/val/val_annotations.txt"
    path.write_text(path.read_text().replace("val_0.JPEG\tn02", "val_0.JPEG\tn01"))
    after = split_of(tmp_path, layout, "test")
    assert column(before, "label") != column(after, "label")
    assert before.shards[0].identity != after.shards[0].identity
