"""Codecs: the entropy coder beside others, features beside coded images, hidden trees beside files.

``coder``: a million symbols by one table, and latents of 24 channels, each with a table of its own,
beside constriction (and CompressAI where it is installed), with the same integer tables.
constriction codes all symbols of a table in one call.

``rate``: a feature codec of a given ResNet on CIFAR-10 at four weights of a bit, beside JPEG,
WebP and AVIF: files and what is left of them without what all files of a size share, seen by the
teacher as it is and by the teacher trained on as many images of that codec, as long and with the
same loss as a tail; and fewer channels in 8 bits with no entropy model, trained as the codec.

``lossless``: hidden trees on Fashion-MNIST beside PNG, WebP and JPEG XL of each image, and JPEG XL
of all of them as one picture (by imagecodecs, or ``cjxl``).

    python benchmarks/codecs.py --data shared/data [--quick] [--json] [--only coder]

With ``--out DIR``, runs that are finished are found there and not made again.
"""

from __future__ import annotations

import argparse
import io
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from harness import make_parser, need_data, run_parts, target
from PIL import Image

import pipeline
from pipeline.codecs import rans
from pipeline.codecs.bitstream import Bitstream, compress, decompress
from pipeline.codecs.compress import Compress
from pipeline.codecs.entropy import StaticModel
from pipeline.codecs.hidden_tree import HiddenTree
from pipeline.codecs.tables import TOTAL, Tables
from pipeline.config import merge
from pipeline.labelled_images import accuracy
from pipeline.orchestration.checkpoint import Checkpoint
from pipeline.orchestration.training import train
from pipeline.recipes.compress_features import RECIPE
from pipeline.stage import ShardContext
from pipeline.stages.recompress import Recompress
from pipeline.storage.artifact import Artifact, ArtifactSource
from pipeline.storage.models import UNIT, FittedModels
from pipeline.storage.store import LocalStore, open_store
from pipeline.tensors import to_numpy

BETAS = (0.3, 1.2, 4.0, 12.0)
SETTINGS: dict[str, Any] = {
    "codec": {"channels": 12, "split": "layer1"},
    "mimic": {"epochs": 6},
    "tail": {"epochs": 4},
}
TAIL_LR = {"resnet20": 0.05, "resnet56": 0.02}
"""With 0.05 the training of a ResNet-56's tail can diverge."""
CHANNELS = (1, 2, 3, 6, 9, 12)
INPUTS = ("jpeg:5", "jpeg:20", "webp:0", "webp:10", "avif:20")


# The coder -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Symbols (C, n), of which each row has a table of its own."""

    name: str
    tables: Tables
    symbols: npt.NDArray[np.int32]


