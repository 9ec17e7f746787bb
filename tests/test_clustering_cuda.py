"""Rows on a GPU against float64 and against rows in main memory."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.clustering.cpu import Rows
from pipeline.clustering.kmeans import KMeans
from pipeline.clustering.lloyd import lloyd
from pipeline.clustering.threads import Threads
from pipeline.errors import UsageError
from pipeline.testing import clusterers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and "TRITON_INTERPRET" not in os.environ:
    # Without a GPU kernels are interpreted: what Triton is told when it is first imported.
    if "triton" in sys.modules:
        pytest.skip("triton is imported already", allow_module_level=True)
    os.environ["TRITON_INTERPRET"] = "1"
kernels = pytest.importorskip("pipeline.clustering.triton_kernels")
cuda = importlib.import_module("pipeline.clustering.cuda")

CHECKS = [getattr(clusterers, name) for name in dir(clusterers) if name.startswith("check_")]
CHECKS.remove(clusterers.check_clusterer)
SLOW = {clusterers.check_threads, clusterers.check_monotone} if DEVICE == "cpu" else set()
"""Thousands of rows, which take minutes to be interpreted."""

SHAPES = [(257, 19, 37), (300, 1, 3), (5, 5, 1), (130, 65, 16), (1, 1, 70), (64, 300, 33)]
"""N, K, D: multiples of no block, of some, and less than one."""


def to_device(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, np.float32)).to(DEVICE)


def samples(count: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, columns)).astype(np.float32)


def ones(count: int) -> np.ndarray:
    return np.ones(count, np.float32)


def rows_of(x: np.ndarray, weights: np.ndarray | None = None, **options: Any) -> Any:
    weights = ones(len(x)) if weights is None else weights
    return cuda.CudaRows(to_device(x), to_device(weights), **options)


def distances(x: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Squared, float64 (N, K)."""
    apart = x[:, None].astype(np.float64) - centroids[None].astype(np.float64)
    return np.einsum("nkd,nkd->nk", apart, apart)


def labels_of(rows: Any) -> np.ndarray:
    return rows.labels.cpu().numpy()


@pytest.mark.parametrize(
    "check",
    [pytest.param(c, marks=[pytest.mark.slow] if c in SLOW else [], id=c.__name__) for c in CHECKS],
)
def test_battery(check: Callable[[Any], None]) -> None:
    check(partial(KMeans, backend="triton"))


