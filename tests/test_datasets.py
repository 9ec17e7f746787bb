"""Data sets by name, as they are published and as a folder's ``datasets.yaml`` says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layouts import (
    CIFAR10,
    CIFAR100,
    IMAGES,
    LABELS,
    NAMES,
    cifar10_binary,
    cifar10_python,
    cifar100_binary,
    cifar100_python,
    column,
    hugging_face_cifar10,
    ilsvrc_kaggle,
    imagenet21k,
    mnist,
    npz,
    rows_of,
    samples,
    tars,
    tiny_imagenet,
    upload,
    url_table,
    wnid,
    write,
    write_images,
    write_parquet,
    write_tar,
)
from samples import pixels

from pipeline.datasets import NAMED, Dataset, find_dataset
from pipeline.errors import PipelineError, UsageError
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.source import Source

TEN = tuple(map(str, range(10)))


def sizes(found: Dataset) -> tuple[int, int | None]:
    return len(rows_of(found.train)), len(rows_of(found.test)) if found.test else None


def entry(root: Path, text: str) -> None:
    write(root / "datasets.yaml", text)


def gzipped_mnist(root: Path) -> None:
    mnist(root / "mnist", compress=True)


def torchvision_mnist(root: Path) -> None:
    mnist(root / "MNIST/raw")


def fashion(root: Path) -> None:
    arrays = {"x_train": pixels(2, 28), "y_train": [0, 1], "x_test": pixels(1, 28), "y_test": [1]}
    np.savez(root / "fashion-mnist.npz", **arrays)


def torchvision_fashion(root: Path) -> None:
    mnist(root / "FashionMNIST/raw")


def imagenette(root: Path) -> None:
    for side, row in (("train", 0), ("val", 9)):
        names = [f"imagenette2/{side}/{wnid(n)}/{wnid(n)}_{row}.JPEG" for n in range(10)]
        write_images(root, *names)
    write(root / "imagenette2/noisy_imagenette.csv", "path,noisy_labels_0\n")


def resized_21k(root: Path) -> None:
    imagenet21k(root / "imagenet21k_resized")


def hub_cifar10(root: Path) -> None:
    hugging_face_cifar10(root / "cifar10")


def nothing(root: Path) -> None:
    pass


PUBLISHED: list[tuple[str, Callable[[Path], None], int, int | None, tuple[str, ...]]] = [
    ("digits", nothing, 1797, None, TEN),
    ("mnist", gzipped_mnist, 5, 3, TEN),
    ("mnist", torchvision_mnist, 5, 3, TEN),
    ("fashion-mnist", fashion, 2, 1, TEN),
    ("fashion-mnist", torchvision_fashion, 5, 3, TEN),
    ("cifar10", cifar10_binary, 10, 2, CIFAR10),
    ("cifar10", cifar10_python, 10, 2, CIFAR10),
    ("cifar10", hub_cifar10, 4, 2, NAMES),
    ("cifar100", cifar100_binary, 2, 2, CIFAR100),
    ("cifar100", cifar100_python, 2, 2, CIFAR100),
    ("tiny-imagenet", tiny_imagenet, 4, 3, ("n01", "n02")),
    ("imagenette", imagenette, 10, 10, tuple(sorted(wnid(n) for n in range(10)))),
    ("imagenet-1k", ilsvrc_kaggle, 3, 3, tuple(sorted(wnid(n) for n in (1, 500, 1000)))),
    ("imagenet-21k", resized_21k, 2, 2, ("n01", "n02")),
]


@pytest.mark.parametrize(
    ("name", "make", "train", "test", "classes"),
    PUBLISHED,
    ids=[f"{row[0]}-{row[1].__name__}" for row in PUBLISHED],
)
def test_published_archives_are_found_by_name(
    name: str,
    make: Callable[[Path], None],
    train: int,
    test: int | None,
    classes: tuple[str, ...],
    tmp_path: Path,
) -> None:
    make(tmp_path)
    found = find_dataset(name, tmp_path)
    assert found.name == name
    assert found.info == NAMED[name]
    assert sizes(found) == (train, test)
    assert found.train.classes == classes
    if found.test:
        assert found.test.classes == classes
        assert None not in column(found.test, "label")


def test_every_known_name_was_tried() -> None:
    assert {row[0] for row in PUBLISHED} == set(NAMED)


def test_a_folder_may_be_the_data_set_itself(tmp_path: Path) -> None:
    tiny_imagenet(tmp_path)
    ilsvrc_kaggle(tmp_path)
    write_images(tmp_path / "x", "train/a/1.png", "val/a/2.png")
    assert sizes(find_dataset("tiny-imagenet", tmp_path / "tiny-imagenet-200")) == (4, 3)
    assert sizes(find_dataset("imagenet-1k", tmp_path / "ILSVRC")) == (3, 3)
    assert sizes(find_dataset("imagenette", tmp_path / "x")) == (1, 1)


@pytest.mark.parametrize("name", sorted(NAMED.keys() - {"digits"}))
def test_what_is_not_there_says_where_to_obtain_it(name: str, tmp_path: Path) -> None:
    for data in (None, tmp_path, tmp_path / "gone"):
        with pytest.raises(UsageError, match="no-data") as caught:
            find_dataset(name, data)
        assert NAMED[name].origin in caught.value.hint


@pytest.mark.parametrize(
    ("name", "guess"), [("minst", "mnist"), ("cifar-10", "cifar10"), ("./gone", "Known names")]
)
def test_an_unknown_name_gets_a_suggestion(tmp_path: Path, name: str, guess: str) -> None:
    with pytest.raises(UsageError, match=rf"{guess}.*unknown-dataset"):
        find_dataset(name, tmp_path)


@pytest.mark.parametrize(
    ("place", "name"),
    [("", "tars"), ("/0.tar", "0"), ("/{0..1}.tar", "data"), ("/../tars", "tars")],
)
def test_a_path_is_named_after_its_last_part(tmp_path: Path, place: str, name: str) -> None:
    tars(tmp_path / "tars")
    found = find_dataset(f"{tmp_path}/tars{place}", None)
    assert (found.name, found.info) == (name, None)
    assert found.train.classes == NAMES


def test_ranges_name_the_data_set(tmp_path: Path, s3: ObjectStore) -> None:
    for number in range(4):
        write_tar(tmp_path / f"train-{number}.tar", samples([number]))
    upload(tmp_path, s3)
    for root in (str(tmp_path), s3.url):
        found = find_dataset(root + "/train-{0..3}.tar", None)
        assert found.name == "train"
        assert sizes(found) == (4, None)
        with pytest.raises(UsageError, match=r"1 of 5 files are not there: train-4\.tar"):
            find_dataset(root + "/train-{0..4}.tar", None)


# datasets.yaml


def both_splits(root: Path) -> None:
    """Two lists of the same classes, of which the test split lacks the first."""
    write_images(root, "images/1.png", "images/2.png")
    write(root / "images/train.txt", "1.png\tant\n2.png\tbee\n")
    write(root / "images/test.txt", "2.png\tbee\n")


@pytest.mark.parametrize("remote", [True, False])
def test_an_entry_names_paths_or_urls(tmp_path: Path, s3: ObjectStore, remote: bool) -> None:
    both_splits(tmp_path)
    upload(tmp_path, s3)
    root = f"{s3.url}/" if remote else ""
    (tmp_path / "images").rename(tmp_path / "gone") if remote else None
    entry(tmp_path, f"mine:\n  train: {root}images/train.txt\n  test: {root}images/test.txt\n")
    found = find_dataset("mine", tmp_path)
    assert found.name == "mine"
    assert found.train.classes == ("ant", "bee")
    assert column(found.train, "label") == [0, 1]
    assert column(found.test, "label") == [1]
    assert column(found.test, "image") == IMAGES[1:2]


def test_an_entry_may_name_both_splits_at_once_or_lie_under_its_name(tmp_path: Path) -> None:
    for name in ("here", "mine"):
        write_images(
            tmp_path, f"{name}/train/a/1.png", f"{name}/train/b/1.png", f"{name}/val/b/2.png"
        )
    absolute = tmp_path / "here"
    entry(tmp_path, f"both:\n  train: here\nmine:\nother: {{train: {absolute}}}\n")
    for name in ("both", "mine", "other"):
        found = find_dataset(name, tmp_path)
        assert sizes(found) == (2, 1)
        assert column(found.test, "label") == [1]


@pytest.mark.parametrize(
    ("given", "classes"),
    [("[ant, bee, cat]", NAMES), ("3", ("0", "1", "2")), ("5", ("0", "1", "2", "3", "4"))],
)
@pytest.mark.parametrize("test", ["", ", test: test.tar"])
def test_an_entry_gives_names_where_the_files_have_none(
    tmp_path: Path, given: str, classes: tuple[str, ...], test: str
) -> None:
    write_tar(tmp_path / "a.tar", samples(range(6)))
    write_tar(tmp_path / "test.tar", samples([1]))
    entry(tmp_path, f"mine: {{train: a.tar, classes: {given}{test}}}\n")
    found = find_dataset("mine", tmp_path)
    assert found.train.classes == classes
    assert found.info
    assert found.info.names == classes
    if test:
        assert found.test
        assert found.test.classes == classes
        assert column(found.test, "label") == [1]


def test_names_in_the_files_count_where_an_entry_gives_a_number(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet", {"image": IMAGES, "label": LABELS})
    entry(tmp_path, "mine: {train: x.parquet, classes: 3}\n")
    assert find_dataset("mine", tmp_path).train.classes == NAMES


def test_an_entry_may_take_the_place_of_a_known_name(tmp_path: Path) -> None:
    write_images(tmp_path, "digits/a/1.png", "elsewhere/b/1.png")
    entry(tmp_path, "digits: {size: 8}\nmnist: {train: elsewhere, size: 12, title: mine}\n")
    assert find_dataset("digits", tmp_path).train.classes == ("a",)
    found = find_dataset("mnist", tmp_path)
    assert found.train.classes == ("b",)
    assert found.info
    assert (found.info.size, found.info.title) == (12, "mine")
    assert find_dataset("digits", None).train.classes == TEN


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("mine: {train: x, sise: 3}", r"'mine' .*sise.*train, test.*bad-config"),
        ("mine: {size: 0}", "size"),
        ("mine: {classes: [1.5, {}]}", "classes"),
        ("mine: [1]", "'mine'"),
        ("mine: text", "'mine'"),
        ("mine: {train: 3}", "train"),
        ("[1, 2]", "bad-config-file"),
        ("", "bad-config-file"),
        ("a: b: c", "bad-config-file"),
        ("!!python/object/apply:os.mkdir ['canary']", "bad-config-file"),
    ],
)
def test_an_entry_that_does_not_hold_is_an_error(tmp_path: Path, text: str, match: str) -> None:
    entry(tmp_path, text)
    with pytest.raises(UsageError, match=match) as caught:
        find_dataset("mine", tmp_path)
    assert caught.value.where == str(tmp_path / "datasets.yaml")
    assert not Path("canary").exists()


def test_a_list_of_data_sets_that_is_no_text_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "datasets.yaml", b"\xff\xfe")
    with pytest.raises(UsageError, match="bad-config-file"):
        find_dataset("mine", tmp_path)


@pytest.mark.parametrize(
    "text", ["{train: gone}", "{train: x, test: gone}", "{train: gone.tar}", ""]
)
def test_a_path_that_is_not_there_is_an_error(tmp_path: Path, text: str) -> None:
    write_images(tmp_path, "x/a/1.png")
    entry(tmp_path, f"mine: {text}\n")
    with pytest.raises(UsageError, match="no-data"):
        find_dataset("mine", tmp_path)


# Two splits must speak of the same classes


def folders(root: Path, *names: str) -> None:
    write_images(root, *(f"{name}/1.png" for name in names))


MISMATCHES: list[tuple[Callable[[Path], None], Callable[[Path], None], str, str]] = [
    (lambda p: folders(p, "a", "b"), lambda p: folders(p, "b", "c"), "", "unknown-class"),
    (lambda p: folders(p, "0", "1"), lambda p: folders(p, "1", "2"), "", "unknown-class"),
    (npz, lambda p: npz(p, ("bee", "ant", "cat")), "x.npz", "other-classes"),
    (
        lambda p: write_parquet(p / "x.parquet", {"image": IMAGES, "label": LABELS}),
        lambda p: write_parquet(p / "x.parquet", {"image": IMAGES, "label": LABELS}, "cba"),
        "x.parquet",
        "other-classes",
    ),
    (
        lambda p: write(p / "x.txt", "a\tant\n"),
        lambda p: write(p / "x.txt", "a\tbee\n"),
        "x.txt",
        "unknown-class",
    ),
]


@pytest.mark.parametrize(("train", "test", "name", "code"), MISMATCHES)
def test_splits_of_other_classes_are_an_error(
    tmp_path: Path,
    train: Callable[[Path], None],
    test: Callable[[Path], None],
    name: str,
    code: str,
) -> None:
    for side, make in (("a", train), ("b", test)):
        (tmp_path / side).mkdir()
        make(tmp_path / side)
    entry(tmp_path, f"mine: {{train: a/{name}, test: b/{name}}}\n")
    with pytest.raises(UsageError, match=code):
        column(find_dataset("mine", tmp_path).test, "key")


def test_a_test_split_may_lack_classes_and_keeps_their_labels(tmp_path: Path) -> None:
    folders(tmp_path / "a", "0", "1", "2", "10")
    folders(tmp_path / "b", "10", "2")
    entry(tmp_path, "mine: {train: a, test: b}\n")
    found = find_dataset("mine", tmp_path)
    assert found.train.classes == ("0", "1", "10", "2")
    assert column(found.test, "label") == [2, 3]


def test_parquet_splits_in_one_folder_must_agree(tmp_path: Path) -> None:
    for split, names in (("train", "abc"), ("test", "abd")):
        write_parquet(tmp_path / f"{split}-0.parquet", {"image": IMAGES, "label": LABELS}, names)
    with pytest.raises(UsageError, match=r"'d' and 'c'.*other-classes"):
        find_dataset(str(tmp_path), None)


def test_labels_without_names_are_not_looked_for_where_their_number_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tar(tmp_path / "mnist/train-0.tar", samples([0, 1]))
    monkeypatch.setattr("pipeline.storage.webdataset.read_samples", None)  # reads every tar
    assert find_dataset("mnist", tmp_path).train.classes == TEN


def test_a_test_split_alone_is_an_error(tmp_path: Path) -> None:
    np.savez(tmp_path / "mnist.npz", x_test=pixels(1), y_test=[0])
    with pytest.raises(PipelineError) as caught:
        find_dataset("mnist", tmp_path)
    assert caught.value.hint


def test_urls_in_parquet_may_be_an_entry(tmp_path: Path) -> None:
    url_table(tmp_path / "x")
    entry(tmp_path, "mine: {train: x/list.parquet, classes: [ant, bee, cat]}\n")
    found = find_dataset("mine", tmp_path)
    assert found.train.classes == NAMES
    assert column(found.train, "label") == [0, 2, 0]


def test_real_archives_are_found(real_data: Path) -> None:
    seen = 0
    for name in ("fashion-mnist", "mnist", "cifar10", "imagenette"):
        try:
            found: Any = find_dataset(name, real_data)
        except UsageError:
            continue
        seen += 1
        source: Source = found.train
        assert len(source.classes) == 10
        assert source.read(source.shards[0]).num_rows
    assert seen
