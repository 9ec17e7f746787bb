"""Runs on a terminal: what they would do, how far they are, what they gave."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from pipeline.orchestration.progress import clock
from pipeline.orchestration.status import Status
from pipeline.terminal import grid, human, printable


def plan_text(summary: dict[str, Any], options: Namespace) -> str:
    """What a run would do, for a terminal."""
    rows = [("step", "shards", "finished", "taken over", "to do", "to read", "where")]
    for step in summary["steps"]:
        size = "" if step["bytes"] is None else human(step["bytes"])
        figures = [f"{step[name]:,}" for name in ("shards", "finished", "adopted", "missing")]
        where = _where(step, options) if step["missing"] else ""
        rows.append((step["step"], *figures, size, where))
    lines = estimate_lines(summary["estimate"]) if "estimate" in summary else []
    lines += grid(rows)
    if summary["until"]:
        lines.append(f"What comes then depends on what '{summary['until']}' gives.")
    if not summary["todo"]:
        lines.append("There is nothing to do.")
    return "\n".join(lines)


def estimate_lines(found: dict[str, Any]) -> list[str]:
    """What a distillation would cost."""
    flops, hours, labels = found["flops"], found["hours"], found["labels"]
    stored = f"{labels['views']:,} views of each image as {labels['codec']}, at most "
    lines = [
        (
            f"images: {found['images']:,} in {found['units']:,} units of up to {found['batch']:,}, "
            f"{found['iterations']:,} iterations each; about {human(found['image_bytes'])} as PNG"
        ),
        f"labels: {stored}{human(found['label_bytes'])}"
        if labels["views"]
        else "labels: none are stored, the teachers are asked",
        f"speed:  {found['flops_a_second'] / 1e12:,.3g} TFLOP/s, {found['calibration']}",
    ]
    rows = [("step", "FLOP", "hours")]
    rows += [(name, f"{flops[name]:.3g}", f"{hours[name]:,.2f}") for name in flops]
    rows.append(("all", f"{sum(flops.values()):.3g}", f"{sum(hours.values()):,.2f}"))
    lines += grid(rows)
    if "teacher" not in flops:
        lines.append("How many samples a teacher would be trained on is not known yet.")
    return lines


def _where(step: dict[str, Any], options: Namespace) -> str:
    """Which process does what: all stages of a step are done in one."""
    needs = step["resources"]
    chain = " > ".join(step["stages"])
    threads = f"{needs['threads']} thread{'s' * (needs['threads'] > 1)}"
    if options.executor == "local":
        return f"{chain}, in this process, {threads}"
    gpus, network = needs["gpus"], step["model"]
    kind = f"actors, {gpus:g} GPU" if gpus else "tasks"
    if gpus is None and network:
        kind = "actors, 1 GPU, or tasks where there is none"
    most = needs["workers"] or options.workers
    return f"{chain}, in one process: Ray {kind}, {threads}" + (
        f", {most} at a time" if most else ""
    )


def status_text(found: Status) -> str:
    """How far a run is."""
    lines = [f"{found.state}: {found.holder}" if found.holder else found.state]
    rows = [("step", "state", "shards", "samples", "out", "bad", "samples/s", "ETA")]
    for step in found.steps:
        counts = step.totals.counts
        rows.append(
            (
                step.step,
                step.state,
                f"{step.done:,} of {step.shards:,}",
                f"{counts['in']:,}",
                f"{counts['out']:,}",
                f"{sum(counts['quarantined'].values()):,}",
                f"{step.rate:,.0f}" if step.rate else "",
                clock(step.eta) if step.eta else "",
            )
        )
    lines += grid(rows)
    for step in found.steps:
        lines += [f"failed: {step.step}: {name}: {what}" for name, what in step.failed.items()]
    return "\n".join(map(printable, lines))


def _code_lines(summary: dict[str, Any]) -> list[str]:
    """What codes of a network, of a codebook or of features came to."""
    lines = []
    size = summary.get("bytes", {})
    if "mean" in size:
        hits = summary["accuracy"]
        lines.append(
            f"{size['mean']:.1f} bytes an image (99 in 100 have {size['p99']:.0f} at most); "
            f"accuracy {hits['tail']:.2f}%, of whole images {hits['teacher']:.2f}%"
        )
    elif size:
        before, after = (summary["accuracy"][name] for name in ("teacher", "compressed"))
        lines.append(
            f"{size['file']:,} bytes, {size['ratio']:.1f} times less; accuracy {after:.2f}%, "
            f"before {before:.2f}%"
        )
    if codes := summary.get("codes"):
        lines.append(
            f"{codes['size']:,} codes of {codes['features']:,} features, "
            f"{100 * codes['used']:.2f}% in use, perplexity {codes['perplexity']:,.0f}"
        )
    return lines


def summary_text(summary: dict[str, Any]) -> str:
    """What a recipe gave, for a terminal."""
    lines = []
    if rows := summary.get("evaluation"):
        lines.append(f"{'trained on':<34}{'images':>8}{'accuracy, %':>13}")
        for row in rows:
            spread = f" +- {row['spread']:.2f} ({row['seeds']} seeds)" if row["seeds"] > 1 else ""
            count = "" if row["images"] is None else row["images"]
            lines.append(f"{row['trained_on']:<34}{count:>8}{row['accuracy']:>13.2f}{spread}")
        lines.append("")
    if metrics := summary.get("metrics"):
        known = {name.upper(): value for name, value in metrics.items() if value is not None}
        lines += [f"{name}: {value:+.1f} points" for name, value in known.items()]
    for name in ("train", "test"):
        if split := summary.get(name):
            bad = sum(split["quarantined"].values())
            lines.append(
                f"{name + ':':<8} {split['out']:,} of {split['in']:,} samples in "
                f"{split['shards']:,} shards" + (f", {bad:,} in quarantine" if bad else "")
            )
            lines.append(f"{'':<8} {split['path']}")
    if counts := summary.get("counts"):
        left_out = [f"{n:,} {kind} duplicates" for kind, n in counts["duplicates"].items()]
        share = 100 * counts["kept"] / counts["samples"]
        lines.append(
            f"{'kept:':<12} {counts['kept']:,} of {counts['samples']:,} samples ({share:.1f}%), "
            f"{human(counts['bytes_kept'])} of {human(counts['bytes'])}"
        )
        lines += [f"{'':<12} left out: {', '.join(left_out)}"] if left_out else []
        lines.append(f"{'':<12} {summary['why']}")
        lines += [f"{role + ':':<12} {path}" for role, path in summary["products"].items()]
    lines += _code_lines(summary)
    if psnr := summary.get("psnr"):
        lines += grid([("tokens", "PSNR, dB"), *((k, f"{v:.2f}") for k, v in psnr.items())])
    tokens = {n: s for n, s in summary.get("splits", {}).items() if "tokens" in s}
    for name, split in tokens.items():
        each = split["token_bytes"] / max(split["samples"], 1)
        lines.append(
            f"{name + ':':<8} {split['samples']:,} samples, {split['tokens']:,} tokens in "
            f"{human(split['token_bytes'])}, {each:,.1f} bytes a sample"
        )
    if summary.get("evaluation"):
        spent = {step: s / 3600 for step, s in summary["seconds"].items() if s >= 36}
        told = ", ".join(f"{step} {hours:.2f}" for step, hours in spent.items())
        lines.append(f"hours of workers: {sum(spent.values()):.2f} ({told})")
    names = ("images", "labels", "codebook", "model", "report")
    lines += [f"{name + ':':<8} {summary[name]}" for name in names if name in summary]
    return "\n".join(lines)
