"""k-means in memory: the battery for each estimator, and what each alone promises."""

import itertools
import math
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import BaseEstimator
from sklearn.utils.estimator_checks import parametrize_with_checks

from pipeline.clustering import directions
from pipeline.clustering.batched_kmeans import BatchedKMeans
from pipeline.clustering.checks import InputError
from pipeline.clustering.cpu import Rows
from pipeline.clustering.hierarchical_kmeans import HierarchicalKMeans, share_out
from pipeline.clustering.kmeans import KMeans, nearest
from pipeline.clustering.kmeans_1d import KMeans1D
from pipeline.clustering.seeding import plus_plus
from pipeline.clustering.threads import Threads
from pipeline.testing import clusterers
from pipeline.testing.clusterers import blobs, sum_of_squares

CHECKS = [getattr(clusterers, name) for name in dir(clusterers) if name.startswith("check_")]
CHECKS.remove(clusterers.check_clusterer)


class MiddleProblem(BaseEstimator):
    """One of three problems of a batch, with the contract of an estimator of one."""

    def __init__(
        self,
        n_clusters=8,
        *,
        init="k-means++",
        max_iter=300,
        tol=1e-4,
        random_state=None,
        n_jobs=None,
    ):
        self.n_clusters, self.init, self.max_iter, self.tol = n_clusters, init, max_iter, tol
        self.random_state, self.n_jobs = random_state, n_jobs

    def fit(self, x, y=None, sample_weight=None):
        x = np.asarray(x)
        if x.ndim != 2 or not np.isfinite(x).all():
            return BatchedKMeans(self.n_clusters).fit(x)
        other = np.random.default_rng(0).normal(size=(30, x.shape[1]))
        init = self.init
        if not isinstance(init, str):
            init = np.concatenate([other[:2], init, other[:3]])
        weight = np.ones(len(x)) if sample_weight is None else np.asarray(sample_weight)
        ends = np.cumsum([0, 30, len(x), 30])
        made = BatchedKMeans(
            [2, self.n_clusters, 3],
            init=init,
            max_iter=self.max_iter,
            tol=self.tol,
            random_state=self.random_state,
            n_jobs=self.n_jobs,
        )
        made.fit(
            np.concatenate([other, x, other]),
            sample_weight=np.concatenate([np.ones(30), weight, np.ones(30)]),
            offsets=ends,
        )
        self.made_ = made
        self.labels_ = made.labels_[ends[1] : ends[2]]
        self.cluster_centers_ = made.cluster_centers_[2 : 2 + self.n_clusters]
        self.inertia_, self.n_iter_ = float(made.inertia_[1]), int(made.n_iter_[1])
        return self

    def predict(self, x):
        return self.made_.predict(x, offsets=[0, 0, len(x), len(x)])

    def transform(self, x):
        return np.linalg.norm(x[:, None] - self.cluster_centers_[None], axis=2)

    def score(self, x):
        return -sum_of_squares(x, self.cluster_centers_, self.predict(x))


