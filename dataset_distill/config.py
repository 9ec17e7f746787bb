"""Settings of data-set distillation.

Defaults are those of CDA for ImageNet-1k (Yin and Shen, "Dataset Distillation via Curriculum Data
Synthesis in Large Data Era", 2024); small data sets have presets of their own.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.backbones import ModelSpec
from pipeline.config import Config, TrainConfig


class ImageConfig(Config):
    """The pictures: shape, normalisation and what may be done to them without changing a label."""

    size: int = Field(224, ge=4, description="side of the square images, in pixels")
    channels: Literal[1, 3] = 3
    mean: tuple[float, ...] = Field((0.485, 0.456, 0.406), description="per channel, of [0, 1]")
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    flip: bool = Field(True, description="whether a mirrored image keeps its label")

    def model_spec(self, backbone: str, classes: int) -> ModelSpec:
        """The specification of a classifier of such images."""
        return ModelSpec(backbone, classes, self.channels, self.mean, self.std)


class SqueezeConfig(Config):
    """The teacher: trained here, or taken with its weights."""

    backbone: str = "torchvision:resnet18"
    weights: str | None = Field(
        None, description="a .safetensors or .npz file, or 'pretrained'; without it one is trained"
    )
    train: TrainConfig = TrainConfig(epochs=90, batch_size=256, optimizer="sgd", lr=0.1)


class RecoverConfig(Config):
    """Synthesis of the images."""

    iterations: int = Field(4000, ge=1)
    batch_size: int = Field(100, ge=1, description="images optimised together, each another class")
    lr: float = Field(0.25, gt=0)
    r_bn: float = Field(0.01, ge=0, description="weight of the BatchNorm-statistics loss")
    first_bn_multiplier: float = Field(10.0, ge=0)
    curriculum: Literal["step", "linear", "cosine"] = "cosine"
    milestone: float = Field(1.0, ge=0, le=1, description="share of the run; 0 gives SRe2L")
    crop_floor: float = Field(0.08, gt=0, le=1, description="smallest area share of a crop")
    jitter: int = Field(32, ge=0, description="largest circular shift, in pixels")


class RelabelConfig(Config):
    """Soft labels, each tied to one view of one image (FKD)."""

    views: int = Field(
        300, ge=1, description="stored views of each image; epoch e uses e mod views"
    )
    crop_floor: float = Field(0.08, gt=0, le=1)
    cutmix: float = Field(1.0, ge=0, description="alpha of the Beta distribution; 0 turns it off")


class StudentConfig(Config):
    """The student that measures a distilled set."""

    backbone: str | None = Field(None, description="the teacher's network where not given")
    temperature: float = Field(20.0, gt=0)
    train: TrainConfig = TrainConfig(epochs=300, batch_size=128)
