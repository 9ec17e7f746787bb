"""Tokens of all images of a data set."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from pydantic import Field, model_validator

from pipeline.codecs.bitstream import compress
from pipeline.codecs.choose_model import model_from_arrays
from pipeline.codecs.entropy import StaticModel
from pipeline.codecs.tables import Tables
from pipeline.codecs.zarr_codec import BitstreamCodec
from pipeline.config import Config
from pipeline.datasets import Dataset
from pipeline.errors import UsageError
from pipeline.orchestration.rounds import OneRound
from pipeline.orchestration.run import Run
from pipeline.recipes import Recipe
from pipeline.recipes.train_tokenizer import read_curves
from pipeline.stage import Stage
from pipeline.stages.decode import Decode
from pipeline.stages.tokenize import (
    Measure,
    Tokenize,
    Views,
    decoded_size,
    read_predictor,
    read_tokenizer,
)
from pipeline.storage.array_artifact import read_arrays
from pipeline.storage.artifact import MANIFEST, Artifact, ArtifactSource
from pipeline.storage.formats import Format
from pipeline.storage.models import ModelFiles
from pipeline.storage.parquet import ParquetFormat
from pipeline.storage.regroup import EvenSource, GroupedSource, SampledSource
from pipeline.storage.store import open_store
from pipeline.storage.webdataset import WebDatasetFormat
from pipeline.storage.zarr import ZSTD, ZarrFormat
from pipeline.tensors import to_numpy
from pipeline.tokenizers.lengths import LengthRule, byte_costs, candidates, multiplier_for
from pipeline.tokenizers.tokenizer import CONFIG, WEIGHTS
from pipeline.tokenizers.tokens import VERSION

CPU = torch.device("cpu")
SHARD_BYTES = 256 * 2**20
FORMATS: dict[str, Format] = {"zarr": ZarrFormat(), "webdataset": WebDatasetFormat()}
ROWS = {"zarr": 1000, "webdataset": 10_000}
"""Images of a shard of tokens."""
CALIBRATION = (20, 100)
"""Shards, and images of each at most, from which the price of a byte is found."""


class TokenizeConfig(Config):
    """Configuration of the recipe ``tokenize``."""

    tokenizer: str = Field(
        default="",
        description="output of train-tokenizer, or a folder with a tokenizer's two files",
    )
    views: Views = Field(
        default="center", description="what is tokenized of an image: center or 10crop"
    )
    size: int | None = Field(
        default=None, ge=1, description="side of a view, pixels; the tokenizer's where not given"
    )
    tokens: int | None = Field(default=None, ge=1, description="so many tokens of every image")
    mean_bytes: float | None = Field(
        default=None,
        gt=0,
        description="mean bytes of an image, spent where they lower the error most",
    )
    min_psnr: float | None = Field(
        default=None, gt=0, description="of each image, dB, with as few tokens as reach it"
    )
    errors: Literal["predicted", "measured"] | None = Field(
        default=None,
        description="errors that lengths are chosen by: predicted in the encoder's pass (the "
        "default for mean_bytes), or measured, which decodes each image some ten times",
    )
    format: Literal["zarr", "parquet", "webdataset"] = Field(
        default="zarr", description="of the store"
    )
    entropy: Literal["auto", "none"] = Field(
        default="auto",
        description="in zarr, code tokens by how often each byte occurs at its place, where that "
        "takes less than zstd; or always zstd",
    )

    @model_validator(mode="after")
    def _one_rule(self) -> TokenizeConfig:
        given = [v for v in (self.tokens, self.mean_bytes, self.min_psnr) if v is not None]
        if len(given) > 1:
            raise ValueError("give one of tokens, mean_bytes and min_psnr")
        return self


@dataclass(frozen=True)
class Opened:
    """A tokenizer as it was found.

    Attributes:
        files: of the tokenizer.
        predictor: files of its predictor of error curves, where it has one.
        lengths: those that the predictor knows.
    """

    files: ModelFiles
    predictor: ModelFiles | None
    lengths: tuple[int, ...]


def open_tokenizer(path: str | Path) -> Opened:
    """A tokenizer that a run published, or a folder with its two files.

    Raises:
        UsageError: there is none.
        RunError: a file is missing or damaged.
    """
    store = open_store(path) if path else None
    if store and store.info(MANIFEST):
        artifact = Artifact.open(store)
        if artifact.manifest["kind"] == "tokenizer":
            lengths = tuple(artifact.manifest["tokens"]["candidates"])
            parts = [artifact.product(role) for role in ("tokenizer", "predictor")]
            for part in parts:  # damaged files are refused here, and not by every worker
                with part.checked(list(part.files.values())):
                    pass
            return Opened(ModelFiles.fitted(parts[0]), ModelFiles.fitted(parts[1]), lengths)
    if store and store.info(CONFIG) and store.info(WEIGHTS):
        return Opened(ModelFiles.of(store, CONFIG, WEIGHTS), None, ())
    raise UsageError(
        f"There is no tokenizer in '{path}'." if path else "No tokenizer was given.",
        hint="Give --tokenizer the output folder of 'pipeline run train-tokenizer', or a folder "
        f"with {CONFIG} and {WEIGHTS}.",
        code="no-tokenizer",
    )


@dataclass(frozen=True)
class CountTokens(OneRound):
    """Tables of packed tokens, one for each byte of a view; no arrays where zstd takes less.

    Args:
        tokens: with a column of that name, uint8 (V, bytes).
    """

    tokens: ArtifactSource

    version: ClassVar[int] = 1

    def compute(self, seed: int, threads: int) -> dict[str, npt.NDArray[Any]]:
        packed = np.concatenate([to_numpy(table["tokens"]) for table in self.tokens.tables()])
        views, width = packed.shape[1:]
        flat, pattern = packed.reshape(-1, width), np.arange(width)
        tables = Tables.counted(flat, pattern)
        model = StaticModel(tables, np.tile(pattern, views).astype(np.uint16), (views, width))
        return model.to_arrays() if _pays(packed, model) else {}

    def metrics(self, arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, Any]:
        return {"coded": bool(arrays)}


def tokenize(run: Run, data: Dataset, config: TokenizeConfig) -> dict[str, Any]:
    """Tokenize both splits."""
    opened = open_tokenizer(config.tokenizer)
    tokenizer = read_tokenizer(opened.files, CPU)
    size = config.size or tokenizer.size
    tokenizer.check_size((size, size), "tokenized")
    channels: Literal[1, 3] = 1 if tokenizer.channels == 1 else 3
    if data.info and data.info.image["channels"] > channels:
        raise UsageError(
            f"The tokenizer knows gray levels alone, and {data.name} has colours.",
            hint="Train a tokenizer on this data set with 'pipeline run train-tokenizer'.",
            code="other-channels",
        )
    rule = _rule(run, data, config, opened, Decode(size, channels))
    decode = Decode(decoded_size(config.views, size), channels)
    predictor = opened.predictor if rule.predicted else None
    stages: list[Stage] = [decode, Tokenize(opened.files, rule, config.views, size, predictor)]
    splits = {"train": data.train, **({"test": data.test} if data.test else {})}
    suffix = "" if config.format == "parquet" else "-tokens"
    tokens = {
        name: run.map(
            f"{name}{suffix}", GroupedSource(split, SHARD_BYTES), stages, to=ParquetFormat()
        )
        for name, split in splits.items()
    }
    fmt = _format(run, tokens["train"], config)
    made = {name: (_store(run, name, source, fmt), source) for name, source in tokens.items()}
    stores = {name: source.artifact for name, (source, _) in made.items()}
    form = tokenizer.form
    about = {
        "dataset": data.name,
        "classes": list(data.train.classes),
        "tokenizer": {"digest": tokenizer.digest, "spec": vars(tokenizer.spec)},
        "tokens": {**vars(form), "packing": VERSION, "bit_order": "little"},
        "views": {"kind": config.views, "size": size, "channels": channels},
        "rule": vars(rule),
        "splits": {name: _counts(tokens) for name, (_, tokens) in made.items()},
        "config": {**config.model_dump(mode="json"), "tokenizer": Path(config.tokenizer).name},
        "seed": run.seed,
    }
    if not run.published("tokens", stores):
        run.publish("tokens", stores, about)
    return {**{k: about[k] for k in ("dataset", "tokens", "views", "splits")}}


def _format(run: Run, tokens: ArtifactSource, config: TokenizeConfig) -> Format | None:
    """What the stores are written as; ``None`` where the tokens' own step is it."""
    if config.format == "parquet":
        return None
    if config.format == "webdataset" or config.entropy == "none":
        return FORMATS[config.format]
    counted = run.compute("tables", CountTokens(tokens))
    if not counted.metrics["coded"]:
        return FORMATS[config.format]
    codec = BitstreamCodec.of(model_from_arrays(read_arrays(counted)))
    return ZarrFormat(json.dumps({"tokens": codec.to_dict()}))


