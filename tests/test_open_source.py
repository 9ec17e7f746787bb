"""Which kind of data set lies at a path or URL."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layouts import (
    IMAGES,
    LAYOUTS,
    NAMES,
    class_folders,
    column,
    ilsvrc_devkit,
    npz,
    rows_of,
    run_output,
    samples,
    split_tars,
    step_output,
    struct_parquet,
    tars,
    upload,
    write,
    write_images,
    write_parquet,
    write_tar,
)
from samples import pixels

from pipeline.errors import PipelineError, RunError, UsageError
from pipeline.storage import npz as npz_module
from pipeline.storage.artifact import ArtifactSource
from pipeline.storage.folder import FolderSource
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.open_source import open_source
from pipeline.storage.parquet import ParquetSource
from pipeline.storage.store import LocalStore
from pipeline.storage.webdataset import WebDatasetSource
from pipeline.testing import check_source


def keys(place: str | Path, split: str = "train") -> list[str]:
    return column(open_source(place, split), "key")


def test_what_is_no_data_set_says_what_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "text" / "notes.md", "x")
    write(tmp_path / "hidden" / ".a.png", IMAGES[0])
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    np.savez(tmp_path / "half.npz", x_train=np.zeros(3))
    write(tmp_path / "notes.md", "x")
    write(tmp_path / "void.npz", b"")
    for name, match in (
        ("nothing", r"no data set at this path.*no-data"),
        ("nothing.tar", "no-data"),
        ("empty", "0 files.*unknown-form"),
        ("text", "1 files, no images.*unknown-form"),
        ("hidden", "unknown-form"),
        ("other.npz", "unknown-form"),
        ("half.npz", "unknown-form"),
        ("notes.md", "unknown-form"),
        ("void.npz", "damaged-npz"),
    ):
        with pytest.raises(UsageError, match=match):
            open_source(tmp_path / name, "train")


def test_nothing_in_an_object_store_is_no_data(s3: ObjectStore) -> None:
    s3.replace("x/0.tar", b"")
    for name in ("nothing", "x/1.tar", "x/{0..1}.tar", "x/0"):
        with pytest.raises(UsageError, match="no-data"):
            open_source(f"{s3.url}/{name}", "train")


@pytest.mark.parametrize("name", ["x.npz", "x.parquet", "x.tar", "x.tar.gz", "x.tgz", "x.txt"])
@pytest.mark.parametrize("data", [b"", b"garbage\xff" * 100])
def test_a_file_that_is_not_what_its_name_says_is_an_error(
    tmp_path: Path, name: str, data: bytes
) -> None:
    write(tmp_path / name, data)
    for place in (tmp_path / name, tmp_path):
        with pytest.raises(PipelineError) as caught:
            rows_of(open_source(place, "train"))
        assert caught.value.hint
        assert caught.value.where


DATA = {".tar", ".gz", ".tgz", ".parquet", ".npz", ".bin", ".mat"}


@pytest.mark.parametrize("name", sorted(LAYOUTS.keys() - {"run_output", "step_output"}))
def test_no_empty_file_is_passed_over_or_crashes(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    layout.write(tmp_path)
    for path in sorted(path for path in tmp_path.rglob("*") if path.is_file()):
        data = path.read_bytes()
        path.write_bytes(b"")
        errors = []
        for split in layout.rows:
            try:
                source = open_source(f"{tmp_path}/{layout.place}", split)
                rows = rows_of(source) if source else []
            except PipelineError as error:
                errors.append(error.hint)
            else:
                if path.suffix.lower() in {".png", ".jpeg"} and path.name in str(rows):
                    assert b"" in [row["image"] for row in rows]
        needed = path.suffix in DATA and not path.name.startswith("ILSVRC2012_img")
        assert errors or not needed, f"{path} is empty"
        assert all(errors), "an error has no hint"
        path.write_bytes(data)


@pytest.mark.parametrize("name", sorted(LAYOUTS.keys() - {"run_output", "step_output"}))
def test_damaged_bytes_are_read_or_an_error_of_ours(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(npz_module, "_member", npz_module._member.__wrapped__)
    layout = LAYOUTS[name]
    layout.write(tmp_path)
    files = [path for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    rng = random.Random(name)
    for _ in range(25):
        path = rng.choice(files)
        whole = path.read_bytes()
        data = bytearray(whole[: rng.choice([len(whole), rng.randrange(len(whole))])])
        for _ in range(rng.choice([1, 3, 20]) if data else 0):
            place = rng.randrange(min(len(data), 500))  # most that matters lies at the ends
            data[rng.choice([place, -1 - place])] = rng.randrange(256)
        path.write_bytes(data)
        for split in layout.rows:
            with suppress(PipelineError):
                source = open_source(f"{tmp_path}/{layout.place}", split)
                assert source is None or (rows_of(source) is not None and source.identity)
        path.write_bytes(whole)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


def test_a_web_server_that_lists_nothing_serves_ranges_of_files(tmp_path: Path) -> None:
    split_tars(tmp_path)
    write(tmp_path / "classes.txt", "\n".join(NAMES))
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))
    thread.start()
    try:
        root = f"http://127.0.0.1:{http.server_port}"
        source = open_source(root + "/imagenet1k-train-{0000..0001}.tar", "train")
        assert source
        assert source.classes == NAMES
        check_source(source)
        assert column(source, "image") == IMAGES[:5]
        with pytest.raises(UsageError, match="1 of 3 files are not there"):
            open_source(root + "/imagenet1k-train-{0000..0002}.tar", "train")
        with pytest.raises(PipelineError):
            open_source(root + "/gone.tar", "train")
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_rights_is_an_error(tmp_path: Path) -> None:
    class_folders(tmp_path)
    (tmp_path / "a").chmod(0)
    try:
        with pytest.raises(PipelineError):
            rows_of(open_source(tmp_path, "train"))
    finally:
        (tmp_path / "a").chmod(0o755)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (tars, WebDatasetSource),
        (struct_parquet, ParquetSource),
        (class_folders, FolderSource),
        (step_output, ArtifactSource),
        (run_output, ArtifactSource),
    ],
)
def test_paths_stores_and_urls_are_taken(
    make: Callable[[Path], None], kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "here")
    folder = tmp_path / "here" / ("step" if make is step_output else "")
    monkeypatch.chdir(folder)
    for place in (folder, str(folder), f"{folder}/", f"file://{folder}", ".", LocalStore(folder)):
        source = open_source(place, "train")
        assert isinstance(source, kind)
        assert source.identity == open_source(folder, "train").identity  # type: ignore[union-attr]


# Ranges and single files


@pytest.mark.parametrize("remote", [True, False])
def test_ranges_name_files(tmp_path: Path, s3: ObjectStore, remote: bool) -> None:
    for number in range(8, 12):
        write_tar(tmp_path / f"t-{number:03d}.tar", samples([number % 6], f"{number}-"))
    write(tmp_path / "classes.txt", "\n".join(NAMES))
    upload(tmp_path, s3)
    root = s3.url if remote else str(tmp_path)
    source = open_source(f"{root}/t-{{008..010}}.tar", "train")
    assert source
    assert source.classes == NAMES
    assert column(source, "key") == ["8-2", "9-3", "10-4"]
    assert keys(f"{root}/t-0{{08..09}}.tar") == ["8-2", "9-3"]
    assert keys(f"{root}/t-{{0..0}}{{1..1}}{{0..1}}.tar") == ["10-4", "11-5"]
    with pytest.raises(UsageError, match=r"1 of 3 files are not there: t-012\.tar.*no-data"):
        open_source(f"{root}/t-{{010..012}}.tar", "train")


@pytest.mark.parametrize("text", ["{3..1}", "{0..99999999999}"])
def test_an_empty_or_endless_range_is_an_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match="bad-range"):
        open_source(f"{tmp_path}/{text}.tar", "train")


def test_a_file_may_have_the_name_of_a_range(tmp_path: Path) -> None:
    write_tar(tmp_path / "{0..1}.tar", samples([0]))
    assert keys(tmp_path / "{0..1}.tar") == ["d/0"]


@pytest.mark.parametrize("remote", [True, False])
def test_a_folder_may_have_the_name_of_a_file(
    tmp_path: Path, s3: ObjectStore, remote: bool
) -> None:
    write_parquet(tmp_path / "x.parquet/part-0.parquet", {"image": IMAGES[:2], "label": [0, 1]})
    upload(tmp_path, s3)
    root = s3.url if remote else str(tmp_path)
    assert len(keys(f"{root}/x.parquet")) == 2


def test_a_single_file_is_all_there_is(tmp_path: Path) -> None:
    split_tars(tmp_path)
    path = tmp_path / "imagenet1k-validation-00.tar"
    assert keys(path) == ["d/5"]
    assert open_source(path, "test") is None


# Splits


def test_tars_are_split_by_a_word_in_their_names(tmp_path: Path) -> None:
    split_tars(tmp_path)
    assert keys(tmp_path) == [f"d/{row}" for row in range(5)]
    assert keys(tmp_path, "test") == ["d/5"]


@pytest.mark.parametrize(
    "name", ["constrained-0.tar", "latest.tar", "evaluate-0.tar", "trainer.tar"]
)
def test_a_word_inside_another_marks_no_split(tmp_path: Path, name: str) -> None:
    write_tar(tmp_path / name, samples([0]))
    write_tar(tmp_path / "x-1.tar", samples([1]))
    assert len(keys(tmp_path)) == 2
    assert open_source(tmp_path, "test") is None


def test_test_files_without_training_files_are_all_there_is(tmp_path: Path) -> None:
    write_tar(tmp_path / "test-0.tar", samples([0]))
    assert keys(tmp_path) == ["d/0"]
    assert open_source(tmp_path, "test") is None


def test_of_two_test_splits_the_first_with_labels_counts(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0.tar", samples([0, 1]))
    write_tar(tmp_path / "val-0.tar", samples([2]))
    write_tar(tmp_path / "test-0.tar", [("3.png", IMAGES[3])])
    assert keys(tmp_path, "test") == ["d/2"]
    write_tar(tmp_path / "test-0.tar", samples([4]))
    assert keys(tmp_path, "test") == ["d/4"]


def test_archives_that_imagenet_came_in_are_left_alone(tmp_path: Path) -> None:
    ilsvrc_devkit(tmp_path)
    write(tmp_path / "ILSVRC2012_img_train.tar", "not read")
    write(tmp_path / "ILSVRC2012_devkit_t12.tar.gz", "not read")
    assert isinstance(open_source(tmp_path, "train"), FolderSource)


# What this package wrote


def test_outputs_without_images_are_refused(tmp_path: Path) -> None:
    run_output(tmp_path / "run")
    manifest = tmp_path / "run" / "manifest.json"
    assert len(keys(tmp_path / "run", "test")) == 2
    manifest.write_bytes(manifest.read_bytes()[:-40])
    with pytest.raises(RunError, match="damaged-manifest"):
        open_source(tmp_path / "run", "train")
    manifest.unlink()
    with pytest.raises(PipelineError):
        rows_of(open_source(tmp_path / "run" / ".run", "train"))


def test_both_splits_of_an_archive_are_known(tmp_path: Path) -> None:
    npz(tmp_path)
    assert len(keys(tmp_path / "x.npz")) == 5
    assert len(keys(tmp_path / "x.npz", "test")) == 3
    np.savez(tmp_path / "v.npz", x_train=pixels(1), y_train=[0], x_val=pixels(2), y_val=[0, 0])
    assert len(keys(tmp_path / "v.npz", "test")) == 2
    with pytest.raises(UsageError, match="other-classes"):
        open_source(tmp_path / "x.npz", "train", ("bee", "ant"))


def test_folders_count_in_the_order_of_names_that_are_given(tmp_path: Path) -> None:
    write_images(tmp_path, "b/1.png", "c/2.png")
    source = open_source(tmp_path, "train", ("c", "b", "a"))
    assert source
    assert source.classes == ("c", "b", "a")
    assert column(source, "label") == [1, 0]
    with pytest.raises(UsageError, match=r"not in the training split: c.*unknown-class"):
        open_source(tmp_path, "train", ("b", "a"))
    assert open_source(tmp_path, "train", ("0", "1", "2")).classes == ("b", "c")  # type: ignore[union-attr]
