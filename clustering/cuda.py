"""Rows in a GPU's memory, labelled by kernels of our own or by those of an optional package."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy.typing as npt
import torch

from pipeline.clustering.triton_kernels import (
    NATIVE,
    PRECISIONS,
    measure,
    middle,
    nearest,
    on_device,
    sum_rows,
)
from pipeline.errors import UsageError

_Search = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


class CudaRows:
    """Rows to cluster on a GPU: the twin of :class:`pipeline.clustering.cpu.Rows`.

    A row goes to the centroid of least score in float32. It may be the second nearest where squared
    distances differ by less than a score is rounded by, which is little beside the square of the
    rows' spread.

    Args:
        x: float32 (N, D), contiguous.
        weights: float32 (N,), not negative, on the same device.
        precision: one of :data:`PRECISIONS`; with another than ``"ieee"`` scores are coarser.

    Attributes:
        x: the rows.
        weights: their weights.
        labels: int32 (N,); -1 until they are assigned.

    Raises:
        UsageError: the rows lie in main memory, or there is no such precision.
    """

    def __init__(self, x: torch.Tensor, weights: torch.Tensor, precision: str = "ieee") -> None:
        if NATIVE and not x.is_cuda:
            raise UsageError(
                f"The rows lie on the device '{x.device}', where no GPU reads them.",
                hint="Move them to a CUDA device, or cluster on the CPU.",
                code="no-gpu",
            )
        if precision not in PRECISIONS:
            raise UsageError(
                f"precision={precision!r} is nothing that products are made in.",
                hint=f"It is one of {', '.join(PRECISIONS)}.",
                code="bad-precision",
            )
        self.x, self.weights, self.precision = x, weights, precision
        self.labels = torch.full((len(x),), -1, dtype=torch.int32, device=x.device)
        self._near = torch.zeros(len(x), device=x.device)
        # What rows were labelled by since distances were last measured.
        self._unmeasured: torch.Tensor | None = None
        self._centre = middle(x)

    @property
    def near(self) -> torch.Tensor:
        """Squared distances to the centroids rows are labelled with: float32 (N,).

        They are measured when they are asked for, since an iteration does without. Until then the
        centroids of the last ``assign`` must stay what they were.
        """
        if self._unmeasured is not None:
            self.measure(self._unmeasured)
        return self._near

    def assign(self, centroids: torch.Tensor) -> int:
        """Label each row with its nearest centroid; how many labels changed.

        Args:
            centroids: float32 (K, D).
        """
        found = self._nearest(centroids)
        changed = (found != self.labels).sum()
        self.labels.copy_(found)
        self._unmeasured = centroids
        # Here the host waits for the device, and for the shift in `means`: nowhere else in an
        # iteration.
        return int(changed.item())

    def measure(self, centroids: torch.Tensor) -> None:
        """Bring ``near`` up to date with labels and ``centroids``, float32 (K, D)."""
        measure(self.x, centroids, self.labels, self._near)
        self._unmeasured = None

    def inertia(self, centroids: torch.Tensor) -> float:
        """The weighted sum of squared distances to the centroids rows are labelled with."""
        self.measure(centroids)
        return float(self._near.double().mul_(self.weights).sum().item())

    def means(self, centroids: torch.Tensor, spherical: bool) -> tuple[torch.Tensor, float]:
        """The weighted mean of each cluster's rows, and the sum of squared distances moved.

        A cluster without weight takes the row that is furthest from its centroid, out of that
        one's cluster; the second such cluster the next row, and so on, rows of equal distance in
        their order. Where all rows lie on centroids it keeps its own.

        Args:
            centroids: float32 (K, D), what rows are labelled with.
            spherical: make means of length 1.
        """
        made, shift, weight, empty = self._average(centroids, spherical)
        # Empty clusters are rare: sums are made as if there were none, so as not to wait twice.
        if empty and self._refill(torch.nonzero(weight == 0.0)[:, 0], centroids):
            made, shift, _, _ = self._average(centroids, spherical)
        return made, shift

    def _average(
        self, before: torch.Tensor, spherical: bool
    ) -> tuple[torch.Tensor, float, torch.Tensor, bool]:
        """Means, how far they moved, weights float64 (K,), and whether one of these is 0."""
        sums, weight = sum_rows(self.x, self.weights, self.labels, len(before))
        scale = weight
        if spherical:
            square = sums.square().sum(1)
            # Rows that point against one another have a mean that points nowhere.
            somewhere = square > 1e-12 * weight * weight
            scale = torch.where(somewhere, square.sqrt(), 0.0)
        old = before.double()
        made = torch.where(scale[:, None] > 0.0, sums / scale[:, None], old).float()
        shift = (made.double() - old).square_().sum()
        told = torch.stack([shift, (weight == 0.0).any().double()]).tolist()
        return made, float(told[0]), weight, bool(told[1])

    def _refill(self, empty: torch.Tensor, centroids: torch.Tensor) -> bool:
        """Give empty clusters, int64 (E,), the furthest rows; whether there were any."""
        self.measure(centroids)
        near = torch.where(self.weights > 0.0, self._near, 0.0)
        near, rows = torch.sort(near, descending=True, stable=True)
        rows = rows[: len(empty)][near[: len(empty)] > 0.0]
        self.labels[rows] = empty[: len(rows)].to(torch.int32)
        return len(rows) > 0

    def _nearest(self, centroids: torch.Tensor) -> torch.Tensor:
        """The nearest of centroids (K, D) to each row: int32 (N,)."""
        return nearest(self.x, centroids, self._centre, self.precision)


class FlashRows(CudaRows):
    """Labels by the package ``flash-kmeans`` (Yang and others), distances and sums as ever.

    Its products are tf32, and its scores hold the norms of rows, so that rows far from 0 and rows
    almost between two centroids may go to the one further away.

    Args:
        x: float32 (N, D), contiguous.
        weights: float32 (N,), not negative, on the same device.

    Raises:
        UsageError: the package is not installed.
    """

    def __init__(self, x: torch.Tensor, weights: torch.Tensor) -> None:
        try:
            from flash_kmeans.assign_euclid_triton import euclid_assign_triton
        except ImportError as error:
            raise _missing(
                "flash-kmeans", "flash_kmeans", "pip install flash-kmeans==0.3.1", error
            ) from error
        super().__init__(x, weights)
        self._find: Any = euclid_assign_triton
        self._square = torch.empty(len(x), device=x.device)
        measure(x, torch.zeros_like(x[:1]), torch.zeros_like(self.labels), self._square)

    def _nearest(self, centroids: torch.Tensor) -> torch.Tensor:
        with on_device(self.x):
            found: torch.Tensor = self._find(
                self.x[None], centroids.contiguous()[None], self._square[None]
            )[0]
        return found


class CumlRows(CudaRows):
    """Labels by the libraries under cuML, distances and sums as ever.

    RAFT's ``fused_l2_nn_argmin`` where ``pylibraft`` has it. Its newer versions do not: there it is
    ``cuvs.cluster.kmeans.predict``, which waits for the device in each iteration.

    Args:
        x: float32 (N, D), contiguous.
        weights: float32 (N,), not negative, on the same device.

    Raises:
        UsageError: neither library is installed.
    """

    def __init__(self, x: torch.Tensor, weights: torch.Tensor) -> None:
        self._find = _open_cuml()
        super().__init__(x, weights)

    def _nearest(self, centroids: torch.Tensor) -> torch.Tensor:
        found = torch.empty_like(self.labels)
        # These libraries count elements in 32 bits.
        step = max(1, (2**31 - 1) // self.x.shape[1])
        with on_device(self.x):
            for start in range(0, len(self.x), step):
                part = slice(start, start + step)
                self._find(self.x[part], centroids.contiguous(), found[part])
        return found


def _open_cuml() -> _Search:
    """What writes the nearest centroids (K, D) of rows (N, D) to int32 (N,)."""
    try:
        return _open_raft()
    except ImportError:
        pass
    try:
        return _open_cuvs()
    except ImportError as error:
        raise _missing(
            "cuml", "pylibraft or cuvs", "pip install 'vision-pipeline[gpu]'", error
        ) from error


def _open_raft() -> _Search:
    from pylibraft.common import DeviceResources
    from pylibraft.distance import fused_l2_nn_argmin

    def find(x: torch.Tensor, centroids: torch.Tensor, labels: torch.Tensor) -> None:
        handle = DeviceResources(stream=_stream(x))
        fused_l2_nn_argmin(x, centroids, out=labels, sqrt=False, handle=handle)

    return find


def _open_cuvs() -> _Search:
    kmeans, common = import_module("cuvs.cluster.kmeans"), import_module("cuvs.common")

    def find(x: torch.Tensor, centroids: torch.Tensor, labels: torch.Tensor) -> None:
        options = kmeans.KMeansParams(metric="sqeuclidean", n_clusters=len(centroids))
        resources = common.Resources(stream=_stream(x))
        kmeans.predict(options, x, centroids, labels=labels, resources=resources)
        resources.sync()

    return find


def _stream(x: torch.Tensor) -> int:
    """The stream that the rows are worked on in, so that what is queued there is done first."""
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0


def _missing(backend: str, package: str, command: str, error: ImportError) -> UsageError:
    return UsageError(
        f"The back end '{backend}' needs {package}, which cannot be imported: {error}.",
        hint=f"Install it with `{command}`, or take the back end 'triton'.",
        code="missing-provider",
    )


def to_device(array: npt.NDArray[Any]) -> torch.Tensor:
    """An array of the host where the kernels run.

    Raises:
        UsageError: there is no GPU that PyTorch can use.
    """
    if NATIVE and not torch.cuda.is_available():
        raise UsageError(
            "There is no GPU here that this PyTorch can use.",
            hint="Take backend='cpu', or backend='auto', which looks first.",
            code="no-gpu",
        )
    held = torch.from_numpy(array if array.flags.writeable else array.copy())
    return held.to("cuda" if NATIVE else "cpu")


def open_rows(backend: str, x: torch.Tensor, weights: torch.Tensor) -> CudaRows:
    """Rows whose labels a back end finds.

    Args:
        backend: ``"triton"``, ``"flash-kmeans"`` or ``"cuml"``.
        x: float32 (N, D), contiguous.
        weights: float32 (N,), not negative, on the same device.

    Raises:
        UsageError: there is no such back end, or its package is not installed.
    """
    kinds: dict[str, Callable[[torch.Tensor, torch.Tensor], CudaRows]] = {
        "triton": CudaRows,
        "flash-kmeans": FlashRows,
        "cuml": CumlRows,
    }
    if backend not in kinds:
        raise UsageError(
            f"There is no back end '{backend}' on a GPU.",
            hint=f"It is one of {', '.join(kinds)}.",
            code="unknown-backend",
        )
    return kinds[backend](x, weights)
