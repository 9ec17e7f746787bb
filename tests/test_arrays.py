"""Images that are pixels already: npz, IDX, CIFAR batches, Zarr groups and the digits."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from layouts import (
    CIFAR10,
    CIFAR100,
    IMAGES,
    LABELS,
    NAMES,
    bytes_zarr,
    chunked_zarr,
    cifar10_binary,
    cifar10_python,
    cifar100_binary,
    cifar100_python,
    column,
    idx_bytes,
    mnist,
    npz,
    rows_of,
    sharded_zarr,
    write,
    write_zarr,
)
from samples import pixels

from pipeline.errors import PipelineError, UsageError
from pipeline.storage.arrays import ArraySource
from pipeline.storage.digits import open_digits
from pipeline.storage.open_source import open_source
from pipeline.storage.source import Source
from pipeline.tensors import to_numpy
from pipeline.testing import check_source


def images_of(source: Source | None) -> np.ndarray[Any, Any]:
    assert source
    return to_numpy(pa.concat_tables(source.tables())["image"])


class Canary:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["CANARY"],)


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that unpickling a canary makes."""
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    return tmp_path / "canary"


def test_keys_number_the_rows_and_gray_images_get_a_channel(tmp_path: Path) -> None:
    images, path = pixels(5, channels=1), tmp_path / "x.npz"
    np.savez(path, x_test=images[..., 0], y_test=[0, 1, 1, 3, 0], class_names=list("abcd"))
    with pytest.raises(UsageError, match="unknown-form"):
        open_source(path, "train")
    source = open_source(path, "test")
    assert source
    assert source.classes == ("a", "b", "c", "d")
    assert column(source, "key") == [f"test-{row:08d}" for row in range(5)]
    assert column(source, "label") == [0, 1, 1, 3, 0]
    assert np.array_equal(images_of(source), images)


def test_rows_lie_in_the_shard_that_names_them() -> None:
    images, labels = pixels(5), np.array(LABELS[:5], np.uint8)
    source = ArraySource(lambda: (images, labels), "s", "x", "here", NAMES, 2, 3)
    assert [(shard.name, shard.rows, shard.bytes) for shard in source.shards] == [
        ("s-00000", 2, 384),
        ("s-00001", 2, 384),
        ("s-00002", 1, 192),
    ]
    assert column(source, "key") == ["s-000", "s-001", "s-002", "s-003", "s-004"]
    assert np.array_equal(images_of(source), images)
    assert column(source, "label") == LABELS[:5]


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.int32, np.uint64, ">i2"])
def test_labels_without_names_count_to_the_highest_one(tmp_path: Path, kind: Any) -> None:
    np.savez(tmp_path / "x.npz", x_train=pixels(3), y_train=np.array([0, 5, 2], kind))
    source = open_source(tmp_path / "x.npz", "train")
    assert source
    assert source.classes == ("0", "1", "2", "3", "4", "5")
    check_source(source)


@pytest.mark.parametrize(
    ("images", "labels", "match"),
    [
        (pixels(2) / 255, [0, 1], "float64"),
        (pixels(2).astype(np.int16), [0, 1], "int16"),
        (pixels(2)[0, 0], [0] * 8, r"shape \(8, 3\)"),
        (pixels(2)[None], [0], r"shape \(1, 2, 8, 8, 3\)"),
        (pixels(2), [0], r"labels of int64 and shape \(1,\)"),
        (pixels(2), [[0], [1]], r"shape \(2, 1\)"),
        (pixels(2), [0.0, 1.0], "labels of float64"),
        (pixels(2), ["a", "b"], "labels of <U1"),
        (pixels(2), [True, False], "labels of bool"),
        (pixels(2), 3, r"shape \(\)"),
    ],
)
def test_arrays_of_another_kind_are_refused(
    tmp_path: Path, images: Any, labels: Any, match: str
) -> None:
    np.savez(tmp_path / "x.npz", x_train=images, y_train=np.array(labels))
    with pytest.raises(UsageError, match=rf"{match}.*bad-arrays"):
        rows_of(open_source(tmp_path / "x.npz", "train"))


