"""Tokenizers: quality against bytes beside image codecs, lengths for each image, throughput.

``quality``: tokenizers trained by the recipe on CIFAR-10 and on imagenette at 64 x 64 pixels: one
length for all, and lengths by what an image gains (measured and predicted) at equal mean bytes,
beside JPEG, WebP and AVIF at their smallest. Bytes of codecs are those of their files, headers and
all; tokens are counted packed, where lengths differ with a byte that says how many; the networks
are counted on neither side. PSNR is of the mean squared error over all images, SSIM of gray levels
with a Gaussian window of 11 pixels, accuracy that of a classifier on what was decoded.

``quantizers``: the same small network with ours and with those of vector-quantize-pytorch.

``throughput``: tokenizing a data set by the recipe against the bare network on the same images in
memory, and the predicted choice of lengths against one length for all.

    python benchmarks/tokenizers.py --data shared/data [--quick] [--json] [--only quality]

With ``--out DIR``, runs that are finished are found there and not made again.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from harness import make_parser, run_parts, target
from torch import Tensor, nn

import pipeline
from pipeline import backbones
from pipeline.config import build, merge
from pipeline.dataset_distill.config import SqueezeConfig
from pipeline.dataset_distill.squeeze import Squeeze
from pipeline.datasets import find_dataset
from pipeline.device import default_device, in_batches, reproducible
from pipeline.labelled_images import ImageConfig
from pipeline.orchestration.checkpoint import Checkpoint
from pipeline.orchestration.training import train
from pipeline.recipes.tokenize import CPU, open_tokenizer
from pipeline.recipes.train_tokenizer import read_curves
from pipeline.stage import ShardContext
from pipeline.stages.decode import Decode
from pipeline.stages.recompress import Recompress
from pipeline.stages.select import Split
from pipeline.stages.tokenize import BATCH, read_predictor, read_tokenizer
from pipeline.storage.artifact import Artifact, ArtifactSource
from pipeline.storage.store import LocalStore, open_store
from pipeline.storage.weights import read_weights
from pipeline.tensors import tensor_column, to_numpy
from pipeline.tokenizers import quantizers as ours
from pipeline.tokenizers.config import LatentConfig, TokenizerTrainConfig
from pipeline.tokenizers.lengths import LengthRule, byte_costs, multiplier_for
from pipeline.tokenizers.quality import error_curves, grid, health, psnr
from pipeline.tokenizers.tokenizer import Tokenizer
from pipeline.tokenizers.training import TrainTokenizer

SPLITS: tuple[Literal["train", "test"], ...] = ("train", "test")
GRAY = {"mean": (0.305,), "std": (0.376,)}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
SIDE = {"width": 128, "depth": 3}
SMALL = {"width": 64, "depth": 2}
SMALL_SIDES = {"encoder": SMALL, "decoder": SMALL}
DATASETS: dict[str, dict[str, Any]] = {
    "cifar10": {
        "tokenizer": {"size": 32, "patch": 8, "tokens": 32, "encoder": SIDE, "decoder": SIDE},
        "training": {"train": {"epochs": 12, "batch_size": 64, "lr": 1e-3}},
    },
    "imagenette": {
        "tokenizer": {"size": 64, "patch": 8, "tokens": 64, "encoder": SIDE, "decoder": SIDE},
        "training": {"train": {"epochs": 60, "batch_size": 32, "lr": 1e-3}},
    },
    "digits": {
        "tokenizer": {"size": 8, "patch": 2, "tokens": 16, "channels": 1, "quantizer": {"bits": 6}}
        | SMALL_SIDES,
        "training": {"train": {"epochs": 12, "batch_size": 64, "lr": 2e-3}, "flip": False},
    },
}


def trained(dataset: str, options: argparse.Namespace, **changes: Any) -> tuple[Path, Artifact]:
    """The output of a run of ``train-tokenizer``."""
    config = merge(DATASETS[dataset], changes)
    name = "-".join([dataset, *sorted(changes.get("tokenizer", {}))])
    out = options.out / name
    pipeline.run("train-tokenizer", dataset, data=options.data, out=out, config=config)
    return out, Artifact.open(open_store(out))


def images_of(
    dataset: str, split: Literal["train", "test"], options: argparse.Namespace, most: int = 2000
) -> tuple[Tensor, Tensor]:
    """Images uint8 (n, C, H, W) and labels (n,) of up to ``most`` samples."""
    found, shape = find_dataset(dataset, options.data), DATASETS[dataset]["tokenizer"]
    source, stages = found.train, [Decode(shape["size"], shape.get("channels", 3))]
    if found.test is None:
        stages.insert(0, Split(split))
    elif split == "test":
        source = found.test
    tables, rows = [], 0
    for part in source.tables():
        table = part.select(["key", "image", "label"])
        for stage in stages:
            table = stage(table, ShardContext("", 0))
        tables.append(table)
        rows += len(table)
        if rows >= most:
            break
    table = pa.concat_tables(tables).slice(0, most)
    images = torch.from_numpy(to_numpy(table["image"]).copy()).permute(0, 3, 1, 2)
    return images.contiguous(), torch.from_numpy(to_numpy(table["label"]).astype(np.int64))


def classifier(dataset: str, options: argparse.Namespace) -> Callable[[Tensor], Tensor]:
    """Answers of a classifier to images (n, C, H, W) in [0, 1]."""
    size = DATASETS[dataset]["tokenizer"]["size"]
    channels = DATASETS[dataset]["tokenizer"].get("channels", 3)
    image = ImageConfig(size=size, channels=channels, **(IMAGENET if channels == 3 else GRAY))
    if dataset == "cifar10":
        weights = next((options.data / "weights").glob("resnet20-*.npz"))
        model = backbones.build("resnet20", 10, 3)
        backbones.load_weights(model, read_weights(weights), str(weights))
    else:
        shape = {"epochs": 30, "batch_size": 64, "lr": 2e-3}
        config = build(SqueezeConfig, {"backbone": "convnet3", "train": shape})
        tables = {}
        for split in SPLITS:
            images, labels = images_of(dataset, split, options)
            column = tensor_column(images.permute(0, 2, 3, 1).contiguous().numpy())
            tables[split] = pa.table({"image": column, "label": pa.array(labels.numpy())})
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = Checkpoint(LocalStore(Path(folder)), "classifier", 1e9)
            model = train(Squeeze(config, image, 10), tables, 0, checkpoint).training.model
    model = model.eval()
    mean, std = (torch.tensor(v)[:, None, None] for v in (image.mean, image.std))
    return lambda x: in_batches(model, (x - mean) / std).argmax(1)


def ssim(a: Tensor, b: Tensor) -> float:
    """Mean structural similarity of gray levels of images in [0, 1]."""
    a, b = (x.float().mean(1, keepdim=True) for x in (a, b))
    side = min(11, a.shape[-1] - 1 + a.shape[-1] % 2)
    line = torch.exp(-((torch.arange(float(side)) - side // 2) ** 2) / (2 * 1.5**2))
    window = (line[:, None] * line / line.sum() ** 2)[None, None]

    def mean(x: Tensor) -> Tensor:
        return F.conv2d(x, window)

    low, high = 0.01**2, 0.03**2
    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    top = (2 * ma * mb + low) * (2 * cov + high)
    return float((top / ((ma**2 + mb**2 + low) * (va + vb + high))).mean())


def by_codec(images: Tensor, kind: str, quality: int) -> tuple[float, Tensor]:
    """Mean bytes of a file, and the images that are read back, in [0, 1]."""
    table = pa.table({"image": tensor_column(images.permute(0, 2, 3, 1).contiguous().numpy())})
    stage = Recompress(kind.lower(), quality)  # type: ignore[arg-type]
    seen = stage(table, ShardContext("", 0))
    decoded = torch.from_numpy(to_numpy(seen["image"]).copy()).permute(0, 3, 1, 2)
    return float(np.mean(to_numpy(seen["bytes"]))), decoded.float() / 255


@dataclass(frozen=True)
class Sheet:
    """Rows of a table of what decoded images are worth."""

    images: Tensor
    labels: Tensor
    answer: Callable[[Tensor], Tensor]

    def row(self, name: str, size: float, decoded: Tensor) -> None:
        real = self.images.float() / 255
        error = (decoded - real).square().flatten(1).mean(1).double()
        right = 100 * float((self.answer(decoded) == self.labels).double().mean())
        print(
            f"| {name} | {size:.1f} | {float(psnr(error.mean())):.2f} | "
            f"{float(psnr(error).mean()):.2f} | {ssim(decoded, real):.3f} | {right:.1f} |",
            flush=True,
        )


def quality(options: argparse.Namespace) -> None:
    for dataset in options.datasets:
        out, _ = trained(dataset, options)
        fixed, _ = trained(dataset, options, tokenizer={"tail_drop": None})
        size = DATASETS[dataset]["tokenizer"]["size"]
        images, labels = images_of(dataset, "test", options)
        sheet = Sheet(images, labels, classifier(dataset, options))
        print(f"\n{dataset}, {size} x {size} pixels, {len(images):,} test images")
        print("| | mean bytes | PSNR, dB | mean PSNR, dB | SSIM | accuracy, % |")
        print("|---|---|---|---|---|---|")
        sheet.row("as they are", images[0].numel(), images.float() / 255)
        tail, whole = (read_tokenizer(open_tokenizer(p).files, CPU) for p in (out, fixed))
        most = tail.form.max_tokens
        few = most // 4
        for count in (most, few):
            cost = whole.form.bytes_of(count)
            sheet.row(f"no tail drop, {count} tokens", cost, decoded_by(whole, images, count))
        for count in grid(most):
            cost = tail.form.bytes_of(count)
            sheet.row(f"tail drop, {count} tokens", cost, decoded_by(tail, images, count))
        adaptive(dataset, out, sheet)
        for kind, qualities in {"JPEG": (1, 5), "WEBP": (0, 5), "AVIF": (0, 10)}.items():
            for value in qualities:
                sheet.row(f"{kind}, quality {value}", *by_codec(images, kind, value))
        drop, none = (
            float(psnr(error_curves(t, images, [few]).double().mean())) for t in (tail, whole)
        )
        target(f"{dataset}: tail drop less no drop at a quarter of the tokens, dB", 2, drop - none)
        print({name: round(value, 3) for name, value in health(tail.encode(images)).items()})


def decoded_by(tokenizer: Tokenizer, images: Tensor, length: int | Tensor) -> Tensor:
    parts, lengths = [], torch.as_tensor(length).expand(len(images))
    for batch, kept in zip(images.split(256), lengths.split(256), strict=True):
        parts.append(tokenizer.decode(tokenizer.encode(batch).cut(kept), tuple(batch.shape[2:])))
    return torch.cat(parts)


def adaptive(dataset: str, out: Path, sheet: Sheet) -> None:
    """Lengths for each image at the mean bytes of one length for all."""
    opened, run, images = open_tokenizer(out), Artifact.open(open_store(out)), sheet.images
    tokenizer = read_tokenizer(opened.files, CPU)
    network = read_predictor(opened.predictor, CPU)
    known, summary = read_curves(ArtifactSource(run.product("curves")))
    lengths, form = opened.lengths, tokenizer.form
    costs = byte_costs(form, lengths)
    errors = error_curves(tokenizer, images, lengths).double().numpy()
    seen = torch.cat([tokenizer.describe(batch)[1] for batch in images.split(256)])
    with torch.inference_mode():
        guesses = [network.curves(s).double().numpy() for s in (summary, seen)]
    most = form.max_tokens
    for length in (most // 8, most // 4, most // 2):
        place = min(range(len(lengths)), key=lambda n: abs(lengths[n] - length))
        budget = float(costs[place])
        gains = {}
        for name, calibration, curves in [
            ("measured", known, errors),
            ("predicted", guesses[0], guesses[1]),
        ]:
            rule = LengthRule("lagrangian", multiplier_for(calibration, costs, budget), lengths)
            chosen = rule.places(curves, form)
            found = errors[np.arange(len(errors)), chosen].mean()
            # At equal mean bytes: where the curve of one length for all has them.
            mean = float(costs[chosen].mean())
            same = float(np.interp(mean, costs, -10 * np.log10(errors.mean(0))))
            gains[name] = -10 * math.log10(found) - same
            sheet.row(
                f"adaptive, {name}",
                mean,
                decoded_by(tokenizer, images, torch.tensor(lengths)[chosen]),
            )
        where = f"{dataset}, {lengths[place]} tokens in the mean"
        target(f"{where}: adaptive less one length for all, dB", 0.15, gains["measured"])
        share = gains["predicted"] / gains["measured"]
        target(f"{where}: share of it that the predictor keeps", 0.5, share)


class Theirs(ours.Quantizer):
    """A quantizer of vector-quantize-pytorch in the place of ours."""

    def __init__(self, shape: ours.Shape, form: Any, module: nn.Module, numbers: int) -> None:
        super().__init__(shape, numbers)
        self.module, self._form = module, form

    def numbers(self, hidden: Tensor) -> Tensor:
        return self.narrow(hidden)

    def form(self, max_tokens: int) -> Any:
        return self._form

    def forward(self, hidden: Tensor) -> ours.Quantized:
        vectors, ids, *rest = self.module(self.numbers(hidden))
        losses = {"theirs": rest[0].sum()} if rest else {}
        return ours.Quantized(self.widen(vectors), ids.to(torch.int64), None, losses)

    def levels(self, values: Tensor) -> Tensor:
        lookup = (
            getattr(self.module, "indices_to_codes", None) or self.module.get_output_from_indices
        )
        return lookup(values)


def quantizers(options: argparse.Namespace) -> None:
    from vector_quantize_pytorch import FSQ, LFQ, VectorQuantize

    from pipeline.tokenizers.tokens import form_of_vocabulary

    settings = merge(DATASETS[options.datasets[0]], {"tokenizer": SMALL_SIDES})
    tokens, width = settings["tokenizer"]["tokens"], SMALL["width"]
    shape = ours.Shape(tokens, width, width)
    form = form_of_vocabulary(4096, tokens)
    levels = [8, 8, 8, 8]
    cases: list[tuple[str, dict[str, Any], Callable[[], ours.Quantizer] | None]] = [
        ("BSQ, ours", {"kind": "bsq", "bits": 12}, None),
        ("LFQ, ours", {"kind": "lfq", "bits": 12}, None),
        ("FSQ, ours", {"kind": "fsq", "levels": levels}, None),
        ("VQ, ours", {"kind": "vq", "vocabulary": 4096, "width": 12}, None),
        (
            "BSQ, theirs",
            {},
            lambda: Theirs(shape, form, LFQ(dim=12, codebook_size=4096, spherical=True), 12),
        ),
        ("LFQ, theirs", {}, lambda: Theirs(shape, form, LFQ(dim=12, codebook_size=4096), 12)),
        ("FSQ, theirs", {}, lambda: Theirs(shape, form, FSQ(levels), 4)),
        (
            "VQ, theirs",
            {},
            lambda: Theirs(shape, form, VectorQuantize(12, 4096, use_cosine_sim=True), 12),
        ),
    ]
    found = {}
    for name, quantizer, replacement in cases:
        config = build(
            LatentConfig, {**settings["tokenizer"], "quantizer": quantizer or {"kind": "bsq"}}
        )
        epochs = 4
        short = {"train": {"epochs": epochs, "warmup_epochs": 0}}
        training = build(TokenizerTrainConfig, merge(settings["training"], short))
        found[name] = short_training(TrainTokenizer(config, training), replacement, options)
        curve = {k: round(v, 2) for k, v in found[name]["psnr"].items()}
        print(f"{name:12} {curve} used {found[name].get('used', math.nan):.3f}", flush=True)
    for kind in ("BSQ", "LFQ", "FSQ", "VQ"):
        a, b = (found[f"{kind}, {whose}"]["psnr"][str(tokens)] for whose in ("ours", "theirs"))
        target(f"{kind}: PSNR less that with vector-quantize-pytorch's, dB", 0, a - b)


def short_training(
    task: TrainTokenizer,
    replacement: Callable[[], ours.Quantizer] | None,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Metrics after a training with another quantizer in the network."""
    sets = {}
    for split in SPLITS:
        images, _ = images_of(options.datasets[0], split, options, 20_000)
        column = tensor_column(images.permute(0, 2, 3, 1).contiguous().numpy())
        sets[split] = pa.table({"image": column})
    prepare = TrainTokenizer.prepare

    def other(self: TrainTokenizer, *arguments: Any) -> Any:
        training = prepare(self, *arguments)
        if replacement:
            training.model.quantizer = replacement()
            training.model.form = training.model.quantizer.form(self.config.tokens)
        return training

    TrainTokenizer.prepare = other  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder, reproducible(torch.get_num_threads()):
            return train(task, sets, 0, Checkpoint(LocalStore(Path(folder)), "model", 1e9)).metrics
    finally:
        TrainTokenizer.prepare = prepare  # type: ignore[method-assign]


