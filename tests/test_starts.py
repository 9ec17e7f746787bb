"""Real images that a synthesis starts from, and the batches that it is cut into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from samples import image_table, local_run

from pipeline.config import TrainConfig
from pipeline.dataset_distill.config import RecoverConfig, SqueezeConfig
from pipeline.dataset_distill.squeeze import Squeeze
from pipeline.dataset_distill.starts import rank_starts
from pipeline.digest import digest
from pipeline.labelled_images import ImageConfig, normalise
from pipeline.orchestration import training
from pipeline.recipes.distill_parts import synthesis_plan
from pipeline.recipes.starts import StartSource, tiles_of
from pipeline.stage import ShardContext
from pipeline.stages import candidates as module
from pipeline.storage.artifact import Artifact
from pipeline.storage.models import read_model
from pipeline.storage.parquet import ParquetFormat
from pipeline.storage.source import TableSource
from pipeline.tensors import tensor_column, to_numpy
from pipeline.testing import check_source, check_stage

CPU = torch.device("cpu")
IMAGE = ImageConfig(size=8, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))


def ranked(kind: str, count: int, seed: int = 0, labels: Any = None) -> Any:
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 3, 60) if labels is None else labels
    losses = rng.random(len(labels))
    features = rng.normal(size=(len(labels), 4)).astype(np.float32)
    found = rank_starts(kind, labels, losses, features, 3, count, seed)
    return found, labels, losses, features


@pytest.mark.parametrize("kind", ["random", "median", "confident", "prototypes"])
def test_starts_are_different_images_of_their_class(kind: str) -> None:
    found, labels, _, _ = ranked(kind, 7)
    assert found.shape == (3, 7)
    for label in range(3):
        assert set(labels[found[label]]) == {label}
        assert len(set(found[label].tolist())) == 7
    again, other = ranked(kind, 7)[0], ranked(kind, 7, seed=1)[0]
    assert np.array_equal(found, again)
    if kind == "random":
        assert not np.array_equal(found, other)


def test_confident_and_median_go_by_the_loss() -> None:
    for label in range(3):
        found, labels, losses, _ = ranked("confident", 5)
        own = np.sort(losses[labels == label])
        assert sorted(losses[found[label]]) == own[:5].tolist()
        found = ranked("median", 5)[0]
        first = len(own) // 2 - 2
        assert sorted(losses[found[label]]) == own[first : first + 5].tolist()


def test_one_prototype_is_next_to_the_mean_of_its_class() -> None:
    found, labels, _, features = ranked("prototypes", 1)
    for label in range(3):
        own = np.flatnonzero(labels == label)
        away = np.linalg.norm(features[own] - features[own].mean(0), axis=1)
        assert found[label, 0] == own[away.argmin()]


def test_prototypes_cover_the_clusters_of_a_class() -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(6, 5)) * 20
    features = (np.repeat(centres, 10, 0) + rng.normal(size=(60, 5))).astype(np.float32)
    found = rank_starts("prototypes", np.zeros(60, int), np.zeros(60), features, 1, 6, 0)
    assert sorted(found[0] // 10) == list(range(6))


@pytest.mark.parametrize("kind", ["random", "median", "confident", "prototypes"])
def test_few_candidates_are_used_again(kind: str) -> None:
    labels = np.array([0, 1, 1, 2, 2, 2])
    found = ranked(kind, 4, labels=labels)[0]
    assert set(found[0]) == {0}
    assert set(found[1]) == {1, 2}
    assert set(found[2]) == {3, 4, 5}


@pytest.fixture
def teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    monkeypatch.setattr(training, "default_device", lambda: CPU)
    monkeypatch.setattr(module, "default_device", lambda: CPU)
    source = TableSource((("0", keyed_images(40)),), ("a", "b", "c"))
    config = SqueezeConfig(backbone="convnet3", train=TrainConfig(epochs=3, batch_size=10))
    index = local_run(tmp_path / "data").map("data", source, [], to=ParquetFormat())
    return local_run(tmp_path / "run").fit(
        "teacher", Squeeze(config, IMAGE, 3), train=index, test=index
    )


def keyed_images(rows: int) -> pa.Table:
    table = image_table(rows, classes=3)
    return table.set_column(0, "key", pa.array([f"k{row}" for row in range(rows)]))


def test_the_loss_and_the_features_are_the_teachers(teacher: Artifact) -> None:
    table = keyed_images(6)
    stage = module.Candidates(teacher, "model", IMAGE, 8, 1)
    found = check_stage(stage, table, ShardContext("0", 0))
    assert np.array_equal(to_numpy(found["image"]), to_numpy(table["image"]))
    model = read_model(teacher, CPU)
    x = normalise(to_numpy(table["image"]), IMAGE, CPU)
    labels = torch.from_numpy(to_numpy(table["label"]).copy())
    losses = F.cross_entropy(model(x), labels, reduction="none")
    assert np.allclose(to_numpy(found["loss"]), losses.numpy(), atol=1e-4)
    assert to_numpy(found["feature"]).shape == (6, 128)


def test_of_several_crops_the_one_of_least_loss_is_taken(teacher: Artifact) -> None:
    table, context = keyed_images(12), ShardContext("0", 0)
    losses = [
        to_numpy(module.Candidates(teacher, "model", IMAGE, 4, crops)(table, context)["loss"])
        for crops in (2, 3, 8)
    ]
    assert (losses[1] <= losses[0]).all()
    assert (losses[2] <= losses[1]).all()
    assert (losses[2] < losses[0]).any()
    whole = module.Candidates(teacher, "model", IMAGE, 4, 1)(table, context)
    assert to_numpy(whole["image"]).shape == (12, 4, 4, 3)
    expected = [
        np.asarray(Image.fromarray(pixels).resize((4, 4), Image.Resampling.BILINEAR))
        for pixels in to_numpy(table["image"])
    ]
    assert np.abs(to_numpy(whole["image"]).astype(int) - np.stack(expected)).max() <= 2


def plan(ipc: int, classes: int = 4, **values: Any) -> list[list[tuple[int, int, int]]]:
    config = RecoverConfig(**{"iterations": 100, "batch_size": 3, **values})
    source = synthesis_plan(tuple(map(str, range(classes))), ipc, config)
    assert len({digest(shard.identity) for shard in source.shards}) == len(source.shards)
    tables = [source.read(shard) for shard in source.shards]
    keys = [key for table in tables for key in table["key"].to_pylist()]
    assert sorted(keys) == [f"class{c:05d}-{i:04d}" for c in range(classes) for i in range(ipc)]
    names = ("label", "index", "iterations")
    return [list(zip(*(t[n].to_pylist() for n in names), strict=True)) for t in tables]


def test_a_batch_of_cda_holds_neighbouring_classes_once() -> None:
    assert plan(2) == [
        [(0, 0, 100), (1, 0, 100), (2, 0, 100)],
        [(3, 0, 100)],
        [(0, 1, 100), (1, 1, 100), (2, 1, 100)],
        [(3, 1, 100)],
    ]
    # What is asked for with fewer images a class is a beginning of what is asked for with more.
    assert plan(3)[:4] == plan(2)


def test_a_mixed_batch_holds_several_of_each_class() -> None:
    found = plan(3, classes=2, batch_of="mixed", batch_size=4)
    assert [[pair[:2] for pair in batch] for batch in found] == [
        [(0, 0), (1, 0), (0, 1), (1, 1)],
        [(0, 2), (1, 2)],
    ]


def test_a_batch_of_a_class_holds_no_other() -> None:
    found = plan(4, classes=2, batch_of="class")
    assert [{label for label, _, _ in batch} for batch in found] == [{0}, {0}, {1}, {1}]


@pytest.mark.parametrize("batch_of", ["classes", "mixed", "class"])
def test_late_images_get_fewer_iterations_and_no_batch_mixes_them(batch_of: str) -> None:
    found = plan(8, classes=2, batch_of=batch_of, batch_size=100, early_late=4)
    assert all(len({steps for _, _, steps in batch}) == 1 for batch in found)
    steps = {index: steps for batch in found for _, index, steps in batch}
    assert steps == {0: 100, 1: 100, 2: 75, 3: 75, 4: 50, 5: 50, 6: 25, 7: 25}


def test_tiles_are_put_together_row_by_row(tmp_path: Path) -> None:
    tiles = np.arange(9, dtype=np.uint8).repeat(3 * 3 * 1).reshape(9, 3, 3, 1)
    table = pa.table(
        {"key": [f"k{n}" for n in range(9)], "image": tensor_column(tiles), "label": [0] * 9}
    )
    parts = (("0", table[:5]), ("1", table[5:]))
    pool = local_run(tmp_path).map("pool", TableSource(parts, ("a",)), [], to=ParquetFormat())
    whole = synthesis_plan(("a",), 2, RecoverConfig(batch_size=1))
    rows = np.array([8, 1, 2, 3, 4, 5, 6, 0])
    source = StartSource(whole, tiles_of(pool, rows, (4, 4)), 2, 7)
    check_source(source)
    first, second = (source.read(shard) for shard in source.shards)
    assert first["origin"].to_pylist() == [["k8", "k1", "k2", "k3"]]
    image = to_numpy(first["image"])[0, :, :, 0]
    assert image.shape == (7, 7)
    assert image[::3, ::3].tolist() == [[8, 1, 1], [2, 3, 3], [2, 3, 3]]
    assert to_numpy(second["image"])[0, 0, 0, 0] == 4
