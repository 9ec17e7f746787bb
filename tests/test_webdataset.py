"""Tar shards: which members are samples, which is the image, and what the label is."""

from __future__ import annotations

import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from layouts import IMAGES, NAMES, column, odd_tar, rows_of, samples, tars, write, write_tar
from samples import encoded, local_run, pixels

from pipeline.errors import RunError, UsageError
from pipeline.stages.decode import Decode
from pipeline.storage.open_source import open_source
from pipeline.storage.parquet import ParquetFormat
from pipeline.storage.store import FileInfo, LocalStore
from pipeline.storage.webdataset import WebDatasetSource
from pipeline.testing import check_source

Members = list[tuple[str, bytes]]


def read(root: Path, members: Members, links: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    write_tar(root / "x.tar", members, links=links)
    return rows_of(open_source(root / "x.tar", "train"))


@pytest.mark.parametrize(
    ("members", "label"),
    [
        ([("a.cls", b"1")], 1),
        ([("a.cls", b" 2\n")], 2),
        ([("a.CLS", b"1")], 1),
        ([("a.json", b'{"label": 2, "key": "x"}')], 2),
        ([("a.json", b'{"label": "1"}')], 1),
        ([("a.json", b'{"label": 2.0}')], 2),
        ([("a.cls", b"1"), ("a.json", b'{"label": 2}')], 1),
        ([("a.cls", b"")], None),
        ([("a.cls", b"n01440764")], None),
        ([("a.cls", b"1.5")], None),
        ([("a.cls", b"\xff")], None),
        ([("a.cls", b"9" * 30)], None),
        ([("a.cls", b"9" * 9000)], None),
        ([("a.json", b'{"label": 1.5}')], None),
        ([("a.json", b'{"label": true}')], None),
        ([("a.json", b'{"label": null}')], None),
        ([("a.json", b'{"label": [1]}')], None),
        ([("a.json", b'{"label": NaN}')], None),
        ([("a.json", b'{"label": Infinity}')], None),
        ([("a.json", b'{"label": 1e400}')], None),
        ([("a.json", b'{"other": 1}')], None),
        ([("a.json", b"[1]")], None),
        ([("a.json", b"{")], None),
        ([("a.json", b"[" * 100_000)], None),
        ([], None),
    ],
)
def test_the_label_is_what_cls_or_json_states(
    tmp_path: Path, members: Members, label: int | None
) -> None:
    other = [("b.png", IMAGES[1]), ("b.cls", b"0")]
    found = read(tmp_path, [("a.png", IMAGES[0]), *members, *other])
    assert found == [
        {"key": "a", "image": IMAGES[0], "label": label},
        {"key": "b", "image": IMAGES[1], "label": 0},
    ]


def test_a_negative_label_stays_for_the_screen_to_see(tmp_path: Path) -> None:
    found = read(tmp_path, [("a.png", b""), ("a.cls", b"-1"), ("b.png", b""), ("b.cls", b"1")])
    assert [row["label"] for row in found] == [-1, 1]


def test_a_label_beyond_all_reason_does_not_fill_the_memory(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("a.png", b""), ("a.cls", b"999999999999")])
    with pytest.raises(UsageError, match=r"highest label is 999999999999.*bad-labels"):
        rows_of(open_source(tmp_path / "x.tar", "train"))


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["a.jpg"], "a.jpg"),
        (["a.depth.jpg", "a.png"], "a.png"),
        (["a.seg.v1.png", "a.mask.png", "a.webp"], "a.webp"),
        (["a.left.png", "a.right.png"], "a.left.png"),
        (["a.txt", "a.JPEG"], "a.JPEG"),
        (["a.txt"], "a.txt"),  # what lies in the image's place is kept
        (["a.json"], None),
    ],
)
def test_the_image_is_the_member_with_the_plainest_extension(
    tmp_path: Path, names: list[str], chosen: str | None
) -> None:
    found = read(tmp_path, [*((name, name.encode()) for name in names), ("b.cls", b"0")])
    assert found[0]["image"] == (chosen.encode() if chosen else None)
    assert found[1] == {"key": "b", "image": None, "label": 0}


def test_members_may_lie_apart_and_strays_are_no_samples(tmp_path: Path) -> None:
    odd_tar(tmp_path)
    source = open_source(tmp_path, "train")
    assert column(source, "key") == [f"v1.0/{row}" for row in range(6)]
    assert column(source, "image") == IMAGES
    assert column(source, "label") == [0, 1, 2, 0, 1, 2]


def test_the_webdataset_library_sees_the_same_keys(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    odd = [("./c.d/x.y.png", b"1"), ("noext", b""), (".hid.png", b""), ("f/g.PNG", b"2")]
    write_tar(tmp_path / "x.tar", [*samples(range(3)), *odd])
    found = list(webdataset.WebDataset(str(tmp_path / "x.tar"), shardshuffle=False))
    keys = [sample["__key__"] for sample in found]
    assert column(open_source(tmp_path / "x.tar", "train"), "key") == keys


def test_a_member_that_is_there_twice_is_another_sample(tmp_path: Path) -> None:
    members = [*samples(range(2)), ("d/0.png", b"again"), ("d/0.cls", b"1")]
    found = read(tmp_path, members)
    assert [(row["key"], row["image"], row["label"]) for row in found] == [
        ("d/0", IMAGES[0], 0),
        ("d/1", IMAGES[1], 1),
        ("d/0", b"again", None),
        ("d/0", None, 1),
    ]
    source = open_source(tmp_path / "x.tar", "train")
    assert source
    step = local_run(tmp_path / "out", max_bad=2).map("copy", source, [], to=ParquetFormat())
    assert step.artifact.manifest["counts"]["out"] == 2


def test_a_link_is_no_image(tmp_path: Path) -> None:
    found = read(tmp_path, [("a.cls", b"0"), ("b.png", b"b"), ("b.cls", b"0")], links=("a.png",))
    assert found[0] == {"key": "a", "image": None, "label": 0}


def test_without_labels_there_is_no_column_of_labels(tmp_path: Path) -> None:
    assert read(tmp_path, [("a.png", b"1"), ("b.png", b"2")]) == [
        {"key": "a", "image": b"1"},
        {"key": "b", "image": b"2"},
    ]


def test_without_names_the_classes_count_to_the_highest_label(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("a.png", b""), ("a.cls", b"3")])
    write_tar(tmp_path / "1.tar", [("b.png", b""), ("b.cls", b"11")])
    source = open_source(tmp_path, "train")
    assert source
    assert source.classes == tuple(map(str, range(12)))
    check_source(source)


