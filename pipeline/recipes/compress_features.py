"""Features of all images in few bytes: an entropic student, its bitstreams, and a tail."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from pipeline.codecs.bitstream import VERSION
from pipeline.codecs.choose_model import Kind, choose_model, model_from_arrays
from pipeline.codecs.feature_codec import (
    Bottleneck,
    FeatureCodecConfig,
    FeatureDecoder,
    FeatureEncoder,
    FeatureSpec,
    read_spec,
)
from pipeline.codecs.feature_training import Mimic, TrainTail
from pipeline.codecs.zarr_codec import BitstreamCodec
from pipeline.config import Config, TrainConfig, merge, preset_of
from pipeline.dataset_distill.config import SqueezeConfig
from pipeline.datasets import Dataset
from pipeline.errors import UsageError
from pipeline.labelled_images import ImageConfig
from pipeline.orchestration.rounds import OneRound
from pipeline.orchestration.run import Run
from pipeline.recipes import Recipe
from pipeline.recipes.distill_config import UNKNOWN, teacher_defaults
from pipeline.recipes.features_report import report
from pipeline.recipes.teacher import portable, teacher_task
from pipeline.recipes.training_images import check_memory, decoded
from pipeline.stage import Stage
from pipeline.stages.answer import AnswerFeatures, AnswerImages, AnswerInt8
from pipeline.stages.decode import Decode
from pipeline.stages.feature_codec import EncodeFeatures, EncodeLatents
from pipeline.stages.recompress import OPTIONS, ImageCodec, Recompress
from pipeline.storage.array_artifact import FittedArrays, read_arrays
from pipeline.storage.artifact import MANIFEST, Artifact, ArtifactSource
from pipeline.storage.models import UNIT, FittedModels, ModelFiles
from pipeline.storage.parquet import ParquetFormat
from pipeline.storage.regroup import EvenSource, SampledSource
from pipeline.storage.store import open_store
from pipeline.storage.zarr import ZarrFormat
from pipeline.tensors import to_numpy

Arrays = Mapping[str, npt.NDArray[Any]]
INT8 = "int8"
CHANNELS = "channels"
CANDIDATES = "candidates"
"""The array that says what other entropy models would take, as JSON."""
Preset = Literal["small", "resnet50"]
CPU = torch.device("cpu")
ROWS = 1000
"""Images of a shard of latents in Zarr."""
COUNTED = (40, 500)
"""Shards, and images of each at most, whose latents are counted."""
MOST_SYMBOLS = 2**26
"""That are counted: of large latents fewer images."""
PRESETS: Mapping[str, dict[str, Any]] = {
    "small": {
        "codec": {"channels": 8},
        "mimic": {"epochs": 6, "batch_size": 64, "lr": 4e-3, "weight_decay": 0.0},
        "tail": {"epochs": 3, "batch_size": 64, "optimizer": "sgd", "lr": 0.02},
    },
    # Of the SC2 benchmark, for 224 x 224 pixels: 24 x 55 x 55 latents.
    "resnet50": {
        "teacher": {"backbone": "torchvision:resnet50", "weights": "pretrained"},
        "codec": {"split": "layer1", "channels": 24},
        "beta": 0.64,
        "mimic": {"epochs": 10, "batch_size": 64, "lr": 1e-3, "weight_decay": 0.0},
        "tail": {
            "epochs": 10,
            "batch_size": 128,
            "optimizer": "sgd",
            "lr": 1e-3,
            "weight_decay": 5e-4,
        },
    },
}


class CompressFeaturesConfig(Config):
    """Configuration of the recipe ``compress-features``."""

    preset: Preset = Field(
        default="small",
        description="whose settings are the defaults; every one can be set by itself",
    )
    image: ImageConfig = ImageConfig()
    teacher: SqueezeConfig = SqueezeConfig()
    encoder: str | None = Field(
        default=None,
        description="output of an earlier run, whose encoder is used: only a tail is trained",
    )
    codec: FeatureCodecConfig = FeatureCodecConfig()
    beta: float = Field(default=1.0, gt=0, description="weight of a bit; larger makes fewer bytes")
    mimic: TrainConfig = TrainConfig()
    tail: TrainConfig = TrainConfig()
    distillation: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="share of the tail's loss that is of the teacher's answers",
    )
    entropy: Kind | Literal["auto"] = Field(
        default="auto",
        description="model of the latents: the one with fewest bytes, tables of the learned prior, "
        "counted ones for each channel or position, or a hidden tree",
    )
    budget: int | None = Field(
        default=None,
        ge=1,
        description="bytes that no image may exceed; the least unusual of it is dropped",
    )
    format: Literal["parquet", "zarr"] = Field(default="parquet", description="of the features")
    baselines: tuple[str, ...] = Field(
        default=("jpeg:5", "jpeg:20", "jpeg:50", "webp:0", "webp:30", "avif:30", "int8"),
        description="what the report compares with: an image codec and its quality, int8, or "
        "channels and their number: an encoder and a tail are trained whose latents have as many",
    )
    measured: int = Field(default=2000, ge=1, description="test images of a baseline, at most")


def defaults(data: Dataset, values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings for a data set, of the preset that ``values`` name.

    Raises:
        UsageError: there is no such preset.
    """
    name = preset_of(CompressFeaturesConfig, values)
    image = data.info.image if data.info else UNKNOWN
    return reduce(merge, [{"image": image, "teacher": teacher_defaults(data)}, PRESETS[name]])


