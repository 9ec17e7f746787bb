"""The student: its loss and the views it sees."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from samples import image_table

from pipeline.config import TrainConfig
from pipeline.dataset_distill.config import StudentConfig
from pipeline.dataset_distill.label_codec import LabelCodec
from pipeline.dataset_distill.student import Student, StudentTraining
from pipeline.dataset_distill.views import Views, ViewSampler, render
from pipeline.labelled_images import ImageConfig
from pipeline.tensors import tensor_column

CPU = torch.device("cpu")
IMAGE = ImageConfig(size=8)
ROWS, VIEWS = 6, 3


def prepared(batch_size: int = 4, **options: Any) -> tuple[StudentTraining, Views, Any]:
    sampler = ViewSampler(IMAGE, 0.3, 1.0, ROWS)
    seeds = np.random.default_rng(4).integers(0, 2**62, ROWS)
    logits = np.random.default_rng(9).normal(size=(ROWS, VIEWS, 2)).astype(np.float16) * 8
    train = image_table(ROWS)
    labels = train.select(["key", "label"]).append_column("seed", pa.array(seeds))
    labels = labels.append_column("logits", tensor_column(logits))
    config = StudentConfig(temperature=5.0, train=TrainConfig(batch_size=batch_size))
    task = Student(config, "convnet3", 2, sampler, LabelCodec(), **options)
    inputs = {"train": train, "labels": labels, "test": image_table(4, seed=1)}
    views = sampler.draw(seeds, range(VIEWS)).to(CPU)
    return task.prepare(inputs, 3, CPU), views, torch.from_numpy(logits).float()


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
        answers = training.model(training.test.images.take(slice(None))).argmax(1)
        found = training.evaluate()
    assert found["accuracy"] == pytest.approx(
        100 * float((answers == training.test.labels).double().mean())
    )
    assert found["images"] == 4


def test_fewer_views_can_be_used_than_are_stored() -> None:
    training, _, logits = prepared(batch_size=ROWS, views=2)
    assert sorted(training.batch(3, 0)[1].tolist()) == sorted(logits[:, 1].tolist())
    training, _, logits = prepared(batch_size=ROWS, views=VIEWS + 4)  # no more than there are
    assert sorted(training.batch(VIEWS, 0)[1].tolist()) == sorted(logits[:, 0].tolist())


def test_shuffled_labels_are_those_of_the_batch_in_another_order() -> None:
    plain, _, _ = prepared(batch_size=ROWS)
    shuffled, _, _ = prepared(batch_size=ROWS, shuffled=True)
    (x, target), (same, dealt) = plain.batch(1, 0), shuffled.batch(1, 0)
    assert torch.equal(x, same)
    assert sorted(target.tolist()) == sorted(dealt.tolist())
    orders = {str(shuffled.batch(epoch, 0)[1].argsort(0)) for epoch in range(0, 30, VIEWS)}
    assert len(orders) > 3


class Asked:
    """A teacher that says the mean and the largest value of an image."""

    identity = "asked"

    def networks(self, device: torch.device) -> list[torch.nn.Module]:
        class Network(torch.nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return torch.stack([x.mean((1, 2, 3)), x.amax((1, 2, 3))], 1)

        return [Network()]


def test_online_labels_are_what_the_teachers_say_of_views_that_do_not_repeat() -> None:
    training, _, _ = prepared(batch_size=ROWS, online=Asked())
    training = replace(training, labels=replace(training.labels, arrays={}))
    x, target = training.batch(2, 0)
    torch.testing.assert_close(target, torch.stack([x.mean((1, 2, 3)), x.amax((1, 2, 3))], 1))
    assert not torch.equal(training.batch(2 + VIEWS, 0)[0].sort(0)[0], x.sort(0)[0])
    training.loss((x, target)).backward()  # type: ignore[no-untyped-call]


def test_labels_of_other_samples_are_refused() -> None:
    training, _, _ = prepared()
    inputs = {"train": image_table(ROWS), "test": image_table(4, seed=1)}
    labels = (
        image_table(ROWS)
        .select(["key", "label"])
        .append_column("seed", pa.array(range(ROWS), pa.int64()))
    )
    with pytest.raises(ValueError, match="same samples"):
        training.task.prepare({**inputs, "labels": labels.take(list(range(ROWS))[::-1])}, 3, CPU)
