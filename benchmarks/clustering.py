"""k-means at equal inertia, beside scikit-learn, its MiniBatchKMeans and faiss.

Peers, from PyPI: scikit-learn, faiss-cpu; on CUDA torch, and flash-kmeans and cuML where they are
installed. Rows are features of the images in ``<data>`` (patches of imagenette, maps of a ResNet on
CIFAR-10), without it rows with a spectrum like theirs; ``--isotropic`` takes normal noise, in which
no direction leads.

A peer is run to its end. Then ours is timed to the first iteration whose inertia is no more than
0.1 % above the peer's, from random rows, k-means++ or k-means||, whichever is there first. Inertia
is computed in float64 from centroids. The ratio of a shape is the smallest over its peers.

    python benchmarks/clustering.py --data shared/data [--quick] [--json] [--only batch]
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from harness import make_parser, run_parts, target

from pipeline.clustering.batched_kmeans import BatchedKMeans
from pipeline.clustering.kmeans import KMeans
from pipeline.clustering.kmeans_1d import KMeans1D
from pipeline.clustering.seeding import INITS
from pipeline.errors import UsageError

Floats = npt.NDArray[np.float32]
SHAPES = ((200_000, 64, 1000), (100_000, 768, 1000), (50_000, 256, 4096))
STEPS = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 25)
SLACK = 1.001


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    made = call()
    return time.perf_counter() - began, made


def inertia(x: Floats, centroids: Any) -> float:
    """In float64, without anything of ours."""
    c = np.asarray(centroids, np.float64)
    half = np.einsum("ij,ij->i", c, c) / 2
    total = 0.0
    for start in range(0, len(x), 4096):
        block = x[start : start + 4096].astype(np.float64)
        apart = block - c[(half - block @ c.T).argmin(1)]
        total += float(np.einsum("ij,ij->", apart, apart))
    return total


def pictures(data: Path) -> Iterator[Floats]:
    """Of imagenette, 224 x 224 x 3 in [0, 1]."""
    import pyarrow.parquet as pq
    from PIL import Image

    table = pq.read_table(data / "imagenette" / "train-00000-of-00001.parquet", columns=["image"])
    for value in table["image"].to_pylist():
        picture = Image.open(io.BytesIO(value["bytes"] if isinstance(value, dict) else value))
        yield np.asarray(picture.convert("RGB"), np.float32) / 255


def patches(data: Path, count: int) -> Floats:
    """16 x 16 pixels of RGB, as (count, 768)."""
    cut = [pixels.reshape(14, 16, 14, 16, 3).transpose(0, 2, 1, 3, 4) for pixels in pictures(data)]
    made = np.concatenate([squares.reshape(196, 768) for squares in cut])
    return made[np.random.default_rng(0).permutation(len(made))[:count]]


def maps(data: Path, count: int, side: int) -> Floats:
    """The last maps of a ResNet-20 on CIFAR-10: squares of this side, as (count, 64 side^2)."""
    import torch

    from pipeline import backbones
    from pipeline.storage.weights import read_weights

    weights = read_weights(next((data / "weights").glob("resnet20-*.npz")))
    model: Any = backbones.build("resnet20", 10, 3)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    found: list[torch.Tensor] = []
    model.layer3.register_forward_hook(lambda *about: found.append(about[2]))
    with np.load(data / "cifar10.npz") as archive:
        pixels = archive["x_train"][:12_500]
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    with torch.inference_mode():
        for start in range(0, len(pixels), 500):
            x = (pixels[start : start + 500].astype(np.float32) / 255 - mean) / std
            model.eval()(torch.from_numpy(x).permute(0, 3, 1, 2).contiguous())
        squares = torch.nn.functional.unfold(torch.cat(found), side, stride=side)
    rows = squares.permute(0, 2, 1).reshape(-1, 64 * side * side).numpy()
    return rows[np.random.default_rng(0).permutation(len(rows))[:count]].copy()


def spectrum(count: int, columns: int, seed: int = 0) -> Floats:
    """Rows around 5,000 centres, of variances that fall as 1 / i, turned at random."""
    rng = np.random.default_rng(seed)
    scale = (1.0 / np.sqrt(np.arange(1, columns + 1))).astype(np.float32)
    turn = np.linalg.qr(rng.standard_normal((columns, columns)))[0].astype(np.float32)
    centres = rng.standard_normal((5000, columns), np.float32) * scale
    made = np.empty((count, columns), np.float32)
    for start in range(0, count, 16_384):
        size = min(16_384, count - start)
        noise = rng.standard_normal((size, columns), np.float32) * scale
        made[start : start + size] = (centres[rng.integers(5000, size=size)] + 0.5 * noise) @ turn
    return made


def rows(options: argparse.Namespace, count: int, columns: int) -> tuple[str, Floats]:
    if options.isotropic:
        noise = np.random.default_rng(0).standard_normal((count, columns), np.float32)
        return "normal noise", noise
    if not options.data:
        return "made rows", spectrum(count, columns)
    if columns == 768:
        return "patches of imagenette", patches(options.data, count)
    return "maps of a ResNet-20 on CIFAR-10", maps(options.data, count, 1 if columns == 64 else 2)


def sgemm(columns: int, clusters: int) -> float:
    """Multiply-adds counted twice, per second, of NumPy's product of these shapes."""
    x = np.ones((20_000, columns), np.float32)
    c, made = np.ones((columns, clusters), np.float32), np.empty((20_000, clusters), np.float32)
    np.matmul(x, c, out=made)
    seconds = statistics.median(timed(lambda: np.matmul(x, c, out=made))[0] for _ in range(5))
    return 2 * 20_000 * columns * clusters / seconds