def test_labels_beyond_all_reason_do_not_fill_the_memory(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x_train=pixels(1), y_train=np.array([2**62]))
    source = open_source(tmp_path / "x.npz", "train")
    assert source
    with pytest.raises(UsageError, match="bad-labels"):
        assert source.classes


@pytest.mark.parametrize("names", [np.array("one"), np.array([["a", "b"], ["c", "d"]]), [b"a"]])
def test_class_names_of_any_shape_are_no_crash(tmp_path: Path, names: Any) -> None:
    np.savez(tmp_path / "x.npz", x_train=pixels(1), y_train=[0], class_names=names)
    source = open_source(tmp_path / "x.npz", "train")
    assert source
    assert all(isinstance(name, str) for name in source.classes)


def npz_with(path: Path, member: bytes, **options: Any) -> None:
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("x_train.npy", member)
        archive.writestr("y_train.npy", member)


HUGE = b"\x93NUMPY\1\0v\0{'descr': '|u1', 'fortran_order': False, 'shape': (9999999999999, 8, 8), }"
HUGE = HUGE.ljust(127) + b"\n"


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"garbage" * 50),
        lambda path: path.write_bytes(path.read_bytes()[:-30]),
        lambda path: path.write_bytes(path.read_bytes()[30:]),
        lambda path: flip(path, 200),
        lambda path: flip(path, 31),
        lambda path: npz_with(path, b""),
        lambda path: npz_with(path, b"no array"),
        lambda path: npz_with(path, HUGE),
        lambda path: npz_with(path, HUGE.replace(b"'|u1'", b"((('")),
    ],
    ids=[
        "empty",
        "garbage",
        "cut-end",
        "cut-head",
        "bit-data",
        "bit-head",
        "no-member",
        "text",
        "huge",
        "bad-header",
    ],
)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_archive_is_an_error(
    tmp_path: Path, damage: Callable[[Path], None], save: Callable[..., None]
) -> None:
    path = tmp_path / "x.npz"
    save(path, x_train=pixels(2), y_train=np.array([0, 1]))
    damage(path)
    with pytest.raises(UsageError, match=r"x\.npz"):
        rows_of(open_source(path, "train"))


def flip(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 4
    path.write_bytes(raw)


def test_an_encrypted_archive_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, x_train=pixels(2), y_train=np.array([0, 1]))
    raw = path.read_bytes()
    for head, place in ((b"PK\1\2", 8), (b"PK\3\4", 6)):
        start = raw.find(head) + place
        raw = raw[:start] + bytes([raw[start] | 1]) + raw[start + 1 :]
    path.write_bytes(raw)
    with pytest.raises(UsageError, match="damaged-npz"):
        rows_of(open_source(path, "train"))


@pytest.mark.parametrize("place", ["x_train", "y_train", "class_names"])
def test_pickled_objects_in_an_archive_are_never_run(
    tmp_path: Path, canary: Path, place: str
) -> None:
    arrays = {"x_train": pixels(1), "y_train": np.array([0])}
    arrays |= {place: np.array([Canary()], dtype=object)}
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UsageError, match="damaged-npz"):
        rows_of(open_source(tmp_path / "x.npz", "train"))
    assert not canary.exists()
    with np.load(tmp_path / "x.npz", allow_pickle=True) as archive:
        assert archive[place] is not None
    assert canary.exists(), "the canary itself works"


def test_labels_and_images_are_part_of_the_identity(tmp_path: Path) -> None:
    found = set()
    for seed, labels in ((0, [0, 1, 2]), (1, [0, 1, 2]), (0, [0, 2, 1]), (0, [0, 1, 2])):
        np.savez(tmp_path / "x.npz", x_train=pixels(3, seed=seed), y_train=np.array(labels))
        found.add(open_source(tmp_path / "x.npz", "train").identity)  # type: ignore[union-attr]
        os.utime(tmp_path / "x.npz", ns=(0, len(found)))  # checksums count, and not the time
        assert open_source(tmp_path / "x.npz", "train").identity in found  # type: ignore[union-attr]
    assert len(found) == 3


