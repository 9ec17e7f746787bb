"""Samplers that choose anew, before each epoch, which samples are worth training on."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar, TypedDict

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from pipeline.digest import seed_for
from pipeline.errors import UsageError
from pipeline.pruning.draws import shuffled

Flags = npt.NDArray[np.bool_]
Losses = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
_PIECE = 2**16
"""Rows that are made Python numbers at a time."""


class Common(TypedDict, total=False):
    """Options that all samplers have; see :class:`DynamicSampler`."""

    saving: float | None
    seed: int
    rank: int
    world: int
    drop_last: bool


class DynamicSampler(ABC):
    """A sampler over N samples that remembers the last loss of each.

    It is a ``sampler`` for :class:`torch.utils.data.DataLoader`; each iteration is one epoch.
    Samples are rows 0 to N - 1, or string keys. Nothing of torch, NumPy or Python that is random
    is touched: the choice and the order of an epoch depend on the seed, the epoch and the losses
    alone, so all ranks find the same and each takes its part of it, ``order[rank::world]``.

    Args:
        samples: N, or N distinct keys.
        epochs: of the whole training.
        method: options of the method: a state belongs to samplers that have the same.
        saving: share of the N x ``epochs`` samples that is left out in all. The length of every
            epoch then follows from this number, to the sample, and the method chooses which.
        seed: of everything random.
        rank, world: of this process, and how many there are. Each is to be given the losses of all
            (:func:`~pipeline.pruning.distributed.all_ranks`).
        drop_last: leave out up to ``world`` - 1 samples, so that ranks have equally many.

    Raises:
        UsageError: an option is out of its range, or ``saving`` out of reach.
    """

    version: ClassVar[int] = 1

    def __init__(
        self,
        samples: int | Sequence[str] | pa.Array,
        epochs: int,
        method: Mapping[str, Any],
        *,
        saving: float | None = None,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = False,
    ) -> None:
        self._rows_of = None if isinstance(samples, int) else _numbered(samples)
        self.samples = samples if isinstance(samples, int) else len(samples)
        _check(self.samples >= 1 and epochs >= 1, "There is nothing to sample.", "samples, epochs")
        _check(0 <= rank < world, f"There is no rank {rank} of {world}.", "rank, world")
        _check(saving is None or 0 <= saving < 1, "The share saved is from 0 to 1.", "saving")
        self.epochs, self.saving, self.seed = epochs, saving, seed
        self.rank, self.world, self.drop_last = rank, world, drop_last
        self._options = {"saving": saving, "seed": seed, **method}
        self._epoch, self._position, self._goes_on = -1, 0, False
        # NaN: not seen yet. An epoch's choice is made of the losses that it begins with.
        self._before = np.full(self.samples, np.nan, np.float32)
        self._losses = self._before.copy()
        self._chosen = np.zeros(self.samples, np.bool_)
        self._order: npt.NDArray[Any] = np.empty(0, np.int32)
        self._length, self._saved_before = 0, 0
        self._waiting: list[tuple[Any, Any]] = []
        self._lengths = self._planned()

    @abstractmethod
    def _planned(self) -> list[int] | None:
        """Samples of every epoch, where losses do not count."""

    @abstractmethod
    def _choose(self, epoch: int) -> Flags:
        """The samples of an epoch, bool (N,), from the losses ``_before`` it."""

    @abstractmethod
    def _weights(self, rows: Rows) -> Losses:
        """Weights of the losses of some samples in the present epoch."""

    def _even_lengths(self) -> list[int]:
        """Lengths that differ by 1 at most and come to what ``saving`` leaves."""
        total = self.samples * self.epochs
        return even_parts(total - round((self.saving or 0.0) * total), self.epochs)

    @property
    def epoch(self) -> int:
        """The present epoch, from 0; after loading a state, the one that goes on or begins next."""
        over = self._goes_on and self._position >= self._length
        return max(self._epoch, 0) + int(over)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Samples of every epoch, on all ranks together.

        Raises:
            UsageError: they depend on losses.
        """
        if self._lengths is None:
            raise UsageError(
                "How long epochs will be depends on losses that are not known yet.",
                hint="Give saving=, such as saving=0.3: lengths then follow from it.",
                code="unplanned-epochs",
            )
        return tuple(self._lengths)

    def next_epoch(self) -> None:
        """Begin the next epoch; after loading a state, go on with the one that it was in.

        Iterating does so by itself; a stream of shards, which is not iterated here, has to.
        """
        self._take_over()
        if self._goes_on and self._position < self._length:
            self._goes_on = False
            return
        self._goes_on = False
        self._begin(self._epoch + 1)

    def _begin(self, epoch: int) -> None:
        if epoch >= self.epochs:
            raise UsageError(
                f"All {self.epochs} epochs are over.",
                hint="Give the sampler the number of epochs that the training has.",
                code="no-epoch-left",
            )
        self._saved_before = self.saved
        np.copyto(self._before, self._losses)
        self._epoch, self._position = epoch, 0
        self._select()

    def _select(self) -> None:
        # The last choice is let go before the next is made, so that both are never there.
        self._order = np.empty(0, np.int32)
        self._chosen = self._choose(self._epoch)
        self._order = shuffled(self._chosen, self._seed_for("order"))
        self._length = len(self._order)

    def __iter__(self) -> Iterator[int]:
        self.next_epoch()
        own = self._own()
        for start in range(0, len(own), _PIECE):
            yield from own[start : start + _PIECE].tolist()

    def __len__(self) -> int:
        """Samples of this rank that are left of the present epoch as it began here."""
        if self._epoch < 0:
            self._begin(0)
            self._goes_on = True
        return len(self._own())

    def _own(self) -> npt.NDArray[Any]:
        left = self._order[self._position :]
        if self.drop_last:
            left = left[: len(left) // self.world * self.world]
        return left[self.rank :: self.world]

    def rows(self, keys: Any) -> Rows:
        """Rows of samples: int64 (n,).

        Args:
            keys: rows (integers, an array or a tensor), or string keys.

        Raises:
            UsageError: a key was never named, or a row is out of range.
        """
        if self._rows_of is not None:
            names = keys.to_pylist() if isinstance(keys, pa.Array | pa.ChunkedArray) else list(keys)
            if names and isinstance(names[0], str):
                strange = [name for name in names if name not in self._rows_of]
                if strange:
                    raise _unknown(len(strange), len(names), f"such as '{strange[0]}'")
                return np.fromiter((self._rows_of[n] for n in names), np.int64, len(names))
        given = keys.cpu().numpy() if isinstance(keys, torch.Tensor) else np.asarray(keys)
        if given.dtype.kind not in "iu" and given.size:
            raise _unknown(given.size, given.size, f"of type {given.dtype}")
        found = np.atleast_1d(given).astype(np.int64)
        wrong = found[(found < 0) | (found >= self.samples)]
        if len(wrong):
            raise _unknown(len(wrong), len(found), f"such as row {wrong[0]} of {self.samples}")
        return found

    def keeps(self, keys: Any) -> Flags:
        """Which samples belong to the present epoch, bool (n,): what a stream asks for."""
        chosen: Flags = self._chosen[self.rows(keys)]
        return chosen

    def weights(self, keys: Any) -> Any:
        """Weights of the losses of samples in the present epoch, of the kind of ``keys``.

        Returns:
            float32 (n,), a tensor on their device where keys are a tensor.
        """
        made = self._weights(self.rows(keys))
        return torch.from_numpy(made).to(keys.device) if isinstance(keys, torch.Tensor) else made

    def update(self, keys: Any, losses: Any) -> None:
        """Take the losses of samples that were trained on, those of all ranks.

        What lies on a GPU is not waited for: it is taken over before it is needed.

        Args:
            keys: (n,), as for :meth:`rows`.
            losses: (n,), one a sample; kept as float32.

        Raises:
            UsageError: a loss is not finite, a key was never named, or numbers differ. Then none
                of these losses is taken. On a GPU it is told when the next epoch begins.
        """
        if isinstance(losses, torch.Tensor):
            losses = losses.detach()
        self._waiting.append((keys, losses))
        if not (isinstance(losses, torch.Tensor) and losses.is_cuda):
            self._take_over()

    def _take_over(self) -> None:
        while self._waiting:
            keys, losses = self._waiting.pop(0)
            rows = self.rows(keys)
            if isinstance(losses, torch.Tensor):
                losses = losses.to("cpu", torch.float32).numpy()
            values = np.atleast_1d(np.asarray(losses, np.float32))
            _check(
                values.shape == rows.shape,
                f"There are {values.shape} losses for {rows.shape} samples.",
                "reduction='none' of the loss, and one loss for each sample",
            )
            wrong = np.flatnonzero(~np.isfinite(values))
            if len(wrong):
                raise UsageError(
                    f"{len(wrong)} of {len(values)} losses in epoch {self._epoch} are not finite, "
                    f"that of sample {self._name(int(rows[wrong[0]]))} the first of them.",
                    hint="The training has diverged: lower its learning rate, or leave such "
                    "samples out.",
                    code="loss-not-finite",
                )
            self._losses[rows] = values
            self._position += int(np.count_nonzero(self._chosen[rows]))

    def _name(self, row: int) -> str:
        if self._rows_of is None:
            return str(row)
        return next(f"'{key}'" for key, number in self._rows_of.items() if number == row)

    @property
    def saved(self) -> int:
        """Samples that were left out in the epochs that have begun."""
        return self._saved_before + (self.samples - self._length if self._epoch >= 0 else 0)

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the training depends on: tensors and plain types.

        It counts as trained what :meth:`update` was given, not what a loader has fetched ahead.
        """
        self._take_over()
        return {
            "version": self.version,
            "method": type(self).__name__,
            "samples": self.samples,
            "epochs": self.epochs,
            "options": dict(self._options),
            "epoch": self._epoch,
            "position": self._position,
            "saved": self._saved_before,
            "before": torch.from_numpy(self._before.copy()),
            "losses": torch.from_numpy(self._losses.copy()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, on any number of ranks.

        Raises:
            UsageError: it is the state of another sampler.
        """
        own = {
            "version": self.version,
            "method": type(self).__name__,
            "samples": self.samples,
            "epochs": self.epochs,
            "options": self._options,
        }
        other = [name for name, value in own.items() if state.get(name) != value]
        if other:
            name = other[0]
            raise UsageError(
                f"The state is of another sampler: its {name} is {state.get(name)!r}, and here it "
                f"is {own[name]!r}.",
                hint="Make the sampler with the arguments that it had; rank and world may differ.",
                code="other-sampler",
            )
        self._waiting = []
        self._before = state["before"].numpy().astype(np.float32)
        self._losses = state["losses"].numpy().astype(np.float32)
        self._epoch, self._position = state["epoch"], state["position"]
        self._saved_before, self._goes_on = state["saved"], state["epoch"] >= 0
        if self._goes_on:
            self._select()

    def _seed_for(self, what: str) -> int:
        return seed_for(self.seed, type(self).__name__, what, self._epoch)


def active_epochs(epochs: int, anneal: float) -> int:
    """Epochs before annealing: the largest e with e <= ``anneal`` x ``epochs``."""
    return math.floor(round(anneal * epochs, 9))


def even_parts(total: int, parts: int) -> list[int]:
    """A whole number in so many whole parts that differ by 1 at most."""
    edges = [total * part // parts for part in range(parts + 1)]
    return [hi - lo for lo, hi in pairwise(edges)]


def _numbered(keys: Sequence[str] | pa.Array) -> dict[str, int]:
    names = keys.to_pylist() if isinstance(keys, pa.Array | pa.ChunkedArray) else list(keys)
    rows = {name: row for row, name in enumerate(names)}
    _check(
        len(rows) == len(names) and all(isinstance(name, str) for name in rows),
        f"{len(names) - len(rows)} of {len(names)} keys are there more than once, or not strings.",
        "a string of its own for each sample, or their number",
    )
    return rows


def _unknown(count: int, total: int, example: str) -> UsageError:
    return UsageError(
        f"{count} of {total} samples are not known to the sampler, {example}.",
        hint="Give the rows 0 to N - 1, or the keys that the sampler was made with.",
        code="unknown-sample",
    )


def check_share(name: str, value: float, most: float) -> None:
    """Raise UsageError where a share is not from 0 to ``most``."""
    _check(0 <= value <= most, f"{name}={value:g} is not from 0 to {most:g}.", name)


def _check(holds: bool, message: str, wanted: str) -> None:
    if not holds:
        raise UsageError(message, hint=f"Check {wanted}.", code="bad-sampler")
