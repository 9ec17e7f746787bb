"""The images of a training, which are held in memory."""

from __future__ import annotations

import os
from typing import Literal

from pipeline.datasets import Dataset
from pipeline.errors import UsageError
from pipeline.orchestration.run import Run
from pipeline.stage import Stage
from pipeline.stages.decode import Decode
from pipeline.stages.select import Split
from pipeline.storage.artifact import ArtifactSource
from pipeline.storage.parquet import ParquetFormat


def decoded(
    run: Run, data: Dataset, part: Literal["train", "test"], decode: Decode
) -> ArtifactSource:
    """A split as pixels; where there is no test split, a part of the training samples is one."""
    source = data.test if part == "test" and data.test else data.train
    stages: list[Stage] = [decode] if data.test else [Split(part), decode]
    return run.map(part, source, stages, to=ParquetFormat())


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
