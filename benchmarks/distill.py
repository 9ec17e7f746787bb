"""Distillation: accuracy beside honest controls, labels in few bytes, speed of the synthesis.

``accuracy``: the presets ``sre2l``, ``cda`` and ``best``, random real images and noise, at 1, 10
and 50 images a class on digits, Fashion-MNIST and CIFAR-10, by the recipe itself. In a column all
students have the same network, training and kind of labels, the same number of steps and the same
teacher; three students of each differ in their seed, and random real images in their draw too. The
settings of ``best`` were chosen on training images that were held out.

``labels``: ``best`` with a label budget of a fortieth of what FKD's files would take for the same
images (300 views, float16 logits and the parameters of each view), against all labels.

``speed``: the synthesis against a plain loop written the way the published code is: hooks, float32,
channels first. Both optimise the same images with the same teacher; rounds of them alternate.

    python benchmarks/distill.py --data shared/data [--quick] [--json] [--only speed] [--out DIR]

With ``--out``, runs that are finished are found there and not made again.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from harness import make_parser, run_parts, target
from torch import Tensor, nn

import pipeline
from pipeline import backbones
from pipeline.config import merge
from pipeline.dataset_distill.config import RecoverConfig
from pipeline.dataset_distill.recover import recover
from pipeline.dataset_distill.views import ATTEMPTS, crops
from pipeline.device import default_device, reproducible
from pipeline.labelled_images import ImageConfig
from pipeline.storage.weights import read_weights

DATASETS = ("digits", "fashion-mnist", "cifar10")
PRESETS = ("sre2l", "cda", "best")
IPCS = (1, 10, 50)
CONTROLS = ("random-real-soft", "noise-soft", "random-real-hard")
FKD_VIEWS, FKD_SHARE = 300, 40


def settings(dataset: str, ipc: int, options: argparse.Namespace) -> dict[str, Any]:
    """What all arms of a column have in common."""
    batch, epochs = {1: (10, 1000), 10: (20, 300), 50: (20, 80)}[ipc]
    if options.quick:
        epochs = epochs // 25
    train = {"epochs": epochs, "batch_size": batch, "lr": 2e-3, "zeta": 2.0, "ema": 0.99}
    values: dict[str, Any] = {
        "ipc": ipc,
        "seeds": 3,
        "relabel": {"views": min(epochs, FKD_VIEWS), "cutmix": 1.0},
        "student": {"backbones": ["convnet3"], "train": {**train, "evaluations": 4}},
    }
    if dataset == "cifar10":
        weights = next((options.data / "weights").glob("resnet20-*.npz"))
        values["teacher"] = {"backbone": "resnet20", "weights": str(weights)}
    if dataset == "fashion-mnist":
        shape = {"epochs": 1 if options.quick else 10, "optimizer": "adamw", "lr": 2e-3}
        values["teacher"] = {
            "backbone": "convnet3",
            "train": {**shape, "weight_decay": 0.01, "batch_size": 128},
        }
    if options.quick:
        values["recover"] = {"iterations": 20}
    return values


def distilled(
    dataset: str, ipc: int, preset: str, options: argparse.Namespace, **more: Any
) -> dict[str, dict[str, Any]]:
    """Rows of the evaluation by arm."""
    arms = ["distilled-soft", "distilled-hard"]
    if preset == "best":
        arms += CONTROLS
    values = merge(settings(dataset, ipc, options), {"preset": preset, "arms": arms, **more})
    # A run of its own for each preset: images for fewer a class are taken over.
    out = options.out / f"{dataset}-{preset}"
    how = {"executor": "ray", "workers": options.workers} if options.workers > 1 else {}
    summary = pipeline.run("distill", dataset, data=options.data, out=out, config=values, **how)
    found = {row["arm"]: row for row in summary["evaluation"]}
    found["hours"] = {"accuracy": sum(summary["seconds"].values()) / 3600}
    return found


Table = dict[tuple[str, int, str], dict[str, Any]]


def accuracy(options: argparse.Namespace) -> None:
    table: Table = {}
    for dataset in options.datasets:
        for ipc in options.ipcs:
            for preset in PRESETS:
                rows = distilled(dataset, ipc, preset, options)
                table[dataset, ipc, preset] = rows["distilled-soft"]
                table[dataset, ipc, f"{preset}, class labels"] = rows["distilled-hard"]
                shared = (*CONTROLS, "teacher") if preset == "best" else ()
                table |= {(dataset, ipc, arm): rows[arm] for arm in shared}
            for arm in (*PRESETS, *CONTROLS):
                row = table[dataset, ipc, arm]
                told = f"{row['accuracy']:6.2f} ± {row['spread']:4.2f}, best {row['best']:6.2f}"
                print(f"{dataset}, {ipc} a class: {arm:18} {told}", flush=True)
    show(table, options)
    for dataset in options.datasets:
        for ipc in options.ipcs:
            aims(table, dataset, ipc)


def aims(table: Table, dataset: str, ipc: int) -> None:
    where = f"{dataset}, {ipc} a class"

    def gap(a: str, b: str) -> float:
        return float(table[dataset, ipc, a]["accuracy"] - table[dataset, ipc, b]["accuracy"])

    if ipc >= 10:
        target(f"{where}: cda less sre2l, points", 0, gap("cda", "sre2l"))
    target(f"{where}: best less cda, points", 0, gap("best", "cda"))
    if ipc <= 10:
        target(f"{where}: best less random real, same labels", 0, gap("best", "random-real-soft"))


def show(table: Table, options: argparse.Namespace) -> None:
    arms = list(dict.fromkeys(arm for _, _, arm in table))
    for dataset in options.datasets:
        teacher = table[dataset, options.ipcs[0], "teacher"]["accuracy"]
        print(f"\n{dataset}: accuracy after the last epoch, %; the teacher has {teacher:.2f}")
        print("| trained on | " + " | ".join(f"{ipc} a class" for ipc in options.ipcs) + " |")
        print("|---|" + "---|" * len(options.ipcs))
        for arm in arms:
            if arm != "teacher":
                rows = [table[dataset, ipc, arm] for ipc in options.ipcs]
                cells = [f"{row['accuracy']:.2f} ± {row['spread']:.2f}" for row in rows]
                print(f"| {arm} | {' | '.join(cells)} |")


def labels(options: argparse.Namespace) -> None:
    for dataset in options.datasets:
        ipc, classes = 10, 10
        fkd = ipc * classes * FKD_VIEWS * (2 * classes + 25)
        full = distilled(dataset, ipc, "best", options)["distilled-soft"]
        few = distilled(
            dataset, ipc, "best", options, relabel={**settings(dataset, ipc, options)["relabel"]}
            | {"budget": fkd // FKD_SHARE},
        )["distilled-soft"]  # fmt: skip
        print(
            f"{dataset}, {ipc} a class: {full['label_bytes']:,} bytes of labels "
            f"{full['accuracy']:.2f} ± {full['spread']:.2f}; {few['label_bytes']:,} bytes, "
            f"{fkd / few['label_bytes']:.0f} times less than FKD's {fkd:,}: "
            f"{few['accuracy']:.2f} ± {few['spread']:.2f}"
        )
        gap = few["accuracy"] - full["accuracy"]
        target(f"{dataset}: best with 1/40 of the label bytes, less all labels, points", -0.5, gap)


def plain_loop(
    teacher: nn.Module,
    labels: Tensor,
    start: Tensor,
    config: RecoverConfig,
    image: ImageConfig,
) -> Tensor:
    """The synthesis as published code has it: a hook on every layer, float32, channels first."""
    terms: list[Tensor] = []

    def hook(layer: Any, inputs: tuple[Tensor, ...], _: Any) -> None:
        x = inputs[0]
        channels = x.shape[1]
        mean = x.mean([0, 2, 3])
        var = x.permute(1, 0, 2, 3).contiguous().view(channels, -1).var(1, unbiased=False)
        far = torch.norm(layer.running_var - var, 2) + torch.norm(layer.running_mean - mean, 2)
        terms.append(far)

    layers = [m for m in teacher.modules() if isinstance(m, nn.BatchNorm2d)]
    handles = [layer.register_forward_hook(hook) for layer in layers]
    x = start.clone().requires_grad_()
    mean, std = (torch.tensor(v, device=x.device) for v in (image.mean, image.std))
    optimizer = torch.optim.Adam([x], lr=config.lr, betas=(0.5, 0.9), eps=1e-8)
    criterion = nn.CrossEntropyLoss()
    for step in range(config.iterations):
        rng = np.random.default_rng(step)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * 0.5 * (1 + math.cos(math.pi * step / config.iterations))
        top, left, height, width = crops(
            rng.random((ATTEMPTS, 4)), image.size, (0.25, 1.0)
        ).tolist()
        view = F.interpolate(
            x[:, :, top : top + height, left : left + width],
            (image.size, image.size),
            mode="bilinear",
            align_corners=False,
        )
        if rng.random() < 0.5:
            view = torch.flip(view, [3])
        view = torch.roll(view, rng.integers(0, 5, 2).tolist(), (2, 3))
        optimizer.zero_grad()
        terms.clear()
        output = teacher(view)
        scales = [10.0] + [1.0] * (len(terms) - 1)
        r_bn = sum(scale * term for scale, term in zip(scales, terms, strict=True))
        (criterion(output, labels) + config.r_bn * r_bn).backward()
        optimizer.step()
        for channel in range(image.channels):
            low, high = (-mean / std)[channel], ((1 - mean) / std)[channel]
            x.data[:, channel] = torch.clamp(x[:, channel], low, high)
    for handle in handles:
        handle.remove()
    return x.detach()


def bare_loop(teacher: nn.Module, labels: Tensor, start: Tensor, iterations: int) -> None:
    """The teacher's forward pass and the gradient of the images, as fast as this library has it."""
    teacher = teacher.to(memory_format=torch.channels_last)
    x = start.contiguous(memory_format=torch.channels_last).requires_grad_()
    kind = x.device.type
    for _ in range(iterations):
        with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
            loss = F.cross_entropy(teacher(x).float(), labels)
        torch.autograd.grad(loss, x)


