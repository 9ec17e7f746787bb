"""Every kind of data set, as shards."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from samples import encoded, keyed, local_run, pixels

from pipeline.errors import PipelineError, RunError, UsageError
from pipeline.storage.artifact import Artifact, ArtifactSource
from pipeline.storage.digits import DigitsSource
from pipeline.storage.folder import FolderSource
from pipeline.storage.npz import NpzSource
from pipeline.storage.open_source import open_source
from pipeline.storage.parquet import ParquetFormat, ParquetSource
from pipeline.storage.regroup import RegroupedSource, cut, find_places
from pipeline.storage.source import Source
from pipeline.storage.webdataset import WebDatasetSource, read_samples
from pipeline.tensors import to_numpy
from pipeline.testing import check_source

IMAGES = [encoded(image) for image in pixels(6)]
LABELS = [0, 1, 2, 0, 1, 2]


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_parquet(path: Path, columns: dict[str, Any], **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    features = {"label": {"names": ["ant", "bee", "cat"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path, **options)


def write_folder(root: Path, names: Sequence[str]) -> None:
    for index, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(IMAGES[index % len(IMAGES)])


def make_folder(root: Path) -> Source:
    write_folder(root, ["b/1.png", "a/sub/2.PNG", "a/1.jpeg", "b/10.png", "b/.hidden.png"])
    (root / "a" / "notes.txt").write_text("not an image")
    (root / "top.png").write_bytes(IMAGES[0])
    return FolderSource(root)


def make_tars(root: Path) -> Source:
    for shard in range(2):
        members = []
        for row in range(shard * 3, shard * 3 + 3):
            members += [(f"d/{row}.png", IMAGES[row]), (f"d/{row}.cls", b"%d\n" % LABELS[row])]
        write_tar(root / f"{shard}.tar", members)
    return WebDatasetSource((root / "0.tar", root / "1.tar"), ("ant", "bee", "cat"))


def make_struct_parquet(root: Path) -> ParquetSource:
    image = [{"bytes": data, "path": f"{row}.png"} for row, data in enumerate(IMAGES)]
    write_parquet(root / "x.parquet", {"image": image, "label": LABELS}, row_group_size=4)
    return ParquetSource((root / "x.parquet",))


def make_binary_parquet(root: Path) -> ParquetSource:
    columns = {"label": LABELS, "image": IMAGES, "width": [8] * 6}
    write_parquet(root / "x.parquet", columns, row_group_size=4)
    return ParquetSource((root / "x.parquet",))


def make_npz(root: Path) -> Source:
    np.savez_compressed(root / "x.npz", x_train=pixels(5), y_train=np.array(LABELS[:5], np.int32))
    return NpzSource(root / "x.npz", "train")


def make_artifact(root: Path) -> Source:
    return local_run(root).map("step", keyed(3, 2), [], to=ParquetFormat())


def regrouped(base: Source, keys: tuple[str, ...]) -> RegroupedSource:
    places = find_places(base)
    return RegroupedSource(base, tuple(places[key] for key in keys), 2)


def make_regrouped(root: Path) -> RegroupedSource:
    return regrouped(make_tars(root), ("d/5", "d/0", "d/3", "d/1", "d/2"))


def make_digits(root: Path) -> Source:
    return DigitsSource()


def make_table(root: Path) -> Source:
    return keyed(2, 3)


MAKERS: list[Callable[[Path], Source]] = [
    make_folder,
    make_tars,
    make_struct_parquet,
    make_binary_parquet,
    make_npz,
    make_artifact,
    make_regrouped,
    make_digits,
    make_table,
]


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__[5:])
def test_it_keeps_the_contract(make: Callable[[Path], Source], tmp_path: Path) -> None:
    check_source(make(tmp_path))


def rows_of(source: Source | None) -> list[dict[str, Any]]:
    assert source
    return pa.concat_tables(source.tables()).to_pylist()


def test_folder_keys_are_paths_and_labels_are_sorted_folders(tmp_path: Path) -> None:
    source = make_folder(tmp_path)
    assert source.classes == ("a", "b")
    found = [(row["key"], row["label"]) for row in rows_of(source)]
    assert found == [("a/1.jpeg", 0), ("a/sub/2.PNG", 0), ("b/1.png", 1), ("b/10.png", 1)]
    assert [row["image"] for row in rows_of(source)] == [IMAGES[i] for i in (2, 1, 0, 3)]


def test_folders_are_cut_into_shards_of_1024(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.storage.folder.SHARD_ROWS", 3)
    write_folder(tmp_path, [f"c{row % 2}/{row}.png" for row in range(7)])
    source = FolderSource(tmp_path)
    assert [shard.rows for shard in source.shards] == [3, 3, 1]
    check_source(source)


OPENERS: list[tuple[Callable[[Path], Source], Callable[[Path], Source]]] = [
    (make_folder, FolderSource),
    (
        make_tars,
        lambda root: WebDatasetSource(tuple(sorted(root.iterdir())), ("ant", "bee", "cat")),
    ),
    (make_binary_parquet, lambda root: ParquetSource((root / "x.parquet",))),
    (make_npz, lambda root: NpzSource(root / "x.npz", "train")),
]


@pytest.mark.parametrize(("make", "again"), OPENERS)
def test_identity_ignores_the_place_and_follows_the_content(
    make: Callable[[Path], Source], again: Callable[[Path], Source], tmp_path: Path
) -> None:
    (tmp_path / "a").mkdir()
    before = make(tmp_path / "a").identity
    shutil.copytree(tmp_path / "a", tmp_path / "b")  # keeps the times of files
    assert again(tmp_path / "b").identity == before
    if make is make_npz:  # it holds checksums: another time is the same content
        os.utime(tmp_path / "b" / "x.npz", ns=(0, 0))
        assert again(tmp_path / "b").identity == before
        np.savez(tmp_path / "b" / "x.npz", x_train=pixels(5, seed=1), y_train=np.array(LABELS[:5]))
    else:
        for file in (tmp_path / "b").rglob("*"):
            os.utime(file, ns=(0, 0))
    assert again(tmp_path / "b").identity != before


def test_parquet_keys_come_from_path_or_column_or_row(tmp_path: Path) -> None:
    structs = make_struct_parquet(tmp_path)
    assert [row["key"] for row in rows_of(structs)] == [f"{row}.png" for row in range(6)]
    assert structs.classes == ("ant", "bee", "cat")
    assert [row["image"] for row in rows_of(structs)] == IMAGES
    plain = make_binary_parquet(tmp_path)
    assert [row["key"] for row in rows_of(plain)] == [f"x-{row:08d}" for row in range(6)]
    names = [f"n{row}" for row in range(6)]
    write_parquet(tmp_path / "x.parquet", {"image": IMAGES, "label": LABELS, "file_name": names})
    named = ParquetSource(plain.paths)
    assert [row["key"] for row in rows_of(named)] == names
    image = [{"bytes": data, "path": None} for data in IMAGES]
    write_parquet(tmp_path / "x.parquet", {"image": image, "label": LABELS})
    unnamed = ParquetSource(plain.paths)
    assert [row["key"] for row in rows_of(unnamed)] == [f"x-{row:08d}" for row in range(6)]


def test_npz_keys_number_the_rows_and_gray_images_get_a_channel(tmp_path: Path) -> None:
    images = pixels(5, channels=1)
    np.savez(
        tmp_path / "x.npz", x_test=images[..., 0], y_test=[0, 1, 1, 3, 0], class_names=list("abcd")
    )
    source = NpzSource(tmp_path / "x.npz", "test")
    assert source.classes == ("a", "b", "c", "d")
    table = source.read(source.shards[0])
    assert table["key"].to_pylist() == [f"test-{row:08d}" for row in range(5)]
    assert np.array_equal(to_numpy(table["image"]), images)


def test_npz_rows_lie_in_the_shard_that_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.storage.npz.SHARD_ROWS", 2)
    source = make_npz(tmp_path)
    assert [shard.rows for shard in source.shards] == [2, 2, 1]
    table = pa.concat_tables(source.tables())
    assert np.array_equal(to_numpy(table["image"]), pixels(5))
    assert table["label"].to_pylist() == LABELS[:5]


def test_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    table = pa.concat_tables(DigitsSource().tables())
    assert table.num_rows == 1797
    assert table["label"].to_pylist() == bunch.target.tolist()
    assert np.abs(to_numpy(table["image"])[..., 0] / 255 * 16 - bunch.images).max() < 0.04


def test_tar_labels_come_from_cls_or_json(tmp_path: Path) -> None:
    members = [
        ("a.seg.v1.png", b"not the image"),
        ("a.jpg", b"A"),
        ("a.json", b'{"label": 2}'),
        ("b.JPEG", b"B"),
        ("b.cls", b"1"),
        ("c.cls", b"0"),
    ]
    write_tar(tmp_path / "x.tar", members)
    found = rows_of(open_source(tmp_path / "x.tar", "train"))
    assert found == [
        {"key": "a", "image": b"A", "label": 2},
        {"key": "b", "image": b"B", "label": 1},
        {"key": "c", "image": None, "label": 0},
    ]


def test_links_and_devices_in_a_tar_are_left_out(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, kind in (
            ("a.png", tarfile.SYMTYPE),
            ("b", tarfile.DIRTYPE),
            ("c", tarfile.CHRTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    assert list(read_samples(tmp_path / "x.tar")) == []


def damage_header(raw: bytes) -> bytes:
    place = raw.rfind(b"d/4.png")
    return raw[:place] + b"x" + raw[place + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: b"garbage" * 200,
        lambda raw: raw[: raw.rfind(b"d/5.cls")],
        lambda raw: raw[: raw.rfind(b"d/5.cls") + 100],
        lambda raw: raw[: raw.rfind(b"d/4.png") + 520],
        damage_header,
    ],
    ids=["empty", "garbage", "cut between members", "cut in a header", "cut in data", "header"],
)
def test_a_damaged_tar_never_reads_as_a_shorter_one(
    damage: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    make_tars(tmp_path)
    path = tmp_path / "1.tar"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RunError, match="damaged-tar"):
        list(read_samples(path))


def test_members_that_are_too_large_or_lie_apart_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tar(tmp_path / "x.tar", [("a.png", b""), ("b.png", b""), ("a.cls", b"1")])
    with pytest.raises(RunError, match="lie apart"):
        list(read_samples(tmp_path / "x.tar"))
    monkeypatch.setattr("pipeline.storage.webdataset.MAX_MEMBER_BYTES", 9)
    write_tar(tmp_path / "x.tar", [("a.png", bytes(10))])
    with pytest.raises(RunError, match="10 bytes"):
        list(read_samples(tmp_path / "x.tar"))


@pytest.mark.parametrize("extension", ["tar", "parquet"])
def test_files_of_one_name_in_two_folders_are_two_shards(tmp_path: Path, extension: str) -> None:
    for side in "ab":
        if extension == "tar":
            write_tar(tmp_path / side / "0.tar", [(f"{side}.png", b""), (f"{side}.cls", b"0")])
        else:
            write_parquet(tmp_path / side / "0.parquet", {"image": IMAGES[:1], "label": [0]})
    source = open_source(tmp_path, "train")
    assert source
    if extension == "parquet":
        check_source(source)
    copy = local_run(tmp_path / "out").map("copy", source, [], to=ParquetFormat())
    assert rows_of(copy) == rows_of(source)
    assert len({row["key"] for row in rows_of(source)}) == 2


def test_artifact_source_leaves_out_empty_shards(tmp_path: Path) -> None:
    source = local_run(tmp_path).map("step", keyed(2, 0, 1), [], to=ParquetFormat())
    assert [shard.rows for shard in source.shards] == [2, 1]
    assert rows_of(ArtifactSource(Artifact.open(source.artifact.path))) == rows_of(keyed(2, 1))
    files = [p for p in source.artifact.path.glob("*") if p.name != "manifest.json"]
    assert source.bytes() == sum(path.stat().st_size for path in files)


@pytest.mark.parametrize("text", [None, b"", b"{", b"[]", b"{}"])
def test_a_folder_without_a_whole_manifest_is_no_artifact(
    tmp_path: Path, text: bytes | None
) -> None:
    if text is not None:
        (tmp_path / "manifest.json").write_bytes(text)
    with pytest.raises(UsageError, match="no-manifest"):
        Artifact.open(tmp_path)


def test_a_manifest_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"format_version": 99}')
    with pytest.raises(UsageError, match="format-version"):
        Artifact.open(tmp_path)


def test_regrouped_samples_come_in_the_order_of_the_keys(tmp_path: Path) -> None:
    source = make_regrouped(tmp_path)
    assert [row["key"] for row in rows_of(source)] == ["d/5", "d/0", "d/3", "d/1", "d/2"]
    assert [row["image"] for row in rows_of(source)] == [IMAGES[i] for i in (5, 0, 3, 1, 2)]
    assert [shard.rows for shard in source.shards] == [2, 2, 1]
    swapped = regrouped(source.base, ("d/0", "d/5", "d/3", "d/1", "d/2"))
    assert swapped.identity != source.identity
    assert swapped.shards[1] == source.shards[1]


def test_cut_keeps_every_item() -> None:
    assert cut("abcdefg", 3) == ["abc", "def", "g"]
    assert cut("abc", 3) == ["abc"]
    assert cut("", 3) == []


def test_train_and_val_folders_are_two_splits(tmp_path: Path) -> None:
    write_folder(tmp_path, ["train/a/1.png", "train/b/2.png", "val/a/3.png", "val/b/4.png"])
    assert [row["key"] for row in rows_of(open_source(tmp_path, "train"))] == ["a/1.png", "b/2.png"]
    assert [row["key"] for row in rows_of(open_source(tmp_path, "test"))] == ["a/3.png", "b/4.png"]


@pytest.mark.parametrize("layout", ["{split}-00000.parquet", "data/{split}/0.parquet"])
@pytest.mark.parametrize("test", ["test", "val", "validation"])
def test_parquet_files_are_split_by_name_or_folder(tmp_path: Path, layout: str, test: str) -> None:
    for index, split in enumerate(("train", test)):
        columns = {"image": IMAGES[index : index + 1], "label": [index]}
        write_parquet(tmp_path / layout.format(split=split), columns)
    assert [row["label"] for row in rows_of(open_source(tmp_path, "train"))] == [0]
    assert [row["label"] for row in rows_of(open_source(tmp_path, "test"))] == [1]


def test_what_is_not_split_is_all_training_data(tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    make_tars(tmp_path / "tars")
    make_folder(tmp_path / "folder")
    make_npz(tmp_path)
    make_artifact(tmp_path / "run")
    artifact = next((tmp_path / "run").glob("step-*"))
    for path in (tmp_path / "tars", tmp_path / "folder", tmp_path / "x.npz", artifact):
        assert open_source(path, "test") is None
        assert rows_of(open_source(path, "train"))
    assert isinstance(open_source(tmp_path / "tars" / "0.tar", "train"), WebDatasetSource)


@pytest.mark.parametrize("ending", ["", "\n"])
def test_class_names_lie_beside_the_files(tmp_path: Path, ending: str) -> None:
    make_tars(tmp_path)
    (tmp_path / "classes.txt").write_text("ant\nbee\ncat" + ending)
    source = open_source(tmp_path, "train")
    assert source
    assert source.classes == ("ant", "bee", "cat")
    (tmp_path / "classes.tsv").write_text("0\tn01\tant, small\n1\tn02\tbee\n")
    source = open_source(tmp_path, "train")
    assert source
    assert source.classes == ("ant, small", "bee")


def test_what_is_no_data_set_says_what_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("x")
    write_folder(tmp_path / "flat", ["1.png", "2.png"])
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    for name, code in (
        ("nothing", "no-data"),
        ("empty", "unknown-form"),
        ("text.txt", "unknown-form"),
        ("flat", "2 images outside class folders"),
        ("other.npz", "unknown-form"),
    ):
        with pytest.raises(UsageError, match=code):
            open_source(tmp_path / name, "train")


def test_parquet_without_the_columns_says_which(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet", {"picture": IMAGES, "label": LABELS})
    source = ParquetSource((tmp_path / "x.parquet",))
    with pytest.raises(UsageError, match="no column image"):
        source.read(source.shards[0])


class Canary:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["CANARY"],)


def test_pickled_objects_in_an_npz_are_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    objects = np.array([Canary()], dtype=object)
    np.savez(tmp_path / "x.npz", x_train=objects, y_train=np.array([0]))
    source = open_source(tmp_path / "x.npz", "train")
    assert source
    with pytest.raises(UsageError, match="damaged-npz"):
        source.read(source.shards[0])
    np.savez(tmp_path / "y.npz", x_train=pixels(1), y_train=objects)
    with pytest.raises(UsageError, match="damaged-npz"):
        assert NpzSource(tmp_path / "y.npz", "train").shards
    assert not (tmp_path / "canary").exists()
    with np.load(tmp_path / "x.npz", allow_pickle=True) as archive:
        assert archive["x_train"] is not None
    assert (tmp_path / "canary").exists(), "the canary itself works"


def test_npz_images_that_are_not_bytes_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x_train=pixels(2) / 255, y_train=np.array([0, 1]))
    source = NpzSource(tmp_path / "x.npz", "train")
    with pytest.raises(UsageError, match="float64"):
        source.read(source.shards[0])


def test_a_flipped_bit_in_an_npz_is_found(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x_train=pixels(2), y_train=np.array([0, 1]))
    raw = bytearray((tmp_path / "x.npz").read_bytes())
    raw[raw.find(pixels(2).tobytes()) + 7] ^= 4
    (tmp_path / "x.npz").write_bytes(raw)
    source = NpzSource(tmp_path / "x.npz", "train")
    with pytest.raises(UsageError, match="damaged-npz"):
        source.read(source.shards[0])


@pytest.mark.parametrize("name", ["x.npz", "x.parquet"])
def test_a_file_that_is_not_what_its_name_says_is_a_usage_error(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"garbage")
    with pytest.raises(PipelineError):
        rows_of(open_source(tmp_path / name, "train"))


def test_a_class_has_one_label_in_both_splits(tmp_path: Path) -> None:
    write_folder(tmp_path, ["train/a/1.png", "train/b/2.png", "val/b/3.png"])
    assert [row["label"] for row in rows_of(open_source(tmp_path, "train"))] == [0, 1]
    assert [row["label"] for row in rows_of(open_source(tmp_path, "test"))] == [1]


def test_real_archive(real_data: Path) -> None:
    source = NpzSource(real_data / "cifar10.npz", "test")
    assert len(source.shards) == 10
    assert len(source.classes) == 10
    table = source.read(source.shards[3])
    assert to_numpy(table["image"]).shape == (1000, 32, 32, 3)


def test_real_parquet(real_data: Path) -> None:
    train = open_source(real_data / "imagenette", "train")
    test = open_source(real_data / "imagenette", "test")
    assert train
    assert test
    assert sum(shard.rows or 0 for shard in train.shards) == 1200
    assert train.classes == test.classes
    assert len(train.classes) == 10
    check_source(test)
