"""Features in few bytes: a small encoder in the place of a classifier's first stages."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from safetensors.torch import load
from torch import Tensor, nn

from pipeline import backbones
from pipeline.codecs.bitstream import decode_group, encode_group
from pipeline.codecs.entropy import EntropyModel
from pipeline.codecs.gdn import GDN
from pipeline.codecs.prior import FactorizedPrior
from pipeline.config import Config
from pipeline.errors import UsageError

DTYPE = "int16"
"""Of latents."""


class FeatureCodecConfig(Config):
    """The encoder, and where its features go into the classifier."""

    split: str | None = Field(
        default=None,
        description="the last stage that is replaced, such as layer1; the second where not given",
    )
    channels: int = Field(default=24, ge=1, description="of the latents")
    strides: tuple[int, int] = Field(
        default=(2, 2), description="of the encoder's first two convolutions"
    )


@dataclass(frozen=True)
class FeatureSpec:
    """What an encoder and a decoder are made of.

    Attributes:
        inputs: channels of the images.
        channels: of the latents.
        strides: of the encoder's first two convolutions.
        target: channels of the features.
        scale: side of the features in sides of the latents, which have lost one.
        split: stage of the teacher that the features stand for.
        mean: of pixels in [0, 1], per channel.
        std: per channel.
        latents: (channels, h, w) of one image.
        features: (target, H, W) of one image.
        eight_bit: latents are kept in 8 bits each, and no entropy model is learned.
    """

    inputs: int
    channels: int
    strides: tuple[int, int]
    target: int
    scale: int
    split: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    latents: tuple[int, int, int]
    features: tuple[int, int, int]
    eight_bit: bool = False


class Bottleneck(nn.Module):
    """Encoder, prior and decoder, which are trained together.

    Source: Matsubara et al., "Supervised Compression for Resource-Constrained Edge Computing
    Systems", 2022.

    Shapes: images (N, inputs, H, W) to latents (N, channels, h, w) as a decoder gets them.
    """

    def __init__(self, spec: FeatureSpec) -> None:
        super().__init__()
        self.spec = spec
        c, (first, second) = spec.channels, spec.strides
        self.encoder = nn.Sequential(
            nn.Conv2d(spec.inputs, 4 * c, 5, first, 2, bias=False),
            GDN(4 * c),
            nn.Conv2d(4 * c, 2 * c, 5, second, 2, bias=False),
            GDN(2 * c),
            nn.Conv2d(2 * c, c, 2, bias=False),
        )
        self.prior = FactorizedPrior(c)
        self.decoder = decoder(spec)

    def forward(self, x: Tensor) -> Tensor:
        latents = self.encoder(x)
        if self.spec.eight_bit:
            levels, low, scale = eight_bits(latents, (1, 2, 3))
            return levels * scale + low
        return cast("Tensor", latents.round())

    @classmethod
    def load(cls, spec: bytes, weights: bytes) -> Bottleneck:
        """From the two files of a trained one; it stays as it is."""
        made = cls(read_spec(spec))
        made.load_state_dict(load(weights))
        return made.eval().requires_grad_(requires_grad=False)


def decoder(spec: FeatureSpec) -> nn.Sequential:
    """Latents to features; where these are larger, the first convolution makes room for it."""
    wide, up = 2 * spec.target, spec.scale
    return nn.Sequential(
        nn.Conv2d(spec.channels, wide * up * up, 2, padding=1, bias=False),
        nn.PixelShuffle(up),
        GDN(wide, inverse=True),
        nn.Conv2d(wide, spec.target, 2, bias=False),
        GDN(spec.target, inverse=True),
        nn.Conv2d(spec.target, spec.target, 2, padding=1, bias=False),
    )


def eight_bits(x: Tensor, together: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Levels 0 to 255 (whole numbers in x's dtype), the least value, and what a level stands for.

    Args:
        x: (N, C, H, W).
        together: dimensions that share a least value and a scale.
    """
    low, high = x.amin(together, keepdim=True), x.amax(together, keepdim=True)
    scale = ((high - low) / 255).clamp(min=1e-12)
    return ((x - low) / scale).round(), low, scale


def plan(
    teacher: nn.Module,
    config: FeatureCodecConfig,
    image: backbones.ModelSpec,
    size: int,
    *,
    eight_bit: bool = False,
) -> FeatureSpec:
    """Shapes of a codec for a teacher and images of ``size`` pixels.

    Raises:
        UsageError: there is no such stage, or the encoder makes its maps too small or too large.
    """
    stages = backbones.in_stages(teacher)
    names = list(stages)[:-1]
    split = config.split or names[min(1, len(names) - 1)]
    if split not in names:
        raise UsageError(
            f"The teacher has no stage '{split}' that could be replaced.",
            hint=f"It has: {', '.join(names)}.",
            code="no-stage",
        )
    x = torch.zeros(1, image.channels, size, size)
    with torch.inference_mode():
        for name in names[: names.index(split) + 1]:
            x = stages[name].eval()(x)
    target, height, width = x.shape[1:]
    side = size
    for stride in config.strides:
        side = -(-side // stride)
    if side < 2 or height % side or height != width:
        raise UsageError(
            f"The stage '{split}' has maps of {height} x {width}, and an encoder with strides of "
            f"{config.strides[0]} and {config.strides[1]} makes {side} x {side} of images of "
            f"{size} pixels, of which they are no multiple.",
            hint="Change codec.strides or codec.split, so that the maps are as large or larger.",
            code="bad-split",
        )
    latents = (config.channels, side - 1, side - 1)
    return FeatureSpec(
        image.channels,
        config.channels,
        config.strides,
        target,
        height // side,
        split,
        image.mean,
        image.std,
        latents,
        (target, height, width),
        eight_bit,
    )


def read_spec(data: bytes) -> FeatureSpec:
    """A specification as it lies beside the weights."""
    fields = json.loads(data)
    values: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in fields.items()}
    return FeatureSpec(**values)


