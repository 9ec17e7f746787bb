"""Codebooks: codes in use, quality and the search for the nearest code.

``training``: one convolutional tokenizer with ways to keep codes, as many steps for each, on
CIFAR-10: learned codes as in VQ-VAE (``plain``), a moving average (``ema``), learned codes on the
sphere (``sphere``, ViT-VQGAN), random codes behind a learned map of 8 numbers (``simvq``), and
k-means centres of pixels behind such a map (``lc``, VQGAN-LC). ``plain`` and ``ema``
are as published: vectors of 32 numbers, not standardised, and no code is ever put elsewhere. What
is in use is counted over one pass through all images, as it was published, and over test images
alone, where a code is expected 64 times.

``search``: the nearest of 1,000 and of 100,000 codes, beside vector-quantize-pytorch, each in a
process of its own that says how much memory it took.

    python benchmarks/codebooks.py --data shared/data [--quick] [--json] [--only search]

With ``--out DIR``, runs that are finished are found there and not made again.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from harness import make_parser, need_data, run_parts, target
from torch import Tensor

import pipeline
from pipeline.codecs.codebook import nearest_code, usage
from pipeline.config import merge
from pipeline.recipes.tokenize import CPU, open_tokenizer
from pipeline.stages.tokenize import BATCH, read_tokenizer
from pipeline.tokenizers.quality import psnr, squared_errors
from tokenizers import images_of

WAYS: dict[str, dict[str, Any]] = {
    "plain": {"codes": "learned", "metric": "euclidean", "width": 32, "standardize": False},
    "ema": {"codes": "ema", "metric": "euclidean", "width": 32, "standardize": False},
    "sphere": {"codes": "learned", "metric": "cosine", "width": 8, "standardize": False},
    "simvq": {},
    "lc": {},
}
SIZE = 10_000


def training(options: argparse.Namespace) -> None:
    found = {way: trained(way, options) for way in options.ways}
    print(f"\n{options.dataset}, {options.codes:,} codes")
    print("| | used, % | on test images, % | perplexity | PSNR, dB |")
    print("|---|---|---|---|---|")
    for way, row in found.items():
        shares = f"{100 * row['all']:.1f} | {100 * row['used']:.1f}"
        print(f"| {way} | {shares} | {row['perplexity']:,.0f} | {row['psnr']:.2f} |", flush=True)
    if "lc" not in found:
        return
    share = found["lc"]["all"]
    target(f"VQGAN-LC: share of {options.codes:,} codes in use in a pass", 0.99, share)
    for way in ("plain", "ema"):
        if way in found:
            gap = found["lc"]["psnr"] - found[way]["psnr"]
            target(f"VQGAN-LC less {way}: PSNR, dB", 0, gap)
    if "plain" in found:
        ratio = found["lc"]["used"] / found["plain"]["used"]
        target("VQGAN-LC over plain VQ: codes in use, times", 5, ratio)


def trained(way: str, options: argparse.Namespace) -> dict[str, float]:
    """What a tokenizer does on all test images."""
    quick = options.quick
    config: dict[str, Any] = {
        "preset": "tiny-grid",
        "tokenizer": {"quantizer": {"vocabulary": options.codes, **WAYS[way]}},
        "training": {"train": {"epochs": 2 if quick else options.epochs, "batch_size": 64}},
        "measured": 200,
        "predictor": {"epochs": 1},
    }
    if quick:
        small = {"size": 8, "patch": 1, "width": 16}
        config = merge(config, {"tokenizer": small, "training": {"train": {"batch_size": 32}}})
    if way == "lc":
        out = options.out / "codebook"
        codebook = {"size": options.codes, "features": {"patch": 2 if quick else 4}}
        if quick:
            codebook["image"] = {"size": 8}
        pipeline.run("codebook", options.dataset, data=options.data, out=out, config=codebook)
        config["codebook"] = str(out)
    out = options.out / way
    summary = pipeline.run(
        "train-tokenizer", options.dataset, data=options.data, out=out, config=config
    )
    print(f"{way}: {summary['seconds']['tokenizer']:,.0f} s of training", flush=True)
    tokenizer = read_tokenizer(open_tokenizer(out).files, CPU)
    images, _ = images_of(options.dataset, "test", options, 10_000)
    more, _ = images_of(options.dataset, "train", options, 50_000)
    counts, errors = np.zeros(options.codes), []
    for part in images.split(BATCH):
        tokens = tokenizer.encode(part)
        counts += np.bincount(tokens.values.flatten().numpy(), minlength=options.codes)
        errors.append(squared_errors(part, tokenizer.decode(tokens)))
    seen = counts > 0
    for part in more.split(BATCH):
        seen[tokenizer.encode(part).values.flatten().numpy()] = True
    quality = float(psnr(torch.cat(errors).double().mean()))
    return {**usage(counts), "all": float(seen.mean()), "psnr": quality}


def searches() -> dict[str, Callable[[Tensor, Tensor], Any]]:
    """Ways to find the nearest of codes (K, d) to vectors (n, d)."""

    def theirs(vectors: Tensor, codes: Tensor) -> Tensor:
        from vector_quantize_pytorch import VectorQuantize

        made = VectorQuantize(codes.shape[1], len(codes)).eval()
        made.codebook = codes
        with torch.no_grad():
            return made(vectors[None])[1][0]

    return {"ours": nearest_code, "vector-quantize-pytorch": theirs}


def one_search(way: str, codes: int, rows: int) -> None:
    """Print seconds, memory and the ids' sum of a search, in this process alone."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    book = torch.randn(codes, 8, generator=generator)
    vectors = torch.randn(rows, 8, generator=generator)
    search = searches()[way]
    search(vectors[:64], book)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        ids = search(vectors, book)
        seconds.append(time.perf_counter() - began)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    told = {"seconds": statistics.median(seconds), "bytes": grown * 1024, "ids": int(ids.sum())}
    print(json.dumps(told))


