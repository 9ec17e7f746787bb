"""A codebook: k-means centres of the features of an encoder that stays as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import Field

from pipeline.backbones import Weights
from pipeline.codecs.codebook import usage
from pipeline.config import Config
from pipeline.dataset_distill.config import SqueezeConfig
from pipeline.datasets import Dataset
from pipeline.errors import RunError, UsageError
from pipeline.labelled_images import ImageConfig
from pipeline.orchestration.rounds import OneRound
from pipeline.orchestration.run import Run
from pipeline.recipes import Recipe
from pipeline.recipes.codebook_report import report
from pipeline.recipes.distill_config import UNKNOWN
from pipeline.recipes.teacher import portable, teacher_task
from pipeline.stages.decode import Decode
from pipeline.stages.patch_features import NearestCodes, PatchFeatures
from pipeline.stages.select import Keep
from pipeline.storage.array_artifact import FittedArrays
from pipeline.storage.artifact import MANIFEST, Artifact, ArtifactSource
from pipeline.storage.features import FeatureArrays
from pipeline.storage.parquet import ParquetFormat
from pipeline.storage.store import open_store
from pipeline.storage.weights import WeightsFile
from pipeline.tensors import to_numpy

Arrays = Mapping[str, npt.NDArray[Any]]
PIXELS = "pixels"
SHOWN = 40
"""Codes of each kind that the report shows."""


class FeaturesConfig(Config):
    """What is clustered: a vector for each place of an image."""

    network: str = Field(
        default=PIXELS,
        description="an encoder by its name, whose last map is taken; or pixels, those of a patch",
    )
    weights: str | None = Field(
        default=None, description="its .safetensors or .npz file; of a provider's network, its own"
    )
    patch: int = Field(
        default=4, ge=1, description="side of a patch, pixels, where features are pixels"
    )
    pool: int = Field(default=1, ge=1, description="places of a side whose features are averaged")


class CodebookConfig(Config):
    """Configuration of the recipe ``codebook``."""

    size: int = Field(default=10_000, ge=2, description="codes")
    features: FeaturesConfig = FeaturesConfig()
    image: ImageConfig = ImageConfig()
    memory_mb: int = Field(
        default=1024, ge=1, description="features that are held in memory at a time, MiB"
    )
    refine: int = Field(
        default=1, ge=0, description="Lloyd's iterations over all features, at the end"
    )


def defaults(data: Dataset, _: Mapping[str, Any]) -> dict[str, Any]:
    """Size and normalisation of the data set's images."""
    return {"image": data.info.image if data.info else UNKNOWN}


@dataclass(frozen=True)
class BuildCodebook(OneRound):
    """Cluster features into ``centroids``, float32 (K, D): shards are read when their turn comes.

    Args:
        features: with the column ``features`` (n, P, D).
        size: codes.
        memory: bytes of features that are held at a time.
        refine: iterations over all of them at the end.
    """

    features: ArtifactSource
    size: int
    memory: int
    refine: int

    version: ClassVar[int] = 1

    def compute(self, seed: int, threads: int) -> Arrays:
        from pipeline.clustering.hierarchical_kmeans import HierarchicalKMeans

        found = HierarchicalKMeans(
            self.size,
            memory=self.memory,
            refine=self.refine,
            compute_labels=False,
            random_state=seed,
            n_jobs=threads,
        ).fit(FeatureArrays(self.features, "features"))
        return {"centroids": found.cluster_centers_}

    def metrics(self, arrays: Arrays) -> dict[str, Any]:
        return {"codes": len(arrays["centroids"])}


def codebook(run: Run, data: Dataset, config: CodebookConfig) -> dict[str, Any]:
    """Features of all places, their k-means centres, and how much each of these is used."""
    image, chosen = config.image, config.features
    decode = Decode(image.size, image.channels)
    stage = PatchFeatures(_network(run, data, config), image, chosen.patch, chosen.pool)
    _check_places(config)
    features = run.map("features", data.train, [decode, stage], to=ParquetFormat())
    run.require(lambda: _check_count(features, config.size))
    task = BuildCodebook(features, config.size, config.memory_mb * 2**20, config.refine)
    made = run.compute("codebook", task)
    codes = run.map("codes", features, [NearestCodes(made)], to=ParquetFormat())
    use = Use.of(codes, config.size)
    places, width = _shape(features)
    keep = Keep(tuple(sorted({key for key, _ in use.examples.values()})))
    pictures = run.map("pictures", data.train, [keep, decode], to=ParquetFormat())
    products = {"codebook": made, "codes": codes.artifact}
    about = {
        "dataset": data.name,
        "codes": {
            "size": config.size,
            "width": width,
            "places": places,
            "features": int(use.counts.sum()),
            "squared_error": use.total / max(int(use.counts.sum()) * width, 1),
            **usage(use.counts),
        },
        "config": portable(config, "features"),
        "seed": run.seed,
    }
    if not run.published("codebook", products):
        text = report(about, products, use.counts, use.examples, pictures, [features, codes])
        run.publish("codebook", products, about, text)
    summary = {name: about[name] for name in ("dataset", "codes")}
    return {**summary, "codebook": str(run.out), "report": f"{run.out}/report.html"}