@torch.inference_mode()
def latents_of(spec: FeatureSpec, encoder: nn.Module, images: Tensor) -> Tensor:
    """Latents (N, C, h, w) of images (N, channels, H, W) with pixels in [0, 1]."""
    mean, std = (
        torch.tensor(v, device=images.device).view(1, -1, 1, 1) for v in (spec.mean, spec.std)
    )
    return cast("Tensor", encoder((images - mean) / std))


class FeatureEncoder:
    """Images to records: what a device needs, and no more.

    Args:
        spec: of the codec.
        network: the encoder.
        model: of one image's latents.
    """

    def __init__(self, spec: FeatureSpec, network: nn.Module, model: EntropyModel) -> None:
        self.spec, self.network, self.model = spec, network.eval(), model

    @classmethod
    def load(cls, spec: bytes, weights: bytes, model: EntropyModel) -> FeatureEncoder:
        """From a bottleneck's two files and its entropy model."""
        return cls(read_spec(spec), Bottleneck.load(spec, weights).encoder, model)

    def latents(self, images: Tensor) -> Tensor:
        """Latents (N, C, h, w) of images (N, channels, H, W) with pixels in [0, 1]."""
        return latents_of(self.spec, self.network, images)

    def encode(self, images: Tensor, budget: int | None = None) -> tuple[list[bytes], list[int]]:
        """A record of each image, and how many of its symbols a budget has cost.

        Args:
            images: (N, channels, H, W), pixels in [0, 1].
            budget: bytes that no record may exceed. Symbols that are nearest to what is typical
                become that, as few as will do.

        Raises:
            UsageError: not even a typical image fits.
        """
        found = [self.record(one, budget) for one in quantized(self.latents(images).cpu().numpy())]
        return [record for record, _, _ in found], [dropped for _, _, dropped in found]

    def record(
        self, symbols: npt.NDArray[np.int16], budget: int | None = None
    ) -> tuple[bytes, npt.NDArray[np.int16], int]:
        """The record of one image's symbols (C, h, w), those that it holds, and how many it lost.

        Raises:
            UsageError: not even a typical image fits.
        """
        whole = encode_group(symbols[None], self.model)
        if budget is None or len(whole) <= budget:
            return whole, symbols, 0
        typical = self.model.typical().astype(np.int16)
        flat = symbols.reshape(-1)
        order = np.argsort(-np.abs(flat.astype(np.int32) - typical), kind="stable")
        unlike = int((flat != typical).sum())
        low, high, best = 0, unlike, None
        while best is None or high - low > 1:
            kept = 0 if best is None else (low + high) // 2
            cut = typical.copy()
            cut[order[:kept]] = flat[order[:kept]]
            record = encode_group(cut.reshape(1, *symbols.shape), self.model)
            if len(record) <= budget:
                low, best = kept, (record, cut.reshape(symbols.shape), unlike - kept)
            elif best is None:
                raise UsageError(
                    f"A budget of {budget} bytes does not hold a typical image, which takes "
                    f"{len(record)}.",
                    hint="Give a larger one.",
                    code="small-budget",
                )
            else:
                high = kept
        return best


def quantized(latents: npt.NDArray[np.float32]) -> npt.NDArray[np.int16]:
    """Latents as whole numbers, halves to even."""
    return np.asarray(np.rint(latents).clip(-(2**15), 2**15 - 1), np.int16)


class FeatureDecoder:
    """Records to features: what a server needs before a tail.

    Args:
        spec: of the codec.
        network: the decoder.
        model: of one image's latents.
    """

    def __init__(self, spec: FeatureSpec, network: nn.Module, model: EntropyModel) -> None:
        self.spec, self.network, self.model = spec, network.eval(), model

    @classmethod
    def load(cls, spec: bytes, weights: bytes, model: EntropyModel) -> FeatureDecoder:
        """From a bottleneck's two files and its entropy model."""
        return cls(read_spec(spec), Bottleneck.load(spec, weights).decoder, model)

    def latents(self, records: list[bytes]) -> Tensor:
        """Latents (N, C, h, w), float32, of records.

        Raises:
            BitstreamError: one is damaged, or of another codec.
        """
        found = np.zeros((len(records), *self.spec.latents), np.float32)
        for row, record in enumerate(records):
            found[row] = decode_group(record, 1, self.model, DTYPE, where=f"record {row}")[0]
        return torch.from_numpy(found)

    @torch.no_grad()  # not inference mode: a tail may be trained on what comes out
    def features(self, latents: Tensor) -> Tensor:
        """Features (N, target, H, W) of latents (N, C, h, w), on the network's device."""
        device = next(self.network.parameters()).device
        return cast("Tensor", self.network(latents.to(device)))

    def decode(self, records: list[bytes]) -> Tensor:
        """Features (N, target, H, W) of records.

        Raises:
            BitstreamError: one is damaged, or of another codec.
        """
        return self.features(self.latents(records))
