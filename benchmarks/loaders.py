"""Loaders side by side: JPEG from a local disk to normalised batches of torch.

All read the same photographs (imagenette; made ones with ``--quick``), scale them to 160 x 160 and
give float32 batches of 64, with two workers each. Every loader is measured with the decoder of this
project (``decode``: what is left is the loader's own) and with Pillow, which is what its users have
(``pillow``). Each runs in a process of its own, in turns; a figure is the median over the turns.

    python benchmarks/loaders.py --data shared/data [--quick] [--json] [--peers PYTHON]

``--peers`` is another Python, for peers that do not get along with the packages of this one. Those
that it does not have are left out, and told.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
SIDE, BATCH, WORKERS = 160, 64, 2
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DECODERS = ("decode", "pillow")
OURS = ("pipeline, threads", "pipeline, processes")
PEERS = ("files", "webdataset", "LitData", "Mosaic Streaming")

MODULES = {
    "files": "torch.utils.data",
    "webdataset": "webdataset",
    "LitData": "litdata",
    "Mosaic Streaming": "streaming",
}
"""Imported before the clock starts."""

Batches = Iterable[Any]


# Decoding ------------------------------------------------------------------------------------


def decoder(name: str) -> Callable[[bytes], Any]:
    """From a JPEG to normalised float32 (3, SIDE, SIDE)."""
    import torch

    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    scale, shift = 1 / (255 * std), -mean / std

    def finished(pixels: Any) -> Any:
        image = torch.from_numpy(pixels).permute(2, 0, 1)
        return image.to(torch.float32).mul_(scale).add_(shift).contiguous()

    if name == "pillow":
        from PIL import Image

        def by_pillow(data: bytes) -> Any:
            image = Image.open(io.BytesIO(data)).convert("RGB")
            return finished(np.array(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)))

        return by_pillow

    from pipeline.storage.images import decode, resize

    return lambda data: finished(resize(decode(data, 3, shorter=SIDE), (SIDE, SIDE)))


# Loaders -------------------------------------------------------------------------------------


def files(root: Path, decode: Callable[[bytes], Any]) -> Batches:
    """A torch data set over files, as a tutorial has it."""
    from torch.utils.data import DataLoader, Dataset

    class Files(Dataset[Any]):
        def __init__(self) -> None:
            self.paths = sorted(root.glob("files/*.jpg"))

        def __len__(self) -> int:
            return len(self.paths)

        def __getitem__(self, row: int) -> Any:
            path = self.paths[row]
            return decode(path.read_bytes()), int(path.stem.rpartition("-")[2])

    return DataLoader(Files(), BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True)


def webdataset(root: Path, decode: Callable[[bytes], Any]) -> Batches:
    import webdataset as wds

    tars = [str(path) for path in sorted(root.glob("webdataset/*.tar"))]
    data = wds.WebDataset(tars, shardshuffle=100).shuffle(1000).to_tuple("jpg", "cls")
    data = data.map_tuple(decode, int).batched(BATCH)
    return wds.WebLoader(data, batch_size=None, num_workers=WORKERS, persistent_workers=True)


def litdata(root: Path, decode: Callable[[bytes], Any]) -> Batches:
    from litdata import StreamingDataLoader, StreamingDataset

    class Photographs(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, row: Any) -> Any:
            found = super().__getitem__(row)
            return decode(found["image"]), found["label"]

    data = Photographs(str(root / "litdata"), shuffle=True)
    return StreamingDataLoader(data, batch_size=BATCH, num_workers=WORKERS, persistent_workers=True)


def mosaic(root: Path, decode: Callable[[bytes], Any]) -> Batches:
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    class Photographs(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, row: Any) -> Any:
            found = super().__getitem__(row)
            return decode(found["image"]), found["label"]

    data = Photographs(local=str(root / "mds"), shuffle=True, batch_size=BATCH)
    return DataLoader(data, BATCH, num_workers=WORKERS, persistent_workers=True)


LOADERS: dict[str, Callable[[Path, Callable[[bytes], Any]], Batches]] = {
    "files": files,
    "webdataset": webdataset,
    "LitData": litdata,
    "Mosaic Streaming": mosaic,
}


def ours(root: Path, processes: int) -> Batches:
    import pipeline

    data = pipeline.open(root / "ours").to_torch(size=SIDE)
    return data.loader(BATCH, num_workers=processes, threads=WORKERS)


def measured(name: str, decode: str, root: Path, epochs: int) -> dict[str, float]:
    """Seconds to the first batch, and images a second of whole epochs after the first."""
    import torch

    torch.set_num_threads(WORKERS)
    function = decoder(decode)
    import_module("pipeline.open_output" if name in OURS else MODULES[name])
    began = time.perf_counter()
    loader = (
        ours(root, OURS.index(name) * WORKERS) if name in OURS else LOADERS[name](root, function)
    )
    batches = iter(loader)
    batch = next(batches)
    first = time.perf_counter() - began
    assert tuple(batch[0].shape) == (BATCH, 3, SIDE, SIDE), batch[0].shape
    assert batch[0].dtype == torch.float32
    for _ in batches:
        pass
    rates = []
    for _ in range(epochs):
        began, images = time.perf_counter(), 0
        for batch in loader:
            images += len(batch[0])
        rates.append(images / (time.perf_counter() - began))
    return {"first": first, "rate": statistics.median(rates)}


# The same photographs for all ----------------------------------------------------------------


def photographs(options: argparse.Namespace) -> Iterator[tuple[bytes, int]]:
    """JPEG and label of each."""
    if options.quick:
        from pipeline.storage.images import encode

        rng = np.random.default_rng(0)
        for row in range(320):
            small = rng.integers(0, 256, (14, 14, 3), np.uint8)
            yield encode(small.repeat(16, 0).repeat(16, 1), "jpeg"), row % 10
        return
    import pyarrow.parquet as pq

    table = pq.read_table(options.data / "imagenette" / "train-00000-of-00001.parquet")
    yield from zip(table["image"].to_pylist(), table["label"].to_pylist(), strict=True)


def prepare(root: Path, options: argparse.Namespace) -> None:
    """Write them as each loader wants them, in shards of about 200."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    import pipeline

    (root / "files").mkdir(parents=True)
    (root / "webdataset").mkdir()
    found = list(photographs(options))
    for row, (data, label) in enumerate(found):
        (root / "files" / f"{row:05d}-{label}.jpg").write_bytes(data)
    for first in range(0, len(found), 200):
        with tarfile.open(root / "webdataset" / f"{first:05d}.tar", "w") as tar:
            for row, (data, label) in enumerate(found[first : first + 200], first):
                for name, content in (("jpg", data), ("cls", str(label).encode())):
                    member = tarfile.TarInfo(f"{row:05d}.{name}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    images, labels = zip(*found, strict=True)
    keys = [f"{row:05d}" for row in range(len(found))]
    table = pa.table({"key": keys, "image": pa.array(images, pa.binary()), "label": labels})
    pq.write_table(table, root / "all.parquet", row_group_size=200)
    size = max(1, sum(map(len, images)) * 200 // len(found) // 2**20)
    pipeline.run("convert", root / "all.parquet", out=root / "ours", shard_mb=size)


def prepare_peers(root: Path) -> None:
    """What only the peers themselves can write; those that are not there are left out."""
    paths = sorted((root / "files").glob("*.jpg"))
    rows = [(path.read_bytes(), int(path.stem.rpartition("-")[2])) for path in paths]
    size = 200 * sum(len(data) for data, _ in rows) // len(rows)
    try:
        from streaming import MDSWriter

        columns = {"image": "bytes", "label": "int"}
        with MDSWriter(out=str(root / "mds"), columns=columns, size_limit=size) as writer:
            for data, label in rows:
                writer.write({"image": data, "label": label})
    except ImportError as error:
        print(f"Mosaic Streaming is left out: {error}")
    try:
        from litdata.streaming.writer import BinaryWriter

        (root / "litdata").mkdir()
        made = BinaryWriter(str(root / "litdata"), chunk_bytes=size)
        for row, (data, label) in enumerate(rows):
            made[row] = {"image": data, "label": label}
        made.done()
        made.merge()
    except ImportError as error:
        print(f"LitData is left out: {error}")


# One process a loader ------------------------------------------------------------------------


def in_process(python: str, *words: str) -> str:
    """What another Python prints; it finds this project's modules, and uses of it what it can."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    # Not from this folder, where some files have the names of others' packages.
    call = [python, "-P", __file__, *words]
    done = subprocess.run(call, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        print(f"{' '.join(words[:2])} did not run: {last}")
        return ""
    return done.stdout


def compare(root: Path, options: argparse.Namespace) -> None:
    from harness import target

    prepare(root, options)
    print(in_process(options.peers, "prepare", "peers", str(root)), end="")
    ways = [(name, "decode") for name in OURS]
    ways += [(name, decode) for decode in DECODERS for name in PEERS]
    found: dict[tuple[str, str], list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(1 if options.quick else options.turns):
        for name, decode in ways:
            python = sys.executable if name in OURS else options.peers
            epochs = "1" if options.quick else "5"
            if told := in_process(python, name, decode, str(root), epochs):
                found[name, decode].append(json.loads(told.splitlines()[-1]))
    middle = {
        way: {k: statistics.median(one[k] for one in all_) for k in ("first", "rate")}
        for way, all_ in found.items()
        if all_
    }
    print("\n| loader | decoder | images/s | of ours | first batch, s |\n|---|---|---|---|---|")
    mine = middle[OURS[0], "decode"]
    for (name, decode), figures in middle.items():
        share = figures["rate"] / mine["rate"]
        row = f"{figures['rate']:.0f} | {share:.2f} | {figures['first']:.2f}"
        print(f"| {name} | {decode} | {row} |")
    for decode in DECODERS:
        rates = [middle[name, decode]["rate"] for name in PEERS if (name, decode) in middle]
        target(f"images/s over the fastest peer, {decode}", 1, mine["rate"] / max(rates))
    target("seconds to the first batch", 1, mine["first"], most=True)


def main() -> None:
    from harness import last_line, make_parser, need_data

    parser = make_parser(__doc__, "made pictures, once")
    parser.add_argument("--peers", default=sys.executable, help="the Python that has the peers")
    parser.add_argument("--turns", type=int, default=5, help="how often each is measured")
    options = parser.parse_args()
    need_data(parser, options)
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder) / "photographs", options)
    if options.json:
        last_line()


if __name__ == "__main__":
    if len(sys.argv) > 3 and sys.argv[1] == "prepare":
        prepare_peers(Path(sys.argv[3]))
    elif len(sys.argv) > 4 and sys.argv[2] in DECODERS:
        name, decode, root, epochs = sys.argv[1:5]
        print(json.dumps(measured(name, decode, Path(root), int(epochs))))
    else:
        main()