@pytest.mark.parametrize("shape", SHAPES)
def test_labels_and_distances_are_those_of_float64(shape: tuple[int, int, int]) -> None:
    count, clusters, columns = shape
    x, centroids = samples(count, columns), samples(clusters, columns, seed=1)
    rows = rows_of(x)
    assert rows.assign(to_device(centroids)) == count
    expected = distances(x, centroids)
    assert rows.labels.dtype == torch.int32
    assert rows.near.dtype == torch.float32
    assert np.array_equal(labels_of(rows), expected.argmin(1))
    assert np.allclose(rows.near.cpu(), expected.min(1), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("precision", kernels.PRECISIONS)
def test_each_precision_finds_a_centroid_hardly_further_than_the_nearest(precision: str) -> None:
    x, centroids = samples(200, 40), samples(17, 40, seed=1)
    rows = rows_of(x, precision=precision)
    rows.assign(to_device(centroids))
    expected = distances(x, centroids)
    found = expected[np.arange(200), labels_of(rows)]
    assert (found <= expected.min(1) * 1.01).all()
    assert np.allclose(rows.near.cpu(), found, rtol=1e-5)


def test_rows_far_from_zero() -> None:
    x = samples(200, 20) + np.float32(1000.0)
    centroids = x[:30] + np.float32(0.25)
    rows = rows_of(x)
    rows.assign(to_device(centroids))
    assert np.array_equal(labels_of(rows), distances(x, centroids).argmin(1))


def test_of_equal_centroids_the_first_is_taken() -> None:
    x, some = samples(100, 21), samples(7, 21, seed=1)
    # Copies lie in one block of centroids, in another, and at its edges.
    centroids = np.concatenate([some, some[::-1], some, *[some + 50.0] * 40, some])
    rows = rows_of(x)
    rows.assign(to_device(centroids))
    assert np.array_equal(labels_of(rows), distances(x, some).argmin(1))


def test_of_centroids_at_equal_distance_the_first_is_taken() -> None:
    rng = np.random.default_rng(7)
    x, centroids = rng.integers(100, 104, (200, 5)), rng.integers(100, 104, (40, 5))
    rows = rows_of(x)
    rows.assign(to_device(centroids))
    expected = distances(x, centroids)
    assert np.count_nonzero(np.sort(expected, 1)[:, 0] == np.sort(expected, 1)[:, 1]) > 20
    assert np.array_equal(labels_of(rows), expected.argmin(1))


def test_assign_tells_how_many_labels_changed() -> None:
    x, centroids = samples(150, 6), samples(9, 6, seed=1)
    rows = rows_of(x)
    assert rows.assign(to_device(centroids)) == 150
    assert rows.assign(to_device(centroids)) == 0
    before = labels_of(rows).copy()
    moved = rows.assign(to_device(centroids[::-1].copy()))
    assert moved == np.count_nonzero(before != labels_of(rows)) > 0


@pytest.mark.parametrize("shape", [(257, 19, 37), (300, 1, 3), (2600, 3, 2), (40, 60, 130)])
def test_sums_are_those_of_float64(shape: tuple[int, int, int]) -> None:
    count, clusters, columns = shape
    rng = np.random.default_rng(2)
    x, weights = samples(count, columns), rng.random(count).astype(np.float32)
    labels = rng.integers(clusters, size=count).astype(np.int32)
    # One cluster is larger than a piece, some are empty.
    labels[: count // 2] = 0
    labels[labels == 5] = 0
    expected = np.zeros((clusters, columns))
    np.add.at(expected, labels, x.astype(np.float64) * weights[:, None].astype(np.float64))
    given = to_device(x), to_device(weights), torch.from_numpy(labels).to(DEVICE), clusters
    sums, weight = kernels.sum_rows(*given)
    assert np.allclose(sums.cpu(), expected, rtol=1e-12, atol=1e-12)
    assert np.allclose(weight.cpu(), np.bincount(labels, weights, clusters), rtol=1e-12)
    again, weight_again = kernels.sum_rows(*given)
    assert torch.equal(sums, again)
    assert torch.equal(weight, weight_again)


@pytest.mark.parametrize("size", [1023, 1024, 1025, 2048, 2049])
def test_pieces_hold_each_row_once(size: int) -> None:
    count = size + 3
    labels = torch.zeros(count, dtype=torch.int32, device=DEVICE)
    labels[[0, 7, count - 1]] = 1
    x = (torch.arange(count, device=DEVICE)[:, None] % 4096).float()
    sums, weight = kernels.sum_rows(x, torch.ones(count, device=DEVICE), labels, 2)
    assert weight.tolist() == [size, 3]
    assert sums[1].item() == 7 + count - 1
    assert sums.sum().item() == count * (count - 1) // 2


@pytest.mark.parametrize("clusters", [4, 5, 6])
def test_keys_of_sixteen_bits_and_more(clusters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_SHORT", 5)
    x = torch.tensor([[1.0], [2.0], [4.0], [8.0]], device=DEVICE)
    labels = torch.tensor([3, 0, 3, 1], dtype=torch.int32, device=DEVICE)
    sums, weight = kernels.sum_rows(x, torch.ones(4, device=DEVICE), labels, clusters)
    assert sums[:, 0].tolist() == [2.0, 8.0, 0.0, 5.0, 0.0, 0.0][:clusters]
    assert weight.tolist() == [1.0, 1.0, 0.0, 2.0, 0.0, 0.0][:clusters]


def test_a_weight_counts_as_a_repetition() -> None:
    x, centroids = samples(90, 11), to_device(samples(6, 11, seed=1))
    weights = np.random.default_rng(3).integers(0, 4, 90).astype(np.float32)
    one, other = rows_of(x, weights), rows_of(np.repeat(x, weights.astype(int), 0))
    one.assign(centroids)
    other.assign(centroids)
    made, expected = one.means(centroids, False), other.means(centroids, False)
    assert torch.allclose(made[0], expected[0], rtol=1e-6, atol=1e-7)
    assert made[1] == pytest.approx(expected[1], rel=1e-9)
    assert one.inertia(made[0]) == pytest.approx(other.inertia(expected[0]), rel=1e-9)


def twins(x: np.ndarray, weights: np.ndarray, threads: Threads) -> tuple[Any, Rows]:
    return rows_of(x, weights), Rows(x, weights, None, threads)


@pytest.mark.parametrize("spherical", [False, True])
def test_iterations_are_those_in_main_memory(spherical: bool) -> None:
    centres = 3.0 * samples(12, 18, seed=5)
    x = centres[np.arange(400) % 12] + samples(400, 18)
    if spherical:
        x /= np.linalg.norm(x, axis=1, keepdims=True)
    weights = np.random.default_rng(4).uniform(0.5, 2.0, 400).astype(np.float32)
    first = x[:12].copy()
    with Threads(1) as threads:
        here, there = twins(x, weights, threads)
        limits = {"max_iter": 30, "tol": 0.0, "spherical": spherical}
        made = lloyd(here, to_device(first), **limits)
        expected = lloyd(there, first, **limits)
    assert made.inertia == pytest.approx(expected.inertia, rel=1e-5)
    assert made.iterations == expected.iterations
    assert np.array_equal(labels_of(here), there.labels)
    assert np.allclose(made.centroids.cpu(), expected.centroids, atol=1e-5)
    if spherical:
        assert np.allclose(made.centroids.norm(dim=1).cpu(), 1.0, atol=1e-6)


def test_the_shift_is_the_sum_of_squared_distances_moved() -> None:
    x, centroids = samples(120, 9), samples(4, 9, seed=1)
    rows = rows_of(x)
    rows.assign(to_device(centroids))
    made, shift = rows.means(to_device(centroids), False)
    labels = labels_of(rows)
    means = np.array([x[labels == k].mean(0, dtype=np.float64) for k in range(4)])
    assert np.allclose(made.cpu(), means, rtol=1e-6, atol=1e-7)
    assert made.dtype == torch.float32
    assert shift == pytest.approx(float(((means - centroids) ** 2).sum()), rel=1e-6)


def empty_clusters() -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Rows, weights and centroids of which some have no row."""
    x = samples(60, 5)
    away = np.full((3, 5), 90.0, np.float32)
    weightless = ones(60)
    weightless[np.argsort(-(x**2).sum(1))[:4]] = 0.0
    grid = np.repeat(np.array([[-2.0], [0.0], [2.0]], np.float32), 4, axis=0)
    return {
        "several": (x, ones(60), np.concatenate([away, x[:2]])),
        "rows without weight are the furthest": (x, weightless, np.concatenate([x[:2], away])),
        "a cluster of rows without weight": (
            np.concatenate([x, away]),
            np.concatenate([ones(60), np.zeros(3, np.float32)]),
            np.concatenate([x[:2], away[:1]]),
        ),
        "equal distances": (grid, ones(12), np.array([[0.0], [50.0], [60.0], [70.0]], np.float32)),
        "all rows on centroids": (
            grid,
            ones(12),
            np.array([[-2.0], [0.0], [2.0], [0.0]], np.float32),
        ),
        "fewer rows than empty clusters": (x[:4], ones(4), np.concatenate([x[:1], away, away])),
    }


@pytest.mark.parametrize("case", empty_clusters())
def test_an_empty_cluster_takes_the_row_that_it_takes_in_main_memory(case: str) -> None:
    x, weights, centroids = empty_clusters()[case]
    with Threads(1) as threads:
        here, there = twins(x, weights, threads)
        here.assign(to_device(centroids))
        there.assign(centroids)
        assert np.array_equal(labels_of(here), there.labels)
        made, shift = here.means(to_device(centroids), False)
        expected, moved = there.means(centroids, False)
    assert np.array_equal(labels_of(here), there.labels)
    assert np.allclose(made.cpu(), expected, rtol=1e-6, atol=1e-7)
    assert shift == pytest.approx(moved, rel=1e-5, abs=1e-12)


def test_a_mean_that_points_nowhere_stays() -> None:
    x = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], np.float32)
    centroids = np.array([[0.6, -0.8], [0.0, 1.0]], np.float32)
    rows = rows_of(x)
    rows.labels.copy_(torch.tensor([0, 0, 1]))
    made, shift = rows.means(to_device(centroids), True)
    assert np.array_equal(made.cpu(), centroids)
    assert shift == 0.0


def test_inertia_is_measured_from_the_centroids_it_is_asked_for() -> None:
    x, centroids = samples(80, 7), samples(5, 7, seed=1)
    weights = np.random.default_rng(6).random(80).astype(np.float32)
    rows = rows_of(x, weights)
    rows.assign(to_device(centroids))
    other = samples(5, 7, seed=8)
    expected = distances(x, other)[np.arange(80), labels_of(rows)]
    assert rows.inertia(to_device(other)) == pytest.approx(float(expected @ weights), rel=1e-6)
    assert np.allclose(rows.near.cpu(), expected, rtol=1e-5)


def search(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    return torch.cdist(x.double(), centroids.double()).argmin(-1).to(torch.int32)


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    """A module of a package that is not installed, with its packages."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(parts[0]))
    vars(sys.modules[name]).update(members)


def with_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    def assign(x: torch.Tensor, centroids: torch.Tensor, x_sq: torch.Tensor) -> torch.Tensor:
        assert torch.allclose(x_sq, x.square().sum(2))
        return search(x, centroids)

    stand_in(monkeypatch, "flash_kmeans.assign_euclid_triton", euclid_assign_triton=assign)


def with_raft(monkeypatch: pytest.MonkeyPatch) -> None:
    def argmin(x: Any, y: Any, out: Any = None, sqrt: bool = True, handle: Any = None) -> None:
        assert handle
        out.copy_(search(x, y))

    stand_in(monkeypatch, "pylibraft.common", DeviceResources=lambda stream: [stream])
    stand_in(monkeypatch, "pylibraft.distance", fused_l2_nn_argmin=argmin)


def with_cuvs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Resources:
        def __init__(self, stream: int) -> None: ...

        def sync(self) -> None: ...

    def predict(params: Any, x: Any, centroids: Any, labels: Any, resources: Any) -> None:
        assert params == {"metric": "sqeuclidean", "n_clusters": len(centroids)}
        labels.copy_(search(x, centroids))

    stand_in(monkeypatch, "pylibraft")
    stand_in(monkeypatch, "cuvs.cluster.kmeans", KMeansParams=dict, predict=predict)
    stand_in(monkeypatch, "cuvs.common", Resources=Resources)
    monkeypatch.setitem(sys.modules, "pylibraft.distance", None)


PROVIDERS: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "flash-kmeans": ("flash-kmeans", with_flash),
    "RAFT": ("cuml", with_raft),
    "cuVS": ("cuml", with_cuvs),
}


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_provider_finds_labels_and_nothing_else(
    provider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, install = PROVIDERS[provider]
    install(monkeypatch)
    x, centroids = samples(100, 8), to_device(samples(6, 8, seed=1))
    made, expected = cuda.open_rows(backend, to_device(x), to_device(ones(100))), rows_of(x)
    assert made.assign(centroids) == expected.assign(centroids) == 100
    assert torch.equal(made.labels, expected.labels)
    assert torch.equal(made.near, expected.near)
    assert torch.equal(made.means(centroids, False)[0], expected.means(centroids, False)[0])


@pytest.mark.parametrize("backend", ["flash-kmeans", "cuml"])
def test_a_provider_that_is_missing(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("flash_kmeans", "pylibraft", "cuvs"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match="missing-provider") as error:
        cuda.open_rows(backend, to_device(samples(4, 2)), to_device(ones(4)))
    assert "pip install" in error.value.hint


def test_what_is_refused() -> None:
    x, weights = to_device(samples(4, 2)), to_device(ones(4))
    assert type(cuda.open_rows("triton", x, weights)) is cuda.CudaRows
    with pytest.raises(UsageError, match="unknown-backend"):
        cuda.open_rows("opencl", x, weights)
    with pytest.raises(UsageError, match="bad-precision"):
        cuda.CudaRows(x, weights, precision="fp8")


NATIVE = """
import torch
from pipeline.clustering.cuda import CudaRows
from pipeline.clustering.kmeans import KMeans
from pipeline.errors import UsageError
try:
    CudaRows(torch.zeros(4, 2), torch.ones(4))
except UsageError as error:
    assert error.code == "no-gpu"
else:
    raise AssertionError
if not torch.cuda.is_available():
    try:
        KMeans(2, backend="triton").fit(torch.zeros(4, 2).numpy())
    except UsageError as error:
        assert error.code == "no-gpu"
    else:
        raise AssertionError

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pipeline.clustering import triton_kernels as kernels

floats = ("x", "centre", "centroids", "half", "near", "weights")
doubles = ("parts", "part_weights", "sums", "sum_weights")
types = dict.fromkeys(floats, "*fp32") | dict.fromkeys(doubles, "*fp64")
types |= dict.fromkeys(("order", "offsets", "starts", "owners"), "*i64") | {"labels": "*i32"}
types |= dict.fromkeys(("count", "clusters", "columns"), "i32")

def build(kernel, values):
    names = kernel.arg_names
    constants = {(names.index(name),): value for name, value in values.items()}
    kinds = {name: types.get(name, "constexpr") for name in names}
    made = triton.compile(ASTSource(kernel, kinds, constants), target=GPUTarget("cuda", 90, 32))
    assert made.asm["cubin"]

blocks = {"block_n": 64, "block_d": 32}
for precision in kernels.PRECISIONS:
    search = {"width": 64, "block_k": 64, "precision": precision, "native": True}
    build(kernels._nearest, blocks | search)
build(kernels._measure, blocks)
build(kernels._add_rows, blocks | {"piece": kernels.PIECE})
build(kernels._add_parts, blocks)
"""


def test_kernels_compile_for_a_gpu_that_need_not_be_there() -> None:
    # The interpreter takes what the compiler does not. Code is made for compute capability 9.0.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", NATIVE], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_back_end_without_its_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.clustering.kmeans.find_spec", lambda _: None)
    with pytest.raises(UsageError) as caught:
        KMeans(2, backend="triton").fit(np.zeros((4, 2), np.float32))
    assert caught.value.code == "no-triton"
    assert KMeans(2).fit(np.eye(2).repeat(2, 0)).inertia_ == 0.0


def test_estimators_do_without_triton() -> None:
    check = "import pipeline.clustering.kmeans, sys; assert 'triton' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", check], env=environment, check=True)