@dataclass(frozen=True)
class ChooseEntropyModel(OneRound):
    """The entropy model of latents, as arrays, and what other models would take.

    Args:
        latents: of training images, a column of that name.
        codec: a trained bottleneck, of whose prior tables are made too.
        samples: that will be coded.
        kind: of the model.
    """

    latents: ArtifactSource
    codec: ModelFiles
    samples: int
    kind: Kind | Literal["auto"]

    version: ClassVar[int] = 1

    def compute(self, seed: int, threads: int) -> Arrays:
        count = self.latents.artifact.manifest["counts"]["out"]
        parts = []
        for table in self.latents.tables():
            part = to_numpy(table["latents"])
            share = min(1.0, MOST_SYMBOLS / (count * part[0].size)) if len(part) else 1.0
            parts.append(part[: max(1, round(share * len(part)))])
        symbols = np.concatenate(parts)
        prior = Bottleneck.load(*self.codec.read()).prior.tables()
        model, found = choose_model(symbols, self.samples, prior, self.kind)
        about = json.dumps([asdict(one) for one in found]).encode()
        return {**model.to_arrays(), CANDIDATES: np.frombuffer(about, np.uint8)}

    def metrics(self, arrays: Arrays) -> dict[str, Any]:
        return _told(arrays)


@dataclass(frozen=True)
class GivenEntropyModel(OneRound):
    """The entropy model of an earlier run, as it is."""

    given: FittedArrays

    version: ClassVar[int] = 1

    def compute(self, seed: int, threads: int) -> Arrays:
        return self.given.arrays()

    def metrics(self, arrays: Arrays) -> dict[str, Any]:
        return _told(arrays)


def _told(arrays: Arrays) -> dict[str, Any]:
    size = sum(value.nbytes for name, value in arrays.items() if name != CANDIDATES)
    return {"bytes": size, "kinds": json.loads(arrays[CANDIDATES].tobytes())}


