"""The recipe ``prune``: what it keeps, what it says of it, and what obeys it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from layouts import column
from PIL import Image
from samples import encoded
from test_duplicates import scene
from torch import nn

import pipeline
from pipeline.api import plan
from pipeline.datasets import find_dataset, with_selection
from pipeline.errors import RunError, UsageError
from pipeline.orchestration.run import Run
from pipeline.recipes.prune_choice import Pilot, decide
from pipeline.storage.artifact import Artifact, ArtifactSource
from pipeline.storage.store import open_store
from pipeline.testing import tree_digest

FAST: dict[str, Any] = {
    "proxy": {"train": {"epochs": 2}},
    "early_epochs": 1,
    "runs": 2,
    "pilot_epochs": 2,
}


def prune(out: Path, dataset: str = "digits", **config: Any) -> dict[str, Any]:
    options = {name: config.pop(name) for name in ("executor", "workers") if name in config}
    return pipeline.run("prune", dataset, out=out, config={**FAST, **config}, **options)


def product(out: Path, role: str) -> pa.Table:
    artifact = Artifact.open(open_store(out)).product(role)
    return pa.concat_tables(ArtifactSource(artifact).tables())


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("pruned")
    return out, prune(out, keep=0.5)


def test_what_is_kept_is_a_list_of_keys_and_every_sample_has_a_score(pruned: Any) -> None:
    out, summary = pruned
    counts = summary["counts"]
    assert (counts["samples"], counts["pool"], counts["kept"]) == (1797, 1797, 898)
    selection, scores = product(out, "selection"), product(out, "scores")
    digits = find_dataset("digits", None).train
    assert selection.column_names == ["key", "label"]
    assert scores.column_names == ["key", "label", "el2n"]
    assert scores["key"].to_pylist() == column(digits, "key")
    # In the order of the data set.
    order = {key: row for row, key in enumerate(scores["key"].to_pylist())}
    rows = [order[key] for key in selection["key"].to_pylist()]
    assert rows == sorted(rows)
    assert len(rows) == 898
    # Half of an equal part of each class.
    assert np.bincount(selection["label"]).min() >= 45
    manifest = Artifact.open(open_store(out)).manifest
    assert manifest["score"] == "el2n"
    assert len(manifest["model"]) == 64
    assert manifest["why"] == summary["why"]
    assert {pilot["selector"] for pilot in manifest["pilots"]} == {"hard", "easy"}
    assert any(name in summary["why"] for name in ("hard samples are kept", "easy samples are"))


def test_scores_serve_any_budget_and_selector(
    pruned: Any, caplog: pytest.LogCaptureFixture
) -> None:
    out, _ = pruned
    before = Artifact.open(open_store(out)).products["scores"]
    with caplog.at_level(logging.INFO):
        again = prune(out, keep="300", selector="ccs")
    assert again["counts"]["kept"] == 300
    assert Artifact.open(open_store(out)).products["scores"] == before
    assert "early: all 2 shards found finished" in caplog.text
    assert len(product(out, "selection")) == 300
    # What was published before is a snapshot, and stays readable.
    assert (out / "snapshots" / "000001" / "manifest.json").is_file()


def test_a_run_that_was_stopped_anywhere_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"keep": 0.5, "score": "prototypes", "dedup": ["semantic"], "prototypes": 4}
    prune(tmp_path / "whole", **config)
    whole = tree_digest(tmp_path / "whole")

    class StoppedError(Exception):
        pass

    def stops(self: Run, *arguments: Any) -> Any:
        result = execute(self, *arguments)
        if arguments[0] not in seen:
            seen.add(arguments[0])
            raise StoppedError
        return result

    execute, seen = Run._execute, set[str]()
    monkeypatch.setattr(Run, "_execute", stops)
    for _ in range(60):
        try:
            prune(tmp_path / "cut", **config)
        except StoppedError:
            continue
        break
    assert len(seen) > 8
    assert tree_digest(tmp_path / "cut") == whole


def test_ray_writes_the_bytes_that_local_writes(pruned: Any, tmp_path: Path) -> None:
    config = {"keep": 0.4, "selector": "hard", "dedup": ["near", "semantic"], "prototypes": 4}
    prune(tmp_path / "local", **config)
    prune(tmp_path / "ray", **config, executor="ray", workers=2)
    assert tree_digest(tmp_path / "ray") == tree_digest(tmp_path / "local")


@pytest.mark.parametrize(
    ("score", "columns"),
    [
        ("grand", ["grand"]),
        ("margin", ["margin", "entropy", "least-confidence"]),
        ("prototypes", ["distance"]),
        ("supervised-prototypes", ["supervised-prototypes"]),
        ("moderate", ["moderate"]),
    ],
)
def test_every_score_gives_a_table(
    pruned: Any, tmp_path: Path, score: str, columns: list[str]
) -> None:
    selector = None if score == "moderate" else "hard"
    summary = prune(tmp_path, score=score, selector=selector, keep="20%")
    assert summary["counts"]["kept"] == 359
    scores = product(tmp_path, "scores")
    assert scores.column_names == ["key", "label", *columns]
    if score == "moderate":
        assert "'band'" in summary["why"]


@pytest.mark.parametrize("selector", ["d2", "herding", "k-center", "random"])
def test_selectors_are_given_what_they_need(tmp_path: Path, selector: str) -> None:
    summary = prune(tmp_path, selector=selector, keep="200")
    assert summary["counts"]["kept"] == 200
    labels = np.bincount(product(tmp_path, "selection")["label"])
    assert labels.min() >= 10
    # Only one of them goes by scores.
    assert ("scores" in summary["products"]) == (selector == "d2")


@pytest.mark.parametrize(
    ("keep", "kept"), [(300, 300), ("300", 300), (0.25, 449), ("25%", 449), ("20kB", 312)]
)
def test_a_budget_is_a_number_a_share_or_bytes(tmp_path: Path, keep: Any, kept: int) -> None:
    summary = prune(tmp_path, keep=keep, selector="random")
    assert summary["counts"]["kept"] == kept
    # Shards of which nothing is kept are none the less read.
    assert len(set(pipeline.open(tmp_path).keys)) == kept


def test_what_is_kept_whole_needs_no_score_and_no_features(tmp_path: Path) -> None:
    summary = prune(tmp_path, keep=1.0, selector="d2")
    assert summary["counts"]["kept"] == 1797
    assert list(summary["products"]) == ["selection"]
    tiny = prune(tmp_path / "tiny", keep=10, selector="random")
    assert (
        tiny["counts"]["kept"]
        == 10
        == len(list(pipeline.open(tmp_path / "tiny").to_torch().stream(1)))
    )


# Duplicates.


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Twenty pictures of two classes, and behind them copies, mirrored ones and scaled ones."""
    root = tmp_path / "pictures"
    for row in range(20):
        picture = scene(row)
        files = {f"{row:02d}.png": picture}
        if row < 4:
            files[f"{row:02d}-copy.png"] = picture
        elif row < 8:
            files[f"{row:02d}-mirror.png"] = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        elif row < 12:
            files[f"{row:02d}-small.png"] = picture.resize((80, 80))
        for name, file in files.items():
            path = root / "ab"[row % 2] / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(np.asarray(file)))
    return root