def peers(clusters: int, *, slow: bool) -> dict[str, Callable[[Floats], Any]]:
    import faiss
    from sklearn.cluster import KMeans as Lloyd
    from sklearn.cluster import MiniBatchKMeans

    def by_faiss(x: Floats) -> Any:
        made = faiss.Kmeans(
            x.shape[1],
            clusters,
            niter=25,
            min_points_per_centroid=1,
            max_points_per_centroid=len(x),
        )
        made.train(x)
        return made.centroids

    def by_lloyd(init: str) -> Callable[[Floats], Any]:
        made = Lloyd(clusters, init=init, n_init=1, max_iter=25, random_state=0)
        return lambda x: made.fit(x).cluster_centers_

    found = {"scikit-learn, random rows": by_lloyd("random"), "faiss": by_faiss}
    mini = MiniBatchKMeans(clusters, init="random", n_init=1, random_state=0)
    found["MiniBatchKMeans, random rows"] = lambda x: mini.fit(x).cluster_centers_
    if slow:
        found["scikit-learn, k-means++"] = by_lloyd("k-means++")
    return found


def to_inertia(x: Floats, clusters: int, wanted: float, init: str) -> tuple[float, float, int]:
    """Seconds of ours to this inertia, what it was, and iterations; the start is included."""
    for limit in STEPS:
        made = KMeans(clusters, init=init, max_iter=limit, random_state=0)
        reached = inertia(x, made.fit(x).cluster_centers_)
        if reached <= wanted * SLACK:
            seconds = statistics.median(timed(partial(made.fit, x))[0] for _ in range(3))
            return seconds, reached, limit
    return np.inf, reached, limit


def lloyd(options: argparse.Namespace) -> None:
    from sklearn.cluster import KMeans as Lloyd

    for count, columns, clusters in SHAPES:
        kind, x = rows(options, count, columns)
        rate = sgemm(columns, clusters)
        floor = 2 * len(x) * columns * clusters / rate
        print(
            f"\n{len(x)} x {columns}, K = {clusters}, {kind}. SGEMM {rate / 1e9:.0f} GFLOP/s: "
            f"{floor:.3f} s an iteration that compares all with all"
        )
        ratios = []
        for name, peer in peers(clusters, slow=not options.quick).items():
            seconds, centroids = timed(partial(peer, x))
            wanted = inertia(x, centroids)
            found = {init: to_inertia(x, clusters, wanted, init) for init in INITS}
            init = min(found, key=lambda init: found[init][0])
            ours, reached, steps = found[init]
            ratios.append(seconds / ours)
            print(
                f"  {name:30}{seconds:8.2f} s to {wanted:.6g}; ours {ours:6.2f} s to "
                f"{reached:.6g}, {steps} iterations from {init}: {seconds / ours:6.1f} x"
            )
        target(f"{count} x {columns}, K = {clusters}: over the fastest peer (x)", 2, min(ratios))
        start = x[np.random.default_rng(1).choice(len(x), clusters, replace=False)]
        same = {"init": start, "max_iter": 10, "tol": 0.0}
        pair = []
        for _ in range(1 if options.quick else 3):
            ours, made = timed(partial(KMeans(clusters, **same).fit, x))
            theirs, peer = timed(partial(Lloyd(clusters, n_init=1, **same).fit, x))
            pair.append((theirs, ours))
        theirs, ours = (statistics.median(side) for side in zip(*pair, strict=True))
        equal = inertia(x, made.cluster_centers_) / inertia(x, peer.cluster_centers_)
        print(
            f"  10 iterations from the same rows: scikit-learn {theirs:.2f} s, ours {ours:.2f} s "
            f"({theirs / ours:.1f} x, SGEMM's floor {10 * floor:.2f} s), inertia {equal:.6f} of it"
        )


