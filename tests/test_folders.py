"""Images as files: classes, splits, and lists of labels beside them."""

from __future__ import annotations

import io
import os
import random
import shutil
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from layouts import (
    IMAGES,
    class_folders,
    column,
    ilsvrc_devkit,
    ilsvrc_images,
    ilsvrc_kaggle,
    imagenet21k,
    images_beside_classes,
    rows_of,
    synsets,
    tiny_imagenet,
    wnid,
    write,
    write_images,
)
from scipy.io import savemat

from pipeline.errors import PipelineError, UsageError
from pipeline.storage.devkit import read_synsets
from pipeline.storage.folder import FolderSource
from pipeline.storage.image_folders import open_images
from pipeline.storage.open_source import open_source
from pipeline.storage.store import FileInfo, LocalStore
from pipeline.testing import check_source


def found(place: Path, split: str) -> list[tuple[str, str | None]]:
    """Key and class name of every sample of a split."""
    source = open_source(place, split)
    assert source
    return [
        (row["key"], None if row.get("label") is None else source.classes[row["label"]])
        for row in rows_of(source)
    ]


def test_keys_are_paths_and_labels_are_sorted_folders(tmp_path: Path) -> None:
    class_folders(tmp_path)
    source = open_source(tmp_path, "train")
    assert source
    assert source.classes == ("a", "b")
    assert found(tmp_path, "train") == [
        ("a/1.jpeg", "a"),
        ("a/sub/2.PNG", "a"),
        ("b/1.png", "b"),
        ("b/10.png", "b"),
    ]
    assert column(source, "image") == [IMAGES[index] for index in (2, 1, 0, 3)]
    assert [shard.bytes for shard in source.shards] == [sum(map(len, IMAGES[:4]))]


def test_shards_are_of_1024_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.storage.folder.SHARD_ROWS", 3)
    names = [f"c{row % 2}/{row}.png" for row in range(7)]
    write_images(tmp_path, *names)
    source = open_source(tmp_path, "train")
    assert source
    assert [shard.rows for shard in source.shards] == [3, 3, 1]
    check_source(source)
    assert column(source, "key") == sorted(names)


def test_an_image_beside_class_folders_has_no_label(tmp_path: Path) -> None:
    images_beside_classes(tmp_path)
    assert found(tmp_path, "train")[-1] == ("top.png", None)


def test_a_name_that_is_no_text_and_an_empty_file_are_samples_all_the_same(tmp_path: Path) -> None:
    write(tmp_path / "a" / "empty.png", b"")
    (tmp_path / "a" / os.fsdecode(b"\xff.png")).write_bytes(IMAGES[0])
    source = open_source(tmp_path, "train")
    assert column(source, "key") == ["a/empty.png", "a/\\udcff.png"]
    assert column(source, "image") == [b"", IMAGES[0]]


def test_an_image_that_went_away_stops_the_shard(tmp_path: Path) -> None:
    class_folders(tmp_path)
    source = open_source(tmp_path, "train")
    assert source
    (tmp_path / "b" / "1.png").unlink()
    with pytest.raises(PipelineError, match="storage-error"):
        rows_of(source)


# Splits

PAIRS = [
    ("train", "val"),
    ("train", "test"),
    ("Train", "VALID"),
    ("x/y/train", "x/y/validation"),
    ("in21k_train", "in21k_val"),
]


@pytest.mark.parametrize(("train", "test"), PAIRS)
def test_a_class_has_one_label_in_both_splits(tmp_path: Path, train: str, test: str) -> None:
    write_images(tmp_path, f"{train}/a/1.png", f"{train}/b/2.png", f"{test}/b/deep/3.png")
    assert found(tmp_path, "train") == [("a/1.png", "a"), ("b/2.png", "b")]
    assert found(tmp_path, "test") == [("b/deep/3.png", "b")]
    assert column(open_source(tmp_path, "test"), "label") == [1]


def test_imagenet_21k_is_split_and_its_small_classes_are_left_out(tmp_path: Path) -> None:
    imagenet21k(tmp_path)
    assert found(tmp_path, "train") == [("n01/n01_1.JPEG", "n01"), ("n02/n02_1.JPEG", "n02")]
    assert found(tmp_path, "test") == [("n01/n01_9.JPEG", "n01"), ("n02/n02_9.JPEG", "n02")]


