"""k-means over shards that stay where they are: workers return sums, one process joins them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from pipeline.clustering import kernels
from pipeline.clustering.checks import InputError, check_finite, spread, unit_rows
from pipeline.clustering.cpu import Rows, add_rows
from pipeline.clustering.directions import Directions, Floats, find_directions
from pipeline.clustering.seeding import reduce
from pipeline.clustering.threads import Threads
from pipeline.digest import seed_for

Arrays = Mapping[str, npt.NDArray[Any]]

_SAMPLE = 4608
_SPARE = 64
"""Rows of a part that may found a cluster which is left empty."""


@dataclass(frozen=True)
class ShardedKMeans:
    """k-means in rounds: k-means|| (Bahmani and others, 2012), then Lloyd's iteration.

    In a round every part of the shards is gone through once, with the state that the round before
    left; what parts return is joined in their order. So the result depends on how shards are put
    into parts, and not on who goes through which.

    A cluster that loses its rows takes the row furthest from its centroid, of the 64 furthest of
    each part; where these do not suffice the others stay where they are until the next iteration.

    Attributes:
        n_clusters: K, no more than there are rows.
        rounds: in which k-means|| draws rows.
        oversampling: how many times K rows it draws in each.
        max_iter: the most of Lloyd's iterations.
        tol: end where the squared distances that centroids moved come to no more than this share of
            the mean variance of the columns.
        spherical: cluster directions: rows are made of length 1, and so are centroids.
    """

    version: ClassVar[int] = 1

    n_clusters: int
    rounds: int = 5
    oversampling: float = 2.0
    max_iter: int = 100
    tol: float = 1e-4
    spherical: bool = False

    def begin(self, seed: int) -> Arrays:
        """The state before the first round."""
        return {"phase": np.array([0]), "seed": np.array([seed])}

    def begin_from(self, centroids: Floats, tol: float = 0.0) -> Arrays:
        """The state that begins with given centroids, and ends where they move no more than so."""
        return {
            "phase": np.array([self.rounds + 2]),
            "seed": np.array([0]),
            "centroids": centroids,
            "tol": np.array([tol]),
            "last": np.array([0]),
        }

    def done(self, state: Arrays) -> bool:
        """Whether nothing is left to do."""
        return "inertia" in state

    def result(self, state: Arrays) -> tuple[Arrays, dict[str, Any]]:
        """``centroids`` float32 (K, D), and what is known of them."""
        iterations = int(state["phase"][0]) - self.rounds - 3
        metrics = {"inertia": float(state["inertia"][0]), "iterations": iterations}
        return {"centroids": state["centroids"]}, metrics

    def part(self, state: Arrays, shards: Iterable[tuple[str, Floats]], threads: int) -> Arrays:
        """What some shards say to a state.

        Args:
            state: of this round.
            shards: their names and rows (N, D).
            threads: for ranges of rows.

        Raises:
            InputError: rows are not finite, or not of one width.
        """
        phase = int(state["phase"][0])
        with Threads(threads) as pool:
            rows = self._rows(state, shards, pool)
            if phase <= self.rounds:
                return self._draw(state, rows, phase)
            if phase == self.rounds + 1:
                return self._weigh(state, rows)
            return self._sum(state, rows)

    def _rows(
        self, state: Arrays, shards: Iterable[tuple[str, Floats]], threads: Threads
    ) -> Iterator[tuple[str, Rows]]:
        directions = Directions(state["mean"], state["basis"]) if "basis" in state else None
        for name, given in shards:
            x = np.require(given, np.float32, ["C", "A"])
            if x.ndim != 2:
                raise InputError(
                    f"Rows of shape {x.shape} are no matrix (N, D).",
                    hint="Choose a column of vectors, all of one length.",
                    code="bad-rows",
                    where=name,
                )
            check_finite(x, where=name)
            x = unit_rows(x) if self.spherical else x
            yield name, Rows(x, np.ones(len(x), np.float32), directions, threads)

    def _draw(self, state: Arrays, rows: Iterable[tuple[str, Rows]], phase: int) -> Arrays:
        """Rows drawn without replacement, by squared distance to those drawn before."""
        most = round(self.oversampling * self.n_clusters) if phase else _SAMPLE
        drawn, total = None, 0
        for name, part in rows:
            total += len(part.x)
            if phase:
                part.assign(state["drawn"])
            share = part.near.astype(np.float64) if phase else np.ones(len(part.x))
            # The first of exponential arrivals are draws by these shares, however rows are split.
            random = np.random.default_rng(seed_for(int(state["seed"][0]), str(phase), name))
            with np.errstate(divide="ignore"):
                arrival = random.standard_exponential(len(share)) / share
            first = np.argsort(arrival, kind="stable")[:most]
            first = first[np.isfinite(arrival[first])]
            drawn = _first(drawn, {"rows": part.x[first], "arrival": arrival[first]}, most)
        return {**(drawn or {}), "count": np.array([total])}

    def _weigh(self, state: Arrays, rows: Iterable[tuple[str, Rows]]) -> Arrays:
        weight = np.zeros(len(state["drawn"]))
        for _, part in rows:
            part.assign(state["drawn"])
            weight += np.bincount(part.labels, minlength=len(weight))
        return {"weight": weight}

    def _sum(self, state: Arrays, rows: Iterable[tuple[str, Rows]]) -> Arrays:
        centroids = state["centroids"]
        sums, weight = np.zeros(centroids.shape), np.zeros(len(centroids))
        inertia, far, labels, spare = 0.0, [], [], []
        for _, part in rows:
            part.assign(centroids)
            inertia += float(part.chunk_sums().sum())
            weight += np.bincount(part.labels, minlength=len(weight))
            add_rows(part.x, part.weights, part.labels, sums, part.threads)
            first = np.argsort(-part.near, kind="stable")[:_SPARE]
            far.append(part.near[first])
            labels.append(part.labels[first])
            spare.append(part.x[first])
        return {
            "sums": sums,
            "weight": weight,
            "inertia": np.array([inertia]),
            "far": np.concatenate(far),
            "labels": np.concatenate(labels),
            "spare": np.concatenate(spare),
        }

    def join(self, state: Arrays, parts: Iterator[Arrays], threads: int) -> Arrays:
        """The state after a round, from what its parts returned, in order.

        Raises:
            InputError: there are fewer rows than clusters.
        """
        phase = int(state["phase"][0])
        with Threads(threads) as pool:
            if phase <= self.rounds:
                made = self._join_drawn(state, parts, phase)
            elif phase == self.rounds + 1:
                made = self._join_weights(state, parts, pool)
            else:
                made = self._join_sums(state, parts)
        return {**made, "phase": np.array([phase + 1])}

    def _join_drawn(self, state: Arrays, parts: Iterator[Arrays], phase: int) -> Arrays:
        most = round(self.oversampling * self.n_clusters) if phase else _SAMPLE
        drawn, count = None, 0
        for part in parts:
            drawn, count = _first(drawn, part, most), count + int(part["count"][0])
        found = drawn["rows"] if drawn else np.empty((0, 0), np.float32)
        if phase:
            return {**state, "drawn": np.concatenate([state["drawn"], found])}
        if count < self.n_clusters:
            raise InputError(
                f"n_clusters={self.n_clusters} clusters cannot be made of {count} rows.",
                hint="Ask for no more clusters than there are rows.",
                code="too-many-clusters",
            )
        directions = find_directions(found, self.n_clusters, count)
        known = {"mean": directions.mean, "basis": directions.basis} if directions else {}
        return {
            **state,
            **known,
            "drawn": found[:1],
            "tol": np.array([self.tol * spread(found)]),
        }

    def _join_weights(self, state: Arrays, parts: Iterator[Arrays], threads: Threads) -> Arrays:
        weight = sum((part["weight"] for part in parts), np.zeros(len(state["drawn"])))
        directions = Directions(state["mean"], state["basis"]) if "basis" in state else None
        drawn = Rows(state["drawn"], weight.astype(np.float32), directions, threads)
        random = np.random.RandomState(int(state["seed"][0]) % 2**32)
        centroids = reduce(drawn, self.n_clusters, random, spherical=self.spherical)
        kept = {name: value for name, value in state.items() if name != "drawn"}
        return {**kept, "centroids": centroids, "last": np.array([0])}

    def _join_sums(self, state: Arrays, parts: Iterator[Arrays]) -> Arrays:
        before = np.ascontiguousarray(state["centroids"])
        count = len(before)
        sums, weight, inertia = np.zeros(before.shape), np.zeros(count), 0.0
        far, labels, spare = [], [], []
        for part in parts:
            sums += part["sums"]
            weight += part["weight"]
            inertia += float(part["inertia"][0])
            far.append(part["far"])
            labels.append(part["labels"])
            spare.append(part["spare"])
        if state["last"][0]:
            return {**state, "inertia": np.array([inertia])}
        order = np.argsort(-np.concatenate(far), kind="stable")
        order = order[np.concatenate(far)[order] > 0.0]
        taken, rows = np.concatenate(labels)[order], np.concatenate(spare)[order]
        empty = np.flatnonzero(weight == 0.0)
        for cluster, label, row in zip(empty, taken, rows.astype(np.float64), strict=False):
            sums[label] -= row
            weight[label] -= 1.0
            sums[cluster], weight[cluster] = row, 1.0
        after, drift = np.empty_like(before), np.empty(count)
        kernels.average(sums, weight, before, self.spherical, 0, count, after, drift)
        iterations = int(state["phase"][0]) - self.rounds - 1
        ends = float(drift @ drift) <= state["tol"][0] or iterations >= self.max_iter
        return {**state, "centroids": after, "last": np.array([int(ends)])}


def _first(drawn: Arrays | None, more: Arrays, most: int) -> Arrays:
    """The rows that arrive first, in that order, of those until now and some more."""
    both = [each for each in (drawn, more) if each is not None]
    arrival = np.concatenate([each["arrival"] for each in both])
    order = np.argsort(arrival, kind="stable")[:most]
    rows = np.concatenate([each["rows"] for each in both])
    return {"rows": rows[order], "arrival": arrival[order]}
