"""Write a data set in another format, in shards of another size."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from pipeline.config import Config
from pipeline.datasets import Dataset
from pipeline.errors import RunError
from pipeline.orchestration.run import Run
from pipeline.recipes import Recipe
from pipeline.stage import Stage
from pipeline.stages.encode import Encode
from pipeline.storage.artifact import ArtifactSource
from pipeline.storage.folder import FolderFormat
from pipeline.storage.formats import Format
from pipeline.storage.parquet import ParquetFormat
from pipeline.storage.regroup import EvenSource, GroupedSource
from pipeline.storage.selected import SelectedSource, selected_keys
from pipeline.storage.source import Source
from pipeline.storage.webdataset import WebDatasetFormat
from pipeline.storage.zarr import ZarrFormat

log = logging.getLogger(__name__)


class ConvertConfig(Config):
    """Configuration of the recipe ``convert``."""

    format: Literal["webdataset", "parquet", "zarr", "folder"] = Field(
        default="webdataset", description="what to write"
    )
    shard_mb: int = Field(
        default=256, ge=1, description="size of a shard that small ones are joined to, MB"
    )
    encode: Literal["keep", "png", "jpeg", "webp", "webp-lossless"] = Field(
        default="keep", description="how images are stored; 'keep' leaves their bytes as they are"
    )
    quality: int = Field(default=90, ge=1, le=100, description="of jpeg and webp")
    shorter: int | None = Field(
        default=None, ge=1, description="scale larger images down to this shorter side, pixels"
    )

    @model_validator(mode="after")
    def _scaled_images_are_encoded(self) -> ConvertConfig:
        if self.shorter is not None and self.encode == "keep":
            raise ValueError(
                "images cannot be scaled and keep their bytes; choose how they are stored "
                "with --encode"
            )
        return self


def convert(run: Run, data: Dataset, config: ConvertConfig) -> dict[str, Any]:
    """Write both splits in the chosen format; keys, labels, bytes and their order are kept."""
    stages: list[Stage] = []
    if config.encode != "keep":
        stages.append(Encode(config.encode, config.quality, config.shorter))
    splits = {"train": data.train, **({"test": data.test} if data.test else {})}
    written = {
        name: write_split(run, name, source, stages, config) for name, source in splits.items()
    }
    products = {name: source.artifact for name, source in written.items()}
    if isinstance(data.train, SelectedSource):
        run.require(lambda: _check_found(data.train, written["train"]))
    about = {"dataset": data.name, "config": config.model_dump(mode="json"), "seed": run.seed}
    if not run.published("dataset", products):
        run.publish("dataset", products, about)
    summary: dict[str, Any] = {**about}
    for name, artifact in products.items():
        counts: Mapping[str, Any] = artifact.manifest["counts"]
        summary[name] = {"path": str(artifact.store), "shards": artifact.shards, **counts}
    return summary


def _check_found(source: Source, written: ArtifactSource) -> None:
    """Refuse a selection of another data set; say how much of one is missing."""
    wanted = len(selected_keys(source.selection)) if isinstance(source, SelectedSource) else 0
    found = written.artifact.manifest["counts"]["in"]
    if wanted and not found:
        raise RunError(
            f"None of the {wanted:,} samples of the selection is in this data set.",
            hint="Give the data set that was pruned, or a copy in which samples have the same "
            "keys; 'pipeline inspect' shows the keys of both.",
            code="other-selection",
        )
    if found < wanted:
        log.warning("%d of %d selected samples are not in this data set", wanted - found, wanted)


def write_split(
    run: Run, name: str, source: Source, stages: Sequence[Stage], config: ConvertConfig
) -> ArtifactSource:
    """Write one split in the chosen format, as the step ``name``."""
    size = config.shard_mb * 2**20
    grouped = GroupedSource(source, size)
    if config.format != "zarr":
        kinds: dict[str, Format] = {
            "webdataset": WebDatasetFormat(size),
            "parquet": ParquetFormat(),
            "folder": FolderFormat(source.classes),
        }
        return run.map(name, grouped, stages, to=kinds[config.format])
    # The place of a row in a Zarr array depends on all before it, and how many these are is known
    # only when every sample was read.
    samples = run.map(f"{name}-samples", grouped, stages, to=ParquetFormat())
    rows = sum(shard.rows or 0 for shard in samples.shards)
    total = sum(shard.bytes or 0 for shard in samples.shards)
    even = EvenSource(samples, max(1, min(rows, rows * size // max(total, 1))))
    return run.map(name, even, [], to=ZarrFormat())


RECIPE = Recipe(ConvertConfig, lambda *_: {}, convert)
