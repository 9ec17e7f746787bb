"""What a data set, or an output of this pipeline, holds."""

from __future__ import annotations

import hashlib
import io
import math
import statistics
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from pipeline.datasets import DatasetInfo, find_dataset
from pipeline.errors import PipelineError, RunError, UsageError
from pipeline.orchestration.screen import screen
from pipeline.orchestration.snapshots import place_of, snapshots
from pipeline.stage import ShardContext
from pipeline.stages.decode import each_image, pixels_of
from pipeline.storage.arrays import ArraySource
from pipeline.storage.artifact import Artifact, ArtifactSource
from pipeline.storage.batches import Batches
from pipeline.storage.folder import FolderSource
from pipeline.storage.image_column import extension_of
from pipeline.storage.images import ALLOWED, MAX_PIXELS, SECONDS, TimeLimit
from pipeline.storage.npz import NpzParts
from pipeline.storage.parquet import ParquetSource
from pipeline.storage.source import UNREADABLE, Source
from pipeline.storage.store import open_store
from pipeline.storage.urls import UrlSource
from pipeline.storage.webdataset import WebDatasetSource
from pipeline.storage.zarr import ZarrSource
from pipeline.tensors import is_tensor

WORDS: dict[type[Source], str] = {
    FolderSource: "image folder",
    WebDatasetSource: "WebDataset",
    ParquetSource: "Parquet",
    ZarrSource: "Zarr group",
    UrlSource: "list of URLs",
}
BATCHES = {"idx": "IDX files", "pickled": "CIFAR batches of Python"}
SPLITS = ("train", "test", "images")
"""The products of a run that are looked into, in this order."""
FACTS = ("kind", "dataset", "seed", "config", "layers")
NAMES = 10  # class names that are shown
FAILURES = 3  # shards that may be unreadable before the search for a few samples ends


@dataclass(frozen=True)
class Found:
    """What lies at a place.

    Attributes:
        name: of the data set or folder.
        splits: what can be read as samples, by name.
        artifact: the output's manifest, where it is an output of this pipeline.
        info: what is known of a data set that has a name.
    """

    name: str
    splits: Mapping[str, Source]
    artifact: Artifact | None = None
    info: DatasetInfo | None = None


def find(place: str, data: str | None) -> Found:
    """A data set by name, path or URL, or any output of this pipeline.

    Raises:
        UsageError: there is neither.
        RunError: it is an output whose manifest is damaged.
    """
    try:
        dataset = find_dataset(place, data)
    except UsageError as error:
        other = {"no-images", "unknown-form", "no-train-split"}  # than a data set, or an empty one
        artifact = _artifact(place) if error.code in other else None
        if artifact is None:
            raise
        return Found(artifact.name, _products(artifact), artifact)
    if dataset.info is None and isinstance(dataset.train, ArtifactSource):
        artifact = Artifact.open(open_store(place))
        return Found(dataset.name, _products(artifact), artifact)
    splits = {"train": dataset.train, **({"test": dataset.test} if dataset.test else {})}
    return Found(dataset.name, splits, None, dataset.info)


def _artifact(place: str) -> Artifact | None:
    try:
        return Artifact.open(open_store(place))
    except (PipelineError, OSError):
        return None


def _products(artifact: Artifact) -> dict[str, Source]:
    if artifact.manifest["kind"] == "table":
        return {artifact.manifest["step"]: ArtifactSource(artifact)}
    found = {role: artifact.product(role) for role in SPLITS if role in artifact.products}
    return {r: ArtifactSource(a) for r, a in found.items() if a.manifest["kind"] == "table"}