def cases(count: int) -> list[Case]:
    draw = np.random.default_rng(0)
    found = []
    for name, channels, width in (("one table", 1, 40), ("24 tables", 24, 40)):
        places = np.arange(width) - width / 2
        scales = np.linspace(0.5, 6, channels) if channels > 1 else np.array([3.0])
        shares = [np.append(np.exp(-np.abs(places) / s), 1e-6) for s in scales]
        tables = Tables.of(shares, [-width // 2] * channels)
        rows = []
        for share in shares:
            p = share[:-1] / share[:-1].sum()
            rows.append(draw.choice(width, count // channels, p=p) - width // 2)
        found.append(Case(name, tables, np.array(rows, np.int32)))
    return found


def ours(case: Case) -> tuple[Callable[[], bytes], Callable[[bytes], Any]]:
    flat = case.symbols.ravel()
    which = np.repeat(np.arange(len(case.symbols)), case.symbols.shape[1]).astype(np.uint16)
    return (
        lambda: rans.encode(flat, which, case.tables, lanes=4),
        lambda data: rans.decode(data, which, case.tables, lanes=4),
    )


def constriction(case: Case, kind: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    from constriction import stream

    edges, models = case.tables.first, []
    for table in range(len(case.tables)):
        shares = case.tables.frequencies[edges[table] : edges[table + 1]] / TOTAL
        models.append(stream.model.Categorical(shares, perfect=False))
    first = int(case.tables.offsets[0])
    places = [row - first for row in case.symbols]
    count = case.symbols.shape[1]

    def encode() -> Any:
        coder = stream.stack.AnsCoder() if kind == "ANS" else stream.queue.RangeEncoder()
        pairs = list(zip(places, models, strict=True))
        for row, model in pairs[::-1] if kind == "ANS" else pairs:
            (coder.encode_reverse if kind == "ANS" else coder.encode)(row, model)
        return coder.get_compressed()

    def decode(words: Any) -> Any:
        made = stream.stack.AnsCoder if kind == "ANS" else stream.queue.RangeDecoder
        coder = made(words)
        return np.concatenate([coder.decode(model, count) for model in models]) + first

    return encode, decode


def compressai(case: Case) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    from compressai import ans

    edges = case.tables.first
    cdfs, sizes = [], []
    longest = int(case.tables.lengths.max()) + 2
    for table in range(len(case.tables)):
        part = case.tables.frequencies[edges[table] : edges[table + 1]].astype(np.int64)
        cdf = np.concatenate([[0], np.cumsum(part)])
        cdfs.append(np.pad(cdf, (0, longest - len(cdf))).tolist())
        sizes.append(len(cdf))
    offsets = case.tables.offsets.tolist()
    symbols = case.symbols.ravel().tolist()
    which = np.repeat(np.arange(len(case.symbols)), case.symbols.shape[1]).tolist()
    coder, decoder = ans.RansEncoder(), ans.RansDecoder()
    return (
        lambda: coder.encode_with_indexes(symbols, which, cdfs, sizes, offsets),
        lambda data: np.array(decoder.decode_with_indexes(data, which, cdfs, sizes, offsets)),
    )


def coder(options: argparse.Namespace) -> None:
    repeats = 5 if options.quick else 15
    for case in cases(10**6):
        ways: dict[str, Callable[[], Any]] = {
            "ours": lambda case=case: ours(case),
            "constriction ANS": lambda case=case: constriction(case, "ANS"),
            "constriction range": lambda case=case: constriction(case, "range"),
            "CompressAI": lambda case=case: compressai(case),
        }
        found = {}
        print(f"\n{case.name}, {case.symbols.size:,} symbols")
        print("| | encode, ns | decode, ns | bytes | over the tables, % |")
        print("|---|---|---|---|---|")
        ideal = case.tables.bits(case.symbols.T, np.arange(len(case.symbols))) / 8
        made: dict[str, Any] = {}
        for name, make in ways.items():
            try:
                made[name] = make()
            except ImportError:
                print(f"| {name} is not installed | | | | |")
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in made}
        for _ in range(repeats):  # in turn, so that a busy moment is everyone's
            for name, (encode, decode) in made.items():
                began = time.perf_counter()
                data = encode()
                middle = time.perf_counter()
                seen = decode(data)
                times[name].append((middle - began, time.perf_counter() - middle))
                assert (np.asarray(seen) == case.symbols.ravel()).all(), name
                found[name] = len(data) * (4 if isinstance(data, np.ndarray) else 1)
        unit = 1e9 / case.symbols.size
        each = {
            name: [unit * statistics.median(row) for row in zip(*rows, strict=True)]
            for name, rows in times.items()
        }
        for name, (encoding, decoding) in each.items():
            over = 100 * (found[name] / ideal - 1)
            print(f"| {name} | {encoding:.2f} | {decoding:.2f} | {found[name]:,} | {over:.4f} |")
        others = [each[name] for name in each if name != "ours"]
        for number, what in enumerate(("encode", "decode")):
            ratio = min(row[number] for row in others) / each["ours"][number]
            target(f"{case.name}, {what}: times as fast as the fastest", 1, ratio)
        target(f"{case.name}: bytes over the tables", 1.001, found["ours"] / ideal, most=True)


# Rate and accuracy ---------------------------------------------------------------------------


def codec_run(
    beta: float, options: argparse.Namespace, channels: Sequence[int] = ()
) -> tuple[Artifact, dict[str, Any]]:
    dataset = "digits" if options.quick else "cifar10"
    baselines = ["int8", *(f"channels:{n}" for n in channels)]
    config: dict[str, Any] = {"beta": beta, "baselines": baselines}
    if options.quick:
        config = merge(config, {"teacher": {"train": {"epochs": 8}}, "mimic": {"epochs": 3}})
    else:
        weights = next((options.data / "weights").glob(f"{options.teacher}-*.npz"))
        config["teacher"] = {"backbone": options.teacher, "weights": str(weights)}
        config = reduce(merge, [config, SETTINGS, {"tail": {"lr": TAIL_LR[options.teacher]}}])
    out = options.out / f"{dataset}-{options.teacher}-{beta:g}"
    pipeline.run("compress-features", dataset, data=options.data, out=out, config=config)
    artifact = Artifact.open(open_store(out))
    return artifact, artifact.manifest


def step_table(artifact: Artifact, name: str, column: str) -> pa.Table:
    """Of the step of this name whose table has a column."""
    for folder in Path(str(artifact.store)).glob(f"{name}-[0-9a-f]*"):
        if (folder / "manifest.json").exists():
            table = pa.concat_tables(ArtifactSource(Artifact.open(open_store(folder))).tables())
            if column in table.column_names:
                return table
    raise FileNotFoundError(f"{name} in {artifact.store}")


def rate(options: argparse.Namespace) -> None:
    rows = []
    head = "beta | bytes | 99 in 100 | entropy model | learned prior | zstd of all int8 latents"
    print(f"\n| {head} | stage 1, % | stage 2, % |\n|---|---|---|---|---|---|---|---|")
    for beta in options.betas:
        artifact, about = codec_run(beta, options)
        latents = to_numpy(step_table(artifact, "latents", "latents")["latents"])
        levels = latents.clip(-128, 127).astype(np.int8).tobytes()
        whole = len(pa.compress(levels, "zstd", asbytes=True)) / len(latents)
        kinds = {row["kind"]: row["sample"] for row in about["entropy"]}
        best = min(about["entropy"], key=lambda row: row["total"])
        row = {
            "bytes": about["bytes"]["mean"],
            "stage 1": about["accuracy"]["mimic"],
            "stage 2": about["accuracy"]["tail"],
            "counted": min(kinds["channel"], kinds["position"]),
            "prior": kinds["prior"],
        }
        rows.append(row)
        print(
            f"| {beta:g} | {row['bytes']:.1f} | {about['bytes']['p99']:.0f} | {best['kind']} "
            f"{best['sample']:.1f} | {row['prior']:.1f} | {whole:.1f} "
            f"| {row['stage 1']:.2f} | {row['stage 2']:.2f} |",
            flush=True,
        )
    for high, low in pairwise(rows):
        ratio, rise = low["bytes"] / high["bytes"], low["stage 2"] - high["stage 2"]
        target("bytes as the weight of a bit grows, share", 1, ratio, most=True)
        target("accuracy as it grows, points", 1.5, rise, most=True)
    for row in rows:
        target("stage 2 less stage 1, points", 0, row["stage 2"] - row["stage 1"])
        target("counted tables over the learned prior", 1, row["counted"] / row["prior"], most=True)
    inputs(artifact, about, rows, options)
    reductions(rows, options)


def reductions(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Fewer channels in 8 bits, beside the student in as many bytes."""
    _, about = codec_run(options.betas[-1], options, options.channels)
    print(
        "\n| channels in 8 bits | bytes | stage 1, % | stage 2, % | student in at most as many, % |"
    )
    print("|---|---|---|---|---|")
    for found in about["baselines"]:
        name, _, channels = found["name"].partition(":")
        if name == "channels":
            size = found["bytes"]["mean"]
            fair = [row["stage 2"] for row in rows if row["bytes"] <= size]
            student = f"{max(fair):.2f}" if fair else ""
            told = f"{size:.0f} | {found['mimic']:.2f} | {found['accuracy']:.2f} | {student}"
            print(f"| {channels} | {told} |", flush=True)


def inputs(
    artifact: Artifact,
    about: Mapping[str, Any],
    rows: list[dict[str, Any]],
    options: argparse.Namespace,
) -> None:
    """Images of other codecs, seen by the teacher as it is and trained on them."""
    config = RECIPE.config(**{**about["config"], "baselines": ()})
    models = FittedModels(artifact.product("teacher"), (UNIT,))
    (teacher,) = models.networks(torch.device("cpu"))
    tables = {n: step_table(artifact, n, "image") for n in ("train", "test")}
    print(
        "\n| | files, bytes | without what they share | teacher, % | teacher trained on them, % |"
    )
    print("|---|---|---|---|---|")
    found = []
    for name in options.inputs:
        codec, _, quality = name.partition(":")
        stage = Recompress(codec, int(quality))  # type: ignore[arg-type]
        seen = {n: stage(t, ShardContext("", 0)) for n, t in tables.items()}
        # Of no layer the weights are coded: what is left is training on these images.
        adapt = Compress(models, config.image, (), config.tail, config.distillation)
        plain = adapt.prepare(seen, 0, torch.device("cpu"))
        before = accuracy(teacher, plain.sets["test"])["accuracy"]
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            checkpoint = Checkpoint(LocalStore(Path(folder)), "adapted", 1e9)
            model = train(adapt, seen, 0, checkpoint).training.model
        after = accuracy(model.eval(), plain.sets["test"])["accuracy"]
        sizes = [float(np.mean(to_numpy(seen["test"][n]))) for n in ("bytes", "payload")]
        found.append((f"{codec} {quality}", *sizes, before, after))
        print(
            f"| {codec} {quality} | {sizes[0]:.1f} | {sizes[1]:.1f} | {before:.2f} | {after:.2f} |",
            flush=True,
        )
    print(f"\nteacher on whole images: {about['accuracy']['teacher']:.2f} %")
    for name, file, payload, _, after in found:
        for what, size in (("files", file), ("payloads", payload)):
            fair = [row for row in rows if row["bytes"] <= size]
            if fair:
                best = max(row["stage 2"] for row in fair)
                word = "wins" if best > after else "loses"
                told = f"{best:.2f} %, {word} against {what} of {name}"
                print(f"  student in at most {size:.0f} bytes: {told}")


# Lossless ------------------------------------------------------------------------------------


def file_bytes(image: npt.NDArray[np.uint8], kind: str) -> int:
    buffer = io.BytesIO()
    options: dict[str, Any] = {
        "PNG": {"format": "PNG", "optimize": True},
        "WebP": {"format": "WEBP", "lossless": True, "quality": 100, "method": 6},
    }[kind]
    Image.fromarray(image).save(buffer, **options)
    return len(buffer.getvalue())


def jxl_bytes(image: npt.NDArray[np.uint8]) -> int:
    """Of a lossless JPEG XL at the greatest effort; ImportError where there is none."""
    try:
        import imagecodecs
    except ImportError:
        if shutil.which("cjxl") is None:
            raise
        with tempfile.TemporaryDirectory() as folder:
            png, jxl = Path(folder) / "a.png", Path(folder) / "a.jxl"
            Image.fromarray(image).save(png)
            call = ["cjxl", "-d", "0", "-e", "9", png, jxl]
            subprocess.run(call, check=True, capture_output=True)
            return jxl.stat().st_size
    return len(imagecodecs.jpegxl_encode(image, lossless=True, effort=9))


def lossless(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    if options.quick:
        from sklearn.datasets import load_digits

        images = load_digits().images.astype(np.uint8)
        train_images, test = images[:1500], images[1500:]
        states, epochs = 8, 20
    else:
        held = np.load(options.data / "fashion_mnist.npz")
        train_images, test = held["x_train"], held["x_test"]
        states, epochs = options.states, options.tree_epochs
    began = time.perf_counter()
    tree = HiddenTree.fit(train_images, states=states, epochs=epochs)
    took = time.perf_counter() - began
    decompress(compress(test[:2], tree, group=1), tree)  # compiles
    began = time.perf_counter()
    single = compress(test, tree, group=1)
    encoding = (time.perf_counter() - began) / len(test)
    began = time.perf_counter()
    assert (decompress(single, tree) == test).all()
    decoding = (time.perf_counter() - began) / len(test)
    alone = StaticModel.counted(train_images, positions=True)
    size = sum(v.nbytes for v in tree.to_arrays().values())
    side = min(31, int(np.sqrt(len(test))))
    some = test[: side * side]
    flat = some.reshape(len(some), -1)
    starts = Bitstream(single, tree).header.starts
    found = {
        "hidden tree, ideal": tree.bits(flat) / 8,
        "hidden tree, a record an image": starts[len(some)] - starts[0],
        "hidden tree, bitstream in groups of 2 KiB": len(compress(some, tree)),
        "a table a pixel, ideal": alone.bits(flat) / 8,
        "PNG, an image": sum(file_bytes(image, "PNG") for image in some),
        "WebP, an image": sum(file_bytes(image, "WebP") for image in some),
    }
    try:
        found["JPEG XL, an image"] = sum(jxl_bytes(image) for image in some)
        mosaic = some.reshape(side, side, *test.shape[1:]).swapaxes(1, 2)
        whole = mosaic.reshape(side * test.shape[1], side * test.shape[2])
        found["JPEG XL, one picture of them all"] = jxl_bytes(whole)
    except ImportError:
        print("JPEG XL is not installed (imagecodecs, or cjxl)")
    print(f"\n{len(train_images):,} images, K = {states}, {epochs} epochs, {took:.0f} s")
    print(f"{size:,} bytes of model")
    print(f"encode {1e3 * encoding:.2f} ms, decode {1e3 * decoding:.2f} ms an image, one core")
    print(f"| {len(some)} images | bits a pixel |")
    print("|---|---|")
    for name, value in found.items():
        print(f"| {name} | {8 * value / flat.size:.3f} |")
    target("hidden tree: images decoded in a second", 200, 1 / decoding)
    ours = "hidden tree, a record an image"
    for name in list(found)[4:]:
        target(f"{ours}, over {name}", 1, found[ours] / found[name], most=True)


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "coder": coder,
    "lossless": lossless,
    "rate": rate,
}


def main() -> None:
    parser = make_parser(__doc__, "digits, and fewer of everything", PARTS, runs=True)
    parser.add_argument("--betas", nargs="*", type=float, default=BETAS, help="weights of a bit")
    parser.add_argument("--teacher", default="resnet20", choices=TAIL_LR)
    parser.add_argument("--inputs", nargs="*", default=INPUTS, help="image codecs and qualities")
    parser.add_argument("--channels", nargs="*", type=int, default=CHANNELS, help="in 8 bits")
    parser.add_argument("--states", type=int, default=32, help="of a hidden tree")
    parser.add_argument("--tree-epochs", type=int, default=12, help="of a hidden tree")
    options = parser.parse_args()
    need_data(parser, options)
    if options.quick:
        options.betas, options.inputs, options.channels = BETAS[1:3], INPUTS[:2], CHANNELS[:2]
    run_parts(PARTS, options)


if __name__ == "__main__":
    main()
