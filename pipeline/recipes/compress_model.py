"""A classifier in few bytes: its weights as low-rank vectors of a codebook (LR²VQ)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import reduce
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from pipeline.codecs.coded_model import from_arrays, size_of, spread, to_arrays
from pipeline.codecs.compress import Compress
from pipeline.codecs.low_rank_vq import (
    CodeConfig,
    CodedLayer,
    Curve,
    choose_widths,
    error_curves,
    plan_layers,
)
from pipeline.config import Config, TrainConfig, merge, preset_of
from pipeline.dataset_distill.config import SqueezeConfig
from pipeline.datasets import Dataset
from pipeline.errors import UsageError
from pipeline.labelled_images import ImageConfig
from pipeline.orchestration.rounds import OneRound
from pipeline.orchestration.run import Run
from pipeline.recipes import Recipe
from pipeline.recipes.compress_report import report
from pipeline.recipes.distill_config import UNKNOWN, teacher_defaults
from pipeline.recipes.teacher import portable, teacher_task
from pipeline.recipes.training_images import check_memory, decoded
from pipeline.stages.decode import Decode
from pipeline.storage.array_artifact import FILE, read_arrays
from pipeline.storage.artifact import Artifact, ArtifactSource
from pipeline.storage.models import UNIT, FittedModels, ModelFiles, read_model, read_spec

Arrays = Mapping[str, npt.NDArray[Any]]
Preset = Literal["small", "resnet18-29x", "resnet18-43x", "resnet50-19x", "resnet50-31x"]
_FINE = {"epochs": 9, "batch_size": 128, "lr": 1e-3, "weight_decay": 0.0}
_IMAGENET = {"low_rank": _FINE | {"epochs": 3}, "codes": _FINE}
PRESETS: Mapping[str, dict[str, Any]] = {
    "small": {"low_rank": _FINE | {"epochs": 3}, "codes": _FINE},
    # Sub-vectors, codes and epochs of PQF's settings, to whose sizes LR²VQ is compared.
    "resnet18-29x": _IMAGENET
    | {"code": {"k": 256, "m": 9, "m_pointwise": 4, "m_linear": 4, "k_linear": 2048}},
    "resnet18-43x": _IMAGENET
    | {"code": {"k": 256, "m": 18, "m_pointwise": 4, "m_linear": 4, "k_linear": 2048}},
    "resnet50-19x": _IMAGENET
    | {"code": {"k": 256, "m": 9, "m_pointwise": 4, "m_linear": 4, "k_linear": 1024}},
    "resnet50-31x": _IMAGENET
    | {"code": {"k": 256, "m": 18, "m_pointwise": 8, "m_linear": 4, "k_linear": 1024}},
}


class CompressConfig(Config):
    """Configuration of the recipe ``compress-model``."""

    preset: Preset = Field(
        default="small",
        description="whose settings are the defaults; every one can be set by itself",
    )
    image: ImageConfig = ImageConfig()
    teacher: SqueezeConfig = SqueezeConfig()
    code: CodeConfig = CodeConfig()
    low_rank: TrainConfig = TrainConfig()
    codes: TrainConfig = TrainConfig()
    distillation: float = Field(
        default=0.5, ge=0, le=1, description="share of the loss that is of the teacher's answers"
    )


def defaults(data: Dataset, values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings for a data set, of the preset that ``values`` name.

    Raises:
        UsageError: there is no such preset.
    """
    name = preset_of(CompressConfig, values)
    image = data.info.image if data.info else UNKNOWN
    return reduce(merge, [{"image": image, "teacher": teacher_defaults(data)}, PRESETS[name]])


@dataclass(frozen=True)
class EstimateWidths(OneRound):
    """Errors of every layer's codes by their width, float64 (layers, m), NaN behind its own m.

    Args:
        teacher: the network.
        layers: those that are coded.
    """

    teacher: Artifact
    layers: tuple[CodedLayer, ...]

    version: ClassVar[int] = 1

    def compute(self, seed: int, threads: int) -> Arrays:
        state = read_model(self.teacher, torch.device("cpu")).state_dict()
        weights = {one.name: state[f"{one.name}.weight"].numpy() for one in self.layers}
        curves = error_curves(weights, self.layers, seed, threads)
        shape = (len(self.layers), max(layer.m for layer in self.layers))
        found = {name: np.full(shape, np.nan) for name in ("low_rank", "clustering")}
        for row, curve in enumerate(curves):
            for name, values in found.items():
                errors = getattr(curve, name)
                values[row, : len(errors)] = errors
        return found

    def metrics(self, arrays: Arrays) -> dict[str, Any]:
        return {"layers": len(arrays["low_rank"])}


