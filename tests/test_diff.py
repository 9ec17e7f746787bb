"""What differs between two data sets or outputs."""

from __future__ import annotations

import io
import json
import tarfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from samples import encoded, image_table, local_run, pixels

from pipeline import api
from pipeline.config import TrainConfig
from pipeline.dataset_distill.config import SqueezeConfig
from pipeline.dataset_distill.squeeze import Squeeze
from pipeline.diff import as_text, diff
from pipeline.errors import RunError
from pipeline.labelled_images import ImageConfig
from pipeline.storage.artifact import Artifact
from pipeline.storage.parquet import ParquetFormat, ParquetSource
from pipeline.storage.source import Shard, TableSource
from pipeline.storage.store import open_store

PNG = [encoded(image) for image in pixels(9)]
PARTS = ("only_a", "only_b", "image", "label", "other")


def write(root: Path, files: Mapping[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_tar(path: Path, samples: Sequence[tuple[str, bytes, int | None]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, image, label in samples:
            members = {f"{key}.png": image}
            if label is not None:
                members[f"{key}.cls"] = str(label).encode()
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def write_parquet(path: Path, samples: Sequence[tuple[str, bytes, int]], names: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    keys, images, labels = (list(column) for column in zip(*samples, strict=True))
    table = pa.table({"key": keys, "image": pa.array(images, pa.binary()), "label": labels})
    if names:
        features = {"label": {"names": names.split(), "_type": "ClassLabel"}}
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        table = table.replace_schema_metadata(metadata)
    pq.write_table(table, path, row_group_size=3)
    return path


def compare(a: Path, b: Path) -> dict[str, Any]:
    """The difference, which is the mirror image of that of the other order."""
    found, mirrored = diff(str(a), str(b)), diff(str(b), str(a))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["same"] == mirrored["same"]
    assert found["config"] == {name: pair[::-1] for name, pair in mirrored["config"].items()}
    for split, other in zip(found["splits"].values(), mirrored["splits"].values(), strict=True):
        assert counts(split) == {
            **(back := counts(other)),
            "only_a": back["only_b"],
            "only_b": back["only_a"],
        }
    verdict = "The data are the same." if found["same"] else "The data differ."
    assert as_text(found).endswith(verdict)
    return found


def counts(split: Mapping[str, Any]) -> dict[str, int]:
    return {part: split[part]["count"] for part in PARTS}


def nothing_but(**expected: int) -> dict[str, int]:
    return {**dict.fromkeys(PARTS, 0), **expected}


def test_every_kind_of_difference(tmp_path: Path) -> None:
    samples = [(f"k{n}", PNG[n], n % 2) for n in range(8)]
    changed = [*samples[1:7], ("new", PNG[8], 0), ("k9", PNG[8], 0)]
    changed[0] = ("k1", PNG[8], 1)
    changed[1] = ("k2", PNG[2], 1)
    changed[2] = ("k3", PNG[8], 0)
    a = write_parquet(tmp_path / "a.parquet", samples)
    b = write_parquet(tmp_path / "b.parquet", changed)
    found = compare(a, b)
    split = found["splits"]["train"]
    assert not found["same"]
    assert split["rows"] == [8, 8]
    assert split["only_a"] == {"count": 2, "keys": ["k0", "k7"]}
    assert split["only_b"] == {"count": 2, "keys": ["new", "k9"]}
    assert split["image"] == {"count": 2, "keys": ["k1", "k3"]}
    assert split["label"] == {"count": 2, "keys": ["k2", "k3"]}
    assert split["other"]["count"] == 0
    text = as_text(found)
    assert "only in A: 2 (k0, k7)" in text
    assert "other image: 2 (k1, k3)" in text


def test_the_first_five_keys_are_told(tmp_path: Path) -> None:
    a = write_parquet(tmp_path / "a.parquet", [(f"k{n}", PNG[n], 0) for n in range(8)])
    b = write_parquet(tmp_path / "b.parquet", [("k7", PNG[7], 0)])
    only = compare(a, b)["splits"]["train"]["only_a"]
    assert only == {"count": 7, "keys": ["k0", "k1", "k2", "k3", "k4"]}
    assert "k4, ...)" in as_text(diff(str(a), str(b)))


def test_order_shards_and_form_do_not_count(tmp_path: Path) -> None:
    samples = [(f"k{n}", PNG[n], n % 2) for n in range(8)]
    a = write_parquet(tmp_path / "a.parquet", samples)
    write_tar(tmp_path / "b" / "0.tar", samples[5:])
    write_tar(tmp_path / "b" / "1.tar", samples[4::-1])
    found = compare(a, tmp_path / "b")
    assert found["same"]
    assert found["splits"]["train"]["read"]
    assert counts(found["splits"]["train"]) == nothing_but()


def test_pixels_and_encoded_images_are_compared_by_pixels(tmp_path: Path) -> None:
    images = pixels(3, channels=1)
    np.savez(tmp_path / "x.npz", x_train=images, y_train=[0, 1, 0])
    keys = [f"train-{n:08d}" for n in range(3)]
    files = [encoded(images[0]), encoded(images[1], "TIFF"), encoded(pixels(1, seed=5)[0])]
    b = write_parquet(tmp_path / "b.parquet", list(zip(keys, files, [0, 1, 0], strict=True)))
    split = compare(tmp_path / "x.npz", b)["splits"]["train"]
    assert split["image"] == {"count": 1, "keys": [keys[2]]}
    assert split["stored"] == {"image": ["uint8 tensor 8 x 8 x 1", "binary"]}
    c = write_parquet(tmp_path / "c.parquet", [(keys[0], files[0], 0), (keys[1], b"damaged", 1)])
    split = compare(tmp_path / "x.npz", c)["splits"]["train"]
    assert counts(split) == nothing_but(only_a=1, image=1)


def test_encoded_images_are_compared_by_their_bytes(tmp_path: Path) -> None:
    image = pixels(1)[0]
    a = write(tmp_path / "a", {"x/0.png": encoded(image), "x/bad.png": b"damaged"})
    b = write(tmp_path / "b", {"x/0.png": encoded(image, "BMP"), "x/bad.png": b"damaged"})
    assert counts(compare(a, b)["splits"]["train"]) == nothing_but(image=1)


def test_arrays_of_other_shapes(tmp_path: Path) -> None:
    flat = np.zeros((2, 4, 6), np.uint8)
    np.savez(tmp_path / "a.npz", x_train=flat, y_train=[0, 1])
    np.savez(tmp_path / "b.npz", x_train=flat.reshape(2, 6, 4), y_train=[0, 1])
    split = compare(tmp_path / "a.npz", tmp_path / "b.npz")["splits"]["train"]
    assert counts(split) == nothing_but(image=2)
    assert split["stored"]["image"] == ["uint8 tensor 4 x 6 x 1", "uint8 tensor 6 x 4 x 1"]


def test_labels_are_compared_by_the_names_of_their_classes(tmp_path: Path) -> None:
    a = write_parquet(tmp_path / "a.parquet", [("0", PNG[0], 0), ("1", PNG[1], 1)], "ant bee")
    b = write_parquet(tmp_path / "b.parquet", [("0", PNG[0], 1), ("1", PNG[1], 0)], "bee ant")
    assert compare(a, b)["same"]
    swapped = write_parquet(tmp_path / "c.parquet", [("0", PNG[0], 0), ("1", PNG[1], 1)], "bee ant")
    assert counts(compare(a, swapped)["splits"]["train"]) == nothing_but(label=2)
    more = write_parquet(
        tmp_path / "d.parquet", [("0", PNG[0], 0), ("1", PNG[1], 1)], "ant bee cat"
    )
    found = compare(a, more)
    assert counts(found["splits"]["train"]) == nothing_but()
    assert found["splits"]["train"]["classes"] == {"only_a": [], "only_b": ["cat"]}
    assert not found["same"]


def test_labels_without_names_are_compared_by_number(tmp_path: Path) -> None:
    a = write_parquet(tmp_path / "a.parquet", [("0", PNG[0], 0), ("1", PNG[1], 1)], "ant bee")
    numbers = write_parquet(tmp_path / "b.parquet", [("0", PNG[0], 0), ("1", PNG[1], 1)])
    assert compare(a, numbers)["same"]
    other = write_parquet(tmp_path / "c.parquet", [("0", PNG[0], 1), ("1", PNG[1], 1)])
    assert counts(compare(a, other)["splits"]["train"]) == nothing_but(label=1)


def test_a_missing_image_or_label_is_one_of_its_own(tmp_path: Path) -> None:
    write(tmp_path, {f"{side}/classes.txt": b"ant\nbee\n" for side in "abc"})
    write_tar(tmp_path / "a" / "x.tar", [("0", PNG[0], 0), ("1", PNG[1], None), ("2", PNG[2], 1)])
    write_tar(tmp_path / "b" / "x.tar", [("0", PNG[0], 0), ("1", PNG[1], 0), ("2", PNG[2], 1)])
    assert counts(compare(tmp_path / "a", tmp_path / "b")["splits"]["train"]) == nothing_but(
        label=1
    )
    write_tar(tmp_path / "c" / "x.tar", [("2", PNG[2], 1), ("1", PNG[1], None), ("0", PNG[0], 0)])
    assert compare(tmp_path / "a", tmp_path / "c")["same"]


def test_a_data_set_without_labels_and_one_with_them(tmp_path: Path) -> None:
    a = write(tmp_path / "a", {"0.png": PNG[0], "1.png": PNG[1]})
    b = write_parquet(tmp_path / "b.parquet", [("0.png", PNG[0], 0), ("1.png", PNG[1], 0)])
    found = compare(a, b)
    assert counts(found["splits"]["train"]) == nothing_but()
    assert found["splits"]["train"]["columns"] == {"only_a": [], "only_b": ["label"]}
    assert not found["same"]
    assert compare(a, write(tmp_path / "c", {"1.png": PNG[1], "0.png": PNG[0]}))["same"]


def test_several_samples_with_one_key(tmp_path: Path) -> None:
    """Whichever comes first, those that are alike belong together."""
    ones = [("k", PNG[0], 0), ("k", PNG[1], 0), ("k", PNG[1], 0), ("z", PNG[2], 0)]
    a = write_parquet(tmp_path / "a.parquet", ones)
    assert compare(a, write_parquet(tmp_path / "b.parquet", ones[::-1]))["same"]
    changed = [("k", PNG[5], 0), ("z", PNG[2], 0), ("k", PNG[1], 0), ("k", PNG[0], 0)]
    b = write_parquet(tmp_path / "c.parquet", changed)
    assert counts(compare(a, b)["splits"]["train"]) == nothing_but(image=1)
    changed = [("k", PNG[5], 0), ("z", PNG[2], 0), ("k", PNG[6], 0), ("k", PNG[1], 0)]
    b = write_parquet(tmp_path / "e.parquet", changed)
    assert counts(compare(a, b)["splits"]["train"]) == nothing_but(image=2)
    b = write_parquet(tmp_path / "f.parquet", [ones[3], *ones])  # in one shard and the next
    assert counts(compare(a, b)["splits"]["train"]) == nothing_but(only_b=1)
    b = write_parquet(tmp_path / "d.parquet", [ones[3], ones[1]])
    split = compare(a, b)["splits"]["train"]
    assert split["only_a"] == {"count": 2, "keys": ["k", "k"]}
    assert counts(split) == nothing_but(only_a=2)


def test_splits_are_compared_by_name(tmp_path: Path) -> None:
    a = write(tmp_path / "a", {"train/x/0.png": PNG[0], "test/x/1.png": PNG[1]})
    b = write(tmp_path / "b", {"train/x/0.png": PNG[0], "test/x/1.png": PNG[2]})
    found = compare(a, b)
    assert [split["same"] for split in found["splits"].values()] == [True, False]
    assert not found["same"]
    c = write(tmp_path / "c", {"train/x/0.png": PNG[0]})
    found = diff(str(a), str(c))
    assert (found["only_a"], found["only_b"]) == (["test"], [])
    assert not found["same"]
    assert "only in A: test" in as_text(found)


def test_a_damaged_shard_is_an_error(tmp_path: Path) -> None:
    for side in "ab":
        write(tmp_path, {f"{side}/classes.txt": b"ant\n"})
        write_tar(tmp_path / side / "x.tar", [("0", PNG[0], 0)])
    (tmp_path / "b" / "x.tar").write_bytes(b"\xff" * 2000)
    with pytest.raises(RunError, match="tar"):
        diff(str(tmp_path / "a"), str(tmp_path / "b"))


def insects(root: Path) -> Path:
    files = {f"{name}/{n}.png": PNG[n] for name in ("ant", "bee") for n in range(4)}
    return write(root, files)


def convert(root: Path, out: Path, **options: Any) -> Path:
    config = {"format": "parquet", **options.pop("config", {})}
    api.run("convert", str(root), out=out, config=config, **options)
    return out


@pytest.mark.parametrize("form", ["webdataset", "parquet", "folder", "zarr"])
def test_what_was_converted_is_the_same(tmp_path: Path, form: str) -> None:
    root = insects(tmp_path / "insects")
    out = convert(root, tmp_path / "out", config={"format": form})
    assert compare(root, out)["same"]
    assert compare(out, next(out.glob("train-????????????")))["same"]
    (root / "bee" / "3.png").write_bytes(PNG[8])
    split = compare(root, out)["splits"]["train"]
    assert split["image"] == {"count": 1, "keys": ["bee/3.png"]}
    assert counts(split) == nothing_but(image=1)


def test_two_runs_differ_in_their_configuration(tmp_path: Path) -> None:
    root = insects(tmp_path / "insects")
    a = convert(root, tmp_path / "a")
    b = convert(root, tmp_path / "b", config={"format": "webdataset", "shard_mb": 1}, seed=4)
    found = compare(a, b)
    expected = {"format": ["parquet", "webdataset"], "shard_mb": [256, 1], "seed": [0, 4]}
    assert found["config"] == expected
    assert found["same"]
    assert "256 -> 1" in as_text(found)
    assert found["splits"]["train"]["read"]


def test_outputs_of_the_same_files_are_not_read(tmp_path: Path) -> None:
    root = insects(tmp_path / "insects")
    a, b = convert(root, tmp_path / "a"), convert(root, tmp_path / "b", seed=7)
    for file in [*a.glob("train-*/*.parquet"), *b.glob("train-*/*.parquet")]:
        file.unlink()
    found = compare(a, b)
    assert found["same"]
    assert found["splits"]["train"]["rows"] == [8, 8]
    assert not found["splits"]["train"]["read"]
    assert "by their manifests" in as_text(found)


def test_what_is_in_quarantine_is_missing(tmp_path: Path) -> None:
    root = insects(tmp_path / "insects")
    write(root, {"ant/bad.png": b"damaged"})
    out = convert(root, tmp_path / "out", config={"encode": "png"}, max_bad=0.5)
    only = compare(root, out)["splits"]["train"]["only_a"]
    assert only == {"count": 1, "keys": ["ant/bad.png"]}


def test_what_was_taken_up_from_quarantine_is_not_overlooked(tmp_path: Path) -> None:
    """The first part of the step is alike on both sides; only one has a second."""
    root = write(tmp_path / "data", {"a.png": PNG[0], "list.txt": b"a.png\tant\nb.png\tbee\n"})
    runs = [convert(root / "list.txt", tmp_path / name, max_bad=1) for name in "ab"]
    assert compare(*runs)["same"]
    write(root, {"b.png": PNG[1]})
    api.resume(runs[1], retry=[])
    split = compare(*runs)["splits"]["train"]
    assert split["only_b"] == {"count": 1, "keys": ["b.png"]}
    assert compare(root / "list.txt", runs[1])["same"]


def test_the_first_part_of_a_step_is_not_overlooked(tmp_path: Path) -> None:
    """Both sides took up the same sample, after another one that differs."""
    runs = []
    for name, image in (("a", PNG[0]), ("b", PNG[5])):
        files = {"a.png": image, "list.txt": b"a.png\tant\nb.png\tbee\n"}
        root = write(tmp_path / f"data-{name}", files)
        runs.append(convert(root / "list.txt", tmp_path / name, max_bad=1))
        write(root, {"b.png": PNG[1]})
        api.resume(runs[-1], retry=[])
    split = compare(*runs)["splits"]["train"]
    assert split["image"] == {"count": 1, "keys": ["a.png"]}


def table_run(
    out: Path, table: pa.Table, names: Sequence[str] = ("0", "1"), max_bad: int = 0
) -> Path:
    run = local_run(out, max_bad=max_bad)
    source = TableSource((("00000", table),), tuple(names))
    return Path(str(run.map("images", source, [], to=ParquetFormat()).artifact.store))


def test_other_columns(tmp_path: Path) -> None:
    table = image_table(3)
    a = table_run(tmp_path / "a", table.append_column("size", pa.array([1.5, None, 3.0])))
    b = table_run(tmp_path / "b", table.append_column("size", pa.array([1.5, 2.0, 4.0])))
    split = compare(a, b)["splits"]["images"]
    assert counts(split) == nothing_but(other=2)
    assert split["other"]["keys"] == table["key"].to_pylist()[1:]
    found = compare(a, table_run(tmp_path / "c", table))
    assert counts(found["splits"]["images"]) == nothing_but()
    assert found["splits"]["images"]["columns"] == {"only_a": ["size"], "only_b": []}
    assert not found["same"]


def test_values_do_not_move_between_columns(tmp_path: Path) -> None:
    table = image_table(1)
    a = table.append_column("x", pa.array([1])).append_column("y", pa.array([11]))
    b = table.append_column("x", pa.array([11])).append_column("y", pa.array([1]))
    split = compare(table_run(tmp_path / "a", a), table_run(tmp_path / "b", b))["splits"]["images"]
    assert counts(split) == nothing_but(other=1)


def test_two_places_of_one_split_each_are_compared(tmp_path: Path) -> None:
    a = table_run(tmp_path / "a", image_table(2))
    images = [encoded(image) for image in pixels(2)]
    keys = image_table(2)["key"].to_pylist()
    b = write_parquet(tmp_path / "b.parquet", list(zip(keys, images, [0, 1], strict=True)))
    assert compare(a, b)["same"]


def test_a_step_that_kept_nothing(tmp_path: Path) -> None:
    table = image_table(2)
    unlabelled = table.set_column(2, "label", pa.array([None] * 2, pa.int64()))
    a = table_run(tmp_path / "a", unlabelled, max_bad=2)
    split = compare(a, table_run(tmp_path / "b", table))["splits"]["images"]
    assert counts(split) == nothing_but(only_b=2)
    assert split["columns"] == {"only_a": [], "only_b": []}


def test_a_table_without_keys_is_compared_row_by_row(tmp_path: Path) -> None:
    a = table_run(tmp_path / "a", pa.table({"accuracy": [1.0, 2.0]}), ())
    b = table_run(tmp_path / "b", pa.table({"accuracy": [1.0, 3.0]}), ())
    split = compare(a, b)["splits"]["images"]
    assert split["other"] == {"count": 1, "keys": ["row 1"]}


def test_models_and_other_products_count_by_their_files(tmp_path: Path) -> None:
    def run(name: str, seed: int) -> Path:
        run = local_run(tmp_path / name, seed=seed)
        images = run.map(
            "images", TableSource((("0", image_table(4)),), ("0", "1")), [], to=ParquetFormat()
        )
        task = Squeeze(
            SqueezeConfig(backbone="convnet3", train=TrainConfig(epochs=1)), ImageConfig(size=8), 2
        )
        products = {
            "images": images.artifact,
            "teacher": run.fit("teacher", task, train=images, test=images),
        }
        run.publish("distilled", products, {"config": {"seeds": seed}})
        return tmp_path / name

    a, b, c = run("a", 0), run("b", 0), run("c", 1)
    assert compare(a, b)["same"]
    found = compare(a, c)
    assert found["products"] == ["teacher"]
    assert found["splits"]["images"]["same"]
    assert (found["same"], found["config"]) == (False, {"seeds": [0, 1]})
    assert "teacher" in as_text(found)
    folders = [Artifact.open(open_store(path)).product("teacher").store.url for path in (a, b, c)]
    assert diff(folders[0], folders[1])["same"]
    assert not diff(folders[0], folders[2])["same"]


def test_at_most_two_shards_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, tables = ParquetSource.read, list[weakref.ref[Any]]()

    def watched(source: ParquetSource, shard: Shard) -> pa.Table:
        assert sum(table() is not None for table in tables) <= 1
        table = read(source, shard)
        tables.append(weakref.ref(table))
        return table

    monkeypatch.setattr(ParquetSource, "read", watched)
    samples = [(f"k{n}", PNG[n], n) for n in range(9)]
    a, b = (write_parquet(tmp_path / name, samples) for name in ("a.parquet", "b.parquet"))
    assert diff(str(a), str(b))["same"]
    assert len(tables) == 6
