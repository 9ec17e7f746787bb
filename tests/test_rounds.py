"""Steps in rounds, and k-means over shards, which is one: any kill, any number of workers."""

from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faults import Faults, FaultyStore, Killed, Noting, Samples, each, output
from samples import attempt, local_run

from pipeline.clustering.checks import InputError
from pipeline.clustering.kmeans import KMeans, nearest
from pipeline.clustering.sharded_kmeans import ShardedKMeans
from pipeline.errors import RunError
from pipeline.orchestration.local_executor import LocalExecutor
from pipeline.orchestration.plan import Planner
from pipeline.orchestration.rounds import part_units
from pipeline.orchestration.run import open_run
from pipeline.storage.array_artifact import read_arrays
from pipeline.storage.artifact import Artifact
from pipeline.storage.features import open_features
from pipeline.storage.source import Shard
from pipeline.storage.store import LocalStore
from pipeline.tensors import as_bytes, tensor_column
from pipeline.testing.clusterers import blobs

pytestmark = pytest.mark.usefixtures("without_hold_and_patience")


class Vectors(Samples):
    """Shards of vectors in memory."""

    @cached_property
    def shards(self):
        return tuple(Shard(name, name, table.num_rows) for name, table in self.parts)


def vectors(x, *cuts) -> Vectors:
    """Rows cut into shards at the given places."""
    parts = np.split(np.asarray(x, np.float32), cuts)
    return Vectors(
        tuple((f"{i:03d}", pa.table({"v": tensor_column(part)})) for i, part in enumerate(parts))
    )


X = blobs(1800, 6, 24)
SOURCE = vectors(X, 100, 101, 700, 1500)
TASK = ShardedKMeans(24, max_iter=6)


def fit(store, executor=None, task=TASK, source=SOURCE, parts=3, **options) -> Artifact:
    with open_run(store, executor or LocalExecutor(), **options) as run:
        return run.rounds("centroids", task, source, "v", parts=parts)


def by_hand(task, state, shards, parts):
    """All rounds in this process, without a run."""
    rounds = 0
    while not task.done(state):
        cut = np.array_split(np.arange(len(shards)), parts)
        named = [[(str(i), shards[i]) for i in part] for part in cut if len(part)]
        state = task.join(state, iter([task.part(state, part, 1) for part in named]), 1)
        rounds += 1
    return state, rounds


@pytest.mark.parametrize("spherical", [False, True])
def test_from_one_start_the_result_is_that_of_rows_in_memory(spherical):
    x = X.astype(np.float32)
    init = x[:24] / np.linalg.norm(x[:24], axis=1, keepdims=True) if spherical else x[:24]
    made = KMeans(24, init=init, max_iter=200, tol=0.0, spherical=spherical).fit(x)
    task = ShardedKMeans(24, max_iter=200, spherical=spherical)
    for shards, parts in (([x], 1), (np.split(x, [5, 900, 901]), 3)):
        state, _ = by_hand(task, task.begin_from(init), shards, parts)
        arrays, metrics = task.result(state)
        np.testing.assert_allclose(arrays["centroids"], made.cluster_centers_, atol=1e-5)
        assert abs(metrics["inertia"] / made.inertia_ - 1) < 1e-6


def test_empty_clusters_take_the_furthest_rows_of_all_shards():
    x = blobs(500, 4, 5).astype(np.float32)
    init = np.concatenate([x[:2], np.full((2, 4), 1e3), np.full((1, 4), -1e3)]).astype(np.float32)
    made = KMeans(5, init=init, max_iter=3, tol=0.0).fit(x)
    task = ShardedKMeans(5, max_iter=3)
    state, _ = by_hand(task, task.begin_from(init, -1.0), np.split(x, [200, 350]), 3)
    np.testing.assert_allclose(task.result(state)[0]["centroids"], made.cluster_centers_, atol=1e-5)


def test_k_means_parallel_finds_what_k_means_plus_plus_does():
    rng = np.random.default_rng(0)
    centres = rng.normal(scale=100.0, size=(40, 8))
    x = (centres[rng.integers(40, size=4000)] + rng.normal(size=(4000, 8))).astype(np.float32)
    task = ShardedKMeans(40)
    found = []
    for seed in range(3):
        state, _ = by_hand(task, task.begin(seed), np.split(x, [900, 1000]), 2)
        found.append(task.result(state)[1]["inertia"])
    assert np.median(found) < 1.1 * 4000 * 8


def test_a_run_publishes_centroids_and_finds_them_again(tmp_path):
    run = local_run(tmp_path)
    artifact = run.rounds("centroids", TASK, SOURCE, "v", parts=3)
    centroids = read_arrays(artifact)["centroids"]
    assert centroids.shape == (24, 6)
    metrics = dict(artifact.metrics)
    inertia = metrics["centroids"]["inertia"] if "centroids" in metrics else metrics["inertia"]
    assert inertia == pytest.approx(nearest(X.astype(np.float32), centroids)[1].sum(), rel=1e-5)
    executed = run.executed
    assert executed > 3 * 8
    again = local_run(tmp_path)
    assert again.rounds("centroids", TASK, SOURCE, "v", parts=3).sha256 == artifact.sha256
    assert again.executed == 0
    # Nothing of the rounds is left.
    assert not [i.name for i in LocalStore(tmp_path).files() if "/rounds/" in i.name]


