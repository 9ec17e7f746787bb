"""Figures that a benchmark is asked for, and whether they were met."""

from __future__ import annotations

import json
from typing import Any

targets: list[dict[str, Any]] = []


def target(name: str, wanted: float, measured: float, *, most: bool = False) -> None:
    """Note a figure, and print it; with ``most`` it is to be no more than what is wanted."""
    met = measured <= wanted if most else measured >= wanted
    targets.append({"name": name, "target": wanted, "measured": measured, "met": bool(met)})
    print(f"  -> {name}: {measured:.4g}, target {wanted:g}, {'met' if met else 'missed'}")


def last_line() -> None:
    """Print all of them as the line of JSON that ends a benchmark."""
    print(json.dumps({"targets": targets}))
