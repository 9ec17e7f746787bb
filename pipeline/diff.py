"""What differs between two data sets, or two outputs of this pipeline, sample by sample."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.inspect import find, type_name
from pipeline.sample_index import PARTS, Digests, SampleIndex
from pipeline.stages.decode import pixels_of
from pipeline.storage.artifact import INDEX, Artifact, ArtifactSource
from pipeline.storage.images import MAX_PIXELS, TimeLimit
from pipeline.storage.source import Source
from pipeline.tensors import is_tensor, to_numpy
from pipeline.terminal import flat, grid, printable

Digester = Callable[[pa.ChunkedArray], list[bytes]]
ABOUT = ("kind", "dataset", "seed", "spec")
"""What manifests say of how an output was made, beside its configuration."""


def diff(a: str, b: str, data: str | None = None) -> dict[str, Any]:
    """Compare two data sets by key, or two outputs of runs or steps.

    The order of shards and samples does not count, nor how a data set is stored. Splits are
    compared by name; two places of one split each are compared whatever it is called. Encoded
    images are compared by their bytes; where one side holds pixels, by what they decode to. Labels
    are compared by their classes' names where both sides name them. A step whose manifest lists the
    same files on both sides is not read. Of products without samples the listed files count.

    In memory are two shards, about 100 bytes for each sample of ``a``, and twice that for each that
    differs.

    Args:
        a: name, path or URL.
        b: name, path or URL.
        data: where named data sets lie.

    Returns:
        ``same``, which does not depend on the configuration; ``splits`` with counts and first keys;
        ``only_a`` and ``only_b``, the splits of one side; ``products`` and ``config`` with what
        differs between two outputs. All of plain JSON types.

    Raises:
        UsageError: there is nothing to compare at one of the places.
        RunError: a shard or a manifest is damaged.
    """
    found = find(a, data), find(b, data)
    sides = [dict(side.splits) for side in found]
    if len(sides[0]) == len(sides[1]) == 1:
        sides[1] = dict(zip(sides[0], sides[1].values(), strict=True))
    both = [name for name in sides[0] if name in sides[1]]
    splits = {name: _split(sides[0][name], sides[1][name]) for name in both}
    only = [[name for name in side if name not in both] for side in sides]
    products, config = [], {}
    if found[0].artifact and found[1].artifact:
        samples = {*found[0].splits, *found[1].splits}
        products = _other_products(found[0].artifact, found[1].artifact, samples)
        config = _config(found[0].artifact, found[1].artifact)
    same = all(split["same"] for split in splits.values()) and not (only[0] or only[1] or products)
    return {
        "a": a,
        "b": b,
        "same": same,
        "splits": splits,
        "only_a": only[0],
        "only_b": only[1],
        "products": products,
        "config": config,
    }


def _listing(artifact: Artifact) -> tuple[Any, ...]:
    """All that an artifact's content depends on: equal listings are equal data."""
    table = artifact.manifest["kind"] == "table"
    parts = ArtifactSource(artifact).artifacts if table else (artifact,)
    # Not the index, which also says what a shard was made from.
    entries = [[e for e in part.files.values() if e.path != INDEX] for part in parts]
    files = [sorted((e.path, e.bytes, e.sha256) for e in part) for part in entries]
    facts = [artifact.manifest.get(name) for name in ("kind", "writer", "classes")]
    return files, facts


def _other_products(a: Artifact, b: Artifact, splits: Collection[str]) -> list[str]:
    """Roles of what differs and is no split; of two steps, the step."""
    if not (a.products and b.products):
        return [] if splits or _listing(a) == _listing(b) else [str(a.manifest.get("step", a.name))]
    roles = dict.fromkeys([*a.products, *b.products])
    return [role for role in roles if role not in splits and _differs(a, b, role)]


def _differs(a: Artifact, b: Artifact, role: str) -> bool:
    if role not in a.products or role not in b.products:
        return True
    return _listing(a.product(role)) != _listing(b.product(role))