def _network(run: Run, data: Dataset, config: CodebookConfig) -> Artifact | str | None:
    chosen = config.features
    if chosen.network == PIXELS:
        return None
    if chosen.weights is None and ":" in chosen.network:
        return chosen.network
    if chosen.weights is None:
        raise UsageError(
            f"The network '{chosen.network}' has no weights, and its features would mean nothing.",
            hint="Give --features-weights FILE, a provider's network such as timm:resnet50, or "
            "--features pixels.",
            code="no-weights",
        )
    squeeze = SqueezeConfig(backbone=chosen.network, weights=chosen.weights)
    task = teacher_task(squeeze, config.image, len(data.train.classes))
    decode = Decode(config.image.size, config.image.channels)
    test = run.map("test", data.test or data.train, [decode], to=ParquetFormat())
    return run.fit("encoder", task, test=test)


def _check_places(config: CodebookConfig) -> None:
    size, chosen = config.image.size, config.features
    side = chosen.patch * chosen.pool
    if chosen.network == PIXELS and size % side:
        raise UsageError(
            f"Images of {size} x {size} pixels cannot be cut into places of {side} x {side}.",
            hint="Choose features.patch and features.pool so that their product divides the size.",
            code="bad-image-size",
        )


def _check_count(features: ArtifactSource, size: int) -> None:
    count = features.artifact.manifest["counts"]["out"] * _shape(features)[0]
    if count < size:
        raise RunError(
            f"There are {count:,} features, and {size:,} codes are asked for.",
            hint="Ask for fewer with --size, average fewer places (features.pool), or give more "
            "images.",
            code="too-many-codes",
        )


def _shape(features: ArtifactSource) -> tuple[int, int]:
    """Places of an image, and numbers of a place."""
    for table in features.tables():
        places, width = table["features"].type.shape
        return places, width
    return 0, 0


@dataclass(frozen=True)
class Use:
    """How codes are used by the features that they were made of.

    Attributes:
        counts: int64 (K,).
        total: sum of the squared distances of features to their codes.
        examples: key and place of the feature nearest to the most and the least used codes.
    """

    counts: npt.NDArray[np.int64]
    total: float
    examples: Mapping[int, tuple[str, int]]

    @classmethod
    def of(cls, codes: ArtifactSource, size: int) -> Use:
        counts, total = np.zeros(size, np.int64), 0.0
        for table in codes.tables():
            counts += np.bincount(to_numpy(table["codes"]).ravel(), minlength=size)
            total += float(to_numpy(table["distances"]).sum(dtype=np.float64))
        order = np.argsort(-counts, kind="stable")
        used = order[: int((counts > 0).sum())]
        wanted = np.unique(np.concatenate([used[:SHOWN], used[-SHOWN:]]))
        best = dict.fromkeys(wanted.tolist(), (np.inf, "", 0))
        for table in codes.tables():
            found, near = to_numpy(table["codes"]), to_numpy(table["distances"])
            rows, places = np.nonzero(np.isin(found, wanted))
            keys = table["key"]
            for row, place in zip(rows.tolist(), places.tolist(), strict=True):
                code, distance = int(found[row, place]), float(near[row, place])
                if distance < best[code][0]:
                    best[code] = (distance, keys[row].as_py(), place)
        examples = {code: (key, place) for code, (_, key, place) in best.items()}
        return cls(counts, total, examples)


def open_codebook(path: str) -> Weights:
    """The codes of a run of ``codebook``, or those in a file with one array (K, D).

    Raises:
        UsageError: there are none.
        RunError: a file is missing or damaged.
    """
    if Path(path).is_file():
        return WeightsFile(Path(path))
    store = open_store(path)
    if store.info(MANIFEST):
        artifact = Artifact.open(store)
        if artifact.manifest["kind"] == "codebook":
            return FittedArrays(artifact.product("codebook"), ("centroids",))
    raise UsageError(
        f"There is no codebook in '{path}'.",
        hint="Give the output folder of 'pipeline run codebook', or a .safetensors or .npz file "
        "with one array of codes (K, D).",
        code="no-codebook",
    )


RECIPE = Recipe(CodebookConfig, defaults, codebook)