def test_of_planted_duplicates_one_of_each_stays(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary = prune(out, str(pictures), keep="1.0", dedup=["near", "exact"], materialize="folder")
    assert summary["counts"] == {
        **summary["counts"],
        "samples": 32,
        "duplicates": {"exact": 4, "near": 8},
        "pool": 20,
        "kept": 20,
    }
    assert summary["why"] == "All that is no duplicate is kept."
    found = product(out, "duplicates").to_pylist()
    for row in found:
        # '-' comes before '.': of a pair the copy stays, by its key.
        assert row["of"].partition("-")[0] == row["key"].removesuffix(".png")
        assert row["kind"] == ("exact" if "copy" in row["of"] else "near")
        assert 0.9 < row["likeness"] <= 1
    kept = set(product(out, "selection")["key"].to_pylist())
    assert kept.isdisjoint(row["key"] for row in found)
    # Materialised, they are a data set like any other, and open in one line.
    assert set(column(find_dataset(str(out), None).train, "key")) == kept
    assert set(pipeline.open(out).keys) == kept
    report = (out / "report.html").read_text()
    assert "4 of the exact duplicates" in report
    assert "8 of the near duplicates" in report


def test_a_share_is_of_all_samples_and_duplicates_go_first(pictures: Path, tmp_path: Path) -> None:
    config = {"dedup": ["exact", "near"], "selector": "random"}
    summary = prune(tmp_path / "a", str(pictures), keep=0.5, **config)
    assert summary["counts"]["kept"] == 16
    summary = prune(tmp_path / "b", str(pictures), keep=0.9, **config)
    assert summary["counts"]["kept"] == 20


# What is kept is used.


def test_a_pruned_set_opens_in_one_line(pruned: Any) -> None:
    out, _ = pruned
    data = pipeline.open(out)
    keys = set(product(out, "selection")["key"].to_pylist())
    assert len(data) == len(keys)
    assert data.classes == tuple("0123456789")
    assert set(data.keys) == keys
    whole = find_dataset("digits", None).train
    labels = dict(zip(column(whole, "key"), column(whole, "label"), strict=True))
    for images, found, names in data.to_torch(normalize=False).loader(64):
        assert images.shape[1:] == (1, 16, 16)
        assert images.dtype == torch.uint8
        assert [labels[name] for name in names] == found.tolist()


def test_scores_are_joined_to_their_samples(pruned: Any) -> None:
    out, _ = pruned
    scores = product(out, "scores")
    table = pipeline.open("digits").join(out).to_arrow()
    wanted = dict(zip(scores["key"].to_pylist(), scores["el2n"].to_pylist(), strict=True))
    assert table["el2n"].to_pylist() == [wanted[key] for key in table["key"].to_pylist()]


def test_a_pruned_set_is_read_from_any_copy(pruned: Any, tmp_path: Path) -> None:
    out, _ = pruned
    pipeline.run("convert", "digits", out=tmp_path / "copy", format="webdataset")
    own, copy = pipeline.open(out), pipeline.open(out, source=tmp_path / "copy")
    assert sorted(copy.keys) == sorted(own.keys)
    row = copy.keys.index(own.keys[7])
    assert (copy[row]["image"] == own[7]["image"]).all()
    pipeline.run("prune", "digits", out=tmp_path / "few", keep=50, selector="random")
    few = pipeline.run("convert", "digits", out=tmp_path / "part", selection=tmp_path / "few")
    assert few["train"]["out"] == 50
    with pytest.raises(UsageError) as caught:
        pipeline.open(out, source=tmp_path / "part")
    assert caught.value.code == "other-data"


def test_any_recipe_takes_a_selection(pruned: Any, tmp_path: Path) -> None:
    out, _ = pruned
    kept = len(product(out, "selection"))
    summary = pipeline.run("convert", "digits", out=tmp_path, selection=out)
    assert summary["train"]["in"] == kept
    source = with_selection(find_dataset("digits", None), out).train
    assert len(column(source, "key")) == kept


# What is refused, and when.


def no_step_began(out: Path) -> bool:
    return not any("early" in path.name or "proxy" in path.name for path in out.glob("*"))


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ({"keep": "1798"}, "budget-above-data"),
        ({"keep": "lots"}, "bad-budget"),
        ({"score": "tdds"}, "few-epochs"),
        ({"score": "el2n", "proxy": {"weights": "w.npz"}}, "score-needs-training"),
        ({"proxy": {"backbone": "resnet21"}}, "unknown-backbone"),
        ({"score": "beauty"}, "bad-config"),
        ({"selector": "best"}, "bad-config"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_trained(
    tmp_path: Path, config: dict[str, Any], code: str
) -> None:
    with pytest.raises(UsageError) as caught:
        prune(tmp_path, **config)
    assert caught.value.code == code
    assert caught.value.hint
    assert no_step_began(tmp_path)


@pytest.mark.parametrize("config", [{"keep": "5"}, {"keep": "3%", "balance": 0.0}])
def test_a_class_that_would_vanish_is_named(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises((UsageError, RunError)) as caught:
        prune(tmp_path, selector="hard", score="prototypes", **config)
    assert caught.value.code == "class-vanishes"


@pytest.fixture
def unlabelled(tmp_path: Path) -> Path:
    root = tmp_path / "unlabelled"
    root.mkdir()
    for row in range(30):
        (root / f"{row:02d}.png").write_bytes(encoded(np.asarray(scene(row))))
    return root


def test_without_labels_a_network_has_to_be_given(
    unlabelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for config in ({}, {"score": "el2n"}, {"selector": "auto"}):
        with pytest.raises(UsageError) as caught:
            prune(tmp_path / "out", str(unlabelled), **config)
        assert caught.value.code == "no-labels"

    def made(name: str, classes: int, channels: int, pretrained: bool) -> nn.Module:
        torch.manual_seed(0)
        pool = nn.Sequential(nn.Conv2d(channels, 24, 5, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        return nn.Sequential(pool, nn.Flatten(), nn.Linear(24, classes))

    monkeypatch.setitem(pipeline.backbones._PROVIDERS, "timm", made)
    config = {"proxy": {"backbone": "timm:made", "weights": "pretrained"}, "prototypes": 3}
    summary = prune(tmp_path / "out", str(unlabelled), keep=0.5, **config)
    assert summary["counts"]["kept"] == 15
    assert product(tmp_path / "out", "selection").column_names == ["key"]
    opened = pipeline.open(tmp_path / "out").to_torch()
    assert [int(label) for _, label, _ in opened] == [-1] * 15


# Plans and words.


def test_a_plan_names_the_steps_and_does_nothing(tmp_path: Path) -> None:
    found = plan("prune", "digits", out=tmp_path / "new", config={**FAST, "keep": 0.5})
    steps = [step["step"] for step in found["steps"]]
    assert steps == ["facts", "train", "early", "scores"]
    assert found["until"] == "facts"
    assert not (tmp_path / "new").exists()


def test_a_plan_of_a_finished_run_has_nothing_to_do(tmp_path: Path) -> None:
    config = {**FAST, "keep": 0.3, "selector": "random"}
    pipeline.run("prune", "digits", out=tmp_path, config=config)
    assert not plan("prune", "digits", out=tmp_path, config=config)["todo"]


def test_the_better_pilot_decides_and_chance_is_named() -> None:
    hard, easy = Pilot("hard", 700, 91.0, 400), Pilot("easy", 700, 80.0, 400)
    name, why = decide(hard, easy)
    assert name == "hard"
    assert "91.0% of 400" in why
    assert "chance" not in why
    name, why = decide(Pilot("hard", 700, 80.5, 400), Pilot("easy", 700, 81.0, 400))
    assert name == "easy"
    assert "within chance" in why


def test_keep_auto_is_selector_auto(pruned: Any, tmp_path: Path) -> None:
    summary = prune(tmp_path, keep="auto")
    assert summary["counts"]["kept"] == round(0.7 * 1797)
    assert "samples are kept" in summary["why"]
