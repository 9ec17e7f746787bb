"""The options of the command ``pipeline``. Imports nothing heavy: ``--help`` is to come at once."""

from __future__ import annotations

import argparse
import os
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline import __version__

RECIPES = {
    "distill": "a few synthetic images a class with soft labels (CDA and beyond)",
    "prune": "the samples that are worth keeping: scores, duplicates, a selection",
    "compress-features": "what a classifier needs of an image in a hundred bytes, for any tail",
    "compress-model": "a classifier in few bytes: its weights as low-rank codes",
    "codebook": "k-means centres of patch features, for tokenizers with very many codes",
    "tokenize": "tokens of all images, packed, in a store for generators",
    "train-tokenizer": "an image tokenizer: few tokens an image, as many as it needs",
}
FLAGS = {
    "ipc": "ipc",
    "preset": "preset",
    "label_budget": "relabel.budget",
    "teacher_weights": "teacher.weights",
    "teacher_backbone": "teacher.backbone",
    "format": "format",
    "shard_mb": "shard_mb",
    "encode": "encode",
    "quality": "quality",
    "shorter": "shorter",
    "score": "score",
    "keep": "keep",
    "selector": "selector",
    "dedup": "dedup",
    "backbone": "proxy.backbone",
    "weights": "proxy.weights",
    "materialize": "materialize",
    "tokenizer": "tokenizer",
    "codebook": "codebook",
    "features": "features.network",
    "features_weights": "features.weights",
    "encoder": "encoder",
    "beta": "beta",
    "budget": "budget",
    "k": "code.k",
    "m": "code.m",
    "d_tilde": "code.d",
    "views": "views",
    "size": "size",
    "tokens": "tokens",
    "mean_bytes": "mean_bytes",
    "min_psnr": "min_psnr",
}
"""Options that are short for a ``--set``, by the setting they stand for."""


def make_parser() -> argparse.ArgumentParser:
    """The command line, with every option it knows."""
    parser = argparse.ArgumentParser(
        prog="pipeline",
        description="Make image data sets smaller: fewer samples, fewer tokens, fewer bytes.",
    )
    parser.add_argument("--version", action="version", version=f"pipeline {__version__}")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND")
    run = verbs.add_parser("run", help="run a recipe on a data set")
    named = run.add_subparsers(title="recipes", metavar="RECIPE", required=True)
    for name, summary in RECIPES.items():
        recipe = named.add_parser(name, help=summary, description=summary)
        OWN_OPTIONS[name](recipe)
        _recipe_options(recipe, name, "run")
    summary = "write a data set in another format"
    convert = verbs.add_parser("convert", help=summary, description=summary)
    _convert_options(convert)
    _recipe_options(convert, "convert", "run")
    plan = verbs.add_parser("plan", help="show what a run would do, and do nothing")
    planned = plan.add_subparsers(title="recipes", metavar="RECIPE", required=True)
    for name, about in {**RECIPES, "convert": summary}.items():
        recipe = planned.add_parser(name, help=about, description=f"Plan: {about}")
        OWN_OPTIONS[name](recipe)
        _recipe_options(recipe, name, "plan")
    planned.choices["distill"].add_argument(
        "--gpu", metavar="NAME", help="tell hours for this GPU, such as a100; for what is here else"
    )
    _output_commands(verbs)
    _export_commands(verbs)
    _schedule_commands(verbs)
    return parser


def _distill_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="DATASET", help="a known name, a path or a URL")
    settings = parser.add_argument_group("recipe")
    settings.add_argument("--ipc", type=int, help="synthetic images per class")
    settings.add_argument(
        "--preset", metavar="NAME", help="best (default), or cda or sre2l, as they were published"
    )
    settings.add_argument(
        "--label-budget", metavar="BYTES", help="most that all soft labels may take, such as 100MB"
    )
    settings.add_argument(
        "--teacher-weights",
        metavar="FILE",
        help="a teacher's .safetensors, .npz or .pth, or 'pretrained'",
    )
    settings.add_argument("--teacher-backbone", metavar="NAME", help="the teacher's network")
    parser.add_argument("--out", metavar="PATH", help="output folder, or its URL")