def _store(run: Run, name: str, tokens: ArtifactSource, fmt: Format | None) -> ArtifactSource:
    """The token store of a split."""
    if fmt is None:
        return tokens
    rows = sum(shard.rows or 0 for shard in tokens.shards)
    return run.map(name, EvenSource(tokens, max(1, min(rows, ROWS[fmt.name]))), [], to=fmt)


def _pays(packed: npt.NDArray[np.uint8], model: StaticModel) -> bool:
    """Whether tokens in a bitstream, with its tables, take less than with zstd."""
    coded = len(compress(packed, model)) + len(BitstreamCodec.of(model).model)
    zstd = pa.Codec("zstd", compression_level=ZSTD)
    return coded < len(zstd.compress(packed.tobytes(), asbytes=True))


def _counts(source: ArtifactSource) -> dict[str, Any]:
    """What a split's tokens come to."""
    records = list(source.artifact.records())
    tokens, used = (sum(r["metrics"].get(n, 0) for r in records) for n in ("tokens", "token_bytes"))
    samples = source.artifact.manifest["counts"]["out"]
    return {"samples": samples, "tokens": tokens, "token_bytes": used}


def _rule(
    run: Run, data: Dataset, config: TokenizeConfig, opened: Opened, decode: Decode
) -> LengthRule:
    """How many tokens an image gets."""
    form = read_tokenizer(opened.files, CPU).form
    if config.mean_bytes is None and config.min_psnr is None:
        count = form.max_tokens if config.tokens is None else config.tokens
        if count > form.max_tokens:
            raise UsageError(
                f"The tokenizer makes {form.max_tokens} tokens of an image, not {count}.",
                hint="Ask for fewer, or train a tokenizer with more.",
                code="too-many-tokens",
            )
        return LengthRule("fixed", count)
    lengths = opened.lengths or tuple(candidates(form.max_tokens))
    default = "predicted" if config.mean_bytes and opened.predictor else "measured"
    predicted = (config.errors or default) == "predicted"
    if predicted and opened.predictor is None:
        raise UsageError(
            "This tokenizer has no predictor of error curves.",
            hint="Give the output of 'pipeline run train-tokenizer', or --set errors=measured.",
            code="no-predictor",
        )
    if config.min_psnr is not None:
        return LengthRule("threshold", 10 ** (-config.min_psnr / 10), lengths, predicted)
    sample = SampledSource(data.train, *CALIBRATION)
    measure = Measure(opened.files, lengths[:1] if predicted else lengths)
    curves = run.map("calibration", sample, [decode, measure], to=ParquetFormat())
    errors, summary = read_curves(curves)
    if predicted and opened.predictor:
        network = read_predictor(opened.predictor, CPU)
        with torch.inference_mode():
            errors = network.curves(summary).double().numpy()
    price = multiplier_for(np.asarray(errors), byte_costs(form, lengths), config.mean_bytes or 0)
    return LengthRule("lagrangian", price, lengths, predicted)


RECIPE = Recipe(TokenizeConfig, lambda *_: {}, tokenize)