def inspect(
    place: str,
    data: str | None = None,
    *,
    every: bool = False,
    samples: int = 5,
    sheet: Path | None = None,
) -> dict[str, Any]:
    """Describe a data set, a run's output or the folder of one step.

    Samples and shards that cannot be read are described as such.

    Args:
        place: name, path or URL.
        data: where named data sets lie.
        every: read all shards, one at a time, and count.
        samples: how many of the first samples of each split to describe.
        sheet: where to write a PNG of up to 100 images of the first split, of as many classes as
            there are in the shards that they are taken from.

    Returns:
        ``name``, ``place``, ``info`` (of a named data set), ``output`` (of a run or a step),
        ``splits`` and ``sheet``, all of plain JSON types.

    Raises:
        UsageError: there is nothing to describe, or the sheet cannot be written.
        RunError: a manifest is damaged.
    """
    found = find(place, data)
    summary: dict[str, Any] = {"name": found.name, "place": place}
    if found.info:
        summary["info"] = {"title": found.info.title, "origin": found.info.origin}
    if found.artifact:
        summary["output"] = _output(found.artifact)
    summary["splits"] = {
        name: _split(source, every, samples) for name, source in found.splits.items()
    }
    if sheet is not None:
        from pipeline.sheet import write_sheet

        summary["sheet"] = write_sheet(next(iter(found.splits.values()), None), sheet)
    return summary


def words_for(source: Source) -> str:
    """What kind of source it is, for people."""
    if isinstance(source, ArtifactSource):
        return f"output of this pipeline as {source.artifact.manifest['writer']['name']}"
    if isinstance(source, ArraySource):
        if isinstance(source.load, NpzParts):
            return "NumPy archive"
        kind = source.load.kind if isinstance(source.load, Batches) else None
        return BATCHES.get(kind, "CIFAR batches") if kind else "arrays in memory"
    return WORDS.get(type(source), type(source).__name__)


def type_name(kind: pa.DataType) -> str:
    """An Arrow type for people: ``uint8 tensor 32 x 32 x 3``."""
    if is_tensor(kind):
        return f"{kind.value_type} tensor {' x '.join(map(str, kind.shape))}"
    return str(kind)


def _output(artifact: Artifact) -> dict[str, Any]:
    manifest = artifact.manifest
    facts = {name: manifest[name] for name in FACTS if name in manifest}
    if manifest["kind"] in {"table", "models", "arrays"}:
        return {**facts, "products": {}, "steps": [_step(artifact)]}
    steps: dict[str, dict[str, Any]] = {}
    bases = set()
    for folder in [*manifest.get("steps", ()), *artifact.products.values()]:
        try:
            step = Artifact.open(artifact.store.below(folder))
            steps[folder] = _step(step)
            bases.add(step.manifest.get("base"))
        except PipelineError as error:
            steps[folder] = {"folder": folder, "problem": error.message}
    # One that was taken up again is counted with what was made of its quarantine.
    rows = [step for folder, step in steps.items() if folder not in bases]
    earlier = [place_of(artifact.store, number).url for number in snapshots(artifact.store)]
    products = dict(artifact.products)
    return {**facts, "products": products, "steps": rows, "snapshots": earlier}


def _step(artifact: Artifact) -> dict[str, Any]:
    manifest = artifact.manifest
    table = manifest["kind"] == "table"
    parts = ArtifactSource(artifact).artifacts if table else (artifact,)
    facts = {
        "step": manifest.get("step", artifact.name),
        "folder": artifact.name,
        "kind": manifest["kind"],
        "shards": sum(part.shards for part in parts),
        "bytes": sum(entry.bytes for part in parts for entry in part.files.values()),
    }
    if table:
        return {**facts, **manifest["counts"]}
    return {
        **facts,
        "metrics": {record["name"]: record["metrics"] for record in artifact.records()},
    }


def _split(source: Source, every: bool, samples: int) -> dict[str, Any]:
    look = _Look(source, samples, every)
    for shard in source.shards:
        if not every and (look.enough or len(look.problems) >= FAILURES):
            break
        try:
            look.add(source.read(shard))  # not bound to a name: it goes before the next is read
        except UNREADABLE as error:
            look.problem(shard.name, error)
    rows = look.rows if every and not look.problems else _sum([s.rows for s in source.shards])
    facts: dict[str, Any] = {
        "source": words_for(source),
        "shards": len(source.shards),
        "rows": rows,
        "bytes": _size(source),
        "classes": {"count": len(look.classes), "names": list(look.classes[:NAMES])},
        "schema": look.schema,
        "samples": look.samples,
        "problems": look.problems,
    }
    return {**facts, "all": look.totals()} if every else facts


