"""Pixels, or other encoded bytes, to encoded bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pyarrow as pa

from pipeline.stage import ShardContext
from pipeline.stages.decode import Pixels, each_image, pixels_of, with_images
from pipeline.storage.images import MAX_PIXELS, SECONDS, Kind, encode, load_resize, resize


@dataclass(frozen=True)
class Encode:
    """Encode every image anew, upright, without metadata and as one ``kind``.

    Gray stays gray and colour colour. With ``shorter``, an image whose shorter side is longer
    than that many pixels is scaled down to it and keeps its aspect ratio; none is enlarged.
    Bytes and tensors are taken; ``image`` becomes binary. ``quality`` is 1 to 100.

    Bad images are quarantined as :class:`~pipeline.stages.decode.Decode` does; an image that is
    longer than the format can hold is ``too-large`` too.
    """

    kind: Kind
    quality: int = 90
    shorter: int | None = None
    max_pixels: int = MAX_PIXELS
    seconds: float = SECONDS

    version: ClassVar[int] = 1

    def __call__(self, table: pa.Table, context: ShardContext) -> pa.Table:
        if self.shorter:
            load_resize()
        files = [b""] * len(table)

        def put(image: bytes | Pixels, place: int) -> None:
            pixels = self._smaller(pixels_of(image, None, self.shorter, self.max_pixels))
            files[place] = encode(pixels, self.kind, self.quality)

        kept = each_image(table, context, put, self.seconds)
        return with_images(table, kept, pa.array(files[: len(kept)], pa.binary()))

    def _smaller(self, image: Pixels) -> Pixels:
        height, width = image.shape[:2]
        side = min(height, width)
        if self.shorter is None or side <= self.shorter:
            return image
        longer = round(max(height, width) * self.shorter / side)
        return resize(image, (self.shorter, longer) if height <= width else (longer, self.shorter))