def test_whatever_is_killed_the_bytes_are_the_same(tmp_path):
    whole = tmp_path / "whole"
    faults = Faults()
    fit(FaultyStore(LocalStore(whole), faults))
    expected = output(LocalStore(whole))
    assert any(name.endswith("arrays.safetensors") for name in expected)
    calls = list(each(faults.calls))
    # Each kind of call at its first, second and some later turns.
    chosen = [c for c in calls if c[1] < 2 or c[1] % 11 == 5]
    assert len(chosen) > 20
    for number, at in enumerate(chosen):
        for effect in ("kill before", "kill after"):
            store = LocalStore(tmp_path / f"{number}-{effect[5:]}")
            faults = Faults(at, effect)
            with pytest.raises(Killed):
                fit(FaultyStore(store, faults))
            fit(store)
            assert output(store) == expected, (at, effect)


def test_what_was_done_of_a_round_is_not_done_again(tmp_path):
    class Stops(LocalExecutor):
        """Ends in the middle of the fifth round."""

        rounds = 0

        def run(self, work, units, resources):
            self.rounds += 1
            yield from islice(super().run(work, units, resources), 2 if self.rounds == 5 else None)
            if self.rounds == 5:
                raise KeyboardInterrupt

    store = LocalStore(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        fit(store, Stops())
    executor = Noting()
    fit(store, executor)
    first = [unit.name for _, unit in executor.work][:4]
    assert first == ["part-00002", "part-00000", "part-00001", "part-00002"]
    # Four rounds and two parts were done; draws, weights, six iterations and a last look are left.
    assert len(executor.work) == 3 * (6 + 1 + 6 + 1) - 3 * 4 - 2


def test_an_attempt_that_outlives_its_round_changes_nothing(tmp_path):
    executor = Noting()
    store = LocalStore(tmp_path)
    fit(store, executor)
    before = output(store)
    work, unit = executor.work[4]
    late = attempt(work, unit)
    assert "error" in late
    assert output(store) == before
    fit(store)


def test_the_parts_matter_and_the_workers_do_not(tmp_path):
    pytest.importorskip("ray")
    from pipeline.orchestration.ray_executor import RayExecutor

    features, local = tmp_path / "features", tmp_path / "local"
    features.mkdir()
    table = pa.table({"v": tensor_column(X.astype(np.float32))})
    pq.write_table(as_bytes(table), features / "x.parquet", row_group_size=170)
    source = open_features(features, "v")
    fit(LocalStore(local), source=source)
    for workers in (1, 2):
        out = tmp_path / str(workers)
        fit(LocalStore(out), RayExecutor(workers=workers), source=source)
        assert output(LocalStore(out)) == output(LocalStore(local))


def test_a_plan_names_the_step(tmp_path):
    planner = Planner(LocalStore(tmp_path), LocalExecutor())
    planner.rounds("centroids", TASK, SOURCE, "v", parts=3)
    assert [(plan.step, plan.stages, plan.missing) for plan in planner.plans] == [
        ("centroids", ("ShardedKMeans",), 1)
    ]
    fit(LocalStore(tmp_path))
    planner = Planner(LocalStore(tmp_path), LocalExecutor())
    planner.rounds("centroids", TASK, SOURCE, "v", parts=3)
    assert planner.plans[0].missing == 0


@pytest.mark.parametrize(
    ("source", "task", "says"),
    [
        (vectors(X[:20], 5), TASK, "20 rows"),
        (vectors(np.where(np.arange(1800)[:, None] == 1600, np.nan, X), 700), TASK, "NaN"),
        (vectors(X[:, 0], 700), TASK, "matrix"),
        (Vectors(()), TASK, "no sample"),
    ],
    ids=["too few rows", "NaN", "no vectors", "no shards"],
)
def test_what_cannot_be_clustered_is_refused(tmp_path, source, task, says):
    with pytest.raises((RunError, InputError), match=says):
        fit(LocalStore(tmp_path), source=source, task=task)


def test_parts_are_all_shards_in_order():
    shards = [Shard(str(i), str(i)) for i in range(7)]
    for parts in (1, 2, 3, 7, 50):
        units = part_units(shards, parts)
        assert [s for unit in units for s in unit.shards] == shards
        assert [unit.index for unit in units] == list(range(min(parts, 7)))


@dataclass(frozen=True)
class Mean:
    """The smallest task there is."""

    version: ClassVar[int] = 1

    def begin(self, seed):
        return {"seed": np.array([seed])}

    def part(self, state, shards, threads):
        total = [(x.sum(0, dtype=np.float64), len(x)) for _, x in shards]
        return {"sum": sum(s for s, _ in total), "count": np.array([sum(n for _, n in total)])}

    def join(self, state, parts, threads):
        listed = list(parts)
        return {"mean": sum(p["sum"] for p in listed) / sum(p["count"] for p in listed)}

    def done(self, state):
        return "mean" in state

    def result(self, state):
        return state, {"rounds": 1}


def test_any_task_goes_in_rounds(tmp_path):
    artifact = fit(LocalStore(tmp_path), task=Mean())
    np.testing.assert_allclose(read_arrays(artifact)["mean"], X.mean(0), rtol=1e-5)