def compress_features(run: Run, data: Dataset, config: CompressFeaturesConfig) -> dict[str, Any]:
    """Train encoder and prior, count the tables, train a tail, code all images, and measure."""
    image = config.image
    for name in config.baselines:
        _check_baseline(name)
    task = teacher_task(config.teacher, image, len(data.train.classes))
    decode = Decode(image.size, image.channels)
    train, test = decoded(run, data, "train", decode), decoded(run, data, "test", decode)
    run.require(lambda: _check(train, image))
    given = {"test": test} if task.given else {"train": train, "test": test}
    teacher = run.fit("teacher", task, **given)
    models = FittedModels(teacher, (UNIT,))
    codec, entropy = _codec(run, config, models, train, test)
    files = ModelFiles.fitted(codec)
    spec = read_spec(files.read()[0])
    tail_task = TrainTail(models, image, files, config.tail, config.distillation)
    tail = run.fit("tail", tail_task, train=train, test=test)
    made = {
        name: _stored(run, f"{name}-features", split, files, entropy, config)
        for name, split in (("train", train), ("test", test))
    }
    stored = {name: source for name, (source, _) in made.items()}
    answer = AnswerFeatures(files, entropy, tail_task, ModelFiles.fitted(tail))
    answers = run.map("answers", stored["test"], [answer], to=ParquetFormat())
    rows = _baselines(run, {"train": train, "test": test}, models, config, spec)
    model = model_from_arrays(read_arrays(entropy))
    sizes = [n for t in answers.tables() for n in t["bytes"].to_pylist()]
    totals = [record["metrics"] for _, step in made.values() for record in step.artifact.records()]
    named = Path(config.encoder).name if config.encoder else None
    about = {
        "dataset": data.name,
        "accuracy": {
            "teacher": teacher.metrics["accuracy"],
            "mimic": codec.metrics["accuracy"],
            "tail": accuracy_of(answers),
        },
        "bytes": quantiles(sizes),
        "over_budget": sum(m["over_budget"] for m in totals),
        "escapes": sum(m["escapes"] for m in totals) / sum(m["symbols"] for m in totals),
        "encoder": {"network": encoder_bytes(files), "entropy": entropy.metrics["bytes"]},
        "entropy": entropy.metrics["kinds"],
        "baselines": rows,
        "codec": {**asdict(spec), "bitstream": VERSION, "model": model.digest},
        "splits": {n: {"samples": s.artifact.manifest["counts"]["out"]} for n, s in stored.items()},
        "config": portable(config.model_copy(update={"encoder": named}), "teacher"),
        "seed": run.seed,
    }
    products = {
        "codec": codec,
        "entropy": entropy,
        "tail": tail,
        "teacher": teacher,
        **{name: source.artifact for name, source in stored.items()},
    }
    if not run.published("features", products):
        text = report(about, products, sizes, [train, test, *stored.values()])
        run.publish("features", products, about, text)
    summary = {name: about[name] for name in ("dataset", "accuracy", "bytes", "splits")}
    return {**summary, "features": str(run.out), "report": f"{run.out}/report.html"}


def _codec(
    run: Run,
    config: CompressFeaturesConfig,
    teacher: FittedModels,
    train: ArtifactSource,
    test: ArtifactSource,
) -> tuple[Artifact, Artifact]:
    """The bottleneck and its entropy model: trained, or those of an earlier run."""
    mimic = Mimic(teacher, config.image, config.codec, config.beta, config.mimic)
    if config.encoder is not None:
        codec, entropy = open_codec(config.encoder)
        given = replace(mimic, given=ModelFiles.fitted(codec))
        task = GivenEntropyModel(FittedArrays(entropy, tuple(read_arrays(entropy))))
        return run.fit("codec", given, test=test), run.compute("entropy", task)
    codec = run.fit("codec", mimic, train=train, test=test)
    files = ModelFiles.fitted(codec)
    some = SampledSource(train, *COUNTED)
    latents = run.map("latents", some, [EncodeLatents(files)], to=ParquetFormat())
    count = sum(split.artifact.manifest["counts"]["out"] for split in (train, test))
    chosen = ChooseEntropyModel(latents, files, count, config.entropy)
    return codec, run.compute("entropy", chosen)


def _stored(
    run: Run,
    name: str,
    split: ArtifactSource,
    files: ModelFiles,
    entropy: Artifact,
    config: CompressFeaturesConfig,
) -> tuple[ArtifactSource, ArtifactSource]:
    """The features of a split, and the step that coded them."""
    arrays = config.format == "zarr"
    stage = EncodeFeatures(files, entropy, config.budget, arrays)
    if not arrays:
        made = run.map(name, split, [stage], to=ParquetFormat())
        return made, made
    made = run.map(f"{name}-rows", split, [stage], to=ParquetFormat())
    rows = sum(shard.rows or 0 for shard in made.shards)
    codec = BitstreamCodec.of(model_from_arrays(read_arrays(entropy)))
    fmt = ZarrFormat(json.dumps({"latents": codec.to_dict()}))
    return run.map(name, EvenSource(made, max(1, min(rows, ROWS))), [], to=fmt), made