def test_a_replaced_archive_is_read_again(tmp_path: Path) -> None:
    npz(tmp_path)
    before = images_of(open_source(tmp_path / "x.npz", "train"))
    np.savez(tmp_path / "x.npz", x_train=255 - before, y_train=np.array(LABELS[:5]))
    assert np.array_equal(images_of(open_source(tmp_path / "x.npz", "train")), 255 - before)


# IDX and CIFAR


@pytest.mark.parametrize("options", [{}, {"compress": True}, {"dash": "."}])
def test_mnist_has_its_published_order(tmp_path: Path, options: dict[str, Any]) -> None:
    mnist(tmp_path, **options)
    for split, rows, seed in (("train", 5, 0), ("test", 3, 1)):
        source = open_source(tmp_path, split)
        assert np.array_equal(images_of(source), pixels(rows, size=28, channels=1, seed=seed))
        assert column(source, "label") == LABELS[:rows]
        assert column(source, "key")[0] == f"{split}-00000000"


def test_mnist_takes_images_and_labels_of_one_folder(tmp_path: Path) -> None:
    mnist(tmp_path / "b")
    write(tmp_path / "a/train-labels-idx1-ubyte", idx_bytes(np.zeros(5, np.uint8)))
    assert column(open_source(tmp_path, "train"), "label") == LABELS[:5]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("train-images-idx3-ubyte", b""),
        ("train-images-idx3-ubyte", b"\0\0\x08\3"),
        ("train-labels-idx1-ubyte", b"\x1f\x8b"),
        ("train-labels-idx1-ubyte", idx_bytes(np.zeros(4, np.uint8))),
        ("train-labels-idx1-ubyte", idx_bytes(np.zeros((5, 2), np.uint8))),
    ],
)
def test_a_damaged_idx_file_is_an_error(tmp_path: Path, name: str, data: bytes) -> None:
    mnist(tmp_path)
    write(tmp_path / name, data)
    with pytest.raises(UsageError, match=r"damaged-batch|bad-arrays"):
        rows_of(open_source(tmp_path, "train"))


CIFARS: list[tuple[Callable[[Path], None], tuple[str, ...], list[int], list[int]]] = [
    (cifar10_binary, CIFAR10, [0, 9, 1, 8, 2, 7, 3, 6, 4, 5], [5, 4]),
    (cifar10_python, CIFAR10, [0, 9, 1, 8, 2, 7, 3, 6, 4, 5], [5, 4]),
    (cifar100_binary, CIFAR100, [99, 0], [98, 1]),
    (cifar100_python, CIFAR100, [99, 0], [98, 1]),
]


