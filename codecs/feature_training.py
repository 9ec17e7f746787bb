"""Training of a feature codec: to mimic a teacher in few bits, then a tail for a task."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, cast

import pyarrow as pa
import torch
from safetensors.torch import load
from torch import Tensor, nn

from pipeline import backbones
from pipeline.backbones import Teachers
from pipeline.codecs.feature_codec import (
    Bottleneck,
    FeatureCodecConfig,
    FeatureSpec,
    plan,
    read_spec,
)
from pipeline.config import TrainConfig
from pipeline.device import in_batches
from pipeline.digest import seed_for
from pipeline.errors import UsageError
from pipeline.labelled_images import (
    ImageConfig,
    LabelledImages,
    accuracy,
    augmented_batch,
    task_loss,
)


class Files(Protocol):
    """The two files of a fitted model; ``identity`` is their digest."""

    @property
    def identity(self) -> str: ...
    def read(self) -> tuple[bytes, bytes]:
        """Specification and weights."""


@dataclass(frozen=True)
class Mimic:
    """Train encoder, prior and decoder: features as the teacher's, in few bits. No label is used.

    The loss of an image is the sum of squared differences of the features and of all that the
    teacher's later stages make of them, and ``beta`` times its bits. Source: Matsubara et al., "SC2
    Benchmark: Supervised Compression for Split Computing", 2023.

    Args:
        teacher: whose features are wanted.
        image: what it expects.
        codec: shapes.
        beta: weight of a bit; without one, latents take 8 bits each between the least and the
            largest of their image, and fewer channels are what makes fewer bytes ("channel
            reduction and bottleneck quantization" of that benchmark).
        train: of the bottleneck.
        given: one that was trained before, which is measured and stays as it is.
    """

    teacher: Teachers
    image: ImageConfig
    codec: FeatureCodecConfig
    beta: float | None
    train: TrainConfig
    given: Files | None = None

    version: ClassVar[int] = 1

    @property
    def workers(self) -> int:
        return 1 if self.given else self.train.workers

    def prepare(
        self, inputs: Mapping[str, pa.Table], seed: int, device: torch.device
    ) -> MimicTraining:
        (teacher,) = self.teacher.networks(torch.device("cpu"))
        model, size = self.image.model_spec("", 0), self.image.size
        spec = plan(teacher, self.codec, model, size, eight_bit=self.beta is None)
        teacher = copy.deepcopy(teacher).to(device)
        sets = {name: LabelledImages.of(t, self.image, device) for name, t in inputs.items()}
        if self.given is None:
            return MimicTraining(Bottleneck(spec).to(device), teacher, self, spec, sets, seed)
        about, weights = self.given.read()
        if (found := read_spec(about)) != spec:
            raise UsageError(
                f"The encoder makes features of {found.features} for the stage '{found.split}', "
                f"and this teacher has {spec.features} in '{spec.split}'.",
                hint="Choose the teacher, the split and the image size that it was trained for.",
                code="other-codec",
            )
        done = replace(self, train=self.train.model_copy(update={"epochs": 0}))
        bottleneck = Bottleneck.load(about, weights).to(device)
        return MimicTraining(bottleneck, teacher, done, spec, sets, seed)


@dataclass(frozen=True)
class MimicTraining:
    """A bottleneck's training."""

    model: Bottleneck
    teacher: nn.Module
    task: Mimic
    spec: FeatureSpec
    sets: Mapping[str, LabelledImages]
    seed: int

    @property
    def config(self) -> TrainConfig:
        return self.task.train

    @property
    def steps(self) -> int:
        return self.sets["train"].steps(self.config.batch_size) if "train" in self.sets else 0

    def batch(self, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        size, image = self.config.batch_size, self.task.image
        x, _ = augmented_batch(self.sets["train"], image, size, self.seed, epoch, index)
        generator = torch.Generator().manual_seed(seed_for(self.seed, "noise", epoch, index))
        noise = torch.rand(len(x), *self.spec.latents, generator=generator) - 0.5
        return x, noise.to(x.device)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, noise = batch
        if self.task.beta is None:
            # 256 levels are so fine that they can wait until the end.
            return self._distortion(x, self.model.decoder(self.model.encoder(x))) / len(x)
        noisy = self.model.encoder(x) + noise
        distortion = self._distortion(x, self.model.decoder(noisy))
        # A likelihood is a difference of numbers that may be near 1.
        with torch.autocast(x.device.type, enabled=False):
            bits = self.model.prior.bits(noisy.float())
        return (distortion + self.task.beta * bits) / len(x)

    def evaluate(self) -> dict[str, Any]:
        """Of stored latents: bytes of an image, and accuracy by the teacher's tail."""
        data = self.sets["test"]

        def look(rows: Tensor) -> Tensor:
            x = data.images.take(rows)
            latents = self.model(x)
            features = self.model.decoder(latents)
            answers = self._after(features)[-1].argmax(1) == data.labels[rows]
            return torch.stack([self._bits(latents), answers.float()], 1)

        found = in_batches(look, torch.arange(len(data), device=data.labels.device)).double()
        bits, hits = found.mean(0).tolist()
        return {"bytes": bits / 8, "accuracy": 100 * hits, "images": len(data)}

    def _bits(self, latents: Tensor) -> Tensor:
        """Of each image's stored latents."""
        if self.spec.eight_bit:
            ends = 64  # two float32
            return latents.new_full((len(latents),), 8 * latents[0].numel() + ends)
        flat = latents.float().flatten(2).permute(1, 0, 2)
        bits = -self.model.prior.likelihood(flat.flatten(1)).log2()
        return bits.view(flat.shape).sum((0, 2))

    def _after(self, features: Tensor) -> list[Tensor]:
        """Features, and what each later stage of the teacher makes of them; the last are logits."""
        stages = backbones.in_stages(self.teacher)
        names = list(stages)
        found = [features]
        for name in names[names.index(self.spec.split) + 1 :]:
            found.append(stages[name](found[-1]))
        return found

    def _distortion(self, x: Tensor, features: Tensor) -> Tensor:
        stages = backbones.in_stages(self.teacher)
        with torch.no_grad():
            wanted = x
            for name, stage in stages.items():
                wanted = stage(wanted)
                if name == self.spec.split:
                    break
            targets = self._after(wanted)[:-1]
        given = self._after(features)[:-1]
        pairs = zip(given, targets, strict=True)
        return cast("Tensor", sum((a - b).float().square().sum() for a, b in pairs))


class Tail(nn.Module):
    """A decoder, and the stages of a classifier that follow.

    Shapes: latents (N, C, h, w) -> (N, classes).
    """

    def __init__(self, decoder: nn.Module, stages: nn.Module) -> None:
        super().__init__()
        self.decoder, self.stages = decoder, stages

    def forward(self, latents: Tensor) -> Tensor:
        return cast("Tensor", self.stages(self.decoder(latents)))


def tail_of(network: nn.Module, spec: FeatureSpec, decoder: nn.Module) -> Tail:
    """A copy of what a classifier does behind the split, behind a copy of a decoder."""
    stages = backbones.in_stages(copy.deepcopy(network))
    names = list(stages)
    after = [stages[name] for name in names[names.index(spec.split) + 1 :]]
    return Tail(copy.deepcopy(decoder), nn.Sequential(*after)).requires_grad_(requires_grad=True)


@dataclass(frozen=True)
class TailSpec:
    """Where the classifier was split whose last stages a tail has."""

    split: str


@dataclass(frozen=True)
class TrainTail:
    """Train decoder and tail on stored latents; the encoder and its prior stay as they are.

    Args:
        teacher: where the tail begins, and whose answers are half of the loss.
        image: what it expects.
        codec: the trained bottleneck.
        train: of decoder and tail.
        distillation: share of the loss that is of the teacher's answers.
    """

    teacher: Teachers
    image: ImageConfig
    codec: Files
    train: TrainConfig
    distillation: float

    version: ClassVar[int] = 1

    @property
    def workers(self) -> int:
        return self.train.workers

    def parts(self, device: torch.device) -> tuple[nn.Module, FeatureSpec, Bottleneck, Tail]:
        """Teacher, specification, bottleneck, and the tail before training."""
        (teacher,) = self.teacher.networks(device)
        about, weights = self.codec.read()
        spec = read_spec(about)
        bottleneck = Bottleneck.load(about, weights).to(device)
        return teacher, spec, bottleneck, tail_of(teacher, spec, bottleneck.decoder).to(device)

    def restored(self, files: Files, device: torch.device) -> Tail:
        """The trained tail from its files, as it stays."""
        tail = self.parts(device)[-1]
        tail.load_state_dict(load(files.read()[1]))
        return tail.eval().requires_grad_(requires_grad=False)

    def prepare(
        self, inputs: Mapping[str, pa.Table], seed: int, device: torch.device
    ) -> TailTraining:
        teacher, spec, bottleneck, tail = self.parts(device)
        sets = {name: LabelledImages.of(t, self.image, device) for name, t in inputs.items()}
        return TailTraining(tail, teacher, bottleneck, spec.split, self, sets, seed)


@dataclass(frozen=True)
class TailTraining:
    """A tail's training."""

    model: Tail
    teacher: nn.Module
    bottleneck: Bottleneck
    split: str
    task: TrainTail
    sets: Mapping[str, LabelledImages]
    seed: int

    @property
    def spec(self) -> TailSpec:
        return TailSpec(self.split)

    @property
    def config(self) -> TrainConfig:
        return self.task.train

    @property
    def steps(self) -> int:
        return self.sets["train"].steps(self.config.batch_size)

    def batch(self, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        size, image = self.config.batch_size, self.task.image
        return augmented_batch(self.sets["train"], image, size, self.seed, epoch, index)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, labels = batch
        with torch.no_grad():
            latents = self.bottleneck(x)
        return task_loss(self.model(latents), labels, self.teacher, x, self.task.distillation)

    def evaluate(self) -> dict[str, Any]:
        return accuracy(nn.Sequential(self.bottleneck, self.model), self.sets["test"])