def _prune_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="DATASET", help="a known name, a path or a URL")
    settings = parser.add_argument_group("recipe")
    settings.add_argument(
        "--score",
        metavar="NAME",
        help="how hard a sample is: el2n (default where there are labels), grand, forgetting, aum, "
        "tdds, margin, entropy, least-confidence, prototypes (default where there are none), "
        "supervised-prototypes or moderate",
    )
    settings.add_argument(
        "--keep",
        metavar="N",
        help="a share (0.7, 70%%), a count, or bytes (2GB); 'auto' is --selector auto",
    )
    settings.add_argument(
        "--selector",
        metavar="NAME",
        help="auto (default: hard or easy, as two pilot runs say), hard, easy, band, ccs, d2, "
        "herding, k-center or random",
    )
    settings.add_argument(
        "--dedup",
        action="append",
        choices=["exact", "near", "semantic"],
        help="leave out duplicates first; repeatable",
    )
    settings.add_argument("--backbone", metavar="NAME", help="the network that scores and embeds")
    settings.add_argument(
        "--weights", metavar="FILE", help="its .safetensors or .npz, or 'pretrained'"
    )
    settings.add_argument(
        "--materialize", metavar="FORMAT", help="also write what is kept: webdataset, parquet, ..."
    )
    parser.add_argument("--out", metavar="PATH", help="output folder, or its URL")


def _train_tokenizer_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="DATASET", help="a known name, a path or a URL")
    settings = parser.add_argument_group("recipe")
    settings.add_argument(
        "--preset",
        metavar="NAME",
        help="tiny (default), tiny-grid, instella-1024, one-d-piece-b-256, detailflow-128 or "
        "vqgan-lc-f16",
    )
    settings.add_argument(
        "--codebook", metavar="PATH", help="output of codebook, or a file: codes that stay frozen"
    )
    parser.add_argument("--out", metavar="PATH", help="output folder, or its URL")


def _compress_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="DATASET", help="a known name, a path or a URL")
    settings = parser.add_argument_group("recipe")
    settings.add_argument(
        "--preset",
        metavar="NAME",
        help="small (default), resnet18-29x, resnet18-43x, resnet50-19x or resnet50-31x",
    )
    settings.add_argument(
        "--teacher-weights", metavar="FILE", help="the network's .safetensors or .npz"
    )
    settings.add_argument("--teacher-backbone", metavar="NAME", help="the network")
    settings.add_argument("--k", type=int, help="codes of a layer (256)")
    settings.add_argument("--m", type=int, help="numbers of a sub-vector (8)")
    settings.add_argument("--d-tilde", metavar="D", help="numbers of a code, or auto (default)")
    parser.add_argument("--out", metavar="PATH", help="output folder, or its URL")


def _features_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="DATASET", help="a known name, a path or a URL")
    settings = parser.add_argument_group("recipe")
    settings.add_argument("--preset", metavar="NAME", help="small (default) or resnet50")
    settings.add_argument(
        "--teacher-weights", metavar="FILE", help="the network's .safetensors or .npz"
    )
    settings.add_argument("--teacher-backbone", metavar="NAME", help="the network")
    settings.add_argument(
        "--encoder", metavar="PATH", help="output of an earlier run, to which a tail is added"
    )
    settings.add_argument("--beta", type=float, help="weight of a bit: larger makes fewer bytes")
    settings.add_argument("--budget", type=int, metavar="BYTES", help="that no image may exceed")
    settings.add_argument("--format", help="parquet (default) or zarr")
    parser.add_argument("--out", metavar="PATH", help="output folder, or its URL")


def _codebook_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="DATASET", help="a known name, a path or a URL")
    settings = parser.add_argument_group("recipe")
    settings.add_argument("--size", type=int, metavar="K", help="codes (10,000)")
    settings.add_argument(
        "--features", metavar="NAME", help="pixels (default), or a network by its name"
    )
    settings.add_argument(
        "--features-weights", metavar="FILE", help="the network's .safetensors or .npz"
    )
    parser.add_argument("--out", metavar="PATH", help="output folder, or its URL")


def _tokenize_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="DATASET", help="a known name, a path or a URL")
    settings = parser.add_argument_group("recipe")
    settings.add_argument(
        "--tokenizer", metavar="PATH", help="output of train-tokenizer, or an exported folder"
    )
    settings.add_argument("--views", choices=["center", "10crop"], help="of an image (center)")
    settings.add_argument("--size", type=int, metavar="PIXELS", help="side of a view")
    rule = settings.add_mutually_exclusive_group()
    rule.add_argument("--tokens", type=int, metavar="N", help="so many of every image (all)")
    rule.add_argument(
        "--mean-bytes", type=float, metavar="N", help="mean of an image, spent where it helps most"
    )
    rule.add_argument(
        "--min-psnr", type=float, metavar="DB", help="of every image, with as few as reach it"
    )
    settings.add_argument("--format", help="zarr (default), parquet or webdataset")
    parser.add_argument("--out", metavar="PATH", help="output folder, or its URL")