@pytest.mark.parametrize(("make", "names", "train", "test"), CIFARS)
def test_cifar_has_its_published_order(
    tmp_path: Path,
    make: Callable[[Path], None],
    names: tuple[str, ...],
    train: list[int],
    test: list[int],
) -> None:
    make(tmp_path)
    for split, labels in (("train", train), ("test", test)):
        source = open_source(tmp_path, split)
        assert source
        assert source.classes == names
        assert column(source, "label") == labels
    seeds = range(len(train) // 2)
    expected = np.concatenate([pixels(2, size=32, seed=seed) for seed in seeds])
    assert np.array_equal(images_of(open_source(tmp_path, "train")), expected)
    expected = pixels(2, size=32, seed=len(seeds))
    assert np.array_equal(images_of(open_source(tmp_path, "test")), expected)


@pytest.mark.parametrize("name", ["batches.meta", "data_batch_3", "test_batch"])
def test_a_pickle_that_would_run_something_is_refused(
    tmp_path: Path, canary: Path, name: str
) -> None:
    cifar10_python(tmp_path)
    write(tmp_path / "cifar-10-batches-py" / name, pickle.dumps(Canary(), 2))
    split = "test" if name == "test_batch" else "train"
    with pytest.raises(UsageError, match=rf"{name}.*damaged-batch"):
        rows_of(open_source(tmp_path, split))
    assert not canary.exists()


@pytest.mark.parametrize(
    ("make", "name", "data"),
    [
        (cifar10_binary, "cifar-10-batches-bin/data_batch_2.bin", b"short"),
        (cifar10_binary, "cifar-10-batches-bin/data_batch_2.bin", b""),
        (cifar10_binary, "cifar-10-batches-bin/batches.meta.txt", b"\xff"),
        (cifar100_binary, "cifar-100-binary/train.bin", b"\xff" * 3074),
        (cifar100_python, "cifar-100-python/train", b""),
        (cifar100_python, "cifar-100-python/meta", b"cos\nsystem\n(S'true'\ntR."),
    ],
)
def test_a_damaged_batch_is_an_error(
    tmp_path: Path, make: Callable[[Path], None], name: str, data: bytes
) -> None:
    make(tmp_path)
    write(tmp_path / name, data)
    with pytest.raises(UsageError, match="damaged-batch"):
        rows_of(open_source(tmp_path, "train"))


# Zarr


def test_a_zarr_group_has_its_rows_in_order(tmp_path: Path) -> None:
    sharded_zarr(tmp_path)
    source = open_source(tmp_path, "train")
    assert source
    assert np.array_equal(images_of(source), pixels(5))
    assert column(source, "key") == [f"k/{row}" for row in range(5)]
    assert column(source, "label") == (LABELS * 2)[:5]
    assert source.classes == ("0", "1", "2")
    assert open_source(tmp_path, "train", NAMES).classes == NAMES  # type: ignore[union-attr]


def test_zarr_shards_are_whole_chunks_of_about_a_thousand_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.storage.zarr.SHARD_ROWS", 5)
    write_zarr(tmp_path, pixels(9), chunks=(1, 8, 8, 3), shards=(2, 8, 8, 3))
    source = open_source(tmp_path, "train")
    assert source
    assert [(shard.name, shard.rows) for shard in source.shards] == [
        ("00000", 4),
        ("00001", 4),
        ("00002", 1),
    ]
    assert np.array_equal(images_of(source), pixels(9))
    check_source(source)


def test_encoded_images_in_a_zarr_group_are_given_as_they_are(tmp_path: Path) -> None:
    bytes_zarr(tmp_path)
    source = open_source(tmp_path, "train")
    assert rows_of(source) == [
        {"key": f"{row:08d}", "image": image} for row, image in enumerate(IMAGES)
    ]


def chunk(root: Path, array: str) -> Path:
    return max(path for path in (root / array / "c").rglob("*") if path.is_file())


@pytest.mark.parametrize("make", [sharded_zarr, chunked_zarr])
@pytest.mark.parametrize("array", ["image", "label", "key"])
def test_a_missing_chunk_is_an_error(
    tmp_path: Path, make: Callable[[Path], None], array: str
) -> None:
    make(tmp_path)
    chunk(tmp_path, array).unlink()
    with pytest.raises(UsageError, match=rf"missing in {array}.*damaged-zarr"):
        rows_of(open_source(tmp_path, "train"))


@pytest.mark.parametrize("make", [sharded_zarr, bytes_zarr])
@pytest.mark.parametrize("data", [b"", b"\0" * 16, b"garbage" * 100])
def test_a_damaged_chunk_is_an_error(
    tmp_path: Path, make: Callable[[Path], None], data: bytes
) -> None:
    make(tmp_path)
    chunk(tmp_path, "image").write_bytes(data)
    with pytest.raises(UsageError, match="damaged-zarr"):
        rows_of(open_source(tmp_path, "train"))


@pytest.mark.parametrize("options", [{"chunks": (5, 8, 8, 3)}, {"chunks": (1, 8, 8, 3)}])
def test_a_flipped_bit_is_an_error_where_there_are_checksums(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    from zarr.codecs import Crc32cCodec, ZstdCodec

    for number, compressors in enumerate(([Crc32cCodec()], [ZstdCodec(checksum=True)])):
        root = tmp_path / str(number)
        shards = (5, 8, 8, 3)
        write_zarr(root, pixels(5), compressors=compressors, shards=shards, **options)
        assert np.array_equal(images_of(open_source(root, "train")), pixels(5))
        path = chunk(root, "image")
        for place in (30, path.stat().st_size - 10):
            whole = path.read_bytes()
            flip(path, place)
            with pytest.raises(UsageError, match="damaged-zarr"):
                rows_of(open_source(root, "train"))
            path.write_bytes(whole)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("zarr.json", b""),
        ("zarr.json", b"\xff"),
        ("zarr.json", b"[]"),
        ("zarr.json", b'{"zarr_format": 3, "node_type": "group"'),
        ("zarr.json", b'{"zarr_format": 9, "node_type": "group"}'),
        ("zarr.json", b'{"zarr_format": 3, "node_type": "array"}'),
        ("image/zarr.json", b"{}"),
        ("image/zarr.json", b"garbage"),
        ("image/zarr.json", b'{"zarr_format": 3, "node_type": "group"}'),
        ("label/zarr.json", b'{"zarr_format": 3, "node_type": "array", "shape": "x"}'),
    ],
)
def test_damaged_metadata_are_an_error(tmp_path: Path, name: str, data: bytes) -> None:
    sharded_zarr(tmp_path)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match="damaged-zarr"):
        rows_of(open_source(tmp_path, "train"))


