"""Converting keeps every key, label and byte, whatever happens on the way."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image
from samples import encoded, pixels

import pipeline
from pipeline.errors import PipelineError, RunError, UsageError
from pipeline.storage.artifact import Artifact
from pipeline.storage.images import decode
from pipeline.storage.open_source import open_source
from pipeline.storage.store import open_store
from pipeline.testing import tree_digest

KINDS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
FORMATS = ("webdataset", "zarr", "parquet", "folder")


def make_folder(root: Path, rows: int = 30, size: int = 12) -> Path:
    """Images of every kind, with the names that cameras, people and ImageNet give."""
    names = ("n01440764_10026.JPEG", "a b.{k}", "x.y.z.{K}", "ä%41.{k}", "no-extension-clash.{k}")
    for row in range(rows):
        kind = KINDS[row % len(KINDS)]
        name = f"{row}-" + names[row % len(names)].format(k=kind.lower(), K=kind)
        path = root / "train" / f"class {row % 3}" / ("deep" if row % 4 == 0 else "") / name
        path = path.with_suffix({".gif": ".gif", ".ppm": ".ppm"}.get(path.suffix, path.suffix))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(pixels(1, size, seed=row)[0], kind))
    for row in range(4):
        path = root / "val" / f"class {row % 3}" / f"{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(pixels(1, size, seed=100 + row)[0]))
    return root


def convert(source: Any, out: Any, **config: Any) -> dict[str, Any]:
    options = {"executor": config.pop("executor", "local"), "max_bad": config.pop("max_bad", 0)}
    return pipeline.run("convert", str(source), out=str(out), config=config, **options)


def files_of(folder: str | Path) -> dict[str, bytes]:
    return {
        info.name: open_store(folder).read(info.name)
        for info in open_store(folder).files()
        if not info.name.startswith(".") and info.name not in {"manifest.json", "shards.index"}
    }


@pytest.mark.parametrize("place", ["local", "s3"])
def test_a_round_trip_through_every_format_gives_the_original_files(
    tmp_path: Path, place: str, request: pytest.FixtureRequest
) -> None:
    root: str | Path = request.getfixturevalue("s3") if place == "s3" else tmp_path
    source: str | Path = make_folder(tmp_path / "source")
    for fmt in FORMATS:
        out = f"{root}/as-{fmt}"
        last = convert(source, out, format=fmt, shard_mb=1)
        source = out
    assert files_of(last["train"]["path"]) == files_of(tmp_path / "source" / "train")
    assert files_of(last["test"]["path"]) == files_of(tmp_path / "source" / "val")


@pytest.mark.parametrize("fmt", FORMATS)
def test_keys_labels_and_bytes_are_kept_in_their_order(tmp_path: Path, fmt: str) -> None:
    root = make_folder(tmp_path / "source")
    convert(root, tmp_path / "out", format=fmt)
    for split in ("train", "test"):
        before, after = (open_source(place, split) for place in (root, tmp_path / "out"))
        assert before
        assert after
        assert after.classes == before.classes
        rows = [[r for t in s.tables() for r in t.to_pylist()] for s in (before, after)]
        assert rows[0] == [{name: row[name] for name in rows[0][0]} for row in rows[1]]


def test_other_tools_read_what_was_written(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "source")
    summary = convert(root, tmp_path / "out", format="webdataset")
    urls = sorted(str(path) for path in Path(summary["train"]["path"]).glob("*.tar"))
    found = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert len(found) == 30
    for sample in found:
        about = json.loads(sample["json"])
        image = next(
            data
            for name, data in sample.items()
            if name in {k.lower() for k in KINDS} | {"jpg", "tif"}
        )
        assert image == (root / "train" / about["key"]).read_bytes()
        assert int(sample["cls"]) == int(about["key"].split("/")[0][-1])


def test_local_ray_and_interrupted_runs_write_the_same_bytes(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "source")
    convert(root, tmp_path / "a")
    convert(root, tmp_path / "b", executor="ray")
    assert tree_digest(tmp_path / "a") == tree_digest(tmp_path / "b")


def test_small_shards_are_joined_and_large_tars_cut(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for index in range(3):
        (tmp_path / f"in-{index}").mkdir()
        images = rng.integers(0, 256, (200, 40, 40, 3), np.uint8)
        np.savez(tmp_path / f"{index}.npz", x_train=images, y_train=np.arange(200) % 2)
    (tmp_path / "parts").mkdir()
    for index in range(3):
        convert(tmp_path / f"{index}.npz", tmp_path / f"p{index}", format="parquet", shard_mb=1)
        made = next((tmp_path / f"p{index}").glob("train-*/00000.parquet"))
        made.rename(tmp_path / "parts" / f"{index}.parquet")
    small = convert(tmp_path / "0.npz", tmp_path / "cut", shard_mb=1)
    assert small["train"]["shards"] == 1
    source = open_source(tmp_path / "cut", "train")
    assert source
    assert sum(table.num_rows for table in source.tables()) == 200


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "webp-lossless"])
def test_images_are_encoded_anew_only_when_asked(tmp_path: Path, kind: str) -> None:
    for index, shape in enumerate([(20, 40, 3), (40, 20, 3), (8, 8, 3), (30, 30)]):
        path = tmp_path / "source" / "c" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        ramp = np.broadcast_to(np.linspace(0, 255, shape[1])[:, None], (*shape[:2], 3)[:3])
        Image.fromarray(
            ramp.astype(np.uint8) if len(shape) == 3 else ramp[..., 0].astype(np.uint8)
        ).save(path)
    convert(tmp_path / "source", tmp_path / "out", encode=kind, shorter=10, quality=95)
    source = open_source(tmp_path / "out", "train")
    assert source
    images = {row["key"]: row["image"] for table in source.tables() for row in table.to_pylist()}
    sizes = {key: decode(image, 3).shape[:2] for key, image in images.items()}
    assert sizes == {
        "c/0.png": (10, 20),
        "c/1.png": (20, 10),
        "c/2.png": (8, 8),
        "c/3.png": (10, 10),
    }
    starts = {"png": b"\x89PNG", "jpeg": b"\xff\xd8", "webp": b"RIFF", "webp-lossless": b"RIFF"}
    assert all(image.startswith(starts[kind]) for image in images.values())


def test_scaling_without_an_encoding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--encode"):
        convert(make_folder(tmp_path / "source"), tmp_path / "out", shorter=10)


def test_bad_samples_are_kept_counted_and_taken_up_again(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "source")
    (root / "train" / "class 0" / "bad.png").write_bytes(b"not a picture")
    (root / "train" / "stray.png").write_bytes(encoded(pixels(1)[0]))
    with pytest.raises(RunError, match="too-many-bad"):
        convert(root, tmp_path / "out", encode="png", max_bad=1)
    summary = convert(root, tmp_path / "out", encode="png", max_bad=2)
    assert summary["train"]["quarantined"] == {"decode-error": 1, "no-label": 1}
    assert summary["train"]["in"] == 32
    assert summary["train"]["out"] == 30
    with pytest.raises(PipelineError, match="too-many-bad"):
        convert(root, tmp_path / "out", encode="png", max_bad=0.05)


def test_a_finished_conversion_is_left_alone(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "source")
    convert(root, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.*")
              if ".run" not in path.parts}  # fmt: skip
    convert(root, tmp_path / "out")
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert Artifact.open(open_store(tmp_path / "out")).manifest["kind"] == "dataset"


MEASURE = """
import resource, sys
import numpy as np
import pipeline
pipeline.run("convert", sys.argv[1], out=sys.argv[2], config={"format": sys.argv[3], "shard_mb": 4})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.parametrize("fmt", ["webdataset", "zarr"])
def test_ten_times_the_data_take_the_same_memory(tmp_path: Path, fmt: str) -> None:
    image = encoded(pixels(1, 64)[0])  # 12 kB
    for name, shards in (("small", 6), ("large", 60)):
        with webdataset.ShardWriter(
            f"file:{tmp_path}/{name}-%04d.tar", maxcount=330, verbose=0
        ) as writer:
            for row in range(330 * shards):
                writer.write({"__key__": f"{row:07d}", "png": image, "cls": row % 2})
        (tmp_path / name).mkdir()
        for path in tmp_path.glob(f"{name}-*.tar"):
            path.rename(tmp_path / name / path.name)
        (tmp_path / name / "classes.txt").write_text("a\nb\n")
    peaks = []
    for name in ("small", "large"):
        command = [
            sys.executable,
            "-c",
            MEASURE,
            str(tmp_path / name),
            str(tmp_path / f"out-{name}"),
            fmt,
        ]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[1] < 1.1 * peaks[0]


def test_every_order_of_splits_is_its_own_product(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "source")
    paths = [convert(root, tmp_path / "out", format=fmt)["train"]["path"] for fmt in FORMATS]
    assert all(a != b for a, b in itertools.combinations(paths, 2))
