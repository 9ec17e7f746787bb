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
        _recipe_options(named.add_parser(name, help=summary, description=summary), name)
    return parser


def _recipe_options(parser: argparse.ArgumentParser, recipe: str) -> None:
    parser.add_argument("dataset", metavar="DATASET", help="a known name, or a path")
    settings = parser.add_argument_group("settings")
    settings.add_argument("--ipc", type=int, help="synthetic images per class")
    settings.add_argument(
        "--teacher-weights",
        metavar="FILE",
        help="a teacher's .safetensors or .npz, or 'pretrained'",
    )
    settings.add_argument("--teacher-backbone", metavar="NAME", help="the teacher's network")
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
    where = parser.add_argument_group("input and output")
    where.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("PIPELINE_DATA"),
        metavar="PATH",
        help="where named data sets lie (default: $PIPELINE_DATA)",
    )
    where.add_argument("--out", type=Path, metavar="PATH", help="output folder")
    where.add_argument("--json", action="store_true", help="print the result as JSON")
    how = parser.add_argument_group("execution")
    how.add_argument("--executor", choices=["local", "ray"], default="local")
    how.add_argument("--address", metavar="URL", help="Ray cluster to join")
    how.add_argument("--workers", type=int, metavar="N", help="Ray workers at a time")
    how.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads a worker")
    how.add_argument("--seed", type=int, default=0)
    how.add_argument(
        "--max-bad",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="share of unreadable samples above which the run fails",
    )
    parser.set_defaults(command=_run, recipe=recipe)


def _run(arguments: argparse.Namespace) -> int:
    from pipeline.api import configure, run
    from pipeline.config import dump_yaml, merge, parse_assignments, read_yaml

    values = read_yaml(arguments.config) if arguments.config else {}
    short = [
        f"{path}={json.dumps(given)}"
        for flag, path in FLAGS.items()
        if (given := getattr(arguments, flag)) is not None
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
    print(json.dumps(summary, indent=2) if arguments.json else _readable(summary))
    return 0


def _log() -> None:
    logging.basicConfig(
        level=logging.WARNING,
        stream=sys.stderr,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
    )
    logging.getLogger("pipeline").setLevel(logging.INFO)


def _readable(summary: dict[str, Any]) -> str:
    lines = []
    if rows := summary.get("evaluation"):
        lines.append(f"{'trained on':<34}{'images':>8}{'accuracy, %':>13}")
        for row in rows:
            spread = f" +- {row['spread']:.2f} ({row['seeds']} seeds)" if row["seeds"] > 1 else ""
            count = "" if row["images"] is None else row["images"]
            lines.append(f"{row['trained_on']:<34}{count:>8}{row['accuracy']:>13.2f}{spread}")
        lines.append("")
    lines += [f"{name + ':':<8} {summary[name]}" for name in ("images", "labels", "report")]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
