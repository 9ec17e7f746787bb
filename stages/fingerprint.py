"""Digests and hashes that tell whether two samples show the same picture."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.pruning.perceptual_hash import SIDE, perceptual_hashes, thumbnail
from pipeline.stage import ShardContext
from pipeline.stages.decode import Pixels, each_image, pixels_of
from pipeline.storage.images import MAX_PIXELS, SECONDS
from pipeline.tensors import is_tensor


@dataclass(frozen=True)
class Sizes:
    """Put ``bytes``, the size of each image as it is stored, in the place of ``image``."""

    version: ClassVar[int] = 1

    def __call__(self, table: pa.Table, context: ShardContext) -> pa.Table:
        column = table["image"]
        index = table.schema.get_field_index("image")
        if is_tensor(column.type):
            sizes = pa.array(np.full(len(table), int(np.prod(column.type.shape))), pa.int64())
        else:
            sizes = pc.cast(pc.binary_length(column), pa.int64())
        others = table.remove_column(index)
        names = [name for name in ("key", "label") if name in others.column_names]
        return others.select(names).append_column("bytes", sizes)


@dataclass(frozen=True)
class Fingerprint:
    """Add to what :class:`Sizes` gives what tells whether two samples show the same picture.

    ``pixels`` is the SHA-256 of the size and the upright pixels, of three channels; so a gray
    picture is the same as a coloured one without colour. ``hash`` and ``mirrored`` are perceptual
    hashes, uint64, of the picture and its mirror image; ``told`` is false where a picture is so
    plain that these say nothing. Bad images are quarantined as
    :class:`~pipeline.stages.decode.Decode` does.
    """

    max_pixels: int = MAX_PIXELS
    seconds: float = SECONDS

    version: ClassVar[int] = 1

    def __call__(self, table: pa.Table, context: ShardContext) -> pa.Table:
        digests = [b""] * len(table)
        small = np.zeros((len(table), SIDE, SIDE), np.float32)

        def put(image: bytes | Pixels, place: int) -> None:
            pixels = np.ascontiguousarray(pixels_of(image, 3, None, self.max_pixels))
            shape = f"{pixels.shape[0]}x{pixels.shape[1]}:".encode()
            digests[place] = hashlib.sha256(shape + pixels.tobytes()).digest()
            small[place] = thumbnail(pixels)

        kept = each_image(table, context, put, self.seconds)
        made = Sizes()(table.take(pa.array(kept, pa.int64())), context)
        plain, mirrored, told = perceptual_hashes(small[: len(kept)])
        columns = {
            "pixels": pa.array(digests[: len(kept)], pa.binary(32)),
            "hash": pa.array(plain, pa.uint64()),
            "mirrored": pa.array(mirrored, pa.uint64()),
            "told": pa.array(told, pa.bool_()),
        }
        for name, column in columns.items():
            made = made.append_column(name, column)
        return made
