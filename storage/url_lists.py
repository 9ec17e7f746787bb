"""Lists of URLs with their classes: text files, and Parquet files with a column ``url``."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import PipelineError, UsageError
from pipeline.storage.classes import Names, numbered, read_text, settled
from pipeline.storage.parquet import IMAGE
from pipeline.storage.store import FileInfo, Store
from pipeline.storage.urls import UrlSource


def open_url_list(store: Store, name: str, classes: Names = ()) -> UrlSource:
    """One URL a line, and behind a tab its class where there are classes."""
    lines = read_text(store, name).splitlines()
    rows = [line.split("\t") for line in lines if line.strip() and not line.startswith("#")]
    urls = tuple(row[0].strip() for row in rows)
    labels = [row[1].strip() if len(row) > 1 else "" for row in rows]
    return _labelled(store, urls, [label or None for label in labels], classes, f"{store}/{name}")


def has_urls(store: Store, name: str) -> bool:
    """Whether a Parquet file has a column ``url`` and no images."""
    try:
        with store.open(name) as file:
            columns = pq.read_schema(file).names
    except (pa.ArrowException, OSError, ValueError):
        return False  # ParquetSource says what is wrong with it
    return "url" in columns and not set(IMAGE) & set(columns)


def open_url_table(store: Store, files: Sequence[FileInfo], classes: Names = ()) -> UrlSource:
    """The columns ``url`` and, where there are classes, ``label`` (numbers or names)."""
    tables = [_columns(store, file.name) for file in files]
    urls = tuple(url or "" for table in tables for url in table["url"].to_pylist())
    labels = [label for table in tables for label in table["label"].to_pylist()]
    return _labelled(store, urls, labels, classes, f"{store}/{files[0].name}")


def _labelled(
    store: Store,
    urls: tuple[str, ...],
    found: Sequence[int | str | None],
    classes: Names,
    where: str,
) -> UrlSource:
    """The source, once labels are numbers."""
    names = {label for label in found if isinstance(label, str)}
    numbers = {label for label in found if isinstance(label, int)}
    if names and numbers:
        raise _bad_columns("labels of which some are numbers and some names", where)
    if not names and max(numbers, default=-1) < 0:
        return UrlSource(store, urls)
    if names:
        classes = settled(names, classes, where)
        label_of = {name: label for label, name in enumerate(classes)}
        return UrlSource(store, urls, tuple(label_of.get(str(name)) for name in found), classes)
    labels = tuple(n if isinstance(n, int) and n >= 0 else None for n in found)
    return UrlSource(store, urls, labels, classes or numbered(max(numbers), where))


def _columns(store: Store, name: str) -> pa.Table:
    where = f"{store}/{name}"
    try:
        with store.open(name) as file:
            wanted = [n for n in ("url", "label") if n in pq.read_schema(file).names]
            file.seek(0)
            table = pq.read_table(file, columns=wanted)
            table.validate(full=True)  # Parquet does not, and text may be none
    except PipelineError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UsageError(
            f"The Parquet file cannot be read: {error}.",
            hint="Fetch or write it anew.",
            code="damaged-parquet",
            where=where,
        ) from error
    if "label" not in wanted:
        table = table.append_column("label", pa.nulls(len(table)))
    kind = table["label"].type
    plain = pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_null(kind)
    if "url" not in wanted or not pa.types.is_string(table["url"].type) or not plain:
        found = ", ".join(f"{field.name} ({field.type})" for field in table.schema)
        raise _bad_columns(f"the columns {found}", where)
    return table


def _bad_columns(found: str, where: str) -> UsageError:
    return UsageError(
        f"The list of URLs has {found}.",
        hint="It needs 'url' (text) and, where there are classes, 'label' (numbers or names).",
        code="bad-columns",
        where=where,
    )
