"""Settings of data-set distillation.

Defaults are those of CDA for ImageNet-1k (Yin and Shen, "Dataset Distillation via Curriculum Data
Synthesis in Large Data Era", 2024); small data sets have presets of their own.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config import Config, TrainConfig


class SqueezeConfig(Config):
    """The teacher: trained here, or taken with its weights."""

    backbone: str = "torchvision:resnet18"
    weights: str | None = Field(
        default=None,
        description="a .safetensors or .npz file, or 'pretrained'; without it one is trained",
    )
    train: TrainConfig = TrainConfig(epochs=90, batch_size=256, optimizer="sgd", lr=0.1)


class RecoverConfig(Config):
    """Synthesis of the images."""

    iterations: int = Field(default=4000, ge=0, description="0 leaves the images as they start")
    batch_size: int = Field(default=100, ge=1, description="images optimised together")
    batch_of: Literal["classes", "mixed", "class"] = Field(
        default="classes",
        description="what is in a batch: an image each of as many classes, several of each class, "
        "or images of one class, which then match the statistics of that class (LPLD)",
    )
    lr: float = Field(default=0.25, gt=0)
    r_bn: float = Field(default=0.01, ge=0, description="weight of the BatchNorm-statistics loss")
    relative: bool = Field(
        default=False,
        description="r_bn is of the loss divided by that of noise: it fits other teachers too",
    )
    first_bn_multiplier: float = Field(default=10.0, ge=0)
    curriculum: Literal["step", "linear", "cosine"] = "cosine"
    milestone: float = Field(default=1.0, ge=0, le=1, description="share of the run; 0 gives SRe2L")
    crop_floor: float = Field(default=0.08, gt=0, le=1, description="smallest area share of a crop")
    flip: bool = Field(
        default=True, description="mirror the batch now and then, where image.flip allows it"
    )
    jitter: int = Field(default=32, ge=0, description="largest circular shift, in pixels")
    early_late: int = Field(
        default=1,
        ge=1,
        description="groups of a class's images; group g of G gets 1 - g / G of the "
        "iterations (DELT)",
    )
    start: Literal["noise", "random", "median", "confident", "prototypes"] = Field(
        default="noise",
        description="noise, or real images of a class: at random, of median loss (DELT), of least "
        "loss (RDED), or next to the centres of clusters of features",
    )
    candidates: int = Field(
        default=300, ge=1, description="real images of a class to choose from, at most"
    )
    tiles: int = Field(
        default=1,
        ge=1,
        le=8,
        description="a start is tiled of so many by so many crops of real images",
    )
    crops: int = Field(
        default=1,
        ge=1,
        description="crops tried of each candidate; 1 takes the whole image (RDED takes 5)",
    )


class RelabelConfig(Config):
    """Soft labels, each tied to one view of one image (FKD)."""

    views: int = Field(
        default=300, ge=1, description="stored views of each image; epoch e uses e mod views"
    )
    crop_floor: float = Field(default=0.08, gt=0, le=1)
    cutmix: float = Field(
        default=1.0, ge=0, description="alpha of the Beta distribution; 0 turns it off"
    )
    codec: Literal["float16", "int8", "int4", "top-k"] = Field(
        default="float16", description="how logits are stored"
    )
    top_k: int = Field(default=50, ge=1, description="logits that 'top-k' keeps of each view")
    budget: int | str | None = Field(
        default=None,
        description="bytes of all labels, such as 100MB: picks codec and number of views",
    )
    online: bool = Field(
        default=False,
        description="no labels are stored: the teachers are run while a student is trained",
    )


class StudentConfig(Config):
    """The students that measure a distilled set."""

    backbones: tuple[str, ...] = Field(
        default=(),
        description="the teacher's network where none is given; the first one sees all arms",
    )
    temperature: float = Field(default=20.0, gt=0)
    train: TrainConfig = TrainConfig(epochs=300, batch_size=128, evaluations=10)
    view_counts: tuple[int, ...] = Field(
        default=(),
        description="also train with so many of the stored views, for accuracy against bytes",
    )