def throughput(options: argparse.Namespace) -> None:
    dataset = options.datasets[0]
    out, _ = trained(dataset, options)
    opened = open_tokenizer(out)
    device = default_device()
    tokenizer, predictor = (
        read_tokenizer(opened.files, device),
        read_predictor(opened.predictor, device),
    )
    images, _ = images_of(dataset, "train", options)
    rule = LengthRule("lagrangian", 1e-4, opened.lengths, predicted=True)
    lengths = LengthRule("fixed", tokenizer.form.max_tokens)

    def rate(which: LengthRule | None) -> float:
        began = time.perf_counter()
        for part in images.split(BATCH):
            batch = part.to(device)
            tokens, summary = tokenizer.describe(batch)
            if which:
                tokens.cut(which.lengths(tokenizer, predictor, batch, tokens, summary)).pack()
        return len(images) / (time.perf_counter() - began)

    with reproducible(1):
        turns = 2 if options.quick else 6
        ways = {"bare": None, "fixed": lengths, "predicted": rule}
        found: dict[str, list[float]] = {name: [] for name in [*ways, "pipeline"]}
        for _ in range(turns):
            for name, way in ways.items():
                found[name].append(rate(way))
            found["pipeline"].append(through(out, options))
    print({name: f"{statistics.median(values):,.0f} images/s" for name, values in found.items()})

    def share(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(found[a], found[b], strict=True))

    target(
        "tokenizing by the recipe, share of the bare network's images/s",
        0.9,
        share("pipeline", "bare"),
    )
    target(
        "lengths by the predictor, share of images/s with one length",
        0.95,
        share("predicted", "fixed"),
    )


def through(tokenizer: Path, options: argparse.Namespace) -> float:
    """Images a second of the step that makes tokens, from a data set in Parquet."""
    with tempfile.TemporaryDirectory() as folder:
        config = {"tokenizer": str(tokenizer), "format": "parquet"}
        summary = pipeline.run(
            "tokenize", options.datasets[0], data=options.data, out=folder, config=config
        )
        return float(summary["splits"]["train"]["samples"] / summary["seconds"]["train"])


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "quality": quality,
    "quantizers": quantizers,
    "throughput": throughput,
}


def main() -> None:
    parser = make_parser(__doc__, "digits, and few epochs", PARTS, runs=True)
    parser.add_argument(
        "--datasets", nargs="+", default=["cifar10", "imagenette"], choices=DATASETS
    )
    options = parser.parse_args()
    if options.data is None:
        parser.error("there is no real data: give --data, or set PIPELINE_DATA")
    if options.quick:
        options.datasets = ["digits"]
    run_parts(PARTS, options)


if __name__ == "__main__":
    main()
