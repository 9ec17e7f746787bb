"""Small tables, images and runs that several tests use."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from pipeline.orchestration.executor import Record, Unit, Work, attempts
from pipeline.orchestration.local_executor import LocalExecutor
from pipeline.orchestration.run import Run
from pipeline.storage.artifact import Artifact, ArtifactSource
from pipeline.storage.source import TableSource
from pipeline.storage.store import LocalStore
from pipeline.tensors import tensor_column


def pixels(rows: int, size: int = 8, channels: int = 3, seed: int = 0) -> npt.NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (rows, size, size, channels), np.uint8)


def encoded(image: npt.NDArray[np.uint8], kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    flat = image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image
    Image.fromarray(flat).save(buffer, kind, **options)
    return buffer.getvalue()


def image_table(rows: int, classes: int = 2, **options: Any) -> pa.Table:
    """Keys with a dot and a folder in them, tensors of pixels, labels."""
    return pa.table(
        {
            "key": [f"part{row % 2}/image.{row:03d}" for row in range(rows)],
            "image": tensor_column(pixels(rows, **options)),
            "label": pa.array([row % classes for row in range(rows)], pa.int64()),
        }
    )


def keyed(*sizes: int, classes: int = 2) -> TableSource:
    """Shards of the given numbers of samples, each a key and a label."""
    parts, first = [], 0
    for index, size in enumerate(sizes):
        rows = range(first, first + size)
        labels = pa.array([row % classes for row in rows], pa.int64())
        keys = pa.array([f"k{row}" for row in rows], pa.string())
        parts.append((f"{index:05d}", pa.table({"key": keys, "label": labels})))
        first += size
    return TableSource(tuple(parts), tuple(map(str, range(classes))))


def local_run(out: Path, **options: Any) -> Run:
    return Run(LocalStore(out).writing_in(".run/unfinished"), LocalExecutor(), **options)


def folder_of(made: Artifact | ArtifactSource) -> Path:
    """Where an artifact lies that a :func:`local_run` made."""
    store = (made.artifact if isinstance(made, ArtifactSource) else made).store
    assert isinstance(store, LocalStore)
    return store.root


def attempt(work: Work, unit: Unit) -> Record:
    """Do one unit, to its end."""
    (record,) = attempts(work, [unit])
    return record
