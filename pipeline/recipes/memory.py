"""What a training holds in memory."""

from __future__ import annotations

import os

from pipeline.errors import UsageError


def check_memory(what: str, images: int, size: int, channels: int, hint: str) -> None:
    """Refuse a training whose images do not fit in this machine's memory.

    Args:
        what: is trained, as in "a teacher".
        images: how many there are.
        size: their side, pixels.
        channels: of each.
        hint: what to do about it.

    Raises:
        UsageError: they do not fit.
    """
    # The samples, and the network's view of them.
    needed = 2 * images * size**2 * channels
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise UsageError(
            f"To train {what}, all images are held in memory: {needed / 1e9:,.0f} GB at "
            f"{size} x {size} pixels, and this machine has {memory / 1e9:,.0f} GB.",
            hint=hint,
            code="small-memory",
        )