@pytest.mark.parametrize(
    "classes",
    [("bus", "train"), ("toy_car", "toy_train"), ("test", "val"), ("training", "value")],
)
def test_classes_may_be_called_like_splits(tmp_path: Path, classes: tuple[str, str]) -> None:
    names = [f"{name}/1.png" for name in classes]
    write_images(tmp_path, *names)
    assert found(tmp_path, "train") == list(zip(names, classes, strict=True))
    assert open_source(tmp_path, "test") is None


def test_a_class_inside_a_split_may_be_called_like_one(tmp_path: Path) -> None:
    write_images(tmp_path, "train/train/1.png", "train/val/2.png", "val/train/3.png")
    assert found(tmp_path, "train") == [("train/1.png", "train"), ("val/2.png", "val")]
    assert found(tmp_path, "test") == [("train/3.png", "train")]


def test_training_images_alone_are_a_split(tmp_path: Path) -> None:
    write_images(tmp_path, "set/train/a/1.png", "set/train/b/2.png")
    assert found(tmp_path, "train") == [("a/1.png", "a"), ("b/2.png", "b")]
    assert open_source(tmp_path, "test") is None


def test_splits_inside_the_classes_are_not_guessed_at(tmp_path: Path) -> None:
    write_images(tmp_path, *(f"{c}/{s}/1.png" for c in "ab" for s in ("train", "val")))
    for split in ("train", "test"):
        with pytest.raises(UsageError, match=r"2 data sets .* a/train/, b/train/.*several-splits"):
            open_source(tmp_path, split)


def test_a_test_class_without_training_images_is_an_error(tmp_path: Path) -> None:
    write_images(tmp_path, "train/a/1.png", "val/a/2.png", "val/zebra/3.png")
    with pytest.raises(UsageError, match=r"1 classes .* zebra.*unknown-class"):
        open_source(tmp_path, "test")
    shutil.rmtree(tmp_path / "val" / "a")
    with pytest.raises(UsageError, match="zebra"):
        open_source(tmp_path, "test")


def test_numbered_folders_are_classes_of_their_own_name(tmp_path: Path) -> None:
    write_images(tmp_path, *(f"train/{n}/1.png" for n in range(12)), "val/2/1.png", "val/10/1.png")
    assert column(open_source(tmp_path, "test"), "key") == ["10/1.png", "2/1.png"]
    assert [name for _, name in found(tmp_path, "test")] == ["10", "2"]
    train = open_source(tmp_path, "train")
    assert train
    assert train.classes[:4] == ("0", "1", "10", "11")


def test_the_split_with_labels_is_the_test_split(tmp_path: Path) -> None:
    write_images(tmp_path, "train/a/1.png", "val/a/2.png", "test/images/3.png")
    assert found(tmp_path, "test") == [("a/2.png", "a")]
    shutil.rmtree(tmp_path / "val")
    assert open_source(tmp_path, "test") is None
    shutil.rmtree(tmp_path / "test")
    write_images(tmp_path, "val/a/2.png", "test/a/4.png", "test/5.png")
    assert found(tmp_path, "test") == [("5.png", None), ("a/4.png", "a")]


def test_splits_without_labels_are_splits(tmp_path: Path) -> None:
    write_images(tmp_path, "train/1.png", "train/2.png", "test/3.png")
    assert found(tmp_path, "train") == [("1.png", None), ("2.png", None)]
    assert found(tmp_path, "test") == [("3.png", None)]
    check_source(open_source(tmp_path, "test") or FolderSource(LocalStore(tmp_path), ()))


# ImageNet and Tiny ImageNet


@pytest.mark.parametrize(
    ("make", "place", "labels"),
    [(ilsvrc_devkit, "", (1000, 1, 500)), (ilsvrc_kaggle, "ILSVRC", (1000, 1, 500))],
)
@pytest.mark.parametrize("whole", [True, False])
def test_imagenet_validation_images_get_their_listed_class(
    make: Callable[[Path], None], place: str, labels: tuple[int, ...], whole: bool, tmp_path: Path
) -> None:
    make(tmp_path)
    root = tmp_path if whole else tmp_path / place
    assert [name for _, name in found(root, "train")] == sorted(wnid(n) for n in (1, 500, 1000))
    assert found(root, "test") == [
        (f"ILSVRC2012_val_{index:08d}.JPEG", wnid(number)) for index, number in enumerate(labels, 1)
    ]