def speed(options: argparse.Namespace) -> None:
    device = default_device()
    cases = [("resnet20", 32, 20), ("resnet18", 64, 6)]
    if device.type == "cuda":
        cases = [("resnet20", 32, 200), ("resnet18", 64, 100), ("resnet18", 224, 40)]
    if options.quick:
        cases = [(name, size, max(2, count // 3)) for name, size, count in cases[:1]]
    for case in cases:
        measure(*case, options)


def measure(name: str, size: int, count: int, options: argparse.Namespace) -> None:
    batch = 100
    device, image = default_device(), ImageConfig(size=size)
    torch.manual_seed(0)
    network = backbones.build(name, 10, 3)
    if name == "resnet20" and options.data:
        weights = next((options.data / "weights").glob("resnet20-*.npz"))
        backbones.load_weights(network, read_weights(weights), str(weights))
    network = network.to(device).eval().requires_grad_(requires_grad=False)
    start = torch.randn(batch, 3, size, size).to(device)
    labels = torch.arange(batch, device=device) % 10
    config = RecoverConfig(iterations=count, jitter=4, crop_floor=0.25, milestone=0.0)

    def timed(function: Callable[[], Any]) -> float:
        network.to(memory_format=torch.contiguous_format)
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / count

    ways: dict[str, Callable[[], Any]] = {
        "plain": lambda: plain_loop(network, labels, start, config, image),
        "ours": lambda: recover([network], labels, start, 0, config, image),
        "bare": lambda: bare_loop(network, labels, start, count),
    }
    found: dict[str, list[float]] = {way: [] for way in ways}
    with reproducible(1 if device.type == "cpu" else torch.get_num_threads()):
        for turn in range(4 if options.quick else 8):
            for way, function in ways.items():
                took = timed(function)
                if turn:  # the first one warms up
                    found[way].append(took)
    ratios = {
        way: statistics.median(a / b for a, b in zip(found[way], found["ours"], strict=True))
        for way in ("plain", "bare")
    }
    times = {way: 1000 * statistics.median(values) for way, values in found.items()}
    where = f"{name}, {batch} images of {size} x {size}, {device.type}"
    print(
        f"{where}: an iteration takes {times['ours']:.1f} ms, the plain loop "
        f"{times['plain']:.1f} ms, forward and backward alone {times['bare']:.1f} ms"
    )
    target(f"{where}: times as fast as the plain loop", 1.5, ratios["plain"])
    target(f"{where}: share of the bare forward and backward time", 0.85, ratios["bare"])


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "speed": speed,
    "accuracy": accuracy,
    "labels": labels,
}


def main() -> None:
    parser = make_parser(__doc__, "digits, few iterations and epochs", PARTS, runs=True)
    parser.add_argument("--datasets", nargs="+", default=list(DATASETS), choices=DATASETS)
    parser.add_argument("--ipcs", nargs="+", type=int, default=list(IPCS), choices=IPCS)
    parser.add_argument("--workers", type=int, default=2, help="Ray workers; 1 for this process")
    options = parser.parse_args()
    if options.quick or options.data is None:
        options.datasets = ["digits"]
    if options.quick:
        options.ipcs = [1, 10]
    run_parts(PARTS, options)


if __name__ == "__main__":
    main()