def _size(source: Source) -> int | None:
    if isinstance(source, ArtifactSource):
        return source.bytes()  # of its files; its shards tell how large their tables are
    return _sum([shard.bytes for shard in source.shards])


def _sum(numbers: Sequence[int | None]) -> int | None:
    known = [number for number in numbers if number is not None]
    return sum(known) if len(known) == len(numbers) else None


@dataclass
class _Look:
    """What was seen of a source, table by table."""

    source: Source
    wanted: int
    every: bool
    classes: tuple[str, ...] = ()
    schema: dict[str, str] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    problems: list[dict[str, str]] = field(default_factory=list)
    rows: int = 0
    bytes: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    labels: Counter[int] = field(default_factory=Counter)
    keys: list[npt.NDArray[np.uint64]] = field(default_factory=list)

    def __post_init__(self) -> None:
        try:
            self.classes = self.source.classes
        except UNREADABLE as error:
            self.problem(None, error)

    @property
    def enough(self) -> bool:
        return bool(self.schema) and len(self.samples) >= self.wanted

    def problem(self, shard: str | None, error: BaseException) -> None:
        message = error.message if isinstance(error, PipelineError) else str(error)
        self.problems.append({**({"shard": shard} if shard else {}), "problem": message})

    def add(self, table: pa.Table) -> None:
        self.schema = self.schema or {item.name: type_name(item.type) for item in table.schema}
        bad = self._screened(table)
        self.rows += len(table)
        missing = self.wanted - len(self.samples)
        if missing > 0:
            part = table.slice(0, missing)
            self.samples += [
                _sample(part, row, self.classes, bad.get(row), undecodable)
                for row, undecodable in enumerate(_undecodable(part))
            ]
        if self.every:
            self._count(table, bad)

    def _screened(self, table: pa.Table) -> dict[int, str]:
        """Reason and detail of the rows that a step would put into quarantine."""
        try:
            _, rows = screen(numbered(table), self.source)
        except RunError as error:
            self.problems.append({"problem": error.message})
            return dict.fromkeys(range(len(table)), "bad-label: no class has this label")
        lines = zip(*(rows[name].to_pylist() for name in ("reason", "detail")), strict=True)
        texts = [f"{reason}: {detail}" for reason, detail in lines]
        return dict(zip(rows[ROW].to_pylist(), texts, strict=True))

    def _count(self, table: pa.Table, bad: Mapping[int, str]) -> None:
        names = table.column_names
        self.bad.update(text.partition(":")[0] for text in bad.values())
        if "key" in names:
            self.keys.append(hashes(table["key"]))
        if "label" in names and self.classes:
            labels = enumerate(table["label"].to_pylist())
            self.labels.update(label for row, label in labels if row not in bad)
        for image in image_facts(table["image"]) if "image" in names else ():
            self.kinds[image["kind"]] += 1
            self.bytes += image["bytes"]
            if "width" in image:
                self.sizes[image["width"], image["height"]] += 1

    def totals(self) -> dict[str, Any]:
        keys = np.concatenate(self.keys) if self.keys else np.empty(0, np.uint64)
        return {
            "rows": self.rows,
            "bad": dict(sorted(self.bad.items())),
            "repeated_keys": len(keys) - len(np.unique(keys)),
            "image_bytes": self.bytes,
            "kinds": dict(sorted(self.kinds.items())),
            "sizes": _size_facts(self.sizes),
            "by_class": self._by_class(),
        }

    def _by_class(self) -> dict[str, Any] | None:
        if not self.classes or "label" not in self.schema:
            return None
        rows = [self.labels[label] for label in range(len(self.classes))]
        span = {"min": min(rows), "median": statistics.median(rows), "max": max(rows)}
        return {**span, "rows": [list(pair) for pair in zip(self.classes, rows, strict=True)]}


ROW = "\0row"
"""Column of :func:`numbered`."""


