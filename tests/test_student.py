"""The student: its loss and the views it sees."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from samples import image_table

from pipeline.config import TrainConfig
from pipeline.dataset_distill.config import ImageConfig, StudentConfig
from pipeline.dataset_distill.student import Student, StudentTraining
from pipeline.dataset_distill.views import Views, render, sample_views
from pipeline.tensors import tensor_column

CPU = torch.device("cpu")
IMAGE = ImageConfig(size=8)
ROWS, VIEWS = 6, 3


def prepared(batch_size: int = 4) -> tuple[StudentTraining, Views, Any]:
    rngs = [np.random.default_rng(seed) for seed in range(ROWS)]
    views = sample_views(rngs, IMAGE, VIEWS, 0.3, 1.0)
    logits = np.random.default_rng(9).normal(size=(ROWS, VIEWS, 2)).astype(np.float16) * 8
    train = image_table(ROWS)
    for name, values in {**vars(views), "logits": logits}.items():
        train = train.append_column(name, tensor_column(values))
    config = StudentConfig(temperature=5.0, train=TrainConfig(batch_size=batch_size))
    task = Student(config, "convnet3", IMAGE, 2)
    inputs = {"train": train, "test": image_table(4, seed=1)}
    return task.prepare(inputs, 3, CPU), views.to(CPU), torch.from_numpy(logits).float()


def log_softmax(x: Any) -> Any:
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def test_the_loss_is_the_divergence_times_the_squared_temperature() -> None:
    training, _, _ = prepared()
    x, target = training.batch(0, 0)
    training.model.eval()
    output = training.model(x).detach().double().numpy()
    teacher, student = log_softmax(target.double().numpy() / 5), log_softmax(output / 5)
    expected = 25 * (np.exp(teacher) * (teacher - student)).sum(1).mean()
    assert training.loss((x, target)).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("epoch", [0, 1, 2, 3, 7])
def test_an_epoch_sees_its_view_of_every_image_with_its_own_label(epoch: int) -> None:
    training, views, logits = prepared(batch_size=3)
    view = epoch % VIEWS
    rows = torch.arange(ROWS)
    expected = render(training.train.images, views, rows, torch.full_like(rows, view))
    seen = []
    for index in range(training.steps):
        x, target = training.batch(epoch, index)
        for picture, label in zip(x, target, strict=True):
            row = next(r for r in range(ROWS) if torch.equal(label, logits[r, view]))
            torch.testing.assert_close(picture, expected[row])
            seen.append(row)
    assert sorted(seen) == list(range(ROWS))


def test_a_last_small_batch_is_left_out_unless_it_is_the_only_one() -> None:
    training, _, _ = prepared(batch_size=4)
    assert len(training.batch(0, 0)[0]) == 4
    assert training.steps == 1
    training, _, _ = prepared(batch_size=100)
    assert len(training.batch(0, 0)[0]) == ROWS
    assert training.steps == 1


def test_batches_are_the_same_whenever_they_are_asked_for() -> None:
    training, _, _ = prepared(batch_size=2)
    first = [training.batch(4, index)[0] for index in range(training.steps)]
    assert len(first) == 3
    torch.manual_seed(99)
    training.batch(5, 1)
    again = [training.batch(4, index)[0] for index in (2, 1, 0)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    other = [training.batch(4 + VIEWS, index)[0] for index in range(training.steps)]
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_the_score_is_the_share_of_right_answers() -> None:
    training, _, _ = prepared()
    training.model.eval()
    with torch.inference_mode():
        answers = training.model(training.test.images).argmax(1)
        found = training.evaluate()
    assert found["accuracy"] == pytest.approx(
        100 * float((answers == training.test.labels).double().mean())
    )
    assert found["images"] == 4
