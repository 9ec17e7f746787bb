"""Scores against their formulas, and as stages over shards."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import local_run
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import nn

from pipeline.backbones import build, embed
from pipeline.clustering.sharded_kmeans import ShardedKMeans
from pipeline.config import TrainConfig
from pipeline.dataset_distill.config import SqueezeConfig
from pipeline.dataset_distill.squeeze import Squeeze
from pipeline.errors import RunError, UsageError
from pipeline.labelled_images import ImageConfig
from pipeline.orchestration.checkpoint import Checkpoint
from pipeline.orchestration.fit import Fit
from pipeline.orchestration.training import train
from pipeline.pruning import scores
from pipeline.pruning.class_centres import ClassCentres
from pipeline.pruning.gradients import grand
from pipeline.stage import ShardContext
from pipeline.stages.assign import Assign
from pipeline.stages.embed import Embed
from pipeline.stages.score import CentreDistances, Score
from pipeline.storage.array_artifact import read_arrays
from pipeline.storage.artifact import Artifact
from pipeline.storage.models import UNIT, read_model, snapshots
from pipeline.storage.source import TableSource
from pipeline.storage.store import LocalStore
from pipeline.tensors import tensor_column, to_numpy
from pipeline.testing import check_stage

LOGITS = torch.from_numpy(np.random.default_rng(0).normal(scale=2, size=(50, 7))).float()
LABELS = torch.from_numpy(np.random.default_rng(1).integers(7, size=50))
IMAGE = ImageConfig(size=8, channels=1, mean=(0.3,), std=(0.4,), flip=False)


def softmax(z: Any) -> Any:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def test_scores_of_logits_are_those_of_their_formulas() -> None:
    p = softmax(LOGITS.double().numpy())
    ordered = np.sort(p, 1)
    wanted = {
        "el2n": np.sqrt(((p - np.eye(7)[LABELS]) ** 2).sum(1)),
        "margin": 1 - (ordered[:, -1] - ordered[:, -2]),
        "entropy": -(p * np.log(p)).sum(1),
        "least": 1 - ordered[:, -1],
    }
    found = {
        "el2n": scores.el2n(LOGITS, LABELS),
        "margin": scores.margin(LOGITS),
        "entropy": scores.entropy(LOGITS),
        "least": scores.least_confidence(LOGITS),
    }
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name].numpy(), values, rtol=1e-9)


def test_the_surest_logits_have_finite_scores() -> None:
    z = torch.tensor([[1000.0, 0.0, 0.0], [-1000.0, 0.0, 0.0]])
    for score in (scores.margin, scores.entropy, scores.least_confidence):
        assert torch.isfinite(score(z)).all()
    assert scores.el2n(z, torch.tensor([0, 0])).tolist() == pytest.approx([0, np.sqrt(1.5)])


def trajectory(right: list[str], window: int = 2) -> scores.Dynamics:
    """Samples that are right (1) or wrong (0) after each epoch."""
    made = scores.Dynamics(torch.zeros(len(right), dtype=torch.int64), window)
    for epoch in range(len(right[0])):
        good = torch.tensor([sample[epoch] == "1" for sample in right])
        made.add(torch.stack([good.float(), 0.5 * torch.ones(len(right))], 1))
    return made


def test_forgetting_counts_what_was_right_and_then_wrong() -> None:
    found = trajectory(["111111", "011111", "101011", "010101", "000000", "100000"]).scores()
    # Never right: once more than could have been forgotten in six epochs.
    assert found["forgetting"].tolist() == [0, 0, 2, 2, 4, 1]


def test_aum_and_tdds_are_those_of_their_formulas() -> None:
    rng, epochs, window, decay = np.random.default_rng(2), 9, 4, 0.9
    z = rng.normal(scale=2, size=(epochs, 30, 5))
    labels = rng.integers(5, size=30)
    made = scores.Dynamics(torch.from_numpy(labels), window, decay)
    for logits in z:
        made.add(torch.from_numpy(logits))
    found = made.scores()
    rows = np.arange(30)
    others = z.copy()
    others[:, rows, labels] = -np.inf
    margins = z[:, rows, labels] - others.max(2)
    np.testing.assert_allclose(found["aum"], -margins.mean(0), rtol=1e-5)
    p = np.stack([softmax(logits) for logits in z])
    steps = np.abs(p[1:] * (np.log(p[1:]) - np.log(p[:-1]))).sum(2)
    total = np.zeros(30)
    for end in range(window, epochs):
        part = steps[end - window : end]
        norm = np.sqrt(((part - part.mean(0)) ** 2).sum(0))
        total = (1 - decay) * total + decay * norm
    np.testing.assert_allclose(found["tdds"], total, rtol=1e-5)


def test_scores_from_training_need_a_window_of_epochs() -> None:
    made = scores.Dynamics(LABELS)
    for _ in range(10):
        made.add(LOGITS)
    with pytest.raises(UsageError, match="need 11 epochs, and there are 10") as caught:
        made.scores()
    assert caught.value.code == "few-epochs"


def test_grand_is_the_norm_of_each_gradient() -> None:
    torch.manual_seed(0)
    net = build("convnet3", 4, 1).double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    net.eval()
    x, y = torch.randn(6, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])
    wanted = []
    for image, label in zip(x, y, strict=True):
        net.zero_grad()
        torch.nn.functional.cross_entropy(net(image[None]), label[None]).backward()
        squares = [float(p.grad.square().sum()) for p in net.parameters() if p.grad is not None]
        wanted.append(np.sqrt(sum(squares)))
    np.testing.assert_allclose(grand(net, x, y).numpy(), wanted, rtol=1e-8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.pruning.gradients._NUMBERS", 1)
        np.testing.assert_allclose(grand(net, x, y).numpy(), wanted, rtol=1e-8)


def test_of_a_linear_model_grand_is_el2n_times_the_length_of_its_input() -> None:
    net = nn.Linear(12, 5, bias=False).double()
    x, y = torch.randn(40, 12, dtype=torch.float64), torch.randint(0, 5, (40,))
    wanted = scores.el2n(net(x), y) * x.norm(dim=1)
    torch.testing.assert_close(grand(net, x, y), wanted.detach())


def test_cosine_distance_keeps_its_digits_near_zero() -> None:
    x = np.array([[3.0, 4.0], [1.0, 0.0], [1.0, 0.0]], np.float32)
    y = np.array([[6.0, 8.0], [0.0, 2.0], [1.0, 1e-5]])
    np.testing.assert_allclose(scores.cosine_distance(x, y), [0, 1, 5e-11], rtol=1e-6, atol=1e-15)


# Centres of classes.


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    columns=st.integers(1, 5),
    classes=st.integers(1, 4),
    seed=st.integers(0, 999),
    flat=st.booleans(),
)
def test_means_and_medians_of_classes_are_those_of_all_rows_at_once(
    sizes: list[int], columns: int, classes: int, seed: int, flat: bool
) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(-3, 10, (sum(sizes), columns)).astype(np.float32)
    if flat:
        x[:, 0] = 7.25
    labels = rng.integers(classes, size=len(x))
    edges = np.cumsum([0, *sizes])
    shards = [(str(n), x[lo:hi], labels[lo:hi]) for n, (lo, hi) in enumerate(pairwise(edges))]
    for kind in ("mean", "median"):
        task = ClassCentres(kind, classes)
        state: Any = task.begin(0)
        while not task.done(state):
            parts = [task.part(state, [shard], 1) for shard in shards]
            state = task.join(state, iter(parts), 1)
        found, about = task.result(state)
        assert about["samples"] == np.bincount(labels, minlength=classes).tolist()
        for label in range(classes):
            own = x[labels == label].astype(np.float64)
            if not len(own):
                assert np.isnan(found["centres"][label]).all()
                continue
            wanted = own.mean(0) if kind == "mean" else np.sort(own, 0)[(len(own) - 1) // 2]
            np.testing.assert_allclose(found["centres"][label], wanted, rtol=1e-5, atol=1e-5)


# Features.


@pytest.mark.parametrize(("name", "size"), [("convnet3", 128), ("resnet20", 64)])
def test_features_are_what_the_last_linear_layer_is_given(name: str, size: int) -> None:
    net = build(name, 7, 3).eval()
    x = torch.randn(5, 3, 16, 16)
    with torch.inference_mode():
        features = embed(net, x)
        assert features.shape == (5, size)
        torch.testing.assert_close(net.linear(features), net(x))
        torch.testing.assert_close(embed(net, x[:2]), features[:2], rtol=1e-4, atol=1e-5)
    assert not net.linear._forward_pre_hooks


def test_a_network_without_one_linear_layer_at_its_end_is_refused() -> None:
    tokens = nn.Sequential(nn.Flatten(2), nn.Linear(16, 3))
    for net in (nn.Conv2d(3, 2, 1), tokens):
        with pytest.raises(UsageError, match="does not end in a linear layer") as caught:
            embed(net, torch.zeros(2, 3, 4, 4))
        assert caught.value.code == "no-features"


# Weights after every epoch.


def digits(wrong: int = 0) -> tuple[TableSource, Any]:
    """400 digits in four shards, the first ``wrong`` of which have another label."""
    found = load_digits()
    labels = found.target[:400].astype(np.int64)
    labels[:wrong] = (labels[:wrong] + 1 + np.arange(wrong) % 9) % 10
    pixels = (found.images[:400, ..., None] * 15.9).astype(np.uint8)
    parts = []
    for start in range(0, 400, 100):
        rows = slice(start, start + 100)
        table = {
            "key": [f"{n:03d}" for n in range(start, start + 100)],
            "image": tensor_column(pixels[rows]),
            "label": labels[rows],
        }
        parts.append((f"{start:05d}", pa.table(table)))
    return Pixels(tuple(parts), tuple(map(str, range(10)))), labels


class Pixels(TableSource):
    """Tables with tensors, which have no place in JSON."""

    @property
    def shards(self) -> Any:  # type: ignore[override]
        from pipeline.storage.source import Shard

        return [Shard(name, name, len(table)) for name, table in self.parts]


def squeeze(epochs: int) -> Squeeze:
    config = TrainConfig(epochs=epochs, batch_size=64, lr=2e-3)
    return Squeeze(SqueezeConfig(backbone="convnet3", train=config), IMAGE, 10)


def test_weights_of_every_epoch_survive_a_stop(tmp_path: Path) -> None:
    source, _ = digits()
    table = pa.concat_tables(source.tables())
    inputs = {"train": table, "test": table}
    whole = Checkpoint(LocalStore(tmp_path / "whole"), "a")
    train(squeeze(3), inputs, 0, whole, snapshots=True)
    cut = Checkpoint(LocalStore(tmp_path / "cut"), "a", 0)

    class StopError(Exception):
        pass

    seen = []

    def stops(self: Checkpoint, state: Any) -> None:
        write(self, state)
        seen.append(state["done"])
        if len(seen) == 8:  # in the second of three epochs of six steps
            raise StopError

    write = Checkpoint.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "write", stops)
        with pytest.raises(StopError):
            train(squeeze(3), inputs, 0, cut, snapshots=True)
    first = cut.read_snapshot(1)
    train(squeeze(3), inputs, 0, cut, snapshots=True)
    assert cut.read_snapshot(1) == first
    for epoch in (1, 2, 3):
        assert cut.read_snapshot(epoch) == whole.read_snapshot(epoch)
    cut.delete(3)
    assert list(cut.store.files()) == []
    whole.store.replace("a-epoch-00002", b"x" * 100)
    with pytest.raises(RunError, match="after epoch 2 are damaged"):
        whole.read_snapshot(2)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[TableSource, Any, Artifact]:
    source, labels = digits(wrong=20)
    run = local_run(tmp_path_factory.mktemp("fit"))
    inputs = {"train": source, "test": source}
    fits = {unit: Fit(squeeze(12), inputs, snapshots=True) for unit in (UNIT, "other")}
    return source, labels, run.fit_each("proxy", fits)


def test_an_artifact_has_the_weights_of_every_epoch(fitted: Any) -> None:
    _, _, artifact = fitted
    device, x = torch.device("cpu"), torch.randn(3, 1, 8, 8)
    with torch.inference_mode():
        outputs = [net(x) for net in snapshots(artifact, device)]
        last = read_model(artifact, device)(x)
    assert len(outputs) == 12
    assert torch.equal(outputs[-1], last)
    assert not torch.equal(outputs[0], outputs[1])
    with torch.inference_mode():
        assert not torch.equal(read_model(artifact, device, "other")(x), last)


def test_fits_with_and_without_snapshots_are_two_steps(tmp_path: Path) -> None:
    source, _ = digits()
    run = local_run(tmp_path)
    inputs = {"train": source, "test": source}
    one = run.fit_each("a", {UNIT: Fit(squeeze(1), inputs)})
    two = run.fit_each("a", {UNIT: Fit(squeeze(1), inputs, snapshots=True)})
    assert one.identity != two.identity
    assert not list(snapshots(one, torch.device("cpu")))
    assert one.read(f"{UNIT}/weights.safetensors") == two.read(f"{UNIT}/weights.safetensors")


# Stages.


def score(fitted: Any, group: Any, *units: str) -> pa.Table:
    source, _, artifact = fitted
    stage = Score(artifact, units or (UNIT,), group, IMAGE)
    tables = [check_stage(stage, t, ShardContext("s", 0)) for t in source.tables()]
    return pa.concat_tables(tables)


@pytest.mark.parametrize(
    ("group", "columns"),
    [
        ("el2n", ["el2n"]),
        ("grand", ["grand"]),
        ("uncertainty", ["margin", "entropy", "least-confidence"]),
        ("dynamics", ["forgetting", "aum", "tdds"]),
    ],
)
def test_scores_take_the_place_of_images(fitted: Any, group: str, columns: list[str]) -> None:
    table = score(fitted, group)
    assert table.column_names == ["key", "label", *columns]
    for name in columns:
        assert table[name].type == pa.float32()
        assert np.isfinite(to_numpy(table[name])).all()


@pytest.mark.parametrize(
    ("group", "column"),
    [("el2n", "el2n"), ("grand", "grand"), ("dynamics", "aum")],
)
def test_wrong_labels_are_the_hardest(fitted: Any, group: str, column: str) -> None:
    values = to_numpy(score(fitted, group)[column])
    # The share of pairs of a wrong and a right label in which the wrong one is harder.
    assert (values[:20, None] > values[None, 20:]).mean() > 0.9


def test_scores_are_the_mean_over_networks(fitted: Any) -> None:
    one, two = (to_numpy(score(fitted, "el2n", unit)["el2n"]) for unit in (UNIT, "other"))
    both = to_numpy(score(fitted, "el2n", UNIT, "other")["el2n"])
    np.testing.assert_allclose(both, (one + two) / 2, rtol=1e-5)
    assert not np.allclose(one, two)


def test_distances_from_centres_of_features_say_how_hard_samples_are(
    fitted: Any, tmp_path: Path
) -> None:
    source, labels, artifact = fitted
    stage = Embed(artifact, IMAGE)
    tables = [check_stage(stage, t, ShardContext("s", 0)) for t in source.tables()]
    x = to_numpy(pa.concat_tables(tables)["feature"])
    assert x.shape == (400, 128)
    parts = tuple((str(n), table) for n, table in enumerate(tables))
    features = Pixels(parts, source.classes)
    run = local_run(tmp_path)
    for kind, name in (("mean", "supervised-prototypes"), ("median", "moderate")):
        centres = run.rounds(kind, ClassCentres(kind, 10), features, "feature", "label")  # type: ignore[arg-type]
        found = pa.concat_tables(
            check_stage(CentreDistances(centres, name), t, ShardContext("s", 0))  # type: ignore[arg-type]
            for t in tables
        )
        own = read_arrays(centres)["centres"][labels].astype(np.float64)
        if kind == "mean":
            wanted = 1 - (x * own).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(own, axis=1)
        else:
            wanted = np.linalg.norm(x - own, axis=1)
        np.testing.assert_allclose(to_numpy(found[name]), wanted, rtol=1e-4, atol=1e-6)
        el2n = to_numpy(score(fitted, "el2n")["el2n"])
        # Random numbers would give 0.
        assert spearmanr(wanted, el2n).statistic > 0.3
    prototypes = run.rounds("k", ShardedKMeans(10, spherical=True), features, "feature")
    assigned = [Assign(prototypes)(table, ShardContext("s", 0)) for table in tables]
    distance = to_numpy(pa.concat_tables(assigned)["distance"])
    assert spearmanr(distance, el2n).statistic > 0.3


def test_images_whose_features_point_nowhere_are_set_aside(fitted: Any) -> None:
    source, _, artifact = fitted
    table = next(source.tables()).slice(0, 3)
    context = ShardContext("s", 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "pipeline.backbones.embed",
            lambda _, x: torch.tensor([[1.0, 2.0], [0.0, 0.0], [1.0, torch.inf]])[: len(x)],
        )
        result = Embed(artifact, IMAGE)(table, context)
    assert result["key"].to_pylist() == ["000"]
    assert [(bad["key"], bad["reason"]) for bad in context.bad] == [
        ("001", "no-feature"),
        ("002", "no-feature"),
    ]
