"""Images to tokens, and how well few tokens show an image."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.device import default_device
from pipeline.stage import ShardContext
from pipeline.storage.models import ModelFiles
from pipeline.tensors import tensor_column
from pipeline.tokenizers.lengths import LengthRule
from pipeline.tokenizers.predictor import CurvePredictor, load_predictor
from pipeline.tokenizers.quality import decoded_curves
from pipeline.tokenizers.tokenizer import Tokenizer, load_tokenizer
from pipeline.tokenizers.training import pictures

Views = Literal["center", "10crop"]
BATCH = 64
TEN_CROP = 1.1
"""Side of what ten crops are cut from, in sides of a crop (LlamaGen's)."""


@lru_cache(maxsize=2)
def read_tokenizer(files: ModelFiles, device: torch.device) -> Tokenizer:
    """The tokenizer in evaluation mode; one copy a process and device."""
    return load_tokenizer(*files.read(), str(files.store)).to(device)


@lru_cache(maxsize=2)
def read_predictor(files: ModelFiles, device: torch.device) -> CurvePredictor:
    """The predictor in evaluation mode; one copy a process and device."""
    return load_predictor(*files.read()).to(device)


@dataclass(frozen=True)
class Measure:
    """Put ``summary`` (D,) and ``curve`` (G,), both float32 tensors, in the place of ``image``.

    The curve has the mean squared errors of the image seen through its first tokens, the summary is
    what the encoder says of it.

    Args:
        tokenizer: that makes the tokens.
        lengths: G numbers of tokens.
    """

    tokenizer: ModelFiles
    lengths: tuple[int, ...]

    version: ClassVar[int] = 1
    model: ClassVar[bool] = True

    def __call__(self, table: pa.Table, context: ShardContext) -> pa.Table:
        device = default_device()
        tokenizer = read_tokenizer(self.tokenizer, device)
        summaries, curves = [], []
        for batch in torch.split(pictures(table), BATCH):
            images = batch.to(device)
            tokens, summary = tokenizer.describe(images)
            summaries.append(summary.float().cpu())
            curves.append(decoded_curves(tokenizer, images, tokens, self.lengths).cpu())
        table = table.remove_column(table.schema.get_field_index("image"))
        for name, parts in (("summary", summaries), ("curve", curves)):
            table = table.append_column(name, tensor_column(torch.cat(parts).numpy()))
        return table


@dataclass(frozen=True)
class Tokenize:
    """Put the tokens of an image's views in its place.

    New columns: ``tokens``, a uint8 tensor (V, bytes) of packed tokens with zeros behind the last,
    and ``length``, a uint16 tensor (V,), how many there are.

    Args:
        tokenizer: that makes them.
        rule: how many tokens an image gets.
        views: ``center``, the image as it comes in, or ``10crop``, the corners and the middle, and
            these mirrored; V is 1 or 10.
        size: side of a view in pixels.
        predictor: of error curves, where the rule asks it.
    """

    tokenizer: ModelFiles
    rule: LengthRule
    views: Views
    size: int
    predictor: ModelFiles | None = None

    version: ClassVar[int] = 1
    model: ClassVar[bool] = True

    def __call__(self, table: pa.Table, context: ShardContext) -> pa.Table:
        device = default_device()
        tokenizer = read_tokenizer(self.tokenizer, device)
        predictor = read_predictor(self.predictor, device) if self.predictor else None
        form = tokenizer.form
        views = views_of(pictures(table), self.views, self.size)
        packed = np.zeros((len(views), form.bytes_of(form.max_tokens)), np.uint8)
        lengths = np.zeros(len(views), np.uint16)
        for start in range(0, len(views), BATCH):
            images = views[start : start + BATCH].to(device)
            count = len(images)
            # Sums of floats depend on the size of a batch: all have the same.
            images = torch.cat([images, images[:1].expand(BATCH - count, -1, -1, -1)])
            tokens, summary = tokenizer.describe(images)
            tokens = tokens.cut(self.rule.lengths(tokenizer, predictor, images, tokens, summary))
            for row, data in enumerate(tokens.pack()[:count], start):
                packed[row, : len(data)] = np.frombuffer(data, np.uint8)
            lengths[start : start + count] = tokens.lengths[:count].cpu().numpy()
        count = len(views) // max(len(table), 1)
        context.metrics["tokens"] = int(lengths.sum())
        context.metrics["token_bytes"] = sum(form.bytes_of(k) for k in lengths.tolist())
        table = table.remove_column(table.schema.get_field_index("image"))
        shape = (len(table), count)
        tensors: dict[str, npt.NDArray[Any]] = {
            "tokens": packed.reshape(*shape, packed.shape[1]),
            "length": lengths.reshape(shape),
        }
        for name, values in tensors.items():
            table = table.append_column(name, tensor_column(values))
        return table


def decoded_size(views: Views, size: int) -> int:
    """Side, in pixels, of the square that views of ``size`` are cut from."""
    return size if views == "center" else round(TEN_CROP * size)


def views_of(images: Tensor, views: Views, size: int) -> Tensor:
    """Views (n * V, C, size, size) of images (n, C, S, S), those of one image after the other."""
    if views == "center":
        return images
    far = images.shape[2] - size
    near = far // 2
    places = [(0, 0), (0, far), (far, 0), (far, far), (near, near)]
    crops = [images[:, :, top : top + size, left : left + size] for top, left in places]
    crops += [crop.flip(3) for crop in crops]
    return torch.stack(crops, 1).flatten(0, 1)


@dataclass(frozen=True)
class Reconstruct:
    """Add ``decoded``, a uint8 tensor (G, H, W, C): the image seen through its first tokens.

    Args:
        tokenizer: that makes the tokens.
        lengths: G numbers of tokens.
    """

    tokenizer: ModelFiles
    lengths: tuple[int, ...]

    version: ClassVar[int] = 1
    model: ClassVar[bool] = True

    def __call__(self, table: pa.Table, context: ShardContext) -> pa.Table:
        device = default_device()
        tokenizer = read_tokenizer(self.tokenizer, device)
        images = pictures(table).to(device)
        tokens, size = tokenizer.encode(images), (images.shape[2], images.shape[3])
        seen = torch.stack([tokenizer.decode(tokens.cut(k), size) for k in self.lengths], 1)
        pixels = (seen * 255).round().to(torch.uint8).permute(0, 1, 3, 4, 2).contiguous()
        return table.append_column("decoded", tensor_column(pixels.cpu().numpy()))
