"""Samples for other libraries."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pyarrow as pa
from torch.utils.data import IterableDataset

from pipeline.errors import UsageError
from pipeline.samples import Samples
from pipeline.storage.image_column import encoded
from pipeline.storage.webdataset import members_of
from pipeline.tensors import is_tensor


def _library(name: str, install: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise UsageError(
            f"The library '{name}' is not installed: {error}.",
            hint=f"Install it: pip install {install}.",
            code="missing-library",
        ) from error


def _with_bytes(table: pa.Table) -> pa.Table:
    """Images as files where they are pixels."""
    if "image" not in table.column_names or not is_tensor(table["image"].type):
        return table
    at = table.column_names.index("image")
    return table.set_column(at, "image", pa.array(encoded(table["image"]), pa.binary()))


def to_webdataset(samples: Samples) -> Any:
    """See :meth:`Samples.to_webdataset`."""
    wds = _library("webdataset", "webdataset")

    class Pipeline(wds.DataPipeline, wds.compat.FluidInterface):  # type: ignore[misc,name-defined]
        """A source and what is done with its samples."""

    return Pipeline(_Source(samples))


class _Source(IterableDataset[dict[str, Any]]):
    """Dictionaries as webdataset has them, of the shards of one worker."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[dict[str, Any]]:
        from webdataset.utils import pytorch_worker_info

        rank, world, worker, workers = pytorch_worker_info()
        part, parts = rank * workers + worker, world * workers
        for number in range(part, len(self.samples.counts()), parts):
            yield from _dictionaries(self.samples.shard_table(number))


def _dictionaries(table: pa.Table) -> Iterator[dict[str, Any]]:
    names = [f.name for f in table.schema if pa.types.is_binary(f.type) and f.name != "image"]
    coded = table.select(names).to_pylist()
    plain = members_of(table.drop_columns(names))
    for key, own, (members, told) in zip(table["key"].to_pylist(), coded, plain, strict=True):
        yield {"__key__": key, "__url__": "", **members, **own, **told}


def to_ray(samples: Samples) -> Any:
    """See :meth:`Samples.to_ray`."""
    ray_data = _library("ray.data", "'ray[data]'")
    count = len(samples.counts())

    def read(numbers: pa.Table) -> pa.Table:
        tables = [samples.shard_table(number) for number in numbers["id"].to_pylist()]
        return pa.concat_tables(tables)

    shards = ray_data.range(count, override_num_blocks=max(1, count))
    return shards.map_batches(read, batch_size=1, batch_format="pyarrow")


def to_hf(samples: Samples) -> Any:
    """See :meth:`Samples.to_hf`."""
    datasets = _library("datasets", "datasets")
    made = datasets.Dataset(_with_bytes(samples.to_arrow()))
    if "image" in made.column_names:
        made = made.cast_column("image", datasets.Image())
    if "label" in made.column_names and samples.classes:
        made = made.cast_column("label", datasets.ClassLabel(names=list(samples.classes)))
    return made
