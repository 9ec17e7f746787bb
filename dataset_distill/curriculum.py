"""The curriculum of CDA: how small a crop may be as the synthesis goes on."""

from __future__ import annotations

import math
from typing import Literal


def min_scale(
    step: int,
    total: int,
    *,
    kind: Literal["step", "linear", "cosine"],
    milestone: float,
    floor: float,
) -> float:
    """Smallest area share of a random resized crop at ``step`` of ``total``.

    It starts at 1 (the whole image) and reaches ``floor`` at ``milestone * total``; ``milestone``
    0 is SRe2L, where it is ``floor`` throughout.

    Source: CDA, section 3 (step, linear and cosine schedules).
    """
    active = milestone * total
    if step >= active:
        return floor
    progress = step / active
    falling = {
        "step": 1.0,
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
    }[kind]
    return floor + (1 - floor) * falling
