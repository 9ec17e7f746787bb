"""Settings of the recipe ``distill``, and the presets by name and data set."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any, Literal

from pydantic import Field

from pipeline.config import Config, merge, preset_of
from pipeline.dataset_distill.config import (
    RecoverConfig,
    RelabelConfig,
    SqueezeConfig,
    StudentConfig,
)
from pipeline.datasets import Dataset
from pipeline.labelled_images import ImageConfig

Arm = Literal[
    "distilled-soft",
    "random-real-soft",
    "noise-soft",
    "shuffled-soft",
    "distilled-hard",
    "random-real-hard",
]
ARMS: Mapping[Arm, str] = {
    "distilled-soft": "synthetic images, soft labels",
    "random-real-soft": "random real images, soft labels",
    "noise-soft": "noise, soft labels",
    "shuffled-soft": "synthetic images, shuffled labels",
    "distilled-hard": "synthetic images, class labels",
    "random-real-hard": "random real images, class labels",
}
"""What students are trained on, in words."""


class DistillConfig(Config):
    """Configuration of the recipe ``distill``."""

    preset: Literal["best", "cda", "sre2l"] = Field(
        default="best",
        description="whose settings are the defaults; every one can be set by itself",
    )
    ipc: int = Field(default=10, ge=1, description="synthetic images per class")
    image: ImageConfig = ImageConfig()
    teacher: SqueezeConfig = SqueezeConfig()
    committee: tuple[SqueezeConfig, ...] = Field(
        default=(),
        description="further teachers: each iteration asks one, labels are the mean of all",
    )
    recover: RecoverConfig = RecoverConfig()
    relabel: RelabelConfig = RelabelConfig()
    student: StudentConfig = StudentConfig()
    seeds: int = Field(
        default=3, ge=1, description="students trained for each row of the evaluation"
    )
    arms: tuple[Arm, ...] = Field(
        default=tuple(ARMS), min_length=1, description="what students are trained on"
    )


LARGE = 64
"""Images with longer sides get the settings for ImageNet where nothing else is known."""
UNKNOWN: dict[str, Any] = {"size": 32, "mean": (0.5,) * 3, "std": (0.25,) * 3}

TEACHERS: Mapping[str, dict[str, Any]] = {
    "imagenet": {
        "backbone": "resnet18",
        "train": {"epochs": 90, "batch_size": 256, "optimizer": "sgd", "lr": 0.1}
        | {"weight_decay": 1e-4},
    },
    "tiny-imagenet": {
        "backbone": "resnet18-3x3",
        # Longer training makes better teachers that images are harder to recover from.
        "train": {"epochs": 50, "batch_size": 256, "optimizer": "sgd", "lr": 0.2}
        | {"weight_decay": 1e-4, "warmup_epochs": 5},
    },
    "cifar100": {
        "backbone": "resnet18-3x3",
        "train": {"epochs": 200, "batch_size": 128, "optimizer": "sgd", "lr": 0.1}
        | {"weight_decay": 5e-4},
    },
    "small": {
        "backbone": "resnet20",
        "train": {"epochs": 30, "optimizer": "sgd", "lr": 0.1, "weight_decay": 5e-4},
    },
    "digits": {
        "backbone": "convnet3",
        "train": {"epochs": 25, "batch_size": 64, "lr": 2e-3},
    },
}

SMALL_STUDENT = {"epochs": 300, "batch_size": 20, "lr": 2e-3, "evaluations": 10}
CDA: Mapping[str, dict[str, Any]] = {
    # The defaults of the configuration are these settings.
    "imagenet": {},
    "imagenet-21k": {
        "image": {"mean": (0.0,) * 3, "std": (1.0,) * 3},
        "recover": {"lr": 0.05, "r_bn": 0.25, "iterations": 2000},
        "student": {"train": {"batch_size": 32, "lr": 2e-3}},
    },
    "tiny-imagenet": {
        "recover": {"lr": 0.4, "r_bn": 0.05, "jitter": 4},
        "relabel": {"views": 100, "cutmix": 0.0},
        "student": {
            "train": {"epochs": 100, "batch_size": 256, "optimizer": "sgd", "lr": 0.2}
            | {"weight_decay": 1e-4, "warmup_epochs": 5}
        },
    },
    # Nothing was published for smaller images: SRe2L's iterations, with crops of a quarter and
    # more.
    "cifar100": {
        "recover": {"iterations": 1000, "jitter": 4, "crop_floor": 0.25},
        "relabel": {"crop_floor": 0.25},
        "student": {"temperature": 30.0, "train": {"epochs": 400}},
    },
    "small": {
        "recover": {"iterations": 1000, "jitter": 4, "crop_floor": 0.25},
        "relabel": {"crop_floor": 0.25},
        "student": {"train": SMALL_STUDENT},
    },
    "digits": {
        "recover": {"iterations": 400, "jitter": 2, "crop_floor": 0.25},
        "relabel": {"crop_floor": 0.25},
        "student": {"train": SMALL_STUDENT | {"epochs": 200}},
    },
}
SRE2L: Mapping[str, dict[str, Any]] = {
    **{name: {"recover": {"milestone": 0.0}} for name in CDA},
    "tiny-imagenet": {"recover": {"milestone": 0.0, "lr": 0.1, "r_bn": 1.0}},
    # No crops and no mirror images.
    "cifar100": {"recover": {"curriculum": "step", "flip": False}},
}
SMOOTH: dict[str, Any] = {"student": {"train": {"zeta": 2.0, "ema": 0.99}}}
"""Students of EDC: a learning rate that ends at half its peak, and averaged weights."""
REFINED: dict[str, Any] = {
    "recover": {"start": "prototypes", "batch_of": "mixed", "iterations": 100, "lr": 0.01}
    | {"r_bn": 3.0, "relative": True, "milestone": 0.0, "crop_floor": 0.5}
}
"""Typical real images, moved a little. Chosen on training images of CIFAR-10 and Fashion-MNIST that
were held out."""
TILED: dict[str, Any] = {
    "recover": {"start": "confident", "tiles": 2, "crops": 5, "iterations": 1000, "lr": 0.05}
    | {"r_bn": 3.0, "relative": True, "milestone": 0.0, "crop_floor": 0.5},
    "relabel": {"codec": "top-k", "top_k": 50},
    "student": {"train": {"batch_size": 100}},
}
"""For photographs: what RDED and EDC found for ImageNet-1k, with labels a twelfth the size."""
BEST: Mapping[str, dict[str, Any]] = {
    name: merge(SMOOTH, TILED if name.startswith("imagenet") else REFINED) for name in CDA
}


def defaults(data: Dataset, values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings for a data set, of the preset that ``values`` name.

    Raises:
        UsageError: there is no such preset.
    """
    preset = preset_of(DistillConfig, values)
    image = data.info.image if data.info else UNKNOWN
    kind = _kind(data.name if data.info else "", image["size"])
    layers = [{"preset": preset, "image": image, "teacher": TEACHERS[_teacher(kind)]}, CDA[kind]]
    if preset == "sre2l":
        layers.append(SRE2L[kind])
    elif preset == "best":
        layers.append(BEST[kind])
    return reduce(merge, layers)


def teacher_defaults(data: Dataset) -> dict[str, Any]:
    """The classifier that is trained for a data set where none is given."""
    image = data.info.image if data.info else UNKNOWN
    return TEACHERS[_teacher(_kind(data.name if data.info else "", image["size"]))]


def _kind(name: str, size: int) -> str:
    if name in CDA:
        return name
    return "imagenet" if size > LARGE else "small"


def _teacher(kind: str) -> str:
    return kind if kind in TEACHERS else "imagenet"
