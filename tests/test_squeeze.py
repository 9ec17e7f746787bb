"""The teacher: its loss, what it does to images, and weights that it is given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from samples import image_table
from torch import Tensor

from pipeline.backbones import build
from pipeline.config import TrainConfig
from pipeline.dataset_distill.config import SqueezeConfig
from pipeline.dataset_distill.squeeze import Squeeze, SqueezeTraining
from pipeline.labelled_images import ImageConfig, shifted
from pipeline.orchestration import training as loop
from pipeline.orchestration.checkpoint import Checkpoint
from pipeline.orchestration.training import train
from pipeline.storage.store import LocalStore
from pipeline.storage.weights import WeightsFile

CPU = torch.device("cpu")
IMAGE = ImageConfig(size=16)
CONFIG = SqueezeConfig(backbone="convnet3", train=TrainConfig(epochs=2, batch_size=12))


def prepared(*, flip: bool, batch_size: int = 12) -> SqueezeTraining:
    image = IMAGE.model_copy(update={"flip": flip})
    inputs = {"train": image_table(12, size=16), "test": image_table(6, size=16, seed=1)}
    settings = CONFIG.train.model_copy(update={"batch_size": batch_size})
    config = CONFIG.model_copy(update={"train": settings})
    return Squeeze(config, image, 2).prepare(inputs, 3, CPU)


def moved(image: Tensor, down: int, right: int) -> Tensor:
    """``image`` (C, S, S) shifted, its border repeated."""
    wide = np.pad(image.numpy(), ((0, 0), (4, 4), (4, 4)), mode="edge")
    size = image.shape[-1]
    return torch.from_numpy(wide[:, 4 + down : 4 + down + size, 4 + right : 4 + right + size])


def where_from(view: Tensor, image: Tensor, most: int) -> list[tuple[int, int]]:
    places = [(d, r) for d in range(-most, most + 1) for r in range(-most, most + 1)]
    return [(d, r) for d, r in places if torch.equal(view, moved(image, d, r))]


def test_shifts_repeat_the_border_and_reach_every_place() -> None:
    images = torch.randn(400, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    found = shifted(images, 2, torch.Generator().manual_seed(1))
    met = [where_from(view, image, 2) for view, image in zip(found, images, strict=True)]
    assert {len(places) for places in met} == {1}
    assert len({places[0] for places in met}) == 25
    assert torch.equal(shifted(images, 0, torch.Generator()), images)


@pytest.mark.parametrize("flip", [False, True])
def test_an_epoch_holds_every_image_shifted_and_perhaps_mirrored(*, flip: bool) -> None:
    training = prepared(flip=flip, batch_size=4)
    images = training.sets["train"].images.take(slice(None))
    labels = training.sets["train"].labels
    mirrored, rows = 0, []
    places: list[list[list[tuple[int, int]]]] = []
    for epoch in range(3):
        places.append([])
        for index in range(training.steps):
            x, targets = training.batch(epoch, index)
            for view, target in zip(x, targets, strict=True):
                for turned in (False, True):
                    straight = view.flip(2) if turned else view
                    row = [i for i in range(12) if where_from(straight, images[i], 2)]
                    mirrored += turned and bool(row)
                    rows += row
                    places[-1] += [where_from(straight, images[i], 2) for i in row]
                    assert all(labels[i] == target for i in row)
    assert sorted(rows) == sorted([*range(12)] * 3)
    assert (mirrored > 0) == flip
    assert places[0] != places[1]


def test_the_loss_is_cross_entropy_and_epochs_are_repeatable() -> None:
    training = prepared(flip=True)
    x, labels = training.batch(1, 0)
    training.model.eval()
    logits = training.model(x).detach().double().numpy()
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = -np.log(chances[np.arange(12), labels.numpy()]).mean()
    assert training.loss((x, labels)).item() == pytest.approx(expected, rel=1e-5)
    torch.manual_seed(5)
    again, _ = training.batch(1, 0)
    other, _ = training.batch(2, 0)
    assert torch.equal(x, again)
    assert not torch.equal(x, other)


def test_a_batch_is_the_same_in_whatever_order_it_is_asked_for() -> None:
    training = prepared(flip=True, batch_size=4)
    places = [(epoch, index) for epoch in range(2) for index in range(3)]
    forwards = {place: training.batch(*place) for place in places}
    for place in [*reversed(places), *places]:
        assert all(map(torch.equal, training.batch(*place), forwards[place]))


def test_images_of_a_batch_are_moved_by_other_draws_than_those_of_the_next() -> None:
    training = prepared(flip=False, batch_size=4)
    images = training.sets["train"].images.take(slice(None))
    moves = []
    for index in range(3):
        x, _ = training.batch(0, index)
        found = [where_from(view, image, 2) for view in x for image in images]
        moves.append([places[0] for places in found if places])
    assert all(len(batch) == 4 for batch in moves)
    assert moves[0] != moves[1] != moves[2]


def test_given_weights_need_one_worker() -> None:
    train = CONFIG.train.model_copy(update={"workers": 4})
    config = CONFIG.model_copy(update={"train": train})
    assert Squeeze(config, IMAGE, 2).workers == 4
    given = config.model_copy(update={"weights": "pretrained"})
    assert Squeeze(given, IMAGE, 2).workers == 1
    assert Squeeze(config, IMAGE, 2, WeightsFile(Path("w.npz"))).workers == 1


def test_given_weights_are_scored_and_not_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "default_device", lambda: CPU)
    torch.manual_seed(1)
    state = build("convnet3", 2, 3).state_dict()
    np.savez(tmp_path / "w.npz", **{name: value.numpy() for name, value in state.items()})
    table = image_table(20, size=16)
    task = Squeeze(CONFIG, IMAGE, 2, WeightsFile(tmp_path / "w.npz"))
    done = train(task, {"test": table}, 7, Checkpoint(LocalStore(tmp_path), "none"))
    assert done.losses == []
    for name, value in done.training.model.state_dict().items():
        assert torch.equal(value, state[name])
    data = done.training.sets["test"]
    answers = done.training.model(data.images.take(slice(None))).argmax(1)
    share = float((answers == data.labels).double().mean())
    assert done.metrics == {"accuracy": pytest.approx(100 * share), "images": 20}
    assert F.one_hot(answers, 2).shape == (20, 2)