def _config(a: Artifact, b: Artifact) -> dict[str, list[Any]]:
    """Settings that differ, by name, with both values; ``None`` where a side has none."""
    sides = []
    for manifest in (a.manifest, b.manifest):
        about = {name: manifest[name] for name in ABOUT if name in manifest}
        sides.append(flat({**about, **manifest.get("config", {})}))
    names = sorted({*sides[0], *sides[1]})
    pairs = {name: [side.get(name) for side in sides] for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


@dataclass(frozen=True)
class _Reader:
    """Tables to digests.

    Attributes:
        columns: those that both sides have, with how to compare them.
        names: class names by label, where labels are compared by them.
    """

    columns: Mapping[str, Digester]
    names: tuple[str, ...] = ()

    def __call__(self, table: pa.Table) -> tuple[pa.ChunkedArray, Digests]:
        """The keys, and the digests of each sample."""
        keys = [_word(repr(key).encode()) for key in table["key"].to_pylist()]
        columns = {name: digester(table[name]) for name, digester in self.columns.items()}
        none = [b""] * len(keys)
        images, labels = columns.pop("image", none), columns.pop("label", none)
        if self.names and labels is not none:
            labels = [self._name(label).encode() for label in table["label"].to_pylist()]
        rows = list(zip(*columns.values(), strict=True)) or [()] * len(keys)
        found = []
        for key, image, label, other in zip(keys, images, labels, rows, strict=True):
            parts = [_word(image), _word(label), _word(*other)]
            found += [_word(key, image, label, *other), key, *parts]
        return table["key"], np.frombuffer(b"".join(found), np.uint64).reshape(-1, 5)

    def _name(self, label: int | None) -> str:
        known = label is not None and 0 <= label < len(self.names)
        return f"name {self.names[label]}" if known and label is not None else f"label {label}"


def _word(*parts: bytes) -> bytes:
    """64 bits of a digest of several parts."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def _split(a: Source, b: Source) -> dict[str, Any]:
    if _same_files(a, b):
        count = sum(shard.rows or 0 for shard in a.shards)
        return _facts([count, count], {}, {}, {}, (), (), read=False)
    (tables_a, schema_a), (tables_b, schema_b) = _opened(a), _opened(b)
    reader = _Reader(_digesters(schema_a, schema_b))
    named = a.classes != b.classes and _has_names(a.classes) and _has_names(b.classes)
    names = (a.classes, b.classes) if named else ((), ())
    index = SampleIndex.of(map(replace(reader, names=names[0]), tables_a))
    for keys, digests in map(replace(reader, names=names[1]), tables_b):
        index.match(keys, digests)
    rows = [index.rows, index.other_rows]
    return _facts(rows, index.compare(), schema_a, schema_b, *names, read=True)


def _same_files(a: Source, b: Source) -> bool:
    if not isinstance(a, ArtifactSource) or not isinstance(b, ArtifactSource):
        return False
    return _listing(a.artifact) == _listing(b.artifact)


def _facts(
    rows: list[int],
    found: Mapping[str, Any],
    schema_a: Mapping[str, pa.DataType],
    schema_b: Mapping[str, pa.DataType],
    classes_a: Sequence[str],
    classes_b: Sequence[str],
    *,
    read: bool,
) -> dict[str, Any]:
    parts = {
        part: found.get(part, {"count": 0, "keys": []}) for part in ("only_a", "only_b", *PARTS)
    }
    columns, classes = _only(schema_a, schema_b), _only(classes_a, classes_b)
    if not all(rows):  # a side without samples has no columns
        columns = _only((), ())
    stored = {
        name: [type_name(schema_a[name]), type_name(schema_b[name])]
        for name in schema_a
        if name in schema_b and schema_a[name] != schema_b[name]
    }
    differ = any(part["count"] for part in parts.values())
    differ = differ or any([*columns.values(), *classes.values()])
    facts = {"same": not differ, "read": read, "rows": rows, **parts}
    return {**facts, "columns": columns, "stored": stored, "classes": classes}


def _only(a: Iterable[str], b: Iterable[str]) -> dict[str, list[str]]:
    return {"only_a": sorted(set(a) - set(b)), "only_b": sorted(set(b) - set(a))}


def _has_names(classes: Sequence[str]) -> bool:
    """Whether the classes have names that are more than their numbers."""
    return bool(classes) and list(classes) != list(map(str, range(len(classes))))


def _opened(source: Source) -> tuple[Iterator[pa.Table], Mapping[str, pa.DataType]]:
    """The tables, and their columns with types; ``error`` only says why an image is missing."""
    tables = _keyed(source)
    first = next(tables, None)
    if first is None:
        return iter(()), {}
    schema = {item.name: item.type for item in first.schema if item.name != "error"}
    return _again([first], tables), schema


def _again(first: list[pa.Table], tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    while first:
        yield first.pop()  # so that nothing here holds it while the next is read
    yield from tables


def _keyed(source: Source) -> Iterator[pa.Table]:
    """The tables; where samples have no keys, their numbers stand for them."""
    rows = 0
    for shard in source.shards:
        table = source.read(shard)
        if "key" not in table.column_names:
            keys = [f"row {row}" for row in range(rows, rows + len(table))]
            table = table.append_column("key", pa.array(keys, pa.string()))
        rows += len(table)
        yield table
        del table  # it goes before the next is read


def _digesters(a: Mapping[str, pa.DataType], b: Mapping[str, pa.DataType]) -> dict[str, Digester]:
    """How each column that both sides have is compared."""
    found: dict[str, Digester] = {}
    for name in sorted(set(a) & set(b) - {"key"}):
        tensors = is_tensor(a[name]), is_tensor(b[name])
        if name == "image" and any(tensors) and not all(tensors):
            found[name] = _by_pixels
        elif name == "image" or all(tensors):
            found[name] = _by_bytes
        else:
            found[name] = _by_value
    return found


def _by_bytes(column: pa.ChunkedArray) -> list[bytes]:
    """Encoded images by their bytes, tensors by type, shape and bytes."""
    return list(map(_digest, _cells(column)))


def _by_pixels(column: pa.ChunkedArray) -> list[bytes]:
    """Images by their pixels; what cannot be decoded is like no pixels."""
    with TimeLimit() as limited:
        return [_digest(_pixels(value, limited)) for value in _cells(column)]


def _pixels(value: Any, limited: TimeLimit) -> Any:
    try:
        return value if value is None else limited(pixels_of, value, None, None, MAX_PIXELS)
    except Exception:  # noqa: BLE001 - damaged files make decoders raise anything
        return value


def _by_value(column: pa.ChunkedArray) -> list[bytes]:
    return [repr(value).encode() for value in column.to_pylist()]


def _cells(column: pa.ChunkedArray) -> Iterable[Any]:
    if not is_tensor(column.type):
        return (scalar.as_py() for scalar in column)
    if column.null_count:
        return (scalar.to_numpy() if scalar.is_valid else None for scalar in column)
    return to_numpy(column)


def _digest(value: Any) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(value, np.ndarray):
        digest.update(f"pixels {value.dtype.str} {value.shape} ".encode())
        digest.update(value.tobytes())
    else:
        digest.update(b"none" if value is None else b"bytes " + value)
    return digest.digest()


def as_text(difference: Mapping[str, Any]) -> str:
    """What :func:`diff` found, for a terminal; control characters are escaped."""
    lines = [f"A: {difference['a']}", f"B: {difference['b']}"]
    for name, split in difference["splits"].items():
        lines += ["", *_split_lines(name, split)]
    for side in ("a", "b"):
        if names := difference[f"only_{side}"]:
            lines.append(f"only in {side.upper()}: {', '.join(names)}")
    if difference["products"]:
        lines += ["", f"other files: {', '.join(difference['products'])}"]
    if difference["config"]:
        rows = [[name, f"{a} -> {b}"] for name, (a, b) in difference["config"].items()]
        lines += ["", "configuration", *grid(rows)]
    lines += ["", "The data are the same." if difference["same"] else "The data differ."]
    return "\n".join(map(printable, lines))


LINES = {
    "only_a": "only in A",
    "only_b": "only in B",
    "image": "other image",
    "label": "other label",
    "other": "other values",
}


def _split_lines(name: str, split: Mapping[str, Any]) -> list[str]:
    rows = "{:,} and {:,} samples".format(*split["rows"])
    state = "the same" if split["same"] else "different"
    lines = [f"{name}: {rows}, {state}" + ("" if split["read"] else " by their manifests")]
    for part, text in LINES.items():
        count, keys = split[part]["count"], split[part]["keys"]
        more = ", ..." if count > len(keys) else ""
        lines += [f"  {text}: {count:,} ({', '.join(map(str, keys))}{more})"] if count else []
    for what in ("columns", "classes"):
        for side in ("a", "b"):
            if names := split[what][f"only_{side}"]:
                lines.append(f"  {what} only in {side.upper()}: {', '.join(names)}")
    pairs = split["stored"].items()
    return [*lines, *(f"  {column} is stored as {a} and {b}" for column, (a, b) in pairs)]