def _convert_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="a known name, a path or a URL")
    parser.add_argument("out", metavar="DST", help="output folder, or its URL")
    settings = parser.add_argument_group("format")
    settings.add_argument("--format", help="webdataset (default), parquet, zarr or folder")
    settings.add_argument("--shard-mb", type=int, metavar="MB", help="size of a shard (256)")
    settings.add_argument(
        "--encode", metavar="KIND", help="keep (default), png, jpeg, webp or webp-lossless"
    )
    settings.add_argument("--quality", type=int, help="of jpeg and webp (90)")
    settings.add_argument(
        "--shorter", type=int, metavar="PIXELS", help="scale larger images to this shorter side"
    )


OWN_OPTIONS = {
    "distill": _distill_options,
    "prune": _prune_options,
    "compress-features": _features_options,
    "compress-model": _compress_options,
    "codebook": _codebook_options,
    "tokenize": _tokenize_options,
    "train-tokenizer": _train_tokenizer_options,
    "convert": _convert_options,
}


def _recipe_options(parser: argparse.ArgumentParser, recipe: str, command: str) -> None:
    settings = parser.add_argument_group("settings")
    settings.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B=VALUE",
        help="set any value that --print-config shows",
    )
    settings.add_argument("--config", type=Path, metavar="FILE", help="a YAML file of settings")
    settings.add_argument(
        "--print-config", action="store_true", help="print every setting as YAML and stop"
    )
    _data_option(parser)
    parser.add_argument(
        "--selection", metavar="RUN", help="use only the samples that a run of 'prune' kept"
    )
    _json_option(parser)
    how = parser.add_argument_group("execution")
    how.add_argument("--executor", choices=["local", "ray"], default="local")
    how.add_argument("--address", metavar="URL", help="Ray cluster to join")
    how.add_argument("--workers", type=int, metavar="N", help="Ray workers at a time")
    how.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads a worker")
    how.add_argument(
        "--resources",
        action="append",
        default=[],
        metavar="STEP.NAME=VALUE",
        help="threads, gpus, memory (bytes) or workers of one step, such as labels.gpus=0.5",
    )
    how.add_argument(
        "--checkpoint-minutes",
        type=float,
        default=10.0,
        metavar="N",
        help="while training or synthesising (10)",
    )
    how.add_argument("--seed", type=int, default=0)
    how.add_argument(
        "--max-bad",
        type=_share_or_count,
        default=0.01,
        metavar="N",
        help="unusable samples above which the run fails: a count, or a share such as 1%%",
    )
    _verbose_option(parser)
    parser.set_defaults(command=command, recipe=recipe)