def batch(options: argparse.Namespace) -> None:
    from sklearn.cluster import KMeans as Lloyd
    from threadpoolctl import threadpool_limits

    problems = 50 if options.quick else 200
    _, x = rows(options, problems * 1300 if options.isotropic or not options.data else 10**9, 768)
    if len(x) < problems * 1300:
        # Patches overlap where there are not enough of them.
        x = x[np.random.default_rng(0).integers(len(x), size=problems * 1300)]
    x = np.ascontiguousarray(x[: problems * 1300])
    offsets = np.arange(0, len(x) + 1, 1300)
    classes = [x[lo : lo + 1300] for lo in offsets[:-1]]

    def loop() -> float:
        made = [Lloyd(50, n_init=1, random_state=p).fit(rows) for p, rows in enumerate(classes)]
        return sum(inertia(r, m.cluster_centers_) for r, m in zip(classes, made, strict=True))

    print(f"\n{problems} problems of 1300 x 768, K = 50")
    seconds, wanted = timed(loop)
    with threadpool_limits(1):
        alone, _ = timed(loop)
    BatchedKMeans(50).fit(x[:2600], offsets=offsets[:3])
    runs = [
        timed(lambda: BatchedKMeans(50, random_state=0).fit(x, offsets=offsets)) for _ in range(5)
    ]
    ours, made = statistics.median(s for s, _ in runs), runs[0][1]
    reached = sum(
        inertia(r, made.cluster_centers_[50 * p : 50 * p + 50]) for p, r in enumerate(classes)
    )
    print(
        f"  scikit-learn in a loop {seconds:.1f} s, with one thread {alone:.1f} s; ours "
        f"{ours:.2f} s ({alone / ours:.1f} x over one thread), inertia {reached / wanted:.5f} of it"
    )
    target("a batch over a loop of scikit-learn (x)", 20, seconds / ours)
    target("its inertia over scikit-learn's (x)", SLACK, reached / wanted, most=True)


def one_dimension(_: argparse.Namespace) -> None:
    from sklearn.cluster import KMeans as Lloyd

    count = 10**7
    values = np.random.default_rng(0).gamma(1.0, size=count).astype(np.float32)
    KMeans1D(10).fit(values[:200_000])
    seconds, peer = timed(lambda: Lloyd(10, n_init=1, random_state=0).fit(values[:, None]))
    runs = [timed(lambda: KMeans1D(10).fit(values)) for _ in range(7)]
    ours, made = statistics.median(s for s, _ in runs), runs[0][1]
    x = values[:, None]
    wanted, reached = (inertia(x, fitted.cluster_centers_) for fitted in (peer, made))
    print(
        f"\n{count} values, K = 10: scikit-learn {seconds:.2f} s to {wanted:.6g}, ours "
        f"{ours:.3f} s to {reached:.6g}"
    )
    target(f"{count} values in one dimension (s)", 1, ours, most=True)
    target("one dimension over scikit-learn (x)", 50, seconds / ours)


def stream(options: argparse.Namespace) -> None:
    """In a process of its own, whose memory is measured."""
    count, clusters = (200_000, 10_000) if options.quick else (2_000_000, 100_000)
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        write_stream(Path(folder), count, options.data)
        script = [sys.executable, __file__, "--stream-from", folder, "--stream-clusters"]
        done = subprocess.run([*script, str(clusters)], check=True, capture_output=True, text=True)
    told = json.loads(done.stdout.strip().splitlines()[-1])
    print(
        f"\n{count} x 768 in Parquet, K = {clusters}: {told['seconds']:.0f} s, inertia "
        f"{told['inertia']:.6g}, at most {told['bytes'] / 2**30:.2f} GiB of memory"
    )
    target("memory of the stream (GiB)", 3, told["bytes"] / 2**30, most=True)


