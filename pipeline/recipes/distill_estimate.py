"""What a distillation would cost, before anything is done."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import backbones
from pipeline.dataset_distill.label_codec import label_bytes, plan_labels
from pipeline.dataset_distill.recover import recover
from pipeline.datasets import Dataset
from pipeline.device import default_device
from pipeline.errors import UsageError
from pipeline.labelled_images import ImageConfig
from pipeline.recipes.distill_config import DistillConfig
from pipeline.recipes.distill_parts import synthesis_plan

PEAK = {
    "v100": 125e12,
    "t4": 65e12,
    "a10": 125e12,
    "l4": 121e12,
    "l40s": 362e12,
    "rtx3090": 71e12,
    "rtx4090": 165e12,
    "a100": 312e12,
    "h100": 989e12,
    "h200": 989e12,
}
"""Dense half-precision FLOP/s that makers state."""
SHARE = 0.2
"""Of a GPU's peak, where none is at hand to be asked."""
PNG_BITS = 4.5
"""Of a channel's pixel: what photographs and synthetic images come to in PNG, about."""


def estimate(data: Dataset, config: DistillConfig, gpu: str | None) -> dict[str, Any]:
    """Units, FLOPs, hours and bytes of a distillation.

    Hours come from a short calibration: some iterations of the synthesis on the device at hand. A
    named GPU that is not at hand is taken to reach the share of its peak that the one at hand does,
    or a fifth where there is none.

    Args:
        data: the data set.
        config: of the recipe.
        gpu: one of :data:`PEAK`; the device at hand where not given.

    Raises:
        UsageError: the GPU is unknown.
    """
    classes, image = len(data.train.classes), config.image
    images = classes * config.ipc
    plan = synthesis_plan(data.train.classes, config.ipc, config.recover)
    tables = [table for _, table in plan.parts]
    iterations = sum(table.num_rows * table["iterations"][0].as_py() for table in tables)
    codec, views = plan_labels(config.relabel, config.student.temperature, images, classes)
    networks = config.student.backbones or (config.teacher.backbone,)
    teachers = [config.teacher, *config.committee]
    forward = [_forward(t.backbone, classes, image) for t in teachers]
    asked = sum(forward) / len(forward)
    steps = {
        # The gradient of pixels alone costs another forward pass; of weights too, two.
        "images": 2 * asked * iterations,
        "labels": sum(forward) * images * (0 if config.relabel.online else views),
        "students": sum(
            3 * _forward(name, classes, image) * config.student.train.epochs * images
            for name in networks
            for _ in range(config.seeds * (len(config.arms) if name == networks[0] else 2))
        ),
    }
    known = [shard.rows for shard in data.train.shards]
    samples = None if None in known else sum(count or 0 for count in known)
    if samples is not None:
        steps["teacher"] = sum(
            3 * cost * t.train.epochs * samples
            for t, cost in zip(teachers, forward, strict=True)
            if t.weights is None
        )
    rate, how = _rate(config, classes, asked, gpu)
    return {
        "units": len(tables),
        "batch": max(table.num_rows for table in tables),
        "images": images,
        "iterations": config.recover.iterations,
        "flops": steps,
        "flops_a_second": rate,
        "calibration": how,
        "hours": {name: flops / rate / 3600 for name, flops in steps.items()},
        "image_bytes": round(images * image.size**2 * image.channels * PNG_BITS / 8),
        "label_bytes": 0 if config.relabel.online else label_bytes(codec, views, images, classes),
        "labels": {"codec": codec.kind, "views": 0 if config.relabel.online else views},
        "training_samples": samples,
    }


def _forward(name: str, classes: int, image: ImageConfig) -> float:
    """FLOPs of one image's forward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        x = torch.zeros(1, image.channels, image.size, image.size)
    model = backbones.build(name, classes, image.channels).eval().to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return float(counter.get_total_flops())


def _rate(config: DistillConfig, classes: int, asked: float, gpu: str | None) -> tuple[float, str]:
    """FLOP/s of the synthesis, and where the figure comes from."""
    if gpu is not None and gpu.lower() not in PEAK:
        raise UsageError(
            f"There is no GPU named '{gpu}' whose speed is known.",
            hint=f"Known are: {', '.join(PEAK)}. Without --gpu the device at hand is measured.",
            code="unknown-gpu",
        )
    device = default_device()
    if gpu is not None and device.type == "cpu":
        return SHARE * PEAK[gpu.lower()], (
            f"{gpu}: {SHARE:.0%} of its {PEAK[gpu.lower()] / 1e12:,.0f} TFLOP/s are assumed, since "
            "there is no GPU here to be measured; plan on the GPU itself to know"
        )
    measured = _measured(config, classes, asked, device)
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return measured, f"measured on this machine's CPU, {threads} threads: no GPU is at hand"
    here = torch.cuda.get_device_name(device)
    if gpu is None:
        return measured, f"measured here, on one {here}"
    own = next((n for n in PEAK if n in here.lower().replace(" ", "")), None)
    if own is None:
        return SHARE * PEAK[gpu.lower()], f"{gpu}: {SHARE:.0%} of its peak are assumed"
    rate = measured * PEAK[gpu.lower()] / PEAK[own]
    return rate, f"{gpu}: measured here on one {here}, and scaled by what makers state"


def _measured(config: DistillConfig, classes: int, asked: float, device: torch.device) -> float:
    """FLOP/s of a few iterations of the synthesis."""
    image, teacher = config.image, config.teacher.backbone
    rows = config.recover.batch_size if device.type == "cuda" else min(8, config.recover.batch_size)
    network: nn.Module = backbones.build(teacher, classes, image.channels).to(device).eval()
    labels = torch.arange(rows, device=device) % classes
    start: Tensor = torch.randn(rows, image.channels, image.size, image.size).to(device)

    def seconds(iterations: int) -> float:
        few = config.recover.model_copy(update={"iterations": iterations})
        began = time.perf_counter()
        recover([network], labels, start, 0, few, image)
        return time.perf_counter() - began

    seconds(2)
    few, many = (2, 6) if device.type == "cpu" else (10, 60)
    took = max(seconds(many) - seconds(few), 1e-9)
    return 2 * asked * rows * (many - few) / took
