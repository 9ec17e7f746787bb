"""Pruning in training and before it: accuracy beside honest controls, speed and memory at scale.

``train``: SeTa, InfoBatch, another random subset in every epoch, one fixed class-balanced random
subset, and the control that most comparisons lack: all data for fewer epochs, so that it takes as
many steps. Every arm of a seed has the same network, initial weights, augmentation, optimiser and a
cosine over the exact number of its steps. At 30, 50 and 70 % saved, to the sample. Methods have
their published settings (SeTa: 10 % at random, 5 groups, window 0.6; InfoBatch: rate 0.5; both
anneal for the last eighth); none was tuned here. Their paper forms save what they happen to save.

``select``: 10^7 losses to an epoch's samples on one core, beside scikit-learn's k-means on all of
them. ``static``: features of 10^6 samples to a selection, through the steps of a run.

Peers, from PyPI: scikit-learn.

    python benchmarks/pruning.py --data shared/data [--quick] [--json] [--only train]

With ``--results``, results of arms that are done are appended to a file and not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import torch.nn.functional as F
from harness import make_parser, run_parts, target, targets

from pipeline.backbones import ConvNet
from pipeline.labelled_images import shifted
from pipeline.pruning.budget import Budget, select
from pipeline.pruning.dynamic_random import DynamicRandom
from pipeline.pruning.infobatch import InfoBatch
from pipeline.pruning.pool import Pool
from pipeline.pruning.sampler import DynamicSampler
from pipeline.pruning.selectors import Hard
from pipeline.pruning.seta import SeTa
from pipeline.storage.source import Shard, Source
from pipeline.tensors import tensor_column

SAVINGS = (0.3, 0.5, 0.7)
BATCH = 100
WIDTHS = (16, 32, 64)


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        data: folder of the data sets.
        dataset: ``fashion_mnist`` or ``cifar10``.
        arm: which samples are seen.
        saving: share of the samples of all epochs that is not seen; of paper forms 0.
        seed: of weights, order and choice.
        epochs: of the arm that saves nothing.
        samples: training samples; the first ones.
        tested: test samples; the first ones.
        noise: share of the training labels that are wrong.
    """

    data: str
    dataset: str
    arm: str
    saving: float
    seed: int
    epochs: int
    samples: int
    tested: int = 10_000
    noise: float = 0.0


class Whole(DynamicSampler):
    """The given samples in every epoch."""

    def __init__(self, samples: int, epochs: int, part: Any, seed: int) -> None:
        self._part = part
        super().__init__(samples, epochs, {}, seed=seed)

    def _planned(self) -> list[int]:
        return [int(self._part.sum())] * self.epochs

    def _choose(self, epoch: int) -> Any:
        return self._part.copy()

    def _weights(self, rows: Any) -> Any:
        return np.ones(len(rows), np.float32)


def sampler_of(job: Job, labels: npt.NDArray[np.int64]) -> DynamicSampler:
    size, seed = len(labels), job.seed
    planned: dict[str, Any] = {"saving": job.saving, "seed": seed}
    if job.arm == "SeTa":
        return SeTa(size, job.epochs, window=0.6, **planned)
    if job.arm == "InfoBatch":
        return InfoBatch(size, job.epochs, **planned)
    if job.arm == "dynamic random":
        return DynamicRandom(size, job.epochs, **planned)
    if job.arm == "SeTa as published":
        return SeTa(size, job.epochs, window=0.6, seed=seed)
    if job.arm == "InfoBatch as published":
        return InfoBatch(size, job.epochs, seed=seed)
    part = np.ones(size, np.bool_)
    if job.arm == "static random":
        part = balanced(labels, round((1 - job.saving) * size), seed)
    # As many steps as the others: fewer epochs of all samples, the last of them in part.
    epochs = job.epochs if job.arm == "static random" else math.ceil(job.epochs * (1 - job.saving))
    return Whole(size, epochs, part, seed)