@pytest.mark.parametrize(
    ("name", "values", "match"),
    [
        ("image", pixels(5).astype(np.float32), "image"),
        ("image", np.arange(5, dtype=np.uint8), "image"),
        ("image", np.array(list("abcde"), object), "image"),
        ("label", np.zeros((5, 2), np.int64), "label"),
        ("label", np.zeros(5), "label"),
        ("label", np.zeros(4, np.int64), "one length"),
        ("key", np.zeros(5, np.int64), "key"),
    ],
)
def test_zarr_arrays_of_another_kind_are_refused(
    tmp_path: Path, name: str, values: Any, match: str
) -> None:
    import zarr

    write_zarr(tmp_path, pixels(5))
    group: Any = zarr.open_group(tmp_path, mode="a")
    kind = "str" if values.dtype == object else values.dtype
    group.create_array(name, shape=values.shape, dtype=kind, overwrite=True)[:] = values
    with pytest.raises(UsageError, match=rf"{match}.*damaged-zarr"):
        rows_of(open_source(tmp_path, "train"))


def test_a_codec_that_unpickles_is_not_known(tmp_path: Path, canary: Path) -> None:
    sharded_zarr(tmp_path)
    chunk(tmp_path, "key").write_bytes(pickle.dumps(Canary()))
    path = tmp_path / "key" / "zarr.json"
    path.write_text(path.read_text().replace('"vlen-utf8"', '"numcodecs.pickle"'))
    with pytest.raises(PipelineError):
        rows_of(open_source(tmp_path, "train"))
    assert not canary.exists()


# Digits and real data


def test_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    table = pa.concat_tables(open_digits().tables())
    assert table.num_rows == 1797
    assert table["label"].to_pylist() == bunch.target.tolist()
    assert np.abs(to_numpy(table["image"])[..., 0] / 255 * 16 - bunch.images).max() < 0.04
    assert table["key"].to_pylist()[:2] == ["digit-0000", "digit-0001"]


def test_real_archive(real_data: Path) -> None:
    source = open_source(real_data / "cifar10.npz", "test")
    assert source
    assert len(source.shards) == 10
    assert len(source.classes) == 10
    table = source.read(source.shards[3])
    assert to_numpy(table["image"]).shape == (1000, 32, 32, 3)
