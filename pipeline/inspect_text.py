"""What :func:`pipeline.inspect.inspect` found, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.inspect import NAMES
from pipeline.terminal import flat, grid, human, printable, tallied


def as_text(summary: Mapping[str, Any]) -> str:
    """What :func:`inspect` found, for a terminal; control characters are escaped."""
    lines = [f"{summary['name']}  {summary['place']}"]
    if info := summary.get("info"):
        lines.append(f"{info['title']}; {info['origin']}")
    if output := summary.get("output"):
        lines += _output_lines(output)
    for name, split in summary["splits"].items():
        lines += ["", *_split_lines(name, split)]
    if sheet := summary.get("sheet"):
        text = f"{sheet['images']} images in {sheet['path']}"
        lines += ["", f"sheet: {text if sheet['path'] else 'no image can be read'}"]
    return "\n".join(map(printable, lines))


def _output_lines(output: Mapping[str, Any]) -> list[str]:
    lines = [f"{name}: {output[name]}" for name in ("kind", "dataset", "seed") if name in output]
    if output.get("config"):
        rows = [[name, str(value)] for name, value in flat(output["config"]).items()]
        lines += ["", "configuration", *grid(rows)]
    roles = {folder: role for role, folder in output["products"].items()}
    header = ["step", "product", "shards", "size", "in", "out", "filtered", "quarantined"]
    rows = [_step_cells(step, roles) for step in output["steps"]]
    lines += ["", "steps", *(grid([header, *rows]))]
    if layers := output.get("layers"):
        lines += ["", "coded layers", *_layer_lines(layers)]
    if earlier := output.get("snapshots"):
        lines += ["", "earlier snapshots", *(f"  {place}" for place in earlier)]
    for step in output["steps"]:
        if step.get("metrics"):
            metrics = [[name, _number(value)] for name, value in flat(step["metrics"]).items()]
            lines += ["", f"metrics of {step['step']}", *grid(metrics)]
    return lines


def _layer_lines(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Bytes and errors of the layers of a compressed network."""
    header = ["layer", "weight", "m", "k", "d", "size", "times less", "low rank", "clustering"]
    rows = [
        [
            layer["name"],
            " x ".join(map(str, layer["shape"])),
            *(str(layer[name]) for name in ("m", "k", "d")),
            human(round(layer["bytes"])),
            f"{layer['ratio']:.1f}",
            *(f"{100 * layer[name]:.1f}%" for name in ("low_rank", "clustering")),
        ]
        for layer in layers
    ]
    return grid([header, *rows])


def _step_cells(step: Mapping[str, Any], roles: Mapping[str, str]) -> list[str]:
    role = roles.get(step["folder"], "")
    if "problem" in step:
        return [step["folder"], role, step["problem"], *[""] * 5]
    cells = [step["folder"], role, f"{step['shards']:,}", human(step["bytes"])]
    if step["kind"] != "table":
        return [*cells, *[""] * 4]
    sides = (tallied(step[side]) or "0" for side in ("filtered", "quarantined"))
    return [*cells, f"{step['in']:,}", f"{step['out']:,}", *sides]


def _split_lines(name: str, split: Mapping[str, Any]) -> list[str]:
    rows = "unknown until read" if split["rows"] is None else f"{split['rows']:,}"
    size = "" if split["bytes"] is None else f", {human(split['bytes'])}"
    lines = [f"{name}: {split['source']}; shards: {split['shards']:,}; samples: {rows}{size}"]
    classes = split["classes"]
    if classes["count"]:
        more = ", ..." if classes["count"] > len(classes["names"]) else ""
        lines.append(f"  {classes['count']:,} classes: {', '.join(classes['names'])}{more}")
    else:
        lines.append("  no classes")
    lines += grid([[f"{column}:", kind] for column, kind in split["schema"].items()])
    lines += [_sample_line(sample) for sample in split["samples"]]
    lines += [f"  ! {': '.join(problem.values())}" for problem in split["problems"]]
    return lines + _total_lines(split["all"]) if "all" in split else lines


def _sample_line(sample: Mapping[str, Any]) -> str:
    parts = [str(sample["key"])] if "key" in sample else []
    if "label" in sample:
        name = "" if sample["class"] is None else f" ({sample['class']})"
        parts.append(f"label {sample['label']}{name}")
    if image := sample.get("image"):
        size = f" {image['width']} x {image['height']}" if "width" in image else ""
        parts.append(f"{image['kind']}{size}, {human(image['bytes'])}")
    parts += [f"{name} {value}" for name, value in sample.get("other", {}).items()]
    if "problem" in sample:
        parts.append(f"! {sample['problem']}")
    return "  - " + "; ".join(parts)


def _total_lines(totals: Mapping[str, Any]) -> list[str]:
    bad = tallied(totals["bad"]) or "none"
    taken = f"with the key of an earlier one: {totals['repeated_keys']:,}"
    lines = [f"  all {totals['rows']:,} samples read; bad: {bad}; {taken}"]
    if totals["kinds"]:
        lines.append(f"  images: {tallied(totals['kinds'])}; {human(totals['image_bytes'])}")
    if sizes := totals["sizes"]:
        spans = [f"{side} {_span(sizes[side])}" for side in ("width", "height")]
        common = [f"{w} x {h}: {count:,}" for w, h, count in sizes["most_frequent"]]
        more = ", ..." if sizes["distinct"] > len(common) else ""
        lines.append(f"  {', '.join(spans)}; {', '.join(common)}{more}")
    if by_class := totals["by_class"]:
        spans = [f"{name} {by_class[name]:,}" for name in ("min", "median", "max")]
        lines += [f"  samples of a class: {', '.join(spans)}", *_class_lines(by_class["rows"])]
    return lines


def _class_lines(rows: Sequence[Sequence[Any]]) -> list[str]:
    """The classes; where they are many, those with the most and the fewest samples."""
    ranked = sorted(rows, key=lambda row: -row[1])
    shown = rows if len(rows) <= 2 * NAMES else [*ranked[:NAMES], ["...", None], *ranked[-NAMES:]]
    cells = [[str(name), "" if count is None else f"{count:,}"] for name, count in shown]
    return [f"  {line}" for line in grid(cells)]


def _span(ends: Sequence[int]) -> str:
    low, high = ends
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