def _baselines(
    run: Run,
    images: Mapping[str, ArtifactSource],
    teacher: FittedModels,
    config: CompressFeaturesConfig,
    spec: FeatureSpec,
) -> list[dict[str, Any]]:
    """What is seen in images of other codecs, in the teacher's features, and in few channels."""
    test = images["test"]
    count = test.artifact.manifest["counts"]["out"]
    shards = max(1, len(test.shards))
    few = SampledSource(test, shards, max(1, -(-min(count, config.measured) // shards)))
    rows = []
    for name in config.baselines:
        kind, _, quality = name.partition(":")
        if kind == CHANNELS:
            rows.append({"name": name, **_reduced(run, images, teacher, config, int(quality))})
            continue
        stages: list[Stage] = [AnswerInt8(teacher, config.image, spec.split)]
        if kind != INT8:
            stages = [Recompress(*_image_codec(name)), AnswerImages(teacher, config.image)]
        found = run.map(f"as-{kind}{quality and '-'}{quality}", few, stages, to=ParquetFormat())
        sizes = [n for t in found.tables() for n in t["bytes"].to_pylist()]
        rows.append({"name": name, "accuracy": accuracy_of(found), "bytes": quantiles(sizes)})
    return rows


def _reduced(
    run: Run,
    images: Mapping[str, ArtifactSource],
    teacher: FittedModels,
    config: CompressFeaturesConfig,
    channels: int,
) -> dict[str, Any]:
    """Few channels in 8 bits and no entropy model; otherwise trained as the codec is."""
    codec = config.codec.model_copy(update={"channels": channels})
    mimic = Mimic(teacher, config.image, codec, None, config.mimic)
    made = run.fit(f"{CHANNELS}-{channels}", mimic, **images)
    task = TrainTail(
        teacher, config.image, ModelFiles.fitted(made), config.tail, config.distillation
    )
    tail = run.fit(f"{CHANNELS}-{channels}-tail", task, **images)
    before, after = made.metrics, tail.metrics
    size = quantiles([before["bytes"]])
    return {"accuracy": after["accuracy"], "mimic": before["accuracy"], "bytes": size}


def _check_baseline(name: str) -> None:
    kind, _, number = name.partition(":")
    if name != INT8 and not (kind == CHANNELS and number.isdigit() and int(number)):
        _image_codec(name)


def _image_codec(name: str) -> tuple[ImageCodec, int]:
    kind, _, quality = name.partition(":")
    for known in OPTIONS:
        if kind == known and quality.isdigit() and int(quality) <= 100:
            return known, int(quality)
    raise UsageError(
        f"There is no baseline '{name}'.",
        hint=f"Write {', '.join(f'{codec}:QUALITY' for codec in OPTIONS)}, int8, or "
        f"{CHANNELS}:NUMBER.",
        code="bad-baseline",
    )


def accuracy_of(answers: ArtifactSource) -> float:
    """Percent of samples whose answer is their label."""
    hits = [to_numpy(table["answer"]) == to_numpy(table["label"]) for table in answers.tables()]
    return 100 * float(np.concatenate(hits).mean())


def quantiles(sizes: Sequence[int]) -> dict[str, float]:
    """Mean, median, 99th percentile and largest of bytes."""
    found = np.percentile(sizes, [50, 99, 100]).tolist()
    return {"mean": float(np.mean(sizes)), **dict(zip(("p50", "p99", "max"), found, strict=True))}


def encoder_bytes(files: ModelFiles) -> int:
    """Bytes of the encoder's parameters and buffers, as they are stored."""
    encoder = Bottleneck.load(*files.read()).encoder
    return sum(value.numel() * value.element_size() for value in encoder.state_dict().values())


def open_codec(path: str) -> tuple[Artifact, Artifact]:
    """The bottleneck and the entropy model of an earlier run.

    Raises:
        UsageError: there is none.
        RunError: it is damaged.
    """
    store = open_store(path)
    if store.info(MANIFEST):
        artifact = Artifact.open(store)
        if artifact.manifest["kind"] == "features":
            return artifact.product("codec"), artifact.product("entropy")
    raise UsageError(
        f"There is no feature codec in '{path}'.",
        hint="Give --encoder the output folder of 'pipeline run compress-features'.",
        code="no-codec",
    )


def load_codec(path: str) -> tuple[FeatureEncoder, FeatureDecoder]:
    """Both sides of the codec of a run of ``compress-features``.

    Raises:
        UsageError: there is none.
        RunError: it is damaged.
    """
    codec, entropy = open_codec(path)
    files, model = ModelFiles.fitted(codec).read(), model_from_arrays(read_arrays(entropy))
    return FeatureEncoder.load(*files, model), FeatureDecoder.load(*files, model)


def _check(train: ArtifactSource, image: ImageConfig) -> None:
    """Refuse what cannot be trained on this machine."""
    hint = (
        "Train on a part: 'pipeline run prune' with --keep and --selector random, whose output "
        "--selection takes; then code all images with --encoder."
    )
    count = train.artifact.manifest["counts"]["out"]
    check_memory("a feature codec", count, image.size, image.channels, hint)


RECIPE = Recipe(CompressFeaturesConfig, defaults, compress_features)
