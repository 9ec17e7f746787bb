"""Networks in few bytes: accuracy against size, the estimate of d, and the clustering.

``accuracy``: the given ResNet-20 and ResNet-56 on CIFAR-10 at several sizes: low-rank codes with
the estimated d (``lr2vq``), product quantization with as many epochs of training (``pq``), and
k-means of the same sub-vectors without any (``k-means``). Sizes are those of whole files.

``sweep``: one of these sizes with every d, and where the estimate lies.

``clustering``: the sub-vectors of all layers of a ResNet-50 at once, beside scikit-learn's KMeans
layer by layer, from one k-means++ start each.

    python benchmarks/compression.py --data shared/data [--quick] [--json] [--only clustering]

With ``--out DIR``, runs that are finished are found there and not made again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from harness import make_parser, need_data, run_parts, target

import pipeline
from pipeline import backbones
from pipeline.codecs.low_rank_vq import CodeConfig, cluster, plan_layers, sub_vectors
from pipeline.config import build, merge

POINTS = ({"m": 4, "k": 256}, {"m": 8, "k": 64}, {"m": 18, "k": 32})
"""Sub-vectors and codes, from small ratios to large ones."""
SWEPT = POINTS[1]


def compressed(
    network: str, way: str, code: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    """What a run gave: accuracy after the file was read, and bytes."""
    config: dict[str, Any] = {
        "code": code if way == "lr2vq" else {**code, "d": code["m"]},
        "low_rank": {"epochs": 1, "lr": 5e-4},
        "codes": {"epochs": options.epochs, "lr": 1e-3},
    }
    if way == "k-means":
        # So small a step that nothing moves: only the clustering is left.
        still = {"epochs": 1, "lr": 1e-12, "batch_size": 1024}
        config |= {"low_rank": still, "codes": still}
    dataset = "digits" if options.quick else "cifar10"
    if options.quick:
        config = merge(config, {"image": {"size": 8}, "teacher": {"train": {"epochs": 8}}})
    else:
        weights = next((options.data / "weights").glob(f"{network}-*.npz"))
        config["teacher"] = {"backbone": network, "weights": str(weights)}
    out = options.out / f"{dataset}-{network}-{way}"
    found = pipeline.run("compress-model", dataset, data=options.data, out=out, config=config)
    return {**found["bytes"], **found["accuracy"]}


def accuracy(options: argparse.Namespace) -> None:
    for network in options.networks:
        print(f"\n{network}")
        print("| m, k | | bytes | times less | accuracy, % |")
        print("|---|---|---|---|---|")
        for point in POINTS:
            rows = {}
            for way in ("k-means", "pq", "lr2vq"):
                row = rows[way] = compressed(network, way, point, options)
                told = f"{row['file']:,} | {row['ratio']:.1f} | {row['compressed']:.2f}"
                print(f"| {point['m']}, {point['k']} | {way} | {told} |", flush=True)
            where = f"{network}, m = {point['m']}"
            ours, pq = rows["lr2vq"], rows["pq"]
            target(f"{where}: lr2vq less pq, points", 0, ours["compressed"] - pq["compressed"])
            target(f"{where}: bytes of lr2vq over pq", 1, ours["file"] / pq["file"], most=True)
            gain = ours["compressed"] - rows["k-means"]["compressed"]
            target(f"{where}: lr2vq less k-means alone, points", 0, gain)


def sweep(options: argparse.Namespace) -> None:
    network, most = options.networks[0], SWEPT["m"]
    found = {}
    for d in range(1, most + 1):
        row = compressed(network, "lr2vq", {**SWEPT, "d": d}, options)
        found[d] = row["compressed"]
        print(
            f"{network}, m = {most}, d = {d}: {row['file']:,} bytes, after low rank "
            f"{row['low_rank']:.2f}, {row['compressed']:.2f} in the end",
            flush=True,
        )
    chosen = compressed(network, "lr2vq", SWEPT, options)["compressed"]
    better = sum(value > chosen for value in found.values())
    target("values of d that are better than the estimate", 1, better, most=True)


def clustering(options: argparse.Namespace) -> None:
    from sklearn.cluster import KMeans

    torch.manual_seed(0)
    name = "resnet18" if options.quick else "resnet50"
    network = backbones.build(name, 1000, 3)
    layers, _ = plan_layers(network, build(CodeConfig, {"k": 64 if options.quick else 256}))
    if options.quick:
        layers = layers[:8]
    state = network.state_dict()
    split = [sub_vectors(state[f"{one.name}.weight"].numpy(), one.m) for one in layers]
    cluster([x[:500] for x in split[:2]], [4, 4], 0)  # compiles
    began = time.perf_counter()
    made = cluster(split, [layer.k for layer in layers], 0)
    ours = time.perf_counter() - began
    began = time.perf_counter()
    theirs = [
        KMeans(layer.k, n_init=1, random_state=0).fit(x).inertia_
        for layer, x in zip(layers, split, strict=True)
    ]
    took = time.perf_counter() - began
    rows = sum(map(len, split))
    print(
        f"{name}: {rows:,} sub-vectors of {len(layers)} layers in {ours:.1f} s, scikit-learn "
        f"{took:.1f} s; sum of squared distances {sum(made.errors) / sum(theirs):.4f} of its"
    )
    target(f"{name}: times as fast as scikit-learn, layer by layer", 5, took / ours)
    target(f"{name}: minutes", 5, ours / 60, most=True)


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "clustering": clustering,
    "sweep": sweep,
    "accuracy": accuracy,
}


def main() -> None:
    parser = make_parser(__doc__, "digits, and a few layers", PARTS, runs=True)
    parser.add_argument("--networks", nargs="+", default=["resnet20", "resnet56"])
    parser.add_argument("--epochs", type=int, default=3, help="of the training of codes")
    options = parser.parse_args()
    need_data(parser, options)
    if options.quick:
        options.networks = ["convnet3"]
    run_parts(PARTS, options)


if __name__ == "__main__":
    main()
