"""How many tokens each image gets.

Two questions have two answers. For the least mean error at a mean number of bytes, a further token
is worth the same on every image (:func:`lagrangian`). For a quality that every image is to have,
each gets the fewest tokens that reach it (:func:`threshold`), and the mean error is then worse than
that of one length for all, since tokens are spent on images that gain little by them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.errors import UsageError
from pipeline.tokenizers.predictor import CurvePredictor
from pipeline.tokenizers.quality import decoded_curves
from pipeline.tokenizers.tokenizer import Tokenizer
from pipeline.tokenizers.tokens import TokenForm, Tokens

CANDIDATES = 16
"""Lengths to choose from, at most: four bits say which."""
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LengthRule:
    """How many tokens an image gets.

    Attributes:
        kind: ``fixed``, ``lagrangian`` or ``threshold``.
        value: of a fixed rule the number of tokens; the price of a byte, or the largest mean
            squared error of pixels in [0, 1].
        candidates: lengths to choose from, unless the rule is fixed.
        predicted: whether errors are predicted from the encoder's pass rather than measured, for
            which images are decoded once for each candidate.
    """

    kind: Literal["fixed", "lagrangian", "threshold"]
    value: float
    candidates: tuple[int, ...] = ()
    predicted: bool = False

    def lengths(
        self,
        tokenizer: Tokenizer,
        predictor: CurvePredictor | None,
        images: Tensor,
        tokens: Tokens,
        summary: Tensor,
    ) -> Tensor:
        """Lengths int64 (n,) of images, of which tokens and summary are known already."""
        if self.kind == "fixed":
            return tokens.lengths.new_full((len(tokens),), int(self.value))
        if predictor is not None:
            errors = predictor.curves(summary)
        else:
            errors = decoded_curves(tokenizer, images, tokens, self.candidates)
        places = self.places(errors.double().cpu().numpy(), tokens.form)
        return torch.tensor(self.candidates, device=tokens.lengths.device)[
            torch.from_numpy(places).to(tokens.lengths.device)
        ]

    def places(self, errors: Floats, form: TokenForm) -> npt.NDArray[np.int64]:
        """Place (n,) of each image's length among the candidates, from errors (n, G)."""
        if self.kind == "threshold":
            return threshold(errors, self.value)
        return lagrangian(errors, byte_costs(form, self.candidates), self.value)


def candidates(most: int) -> list[int]:
    """Lengths to choose from, about evenly spaced by ratio: from 1 to all tokens."""
    spaced = np.rint(np.geomspace(1, most, CANDIDATES)).astype(int)
    return sorted({*spaced.tolist(), 1, most})


def byte_costs(form: TokenForm, lengths: Sequence[int]) -> Floats:
    """Bytes of an image of each length, with the bytes that say how long it is."""
    return np.array([form.bytes_of(k) + length_bytes(form) for k in lengths], np.float64)


def length_bytes(form: TokenForm) -> int:
    """Bytes that say how many tokens an image has."""
    return 1 if form.max_tokens < 256 else 2


def lagrangian(errors: Floats, costs: Floats, multiplier: float) -> npt.NDArray[np.int64]:
    """Place (n,) in the curves where error + multiplier * cost is least; of equals the cheapest.

    Curves need not fall: more tokens make many an image worse.

    Args:
        errors: (n, G).
        costs: (G,), rising.
        multiplier: price of a unit of cost.
    """
    return np.asarray((errors + multiplier * costs).argmin(1), np.int64)


def multiplier_for(errors: Floats, costs: Floats, budget: float) -> float:
    """The smallest multiplier, to 50 bits, with which the mean cost is at most ``budget``.

    Raises:
        UsageError: the fewest tokens cost more.
    """
    if budget < costs[0]:
        raise UsageError(
            f"No image has fewer than {costs[0]:g} bytes, and {budget:g} were asked for.",
            hint="Ask for more bytes a sample, or train a tokenizer with fewer bits a token.",
            code="budget-too-small",
        )

    def fits(multiplier: float) -> bool:
        return bool(costs[lagrangian(errors, costs, multiplier)].mean() <= budget)

    if fits(0.0):
        return 0.0
    low, high = 0.0, 1e-12
    while not fits(high):
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def threshold(errors: Floats, most: float) -> npt.NDArray[np.int64]:
    """First place (n,) in each curve with an error of at most ``most``, else that of the least."""
    good = errors <= most
    return np.asarray(np.where(good.any(1), good.argmax(1), errors.argmin(1)), np.int64)


def threshold_for(errors: Floats, costs: Floats, budget: float) -> float:
    """The largest error allowed to every image with which the mean cost is about ``budget``."""
    low, high = float(np.log(errors.min())), float(np.log(errors.max()))
    for _ in range(40):
        middle = (low + high) / 2
        cost = costs[threshold(errors, float(np.exp(middle)))].mean()
        low, high = (middle, high) if cost > budget else (low, middle)
    return float(np.exp(high))
