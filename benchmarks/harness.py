"""What benchmarks share: their options, their parts, and the figures that they are asked for."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

targets: list[dict[str, Any]] = []


def make_parser(
    doc: str | None, quick: str, parts: Collection[str] = (), *, runs: bool = False
) -> argparse.ArgumentParser:
    """A parser with the options that all have.

    Args:
        doc: of the benchmark; its first line describes it.
        quick: what ``--quick`` leaves out.
        parts: names for ``--only``.
        runs: whether there are runs that ``--out`` can keep.
    """
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    data = {"type": lambda path: Path(path).absolute(), "default": os.environ.get("PIPELINE_DATA")}
    parser.add_argument("--data", **data, help="folder of real data")
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", action="store_true", help="end with a line of JSON")
    if parts:
        parser.add_argument("--only", choices=parts, action="append", help="all unless given")
    if runs:
        parser.add_argument("--out", type=Path, help="folder of runs; finished ones are found")
    return parser


def need_data(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with a message where there is no real data and it is not to be quick."""
    if options.data is None and not options.quick:
        parser.error("there is no real data: give --data, or set PIPELINE_DATA")


def run_parts(
    parts: Mapping[str, Callable[[argparse.Namespace], None]], options: argparse.Namespace
) -> None:
    """The parts that were asked for, and then the line that ends a benchmark."""
    with tempfile.TemporaryDirectory() as folder:
        if "out" in options:
            options.out = options.out or Path(folder)
        for name in options.only or parts:
            parts[name](options)
    if options.json:
        last_line()


def target(name: str, wanted: float, measured: float, *, most: bool = False) -> None:
    """Note a figure, and print it; with ``most`` it is to be no more than what is wanted."""
    met = measured <= wanted if most else measured >= wanted
    targets.append({"name": name, "target": wanted, "measured": measured, "met": bool(met)})
    print(f"  -> {name}: {measured:.4g}, target {wanted:g}, {'met' if met else 'missed'}")


def last_line() -> None:
    """Print all figures as the line of JSON that ends a benchmark."""
    print(json.dumps({"targets": targets}))
