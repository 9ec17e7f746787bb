"""Train an image tokenizer, and measure what its tokens are worth."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field

from pipeline.backbones import Weights
from pipeline.config import Config, TrainConfig, merge, preset_of
from pipeline.datasets import Dataset
from pipeline.errors import UsageError
from pipeline.orchestration.run import Run
from pipeline.recipes import Recipe
from pipeline.recipes.codebook import open_codebook
from pipeline.recipes.distill_config import UNKNOWN
from pipeline.recipes.tokenizer_report import report
from pipeline.recipes.training_images import check_memory, decoded
from pipeline.stages.decode import Decode
from pipeline.stages.tokenize import Measure, Reconstruct
from pipeline.storage.artifact import Artifact, ArtifactSource
from pipeline.storage.models import ModelFiles
from pipeline.storage.parquet import ParquetFormat
from pipeline.storage.regroup import ChosenSource
from pipeline.storage.weights import WeightsFile
from pipeline.tensors import to_numpy
from pipeline.tokenizers.config import (
    PRESETS,
    TRAINING,
    LatentConfig,
    TokenizerConfig,
    TokenizerTrainConfig,
    VQConfig,
)
from pipeline.tokenizers.lengths import (
    LengthRule,
    byte_costs,
    candidates,
    multiplier_for,
    threshold_for,
)
from pipeline.tokenizers.predictor import CurvePredictor, TrainPredictor, load_predictor
from pipeline.tokenizers.quality import grid, psnr
from pipeline.tokenizers.quantizers import Shape, build_quantizer
from pipeline.tokenizers.tokens import TokenForm
from pipeline.tokenizers.training import TrainTokenizer

Preset = Literal[
    "tiny", "tiny-grid", "instella-1024", "one-d-piece-b-256", "detailflow-128", "vqgan-lc-f16"
]
ROWS = 500
"""Images of a shard that is measured."""
SHOWN = 8
"""Images that the report shows."""


class TrainTokenizerConfig(Config):
    """Configuration of the recipe ``train-tokenizer``."""

    preset: Preset = Field(
        default="tiny",
        description="whose settings are the defaults; every one can be set by itself",
    )
    codebook: str | None = Field(
        default=None,
        description="output of codebook, or a file with codes (K, D), that stay frozen",
    )
    tokenizer: TokenizerConfig = LatentConfig()
    training: TokenizerTrainConfig = TokenizerTrainConfig()
    measured: int = Field(
        default=2000, ge=1, description="images whose error curves are measured, of each split"
    )
    predictor: TrainConfig = TrainConfig(epochs=60, batch_size=128, lr=2e-3, weight_decay=0.05)


def defaults(data: Dataset, values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings for a data set, of the preset that ``values`` name.

    Raises:
        UsageError: there is no such preset.
    """
    name = preset_of(TrainTokenizerConfig, values)
    image = data.info.image if data.info else UNKNOWN
    sized = {"channels": image.get("channels", 3)}
    if name == "tiny":
        # Few patches: what a CPU can do.
        sized |= {"size": image["size"], "patch": max(1, image["size"] // 4)}
    flip = {"training": {"flip": image.get("flip", True)}}
    published = {"tokenizer": dict(PRESETS[name]), "training": TRAINING[name]}
    if name == "tiny-grid":
        sized |= {"size": image["size"], "patch": 2 if image["size"] >= 16 else 1}
    kind = values.get("tokenizer", {}).get("quantizer", {}).get("kind")
    if kind not in {None, published["tokenizer"]["quantizer"]["kind"]}:
        del published["tokenizer"]["quantizer"]  # its settings are none of the other kind's
    return merge(merge({"preset": name, "tokenizer": sized}, flip), published)


def train_tokenizer(run: Run, data: Dataset, config: TrainTokenizerConfig) -> dict[str, Any]:
    """Train, measure error curves of images, and fit the predictor of these curves."""
    settings, codebook = _codebook(config)
    decode = Decode(settings.size, settings.channels)
    train, test = decoded(run, data, "train", decode), decoded(run, data, "test", decode)
    run.require(lambda: _check(train, settings))
    task = TrainTokenizer(settings, *_perceptual(config.training), codebook)
    tokenizer = run.fit("tokenizer", task, train=train, test=test)
    files = ModelFiles.fitted(tokenizer)
    lengths = tuple(candidates(settings.tokens))
    measure = Measure(files, lengths)
    curves = {
        split.artifact.manifest["step"]: run.map(
            f"{split.artifact.manifest['step']}-curves",
            evenly(split, config.measured),
            [measure],
            to=ParquetFormat(),
        )
        for split in (train, test)
    }
    predictor = run.fit("predictor", TrainPredictor(lengths, config.predictor), **curves)
    seen = tuple(grid(settings.tokens))
    shown = run.map(
        "reconstructions", evenly(test, SHOWN), [Reconstruct(files, seen)], to=ParquetFormat()
    )
    products = {
        "tokenizer": tokenizer,
        "predictor": predictor,
        "curves": curves["train"].artifact,
        "test-curves": curves["test"].artifact,
    }
    form = build_quantizer(settings.quantizer, Shape(settings.tokens, 1, 1)).form(settings.tokens)
    table = evaluation(form, lengths, curves["train"], curves["test"], predictor)
    about = {
        "dataset": data.name,
        "tokens": {**vars(form), "candidates": list(lengths)},
        "health": {k: v for k, v in tokenizer.metrics.items() if k != "psnr"},
        "psnr": {str(k): tokenizer.metrics["psnr"][str(k)] for k in seen},
        "lengths": table,
        "predictor": dict(predictor.metrics),
        "config": _told(config, task),
        "seed": run.seed,
    }
    if not run.published("tokenizer", products):
        run.publish("tokenizer", products, about, report(about, products, shown, [train, test]))
    return {
        **{name: about[name] for name in ("dataset", "psnr", "health")},
        "lengths": table,
        "tokenizer": str(run.out),
        "report": f"{run.out}/report.html",
    }


def _check(train: ArtifactSource, settings: TokenizerConfig) -> None:
    """Refuse what cannot be trained on this machine."""
    hint = (
        "Train on a part: 'pipeline run prune' with --keep and --selector random, whose output "
        "--selection takes; or with fewer pixels: --set tokenizer.size."
    )
    count = train.artifact.manifest["counts"]["out"]
    check_memory("a tokenizer", count, settings.size, settings.channels, hint)


def _codebook(config: TrainTokenizerConfig) -> tuple[TokenizerConfig, Weights | None]:
    """The tokenizer, as large as the codebook that was given, and the codebook."""
    settings, quantizer = config.tokenizer, config.tokenizer.quantizer
    if config.codebook is None:
        return settings, None
    if not isinstance(quantizer, VQConfig) or quantizer.codes != "projected":
        raise UsageError(
            "This tokenizer makes its codes itself, and has no use for a codebook.",
            hint="Choose --preset tiny-grid, or set tokenizer.quantizer.kind=vq and "
            "tokenizer.quantizer.codes=projected.",
            code="no-use",
        )
    codebook = open_codebook(config.codebook)
    shapes = [array.shape for array in codebook.arrays().values()]
    if len(shapes) != 1 or len(shapes[0]) != 2:
        raise UsageError(
            f"There are {len(shapes)} arrays in '{codebook.name}', and a codebook is one (K, D).",
            hint="Give the output of 'pipeline run codebook', or a file with one such array.",
            code="no-codebook",
        )
    size = dict(zip(("vocabulary", "features"), shapes[0], strict=True))
    return settings.model_copy(update={"quantizer": quantizer.model_copy(update=size)}), codebook


def _told(config: TrainTokenizerConfig, task: TrainTokenizer) -> dict[str, Any]:
    """The configuration as a manifest holds it: no path of one machine."""
    codebook = task.codebook and task.codebook.name
    changed = {"tokenizer": task.config, "training": task.training, "codebook": codebook}
    return config.model_copy(update=changed).model_dump(mode="json")


def _perceptual(training: TokenizerTrainConfig) -> tuple[TokenizerTrainConfig, Weights | None]:
    """The training, and the weights of its perceptual loss's network where a file has them.

    A file of weights counts by its content, not by where it lies.
    """
    settings = training.loss.perceptual
    if settings is None or settings.weights == "pretrained":
        return training, None
    file = WeightsFile(Path(settings.weights))
    named = settings.model_copy(update={"weights": file.name})
    loss = training.loss.model_copy(update={"perceptual": named})
    return training.model_copy(update={"loss": loss}), file


def evenly(source: ArtifactSource, count: int) -> ChosenSource:
    """``count`` of the samples of a source, evenly spaced, or all where there are fewer."""
    rows = [(n, row) for n, shard in enumerate(source.shards) for row in range(shard.rows or 0)]
    chosen = np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)
    return ChosenSource(source, tuple(rows[place] for place in chosen.tolist()), ROWS)


def read_curves(source: ArtifactSource) -> tuple[np.ndarray, torch.Tensor]:
    """Error curves float64 (n, G) and summaries (n, D) of the images that were measured."""
    table = pa.concat_tables([t.select(["curve", "summary"]) for t in source.tables()])
    curve, summary = to_numpy(table["curve"]), to_numpy(table["summary"])
    return curve.astype(np.float64), torch.from_numpy(summary.copy())


def length_rule(
    form: TokenForm,
    lengths: tuple[int, ...],
    curves: ArtifactSource,
    mean_bytes: float,
    predictor: CurvePredictor | None,
) -> LengthRule:
    """The rule of least mean error at ``mean_bytes``, with the price that the curves give."""
    errors, summary = read_curves(curves)
    if predictor is not None:
        with torch.inference_mode():
            errors = predictor.curves(summary).double().numpy()
    price = multiplier_for(errors, byte_costs(form, lengths), mean_bytes)
    return LengthRule("lagrangian", price, lengths, predictor is not None)


def evaluation(
    form: TokenForm,
    lengths: tuple[int, ...],
    train: ArtifactSource,
    test: ArtifactSource,
    predictor: Artifact,
) -> list[dict[str, Any]]:
    """One length for all beside lengths for each, at equal mean bytes, on test images."""
    network = load_predictor(*ModelFiles.fitted(predictor).read())
    errors, summary = read_curves(test)
    costs = byte_costs(form, lengths)
    with torch.inference_mode():
        predicted = network.curves(summary).double().numpy()
    rows = []
    for place in range(1, len(lengths) - 1):
        budget = float(costs[place])
        if budget == costs[place + 1]:
            continue  # as many bytes have room for more tokens
        most = threshold_for(read_curves(train)[0], costs, budget)
        rules = {
            "fixed": None,
            "lagrangian": length_rule(form, lengths, train, budget, None),
            "predicted": length_rule(form, lengths, train, budget, network),
            "threshold": LengthRule("threshold", most, lengths),
        }
        for name, rule in rules.items():
            known = predicted if name == "predicted" else errors
            chosen = np.full(len(errors), place) if rule is None else rule.places(known, form)
            found = errors[np.arange(len(errors)), chosen]
            each = psnr(torch.from_numpy(found)).numpy()
            rows.append(
                {
                    "tokens": lengths[place],
                    "chooser": name,
                    "bytes": float(costs[chosen].mean()),
                    "psnr_of_mean": float(-10 * np.log10(found.mean())),
                    "mean_psnr": float(each.mean()),
                    "psnr_5": float(np.percentile(each, 5)),
                }
            )
    return rows


RECIPE = Recipe(TrainTokenizerConfig, defaults, train_tokenizer)
