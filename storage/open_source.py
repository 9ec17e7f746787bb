"""From a path or URL to a source: what lies there decides which kind it is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import UsageError
from pipeline.storage.artifact import MANIFEST, Artifact, ArtifactSource
from pipeline.storage.batches import open_cifar, open_idx
from pipeline.storage.classes import Names, agreed, listed_classes
from pipeline.storage.image_folders import SPLITS, WORDS, open_images
from pipeline.storage.images import EXTENSIONS
from pipeline.storage.npz import open_npz, splits
from pipeline.storage.parquet import ParquetSource
from pipeline.storage.places import resolve
from pipeline.storage.source import Source
from pipeline.storage.store import FileInfo, LocalStore, Store, storage_error
from pipeline.storage.url_lists import has_urls, open_url_list, open_url_table
from pipeline.storage.webdataset import WebDatasetSource
from pipeline.storage.zarr import ZarrSource

TARS = ("tar", "tar.gz", "tgz")
NOT_DATA = re.compile(r"ILSVRC2012_(img|devkit|bbox)_.*")
"""Archives that ImageNet is published in; they often stay beside what was unpacked from them."""
FORMS = (
    "an image folder with one sub-folder a class (below train/ and val/ where there are two "
    "splits), WebDataset .tar shards, .parquet files with image and label, an .npz archive "
    "(x_train, y_train, x_test, y_test), MNIST's IDX or CIFAR's batch files, a Zarr group, a list "
    "of URLs (.txt, or .parquet with url), or an output of this pipeline"
)


def open_source(place: str | Path | Store, split: str, classes: Names = ()) -> Source | None:
    """The ``train`` or ``test`` split of the data set at a path or URL.

    Where the data set is not split, all of it is the ``train`` split and ``test`` is ``None``. A
    path or URL may hold ranges such as ``train-{0000..0146}.tar``: servers may list no folders.

    Args:
        place: path, URL or store.
        split: ``train`` or ``test``.
        classes: names by label where the data set's files do not hold them; where they do, the
            names must agree. Numbers from 0 stand for names that are not known.

    Raises:
        UsageError: nothing there is a data set of a known form, or a file of it is damaged.
        RunError: the place cannot be read.
    """
    try:
        return _open_place(place, split, classes)
    except OSError as error:
        raise storage_error(error, str(place)) from error


def _open_place(place: str | Path | Store, split: str, classes: Names) -> Source | None:
    store, chosen = resolve(place)
    files = store.files() if chosen is None else chosen
    data = [file for file in files if not _set_aside(file.name)]
    if not data:
        raise _unknown(place, files) if files or _exists(store) else _nothing(place)
    opened = _open(store, data, split, classes, single=chosen is not None)
    if opened is not None and not opened.shards:
        raise _unknown(place, files)
    return opened


def _open(
    store: Store, files: list[FileInfo], split: str, classes: Names, *, single: bool
) -> Source | None:
    names = {file.name for file in files}
    if MANIFEST in names and not single:
        return _artifact(store, split)
    for opener in (open_idx, open_cifar):
        if opener(store, files, "train", classes):
            return opener(store, files, split, classes)
    if single and files[0].has("npz"):
        return _npz(store, files[0].name, split, classes)
    if single and files[0].has("txt"):
        return open_url_list(store, files[0].name, classes) if split == "train" else None
    if "zarr.json" in names:
        return ZarrSource(store, classes) if split == "train" else None
    return _open_files(store, files, split, classes)


def _open_files(store: Store, files: list[FileInfo], split: str, classes: Names) -> Source | None:
    if data := _data_files(store, files):
        return _files(store, data, split, classes)
    images = [file for file in files if file.name.rpartition(".")[2].lower() in EXTENSIONS]
    if not images:
        raise _unknown(store, files)
    return open_images(store, files, images, split, classes)


def _set_aside(name: str) -> bool:
    """Whether a file is hidden, or an archive that is not read."""
    hidden = name.startswith(".") or "/." in name
    return hidden or bool(NOT_DATA.fullmatch(name.rpartition("/")[2]))


def _exists(store: Store) -> bool:
    return isinstance(store, LocalStore) and store.root.exists()


def _artifact(store: Store, split: str) -> Source | None:
    artifact = Artifact.open(store)
    if artifact.products:
        if split in artifact.products:
            return ArtifactSource(artifact.product(split))
        if split == "test" and "train" in artifact.products:
            return None
    elif artifact.manifest["kind"] == "table":
        return ArtifactSource(artifact) if split == "train" else None
    raise UsageError(
        f"This output holds '{artifact.manifest['kind']}' and no images to read.",
        hint="Give the output of 'pipeline convert', or one of this run's own folders.",
        code="no-images",
        where=str(store),
    )


def _npz(store: Store, name: str, split: str, classes: Names) -> Source | None:
    there = splits(store, name)
    found = next((word for word in SPLITS[split] if word in there), None)
    if found:
        return open_npz(store, name, found, classes)
    if split == "test" and "train" in there:
        return None
    raise _unknown(f"{store}/{name}", [])


def _data_files(store: Store, files: Sequence[FileInfo]) -> list[FileInfo]:
    """The Parquet files, or else the tar files; tars may have their URLs in Parquet beside them."""
    data = [file for file in files if file.has("parquet", *TARS)]
    parquet = [file for file in data if file.has("parquet")]
    tars = [file for file in data if not file.has("parquet")]
    return tars if not parquet or (tars and has_urls(store, parquet[0].name)) else parquet


def _files(store: Store, data: list[FileInfo], split: str, classes: Names) -> Source | None:
    """Parquet or tar files; a word in the name of each file or its folder marks the split.

    Of several test splits it is the first with labels: published ones often have none.
    """
    marked: dict[str, list[FileInfo]] = {}
    for file in data:
        marked.setdefault(_word(file.name), []).append(file)
    names = agreed(listed_classes(store, data[0].name), classes, str(store))
    if split == "train":
        return _source(store, marked.get("train", data), names)
    words = [word for word in SPLITS["test"] if word in marked] if "train" in marked else []
    sources = (_source(store, marked[word], names) for word in words)
    if len(words) < 2:
        return next(sources, None)
    return next((source for source in sources if _labelled(source)), None)


def _word(name: str) -> str:
    """``train`` of ``train-00000.tar``, ``imagenet1k-train-0000.tar`` or ``train/0/0000.tar``."""
    for part in reversed(name.lower().split("/")):
        for word in re.split(r"[-_.]", part):
            if word in WORDS:
                return word
    return ""


def _source(store: Store, files: list[FileInfo], classes: Names) -> Source:
    if not files[0].has("parquet"):
        return WebDatasetSource(store, tuple(files), classes)
    if has_urls(store, files[0].name):
        return open_url_table(store, files, classes)
    return ParquetSource(store, tuple(files), classes)


def _labelled(source: Source) -> bool:
    table = source.read(source.shards[0])
    return "label" in table.column_names and table["label"].null_count < len(table)


def _nothing(place: str | Path | Store) -> UsageError:
    return UsageError(
        "There is no data set at this path.",
        hint="Check the path given as DATASET or with --data.",
        code="no-data",
        where=str(place),
    )


def _unknown(place: str | Path | Store, files: Sequence[FileInfo]) -> UsageError:
    images = sum(file.has(*EXTENSIONS) for file in files)
    found = f"{images} images" if images else f"{len(files)} files, no images"
    return UsageError(
        f"This is not a data set of a known form ({found} found).",
        hint=f"Accepted are: {FORMS}.",
        code="unknown-form",
        where=str(place),
    )
