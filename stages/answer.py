"""What a classifier sees: in records of a feature codec, in images, and in its own features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from pipeline import backbones
from pipeline.backbones import Teachers
from pipeline.codecs.feature_codec import FeatureDecoder, eight_bits
from pipeline.codecs.feature_training import TrainTail
from pipeline.device import default_device, in_batches
from pipeline.labelled_images import ImageConfig, normalise
from pipeline.stage import ShardContext
from pipeline.stages.feature_codec import read_encoder
from pipeline.storage.artifact import Artifact
from pipeline.storage.models import ModelFiles
from pipeline.tensors import to_numpy


@dataclass(frozen=True)
class AnswerFeatures:
    """Put ``answer``, int32, the class that a tail sees, and ``bytes`` in the place of features.

    Args:
        codec: a trained bottleneck.
        entropy: a step that has the entropy model.
        task: of the tail's training.
        tail: what it gave.
    """

    codec: ModelFiles
    entropy: Artifact
    task: TrainTail
    tail: ModelFiles

    version: ClassVar[int] = 1
    model: ClassVar[bool] = True

    def __call__(self, table: pa.Table, context: ShardContext) -> pa.Table:
        device = default_device()
        encoder = read_encoder(self.codec, self.entropy, device)
        tail = self.task.restored(self.tail, device)
        # The tail has its own decoder: of the other side only latents are needed.
        decoder = FeatureDecoder(encoder.spec, tail.decoder, encoder.model)
        if "latents" in table.column_names:
            symbols = to_numpy(table["latents"])
            records = [encoder.record(one)[0] for one in symbols]
            latents = torch.from_numpy(symbols.astype(np.float32))
        else:
            records = table["features"].to_pylist()
            latents = decoder.latents(records)
        answers = in_batches(tail, latents.to(device)).argmax(1)
        return _answered(table, answers, list(map(len, records)))


@dataclass(frozen=True)
class AnswerImages:
    """Put ``answer``, int32, the class that a teacher sees, in the place of ``image``."""

    teacher: Teachers
    image: ImageConfig

    version: ClassVar[int] = 1
    model: ClassVar[bool] = True

    def __call__(self, table: pa.Table, context: ShardContext) -> pa.Table:
        device = default_device()
        (teacher,) = self.teacher.networks(device)
        x = normalise(to_numpy(table["image"]), self.image, device)
        return _answered(table, in_batches(teacher, x).argmax(1), table["bytes"].to_pylist())


@dataclass(frozen=True)
class AnswerInt8:
    """What a teacher sees in its own features in 8 bits, and their bytes with zstd.

    Args:
        teacher: whose features these are.
        image: what it expects.
        split: the stage that has them.
    """

    teacher: Teachers
    image: ImageConfig
    split: str

    version: ClassVar[int] = 1
    model: ClassVar[bool] = True

    def __call__(self, table: pa.Table, context: ShardContext) -> pa.Table:
        device = default_device()
        (teacher,) = self.teacher.networks(device)
        stages = backbones.in_stages(teacher)
        names = list(stages)
        first = names.index(self.split) + 1
        before = nn.Sequential(*(stages[name] for name in names[:first]))
        after = nn.Sequential(*(stages[name] for name in names[first:]))
        x = normalise(to_numpy(table["image"]), self.image, device)
        features = in_batches(before, x)
        levels, low, scale = eight_bits(features, (2, 3))
        coded = levels.to(torch.uint8).cpu().numpy()
        ends = 8 * coded.shape[1]  # two float32 of each channel
        sizes = [len(pa.compress(one.tobytes(), "zstd", asbytes=True)) + ends for one in coded]
        answers = in_batches(after, levels * scale + low).argmax(1)
        return _answered(table, answers, sizes)


def _answered(table: pa.Table, answers: Tensor, sizes: list[int]) -> pa.Table:
    kept = table.select([name for name in ("key", "label") if name in table.column_names])
    kept = kept.append_column("answer", pa.array(answers.cpu().numpy().astype(np.int32)))
    return kept.append_column("bytes", pa.array(sizes, pa.int32()))
