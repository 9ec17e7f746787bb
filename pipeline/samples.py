"""An output, or any data set, as a sequence of samples."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.digest import digest
from pipeline.errors import UsageError
from pipeline.labelled_images import ImageConfig
from pipeline.stages.decode import pixels_of
from pipeline.storage.artifact import Artifact
from pipeline.storage.images import MAX_PIXELS
from pipeline.storage.shard_reader import Places, Rows, ShardReader, keys_in
from pipeline.storage.source import UNREADABLE, Source
from pipeline.tensors import is_tensor

if TYPE_CHECKING:
    from pipeline.image_tensors import ImageTensors, Transform

log = logging.getLogger(__name__)
OnError = Literal["raise", "skip"]
WINDOW, WINDOW_BYTES = 16, 2**29
"""Shards whose samples are mixed with one another, at most, and their size in memory."""


class Samples:
    """Samples by number, as they are stored: images with keys, labels and whatever else there is.

    Nothing is read before it is asked for. A remote shard that is read travels once if
    :func:`pipeline.open` was given a cache.

    Attributes:
        kind: ``images``, ``pruned``, ``distilled``, ``tokens`` or ``features``.
        place: path or URL.
        classes: class names by label; empty where there are no labels.
        image: shape and normalisation that the run worked with, where it is known.
        source: the shards.
        manifest: of the output; empty for other data sets.
    """

    kind = "images"

    def __init__(
        self,
        source: Source,
        *,
        place: str,
        artifact: Artifact | None = None,
        places: Places | None = None,
        image: ImageConfig | None = None,
    ) -> None:
        self.source, self.place, self.image = source, place, image
        self.manifest: Mapping[str, Any] = artifact.manifest if artifact else {}
        self.classes = source.classes
        self._places = Places.of(source) if places is None else places
        self._reader = ShardReader(source)
        self._chosen: Rows | None = None
        self._joined: pa.Table | None = None
        self._bad: set[int] = set()

    def __len__(self) -> int:
        return len(self._places)

    def __repr__(self) -> str:
        of = f" of {len(self.classes)} classes" if self.classes else ""
        return f"<{type(self).__name__}: {len(self):,} samples{of}, {self.kind}, {self.place}>"

    @cached_property
    def keys(self) -> list[str]:
        """The samples' keys, in order. Reads all shards where it was not known before."""
        names: list[str] = self._named().keys.to_pylist()  # type: ignore[union-attr]
        return names

    def _named(self) -> Places:
        if self._places.keys is None:
            parts = [chunk for table in self.tables() for chunk in table["key"].chunks]
            keys = pa.concat_arrays([pa.array([], pa.string()), *parts])
            self._places = Places(self._places.shards, self._places.rows, keys)
        return self._places

    @property
    def schema(self) -> pa.Schema:
        """Names and types of the columns. Reads the first shard."""
        return self.table(np.arange(min(1, len(self)))).schema

    @property
    def stats(self) -> dict[str, Any]:
        """Numbers of samples, classes and shards, and what the run counted."""
        found = {
            "samples": len(self),
            "classes": len(self.classes),
            "shards": len(self.counts()),
        }
        return found | ({"counts": self.manifest["counts"]} if "counts" in self.manifest else {})

    @property
    def identity(self) -> str:
        """Digest of what the shards hold and of which samples are meant."""
        return digest(self.kind, self.source.identity, self._places.digest)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample by column; ``image`` as uint8 H x W x C.

        Raises:
            IndexError: there is none.
            RunError: its shard is damaged.
        """
        row = self.table(np.array([range(len(self))[index]]))
        return {name: _value(name, row[name]) for name in row.column_names}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[row] for row in range(len(self)))

    def rows_of(self, rows: Rows) -> Rows:
        """Rows of the whole output for samples of this part of it."""
        return rows if self._chosen is None else self._chosen[rows]

    def table(self, rows: npt.ArrayLike, on_error: OnError = "raise") -> pa.Table:
        """Some samples as they are stored, in the order asked for.

        Args:
            rows: their numbers.
            on_error: what to do with a shard that cannot be read: raise an error, or leave its
                samples out.

        Raises:
            RunError: a shard is damaged.
        """
        wanted = np.asarray(rows, np.int64)
        shards = self._places.shards[wanted]
        order = np.argsort(shards, kind="stable")
        cuts = np.flatnonzero(np.diff(shards[order])) + 1
        parts, found = [], []
        for group in np.split(order, cuts) if len(order) else ():
            number = int(shards[group[0]])
            if on_error == "skip" and number in self._bad:
                continue
            try:
                parts.append(self._reader.read(number, self._places, wanted[group]))
            except UNREADABLE as error:
                if on_error == "raise":
                    raise
                self._leave_out(number, error)
            else:
                found.append(group)
        if not parts:
            return self._nothing()
        whole = pa.concat_tables(parts, promote_options="default")
        at = np.concatenate(found)
        if (np.diff(at) < 0).any():
            whole = whole.take(pa.array(np.argsort(at, kind="stable")))
        if self._joined is not None:
            others = self._joined.take(pa.array(wanted[np.sort(at)]))
            for name in others.column_names:
                whole = whole.append_column(name, others[name])
        return whole

    def _nothing(self) -> pa.Table:
        """No samples, with the columns of the first shard that can be read."""
        whole = self._first_readable().slice(0, 0)
        if self._joined is not None:
            for name in self._joined.column_names:
                whole = whole.append_column(name, self._joined[name].slice(0, 0))
        return whole

    def _first_readable(self) -> pa.Table:
        last = len(self.source.shards) - 1
        for number in range(last):
            if number not in self._bad:
                try:
                    return self._reader.shard(number)
                except UNREADABLE as error:
                    self._leave_out(number, error)
        return self._reader.shard(last)

    def _leave_out(self, number: int, error: Exception) -> None:
        self._bad.add(number)
        log.warning("shard %d is left out: %s", number, error)

    def tables(self) -> Iterator[pa.Table]:
        """The samples of every shard that has some, in order."""
        return map(self.shard_table, range(len(self.counts())))

    def shard_table(self, number: int) -> pa.Table:
        """The samples of one of the shards that have some."""
        return self.table(np.arange(*self._places.edges[number : number + 2].tolist()))

    def subset(self, keys: Iterable[str]) -> Self:
        """The samples with these keys, in the order of the data set; nothing is copied.

        Raises:
            UsageError: a key is not there.
        """
        wanted = pa.array(keys if isinstance(keys, pa.Array) else list(keys), pa.string())
        rows = keys_in(self._named(), wanted)
        if len(rows) < len(pc.unique(wanted)):
            missing = wanted.filter(pc.invert(pc.is_in(wanted, self._named().keys)))
            raise UsageError(
                f"{len(missing)} of {len(wanted)} keys are not in this data set, such as "
                f"'{missing[0]}'.",
                hint="Keys are names of samples, as in the attribute 'keys'.",
                code="unknown-key",
                where=self.place,
            )
        return self._taken(rows)

    def _taken(self, rows: Rows) -> Self:
        joined = None if self._joined is None else self._joined.take(pa.array(rows))
        chosen = self.rows_of(rows)
        return self._changed(_places=self._places.take(rows), _chosen=chosen, _joined=joined)

    def _changed(self, **attributes: Any) -> Self:
        part = copy.copy(self)
        vars(part).pop("keys", None)
        vars(part).update(attributes)
        return part

    def join(self, scores: pa.Table | str | Path) -> Self:
        """The same samples with the columns of a table beside their own.

        Args:
            scores: with a column ``key``: a table, or the output of ``pipeline run prune`` or the
                path of a Parquet file. Samples that it does not have get nulls.

        Raises:
            UsageError: it has no keys, none of these samples, or a column that is there already.
        """
        table = scores if isinstance(scores, pa.Table) else _scores(scores)
        if "key" not in table.column_names:
            raise UsageError(
                f"The table has no column 'key', but {', '.join(table.column_names)}.",
                hint="Name each sample in it.",
                code="bad-scores",
            )
        places = pc.index_in(self._named().keys, table["key"].combine_chunks())
        if len(self) and places.null_count == len(places):
            raise UsageError(
                "The table has none of these samples.",
                hint="Give scores of this data set: samples are matched by key.",
                code="bad-scores",
                where=self.place,
            )
        own = set(self.schema.names)
        names = [n for n in table.column_names if n not in {"key", "label"}]
        if twice := own.intersection(names):
            raise UsageError(
                f"There is a column '{min(twice)}' already.",
                hint="Rename it in the table.",
                code="bad-scores",
            )
        joined = self._joined
        for name in names:
            column = table[name].take(places)
            joined = (
                pa.table({name: column}) if joined is None else joined.append_column(name, column)
            )
        return self._changed(_joined=joined)

    def counts(self) -> tuple[int, ...]:
        """Samples of each shard that has some."""
        return tuple(np.diff(self._places.edges).tolist())

    def hold(self, window: int | None) -> int:
        """How many shards are mixed with one another where none or so many were asked for.

        As many are kept in memory from now on, twice over: one set begins before another ends.
        """
        some = self._places.shards[self._places.edges[:-1]][:1000].tolist()
        each = sum(self.source.shards[number].bytes or 0 for number in some) // max(1, len(some))
        fit = WINDOW_BYTES // max(1, each)
        chosen = min(WINDOW, max(1, fit)) if window is None else window
        self._reader.max_bytes = max(self._reader.max_bytes, 2 * chosen * each)
        return chosen

    def to_torch(
        self,
        *,
        size: int | None = None,
        channels: Literal[1, 3] | None = None,
        normalize: bool = True,
        transform: Transform | None = None,
        on_error: OnError = "raise",
    ) -> ImageTensors:
        """A torch data set of (image, label, key).

        Args:
            size: side in pixels; the middle square is scaled to it. The run's where not given, and
                images as they are where no run says.
            channels: 3 for RGB, 1 for gray.
            normalize: give float32, (x / 255 - mean) / std, and not uint8.
            transform: of each image, uint8 (C, H, W), before it is normalised.
            on_error: what becomes of shards and images that cannot be read: an error, or they are
                left out and counted.
        """
        from pipeline.image_tensors import ImageTensors

        return ImageTensors(self, size, channels, normalize, transform, on_error)

    def to_arrow(self) -> pa.Table:
        """All samples as one table, in memory."""
        tables = list(self.tables())
        return pa.concat_tables(tables or [self.table([])], promote_options="default")

    def to_webdataset(self) -> Any:
        """A pipeline of the library ``webdataset``: ``.shuffle(1000).decode("rgb8")`` and so on.

        Samples have ``__key__``, the image by its extension, ``cls`` and ``json``. Shards are
        divided between workers.

        Raises:
            UsageError: the library is not installed.
        """
        from pipeline.interchange import to_webdataset

        return to_webdataset(self)

    def to_ray(self) -> Any:
        """A ``ray.data.Dataset`` whose blocks are the shards, read where they are needed.

        Raises:
            UsageError: the library is not installed.
        """
        from pipeline.interchange import to_ray

        return to_ray(self)

    def to_hf(self) -> Any:
        """A ``datasets.Dataset`` of Hugging Face with its features, in memory.

        Raises:
            UsageError: the library is not installed.
        """
        from pipeline.interchange import to_hf

        return to_hf(self)


def _scores(place: str | Path) -> pa.Table:
    from pipeline.storage.artifact import ArtifactSource
    from pipeline.storage.parquet import read_table
    from pipeline.storage.store import open_store

    if Path(place).is_file():
        return read_table(Path(place))
    artifact = Artifact.open(open_store(place))
    if "scores" in artifact.products:
        artifact = artifact.product("scores")
    return pa.concat_tables(ArtifactSource(artifact).tables())


def _value(name: str, column: pa.ChunkedArray) -> Any:
    if is_tensor(column.type):
        return column[0].to_numpy().copy()
    value = column[0].as_py()
    return pixels_of(value, None, None, MAX_PIXELS) if name == "image" and value else value
