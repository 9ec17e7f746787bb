"""The label store: what is lost, how many bytes it takes, and what fits into a budget."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.dataset_distill.config import RelabelConfig
from pipeline.dataset_distill.label_codec import LabelCodec, label_bytes, plan_labels
from pipeline.errors import UsageError

KINDS = ("float16", "int8", "int4", "top-k")


def logits_of(classes: int, rows: int = 6, views: int = 5, scale: float = 6.0) -> Any:
    rng = np.random.default_rng(classes)
    return (rng.normal(size=(rows, views, classes)) * scale).astype(np.float32)


@given(
    st.sampled_from(["int8", "int4"]),
    st.integers(2, 40),
    st.floats(1e-3, 1e3),
    st.floats(-100, 100),
    st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_levels_are_half_a_level_off_at_most(
    kind: Any, classes: int, scale: float, centre: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(3, 2, classes)) * scale + centre).astype(np.float32)
    codec = LabelCodec(kind=kind)
    found = codec.decode(codec.encode(x), classes)
    assert found.shape == x.shape
    reach = np.ptp(x, axis=-1, keepdims=True)
    # The range is kept as float16, widened so that it holds every value.
    ends = np.abs(x).max(-1, keepdims=True) * 2.0**-9
    steps = 255 if kind == "int8" else 15
    assert (np.abs(found - x) <= (reach + ends) / steps / 2 * 1.001 + ends * 1e-3).all()


def test_equal_logits_are_kept() -> None:
    x = np.full((2, 3, 7), 2.5, np.float32)
    for kind in ("int8", "int4"):
        codec = LabelCodec(kind=kind)
        assert np.abs(codec.decode(codec.encode(x), 7) - x).max() < 0.01


def softmax(x: Any, heat: float) -> Any:
    e = np.exp((x - x.max(-1, keepdims=True)) / heat)
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("heat", [1.0, 20.0])
@pytest.mark.parametrize("classes", [30, 1000])
def test_the_tail_has_the_mass_that_it_had(classes: int, heat: float) -> None:
    x = logits_of(classes)
    codec = LabelCodec(kind="top-k", top_k=10, temperature=heat)
    found = codec.decode(codec.encode(x), classes)
    top = np.argsort(-x, -1)[..., :10]
    before, after = (np.take_along_axis(softmax(v, heat), top, -1) for v in (x, found))
    assert np.abs(before - after).max() < 0.02 * before.max()
    assert np.abs((1 - before.sum(-1)) - (1 - after.sum(-1))).max() < 0.01
    # Without the tail's mass, what is left would be taken for all.
    cut = np.take_along_axis(x, top, -1)
    assert np.abs(softmax(cut, heat).sum(-1) - before.sum(-1)).max() > 0.02


def test_more_than_there_are_is_all() -> None:
    x = logits_of(4)
    codec = LabelCodec(kind="top-k", top_k=50)
    exact = LabelCodec(kind="int8")
    assert np.allclose(
        codec.decode(codec.encode(x), 4), exact.decode(exact.encode(x), 4), atol=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [3, 10, 257, 1000])
def test_bytes_are_those_of_the_formula(kind: Any, classes: int) -> None:
    codec = LabelCodec(kind=kind, top_k=20)
    arrays = codec.encode(logits_of(classes))
    assert sum(a.nbytes for a in arrays.values()) == 6 * 5 * codec.bytes_a_view(classes)
    assert {len(a) for a in arrays.values()} == {6}
    expected = {
        "float16": 2 * classes,
        "int8": classes + 4,
        "int4": -(-classes // 2) + 4,
        "top-k": min(20, classes) * (2 if classes <= 256 else 3) + 6,
    }
    assert codec.bytes_a_view(classes) == expected[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_any_view_of_any_image_is_decoded_by_itself(kind: Any) -> None:
    codec = LabelCodec(kind=kind, top_k=4)
    arrays = codec.encode(logits_of(9))
    whole = codec.decode(arrays, 9)
    for row, view in ((0, 0), (5, 4), (3, 1)):
        one = codec.decode({name: a[row, view] for name, a in arrays.items()}, 9)
        assert np.array_equal(one, whole[row, view])
    some = codec.decode({name: a[np.array([4, 1]), 2] for name, a in arrays.items()}, 9)
    assert np.array_equal(some, whole[[4, 1], 2])


def planned(budget: Any, images: int = 100, classes: int = 10, **values: Any) -> tuple[str, int]:
    config = RelabelConfig(budget=budget, **values)
    codec, views = plan_labels(config, 20.0, images, classes)
    if budget is not None:
        assert label_bytes(codec, views, images, classes) <= plain(budget)
    return codec.kind, views


def plain(budget: Any) -> int:
    units = {"k": 10**3, "M": 10**6, "G": 10**9}
    text = str(budget).removesuffix("B")
    return int(float(text[:-1]) * units[text[-1]]) if text[-1] in units else int(text)


def test_a_budget_takes_the_most_exact_labels_that_fit() -> None:
    assert planned(None) == ("float16", 300)
    assert planned("1MB") == ("float16", 300)
    assert planned("450kB") == ("int8", 300)
    assert planned("300kB") == ("int4", 300)
    assert planned("100kB") == ("int4", 109)
    assert planned(None, codec="int8", views=7) == ("int8", 7)
    # FKD's 28 GB for ImageNet-1k at 50 images a class, fortyfold smaller.
    assert planned("0.7GB", images=50_000, classes=1000) == ("top-k", 89)
    assert planned("40GB", images=50_000, classes=1000) == ("float16", 300)


def test_the_size_of_fkd_is_what_was_published() -> None:
    """Xiao and He, 2024: 28.33 GiB of logits and view parameters for 50 images a class."""
    logits = label_bytes(LabelCodec(), 300, 50_000, 1000)
    assert 27.9 < logits / 2**30 < 28.4


@pytest.mark.parametrize("budget", ["1kB", 5])
def test_a_budget_that_holds_no_view_is_refused(budget: Any) -> None:
    with pytest.raises(UsageError, match="does not hold one view") as error:
        planned(budget)
    assert error.value.code == "small-budget"


@pytest.mark.parametrize("budget", ["many", "-3", "1 parsec", "0"])
def test_a_budget_that_is_no_size_is_refused(budget: str) -> None:
    with pytest.raises(UsageError, match="no number of bytes"):
        plan_labels(RelabelConfig(budget=budget), 20.0, 1, 1)
