"""The command ``pipeline``. Imports nothing heavy before it knows what to do."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline import __version__
from pipeline.errors import PipelineError

RECIPES = {"distill": "a few synthetic images a class with soft labels (CDA)"}
FLAGS = {
    "ipc": "ipc",
    "teacher_weights": "teacher.weights",
    "teacher_backbone": "teacher.backbone",
    "format": "format",
    "shard_mb": "shard_mb",
    "encode": "encode",
    "quality": "quality",
    "shorter": "shorter",
}
"""Options that are short for a ``--set``, by the setting they stand for."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 1 run failed, 2 usage."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    if not hasattr(arguments, "command"):
        parser.print_help()
        return 0
    try:
        return int(arguments.command(arguments))
    except PipelineError as error:
        print(f"pipeline: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        from pipeline.storage.store import storage_error

        print(f"pipeline: {storage_error(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("pipeline: stopped. The same command goes on from here.", file=sys.stderr)
        return 130


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
        _distill_options(recipe)
        _recipe_options(recipe, name)
    convert = verbs.add_parser("convert", help="write a data set in another format")
    _convert_options(convert)
    _recipe_options(convert, "convert")
    _output_commands(verbs)
    return parser


def _distill_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", metavar="DATASET", help="a known name, a path or a URL")
    settings = parser.add_argument_group("recipe")
    settings.add_argument("--ipc", type=int, help="synthetic images per class")
    settings.add_argument(
        "--teacher-weights",
        metavar="FILE",
        help="a teacher's .safetensors or .npz, or 'pretrained'",
    )
    settings.add_argument("--teacher-backbone", metavar="NAME", help="the teacher's network")
    parser.add_argument("--out", metavar="PATH", help="output folder, or its URL")


def _convert_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", metavar="SRC", help="a known name, a path or a URL")
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


def _recipe_options(parser: argparse.ArgumentParser, recipe: str) -> None:
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
    _json_option(parser)
    how = parser.add_argument_group("execution")
    how.add_argument("--executor", choices=["local", "ray"], default="local")
    how.add_argument("--address", metavar="URL", help="Ray cluster to join")
    how.add_argument("--workers", type=int, metavar="N", help="Ray workers at a time")
    how.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads a worker")
    how.add_argument("--seed", type=int, default=0)
    how.add_argument(
        "--max-bad",
        type=_share_or_count,
        default=0.01,
        metavar="N",
        help="unusable samples above which the run fails: a count, or a share such as 1%%",
    )
    parser.set_defaults(command=_run, recipe=recipe)


def _output_commands(verbs: Any) -> None:
    def add(name: str, summary: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = verbs.add_parser(name, help=summary, description=summary)
        parser.set_defaults(command=_command, name=name)
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
    gc.add_argument("--intermediate", action="store_true", help="also steps that are not products")
    for parser in (look, compare, check, repair, retry, gc):
        _json_option(parser)


def _data_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        default=os.environ.get("PIPELINE_DATA"),
        metavar="PATH",
        help="where named data sets lie (default: $PIPELINE_DATA)",
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


def _run(arguments: argparse.Namespace) -> int:
    from pipeline.api import configure, run
    from pipeline.commands import readable
    from pipeline.config import dump_yaml, merge, parse_assignments, read_yaml

    values = read_yaml(arguments.config) if arguments.config else {}
    short = [
        f"{path}={json.dumps(given)}"
        for flag, path in FLAGS.items()
        if (given := getattr(arguments, flag, None)) is not None
    ]
    values = merge(values, parse_assignments([*arguments.set, *short]))
    if arguments.print_config:
        print(dump_yaml(configure(arguments.recipe, arguments.dataset, arguments.data, values)))
        return 0
    _log()
    summary = run(
        arguments.recipe,
        arguments.dataset,
        data=arguments.data,
        out=arguments.out,
        config=values,
        executor=arguments.executor,
        address=arguments.address,
        workers=arguments.workers,
        threads=arguments.threads,
        seed=arguments.seed,
        max_bad=arguments.max_bad,
    )
    print(json.dumps(summary, indent=2) if arguments.json else readable(summary))
    return 0


def _command(arguments: argparse.Namespace) -> int:
    from pipeline import commands

    _log()
    code, summary, text = getattr(commands, f"run_{arguments.name}")(arguments)
    print(json.dumps(summary, indent=2) if arguments.json else text)
    return int(code)


def _log() -> None:
    logging.basicConfig(
        level=logging.WARNING,
        stream=sys.stderr,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
    )
    logging.getLogger("pipeline").setLevel(logging.INFO)


if __name__ == "__main__":
    sys.exit(main())
