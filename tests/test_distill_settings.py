"""Presets, what a distillation would cost, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image
from torch import nn

import pipeline
from pipeline import backbones
from pipeline.api import configure, plan
from pipeline.cli import main
from pipeline.config import merge
from pipeline.dataset_distill.config import RecoverConfig
from pipeline.datasets import NAMED, Dataset
from pipeline.errors import PipelineError, UsageError
from pipeline.recipes import recipes
from pipeline.recipes.distill_config import DistillConfig, defaults
from pipeline.recipes.distill_parts import synthesis_plan
from pipeline.storage.digits import open_digits


def settings(name: str, **values: Any) -> DistillConfig:
    """The configuration for a named data set that is not here."""
    data = Dataset(name, open_digits(), None, NAMED[name])
    return DistillConfig.model_validate(merge(defaults(data, values), values))


def test_the_presets_for_imagenet_are_those_published() -> None:
    config = settings("imagenet-1k", preset="cda", ipc=50)
    recover = config.recover
    assert (recover.iterations, recover.batch_size, recover.lr, recover.r_bn) == (
        4000,
        100,
        0.25,
        0.01,
    )
    assert (recover.first_bn_multiplier, recover.jitter, recover.crop_floor) == (10, 32, 0.08)
    assert (recover.curriculum, recover.milestone, recover.start) == ("cosine", 1.0, "noise")
    assert (recover.batch_of, recover.relative, recover.early_late) == ("classes", False, 1)
    assert (config.teacher.backbone, config.image.size) == ("resnet18", 224)
    assert config.teacher.train.model_dump(include={"epochs", "batch_size", "optimizer", "lr"}) == {
        "epochs": 90,
        "batch_size": 256,
        "optimizer": "sgd",
        "lr": 0.1,
    }
    assert (config.relabel.views, config.relabel.cutmix, config.relabel.codec) == (
        300,
        1.0,
        "float16",
    )
    student = config.student
    assert (student.temperature, student.train.epochs, student.train.lr) == (20.0, 300, 1e-3)
    assert (student.train.zeta, student.train.ema) == (1.0, 0.0)
    assert settings("imagenet-1k", preset="sre2l").recover.milestone == 0.0
    tiny = settings("tiny-imagenet", preset="cda")
    assert (tiny.recover.lr, tiny.recover.r_bn, tiny.recover.jitter) == (0.4, 0.05, 4)
    assert (tiny.teacher.backbone, tiny.teacher.train.epochs) == ("resnet18-3x3", 50)
    assert tiny.teacher.train.warmup_epochs == 5
    plain = settings("tiny-imagenet", preset="sre2l")
    assert (plain.recover.lr, plain.recover.r_bn, plain.recover.milestone) == (0.1, 1.0, 0.0)
    large = settings("imagenet-21k", preset="cda")
    assert (large.recover.lr, large.recover.r_bn, large.recover.iterations) == (0.05, 0.25, 2000)
    assert (large.image.mean, large.image.std) == ((0.0,) * 3, (1.0,) * 3)
    cifar = settings("cifar100", preset="sre2l")
    assert (cifar.recover.curriculum, cifar.recover.flip, cifar.recover.iterations) == (
        "step",
        False,
        1000,
    )


def test_every_preset_holds_for_every_data_set() -> None:
    for name in NAMED:
        for preset in ("best", "cda", "sre2l"):
            config = settings(name, preset=preset)
            assert config.preset == preset
            assert config.image.size == NAMED[name].size
            assert config.recover.crop_floor >= (0.25 if config.image.size <= 32 else 0.08)
    assert not settings("digits").image.flip


def test_a_setting_of_ones_own_comes_before_the_preset() -> None:
    config = configure("distill", "digits", None, {"preset": "cda", "recover": {"lr": 0.5}})
    assert isinstance(config, DistillConfig)
    assert (config.recover.lr, config.recover.start) == (0.5, "noise")
    default = configure("distill", "digits", None, {})
    assert isinstance(default, DistillConfig)
    assert (default.preset, default.recover.start) == ("best", "prototypes")
    with pytest.raises(UsageError, match="preset"):
        configure("distill", "digits", None, {"preset": "worst"})


def estimated(gpu: str | None, **values: Any) -> dict[str, Any]:
    config = settings("imagenet-1k", ipc=50, **values)
    classes = tuple(f"n{label:08d}" for label in range(1000))
    data = Dataset("imagenet-1k", synthesis_plan(classes, 1, RecoverConfig()), None)
    estimate = recipes.get("distill").estimate
    assert estimate is not None
    return estimate(data, config, gpu)


def test_the_cost_of_imagenet_is_known_before_it_is_paid() -> None:
    found = estimated("rtx4090", preset="cda")
    # 50 x 10 units of 100 images; ResNet-18 takes 1.82e9 multiplications an image.
    assert (found["units"], found["batch"], found["images"]) == (500, 100, 50_000)
    forward = 2 * 1.82e9
    assert found["flops"]["images"] == pytest.approx(2 * forward * 4000 * 50_000, rel=0.02)
    assert found["flops"]["labels"] == pytest.approx(forward * 300 * 50_000, rel=0.02)
    # Its authors say 29 hours on that GPU.
    assert 0.3 * 29 < found["hours"]["images"] < 1.5 * 29
    assert found["label_bytes"] == pytest.approx(50_000 * 300 * 1000 * 2, rel=0.02)
    faster = estimated("h100", preset="cda")["hours"]["images"]
    assert faster == pytest.approx(found["hours"]["images"] * 165 / 989, rel=1e-6)
    assert estimated("h100", preset="cda", relabel={"budget": "700MB"})["label_bytes"] <= 700e6
    with pytest.raises(UsageError, match="no GPU named 'abacus'") as error:
        estimated("abacus")
    assert "a100" in error.value.hint


def test_a_plan_tells_what_it_would_cost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = plan("distill", "digits", out=tmp_path, config={**TINY, "ipc": 2, "preset": "cda"})
    estimate = found["estimate"]
    assert (estimate["units"], estimate["images"]) == (4, 20)
    assert "measured on this machine" in estimate["calibration"] or torch.cuda.is_available()
    assert estimate["label_bytes"] == 20 * (3 * 20 + 12)
    words = ["plan", "distill", "digits", "--out", str(tmp_path), "--ipc", "10", "--gpu", "a100"]
    assert main([*words, "--label-budget", "20kB"]) == 0
    told = capsys.readouterr().out
    assert "labels: 20 views of each image as int4, at most 19." in told
    assert "a100" in told


def test_a_plan_for_images_without_labels_is_refused(tmp_path: Path) -> None:
    for number in range(4):
        Image.new("L", (8, 8), 50 * number).save(tmp_path / f"{number}.png")
    with pytest.raises(UsageError, match="no labels"):
        plan("distill", str(tmp_path), out=tmp_path / "out")


def refusal(tmp_path: Path, **config: Any) -> PipelineError:
    with pytest.raises(PipelineError) as error:
        pipeline.run("distill", "digits", out=tmp_path / "out", config={**TINY, **config})
    assert not list((tmp_path / "out").glob("teacher-*"))
    return error.value


def weights(tmp_path: Path, classes: int) -> str:
    torch.manual_seed(0)
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": backbones.build("convnet3", classes, 1).state_dict()}, path)
    return str(path)


def test_a_teacher_of_another_class_count_is_refused(tmp_path: Path) -> None:
    given = {"backbone": "convnet3", "weights": weights(tmp_path, 7)}
    error = refusal(tmp_path, teacher=given)
    assert error.code == "weights-mismatch"
    assert "linear.weight 7 x 128 for 10 x 128" in str(error)


def test_a_state_dict_of_torch_is_taken(tmp_path: Path) -> None:
    given = {"backbone": "convnet3", "weights": weights(tmp_path, 10)}
    config = {**TINY, "teacher": given, "arms": ["distilled-soft"], "seeds": 1, "ipc": 1}
    summary = pipeline.run("distill", "digits", out=tmp_path / "out", config=config)
    assert summary["evaluation"][-1]["trained_on"] == "teacher: given weights"
    assert summary["config"]["teacher"]["weights"] == "weights.pth"


def test_a_teacher_without_batchnorm_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plain(classes: int, _: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(256, classes))

    monkeypatch.setitem(backbones.BUILTIN, "plain", plain)
    error = refusal(tmp_path, teacher={"backbone": "plain"})
    assert error.code == "no-batchnorm"
    assert "--teacher-backbone resnet18" in error.hint
    assert refusal(tmp_path, committee=[{"backbone": "plain"}]).code == "no-batchnorm"


def test_more_images_than_a_class_has_are_refused(tmp_path: Path) -> None:
    error = refusal(tmp_path, ipc=500)
    assert error.code == "small-class"
    assert "lower --ipc" in error.hint


def test_labels_that_do_not_fit_their_budget_are_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, relabel={"budget": "100"}).code == "small-budget"


def test_a_training_set_that_does_not_fit_in_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sysconf", lambda name: 4096 if "SIZE" in name else 20)
    error = refusal(tmp_path)
    assert error.code == "small-memory"
    assert "--teacher-weights" in error.hint


LEVERS: list[dict[str, Any]] = [
    {"preset": "sre2l"},
    {"recover": {"batch_of": "class", "start": "prototypes", "early_late": 2, "batch_size": 10}},
    {"recover": {"tiles": 2, "crops": 3, "start": "confident"}, "relabel": {"codec": "int4"}},
    {"committee": [{"backbone": "convnet3", "train": {"epochs": 2}}], "relabel": {"budget": "2kB"}},
    {"student": {"backbones": ["convnet3", "resnet20"], "view_counts": [1]}, "preset": "cda"},
]


@pytest.mark.parametrize("lever", LEVERS, ids=["sre2l", "class", "tiles", "committee", "students"])
def test_every_lever_ends_well_and_is_read_again(tmp_path: Path, lever: dict[str, Any]) -> None:
    config = merge(merge(TINY, {"ipc": 2, "seeds": 1}), lever)
    summary = pipeline.run("distill", "digits", out=tmp_path, config=config)
    data = pipeline.open(tmp_path)
    assert len(data) == 20
    assert sorted(data.labels.tolist()) == sorted([*range(10)] * 2)
    assert data.labels.tolist() == [sample["label"] for sample in data]
    image, logits, _ = data.to_torch()[7]
    assert image.shape == (1, 16, 16)
    assert logits.shape == (10,)
    networks = [row["network"] for row in summary["evaluation"]]
    if "student" in lever:
        assert networks.count("resnet20") == 2
        assert "distilled-soft-1" in {row["arm"] for row in summary["evaluation"]}
    if "committee" in lever:
        assert summary["label_store"]["codec"]["kind"] == "float16"
        assert [row["arm"] for row in summary["evaluation"]][-2:] == ["teacher", "teacher-2"]


def test_without_stored_labels_the_teachers_are_asked(tmp_path: Path) -> None:
    config = merge(
        merge(TINY, {"ipc": 2, "seeds": 1, "arms": ["distilled-soft"]}),
        {"relabel": {"online": True}},
    )
    pipeline.run("distill", "digits", out=tmp_path / "online", config=config)
    stored = merge(config, {"relabel": {"online": False, "views": 5}})
    pipeline.run("distill", "digits", out=tmp_path / "stored", config=stored)
    online, kept = (pipeline.open(tmp_path / name).to_torch() for name in ("online", "stored"))
    assert online.samples.soft_labels.views == 0
    for epoch in (0, 4):
        for data in (online, kept):
            data.set_epoch(epoch)
        for row in (0, 13):
            (x, asked, _), (y, found, _) = online[row], kept[row]
            assert torch.equal(x, y)
            assert (asked - found).abs().max() < 0.02
    online.set_epoch(5)
    kept.set_epoch(5)
    assert not np.array_equal(online[0][0], kept[0][0])  # five views are stored; view 5 is a sixth