def search(options: argparse.Namespace) -> None:
    rows = 2048 if options.quick else 16_384
    found = {}
    for way in searches():
        for codes in (1000, 100_000):
            # The library's matrix of distances: 16,384 rows of it would not fit in memory.
            own = rows if way == "ours" or codes == 1000 else rows // 8
            call = [sys.executable, __file__, "--one", way, str(codes), str(own)]
            answer = subprocess.run(call, check=True, capture_output=True, text=True).stdout
            row = found[way, codes] = json.loads(answer.splitlines()[-1])
            row["each"] = row["seconds"] / own / codes
            print(
                f"{way}: nearest of {codes:,} codes of 8 numbers, {own:,} vectors: "
                f"{1e3 * row['seconds']:.1f} ms, {1e12 * row['each'] / 8:.1f} ps a product, "
                f"{row['bytes'] / 1e6:,.0f} MB more memory",
                flush=True,
            )
    ours, large = found["ours", 1000], found["ours", 100_000]
    target(
        "1,000 codes over 100,000: time a product, share (1/3 or more)",
        1 / 3,
        ours["each"] / large["each"],
    )
    target("100,000 codes: GiB left of 1 GiB", 0, 1 - large["bytes"] / 2**30)
    theirs = found["vector-quantize-pytorch", 100_000]
    target("100,000 codes: times as fast as the library", 1, theirs["each"] / large["each"])


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {"search": search, "training": training}


def main() -> None:
    parser = make_parser(__doc__, "digits, 300 codes, few epochs", PARTS, runs=True)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--codes", type=int, default=SIZE)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one_search(options.one[0], *map(int, options.one[1:]))
        return
    options.dataset = "digits" if options.quick else "cifar10"
    options.codes = 300 if options.quick else options.codes
    need_data(parser, options)
    run_parts(PARTS, options)


if __name__ == "__main__":
    main()