@pytest.fixture(params=["all columns", "leading directions"])
def filtered(request, monkeypatch):
    """Once as small problems are done, once as large ones are."""
    if request.param == "leading directions":
        monkeypatch.setattr(directions, "SMALL", 0)
        monkeypatch.setattr(directions, "_cheapest", lambda _q, _o, basis, _k: basis.shape[1] // 2)


@pytest.mark.parametrize("make", [KMeans, MiddleProblem], ids=["KMeans", "BatchedKMeans"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_battery(check, make, filtered):
    check(make)


def expected_failures(estimator) -> dict[str, str]:
    return {
        "check_sample_weight_equivalence_on_dense_data": "draws differ, as scikit-learn's own do"
    }


@parametrize_with_checks(
    [KMeans(3, random_state=0), BatchedKMeans(3, random_state=0)],
    expected_failed_checks=expected_failures,
)
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


def brute(x, centroids) -> Any:
    x, centroids = np.asarray(x, np.float64), np.asarray(centroids, np.float64)
    return ((x[:, None] - centroids) ** 2).sum(2)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 90),
    st.integers(1, 70),
    st.integers(1, 40),
    st.sampled_from([1e-3, 1.0, 1e4]),
    st.sampled_from([0.0, 30.0]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_nearest_is_nearest(rows, columns, clusters, scale, offset, directed, seed):
    """Of any shape, size and distance from 0, with and without directions that suit the rows."""
    rng = np.random.default_rng(seed)
    spectrum = np.exp(-rng.uniform(0, 1) * np.arange(columns))
    x = (scale * (rng.normal(size=(rows, columns)) * spectrum + offset)).astype(np.float32)
    centroids = (scale * (rng.normal(size=(clusters, columns)) * spectrum + offset)).astype(
        np.float32
    )
    centroids[: clusters // 3] = x[rng.integers(rows, size=clusters // 3)]
    found = None
    if directed and columns > 1:
        depth = int(rng.integers(1, columns))
        turn = np.linalg.qr(rng.normal(size=(columns, columns)))[0]
        basis = (turn[:, :depth] * (1 - 1e-6)).astype(np.float32)
        found = directions.Directions(x.mean(0), basis)
    with Threads(1) as threads:
        made = Rows(x, np.ones(rows, np.float32), found, threads)
        made.assign(centroids)
    apart = brute(x, centroids)
    near = apart[np.arange(rows), made.labels]
    assert (near <= apart.min(1) * (1 + 1e-5)).all()
    np.testing.assert_allclose(made.near, near, rtol=1e-5, atol=0)
    # What the last labels were does not matter.
    with Threads(1) as threads:
        again = Rows(x, np.ones(rows, np.float32), None, threads)
        again.assign(centroids[::-1].copy())
        again.forget()
        again.assign(centroids)
    np.testing.assert_array_equal(made.labels, again.labels)


@pytest.mark.parametrize("rest", [0.0, 1e-3, 1.0])
def test_leading_coordinates_are_off_by_no_more_than_is_said(rest):
    """Where products are all alike, as in flat pictures, what rounding does adds up."""
    rng = np.random.default_rng(0)
    flat, columns = 3000, 3072
    x = np.full((500, columns), rng.normal(size=(500, 1)), np.float32)
    x[:, flat:] = rest * rng.normal(size=(500, columns - flat))
    basis = np.zeros((columns, 3), np.float32)
    basis[:flat, 0] = (1 - 1e-6) / np.sqrt(flat)
    with Threads(1) as threads:
        mean = np.zeros(columns, np.float32)
        made = directions.Leading.of(x, directions.Directions(mean, basis), threads)
    wide = x.astype(np.float64)
    inside = wide @ basis
    tail = np.sqrt((wide**2).sum(1) - (inside**2).sum(1))
    off = np.linalg.norm(made.head - np.column_stack([inside, tail]), axis=1)
    assert (off <= made.error).all()
    np.testing.assert_allclose(made.square, (made.head.astype(np.float64) ** 2).sum(1), rtol=1e-6)


def test_of_equal_distances_the_first_centroid():
    centroids = np.array([[9.0, 9.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]], np.float32)
    labels, near = nearest(np.zeros((50, 2), np.float32), centroids)
    assert set(labels) == {1}
    assert set(near) == {1.0}


@pytest.mark.parametrize("directed", [False, True])
def test_bounds_that_move_with_centroids_change_nothing(directed, monkeypatch):
    """Rows that are not read again have the labels that they would have if they were."""
    if directed:
        monkeypatch.setattr(directions, "SMALL", 0)
        monkeypatch.setattr(directions, "_cheapest", lambda *_: 5)
    x = blobs(3000, 30, 60).astype(np.float32) * 0.8 ** np.arange(30, dtype=np.float32)
    with Threads(1) as threads:
        found = directions.find_directions(x, 60)
        assert (found is not None) == directed
        rows = Rows(x, np.ones(len(x), np.float32), found, threads)
        centroids = x[:60].copy()
        for _ in range(25):
            rows.assign(centroids)
            np.testing.assert_array_equal(rows.labels, nearest(x, centroids)[0])
            centroids, _ = rows.means(centroids, False)


@pytest.mark.parametrize("init", ["k-means++", "k-means||", "random"])
def test_inits_by_quality(init):
    """On blobs far apart k-means++ and k-means|| find all of them, and random rows do not."""
    rng = np.random.default_rng(0)
    centres = rng.normal(scale=100.0, size=(40, 8))
    x = centres[rng.integers(40, size=4000)] + rng.normal(size=(4000, 8))
    optimum = 4000 * 8
    made = [KMeans(40, init=init, random_state=seed).fit(x).inertia_ for seed in range(4)]
    if init == "random":
        assert min(made) > 3 * optimum
    else:
        assert np.median(made) < 1.1 * optimum


def test_plus_plus_draws_by_squared_distance():
    """The chance of a row to be the second seed, of two tries, is that of the formula."""
    x = np.array([[0.0], [1.0], [3.0]], np.float32)
    weight = np.array([1.0, 2.0, 1.0], np.float32)
    counts = np.zeros((3, 3))
    for seed in range(4000):
        with Threads(1) as threads:
            rows = Rows(x, weight, None, threads)
            first, second = plus_plus(rows, 2, np.random.RandomState(seed))
        counts[first, second] += 1
    expected = np.zeros((3, 3))
    for first in range(3):
        share = weight * (x[:, 0] - x[first, 0]) ** 2
        share = share / share.sum()
        for one, two in itertools.product(range(3), repeat=2):
            cost = {
                j: (
                    weight * np.minimum((x[:, 0] - x[first, 0]) ** 2, (x[:, 0] - x[j, 0]) ** 2)
                ).sum()
                for j in (one, two)
            }
            chosen = min((one, two), key=lambda j: cost[j])
            expected[first, chosen] += weight[first] / 4 * share[one] * share[two]
    assert np.abs(counts / 4000 - expected).max() < 0.03


def test_plus_plus_is_as_good_as_scikit_learns():
    from sklearn.cluster import kmeans_plusplus

    x = blobs(3000, 10, 50).astype(np.float32)

    def cost(seeds):
        return brute(x, x[seeds]).min(1).sum()

    ours, peers = [], []
    for seed in range(12):
        with Threads(1) as threads:
            rows = Rows(x, np.ones(len(x), np.float32), None, threads)
            seeds = plus_plus(rows, 50, np.random.RandomState(seed))
        assert len(set(seeds)) == 50
        np.testing.assert_allclose(rows.near.sum(), cost(seeds), rtol=1e-4)
        ours.append(cost(seeds))
        peers.append(cost(kmeans_plusplus(x, 50, random_state=seed)[1]))
    assert np.median(ours) < 1.05 * np.median(peers)


def test_spherical_is_by_angle():
    rng = np.random.default_rng(0)
    x = blobs(900, 6, 9) * rng.uniform(0.1, 10.0, (900, 1))
    made = KMeans(9, spherical=True, random_state=0).fit(x)
    np.testing.assert_allclose(np.linalg.norm(made.cluster_centers_, axis=1), 1.0, rtol=1e-6)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    np.testing.assert_array_equal(made.labels_, (unit @ made.cluster_centers_.T).argmax(1))
    np.testing.assert_array_equal(made.predict(x * 5.0), made.labels_)
    for k in range(9):
        mean = unit[made.labels_ == k].sum(0)
        np.testing.assert_allclose(made.cluster_centers_[k], mean / np.linalg.norm(mean), atol=0.05)
    with pytest.raises(InputError, match="no direction"):
        KMeans(2, spherical=True).fit(np.zeros((5, 3)))


def test_best_of_several_starts():
    x = blobs(600, 4, 25)
    once = [KMeans(25, init="random", random_state=s).fit(x).inertia_ for s in range(3)]
    several = KMeans(25, init="random", n_init=8, random_state=0).fit(x)
    assert several.inertia_ <= min(once) * 1.02
    assert math.isclose(
        several.inertia_,
        sum_of_squares(x, several.cluster_centers_, several.labels_),
        rel_tol=1e-5,
    )


def test_a_batch_is_its_problems():
    """Bit for bit, whatever the threads, sizes and numbers of clusters."""
    rng = np.random.default_rng(0)
    sizes, clusters = [40, 7, 300, 41, 120], [5, 7, 40, 1, 16]
    parts = [blobs(size, 33, 4, seed=size).astype(np.float32) for size in sizes]
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    weight = rng.uniform(0.1, 2.0, offsets[-1])
    for jobs in (1, 3):
        made = BatchedKMeans(clusters, random_state=7, n_jobs=jobs)
        made.fit(np.concatenate(parts), sample_weight=weight, offsets=offsets)
        for p, part in enumerate(parts):
            rows = slice(offsets[p], offsets[p + 1])
            alone = KMeans(clusters[p], random_state=int(made.random_states_[p]))
            alone.fit(part, sample_weight=weight[rows])
            ours = slice(made.center_offsets_[p], made.center_offsets_[p + 1])
            np.testing.assert_array_equal(made.cluster_centers_[ours], alone.cluster_centers_)
            np.testing.assert_array_equal(made.labels_[rows], alone.labels_)
            assert made.inertia_[p] == alone.inertia_


@pytest.mark.parametrize(
    ("offsets", "says"),
    [([0, 5, 9], "number of rows"), ([0, 4, 4, 10], "problem 1"), ([1, 10], "number of rows")],
)
def test_offsets_that_do_not_fit(offsets, says):
    with pytest.raises(InputError, match=says):
        BatchedKMeans(1).fit(np.eye(10), offsets=offsets)


def test_a_problem_with_too_few_rows_is_named():
    with pytest.raises(InputError, match="problem 2"):
        BatchedKMeans(3).fit(np.eye(10), offsets=[0, 4, 8, 10])


def best_partition(values, weights, clusters) -> float:
    """The least sum of squares over all partitions into intervals."""
    order = np.argsort(values)
    v, w = np.asarray(values, np.float64)[order], np.asarray(weights, np.float64)[order]
    least = math.inf
    for cuts in itertools.combinations(range(1, len(v)), clusters - 1):
        total = 0.0
        for lo, hi in itertools.pairwise([0, *cuts, len(v)]):
            mean = np.average(v[lo:hi], weights=w[lo:hi])
            total += float((w[lo:hi] * (v[lo:hi] - mean) ** 2).sum())
        least = min(least, total)
    return least


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_one_dimension_is_optimal(data):
    values = data.draw(
        st.lists(st.integers(-6, 6) | st.floats(-100, 100, width=32), min_size=1, max_size=9)
    )
    weights = data.draw(st.lists(st.integers(1, 4), min_size=len(values), max_size=len(values)))
    clusters = data.draw(st.integers(1, len(values)))
    made = KMeans1D(clusters).fit(values, sample_weight=weights)
    best = best_partition(values, weights, clusters)
    apart = np.asarray(values) - made.cluster_centers_[made.labels_, 0]
    assert math.isclose(made.inertia_, best, rel_tol=1e-9, abs_tol=1e-7)
    assert math.isclose((weights * apart**2).sum(), best, rel_tol=1e-9, abs_tol=1e-7)
    assert (np.diff(made.cluster_centers_[:, 0]) >= 0).all()


@pytest.mark.parametrize(
    "values",
    [
        np.random.default_rng(0).gamma(1.0, size=200_000).astype(np.float32),
        np.random.default_rng(1).standard_cauchy(200_000),
        np.random.default_rng(2).normal(1e6, 1.0, 200_000),
        np.random.default_rng(3).integers(0, 50, 200_000) / 7,
        np.concatenate([np.random.default_rng(4).normal(size=199_999), [1e12]]),
        np.random.default_rng(5).lognormal(0.0, 4.0, 200_000),
    ],
    ids=["gamma", "heavy tails", "far from 0", "few distinct", "outlier", "lognormal"],
)
@pytest.mark.parametrize("clusters", [1, 2, 10, 100])
def test_many_values_rest_at_a_fixed_point_no_worse_than_scikit_learns(values, clusters):
    from sklearn.cluster import KMeans as Peer

    made = KMeans1D(clusters).fit(values)
    wide = values.astype(np.float64)
    means = made.cluster_centers_[:, 0]
    full = np.bincount(made.labels_, minlength=clusters) > 0
    expected = np.array([wide[made.labels_ == k].mean() for k in np.flatnonzero(full)])
    np.testing.assert_allclose(means[full], expected, rtol=1e-9, atol=1e-9)
    inertia = ((wide - means[made.labels_]) ** 2).sum()
    assert math.isclose(made.inertia_, inertia, rel_tol=1e-6, abs_tol=1e-6)
    apart = np.abs(wide[::97, None] - means)
    assert (apart[np.arange(len(apart)), made.labels_[::97]] <= apart.min(1) + 1e-9).all()
    if clusters <= 10:
        peer = Peer(clusters, n_init=1, random_state=0).fit(wide[:, None])
        centres = np.sort(peer.cluster_centers_[:, 0])
        least = np.abs(wide[:, None] - centres).min(1)
        assert inertia <= (least**2).sum() * (1 + 1e-6)


def test_one_dimension_far_from_zero():
    values = 1e8 + np.array([0.0, 1.0, 10.0, 11.0, 30.0])
    made = KMeans1D(3).fit(values)
    assert made.inertia_ == 1.0
    assert made.cluster_centers_[:, 0].tolist() == [1e8 + 0.5, 1e8 + 10.5, 1e8 + 30.0]


def test_one_dimension_for_any_number_of_threads():
    values = np.random.default_rng(0).gamma(1.0, size=300_000)
    made = [KMeans1D(10, n_jobs=jobs).fit(values) for jobs in (1, 8)]
    np.testing.assert_array_equal(made[0].cluster_centers_, made[1].cluster_centers_)
    np.testing.assert_array_equal(made[0].labels_, made[1].labels_)


def test_one_dimension_has_its_limits():
    few = KMeans1D(4).fit([2.0, 2.0, 5.0, 5.0])
    assert few.inertia_ == 0.0
    assert few.cluster_centers_[:, 0].tolist() == [2.0, 5.0, 5.0, 5.0]
    assert few.labels_.tolist() == [0, 0, 1, 1]
    for bad, says in (
        ([1.0, np.nan], "NaN"),
        (np.ones((3, 2)), "single values"),
        (["a", "b"], "not numbers"),
    ):
        with pytest.raises(InputError, match=says):
            KMeans1D(1).fit(bad)
    with pytest.raises(InputError, match="n_clusters=3"):
        KMeans1D(3).fit([1.0, 2.0])


def test_an_estimator_can_be_stored():
    x = blobs(200, 5, 4)
    for made in (KMeans(4, random_state=0).fit(x), KMeans1D(4).fit(x[:, 0])):
        again = pickle.loads(pickle.dumps(made))
        rows = x if isinstance(made, KMeans) else x[:, 0]
        np.testing.assert_array_equal(again.predict(rows), made.labels_)


HIERARCHICAL = [
    clusterers.check_duplicates,
    clusterers.check_threads,
    clusterers.check_labels,
    clusterers.check_few_distinct_rows,
    clusterers.check_parameters,
]


def hierarchical(*, n_clusters, init="k-means++", **options):
    """What does not begin from given centroids."""
    return HierarchicalKMeans(n_clusters, **options)


@pytest.mark.parametrize("check", HIERARCHICAL, ids=lambda check: check.__name__)
def test_battery_of_hierarchical(check, filtered):
    check(hierarchical)


@parametrize_with_checks(
    [HierarchicalKMeans(3, random_state=0)], expected_failed_checks=expected_failures
)
def test_scikit_learns_own_checks_of_hierarchical(estimator, check):
    check(estimator)


class Counted(list):
    """Shards that count how often each is read, and how many bytes are held at a time."""

    reads = 0

    def __getitem__(self, number):
        self.reads += 1
        return super().__getitem__(number).copy()


def test_shards_are_rows_one_after_the_other():
    """However they are cut, and however little is held at a time."""
    x = blobs(5000, 12, 90).astype(np.float32)
    options = {"n_clusters": 90, "random_state": 4}
    whole = HierarchicalKMeans(**options).fit(x)
    shards = Counted([x[:17], x[17:3000], x[3000:]])
    cut = HierarchicalKMeans(**options).fit(shards)
    np.testing.assert_array_equal(cut.cluster_centers_, whole.cluster_centers_)
    np.testing.assert_array_equal(cut.labels_, whole.labels_)
    np.testing.assert_array_equal(cut.predict(shards), whole.labels_)
    # 5,000 rows of 48 bytes, 60,000 at a time: at least four rounds, and three reads beside them.
    reads = Counted([x[:2500], x[2500:]])
    few = HierarchicalKMeans(**options, memory=60_000).fit(reads)
    assert few.cluster_centers_.shape == (90, 12)
    assert 2 * (4 + 4) <= reads.reads <= 2 * (7 + 5)
    assert math.isclose(few.inertia_, whole.inertia_, rel_tol=0.1)


def test_hierarchical_is_near_flat():
    """A few per cent above k-means over all rows, and far below random rows."""
    x = blobs(8000, 10, 200).astype(np.float32)
    flat = KMeans(256, random_state=0).fit(x).inertia_
    made = HierarchicalKMeans(256, random_state=0).fit(x).inertia_
    assert made < 1.08 * flat
    rows = x[np.random.default_rng(0).choice(8000, 256, replace=False)]
    assert made < 0.8 * nearest(x, rows)[1].sum()


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_clusters_are_shared_out_by_cost(data):
    rows = np.array(data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=12)))
    cost = np.array(
        data.draw(st.lists(st.floats(0, 1e6), min_size=len(rows), max_size=len(rows)))
    ) * (rows > 0)
    if not rows.sum():
        return
    total = data.draw(st.integers(int((rows > 0).sum()), int(rows.sum())))
    given_out = share_out(total, cost, rows)
    assert given_out.sum() == total
    assert ((given_out >= (rows > 0)) & (given_out <= rows)).all()
    if cost.sum() > 0 and (rows > total).all():
        assert (given_out >= np.floor(cost / cost.sum() * (total - len(rows)))).all()
