"""Settings of image tokenizers, and the named ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from pipeline.config import Config, TrainConfig


class BernoulliConfig(Config):
    """Bits drawn from a Bernoulli distribution while training, and thresholds after.

    Source: AMD, "Instella-T2I", 2025; Wang et al., "Binary Latent Diffusion", 2023.
    """

    kind: Literal["bernoulli"] = "bernoulli"
    bits: int = Field(default=64, ge=1, le=1024, description="bits of a token")
    temperature: float = Field(
        default=0.1, gt=0, description="of the draws: logits are divided by it"
    )
    certainty_weight: float = Field(default=0.0, ge=0, description="of the mean of p (1 - p)")


class SignConfig(Config):
    """Signs of a vector: on the sphere (BSQ), or as they are (LFQ).

    Source: Zhao et al., "Binary Spherical Quantization", 2024; Yu et al., "MAGVIT-v2", 2023.
    """

    kind: Literal["bsq", "lfq"] = "bsq"
    bits: int = Field(default=12, ge=1, le=1024, description="bits of a token")
    entropy_weight: float = Field(
        default=0.0,
        ge=0,
        description="of the entropy of a sample's bits less that of a batch's groups of bits",
    )
    group: int = Field(
        default=1,
        ge=1,
        le=12,
        description="bits whose joint distribution the batch's entropy is of",
    )
    inverse_temperature: float = Field(
        default=1.0, gt=0, description="of soft bits: larger is surer"
    )
    commitment_weight: float = Field(default=0.0, ge=0)


class FSQConfig(Config):
    """Each number rounded to one of a few levels.

    Source: Mentzer et al., "Finite Scalar Quantization", 2023.
    """

    kind: Literal["fsq"] = "fsq"
    levels: tuple[Annotated[int, Field(ge=2)], ...] = Field(
        default=(8, 8, 8, 5, 5, 5), min_length=1
    )


class VQConfig(Config):
    """The nearest of the codes of a codebook.

    Codes are ``learned`` by their gradient (van den Oord et al., "Neural Discrete Representation
    Learning", 2017; on the sphere, Yu et al., "Vector-quantized Image Modeling with Improved
    VQGAN", 2022), or by a moving average (``ema``; Razavi et al., "Generating Diverse
    High-Fidelity Images with VQ-VAE-2", 2019), or are ``projected``: frozen, and seen through a
    linear map that is learned, so that every code moves with each step (Zhu et al., "Addressing
    Representation Collapse in Vector Quantized Models with One Linear Layer", 2024; with the
    codes of a codebook, Zhu et al., "Scaling the Codebook Size of VQGAN to 100,000 with a
    Utilization Rate of 99%", 2024).
    """

    kind: Literal["vq"] = "vq"
    vocabulary: int = Field(default=4096, ge=2, description="codes")
    width: int = Field(default=12, ge=1, description="numbers of a code")
    codes: Literal["learned", "ema", "projected"] = "learned"
    metric: Literal["cosine", "euclidean"] = Field(
        default="cosine", description="cosine: vectors and codes have length 1"
    )
    features: int | None = Field(
        default=None,
        ge=1,
        description="numbers of a frozen code; as many as its width where not given",
    )
    standardize: bool = Field(
        default=True,
        description="vectors have mean 0 and variance 1 over images before they are compared",
    )
    commitment_weight: float = Field(default=0.1, ge=0, description="draws vectors to their codes")
    codebook_weight: float = Field(default=0.4, ge=0, description="draws codes to their vectors")
    decay: float = Field(default=0.99, gt=0, lt=1, description="of the moving average (ema)")


QuantizerConfig = Annotated[
    BernoulliConfig | SignConfig | FSQConfig | VQConfig, Field(discriminator="kind")
]


class TransformerConfig(Config):
    """One side of a tokenizer."""

    width: int = Field(default=128, ge=8)
    depth: int = Field(default=4, ge=1, description="blocks")
    heads: int = Field(default=4, ge=1)
    resample_after: int | None = Field(
        default=None,
        ge=1,
        description="blocks after which the grid of patches is halved (encoder) or doubled "
        "(decoder)",
    )

    @model_validator(mode="after")
    def _holds(self) -> TransformerConfig:
        if self.width % self.heads:
            raise ValueError(f"{self.width} numbers cannot be shared by {self.heads} heads")
        if self.resample_after is not None and self.resample_after >= self.depth:
            raise ValueError("resample_after must be less than depth")
        return self


class TailDropConfig(Config):
    """Training with the first tokens of each image alone, so that any first tokens are an image.

    Source: Miwa et al., "One-D-Piece", 2025, with a draw for each sample; DetailFlow, 2025, for the
    resolution of what fewer tokens are to show.
    """

    lengths: Literal["uniform", "pow2"] = Field(
        default="uniform", description="how lengths are drawn: evenly, or as powers of two"
    )
    share: float = Field(
        default=1.0, ge=0, le=1, description="of the samples; others keep all tokens"
    )
    resolution_alpha: float | None = Field(
        default=None,
        gt=0,
        description="exponent of DetailFlow's schedule: fewer tokens are to show the image at a "
        "lower resolution; without it, at its own",
    )


class LatentConfig(Config):
    """An image tokenizer: a transformer with latent tokens on both sides of a quantizer."""

    kind: Literal["latent"] = "latent"
    size: int = Field(default=32, ge=4, description="side of the images in training, pixels")
    channels: Literal[1, 3] = 3
    patch: int = Field(default=4, ge=1, description="side of a patch, pixels")
    tokens: int = Field(default=32, ge=1, le=4096, description="tokens of an image at most")
    encoder: TransformerConfig = TransformerConfig()
    decoder: TransformerConfig = TransformerConfig()
    quantizer: QuantizerConfig = SignConfig()
    tail_drop: TailDropConfig | None = TailDropConfig()

    @property
    def multiple(self) -> int:
        """Sides of images are multiples of it."""
        resampled = self.encoder.resample_after or self.decoder.resample_after
        return self.patch * (2 if resampled else 1)

    @model_validator(mode="after")
    def _holds(self) -> LatentConfig:
        if self.size % self.multiple:
            raise ValueError(f"size {self.size} is no multiple of {self.multiple}")
        return self


class GridConfig(Config):
    """An image tokenizer: convolutions on both sides of a quantizer, and a token for each place.

    Source: Esser et al., "Taming Transformers for High-Resolution Image Synthesis", 2021.
    """

    kind: Literal["grid"] = "grid"
    size: int = Field(default=32, ge=4, description="side of the images, pixels")
    channels: Literal[1, 3] = 3
    patch: int = Field(
        default=2,
        ge=1,
        description="side of the patches that the networks begin and end with, pixels",
    )
    width: int = Field(default=32, ge=4, multiple_of=4, description="channels of a patch")
    multipliers: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(1, 2),
        min_length=1,
        description="of the width, at each resolution: the second has half the side, and so on",
    )
    blocks: int = Field(default=1, ge=1, description="residual blocks at each resolution")
    attention: bool = Field(default=True, description="at the lowest resolution")
    latent: int = Field(
        default=64, ge=1, description="channels between the networks and the quantizer"
    )
    quantizer: QuantizerConfig = VQConfig(width=8)

    @property
    def factor(self) -> int:
        """Pixels of a side that share a token."""
        return self.patch << len(self.multipliers) - 1

    @property
    def tokens(self) -> int:
        """Tokens of an image."""
        return (self.size // self.factor) ** 2

    @property
    def tail_drop(self) -> None:
        """Places of a grid have no order in which they could be left out."""
        return

    @model_validator(mode="after")
    def _holds(self) -> GridConfig:
        if self.size % self.factor:
            raise ValueError(f"size {self.size} is no multiple of {self.factor}")
        return self


def _kind(value: Any) -> str:
    found = value.get("kind", "latent") if isinstance(value, Mapping) else value.kind
    return str(found)


TokenizerConfig = Annotated[
    Annotated[LatentConfig, Tag("latent")] | Annotated[GridConfig, Tag("grid")],
    Discriminator(_kind),
]


class PerceptualConfig(Config):
    """A network of your own whose features of both images are to agree."""

    backbone: str = Field(default="timm:convnext_small", description="a classifier by its name")
    weights: str = Field(
        default="pretrained", description="a .safetensors, .npz or .pth file, or 'pretrained'"
    )
    classes: int = Field(default=1000, ge=2, description="outputs that its weights have")
    mean: tuple[float, ...] = Field(
        default=(0.485, 0.456, 0.406), description="per channel, of [0, 1]"
    )
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    weight: float = Field(default=0.1, ge=0)


class LossConfig(Config):
    """What a tokenizer is trained for."""

    pixel: Literal["l1", "l2", "smooth-l1"] = "l2"
    perceptual: PerceptualConfig | None = None
    adversarial_weight: float = Field(
        default=0.0, ge=0, description="of a hinge loss; 0: no adversary"
    )
    adversarial_from: float = Field(
        default=0.2, ge=0, le=1, description="share of the epochs before it"
    )
    decorrelation_weight: float = Field(
        default=0.1,
        ge=0,
        description="against bits that say the same: of correlations above a half",
    )


class TokenizerTrainConfig(Config):
    """Training of a tokenizer."""

    train: TrainConfig = TrainConfig(epochs=20, batch_size=128, lr=1e-3, warmup_epochs=1, ema=0.99)
    loss: LossConfig = LossConfig()
    flip: bool = True
    sizes: tuple[Annotated[int, Field(ge=4)], ...] = Field(
        default=(),
        description="further sides of the images, pixels: each batch has one, drawn evenly",
    )


_VQGAN = {"commitment_weight": 0.25, "codebook_weight": 1.0}
_FROZEN = {"kind": "vq", "codes": "projected", "metric": "euclidean"}
_BASE = {"width": 768, "depth": 12, "heads": 12}
PRESETS: Mapping[str, dict[str, Any]] = {
    "tiny": {
        "encoder": {"depth": 3},
        "decoder": {"depth": 3},
        "quantizer": {"kind": "bsq", "bits": 12},
    },
    "instella-1024": {
        "size": 1024,
        "patch": 16,
        "tokens": 128,
        "encoder": _BASE | {"resample_after": 8},
        "decoder": {"width": 1024, "depth": 16, "heads": 16, "resample_after": 8},
        "quantizer": {"kind": "bernoulli", "bits": 64, "temperature": 0.1},
        "tail_drop": None,
    },
    "one-d-piece-b-256": {
        "size": 256,
        "patch": 16,
        "tokens": 256,
        "encoder": _BASE,
        "decoder": _BASE,
        "quantizer": {"kind": "vq", "vocabulary": 4096, "width": 12} | _VQGAN,
        "tail_drop": {"lengths": "uniform"},
    },
    "detailflow-128": {
        "size": 256,
        "patch": 16,
        "tokens": 128,
        "encoder": {"width": 1152, "depth": 12, "heads": 16},
        "decoder": _BASE,
        "quantizer": {"kind": "vq", "vocabulary": 8192, "width": 8} | _VQGAN,
        "tail_drop": {"lengths": "uniform", "share": 0.2, "resolution_alpha": 1.5},
    },
    "tiny-grid": {
        "kind": "grid",
        "quantizer": _FROZEN | {"metric": "cosine", "vocabulary": 4096, "width": 8},
    },
    "vqgan-lc-f16": {
        "kind": "grid",
        "size": 256,
        "patch": 1,
        "width": 128,
        "multipliers": (1, 1, 2, 2, 4),
        "blocks": 2,
        "latent": 256,
        "quantizer": _FROZEN
        | {"vocabulary": 100_000, "width": 8, "features": 768}
        | {"commitment_weight": 0.1, "codebook_weight": 0.033},
    },
}
"""Sizes as published; how they were trained is in :data:`TRAINING`."""

TRAINING: Mapping[str, dict[str, Any]] = {
    "tiny": {},
    # Of its training only the kinds of losses were published; the rest are defaults of ours.
    "instella-1024": {
        "train": {"batch_size": 256, "lr": 1e-4, "weight_decay": 0.0, "warmup_epochs": 1},
        "loss": {"pixel": "smooth-l1"},
    },
    # Trained at once rather than in two stages, as TiTok is in its later form: 650,000 steps of
    # 256 images, of ImageNet-1k's 1.28 million, are 130 epochs.
    "one-d-piece-b-256": {
        "train": {"epochs": 130, "batch_size": 256, "lr": 1e-4, "weight_decay": 1e-4}
        | {"warmup_epochs": 2, "ema": 0.999},
    },
    "detailflow-128": {
        "train": {"epochs": 250, "batch_size": 256, "lr": 1e-4, "weight_decay": 0.0}
        | {"warmup_epochs": 2, "ema": 0.999},
    },
    "tiny-grid": {},
    # Of the two learning rates that its authors published (5e-4 and 1e-4) the one beside the
    # results. The adversary joins after 50,000 of 500,000 steps.
    "vqgan-lc-f16": {
        "train": {"epochs": 100, "batch_size": 256, "lr": 5e-4, "weight_decay": 0.05}
        | {"warmup_epochs": 5},
        "loss": {"pixel": "l1", "adversarial_weight": 0.1, "adversarial_from": 0.1},
    },
}
"""How they were trained, as far as that is known."""
