"""How a teacher's logits are stored: exactly enough, in few bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from pipeline.config import Config
from pipeline.dataset_distill.config import RelabelConfig
from pipeline.errors import UsageError
from pipeline.terminal import parse_bytes

Arrays = Mapping[str, npt.NDArray[Any]]
SEED_BYTES = 12
"""Of each image: all its views are drawn from one number of 8 bytes; the rest is for framing."""


class LabelCodec(Config):
    """Logits (N, V, C) as arrays of N rows, and back.

    ``float16`` rounds each logit to 11 bits. ``int8`` and ``int4`` lay 256 or 16 levels over the
    range of each view's logits: the error is at most half a level, range / 510 or range / 30, and
    float16's of the range. ``top-k`` keeps the k largest, in 256 levels, and one number from which
    all others are taken to be equal and to have, at ``temperature``, the mass that they had.
    """

    kind: Literal["float16", "int8", "int4", "top-k"] = "float16"
    top_k: int = Field(default=50, ge=1)
    temperature: float = Field(default=20.0, gt=0, description="of the tail's mass")

    def bytes_a_view(self, classes: int) -> int:
        """Bytes of one view's logits, before entropy coding."""
        kept = min(self.top_k, classes)
        return {
            "float16": 2 * classes,
            "int8": classes + 4,
            "int4": (classes + 1) // 2 + 4,
            "top-k": kept * (1 + _index_type(classes).itemsize) + 6,
        }[self.kind]

    def encode(self, logits: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """Logits (N, V, C) as arrays by name, each (N, V, ...)."""
        x = np.asarray(logits, np.float32)
        if self.kind == "float16":
            return {"logits": x.astype(np.float16)}
        if self.kind == "top-k":
            return self._top(x)
        levels, ends = _levels(x, 255 if self.kind == "int8" else 15)
        return {"logits": levels if self.kind == "int8" else _packed(levels), "range": ends}

    def decode(self, arrays: Arrays, classes: int) -> npt.NDArray[np.float32]:
        """Logits (..., C) from arrays that :meth:`encode` gave, or from rows of them."""
        stored = arrays["logits"]
        if self.kind == "float16":
            return np.asarray(stored, np.float32)
        if self.kind == "int8":
            return _values(stored, arrays["range"], 255)
        if self.kind == "int4":
            return _values(_unpacked(stored, classes), arrays["range"], 15)
        tail = arrays["tail"].astype(np.float32)[..., None]
        x = np.repeat(tail, classes, -1)
        np.put_along_axis(
            x, arrays["classes"].astype(np.int64), _values(stored, arrays["range"], 255), -1
        )
        return x

    def _top(self, x: npt.NDArray[np.float32]) -> dict[str, npt.NDArray[Any]]:
        classes = x.shape[-1]
        kept = min(self.top_k, classes)
        order = np.argsort(-x, axis=-1, kind="stable")
        # By class: neighbours that follow one another are coded in fewer bits.
        chosen, rest = np.sort(order[..., :kept], -1), order[..., kept:]
        levels, ends = _levels(np.take_along_axis(x, chosen, -1), 255)
        tail = np.zeros(x.shape[:-1], np.float32)
        if rest.shape[-1]:
            low = np.take_along_axis(x, rest, -1)
            top = low.max(-1, keepdims=True)
            mass = np.exp((low - top) / self.temperature).mean(-1)
            tail = top[..., 0] + self.temperature * np.log(mass)
        return {
            "logits": levels,
            "range": ends,
            "classes": chosen.astype(_index_type(classes)),
            "tail": tail.astype(np.float16),
        }


def _index_type(classes: int) -> np.dtype[Any]:
    return np.dtype(np.uint8 if classes <= 2**8 else np.uint16 if classes <= 2**16 else np.uint32)


def _levels(x: npt.NDArray[np.float32], most: int) -> tuple[npt.NDArray[np.uint8], Any]:
    """Numbers of levels, and the range (..., 2) float16 that they divide; it holds all values."""
    ends = np.stack([x.min(-1), x.max(-1)], -1)
    rounded = ends.astype(np.float16)
    outwards = np.nextafter(rounded, np.array([-np.inf, np.inf], np.float16))
    inside = np.stack([rounded[..., 0] > ends[..., 0], rounded[..., 1] < ends[..., 1]], -1)
    rounded = np.where(inside, outwards, rounded)
    low, high = (rounded[..., side, None].astype(np.float32) for side in (0, 1))
    step = np.maximum(high - low, np.finfo(np.float32).tiny) / most
    return np.rint((x - low) / step).clip(0, most).astype(np.uint8), rounded


def _values(levels: npt.NDArray[Any], ends: npt.NDArray[Any], most: int) -> npt.NDArray[np.float32]:
    low, high = (ends[..., side, None].astype(np.float32) for side in (0, 1))
    return (low + levels.astype(np.float32) * ((high - low) / most)).astype(np.float32)


def _packed(levels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    if levels.shape[-1] % 2:
        levels = np.concatenate([levels, np.zeros_like(levels[..., :1])], -1)
    return np.asarray(levels[..., ::2] << 4 | levels[..., 1::2], np.uint8)


def _unpacked(pairs: npt.NDArray[np.uint8], classes: int) -> npt.NDArray[np.uint8]:
    both = np.stack([pairs >> 4, pairs & 15], -1)
    return both.reshape(*pairs.shape[:-1], -1)[..., :classes]


def plan_labels(
    config: RelabelConfig, temperature: float, images: int, classes: int
) -> tuple[LabelCodec, int]:
    """The codec and the number of views that are stored.

    With a budget, the most exact codec with which all views fit; if there is none, the smallest
    with as many views as fit: views are drawn independently, so the first ones are a random choice
    (LPLD prunes at random too), and more of them are worth more than exact ones.

    Args:
        config: of the labels.
        temperature: that students use.
        images: N.
        classes: C.

    Raises:
        UsageError: not even one view of every image fits.
    """
    given = LabelCodec(kind=config.codec, top_k=config.top_k, temperature=temperature)
    if config.budget is None:
        return given, config.views
    room = parse_bytes(config.budget) // max(images, 1) - SEED_BYTES
    tried = [given.model_copy(update={"kind": kind}) for kind in _KINDS]
    for codec in tried:
        if codec.bytes_a_view(classes) * config.views <= room:
            return codec, config.views
    smallest = min(tried, key=lambda codec: codec.bytes_a_view(classes))
    views = room // smallest.bytes_a_view(classes)
    if views < 1:
        raise UsageError(
            f"A label budget of {config.budget} does not hold one view of each of {images:,} "
            f"images with {classes:,} classes.",
            hint=f"Give at least {label_bytes(smallest, 1, images, classes):,} bytes, or lower "
            "--ipc or relabel.top_k.",
            code="small-budget",
        )
    return smallest, views


_KINDS: tuple[Literal["float16", "int8", "int4", "top-k"], ...] = (
    "float16",
    "int8",
    "int4",
    "top-k",
)


def label_bytes(codec: LabelCodec, views: int, images: int, classes: int) -> int:
    """Bytes of a label store before entropy coding, which takes none to speak of more."""
    return images * (views * codec.bytes_a_view(classes) + SEED_BYTES)