@dataclass(frozen=True)
class WriteCodes(OneRound):
    """A trained network as arrays, and bytes of each kind.

    Args:
        teacher: the network before.
        task: the training of the codes.
        coded: its files.
    """

    teacher: Artifact
    task: Compress
    coded: ModelFiles

    version: ClassVar[int] = 2

    def compute(self, seed: int, threads: int) -> Arrays:
        model = self.task.restored(self.coded)
        return to_arrays(model, self.task.layers, {"model": asdict(read_spec(self.teacher))})

    def metrics(self, arrays: Arrays) -> dict[str, Any]:
        return asdict(size_of(arrays))


@dataclass(frozen=True)
class CompressedWeights:
    """The whole weights of a network in codes, as a teacher's."""

    artifact: Artifact

    @property
    def name(self) -> str:
        return self.artifact.name

    @property
    def identity(self) -> str:
        return self.artifact.identity

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays of a state dict by name."""
        return from_arrays(read_arrays(self.artifact))[1]


def compress_model(run: Run, data: Dataset, config: CompressConfig) -> dict[str, Any]:
    """Code the weights of a network, train the codes, and see what it still knows."""
    if not data.train.classes:
        raise UsageError(
            "The data set has no labels, and codes are trained to give them.",
            hint="Give the data set that the network was trained on.",
            code="no-labels",
        )
    image, classes = config.image, len(data.train.classes)
    task = teacher_task(config.teacher, image, classes)
    planned, left = plan_layers(task.network(), config.code)
    decode = Decode(image.size, image.channels)
    train, test = decoded(run, data, "train", decode), decoded(run, data, "test", decode)
    run.require(lambda: _check(train, image))
    given = {"test": test} if task.given else {"train": train, "test": test}
    teacher = run.fit("teacher", task, **given)
    estimate = EstimateWidths(teacher, tuple(planned))
    measured = run.compute("widths", estimate)
    curves = curves_of(read_arrays(measured))
    layers = tuple(choose_widths(planned, curves, config.code))
    models = FittedModels(teacher, (UNIT,))
    first = Compress(models, image, layers, config.low_rank, config.distillation)
    low_rank = run.fit("low-rank", first, train=train, test=test)
    files = ModelFiles.fitted(low_rank)
    second = replace(first, train=config.codes, low_rank=files)
    coded = run.fit("coded", second, train=train, test=test)
    write = WriteCodes(teacher, second, ModelFiles.fitted(coded))
    compressed = run.compute("compressed", write)
    rebuilt = run.fit("rebuilt", replace(task, weights=CompressedWeights(compressed)), test=test)
    size, (_, named) = compressed.metrics, spread(read_arrays(compressed))
    file = compressed.files[FILE].bytes
    about = {
        "dataset": data.name,
        "accuracy": {
            "teacher": teacher.metrics["accuracy"],
            "low_rank": low_rank.metrics["accuracy"],
            "coded": coded.metrics["accuracy"],
            "compressed": rebuilt.metrics["accuracy"],
        },
        "bytes": {**size, "file": file, "ratio": size["dense"] / file},
        "layers": [_row(*pair, named) for pair in zip(layers, curves, strict=True)],
        "left": [asdict(one) for one in left],
        "config": portable(config, "teacher"),
        "seed": run.seed,
    }
    products = {"compressed": compressed, "model": rebuilt, "teacher": teacher}
    if not run.published("compressed-model", products):
        run.publish(
            "compressed-model", products, about, report(about, products, curves, [train, test])
        )
    summary = {name: about[name] for name in ("dataset", "accuracy", "bytes")}
    return {**summary, "model": f"{compressed.store}/{FILE}", "report": f"{run.out}/report.html"}


def curves_of(arrays: Arrays) -> list[Curve]:
    """What :class:`EstimateWidths` found, by layer."""
    pairs = zip(arrays["low_rank"], arrays["clustering"], strict=True)
    return [
        Curve(*(tuple(row[np.isfinite(row)].tolist()) for row in (low, clustering)))
        for low, clustering in pairs
    ]


def _row(layer: CodedLayer, curve: Curve, named: Arrays) -> dict[str, Any]:
    """A layer as the manifest tells of it."""
    errors = {"low_rank": curve.low_rank[layer.d - 1], "clustering": curve.clustering[layer.d - 1]}
    size = sum(v.nbytes for n, v in named.items() if n.startswith(f"{layer.name}:"))
    ratio = 4 * layer.vectors * layer.m / size
    return {**asdict(layer), "bytes": size, "ratio": ratio, **errors}


def _check(train: ArtifactSource, image: ImageConfig) -> None:
    """Refuse what cannot be trained on this machine."""
    hint = (
        "Train on a part: 'pipeline run prune' with --keep and --selector random, whose output "
        "--selection takes."
    )
    count = train.artifact.manifest["counts"]["out"]
    check_memory("codes", count, image.size, image.channels, hint)


RECIPE = Recipe(CompressConfig, defaults, compress_model)
