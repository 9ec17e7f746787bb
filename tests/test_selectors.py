"""Selectors: one battery over all of them, and each against what its paper says."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.svm import LinearSVC

from pipeline.errors import UsageError
from pipeline.pruning.budget import Budget, class_counts, select
from pipeline.pruning.coverage import Herding, KCenter
from pipeline.pruning.graph import D2
from pipeline.pruning.neighbours import nearest_neighbours
from pipeline.pruning.pool import Pool, key_numbers
from pipeline.pruning.selectors import Band, Ccs, Easy, Hard, Random, selectors
from pipeline.testing import check_selector


def make_pool(size: int = 400, classes: int = 4, seed: int = 0, ties: bool = False) -> Pool:
    """Classes of unequal size, features around their centres, skewed scores."""
    rng = np.random.default_rng(seed)
    labels = np.sort(rng.integers(classes, size=size) * rng.integers(1, 3, size) // 2)
    scores = rng.gamma(1.0 + labels, size=size)
    if ties:
        scores = np.round(scores)
    centres = rng.normal(scale=3.0, size=(classes, 8))
    features = (centres[labels] + rng.normal(size=(size, 8))).astype(np.float32)
    keys = pa.array([f"{n:04d}.png" for n in rng.permutation(size)])
    return Pool(keys, scores, labels, features, rng.integers(100, 1000, size))


def by_count(pool: Pool, selector: Any, count: int, seed: int) -> Any:
    return select(pool, selector, Budget("count", count), seed=seed)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("name", list(selectors))
def test_every_selector_keeps_the_contract(name: str, ties: bool) -> None:
    check_selector(selectors.get(name)(), make_pool(ties=ties), by_count)


def test_names_in_the_registry_are_those_of_the_selectors() -> None:
    assert all(selectors.get(name)().name == name for name in selectors)


def test_a_score_that_all_share_is_broken_by_key() -> None:
    keys = pa.array(["d", "b", "a", "c"])
    pool = Pool(keys, np.ones(4))
    for selector in (Hard(), Easy()):
        rows = by_count(pool, selector, 2, 0)
        assert sorted(keys.take(pa.array(rows)).to_pylist()) == ["a", "b"]


def test_hard_and_easy_are_the_ends_of_the_score() -> None:
    pool = make_pool()
    bare = Pool(pool.keys, pool.scores)
    hard, easy = (by_count(bare, s, 100, 0) for s in (Hard(), Easy()))
    order = np.argsort(pool.scores)
    assert set(hard.tolist()) == set(order[-100:].tolist())
    assert set(easy.tolist()) == set(order[:100].tolist())


def test_a_class_of_easy_samples_keeps_half_of_an_equal_part() -> None:
    labels = np.repeat([0, 1], [500, 500])
    pool = Pool(
        pa.array([f"{n:04d}" for n in range(1000)]), labels + np.linspace(0, 1, 1000), labels
    )
    rows = by_count(pool, Hard(), 100, 0)
    assert np.bincount(labels[rows]).tolist() == [25, 75]
    # Of the class that would have gone, its own hardest.
    assert rows[:25].tolist() == list(range(475, 500))


def test_classes_smaller_than_their_floor_are_kept_whole() -> None:
    labels = np.repeat([0, 1, 2], [5, 500, 500])
    pool = Pool(pa.array([f"{n:04d}" for n in range(1005)]), np.arange(1005.0), labels)
    rows = by_count(pool, Hard(), 300, 0)
    assert np.bincount(labels[rows]).tolist() == [5, 50, 245]


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    share=st.floats(0, 1),
    balance=st.floats(0, 1),
)
def test_class_counts_add_up_and_stay_within_bounds(
    sizes: list[int], share: float, balance: float
) -> None:
    count = max(round(share * sum(sizes)), len(sizes))
    floors = [min(int(np.ceil(balance * count / len(sizes))), size) for size in sizes]
    if sum(floors) > count:
        return
    counts = class_counts(sizes, floors, count)
    assert sum(counts) == count
    for made, low, high in zip(counts, floors, sizes, strict=True):
        assert low <= made <= high


# Budgets.


@pytest.mark.parametrize(
    ("text", "kind", "amount"),
    [
        ("0.7", "share", 0.7),
        ("70%", "share", 0.7),
        ("1.0", "share", 1.0),
        ("100%", "share", 1.0),
        ("35000", "count", 35000),
        ("1", "count", 1),
        ("2GB", "bytes", 2e9),
        ("500 MB", "bytes", 5e8),
        ("123b", "bytes", 123),
    ],
)
def test_budgets_are_read(text: str, kind: str, amount: float) -> None:
    budget = Budget.parse(text)
    assert (budget.kind, budget.amount) == (kind, pytest.approx(amount))


@pytest.mark.parametrize("text", ["", "0", "0.0", "1.5", "120%", "-3", "2 GB of it", "many", "0%"])
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        Budget.parse(text)
    assert caught.value.code == "bad-budget"


def test_a_budget_in_bytes_is_filled_in_order_of_rank() -> None:
    pool = make_pool()
    assert pool.bytes is not None
    rows = select(pool, Hard(), Budget("bytes", 40_000))
    assert pool.bytes[rows].sum() <= 40_000 < pool.bytes[rows].sum() + 2000
    classes = np.bincount(pool.labels[rows], minlength=4)
    assert classes.min() >= 1
    with pytest.raises(UsageError) as caught:
        select(pool, Hard(), Budget("bytes", 300))
    assert caught.value.code == "class-vanishes"
    with pytest.raises(UsageError) as caught:
        select(Pool(pool.keys, pool.scores), Hard(), Budget("bytes", 300))
    assert caught.value.code == "no-sizes"


def test_a_share_is_of_the_pool() -> None:
    pool = make_pool(397)
    assert len(select(pool, Easy(), Budget.parse("30%"))) == round(0.3 * 397)
    assert len(select(pool, Easy(), Budget.parse("1.0"))) == 397


def test_more_than_there_is_cannot_be_kept() -> None:
    with pytest.raises(UsageError, match=r"401 samples .* there are 400") as caught:
        by_count(make_pool(), Hard(), 401, 0)
    assert caught.value.code == "budget-above-data"


@pytest.mark.parametrize(("count", "balance"), [(3, 0.5), (100, 0.0)])
def test_a_class_that_would_vanish_is_named(count: int, balance: float) -> None:
    labels = np.repeat([0, 1, 2, 3], 100)
    pool = Pool(pa.array([f"{n:04d}" for n in range(400)]), np.arange(400.0), labels)
    names = ("cat", "dog", "cow", "owl")
    with pytest.raises(UsageError) as caught:
        select(pool, Hard(), Budget("count", count), balance=balance, classes=names)
    assert caught.value.code == "class-vanishes"
    assert any(name in caught.value.message for name in names)


# Each selector against its definition.


def test_band_is_the_middle_of_each_class() -> None:
    labels = np.repeat([0, 1], 100)
    scores = np.concatenate([np.arange(100.0), 1000 - np.arange(100.0)])
    pool = Pool(pa.array([f"{n:03d}" for n in range(200)]), scores, labels)
    rows = by_count(pool, Band(), 80, 0)
    # Percentiles 0.3 to 0.7 of either class.
    for own in (rows[:40], rows[40:] - 100):
        assert set(own.tolist()) == set(range(30, 70))


def test_ccs_gives_strata_equal_parts_from_the_smallest_on() -> None:
    """Strata of 2, 10 and 88 samples, and a budget of 32: 2 + 10 + 20."""
    scores = np.concatenate([np.full(88, 0.1), np.full(10, 0.5), np.full(2, 0.9)])
    pool = Pool(pa.array([f"{n:03d}" for n in range(100)]), scores)
    rows = by_count(pool, Ccs(beta=0.0, strata=3), 32, 0)
    assert np.unique(scores[rows], return_counts=True)[1].tolist() == [20, 10, 2]
    rows = by_count(pool, Ccs(beta=0.0, strata=3), 12, 0)
    assert np.unique(scores[rows], return_counts=True)[1].tolist() == [5, 5, 2]
    # Without the hardest tenth, two strata are left.
    rows = by_count(pool, Ccs(beta=0.1, strata=2), 16, 0)
    assert np.unique(scores[rows], return_counts=True)[1].tolist() == [14, 2]


def test_ccs_draws_within_strata_by_seed() -> None:
    pool = make_pool()
    one, same, other = (by_count(pool, Ccs(), 60, seed) for seed in (0, 0, 1))
    assert np.array_equal(one, same)
    assert len(set(one.tolist()) & set(other.tolist())) < 50


def test_random_takes_equally_many_of_each_class() -> None:
    labels = np.repeat([0, 1, 2], [10, 300, 90])
    pool = Pool(pa.array([f"{n:03d}" for n in range(400)]), np.zeros(400), labels)
    rows = by_count(pool, Random(), 150, 0)
    assert np.bincount(labels[rows]).tolist() == [10, 70, 70]
    hits = sum(np.isin(np.arange(400), by_count(pool, Random(), 90, seed)) for seed in range(300))
    np.testing.assert_allclose(hits[10:310] / 300, 40 / 300, atol=0.09)


def test_numbers_of_keys_look_random_and_do_not_depend_on_their_neighbours() -> None:
    keys = pa.array([f"train/{n}.jpg" for n in range(20_000)])
    numbers = key_numbers(keys, 3)
    assert abs(numbers.mean() - 0.5) < 0.01
    assert len(np.unique(numbers)) == 20_000
    assert np.array_equal(key_numbers(keys.slice(100, 50), 3), numbers[100:150])
    assert abs(np.corrcoef(numbers, key_numbers(keys, 4))[0, 1]) < 0.03
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03


def herd(x: Any, count: int) -> list[int]:
    """Herding in float64, as it is defined."""
    x = x.astype(np.float64)
    mean, w, chosen = x.mean(0), x.mean(0), []
    for _ in range(count):
        products = x @ w
        products[chosen] = -np.inf
        chosen.append(int(products.argmax()))
        w = w + mean - x[chosen[-1]]
    return chosen


def test_herding_is_that_of_its_definition() -> None:
    x = np.random.default_rng(0).normal(1.0, 1.0, (300, 6)).astype(np.float32)
    pool = Pool(pa.array([f"{n:03d}" for n in range(300)]), np.zeros(300), features=x)
    assert Herding().rank(pool, 40, 0).tolist() == herd(x, 40)


def test_the_mean_of_what_herding_takes_follows_that_of_the_class() -> None:
    pool = make_pool(600, 3)
    assert pool.features is not None
    assert pool.labels is not None

    def gap(selector: Any) -> float:
        rows = by_count(pool, selector, 240, 0)
        return sum(
            float(
                np.linalg.norm(
                    pool.features[rows][pool.labels[rows] == c].mean(0)
                    - pool.features[pool.labels == c].mean(0)
                )
            )
            for c in range(3)
        )

    assert gap(Herding()) < 0.6 * gap(Random())


def furthest(x: Any, count: int) -> list[int]:
    """k-center greedy in float64, with all distances."""
    x = x.astype(np.float64)
    every = ((x[:, None] - x) ** 2).sum(2)
    chosen = [int(((x - x.mean(0)) ** 2).sum(1).argmin())]
    while len(chosen) < count:
        chosen.append(int(every[:, chosen].min(1).argmax()))
    return chosen


def test_k_center_is_that_of_its_definition() -> None:
    x = np.random.default_rng(1).normal(size=(250, 5)).astype(np.float32)
    pool = Pool(pa.array([f"{n:03d}" for n in range(250)]), np.zeros(250), features=x)
    assert KCenter().rank(pool, 60, 0).tolist() == furthest(x, 60)


def test_k_center_is_within_twice_the_best_radius() -> None:
    x = np.random.default_rng(2).normal(size=(12, 2)).astype(np.float32)
    every = np.sqrt(((x[:, None] - x) ** 2).sum(2))
    best = min(every[:, list(c)].min(1).max() for c in itertools.combinations(range(12), 3))
    pool = Pool(pa.array([f"{n:02d}" for n in range(12)]), np.zeros(12), features=x)
    chosen = KCenter().rank(pool, 3, 0)
    assert every[:, chosen].min(1).max() <= 2 * best


@settings(max_examples=25)
@given(
    size=st.integers(2, 60),
    columns=st.integers(1, 6),
    count=st.integers(1, 7),
    seed=st.integers(0, 99),
)
def test_neighbours_in_blocks_are_those_of_all_distances(
    size: int, columns: int, count: int, seed: int
) -> None:
    # Far from the origin, where products round.
    x = (np.random.default_rng(seed).normal(size=(size, columns)) + 100).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.pruning.neighbours._BLOCK", 3 * size)
        near, apart = nearest_neighbours(x, count)
    every = np.sqrt(((x[:, None].astype(np.float64) - x) ** 2).sum(2))
    np.fill_diagonal(every, np.inf)
    wanted = np.sort(every, 1)[:, : min(count, size - 1)]
    np.testing.assert_allclose(apart, wanted, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(np.take_along_axis(every, near, 1), wanted, rtol=1e-3, atol=1e-3)


def d2(x: Any, scores: Any, count: int, neighbours: int = 5) -> list[int]:
    """D2 in float64, without a heap."""
    every = np.sqrt(((x[:, None].astype(np.float64) - x) ** 2).sum(2))
    np.fill_diagonal(every, np.inf)
    near = np.argsort(every, 1, kind="stable")[:, :neighbours]
    apart = np.take_along_axis(every, near, 1)
    apart /= apart.mean()
    values = (scores - scores.min()) / np.ptp(scores)
    values = values + (np.exp(-apart) * values[near]).sum(1)
    chosen: list[int] = []
    left = np.ones(len(x), np.bool_)
    for _ in range(count):
        best = int(np.where(left, values, -np.inf).argmax())
        chosen.append(best)
        left[best] = False
        for j, reach in zip(near[best], np.exp(-apart[best]), strict=True):
            values[j] -= reach * max(values[best], 0)
    return chosen


def test_d2_is_that_of_its_definition() -> None:
    rng = np.random.default_rng(3)
    x, scores = rng.normal(size=(200, 4)).astype(np.float32), rng.gamma(1.0, size=200)
    pool = Pool(pa.array([f"{n:03d}" for n in range(200)]), scores, features=x)
    assert D2().rank(pool, 80, 0).tolist() == d2(x, scores, 80)


def test_d2_takes_one_of_a_heap_of_hard_samples() -> None:
    rng = np.random.default_rng(4)
    x = rng.normal(size=(100, 4)) * 5
    x[:10] = x[0] + 0.01 * rng.normal(size=(10, 4))
    scores = np.where(np.arange(100) < 10, 1.0, 0.6 + 0.2 * rng.random(100))
    pool = Pool(pa.array([f"{n:03d}" for n in range(100)]), scores, features=x.astype(np.float32))
    assert (Hard().rank(pool, 10, 0)[:10] < 10).all()
    assert (D2().rank(pool, 10, 0)[:10] < 10).sum() <= 5


# What cannot be chosen from.


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"scores": np.array([1.0, np.nan, 2.0])}, "score-not-finite"),
        ({"scores": np.array([1.0, 2.0])}, "bad-pool"),
        ({"labels": np.array([0, -1, 1])}, "bad-label"),
        ({"keys": pa.array(["a", "b", "a"])}, "duplicate-keys"),
        ({"keys": pa.array([], pa.string()), "scores": np.empty(0)}, "bad-pool"),
    ],
)
def test_a_pool_that_does_not_hold_is_refused(change: dict[str, Any], code: str) -> None:
    values = {"keys": pa.array(["a", "b", "c"]), "scores": np.arange(3.0), **change}
    with pytest.raises(UsageError) as caught:
        select(Pool(**values), Hard(), Budget("share", 0.5))
    assert caught.value.code == code


@pytest.mark.parametrize("name", ["d2", "herding", "k-center"])
def test_features_that_are_missing_or_not_finite_are_refused(name: str) -> None:
    keys, scores = pa.array(["a", "b", "c"]), np.arange(3.0)
    with pytest.raises(UsageError, match="needs features"):
        select(Pool(keys, scores), selectors.get(name)(), Budget("share", 0.5))
    broken = np.array([[1.0], [np.nan], [2.0]], np.float32)
    with pytest.raises(UsageError, match="finite"):
        select(Pool(keys, scores, features=broken), selectors.get(name)(), Budget("share", 0.7))


def student_error(samples: int, columns: int, side: Any, seed: int) -> float:
    """Angle, in units of pi, between a teacher and the student that the kept samples make.

    Inputs are normal, labels are the teacher's sign, a score is the closeness to its border.
    """
    rng = np.random.default_rng(seed)
    teacher = rng.normal(size=columns)
    teacher /= np.linalg.norm(teacher)
    x = rng.normal(size=(samples, columns))
    labels = (x @ teacher > 0).astype(np.int64)
    keys = pa.array([f"{n:06d}" for n in range(samples)])
    rows = select(Pool(keys, -np.abs(x @ teacher), labels), side, Budget("share", 0.3))
    student = LinearSVC(C=1e3, fit_intercept=False, max_iter=20_000).fit(x[rows], labels[rows])
    w = student.coef_[0] / np.linalg.norm(student.coef_)
    return float(np.arccos(np.clip(w @ teacher, -1, 1)) / np.pi)


@pytest.mark.filterwarnings("ignore:Liblinear failed")
def test_hard_samples_are_worth_more_where_there_are_many_and_easy_ones_where_few() -> None:
    """Sorscher et al., 2022: the sign turns with the number of samples for each parameter."""

    def ratio(samples: int) -> float:
        """Error of the student of easy samples over that of hard ones."""
        easy, hard = (
            np.mean([student_error(samples, 40, side, seed) for seed in range(8)])
            for side in (Easy(), Hard())
        )
        return float(easy / hard)

    assert ratio(60) < 0.95
    assert ratio(3000) > 1.3