def _output_commands(verbs: Any) -> None:
    def add(name: str, summary: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = verbs.add_parser(name, help=summary, description=summary)
        parser.set_defaults(command="act", name=name)
        return parser

    look = add("inspect", "show what a data set or an output holds")
    look.add_argument("path", metavar="PATH", help="a known name, a path or a URL")
    look.add_argument("--all", action="store_true", help="read every shard, to count classes")
    look.add_argument("--sheet", type=Path, metavar="FILE", help="write a contact sheet, PNG")
    _data_option(look)
    compare = add("diff", "compare two data sets sample by sample")
    compare.add_argument("a", metavar="A")
    compare.add_argument("b", metavar="B")
    _data_option(compare)
    check = add("verify", "check an output against its manifests")
    check.add_argument("path", metavar="PATH", help="output folder of a run, or its URL")
    depth = check.add_mutually_exclusive_group()
    depth.add_argument("--deep", action="store_true", help="read every file")
    depth.add_argument(
        "--subset", type=_share, default=0.0, metavar="5%", help="read a share of files at random"
    )
    repair = add("repair", "set damaged files of an output aside and make them anew")
    repair.add_argument("path", metavar="RUN", help="output folder of a run, or its URL")
    retry = add("retry", "take samples up from quarantine, with the run's own settings")
    retry.add_argument("path", metavar="RUN", help="output folder of a run, or its URL")
    retry.add_argument(
        "--reason", action="append", default=[], help="only those with this reason; repeatable"
    )
    gc = add("gc", "find files in an output folder that nobody needs")
    gc.add_argument("path", metavar="RUN", help="output folder of a run, or its URL")
    gc.add_argument("--delete", action="store_true", help="delete them; without it only say which")
    gc.add_argument(
        "--snapshots", action="store_true", help="also earlier snapshots of what was published"
    )
    gc.add_argument("--intermediate", action="store_true", help="also steps that are not products")
    progress = add("status", "show how far a run is, whether it works or was killed")
    progress.add_argument("path", metavar="RUN", help="output folder of a run, or its URL")
    progress.add_argument("--watch", action="store_true", help="go on until it ends")
    logs = add("logs", "show what a run has told, in all its starts")
    logs.add_argument("path", metavar="RUN", help="output folder of a run, or its URL")
    stop = add("cancel", "stop a run, on whatever machine; the same command goes on later")
    stop.add_argument("path", metavar="RUN", help="output folder of a run, or its URL")
    for parser in (look, compare, check, repair, retry, gc, progress, logs, stop):
        _json_option(parser)
    for parser in (repair, retry):
        _verbose_option(parser)


def _export_commands(verbs: Any) -> None:
    summary = "write tokenizers or tokens for other programs"
    export = verbs.add_parser("export", help=summary, description=summary)
    kinds = export.add_subparsers(title="what", metavar="WHAT", required=True)

    def add(name: str, summary: str, path: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = kinds.add_parser(name, help=summary, description=summary)
        parser.set_defaults(command="export", what=name)
        parser.add_argument("path", metavar="PATH", help=path)
        parser.add_argument("--out", required=True, metavar="DIR", help="a new folder")
        _json_option(parser)
        return parser

    network = add("tokenizer", "a tokenizer, checked", "output of a run of 'train-tokenizer'")
    network.add_argument(
        "--format",
        choices=["hf", "onnx", "pt2"],
        default="hf",
        help="a Hugging Face folder (default), ONNX, or torch.export",
    )
    tokens = add("tokens", "tokens as other trainers read them", "output of a run of 'tokenize'")
    tokens.add_argument(
        "--format",
        choices=["llamagen", "titok"],
        required=True,
        help="a .npy an image, or a line of JSON a view",
    )
    tokens.add_argument("--split", choices=["train", "test"], default="train")


def _schedule_commands(verbs: Any) -> None:
    summary = "run commands at given times"
    schedule = verbs.add_parser("schedule", help=summary, description=summary)
    actions = schedule.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, summary: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = actions.add_parser(
            name, help=summary, description=summary
        )
        parser.set_defaults(command="schedule", name=None, action=name)
        parser.add_argument(
            "--file", default="schedules.yaml", metavar="FILE", help="the schedules (%(default)s)"
        )
        _json_option(parser)
        return parser

    new = add("add", "write a schedule into the file; what is in it stays, comments too")
    new.add_argument("name", metavar="NAME", help="small letters, digits and hyphens")
    new.add_argument("--cron", required=True, metavar="EXPR", help="such as '30 2 * * *'")
    new.add_argument("--run", required=True, metavar="WORDS", help="such as 'verify out --deep'")
    new.add_argument("--timezone", default="UTC", metavar="ZONE", help="such as Europe/Berlin")
    new.add_argument("--start", type=_time, metavar="TIME", help="due only after this (now)")
    new.add_argument("--missed", choices=["skip", "run-once", "run-all"], default="run-once")
    new.add_argument("--overlap", choices=["forbid", "replace", "allow"], default="forbid")
    new.add_argument("--deadline", metavar="6h", help="how late a run may start (any time)")
    new.add_argument("--replace", action="store_true", help="put it in place of one of this name")
    gone = add("remove", "take a schedule out of the file; its records are kept")
    gone.add_argument("name", metavar="NAME")
    add("list", "show schedules, when they are due and how they last ended")
    tick = add("tick", "run what is due now, once; a second tick does nothing")
    tick.add_argument("--only", metavar="NAME", help="this schedule alone")
    tick.add_argument("--now", type=_time, metavar="TIME", help="take this for the present time")
    tick.add_argument("--dry-run", action="store_true", help="only say what would run, and why")
    add("serve", "tick whenever something is due, until stopped")
    give = add("export", "print schedules for another scheduler")
    give.add_argument("name", nargs="?", metavar="NAME", help="this schedule alone")
    give.add_argument(
        "--to", required=True, choices=["systemd", "cron", "k8s", "raycron", "airflow"]
    )
    give.add_argument("--image", help="container image with 'pipeline', for k8s and raycron")
    give.add_argument("--out", metavar="DIR", help="write files here instead")


def _data_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        default=os.environ.get("PIPELINE_DATA"),
        metavar="PATH",
        help="where named data sets lie (default: $PIPELINE_DATA)",
    )


def _verbose_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="also what Ray and torch have to say"
    )


def _json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _share(text: str) -> float:
    value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no share; write 5% or 0.05")
    return value


def _share_or_count(text: str) -> float | int:
    return int(text) if text.isdecimal() else _share(text)


def _time(text: str) -> datetime:
    value = datetime.fromisoformat(text)
    if value.tzinfo is None:
        raise argparse.ArgumentTypeError(f"'{text}' lacks its offset; write 2026-03-29T02:30+01:00")
    return value
