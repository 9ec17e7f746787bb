"""What a tokenizer's images and bits are worth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.codecs.codebook import usage
from pipeline.device import BATCH
from pipeline.tokenizers.tokenizer import Tokenizer, unit
from pipeline.tokenizers.tokens import Tokens

_DEAD = 0.1
_COPY = 0.9


def grid(most: int) -> list[int]:
    """The lengths that are looked at: powers of two, and all tokens."""
    powers = [1 << n for n in range(most.bit_length()) if 1 << n < most]
    return [*powers, most]


def squared_errors(images: Tensor, decoded: Tensor) -> Tensor:
    """Mean squared error of each image (n,), of pixels in [0, 1]."""
    return (unit(images) - decoded).square().flatten(1).mean(1)


def psnr(errors: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB from mean squared errors of pixels in [0, 1]."""
    return -10 * errors.clamp_min(1e-10).log10()


@torch.inference_mode()
def decoded_curves(
    tokenizer: Tokenizer, images: Tensor, tokens: Tokens, lengths: Sequence[int]
) -> Tensor:
    """Mean squared errors float32 (n, G) of images seen through so many of their first tokens."""
    size = (images.shape[2], images.shape[3])
    errors = [squared_errors(images, tokenizer.decode(tokens.cut(k), size)) for k in lengths]
    return torch.stack(errors, 1)


def error_curves(tokenizer: Tokenizer, images: Tensor, lengths: Sequence[int]) -> Tensor:
    """:func:`decoded_curves` of any number of images, each of which is encoded once."""
    parts = torch.split(images, BATCH)
    return torch.cat([decoded_curves(tokenizer, p, tokenizer.encode(p), lengths) for p in parts])


def bit_health(tokens: Tokens) -> dict[str, float]:
    """What the bits of n images are worth; entropy by itself is reached by copies of one bit.

    Returns:
        ``entropy``: mean of a bit's entropy, in bits; ``dead``: share of bits with less than 0.1;
        ``copies``: share of bits that another follows, or contradicts, with a correlation above
        0.9; ``effective``: how many independent bits would spread as these do, (sum of the
        eigenvalues of their correlations)^2 / sum of squares; ``bits``: of an image.
    """
    bits = tokens.bits.flatten(1).double()
    share = bits.mean(0)
    inside = share.clamp(1e-12, 1 - 1e-12)
    entropy = -(inside * inside.log2() + (1 - inside) * (1 - inside).log2())
    moving = (share > 0) & (share < 1)
    centred = (bits - share)[:, moving]
    scaled = centred / centred.norm(dim=0)
    squared = (scaled.T @ scaled).square()
    copies = int((squared.fill_diagonal_(0) > _COPY**2).any(0).sum())
    spread = squared.sum() + len(squared)
    return {
        "entropy": float(entropy.mean()),
        "dead": float((entropy < _DEAD).double().mean()),
        "copies": copies / bits.shape[1],
        "effective": float(len(squared) ** 2 / spread) if len(squared) else 0.0,
        "bits": float(bits.shape[1]),
    }


def health(tokens: Tokens) -> dict[str, float]:
    """:func:`bit_health`, and for ids their use as well."""
    found, vocabulary = bit_health(tokens), tokens.form.vocabulary
    if tokens.form.kind == "bits" or vocabulary is None:
        return found
    return found | usage(torch.bincount(tokens.values.flatten(), minlength=vocabulary).cpu())