def write_stream(folder: Path, count: int, data: Path | None) -> None:
    """Overlapping patches of imagenette, or made rows, in files of some thousand."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipeline.tensors import as_bytes, tensor_column

    written = 0
    for number, part in enumerate(dense_patches(data) if data else made_parts(count)):
        kept = part[: count - written]
        table = as_bytes(pa.table({"feature": tensor_column(kept)}))
        pq.write_table(table, folder / f"{number:04d}.parquet", compression="none")
        written += len(kept)
        if written == count:
            return


def made_parts(count: int) -> Iterator[Floats]:
    for number, start in enumerate(range(0, count, 32_000)):
        yield spectrum(min(32_000, count - start), 768, seed=number)


def dense_patches(data: Path) -> Iterator[Floats]:
    """16 x 16 pixels of RGB at every fifth place, of 18 pictures at a time."""
    made = []
    for pixels in pictures(data):
        windows = np.lib.stride_tricks.sliding_window_view(pixels, (16, 16, 3))
        made.append(windows[::5, ::5].reshape(-1, 768))
        if len(made) == 18:
            yield np.concatenate(made)
            made = []


def fit_stream(folder: str, clusters: int) -> None:
    from pipeline.clustering.hierarchical_kmeans import HierarchicalKMeans
    from pipeline.storage.features import FeatureArrays, open_features

    shards = FeatureArrays(open_features(folder, "feature"), "feature")
    made = HierarchicalKMeans(clusters, random_state=0, compute_labels=False, max_iter=20)
    seconds, _ = timed(lambda: made.fit(shards))
    # Not getrusage, which tells the most of the process that this one came from, too.
    status = Path("/proc/self/status").read_text()
    most = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    print(json.dumps({"seconds": seconds, "inertia": made.inertia_, "bytes": most}))


def gpu(_: argparse.Namespace) -> None:
    """Assignment alone, as a share of what the device can do at most."""
    import torch

    if not torch.cuda.is_available():
        print("\nNo GPU here: not measured on a GPU")
        return
    from pipeline.clustering import cuda, triton_kernels

    name = torch.cuda.get_device_name()
    for count, columns, clusters in ((10**6, 64, 1000), (10**6, 768, 1000), (10**5, 768, 10_000)):
        x = torch.randn(count, columns, device="cuda")
        c, ones = x[:clusters].clone(), torch.ones(count, device="cuda")
        arms: dict[str, Callable[[], Any]] = {}
        for precision in triton_kernels.PRECISIONS:
            arms[f"Triton, {precision}"] = partial(cuda.CudaRows(x, ones, precision).assign, c)
        for backend in ("flash-kmeans", "cuml"):
            try:
                arms[backend] = partial(cuda.open_rows(backend, x, ones).assign, c)
            except UsageError as error:
                print(f"  {backend}: {error.message}")
        arms["torch, a block at a time"] = partial(by_torch, x, c)
        print(f"\n{name}: {count} x {columns}, K = {clusters}")
        for arm, call in arms.items():
            call()
            torch.cuda.synchronize()
            seconds = statistics.median(timed(lambda call=call: waited(call))[0] for _ in range(7))
            flops, moved = 2 * count * columns * clusters / seconds, 4 * count * columns / seconds
            print(
                f"  {arm:26}{seconds * 1e3:9.3f} ms {flops / 1e12:8.1f} TFLOP/s, rows are read at "
                f"{moved / 1e9:6.0f} GB/s"
            )


def by_torch(x: Any, c: Any) -> Any:
    import torch

    half = c.square().sum(1) / 2
    return torch.cat([(half - part @ c.T).argmin(1) for part in x.split(16_384)])


def waited(call: Callable[[], Any]) -> None:
    import torch

    call()
    torch.cuda.synchronize()


PARTS = {
    "lloyd": lloyd,
    "batch": batch,
    "one-dimension": one_dimension,
    "stream": stream,
    "gpu": gpu,
}


def main() -> None:
    quick = "without what takes minutes, such as their k-means++"
    parser = make_parser(__doc__, quick, PARTS)
    parser.add_argument("--isotropic", action="store_true", help="rows of normal noise")
    parser.add_argument("--scratch", help="folder for 6 GB of features")
    parser.add_argument("--stream-from", help=argparse.SUPPRESS)
    parser.add_argument("--stream-clusters", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stream_from:
        fit_stream(options.stream_from, options.stream_clusters)
        return
    warnings.filterwarnings("ignore")
    KMeans(20, max_iter=2).fit(spectrum(9000, 32))  # compiled, or found compiled
    run_parts(PARTS, options)


if __name__ == "__main__":
    main()
