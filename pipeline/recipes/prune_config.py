"""Settings of the recipe ``prune``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from pipeline.config import Config
from pipeline.dataset_distill.config import SqueezeConfig
from pipeline.labelled_images import ImageConfig

ScoreName = Literal[
    "el2n",
    "grand",
    "forgetting",
    "aum",
    "tdds",
    "margin",
    "entropy",
    "least-confidence",
    "prototypes",
    "supervised-prototypes",
    "moderate",
]
SelectorName = Literal["auto", "hard", "easy", "band", "ccs", "d2", "herding", "k-center", "random"]
Kind = Literal["exact", "near", "semantic"]


class PruneConfig(Config):
    """Configuration of the recipe ``prune``."""

    keep: int | float | str = Field(
        default=0.7, description="a share, a count, or bytes such as 2GB; 'auto' is selector: auto"
    )
    score: ScoreName | None = Field(
        default=None,
        description="how hard a sample is; el2n, and prototypes where there are no labels",
    )
    selector: SelectorName | None = Field(
        default=None, description="which are kept; auto, and band for the score moderate"
    )
    balance: float = Field(
        default=0.5, ge=0, le=1, description="share of an equal part that each class keeps at least"
    )
    dedup: tuple[Kind, ...] = Field(default=(), description="duplicates that are left out first")
    near_bits: int = Field(
        default=4,
        ge=0,
        le=16,
        description="of 64 by which the hashes of near duplicates differ at most",
    )
    epsilon: float | None = Field(
        default=None,
        ge=0,
        le=2,
        description="cosine distance below which features are duplicates: 0.03 for 'pretrained', "
        "and 0.001 for networks trained on these very classes, which bring a class together",
    )
    image: ImageConfig = ImageConfig()
    proxy: SqueezeConfig = SqueezeConfig()
    runs: int = Field(default=3, ge=1, description="trainings that el2n and grand are the mean of")
    early_epochs: int = Field(default=10, ge=1, description="epochs of these trainings")
    prototypes: int | None = Field(
        default=None, ge=1, description="clusters of features; as many as classes where not given"
    )
    pilot_epochs: int = Field(default=10, ge=1, description="epochs of the two pilot runs of auto")
    materialize: Literal["webdataset", "parquet", "zarr", "folder"] | None = Field(
        default=None, description="also write the samples that are kept, in this format"
    )

    @field_validator("dedup")
    @classmethod
    def _each_once(cls, kinds: tuple[Kind, ...]) -> tuple[Kind, ...]:
        return tuple(sorted(set(kinds)))