@pytest.mark.parametrize("ending", ["", "\n", "\r\n\r\n"])
@pytest.mark.parametrize("place", [".", "shards"])
def test_class_names_lie_beside_the_files_or_above(tmp_path: Path, ending: str, place: str) -> None:
    tars(tmp_path / "shards" / "train")
    names = (tmp_path / "shards/train/classes.txt").rename(tmp_path / place / "classes.txt")
    names.write_text("ant, small\n bee\ncat" + ending, newline="")
    source = open_source(tmp_path, "train")
    assert source
    assert source.classes == ("ant, small", "bee", "cat")
    names.with_name("classes.tsv").write_text('0\tn01\tant "x"\n1\tn02\tbee\n2\tn03\tcat\n')
    source = open_source(tmp_path, "train")
    assert source
    assert source.classes == ('ant "x"', "bee", "cat")


@pytest.mark.parametrize("place", ["0.tar", "{0..1}.tar"])
def test_class_names_count_for_single_files_too(tmp_path: Path, place: str) -> None:
    tars(tmp_path)
    source = open_source(f"{tmp_path}/{place}", "train")
    assert source
    assert source.classes == NAMES


@pytest.mark.parametrize(
    ("name", "data", "code"),
    [
        ("classes.txt", b"\xff\xfea", "bad-text"),
        ("classes.tsv", b"\xc3", "bad-text"),
        ("classes.tsv", b"1\tant\n2\tbee\n", "bad-labels"),
        ("classes.tsv", b"label\tname\n0\tant\n", "bad-labels"),
    ],
)
def test_class_names_that_cannot_be_read_are_an_error(
    tmp_path: Path, name: str, data: bytes, code: str
) -> None:
    tars(tmp_path)
    write(tmp_path / name, data)
    with pytest.raises(UsageError, match=code):
        open_source(tmp_path, "train")


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
    tars(tmp_path)
    path = tmp_path / "1.tar"
    path.write_bytes(damage(path.read_bytes()))
    source = open_source(tmp_path, "train")
    assert source
    with pytest.raises(RunError, match=r"1\.tar.*damaged-tar"):
        source.read(source.shards[1])
    assert source.read(source.shards[0]).num_rows == 3


def test_a_damaged_or_absent_gzip_is_an_error(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar.gz", samples(range(6)), "w:gz")
    raw = (tmp_path / "x.tar.gz").read_bytes()
    for data in (raw[:-20], raw[:40], b"", b"no gzip" * 9):
        (tmp_path / "x.tar.gz").write_bytes(data)
        with pytest.raises(RunError, match="damaged-tar"):
            rows_of(open_source(tmp_path, "train"))
    info = FileInfo("gone.tar", 1, "")
    with pytest.raises(RunError, match="storage-error"):
        rows_of(WebDatasetSource(LocalStore(tmp_path), (info,), NAMES))


class Canary:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["CANARY"],)


@pytest.mark.parametrize("extension", ["pyd", "pkl", "pickle", "pth", "pt", "pyc", "npy", "npz"])
@pytest.mark.parametrize("alone", [True, False])
def test_pickled_members_are_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extension: str, alone: bool
) -> None:
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    data = pickle.dumps(Canary())
    image = [] if alone else [("a.png", encoded(pixels(1)[0]))]
    others = [("a.cls", data), ("a.json", data)] if extension == "pkl" else [("a.cls", b"0")]
    members = [(f"a.{extension}", data), *image, *others]
    write_tar(tmp_path / "x.tar", [*members, ("b.png", encoded(pixels(1)[0])), ("b.cls", b"0")])
    source = open_source(tmp_path / "x.tar", "train")
    assert source
    step = local_run(tmp_path / "out", max_bad=1).map(
        "decode", source, [Decode(8, 3)], to=ParquetFormat()
    )
    assert "b" in column(step, "key")
    assert not (tmp_path / "canary").exists()
    pickle.loads(data)
    assert (tmp_path / "canary").exists(), "the canary itself works"


def test_json_beside_an_image_is_not_the_image(tmp_path: Path) -> None:
    data = json.dumps({"label": 0, "key": "other"}).encode()
    assert read(tmp_path, [("a.json", data), ("a.jpg", b"A")]) == [
        {"key": "a", "image": b"A", "label": 0}
    ]


def test_tarfile_writes_are_what_is_read(tmp_path: Path) -> None:
    for number, form in enumerate((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        name = "deep/" * 18 + "\u00e4"
        with tarfile.open(tmp_path / f"{number}.tar", "w", format=form) as tar:
            for extension, data in (("png", IMAGES[0]), ("cls", b"0")):
                path = tmp_path / "file"
                path.write_bytes(data)
                tar.add(path, f"{name}.{extension}")
        assert column(open_source(tmp_path / f"{number}.tar", "train"), "key") == [name]
