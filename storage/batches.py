"""The files that MNIST and CIFAR are published in, as sources."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from pipeline.errors import UsageError
from pipeline.storage.arrays import Arrays, ArraySource
from pipeline.storage.cifar import read_binary, read_class_names, read_pickled_batch
from pipeline.storage.classes import Names, agreed
from pipeline.storage.idx import read_idx
from pipeline.storage.store import FileInfo, Store

IDX = {"train": "train", "test": "t10k"}
CIFAR = {
    "train": re.compile(r"data_batch_\d+(\.bin)?|train(\.bin)?"),
    "test": re.compile(r"test_batch(\.bin)?|test(\.bin)?"),
}
NAMES = ("batches.meta.txt", "fine_label_names.txt", "batches.meta", "meta")
"""Files that name the classes; where one of them lies, its neighbours are CIFAR batches."""


def open_idx(
    store: Store, files: Sequence[FileInfo], split: str, classes: Names = ()
) -> ArraySource | None:
    """A split of MNIST and its kin: ``train-images-idx3-ubyte``, ``t10k-labels-idx1-ubyte``..."""
    parts: list[FileInfo] = []
    for kind in ("images", "labels"):
        pattern = re.compile(rf"{IDX[split]}-{kind}[-.]idx\d-ubyte(\.gz)?")
        found = [file for file in files if pattern.fullmatch(file.name.rpartition("/")[2])]
        beside = [file for file in found if not parts or _folder(file) == _folder(parts[0])]
        if not beside:
            return None
        parts.append(beside[0])
    return _source(store, parts, split, "idx", classes)


def open_cifar(
    store: Store, files: Sequence[FileInfo], split: str, classes: Names = ()
) -> ArraySource | None:
    """A split of CIFAR-10 or CIFAR-100, in the binary or the Python version."""
    meta = next((f for f in files if f.name.rpartition("/")[2] in NAMES), None)
    if meta is None:
        return None
    name = meta.name.rpartition("/")[2]
    batches = [
        file
        for file in files
        if _folder(file) == _folder(meta) and CIFAR[split].fullmatch(file.name.rpartition("/")[2])
    ]
    if not batches:
        return None
    data = store.read(meta.name)
    with _readable(store, meta):
        own = tuple(data.decode().split()) if name.endswith(".txt") else read_class_names(data)
    pickled = not name.endswith(".txt")
    kind = "pickled" if pickled else "fine" if name.startswith("fine") else "binary"
    return _source(store, batches, split, kind, agreed(own, classes, str(store)))


def _folder(file: FileInfo) -> str:
    return file.name.rpartition("/")[0]


def _source(
    store: Store, files: Sequence[FileInfo], split: str, kind: str, classes: Names
) -> ArraySource:
    marks = [file.mark for file in files]
    where = f"{store}/{files[0].name}"
    return ArraySource(Batches(store, tuple(files), kind), split, [kind, marks], where, classes)


@dataclass(frozen=True)
class Batches:
    """Reads files of one kind (``idx``, ``binary``, ``fine``, ``pickled``) into two arrays."""

    store: Store
    files: tuple[FileInfo, ...]
    kind: str

    def __call__(self) -> Arrays:
        return _load(self)


@lru_cache(maxsize=2)
def _load(batches: Batches) -> Arrays:
    parts = []
    for file in batches.files:
        data = batches.store.read(file.name)
        with _readable(batches.store, file):
            parts.append(_parse(data, batches.kind))
    if batches.kind == "idx":
        return parts[0], parts[1]
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


def _parse(data: bytes, kind: str) -> Any:
    if kind == "idx":
        return read_idx(data)
    if kind == "pickled":
        return read_pickled_batch(data)
    return read_binary(data, 2 if kind == "fine" else 1)


@contextmanager
def _readable(store: Store, file: FileInfo) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise UsageError(
            f"The file cannot be read: {error}.",
            hint="Fetch it anew from where the data set is published.",
            code="damaged-batch",
            where=f"{store}/{file.name}",
        ) from error
