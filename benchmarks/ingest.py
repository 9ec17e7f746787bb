"""How fast JPEGs become 256 x 256 pixels on one core, beside other ways to do it.

Peers, from PyPI: pillow, webdataset, ray[data]. The images are ``<data>/imagenette/train-*``. Every
arm has one core and one thread, and they take turns, so that what else the machine does strikes
each alike. What an arm needs in another form (a tar, single files, a running Ray) is made before,
and the first turn is not counted.

    python benchmarks/ingest.py --data shared/data [--quick] [--json] [--only ours --only pillow]
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import simplejpeg
import torch
from PIL import Image

from pipeline.stage import ShardContext
from pipeline.stages.decode import Decode
from pipeline.storage.images import resize
from pipeline.storage.open_source import open_source

SIZE = 256
COPIES = 4  # of the data for Ray, whose speed counts from the first block that comes out
CORES = os.sched_getaffinity(0)
CORE = max(CORES)

Files = list[bytes]
Turn = Callable[[], float]
"""Goes through all images once; returns images a second."""


def timed(images: Callable[[], int]) -> Turn:
    def turn() -> float:
        os.sched_setaffinity(0, {CORE})
        began = time.perf_counter()
        speed = images() / (time.perf_counter() - began)
        os.sched_setaffinity(0, CORES)
        return speed

    return turn


def scaled(picture: Image.Image) -> Any:
    return np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def by_pillow(data: bytes) -> Any:
    return scaled(Image.open(io.BytesIO(data)).convert("RGB"))


def ours(folder: Path, _: Files, __: Path) -> Turn:
    """What a run does with a shard: read the Parquet file, decode every image into one tensor."""
    source = open_source(folder, "train")
    assert source

    def images() -> int:
        stage, count = Decode(SIZE, 3), 0
        for shard in source.shards:
            count += len(stage(source.read(shard), ShardContext(shard.name, 0)))
        return count

    return timed(images)


def bare(_: Path, files: Files, __: Path) -> Turn:
    """Nothing but the two calls, from bytes in memory to one array."""

    def images() -> int:
        pixels = np.empty((len(files), SIZE, SIZE, 3), np.uint8)
        for place, data in zip(pixels, files, strict=True):
            resize(simplejpeg.decode_jpeg(data, "RGB"), (SIZE, SIZE), place)
        return len(pixels)

    return timed(images)


def bare_unscaled(_: Path, files: Files, __: Path) -> Turn:
    return timed(lambda: len([simplejpeg.decode_jpeg(data, "RGB") for data in files]))


def pillow(_: Path, files: Files, __: Path) -> Turn:
    return timed(lambda: len([by_pillow(data) for data in files]))


def webdataset(_: Path, files: Files, work: Path) -> Turn:
    import webdataset as wds

    tar = str(work / "images.tar")
    with wds.TarWriter(tar) as writer:
        for index, data in enumerate(files):
            writer.write({"__key__": f"{index:06d}", "jpg": data})

    def images() -> int:
        pictures = wds.WebDataset(tar, shardshuffle=False).decode("pil").to_tuple("jpg")
        return len(list(pictures.map_tuple(scaled)))

    return timed(images)


def ray_data() -> Any:
    import ray

    if not ray.is_initialized():
        # One task at a time; driver and scheduler may use the other cores.
        ray.init(num_cpus=1, include_dashboard=False, logging_level="error", log_to_driver=False)
        logging.disable(logging.WARNING)  # Ray Data sets the levels of its own loggers
        ray.data.DataContext.get_current().enable_progress_bars = False
    return ray.data


def steady(dataset: Callable[[], Any]) -> Turn:
    """Images a second from the first block that comes out to the last."""

    def turn() -> float:
        blocks = dataset().iter_batches(batch_size=None, batch_format="pyarrow")
        done = [(time.perf_counter(), len(block)) for block in blocks]
        time.sleep(2)  # its processes wind up before the next turn
        return sum(rows for _, rows in done[1:]) / (done[-1][0] - done[0][0])

    return turn


def ray_parquet(folder: Path, _: Files, work: Path) -> Turn:
    data, copies = ray_data(), work / "copies"
    copies.mkdir()
    for copy in range(COPIES):
        for file in folder.glob("train-*.parquet"):
            shutil.copy(file, copies / f"{copy}-{file.name}")

    def decode(batch: dict[str, Any]) -> dict[str, Any]:
        os.sched_setaffinity(0, {CORE})
        rows = (row["bytes"] if isinstance(row, dict) else row for row in batch["image"])
        return {"image": np.stack([by_pillow(row) for row in rows])}

    def dataset() -> Any:
        table = data.read_parquet(str(copies)).select_columns(["image"])
        return table.map_batches(decode, batch_size=64)

    return steady(dataset)


def ray_images(_: Path, files: Files, work: Path) -> Turn:
    data, folder = ray_data(), work / "files"
    folder.mkdir()
    for copy in range(COPIES):
        for index, image in enumerate(files):
            (folder / f"{copy}-{index:06d}.jpg").write_bytes(image)
    return steady(lambda: data.read_images(str(folder), size=(SIZE, SIZE), mode="RGB"))


PEERS = {
    "pillow": pillow,
    "webdataset": webdataset,
    "ray-parquet": ray_parquet,
    "ray-images": ray_images,
}
ARMS = {"ours": ours, "simplejpeg": bare, "simplejpeg-unscaled": bare_unscaled, **PEERS}


def measure(folder: Path, names: list[str], rounds: int) -> dict[str, list[float]]:
    source = open_source(folder, "train")
    assert source
    files = [data for shard in source.shards for data in source.read(shard)["image"].to_pylist()]
    with tempfile.TemporaryDirectory() as work:
        found: dict[str, list[float]] = {}
        # Ray's processes keep a core and the memory busy between its turns: it comes last.
        for ray in (False, True):
            arms = [name for name in names if name.startswith("ray") == ray]
            turns = {name: ARMS[name](folder, files, Path(work)) for name in arms}
            for index in range(rounds + 1):
                # There and back, so that none always comes after the same.
                for name in arms if index % 2 else arms[::-1]:
                    speed = turns[name]()
                    found.setdefault(name, []).extend([speed] if index else [])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("PIPELINE_DATA"))
    parser.add_argument("--quick", action="store_true", help="5 rounds instead of 9")
    parser.add_argument("--json", action="store_true", help="end with a line of JSON")
    parser.add_argument("--only", choices=ARMS, action="append", help="an arm; all unless given")
    options = parser.parse_args()
    if not options.data:
        parser.error("give --data or set PIPELINE_DATA")
    torch.set_num_threads(1)
    pa.set_cpu_count(1)

    names = options.only or list(ARMS)
    speeds = measure(Path(options.data) / "imagenette", names, 5 if options.quick else 9)
    found = {name: statistics.median(speeds[name]) for name in names}
    print("images/s, median over rounds (least to most), and how many times that ours is")
    for name, speed in found.items():
        times = f"{found['ours'] / speed:6.2f} x" if "ours" in found else ""
        print(f"{name:20}{speed:7.0f} ({min(speeds[name]):.0f} to {max(speeds[name]):.0f}){times}")
    best = max((found[name] for name in PEERS if name in found), default=None)
    targets = []
    for name, target, other in (
        ("ours over the best peer (x)", 1.5, best),
        ("ours over a bare loop over simplejpeg (x)", 0.8, found.get("simplejpeg")),
    ):
        if "ours" in found and other:
            ratio = found["ours"] / other
            met = ratio >= target
            targets.append({"name": name, "target": target, "measured": ratio, "met": met})
            print(f"{name}: {ratio:.2f}, target {target}, {'met' if met else 'missed'}")
    if options.json:
        print(json.dumps({"targets": targets}))


if __name__ == "__main__":
    main()