def numbered(table: pa.Table) -> pa.Table:
    """What screening asks for, with the number of each row in place of its image's bytes."""
    names = set(table.column_names)
    columns = {name: table[name] for name in ("key", "label", "error") if name in names}
    if "image" in names:
        columns["image"] = pc.if_else(pc.is_null(table["image"]), None, True)
    return pa.table({**columns, ROW: pa.array(range(len(table)), pa.int64())})


def hashes(keys: pa.ChunkedArray) -> npt.NDArray[np.uint64]:
    """64 bits of each key's BLAKE2b."""
    digests = (hashlib.blake2b(_bytes(key), digest_size=8).digest() for key in keys.to_pylist())
    return np.frombuffer(b"".join(digests), np.uint64)


def _bytes(key: str | None) -> bytes:
    return b"\0" if key is None else key.encode()


def _size_facts(sizes: Counter[tuple[int, int]]) -> dict[str, Any] | None:
    """Widths, heights and the most frequent pairs of them, as the images' headers give them."""
    if not sizes:
        return None
    common = sorted(sizes.items(), key=lambda item: (-item[1], item[0]))[:5]
    return {
        "distinct": len(sizes),
        "width": [min(w for w, _ in sizes), max(w for w, _ in sizes)],
        "height": [min(h for _, h in sizes), max(h for _, h in sizes)],
        "most_frequent": [[*size, count] for size, count in common],
    }


def _undecodable(table: pa.Table) -> list[str | None]:
    """Why each row's image cannot be decoded; ``None`` where it can."""
    problems: list[str | None] = [None] * len(table)
    if {"key", "image"} <= set(table.column_names):
        context = ShardContext("", 0)
        kept = set(each_image(table, context, _decode, SECONDS))
        failed = [row for row in range(len(table)) if row not in kept]
        for row, bad in zip(failed, context.bad, strict=True):
            problems[row] = f"{bad['reason']}: {bad['detail']}"
    return problems


def _decode(image: bytes | npt.NDArray[np.uint8], _: int) -> None:
    pixels_of(image, None, None, MAX_PIXELS)


def _sample(
    table: pa.Table, row: int, classes: tuple[str, ...], bad: str | None, undecodable: str | None
) -> dict[str, Any]:
    part, names = table.slice(row, 1), table.column_names
    sample: dict[str, Any] = {}
    if "key" in names:
        sample["key"] = part["key"][0].as_py()
    if "label" in names:
        label = sample["label"] = part["label"][0].as_py()
        known = isinstance(label, int) and 0 <= label < len(classes)
        sample["class"] = classes[label] if known else None
    if "image" in names:
        sample["image"] = next(image_facts(part["image"]), None)
    others = [name for name in names if name not in {"key", "label", "image", "error"}]
    if others:
        sample["other"] = {name: _plain(part[name][0].as_py()) for name in others}
    if bad or undecodable:
        sample["problem"] = bad or undecodable
    return sample


def _plain(value: object) -> object:
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def image_facts(column: pa.ChunkedArray) -> Iterator[dict[str, Any]]:
    """Kind, size and bytes of each image that is there; no more than its header is decoded."""
    if is_tensor(column.type):
        shape, bits = column.type.shape, column.type.value_type.bit_width
        size = {"height": shape[0], "width": shape[1]} if len(shape) > 1 else {}
        one = {"kind": "pixels", **size, "bytes": math.prod(shape) * bits // 8}
        yield from (dict(one) for _ in range(len(column) - column.null_count))
        return
    with TimeLimit() as limited:
        for scalar in column:
            data = scalar.as_py()
            if data is None:
                continue
            kind = extension_of(data)
            image = {"kind": "unknown" if kind == "bin" else kind, "bytes": len(data)}
            try:
                image["width"], image["height"] = limited(_header, data)
            except Exception:  # noqa: BLE001 - damaged files make decoders raise anything
                image.pop("width", None)
            yield image


def _header(data: bytes) -> tuple[int, int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data), formats=ALLOWED) as picture:
            return picture.size
