"""What a data set or an output holds."""

from __future__ import annotations

import io
import json
import tarfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from samples import encoded, image_table, local_run, pixels

from pipeline import api
from pipeline.config import TrainConfig
from pipeline.dataset_distill.config import SqueezeConfig
from pipeline.dataset_distill.squeeze import Squeeze
from pipeline.errors import UsageError
from pipeline.inspect import inspect
from pipeline.inspect_text import as_text
from pipeline.labelled_images import ImageConfig
from pipeline.storage.parquet import ParquetFormat, ParquetSource
from pipeline.storage.source import Shard, TableSource
from pipeline.storage.webdataset import WebDatasetFormat

PNG = [encoded(image) for image in pixels(6)]


def write(root: Path, files: Mapping[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def folder(root: Path) -> Path:
    """Two classes, one with a truncated image that comes first."""
    broken = encoded(pixels(1, size=64)[0])[:200]
    files = {f"bee/{row}.png": PNG[row] for row in range(3)}
    jpeg = encoded(pixels(1, size=16)[0], "JPEG")
    return write(root, {"ant/0.png": broken, "ant/1.jpg": jpeg, **files})


def plain(summary: dict[str, Any]) -> dict[str, Any]:
    """The summary, if it is of plain JSON types."""
    again: dict[str, Any] = json.loads(json.dumps(summary, allow_nan=False))
    assert again == summary
    return again


def test_an_image_folder(tmp_path: Path) -> None:
    root = folder(tmp_path / "insects")
    summary = plain(inspect(str(root), samples=3))
    assert summary["name"] == "insects"
    assert list(summary["splits"]) == ["train"]
    split = summary["splits"]["train"]
    assert split["source"] == "image folder"
    assert (split["shards"], split["rows"]) == (1, 5)
    assert split["bytes"] == sum(file.stat().st_size for file in root.rglob("*.*g"))
    assert split["classes"] == {"count": 2, "names": ["ant", "bee"]}
    assert split["schema"] == {"key": "string", "image": "binary", "label": "int64"}
    broken, jpeg, png = split["samples"]
    assert broken["key"] == "ant/0.png"
    assert broken["problem"].startswith("decode-error: ")
    assert broken["image"] == {"kind": "png", "width": 64, "height": 64, "bytes": 200}
    assert (jpeg["label"], jpeg["class"], jpeg["image"]["kind"]) == (0, "ant", "jpg")
    assert png["image"] == {"kind": "png", "width": 8, "height": 8, "bytes": len(PNG[0])}
    assert "problem" not in jpeg
    assert "problem" not in png
    assert "all" not in split


def test_all_of_an_image_folder(tmp_path: Path) -> None:
    files = {"cat/x.png": b"not an image", "cat/y.png": PNG[0], "cat/z.png": PNG[1]}
    root = write(folder(tmp_path), files)
    found = plain(inspect(str(root), every=True))["splits"]["train"]["all"]
    assert found["rows"] == 8
    assert found["kinds"] == {"jpg": 1, "png": 6, "unknown": 1}
    assert found["image_bytes"] == sum(file.stat().st_size for file in root.rglob("*.*g"))
    assert found["sizes"]["distinct"] == 3
    assert found["sizes"]["width"] == [8, 64]
    assert found["sizes"]["most_frequent"][0] == [8, 8, 5]
    rows = [["ant", 2], ["bee", 3], ["cat", 3]]
    assert found["by_class"] == {"min": 2, "median": 3, "max": 3, "rows": rows}
    assert (found["bad"], found["repeated_keys"]) == ({}, 0)


def test_tars_with_bad_samples(tmp_path: Path) -> None:
    write(tmp_path, {"classes.txt": b"ant\nbee\n"})
    members = [("0.cls", b"0"), ("1.png", PNG[1]), ("2.png", PNG[2]), ("2.cls", b"7")]
    write_tar(tmp_path / "a.tar", [*members, ("3.png", PNG[3]), ("3.cls", b"1")])
    write_tar(tmp_path / "b.tar", [("3.png", PNG[3]), ("3.cls", b"1"), ("4.png", PNG[4])])
    summary = plain(inspect(str(tmp_path), samples=4))
    split = summary["splits"]["train"]
    assert (split["source"], split["shards"], split["rows"]) == ("WebDataset", 2, None)
    found = [sample.get("problem", "").partition(":")[0] for sample in split["samples"]]
    assert found == ["no-image", "no-label", "bad-label", ""]
    assert split["samples"][0]["image"] is None
    assert (split["samples"][2]["label"], split["samples"][2]["class"]) == (7, None)
    assert "unknown until read" in as_text(summary)
    split = plain(inspect(str(tmp_path), every=True))["splits"]["train"]
    assert split["rows"] == split["all"]["rows"] == 6
    assert split["all"]["bad"] == {"bad-label": 1, "no-image": 1, "no-label": 2}
    assert split["all"]["by_class"]["rows"] == [["ant", 0], ["bee", 2]]
    assert split["all"]["kinds"] == {"png": 5}
    assert split["all"]["repeated_keys"] == 1


def test_repeated_keys_in_a_shard_and_across_shards(tmp_path: Path) -> None:
    columns = {"key": list("aabcab"), "image": PNG, "label": [0] * 6}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet", row_group_size=3)
    split = plain(inspect(str(tmp_path), every=True))["splits"]["train"]
    assert split["shards"] == 2
    assert "problem" not in split["samples"][0]
    assert split["samples"][1]["problem"].startswith("duplicate-key: ")
    assert split["all"]["bad"] == {"duplicate-key": 1}
    assert split["all"]["repeated_keys"] == 3


def test_samples_are_taken_from_as_many_shards_as_needed(tmp_path: Path) -> None:
    for shard in range(2):
        names = [f"{shard}-{row}.png" for row in range(2)]
        write_tar(tmp_path / f"{shard}.tar", [(name, PNG[shard]) for name in names])
    write(tmp_path, {"2.tar": b"damaged", "classes.txt": b"ant\n"})
    split = inspect(str(tmp_path), samples=3)["splits"]["train"]
    assert [sample["key"] for sample in split["samples"]] == ["0-0", "0-1", "1-0"]
    assert split["problems"] == []  # what comes after is not read


def test_parquet_without_labels(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": PNG, "note": ["x"] * 6}), tmp_path / "x.parquet")
    split = plain(inspect(str(tmp_path), every=True))["splits"]["train"]
    assert (split["source"], split["classes"]) == ("Parquet", {"count": 0, "names": []})
    assert split["all"]["by_class"] is None
    assert split["all"]["rows"] == split["rows"] == 6
    assert "label" not in split["samples"][0]
    assert "no classes" in as_text(inspect(str(tmp_path)))


def test_an_archive_with_two_splits_and_pixels(tmp_path: Path) -> None:
    images = pixels(5, size=4)
    arrays = {"x_train": images[:3], "y_train": [0, 1, 1], "x_test": images[3:], "y_test": [1, 0]}
    np.savez(tmp_path / "x.npz", **arrays, class_names=["ant", "bee"])
    summary = plain(inspect(str(tmp_path / "x.npz"), every=True))
    assert list(summary["splits"]) == ["train", "test"]
    train, test = summary["splits"].values()
    assert (train["source"], train["rows"], test["rows"]) == ("NumPy archive", 3, 2)
    assert train["schema"]["image"] == "uint8 tensor 4 x 4 x 3"
    assert test["samples"][0]["class"] == "bee"
    image = {"kind": "pixels", "width": 4, "height": 4, "bytes": 48}
    assert test["samples"][0]["image"] == image
    assert train["all"]["kinds"] == {"pixels": 3}
    assert train["all"]["by_class"]["rows"] == [["ant", 1], ["bee", 2]]
    assert "image:  uint8 tensor 4 x 4 x 3" in as_text(summary)


def test_a_data_set_by_name() -> None:
    summary = plain(inspect("digits", samples=1))
    assert summary["info"]["origin"] == "comes with scikit-learn"
    assert summary["splits"]["train"]["rows"] == 1797
    assert len(summary["splits"]["train"]["samples"]) == 1


def test_a_damaged_shard_is_told_and_the_others_are_read(tmp_path: Path) -> None:
    write(tmp_path, {"classes.txt": b"ant\nbee\n"})
    for shard in range(3):
        write_tar(tmp_path / f"{shard}.tar", [(f"{shard}.png", PNG[shard]), (f"{shard}.cls", b"0")])
    data = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(data[:100] + b"\xff" * 300 + data[400:])
    for every in (False, True):
        split = plain(inspect(str(tmp_path), every=every))["splits"]["train"]
        assert [problem["shard"] for problem in split["problems"]] == ["0"]
        assert [sample["key"] for sample in split["samples"]] == ["1", "2"]
    assert split["all"]["rows"] == 2
    assert split["rows"] is None  # not two: one shard's are unknown
    assert "! 0: The tar file cannot be read" in as_text(inspect(str(tmp_path)))


def test_labels_that_no_class_has(tmp_path: Path) -> None:
    write(tmp_path, {"classes.txt": b"ant\n"})
    members = [("0.png", PNG[0]), ("0.cls", b"5"), ("1.png", PNG[0]), ("1.cls", b"6")]
    write_tar(tmp_path / "x.tar", members)
    split = plain(inspect(str(tmp_path), every=True))["splits"]["train"]
    assert "there are 1 classes" in split["problems"][0]["problem"]
    assert split["all"]["bad"] == {"bad-label": 2}


def test_what_others_wrote_moves_no_cursor(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("a\x1b[2Jb\n.png", PNG[0]), ("a\x1b[2Jb\n.cls", b"0")])
    summary = inspect(str(tmp_path))
    assert "\x1b" in summary["splits"]["train"]["samples"][0]["key"]
    text = as_text(summary)
    assert "\x1b" not in text
    assert "\\x1b[2Jb\\n" in text


def test_a_sheet_shows_every_class(tmp_path: Path) -> None:
    """Of three classes in order, with one image that cannot be read, each has its column."""
    files: dict[str, bytes] = {}
    for label, level in enumerate((0, 100, 200)):
        for row in range(60):
            image = np.full((6, 10, 3), level, np.uint8)
            image[:, 5:] = 255
            files[f"class{label}/{row:02d}.png"] = encoded(image)
    files["class0/00.png"] = b"damaged"
    root = write(tmp_path / "data", files)
    path = tmp_path / "new" / "sheet.png"
    assert inspect(str(root), sheet=path)["sheet"] == {"path": str(path), "images": 100}
    assert [file.name for file in path.parent.iterdir()] == ["sheet.png"]
    with Image.open(path) as sheet:
        # 6 x 6 pixels from the middle, enlarged to 96, with gaps of two.
        assert sheet.size == (10 * 98 - 2, 10 * 98 - 2)
        for column, level in enumerate((0, 100, 200)):
            sides = [sheet.getpixel((98 * column + x, 48)) for x in (0, 47, 48, 95)]
            assert sides == [(level, level, level, 255)] * 2 + [(255, 255, 255, 255)] * 2


def test_a_sheet_of_a_sorted_data_set_looks_beyond_the_first_shards(tmp_path: Path) -> None:
    write(tmp_path, {"classes.txt": b"a\nb\nc\n"})
    for shard in range(24):
        image = encoded(np.full((8, 8, 3), 80 * (shard // 8), np.uint8))
        members = []
        for row in range(30):
            members += [(f"{shard}-{row}.png", image), (f"{shard}-{row}.cls", b"%d" % (shard // 8))]
        write_tar(tmp_path / f"{shard:02d}.tar", members)
    inspect(str(tmp_path), sheet=tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert [sheet.getpixel((98 * n + 9, 9))[0] for n in range(3)] == [0, 80, 160]  # type: ignore[index]


def test_no_sheet_of_nothing(tmp_path: Path) -> None:
    root = write(tmp_path / "data", {"a/x.png": b"damaged"})
    summary = plain(inspect(str(root), sheet=tmp_path / "sheet.png"))
    assert summary["sheet"] == {"path": None, "images": 0}
    assert not (tmp_path / "sheet.png").exists()
    assert "no image can be read" in as_text(summary)


def test_a_sheet_that_cannot_be_written(tmp_path: Path) -> None:
    root = folder(tmp_path / "data")
    with pytest.raises(UsageError, match="sheet"):
        inspect(str(root), sheet=root / "ant" / "0.png" / "sheet.png")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no data set"):
        inspect(str(tmp_path / "none"))


def converted(tmp_path: Path, **config: Any) -> Path:
    root, out = folder(tmp_path / "insects"), tmp_path / "out"
    config = {"format": "parquet", "encode": "png", **config}
    api.run("convert", str(root), out=out, config=config, max_bad=0.5)
    return out


def test_a_run_with_quarantine(tmp_path: Path) -> None:
    out = converted(tmp_path)
    summary = plain(inspect(str(out), every=True))
    output = summary["output"]
    assert (output["kind"], output["dataset"]) == ("dataset", "insects")
    assert output["config"]["encode"] == "png"
    step = output["steps"][0]
    assert output["products"] == {"train": step["folder"]}
    assert (step["in"], step["out"], step["filtered"]) == (5, 4, {})
    assert step["quarantined"] == {"decode-error": 1}
    files = list((out / step["folder"]).rglob("*.parquet"))
    assert len(files) == 2
    files.append(out / step["folder"] / "shards.index")
    assert step["bytes"] == sum(file.stat().st_size for file in files)
    split = summary["splits"]["train"]
    assert split["source"] == "output of this pipeline as parquet"
    assert split["rows"] == split["all"]["rows"] == 4
    text = as_text(summary)
    assert "1 decode-error" in text
    assert "encode    png" in text


def test_what_was_taken_up_from_quarantine_counts_as_one_step(tmp_path: Path) -> None:
    """A source whose files mend without its identity changing: a list of URLs."""
    files = {"a.png": PNG[0], "list.txt": b"a.png\tant\nb.png\tbee\n"}
    root, out = write(tmp_path / "data", files), tmp_path / "out"
    api.run("convert", str(root / "list.txt"), out=out, config={"format": "parquet"}, max_bad=1)
    first = inspect(str(out))["output"]["steps"][0]
    assert (first["in"], first["out"], first["quarantined"]) == (2, 1, {"unreadable": 1})
    write(root, {"b.png": PNG[1]})
    api.resume(out, retry=[])
    summary = plain(inspect(str(out), every=True))
    (step,) = summary["output"]["steps"]
    assert summary["output"]["products"] == {"train": step["folder"]}
    assert (step["in"], step["out"], step["quarantined"]) == (2, 2, {})
    assert step["shards"] == 2
    assert step["bytes"] > first["bytes"]
    assert summary["splits"]["train"]["all"]["rows"] == 2


def test_the_folder_of_one_step(tmp_path: Path) -> None:
    out = converted(tmp_path)
    step = next(out.glob("train-*"))
    summary = plain(inspect(str(step)))
    assert summary["output"]["kind"] == "table"
    assert [row["quarantined"] for row in summary["output"]["steps"]] == [{"decode-error": 1}]
    assert {name: split["rows"] for name, split in summary["splits"].items()} == {"train": 4}


def test_a_step_that_is_gone_is_told(tmp_path: Path) -> None:
    out = converted(tmp_path, format="zarr")
    samples = next(out.glob("train-samples-*"))
    for file in sorted(samples.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    summary = plain(inspect(str(out)))
    steps = {step["folder"]: step for step in summary["output"]["steps"]}
    assert "no finished output" in steps[samples.name]["problem"]
    assert summary["splits"]["train"]["rows"] == 4
    assert "no finished output" in as_text(summary)


def test_an_output_without_train_shows_its_images_and_models(tmp_path: Path) -> None:
    run = local_run(tmp_path, max_bad=0)
    source = TableSource((("00000", image_table(4)),), ("0", "1"))
    images = run.map("images", source, [], to=WebDatasetFormat())
    rows = pa.table({"trained_on": ["images", "noise"], "accuracy": [97.5, None]})
    numbers = run.map("numbers", TableSource((("n", rows),)), [], to=ParquetFormat())
    task = Squeeze(
        SqueezeConfig(backbone="convnet3", train=TrainConfig(epochs=1)), ImageConfig(size=8), 2
    )
    teacher = run.fit("teacher", task, train=source, test=source)
    products = {"images": images.artifact, "numbers": numbers.artifact, "teacher": teacher}
    run.publish("distilled", products, {"dataset": "x", "config": {"image": {"size": 8}}})

    summary = plain(inspect(str(tmp_path), every=True))
    assert summary["output"]["kind"] == "distilled"
    assert set(summary["output"]["products"]) == {"images", "numbers", "teacher"}
    assert {name: split["rows"] for name, split in summary["splits"].items()} == {"images": 4}
    steps = {step["step"]: step for step in summary["output"]["steps"]}
    assert steps["images"]["in"] == steps["images"]["out"] == 4
    assert steps["teacher"]["metrics"] == {"model": teacher.metrics}
    assert steps["teacher"]["bytes"] == sum(entry.bytes for entry in teacher.files.values())
    assert "image.size  8" in as_text(summary)

    summary = plain(inspect(str(tmp_path / teacher.name)))
    assert (summary["output"]["kind"], summary["splits"]) == ("models", {})
    assert summary["output"]["steps"][0]["metrics"] == {"model": teacher.metrics}
    assert "metrics of teacher" in as_text(summary)

    summary = plain(inspect(str(tmp_path / numbers.artifact.name), every=True))
    split = summary["splits"]["numbers"]
    assert split["samples"][0] == {"other": {"trained_on": "images", "accuracy": 97.5}}
    assert split["samples"][1]["other"]["accuracy"] is None
    assert split["all"]["rows"] == 2


def test_a_step_that_kept_nothing(tmp_path: Path) -> None:
    run = local_run(tmp_path, max_bad=4)
    table = image_table(4).set_column(2, "label", pa.array([None] * 4, pa.int64()))
    step = run.map("none", TableSource((("0", table),), ("a", "b")), [], to=ParquetFormat())
    summary = plain(inspect(str(tmp_path / step.artifact.name), every=True))
    assert summary["output"]["steps"][0]["quarantined"] == {"no-label": 4}
    assert summary["splits"]["none"]["rows"] == summary["splits"]["none"]["all"]["rows"] == 0
    assert summary["splits"]["none"]["samples"] == []
    assert "4 no-label" in as_text(summary)


def test_one_shard_at_a_time_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, tables = ParquetSource.read, list[weakref.ref[Any]]()

    def watched(source: ParquetSource, shard: Shard) -> pa.Table:
        assert sum(table() is not None for table in tables) == 0
        table = read(source, shard)
        tables.append(weakref.ref(table))
        return table

    monkeypatch.setattr(ParquetSource, "read", watched)
    columns = {"key": list("abcdef"), "image": PNG, "label": [0] * 6}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet", row_group_size=1)
    assert inspect(str(tmp_path), every=True)["splits"]["train"]["all"]["rows"] == 6
    assert len(tables) == 6
