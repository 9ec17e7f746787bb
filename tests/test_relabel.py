"""Soft labels: what is stored is what the teacher says of the view that can be rendered again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from references import view_of
from samples import image_table, local_run

from pipeline.config import TrainConfig
from pipeline.dataset_distill.config import ImageConfig, RelabelConfig, SqueezeConfig
from pipeline.dataset_distill.relabel import soft_labels
from pipeline.dataset_distill.squeeze import Squeeze
from pipeline.dataset_distill.views import Views, normalise, render, sample_views
from pipeline.device import reproducible
from pipeline.orchestration import training
from pipeline.stage import ShardContext
from pipeline.stages import relabel as module
from pipeline.storage.artifact import Artifact
from pipeline.storage.models import read_model
from pipeline.storage.source import TableSource
from pipeline.tensors import to_numpy
from pipeline.testing import check_stage

CPU = torch.device("cpu")
IMAGE = ImageConfig(size=8, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
CONFIG = RelabelConfig(views=4, crop_floor=0.3)


@pytest.fixture(autouse=True)
def _on_one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(training, "default_device", lambda: CPU)
    monkeypatch.setattr(module, "default_device", lambda: CPU)
    with reproducible(threads=1):
        yield


@pytest.fixture
def teacher(tmp_path: Path) -> Artifact:
    class Fixed(TableSource):
        identity = "fixed"

    source = Fixed((("0", image_table(40, classes=3)),), ("a", "b", "c"))
    settings = TrainConfig(epochs=4, batch_size=10, lr=0.02)
    task = Squeeze(SqueezeConfig(backbone="convnet3", train=settings), IMAGE, 3)
    return local_run(tmp_path).fit("teacher", task, train=source, test=source)


def labelled(teacher: Artifact, shard: str, seed: int = 0, **config: Any) -> pa.Table:
    stage = module.Relabel(teacher, CONFIG.model_copy(update=config), IMAGE, 5)
    return stage(table_of(shard), ShardContext(shard, seed))


def table_of(shard: str) -> pa.Table:
    table = image_table(5, seed=int(shard))
    return table.set_column(0, "key", pa.array([f"{shard}-{row}" for row in range(5)]))


def tolerance(logits: Any) -> Any:
    return np.abs(logits) * 2.0**-10 + 1e-3


def test_the_stage_keeps_its_contract(teacher: Artifact) -> None:
    table = table_of("00001")
    result = check_stage(module.Relabel(teacher, CONFIG, IMAGE, 5), table, ShardContext("00001", 0))
    kinds = {
        name: (to_numpy(result[name]).dtype.name, to_numpy(result[name]).shape)
        for name in result.column_names[3:]
    }
    assert kinds == {
        "crop": ("uint16", (5, 4, 4)),
        "flip": ("uint8", (5, 4)),
        "partner": ("int32", (5, 4)),
        "box": ("uint16", (5, 4, 4)),
        "logits": ("float16", (5, 4, 3)),
    }


def test_stored_logits_are_those_of_the_stored_views_of_the_whole_set(teacher: Artifact) -> None:
    table = pa.concat_tables([labelled(teacher, "00000"), labelled(teacher, "00001")])
    views = Views(*(to_numpy(table[name]) for name in Views.NAMES))
    assert views.box.any()
    assert set(views.partner[5:].ravel()) <= set(range(5, 10))
    images = normalise(to_numpy(table["image"]), IMAGE, CPU)
    model = read_model(teacher, CPU).double()
    plain = images.double().numpy()
    for row in range(10):
        pictures = np.stack([view_of(plain, views, row, view) for view in range(4)])
        expected = model(torch.from_numpy(pictures)).numpy()
        stored = to_numpy(table["logits"])[row]
        assert (np.abs(stored - expected) <= tolerance(expected)).all()
    model.float()
    assert np.ptp(to_numpy(table["logits"]), axis=1).max() > 0.1


def test_labels_depend_on_the_run_and_the_key_and_not_on_the_shard(teacher: Artifact) -> None:
    first = labelled(teacher, "00000")
    stage = module.Relabel(teacher, CONFIG, IMAGE, 5)
    moved = stage(table_of("00000"), ShardContext("00002", 0))
    for name in ("crop", "flip", "box", "logits"):
        assert np.array_equal(to_numpy(first[name]), to_numpy(moved[name]))
    assert np.array_equal(to_numpy(first["partner"]) + 10, to_numpy(moved["partner"]))
    other = labelled(teacher, "00000", seed=1)
    assert not np.array_equal(to_numpy(first["crop"]), to_numpy(other["crop"]))


def test_without_cutmix_nothing_is_mixed(teacher: Artifact) -> None:
    assert not to_numpy(labelled(teacher, "00000", cutmix=0.0)["box"]).any()


def test_many_views_keep_their_order(teacher: Artifact) -> None:
    images = torch.randn(3, 3, 8, 8)
    rngs = [np.random.default_rng(seed) for seed in range(3)]
    views = sample_views(rngs, IMAGE, 101, 0.3, 1.0).to(CPU)
    model = read_model(teacher, CPU)
    found = soft_labels(model, images, views)
    assert found.shape == (3, 101, 3)
    for row in range(3):
        rows = torch.full((101,), row)
        expected = model(render(images, views, rows, torch.arange(101))).numpy()
        assert (np.abs(found[row] - expected) <= tolerance(expected)).all()
