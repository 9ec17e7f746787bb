"""Soft labels: what is stored is what the teacher says of the view that can be rendered again."""

from __future__ import annotations

import copy
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
from pipeline.dataset_distill.config import SqueezeConfig
from pipeline.dataset_distill.label_codec import LabelCodec
from pipeline.dataset_distill.squeeze import Squeeze
from pipeline.dataset_distill.student import SoftLabels
from pipeline.dataset_distill.views import ViewSampler
from pipeline.device import reproducible
from pipeline.labelled_images import ImageConfig, normalise
from pipeline.orchestration import training
from pipeline.orchestration.fit import Fit
from pipeline.stage import ShardContext
from pipeline.stages import relabel as module
from pipeline.storage.artifact import Artifact
from pipeline.storage.models import read_model
from pipeline.storage.source import TableSource
from pipeline.tensors import to_numpy
from pipeline.testing import check_stage

CPU = torch.device("cpu")
IMAGE = ImageConfig(size=8, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
SETTINGS = TrainConfig(epochs=4, batch_size=10, lr=0.02)


@pytest.fixture(autouse=True)
def _on_one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(training, "default_device", lambda: CPU)
    monkeypatch.setattr(module, "default_device", lambda: CPU)
    with reproducible(threads=1):
        yield


@pytest.fixture
def teacher(tmp_path: Path) -> Artifact:
    source = fixed()
    task = Squeeze(SqueezeConfig(backbone="convnet3", train=SETTINGS), IMAGE, 3)
    return local_run(tmp_path).fit("teacher", task, train=source, test=source)


def fixed() -> TableSource:
    class Fixed(TableSource):
        identity = "fixed"

    return Fixed((("0", image_table(40, classes=3)),), ("a", "b", "c"))


def stage_of(teacher: Artifact, views: int = 4, **values: Any) -> module.Relabel:
    sampler = ViewSampler(IMAGE, 0.3, values.get("cutmix", 1.0), 5)
    return module.Relabel(teacher, values.get("units", ("model",)), sampler, views, LabelCodec())


def labelled(teacher: Artifact, shard: str, seed: int = 0, **values: Any) -> pa.Table:
    return stage_of(teacher, **values)(table_of(shard), ShardContext(shard, seed))


def table_of(shard: str) -> pa.Table:
    table = image_table(5, seed=int(shard))
    return table.set_column(0, "key", pa.array([f"{shard}-{row}" for row in range(5)]))


def tolerance(logits: Any) -> Any:
    return np.abs(logits) * 2.0**-10 + 1e-3


def test_the_stage_keeps_its_contract(teacher: Artifact) -> None:
    result = check_stage(stage_of(teacher), table_of("00001"), ShardContext("00001", 0))
    assert result.column_names == ["key", "label", "seed", "logits"]
    logits = to_numpy(result["logits"])
    assert (logits.dtype.name, logits.shape) == ("float16", (5, 4, 3))
    assert stage_of(teacher, views=0)(table_of("00001"), ShardContext("1", 0)).column_names == [
        "key",
        "label",
        "seed",
    ]


def test_a_view_drawn_again_gives_the_logits_that_are_stored(teacher: Artifact) -> None:
    """The replay of FKD: from a stored seed alone, one view at a time and in any order."""
    images = pa.concat_tables([table_of("00000"), table_of("00001")])
    table = pa.concat_tables([labelled(teacher, "00000"), labelled(teacher, "00001")])
    labels = SoftLabels.of(table, LabelCodec(), 3)
    sampler = ViewSampler(IMAGE, 0.3, 1.0, 5)
    plain = normalise(to_numpy(images["image"]), IMAGE, CPU).double().numpy()
    model = copy.deepcopy(read_model(teacher, CPU)).double()
    boxes = 0
    for view in (3, 0, 2, 1):
        views = sampler.draw(labels.seeds, [view])
        boxes += int(views.box.any())
        assert set(views.partner[5:].ravel().tolist()) <= set(range(5, 10))
        pictures = np.stack([view_of(plain, views, row, 0) for row in range(10)])
        expected = model(torch.from_numpy(pictures)).numpy()
        stored = labels.logits(np.arange(10), view)
        assert (np.abs(stored - expected) <= tolerance(expected)).all()
        assert np.array_equal(labels.logits(7, view), stored[7])
    assert boxes
    assert np.ptp(to_numpy(table["logits"]), axis=1).max() > 0.1


def test_labels_depend_on_the_run_and_the_key_and_not_on_the_shard(teacher: Artifact) -> None:
    first = labelled(teacher, "00000")
    moved = stage_of(teacher)(table_of("00000"), ShardContext("00002", 0))
    assert first.equals(moved)
    other = labelled(teacher, "00000", seed=1)
    assert first["seed"] != other["seed"]


def test_fewer_views_are_the_first_of_more(teacher: Artifact) -> None:
    few, many = (to_numpy(labelled(teacher, "00000", views=v)["logits"]) for v in (2, 101))
    assert many.shape == (5, 101, 3)
    assert np.abs(few.astype(float) - many[:, :2]).max() < 1e-2


def test_without_cutmix_nothing_is_mixed(teacher: Artifact) -> None:
    images = normalise(to_numpy(table_of("00000")["image"]), IMAGE, CPU)
    table = labelled(teacher, "00000", cutmix=0.0)
    views = ViewSampler(IMAGE, 0.3, 0.0, 5).draw(to_numpy(table["seed"]), [0])
    assert not views.box.any()
    alone = view_of(images.double().numpy(), views, 2, 0)
    expected = read_model(teacher, CPU)(torch.from_numpy(alone[None]).float()).numpy()
    assert np.abs(to_numpy(table["logits"])[2, 0] - expected).max() < 0.05


def test_several_teachers_give_the_mean_of_their_logits(tmp_path: Path) -> None:
    source = fixed()
    task = Squeeze(SqueezeConfig(backbone="convnet3", train=SETTINGS), IMAGE, 3)
    fits = {name: Fit(task, {"train": source, "test": source}) for name in ("a", "b")}
    both = local_run(tmp_path).fit_each("teacher", fits)
    one, other, mean = (
        to_numpy(labelled(both, "00000", units=units)["logits"]).astype(float)
        for units in (("a",), ("b",), ("a", "b"))
    )
    assert np.abs(one - other).max() > 0.1
    assert np.abs((one + other) / 2 - mean).max() < 0.02