def test_imagenet_without_a_list_has_no_test_split(tmp_path: Path) -> None:
    ilsvrc_images(tmp_path)
    assert len(found(tmp_path, "train")) == 3
    assert open_source(tmp_path, "test") is None


def test_a_validation_image_that_is_not_listed_has_no_label(tmp_path: Path) -> None:
    ilsvrc_devkit(tmp_path)
    truth = tmp_path / "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("1000\n1030\n")  # an inner node, and no third line
    assert [name for _, name in found(tmp_path, "test")] == [wnid(1000), None, None]


@pytest.mark.parametrize("data", [b"", b"MATLAB 5.0 MAT-file" + bytes(200), b"\0" * 1000])
def test_a_damaged_devkit_is_an_error(tmp_path: Path, data: bytes) -> None:
    ilsvrc_devkit(tmp_path)
    (tmp_path / "ILSVRC2012_devkit_t12/data/meta.mat").write_bytes(data)
    assert len(found(tmp_path, "train")) == 3
    with pytest.raises(UsageError, match="damaged-devkit"):
        open_source(tmp_path, "test")


def meta(**options: Any) -> bytes:
    file = io.BytesIO()
    savemat(file, {"other": 1.0, "synsets": synsets(), "text": "x"}, **options)
    return file.getvalue()


@pytest.mark.parametrize("compressed", [True, False])
def test_a_devkit_names_its_leaves_and_inner_nodes(compressed: bool) -> None:
    found = read_synsets(meta(do_compression=compressed))
    assert found == {number: wnid(number) for number in range(1, 1061)}
    assert len(set(found.values())) == 1060


@pytest.mark.parametrize("compressed", [True, False])
def test_a_damaged_devkit_is_an_error_and_nothing_else(compressed: bool) -> None:
    whole = meta(do_compression=compressed)
    rng = random.Random(0)
    for _ in range(150):
        data = bytearray(whole)
        near = rng.choice([len(data), 600])
        for _ in range(rng.choice([1, 3, 20])):
            data[rng.randrange(near)] = rng.randrange(256)
        with suppress(ValueError):
            assert all(isinstance(text, str) for text in read_synsets(bytes(data)).values())
    for size in (0, 127, 128, 200, 5000):
        with pytest.raises(ValueError, match=r"\w"):
            read_synsets(whole[:size])


def test_a_devkit_that_would_fill_the_memory_is_an_error() -> None:
    body = zlib.compress(bytes(2**27))
    data = meta()[:128] + struct.pack("<II", 15, len(body)) + body
    with pytest.raises(ValueError, match="too large"):
        read_synsets(data)
    with pytest.raises(ValueError, match="no 'synsets'"):
        read_synsets(meta()[:128])


def test_tiny_imagenet_has_its_published_labels(tmp_path: Path) -> None:
    tiny_imagenet(tmp_path)
    assert found(tmp_path, "train") == [
        (f"{name}/images/{name}_{row}.JPEG", name) for name in ("n01", "n02") for row in (0, 1)
    ]
    assert found(tmp_path, "test") == [
        ("images/val_0.JPEG", "n02"),
        ("images/val_1.JPEG", "n02"),
        ("images/val_2.JPEG", "n01"),
    ]


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (ilsvrc_kaggle, "LOC_val_solution.csv"),
        (tiny_imagenet, "tiny-imagenet-200/val/val_annotations.txt"),
        (ilsvrc_devkit, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"),
    ],
)
def test_a_list_that_is_no_text_is_an_error(
    make: Callable[[Path], None], name: str, tmp_path: Path
) -> None:
    make(tmp_path)
    (tmp_path / name).write_bytes(b"\xff\xfe\0n01")
    with pytest.raises(UsageError, match="bad-text"):
        open_source(tmp_path, "test")


def test_a_million_images_in_many_folders_are_sorted_out_in_one_pass() -> None:
    # With a comparison of every folder with every other this would not end.
    names = [f"set_{side}/n_{c:05d}/{row}.JPEG" for side in ("train", "val") for c in range(21_000)
             for row in range(3)]  # fmt: skip
    files = [FileInfo(name, 1, "") for name in names]
    for split in ("train", "test"):
        source = open_images(LocalStore(Path("/nowhere")), files, files, split)
        assert source
        assert len(source.classes) == 21_000
        assert len(source.files) == 63_000
        assert source.files[-1].name == "n_20999/2.JPEG"
