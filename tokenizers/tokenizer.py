"""The contract of image tokenizers, and the one that is built in."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from pipeline.config import build
from pipeline.digest import dumps
from pipeline.errors import UsageError
from pipeline.registry import Registry
from pipeline.tokenizers.adversary import NAME
from pipeline.tokenizers.config import GridConfig, LatentConfig
from pipeline.tokenizers.network import Decoder, Encoder
from pipeline.tokenizers.quantizers import Quantized, Shape, build_quantizer
from pipeline.tokenizers.tokens import TokenForm, Tokens, first

C = TypeVar("C", LatentConfig, GridConfig)
CONFIG, WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True)
class TokenizerSpec:
    """The kind of a tokenizer, and its configuration as plain JSON types."""

    kind: str
    config: Mapping[str, Any]


class Tokenizer(nn.Module, ABC):
    """Images to tokens and back. In evaluation the same images give the same tokens.

    Any first tokens of an image can be decoded, if the tokenizer was trained for it; what follows
    them is not looked at.
    """

    kind: ClassVar[str]
    """Its name in the registry."""
    form: TokenForm
    """What a token is: bits of one, and how many an image has at most."""
    channels: int
    size: int
    """Side of the images it was trained on, in pixels."""
    multiple: int
    """Sides of images are multiples of it, in pixels."""
    one_size: ClassVar[bool] = False
    """Whether images have to be of ``size``, since the number of tokens follows from it."""

    @property
    @abstractmethod
    def spec(self) -> TokenizerSpec:
        """What it is built from."""

    @classmethod
    @abstractmethod
    def build(cls, config: Mapping[str, Any]) -> Tokenizer:
        """A new one, from the configuration in its specification."""

    @abstractmethod
    def encode_values(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Values of all tokens of images float (n, C, H, W) in [0, 1], and summaries (n, D).

        It is exported as a graph: nothing in it may depend on what a tensor holds.
        """

    @abstractmethod
    def decode_values(self, values: Tensor, lengths: Tensor, size: tuple[int, int]) -> Tensor:
        """Images float (n, C, H, W) in [0, 1] of the first ``lengths`` (n,) tokens.

        It is exported as a graph, as :meth:`encode_values` is.
        """

    @abstractmethod
    def token_vectors(self) -> Tensor:
        """What the decoder makes of tokens: of ids (K, D); of bits (2, B, D), which add up."""

    @torch.inference_mode()
    def describe(self, images: Tensor) -> tuple[Tokens, Tensor]:
        """All tokens of images, and a summary float (n, D) of each picture from the same pass.

        Args:
            images: (n, C, H, W), uint8 or float in [0, 1].

        Raises:
            UsageError: they are too small, or have other channels.
        """
        self._check(images)
        values, summary = self.encode_values(unit(images))
        lengths = torch.full((len(images),), self.form.max_tokens, device=images.device)
        return Tokens(values, lengths, self.form), summary

    @torch.inference_mode()
    def decode(self, tokens: Tokens, size: tuple[int, int] | None = None) -> Tensor:
        """Images (n, C, H, W), float in [0, 1], of ``size`` (H, W) or as in training.

        Raises:
            UsageError: the tokens have another form, or there are no images of that size.
        """
        size = size or (self.size, self.size)
        if tokens.form != self.form:
            raise UsageError(
                f"These tokens have {tokens.form.bits} bits and number {tokens.form.max_tokens} at "
                f"most; the tokenizer's have {self.form.bits} and number {self.form.max_tokens}.",
                hint="Decode tokens with the tokenizer that made them.",
                code="other-tokenizer",
            )
        self.check_size(size, "decoded")
        return self.decode_values(tokens.values, tokens.lengths, size).float()

    def encode(self, images: Tensor) -> Tokens:
        """All tokens of images. Arguments and errors as of :meth:`describe`."""
        return self.describe(images)[0]

    def _check(self, images: Tensor) -> None:
        channels, height, width = images.shape[1:]
        if channels != self.channels:
            raise UsageError(
                f"These images have {channels} channels, and the tokenizer is for {self.channels}.",
                hint="Use a tokenizer that was trained on such images, or convert them.",
                code="other-channels",
            )
        self.check_size((height, width), "tokenized")

    def check_size(self, size: tuple[int, int], what: str) -> None:
        """Refuse sides (H, W) that the tokenizer does not take; ``what`` cannot be done with them.

        Raises:
            UsageError: it does not take them.
        """
        fits = [side >= self.multiple and side % self.multiple == 0 for side in size]
        if self.one_size:
            fits = [side == self.size for side in size]
        if not all(fits):
            wanted = (
                f"of {self.size}" if self.one_size else f"that are multiples of {self.multiple}"
            )
            raise UsageError(
                f"Images of {size[0]} x {size[1]} cannot be {what}.",
                hint=f"Give sides {wanted}.",
                code="bad-image-size",
            )

    @cached_property
    def digest(self) -> str:
        """Of configuration and weights: tokens mean nothing to another tokenizer.

        Asked for after training: weights that change later do not change it.
        """
        total = hashlib.sha256(dumps(asdict(self.spec)))
        for name, value in sorted(self.state_dict().items()):
            total.update(name.encode())
            total.update(value.detach().cpu().contiguous().numpy().tobytes())
        return total.hexdigest()

    def save(self, folder: Path) -> None:
        """Write ``config.json``, the specification, and ``model.safetensors``."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_bytes(dumps(asdict(self.spec)))
        state = {n: v.detach().cpu().contiguous() for n, v in self.state_dict().items()}
        (folder / WEIGHTS).write_bytes(save(state))


TOKENIZERS: Registry[type[Tokenizer]] = Registry(
    "tokenizer",
    {
        "latent": "pipeline.tokenizers.tokenizer:LatentTokenizer",
        "grid": "pipeline.tokenizers.grid:GridTokenizer",
    },
)


def load_tokenizer(config: bytes, weights: bytes, where: str) -> Tokenizer:
    """A tokenizer in evaluation mode from the content of its two files.

    Args:
        config: a :class:`TokenizerSpec` as JSON.
        weights: safetensors.
        where: the files' place, for messages.

    Raises:
        UsageError: they are none of a tokenizer, or do not belong together.
    """
    try:
        about = json.loads(config)
        spec = TokenizerSpec(about["kind"], about["config"])
        tokenizer = TOKENIZERS.get(spec.kind).build(spec.config)
        state = {n: v for n, v in load(weights).items() if not n.startswith(f"{NAME}.")}
        tokenizer.load_state_dict(state)
    except (ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise UsageError(
            f"This is no tokenizer: {str(error).splitlines()[0]}.",
            hint="Give the output of 'pipeline run train-tokenizer', or a folder with config.json "
            "and model.safetensors as its export writes them.",
            code="bad-tokenizer",
            where=where,
        ) from error
    return tokenizer.eval().requires_grad_(requires_grad=False)


class QuantizedTokenizer(Tokenizer, Generic[C]):
    """An encoder, a quantizer and a decoder that are trained together.

    Args:
        config: what they are built from.
        encoder: makes a network of images (n, C, H, W) in [-1, 1] to vectors (n, N, D) and a
            summary of the picture.
        decoder: makes one of vectors, bool (n, N) which of them count, and a size (H, W) to images.
        shape: of the vectors.
    """

    def __init__(
        self,
        config: C,
        encoder: Callable[[C], nn.Module],
        decoder: Callable[[C], nn.Module],
        shape: Shape,
    ) -> None:
        super().__init__()
        self.config: C = config
        self.encoder = encoder(config)
        self.quantizer = build_quantizer(config.quantizer, shape)
        self.decoder = decoder(config)
        self.form = self.quantizer.form(config.tokens)
        self.channels, self.size = config.channels, config.size

    @property
    def spec(self) -> TokenizerSpec:
        return TokenizerSpec(self.kind, self.config.model_dump(mode="json"))

    def forward(self, images: Tensor, lengths: Tensor) -> tuple[Tensor, Quantized]:
        """Images (n, C, H, W) in [-1, 1] seen through their first tokens, for training.

        Args:
            images: float.
            lengths: int64 (n,), tokens that the decoder sees of each.
        """
        quantized = self.quantizer(self.encoder(images)[0])
        kept = first(self.config.tokens, lengths)
        size = (images.shape[2], images.shape[3])
        return self.decoder(quantized.vectors, kept, size), quantized

    def encode_values(self, images: Tensor) -> tuple[Tensor, Tensor]:
        latents, summary = self.encoder(2 * images - 1)
        return self.quantizer.values(latents), summary

    def decode_values(self, values: Tensor, lengths: Tensor, size: tuple[int, int]) -> Tensor:
        kept = first(self.config.tokens, lengths)
        values = torch.where(kept[..., None] if values.ndim == 3 else kept, values, 0)
        images = self.decoder(self.quantizer.vectors(values), kept, size)
        return cast("Tensor", (images / 2 + 0.5).clamp(0, 1))

    @torch.inference_mode()
    def token_vectors(self) -> Tensor:
        form, widen = self.form, self.quantizer.widen
        if form.kind == "ids":
            every = torch.arange(form.vocabulary or 0, device=widen.weight.device)
            return self.quantizer.vectors(every[None])[0]
        ends = torch.tensor([0, 1], device=widen.weight.device)[:, None].expand(2, form.bits)
        levels = self.quantizer.levels(ends)
        return levels[..., None] * widen.weight.T + widen.bias / form.bits


def build_tokenizer(config: LatentConfig | GridConfig) -> QuantizedTokenizer[Any]:
    """A tokenizer that is not yet trained."""
    kind = TOKENIZERS.get(config.kind)
    return cast("QuantizedTokenizer[Any]", kind.build(config.model_dump(mode="json")))


class LatentTokenizer(QuantizedTokenizer[LatentConfig]):
    """Latent tokens that a transformer reads off an image, and another makes an image of.

    Sources: Yu et al., "An Image is Worth 32 Tokens", 2024 (TiTok); Miwa et al., "One-D-Piece",
    2025; AMD, "Instella-T2I", 2025. Tokens keep their order, unlike those of the first two, which
    take groups of channels for tokens.
    """

    kind: ClassVar[str] = "latent"

    def __init__(self, config: LatentConfig) -> None:
        shape = Shape(config.tokens, config.encoder.width, config.decoder.width)
        super().__init__(config, Encoder, Decoder, shape)
        self.multiple = config.multiple

    @classmethod
    def build(cls, config: Mapping[str, Any]) -> LatentTokenizer:
        return cls(build(LatentConfig, config))


def unit(images: Tensor) -> Tensor:
    """Images, uint8 or float in [0, 1], as floats in [0, 1]."""
    return images.float() / 255 if images.dtype == torch.uint8 else images
