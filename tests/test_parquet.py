"""Parquet files in the layouts that published data sets have."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from layouts import (
    IMAGES,
    LABELS,
    NAMES,
    binary_parquet,
    column,
    hugging_face_cifar10,
    hugging_face_cifar100,
    hugging_face_imagenet,
    rows_of,
    struct_parquet,
    structs,
    unlabelled_parquet,
    write_parquet,
    write_tar,
)
from samples import local_run

from pipeline.errors import RunError, UsageError
from pipeline.stages.decode import Decode
from pipeline.storage.open_source import open_source
from pipeline.storage.parquet import ParquetFormat
from pipeline.testing import check_source


def test_structs_give_their_bytes_and_paths(tmp_path: Path) -> None:
    struct_parquet(tmp_path)
    source = open_source(tmp_path, "train")
    assert source
    assert source.classes == NAMES
    assert rows_of(source) == [
        {"key": f"{row}.png", "image": IMAGES[row], "label": LABELS[row]} for row in range(6)
    ]
    assert [(shard.name, shard.rows) for shard in source.shards] == [("x-00000", 4), ("x-00001", 2)]


def test_keys_are_a_column_or_paths_or_numbers(tmp_path: Path) -> None:
    numbered = [f"x-{row:08d}" for row in range(6)]
    plain: dict[str, Any] = {"image": IMAGES, "label": LABELS}
    names = pa.array([f"n{row}" for row in range(6)], pa.large_string())
    again = [{"bytes": data, "path": f"{row % 3}.png"} for row, data in enumerate(IMAGES)]
    for columns, keys in (
        (plain, numbered),
        (plain | {"file_name": names}, names.to_pylist()),
        (plain | {"__key__": names, "key": numbered[::-1]}, numbered[::-1]),
        (plain | {"key": pa.array(["a", None, "c", "d", "e", "f"])}, ["a", numbered[1], *"cdef"]),
        (plain | {"image": structs(range(6), paths=False)}, numbered),
        (plain | {"image": [{"bytes": data} for data in IMAGES]}, numbered),
        (plain | {"image": again}, numbered),
    ):
        write_parquet(tmp_path / "x.parquet", columns, row_group_size=4)
        source = open_source(tmp_path, "train")
        assert source
        if columns["image"] is not again:
            assert column(source, "key") == keys
        check_source(source)


def test_a_missing_image_is_null_whatever_lies_below_it(tmp_path: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    children = [pa.array([b"hidden", b"b", None]), pa.array(["a", "b", "c"])]
    image = pa.StructArray.from_arrays(
        children, fields=list(kind), mask=pa.array([True, False, False])
    )
    write_parquet(tmp_path / "x.parquet", {"image": image, "label": [0, 1, 2]})
    source = open_source(tmp_path, "train")
    assert column(source, "image") == [None, b"b", None]
    assert source
    check_source(source, may_lack=["image"])


@pytest.mark.parametrize("make", [hugging_face_cifar10, hugging_face_cifar100])
def test_published_columns_and_names_are_known(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(tmp_path)
    train, test = (open_source(tmp_path, split) for split in ("train", "test"))
    assert train
    assert test
    assert train.classes == test.classes == NAMES
    assert column(train, "label") == LABELS[:4]
    assert column(test, "label") == LABELS[4:]
    assert column(test, "image") == IMAGES[4:]


def test_the_test_split_of_imagenet_has_no_labels_and_is_not_read(tmp_path: Path) -> None:
    hugging_face_imagenet(tmp_path)
    assert column(open_source(tmp_path, "train"), "key") == ["0.png", "1.png", "2.png"]
    assert column(open_source(tmp_path, "test"), "key") == ["3.png", "4.png"]
    (tmp_path / "data/validation-00000-of-00001.parquet").unlink()
    assert column(open_source(tmp_path, "test"), "label") == [None]


@pytest.mark.parametrize("layout", ["{}-00000.parquet", "data/{}/0.parquet", "d/{}/0/0.parquet"])
@pytest.mark.parametrize("test", ["test", "val", "validation", "valid"])
def test_files_are_split_by_name_or_folder(tmp_path: Path, layout: str, test: str) -> None:
    for index, split in enumerate(("train", test)):
        columns = {"image": IMAGES[index : index + 1], "label": [index]}
        write_parquet(tmp_path / layout.format(split), columns)
    assert column(open_source(tmp_path, "train"), "label") == [0]
    assert column(open_source(tmp_path, "test"), "label") == [1]


def test_labels_without_names_count_to_the_highest_one(tmp_path: Path) -> None:
    for number, labels in enumerate(([0, 1], [4, None])):
        kind = pa.array(labels, pa.uint8())
        write_parquet(tmp_path / f"{number}.parquet", {"image": IMAGES[:2], "label": kind}, ())
    source = open_source(tmp_path, "train")
    assert source
    assert source.classes == ("0", "1", "2", "3", "4")
    assert column(source, "label") == [0, 1, 4, None]
    assert open_source(tmp_path, "train", NAMES).classes == NAMES  # type: ignore[union-attr]


def test_a_negative_label_is_a_missing_one(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet", {"image": IMAGES[:3], "label": [0, -1, -100]})
    assert column(open_source(tmp_path, "train"), "label") == [0, None, None]


@pytest.mark.parametrize(
    "text", ["{", "[]", "null", '{"info": 3}', '{"info": {"features": []}}', "[" * 100_000]
)
def test_metadata_of_another_kind_are_passed_over(tmp_path: Path, text: str) -> None:
    table = pa.table({"image": IMAGES[:2], "label": [0, 1]})
    pq.write_table(table.replace_schema_metadata({"huggingface": text}), tmp_path / "x.parquet")
    source = open_source(tmp_path, "train")
    assert source
    assert source.classes == ("0", "1")


def test_names_in_the_file_and_names_given_must_agree(tmp_path: Path) -> None:
    struct_parquet(tmp_path)
    for given in ((), NAMES, ("0", "1", "2"), (*NAMES, "dog")):
        source = open_source(tmp_path, "train", given)
        assert source
        assert source.classes[:3] == NAMES
    with pytest.raises(UsageError, match=r"'ant' and 'bee'.*other-classes"):
        assert open_source(tmp_path, "train", ("bee", "ant", "cat")).classes  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="3 and 2"):
        assert open_source(tmp_path, "train", ("ant", "bee")).classes  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ({"picture": IMAGES, "label": LABELS}, "no column image"),
        ({"image": IMAGES, "label": list("abcabc")}, "labels of type string"),
        ({"image": IMAGES, "label": [0.5] * 6}, "labels of type double"),
        ({"image": IMAGES, "label": [[1, 2]] * 6}, "labels of type list"),
        ({"image": list("abcdef"), "label": LABELS}, "images of type string"),
        ({"image": [[1]] * 6, "label": LABELS}, "images of type list"),
        ({"image": [{"path": "x"}] * 6, "label": LABELS}, "images of type struct"),
    ],
)
@pytest.mark.parametrize("named", [NAMES, ()])
def test_columns_of_another_kind_are_named(
    tmp_path: Path, columns: dict[str, Any], match: str, named: tuple[str, ...]
) -> None:
    write_parquet(tmp_path / "x.parquet", columns, named)
    with pytest.raises(UsageError, match=rf"{match}.*x\.parquet.*bad-columns"):
        rows_of(open_source(tmp_path / "x.parquet", "train"))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("other", [{}, {"labels": [0] * 6}])
def test_files_must_have_the_same_column_of_labels(
    tmp_path: Path, first: bool, other: dict[str, Any]
) -> None:
    names = ("0", "1") if first else ("1", "0")
    write_parquet(tmp_path / f"{names[0]}.parquet", {"image": IMAGES, "label": LABELS})
    write_parquet(tmp_path / f"{names[1]}.parquet", {"image": IMAGES, **other})
    with pytest.raises(UsageError, match="bad-columns"):
        rows_of(open_source(tmp_path, "train"))


def damage(raw: bytes, how: str) -> bytes:
    place = raw.find(sorted(IMAGES)[3][40:])  # no smallest or largest, which page headers hold
    return {
        "empty": b"",
        "garbage": b"garbage" * 50,
        "head": raw[: len(raw) // 2],
        "tail": raw[-200:],
        "footer": raw[:-30] + b"\xff" * 22 + raw[-8:],
        "bit": raw[:place] + bytes([raw[place] ^ 4]) + raw[place + 1 :],
    }[how]


@pytest.mark.parametrize("how", ["empty", "garbage", "head", "tail", "footer", "bit"])
def test_a_damaged_file_is_an_error(tmp_path: Path, how: str) -> None:
    options = {"write_page_checksum": True, "compression": "none", "use_dictionary": False}
    write_parquet(tmp_path / "x.parquet", {"image": IMAGES, "label": LABELS}, **options)
    assert len(rows_of(open_source(tmp_path, "train"))) == 6
    raw = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "x.parquet").write_bytes(damage(raw, how))
    with pytest.raises(UsageError, match=r"x\.parquet.*damaged-parquet"):
        rows_of(open_source(tmp_path, "train"))


@pytest.mark.parametrize("name", ["key", "url"])
def test_text_that_is_none_is_an_error(tmp_path: Path, name: str) -> None:
    text = pa.array([b"\xe0", b"b"]).view(pa.string())
    images = {} if name == "url" else {"image": IMAGES[:2]}
    write_parquet(tmp_path / "x.parquet", {name: text, **images})
    with pytest.raises(UsageError, match="damaged-parquet"):
        rows_of(open_source(tmp_path, "train"))


def test_a_column_name_that_is_no_text_is_an_error(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"image": IMAGES, "label": LABELS}), tmp_path / "x.parquet", store_schema=False
    )
    raw = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "x.parquet").write_bytes(raw.replace(b"label", b"\xe0abel"))
    with pytest.raises(UsageError, match="damaged-parquet"):
        rows_of(open_source(tmp_path, "train"))


def test_an_empty_row_group_is_an_empty_shard(tmp_path: Path) -> None:
    schema = pa.schema([("image", pa.binary()), ("label", pa.int64())])
    with pq.ParquetWriter(tmp_path / "x.parquet", schema) as writer:
        for images in (IMAGES[:2], [], IMAGES[2:3]):
            table = pa.table({"image": images, "label": LABELS[: len(images)]}, schema)
            writer.write_table(table)
    assert column(open_source(tmp_path, "train"), "image") == IMAGES[:3]


def test_a_file_without_rows_is_no_error(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet", {"image": pa.array([], pa.binary())})
    assert rows_of(open_source(tmp_path, "train")) == []


@pytest.mark.parametrize("extension", ["tar", "parquet"])
def test_files_of_one_name_in_two_folders_are_two_shards(tmp_path: Path, extension: str) -> None:
    for side in "ab":
        if extension == "tar":
            write_tar(tmp_path / side / "0.tar", [(f"{side}.png", b""), (f"{side}.cls", b"0")])
        else:
            write_parquet(tmp_path / side / "0.parquet", {"image": IMAGES[:1], "label": [0]})
    source = open_source(tmp_path, "train")
    assert source
    check_source(source)
    copy = local_run(tmp_path / "out").map("copy", source, [], to=ParquetFormat())
    assert rows_of(copy) == rows_of(source)
    assert len({row["key"] for row in rows_of(source)}) == 2


def test_large_types_are_read_as_usual_ones(tmp_path: Path) -> None:
    columns = {"image": pa.array(IMAGES, pa.large_binary()), "label": pa.array(LABELS, pa.uint64())}
    write_parquet(tmp_path / "x.parquet", columns)
    source = open_source(tmp_path, "train")
    assert source
    check_source(source)
    assert column(source, "image") == IMAGES


def test_other_columns_are_left_out(tmp_path: Path) -> None:
    binary_parquet(tmp_path)
    assert set(rows_of(open_source(tmp_path, "train"))[0]) == {"key", "image", "label"}
    unlabelled_parquet(tmp_path)
    source = open_source(tmp_path, "train")
    assert set(rows_of(source)[0]) == {"key", "image"}
    assert source
    assert source.classes == ()


class Canary:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["CANARY"],)


def test_a_pickle_in_the_place_of_an_image_is_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    data = pickle.dumps(Canary())
    metadata = {"huggingface": data, "ARROW:extension:metadata": data}
    table = pa.table({"image": [data, IMAGES[0]], "label": [0, 1]}).replace_schema_metadata(
        metadata
    )
    pq.write_table(table, tmp_path / "x.parquet")
    source = open_source(tmp_path, "train")
    assert source
    run = local_run(tmp_path / "out", max_bad=1)
    step = run.map("decode", source, [Decode(8, 3)], to=ParquetFormat())
    assert step.artifact.manifest["counts"]["quarantined"] == {"decode-error": 1}
    assert not (tmp_path / "canary").exists()
    pickle.loads(data)
    assert (tmp_path / "canary").exists(), "the canary itself works"


def test_a_step_reports_a_damaged_row_group_with_its_shard(tmp_path: Path) -> None:
    struct_parquet(tmp_path)
    source = open_source(tmp_path, "train")
    assert source
    assert source.identity
    (tmp_path / "x.parquet").write_bytes(b"")
    with pytest.raises(RunError, match="damaged-parquet"):
        local_run(tmp_path / "out").map("copy", source, [], to=ParquetFormat())


def test_img2dataset_leaves_its_urls_beside_the_tars(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "00000.tar", [("000.jpg", IMAGES[0]), ("000.json", json.dumps({}).encode())]
    )
    write_parquet(tmp_path / "00000.parquet", {"url": ["http://x/y"], "caption": ["a"]})
    assert column(open_source(tmp_path, "train"), "image") == IMAGES[:1]


def test_real_parquet(real_data: Path) -> None:
    train, test = (open_source(real_data / "imagenette", split) for split in ("train", "test"))
    assert train
    assert test
    assert sum(shard.rows or 0 for shard in train.shards) == 1200
    assert train.classes == test.classes
    assert len(train.classes) == 10
    check_source(test)
