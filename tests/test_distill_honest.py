"""What tells an honest distillation from a fake one, on digits, small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import pipeline
from pipeline.config import merge

CDA: dict[str, Any] = {
    "preset": "cda",
    "ipc": 1,
    "seeds": 2,
    "teacher": {"train": {"epochs": 10}},
    "recover": {"iterations": 200, "r_bn": 0.1},
    "relabel": {"views": 100},
    "student": {"train": {"epochs": 120, "batch_size": 10, "zeta": 2.0, "ema": 0.9}},
}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out")


def scores(out: Path, **changes: Any) -> dict[str, float]:
    summary = pipeline.run("distill", "digits", out=out, config=merge(CDA, changes))
    return {row["arm"]: row["accuracy"] for row in summary["evaluation"]}


def test_distilled_images_carry_what_noise_and_shuffled_labels_do_not(out: Path) -> None:
    found = scores(out)
    assert found["teacher"] > 90
    assert found["distilled-soft"] > found["noise-soft"] + 10
    # Without what belongs to an image there is nothing to learn but how often a class is.
    assert found["shuffled-soft"] < 25
    # From noise, without the teacher's labels, they are worth less than real images.
    assert found["distilled-hard"] < found["random-real-hard"]


def test_without_batchnorm_statistics_images_are_clearly_worse(out: Path) -> None:
    arms = ["distilled-soft", "distilled-hard"]
    found, without = scores(out, arms=arms), scores(out, arms=arms, recover={"r_bn": 0.0})
    assert found["distilled-soft"] > without["distilled-soft"] + 5