def balanced(labels: npt.NDArray[np.int64], count: int, seed: int) -> npt.NDArray[np.bool_]:
    """Equally many of each class, at random."""
    chosen = np.zeros(len(labels), np.bool_)
    rng = np.random.default_rng(seed)
    classes = int(labels.max()) + 1
    for label in range(classes):
        rows = rng.permutation(np.flatnonzero(labels == label))
        chosen[rows[: count * (label + 1) // classes - count * label // classes]] = True
    return chosen


def load(job: Job) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalised training images and labels, test images and labels."""
    with np.load(Path(job.data) / f"{job.dataset}.npz") as archive:
        x, y = archive["x_train"][: job.samples], archive["y_train"][: job.samples]
        tx, ty = archive["x_test"][: job.tested], archive["y_test"][: job.tested]
    x, tx = (part[..., None] if part.ndim == 3 else part for part in (x, tx))
    mean, std = x.mean((0, 1, 2)) / 255, x.std((0, 1, 2)) / 255
    ready = []
    for part in (x, tx):
        scaled = ((part.astype(np.float32) / 255 - mean) / std).astype(np.float32)
        ready.append(torch.from_numpy(scaled).permute(0, 3, 1, 2).contiguous())
    labels = y.astype(np.int64)
    if job.noise:
        rng = np.random.default_rng(99)
        wrong = rng.random(len(labels)) < job.noise
        labels[wrong] = (labels[wrong] + rng.integers(1, 10, int(wrong.sum()))) % 10
    return ready[0], torch.from_numpy(labels), ready[1], torch.from_numpy(ty.astype(np.int64))


def train(job: Job) -> dict[str, Any]:
    """One arm: accuracy after every epoch, and what was saved."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    x, y, tx, ty = (part.to(device) for part in load(job))
    torch.manual_seed(job.seed)
    model = ConvNet(10, x.shape[1], WIDTHS).to(device, memory_format=torch.channels_last)
    sampler = sampler_of(job, y.cpu().numpy())
    total = job.epochs * len(y) - round(job.saving * job.epochs * len(y))
    published = "published" in job.arm
    batches = total // BATCH
    if not published and job.arm != CONTROL:
        batches = sum(length // BATCH for length in sampler.lengths)
    optimizer = torch.optim.SGD(
        model.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    generator = torch.Generator().manual_seed(job.seed)
    done, seen, accuracies, began = 0, 0, [], time.perf_counter()
    for epoch in range(sampler.epochs):
        rows = torch.from_numpy(np.fromiter(sampler, np.int64))
        if not published:
            rows = rows[: total - seen]
        # A small batch at the end of an epoch would spoil the statistics of BatchNorm.
        for batch in rows[: len(rows) // BATCH * BATCH].split(BATCH):
            # Of paper forms nobody knows how long they will be: a cosine over the epochs.
            at = (epoch + done / 1e9) / sampler.epochs if published else done / batches
            for group in optimizer.param_groups:
                group["lr"] = 0.05 * 0.5 * (1 + math.cos(math.pi * min(at, 1.0)))
            images = shifted(x[batch.to(device)], x.shape[2] // 10, generator)
            if job.dataset == "cifar10":
                mirrored = (torch.rand(len(batch), generator=generator) < 0.5).to(device)
                images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
            images = images.contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                output = model(images)
            losses = F.cross_entropy(output.float(), y[batch.to(device)], reduction="none")
            optimizer.zero_grad(set_to_none=True)
            (losses * sampler.weights(batch).to(device)).mean().backward()
            optimizer.step()
            sampler.update(batch, losses)
            done += 1
        seen += len(rows)
        # With a cosine the best epoch is one of the last.
        if epoch >= sampler.epochs - 3:
            accuracies.append(accuracy(model, tx, ty))
    whole = job.epochs * len(y)
    return {
        **asdict(job),
        "last": accuracies[-1],
        "best": max(accuracies),
        "saved": 1 - seen / whole,
        "steps": done,
        "seconds": time.perf_counter() - began,
    }


@torch.inference_mode()
def accuracy(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    model.eval()
    hits = [
        (model(a.contiguous(memory_format=torch.channels_last)).argmax(1) == b).sum()
        for a, b in zip(x.split(500), y.split(500), strict=True)
    ]
    model.train()
    return 100 * float(torch.stack(hits).sum()) / len(y)


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    seeds, tested = range(2 if options.quick else 3), 1000 if options.quick else 10_000
    sizes = {"fashion_mnist": (10_000, 16), "cifar10": (10_000, 16)}
    if torch.cuda.is_available() and not options.quick:
        sizes = {"fashion_mnist": (60_000, 30), "cifar10": (20_000, 60)}
    if options.quick:
        sizes = dict.fromkeys(sizes, (500, 16))
    for dataset, (samples, epochs) in sizes.items():
        base = {"data": str(options.data), "dataset": dataset, "samples": samples, "tested": tested}
        for seed in seeds:
            yield Job(arm="full", saving=0.0, seed=seed, epochs=epochs, **base)
            for arm in ("SeTa as published", "InfoBatch as published"):
                yield Job(arm=arm, saving=0.0, seed=seed, epochs=epochs, **base)
            for saving in SAVINGS:
                for arm in ARMS:
                    yield Job(arm=arm, saving=saving, seed=seed, epochs=epochs, **base)
    base = {"data": str(options.data), "dataset": "fashion_mnist", "noise": 0.1, "tested": tested}
    samples, epochs = sizes["fashion_mnist"]
    for seed in seeds:
        yield Job(arm="full", saving=0.0, seed=seed, epochs=epochs, samples=samples, **base)
        for arm in ARMS:
            yield Job(arm=arm, saving=0.5, seed=seed, epochs=epochs, samples=samples, **base)


CONTROL = "all data, fewer epochs"
ARMS = ("SeTa", "InfoBatch", "dynamic random", "static random", CONTROL)


def identity(result: dict[str, Any]) -> tuple[Any, ...]:
    names = ("dataset", "arm", "saving", "seed", "epochs", "samples", "tested", "noise")
    return tuple(result[name] for name in names)


def trainings(options: argparse.Namespace) -> None:
    if options.data is None:
        print("train: --data is not given, left out")
        return
    results: dict[tuple[Any, ...], dict[str, Any]] = {}
    if options.results and options.results.exists():
        for line in options.results.read_text().splitlines():
            results[identity(json.loads(line))] = json.loads(line)
    wanted = list(jobs(options))
    todo = [job for job in wanted if identity(asdict(job)) not in results]
    workers = 1 if torch.cuda.is_available() else options.processes
    with ProcessPoolExecutor(workers) as pool:
        for result in pool.map(train, todo):
            results[identity(result)] = result
            if options.results:
                with options.results.open("a") as file:
                    file.write(json.dumps(result) + "\n")
    found = [results[identity(asdict(job))] for job in wanted]
    for dataset, noise in dict.fromkeys((r["dataset"], r["noise"]) for r in found):
        table([r for r in found if (r["dataset"], r["noise"]) == (dataset, noise)])


def table(results: list[dict[str, Any]]) -> None:
    first = results[0]
    noisy = f", {100 * first['noise']:g}% of the labels wrong" if first["noise"] else ""
    seeds = sorted({r["seed"] for r in results})
    name = f"{first['dataset']}{noisy}"
    print(
        f"\n{name}: {first['samples']} training samples, {first['epochs']} epochs, "
        f"{len(seeds)} seeds"
    )
    print(f"{'arm':26}{'saved, %':>9}{'steps':>7}{'last, %':>16}{'best, %':>16}{'- control':>18}")

    def last(arm: str, saving: float) -> list[float]:
        rows = {r["seed"]: r["last"] for r in results if (r["arm"], r["saving"]) == (arm, saving)}
        return [rows[seed] for seed in seeds]

    for arm, saving in dict.fromkeys((r["arm"], r["saving"]) for r in results):
        rows = [r for r in results if (r["arm"], r["saving"]) == (arm, saving)]
        text = f"{arm:26}{100 * statistics.fmean(r['saved'] for r in rows):9.1f}"
        text += f"{statistics.fmean(r['steps'] for r in rows):7.0f}"
        for what in ("last", "best"):
            values = [r[what] for r in rows]
            text += f"{statistics.fmean(values):9.2f} ± {statistics.stdev(values):4.2f}"
        if saving and arm != CONTROL:
            gaps = [a - b for a, b in zip(last(arm, saving), last(CONTROL, saving), strict=True)]
            error = statistics.stdev(gaps) / math.sqrt(len(gaps))
            text += f"{statistics.fmean(gaps):+11.2f} ± {error:4.2f}"
            claim = f"{name}: {arm} at {100 * saving:g}% saved, less the control (points)"
            targets.append(
                {
                    "name": claim,
                    "target": 0.0,
                    "measured": statistics.fmean(gaps),
                    "met": statistics.fmean(gaps) >= 0,
                }
            )
        print(text)


def memory(name: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def in_a_process(part: str, *arguments: object) -> dict[str, Any]:
    """A part of this file in a process of its own, whose memory is measured."""
    words = [sys.executable, __file__, "--alone", part, *map(str, arguments)]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    told: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return told


def losses_at(epoch: int, start: int, count: int) -> npt.NDArray[np.float32]:
    """Skewed losses that fall from epoch to epoch."""
    rng = np.random.default_rng((epoch, start))
    return (rng.gamma(1.0, size=count) / (1 + epoch)).astype(np.float32)


def choose_epochs(samples: str) -> dict[str, Any]:
    """SeTa's own part of some epochs, on one core."""
    size, piece = int(samples), 10**6
    warm = SeTa(200_000, 9, window=0.6)
    for _ in range(3):
        warm.next_epoch()
        warm.update(np.arange(200_000), losses_at(0, 0, 200_000))
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    before = memory("VmRSS")
    sampler, seconds = SeTa(size, 9, window=0.6), []
    for epoch in range(6):
        began = time.perf_counter()
        sampler.next_epoch()
        seconds.append(time.perf_counter() - began)
        for start in range(0, size, piece):
            rows = np.arange(start, min(start + piece, size))
            sampler.update(rows, losses_at(epoch, start, len(rows)))
    return {"seconds": seconds[1:], "bytes": memory("VmHWM") - before}


def choose_by_sklearn(samples: str) -> dict[str, Any]:
    """The same by k-means on all losses and NumPy's own draws, on one core."""
    from sklearn.cluster import KMeans

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    size = int(samples)
    losses = losses_at(1, 0, size)
    before, rng = memory("VmRSS"), np.random.default_rng(0)
    began = time.perf_counter()
    rows = rng.choice(size, int(0.9 * size), replace=False)
    made = KMeans(5, n_init=1, random_state=0).fit(losses[rows, None])
    order = np.argsort(made.cluster_centers_[:, 0])
    chosen = rows[np.isin(made.labels_, order[1:4])]
    rng.shuffle(chosen)
    return {"seconds": [time.perf_counter() - began], "bytes": memory("VmHWM") - before}


def select_epochs(options: argparse.Namespace) -> None:
    size = 10**7
    told = in_a_process("choose_epochs", size)
    ours = statistics.median(told["seconds"])
    few = 10**6 if options.quick else size
    peer = in_a_process("choose_by_sklearn", few)
    theirs = statistics.median(peer["seconds"]) * size / few
    scaled = f", from {few:,}" if few < size else ""
    print(
        f"\n{size:,} losses to an epoch's samples on one core: {ours:.3f} s "
        f"({min(told['seconds']):.3f} to {max(told['seconds']):.3f}), "
        f"{told['bytes'] / 1e6:.0f} MB; with scikit-learn's k-means {theirs:.2f} s{scaled} "
        f"({theirs / ours:.0f} x), {peer['bytes'] / 1e6:.0f} MB"
    )
    target("10^7 losses to an epoch (s)", 0.5, ours, most=True)
    target("memory of the sampler (MB)", 200, told["bytes"] / 1e6, most=True)


@dataclass(frozen=True)
class Made(Source):
    """Made features with a spectrum like that of images, a shard when it is asked for."""

    rows: int
    columns: int = 384
    shard_rows: int = 16_384

    @property
    def classes(self) -> tuple[str, ...]:
        return ()

    @property
    def shards(self) -> tuple[Shard, ...]:
        starts = range(0, self.rows, self.shard_rows)
        return tuple(
            Shard(f"{start:09d}", f"{self}-{start}", min(self.shard_rows, self.rows - start))
            for start in starts
        )

    def read(self, shard: Shard) -> pa.Table:
        count = shard.rows or 0
        rng, fixed = np.random.default_rng(int(shard.name)), np.random.default_rng(0)
        scale = (1.0 / np.sqrt(np.arange(1, self.columns + 1))).astype(np.float32)
        centres = fixed.standard_normal((2000, self.columns), np.float32) * scale
        noise = rng.standard_normal((count, self.columns), np.float32) * scale
        x = centres[rng.integers(2000, size=count)] + 0.5 * noise
        keys = [f"{int(shard.name) + row:09d}" for row in range(count)]
        return pa.table({"key": keys, "feature": tensor_column(x)})


def select_static(folder: str, rows: str, clusters: str) -> dict[str, Any]:
    """Features of a run's step to what is kept, in seconds and bytes."""
    from pipeline.clustering.sharded_kmeans import ShardedKMeans
    from pipeline.orchestration.local_executor import LocalExecutor
    from pipeline.orchestration.run import open_run
    from pipeline.stages.assign import Assign
    from pipeline.stages.select import Columns
    from pipeline.storage.parquet import ParquetFormat
    from pipeline.storage.store import open_store

    marks = {}
    with open_run(open_store(folder), LocalExecutor(), threads=2) as run:
        features = run.map("features", Made(int(rows)), [], to=ParquetFormat())
        began = time.perf_counter()
        task = ShardedKMeans(int(clusters), spherical=True, max_iter=25)
        centroids = run.rounds("prototypes", task, features, "feature")
        marks["k-means"] = time.perf_counter() - began
        stages = [Assign(centroids), Columns(("key", "distance"))]
        scores = pa.concat_tables(run.map("scores", features, stages, to=ParquetFormat()).tables())
        marks["scores"] = time.perf_counter() - began - marks["k-means"]
        values = np.asarray(scores["distance"], np.float64)
        pool = Pool(scores["key"].combine_chunks(), values)
        kept = select(pool, Hard(), Budget("share", 0.5))
        seconds = time.perf_counter() - began
    return {"seconds": seconds, "bytes": memory("VmHWM"), "kept": len(kept), **marks}


def static(options: argparse.Namespace) -> None:
    sizes, clusters = ((25_000, 100_000), 200) if options.quick else ((250_000, 10**6), 1000)
    found = []
    for rows in sizes:
        with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
            told = in_a_process("select_static", folder, rows, clusters)
        found.append(told)
        print(
            f"\n{rows:,} x 384 to {told['kept']:,} kept, {clusters} prototypes: "
            f"{told['seconds']:.0f} s (k-means {told['k-means']:.0f} s, scores "
            f"{told['scores']:.0f} s), at most {told['bytes'] / 2**30:.2f} GiB of memory"
        )
    target("static selection at the largest size (min)", 10, found[-1]["seconds"] / 60, most=True)
    ratio = found[-1]["bytes"] / found[0]["bytes"]
    target("its memory over that of a quarter of the samples (x)", 1.5, ratio, most=True)


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "train": trainings,
    "select": select_epochs,
    "static": static,
}
ALONE: dict[str, Callable[..., dict[str, Any]]] = {
    "choose_epochs": choose_epochs,
    "choose_by_sklearn": choose_by_sklearn,
    "select_static": select_static,
}


def main() -> None:
    parser = make_parser(__doc__, "two seeds of 500 samples, and so on", PARTS)
    parser.add_argument("--results", type=Path, help="of trainings, a line of JSON each")
    parser.add_argument("--processes", type=int, default=2, help="trainings at a time on a CPU")
    parser.add_argument("--scratch", help="folder for 4 GB of features")
    parser.add_argument("--alone", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        name, *arguments = options.alone
        print(json.dumps(ALONE[name](*arguments)))
        return
    run_parts(PARTS, options)


if __name__ == "__main__":
    main()
