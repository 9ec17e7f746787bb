"""From a path to a source: what lies there decides which kind it is."""

from __future__ import annotations

import csv
from pathlib import Path

from pipeline.errors import UsageError
from pipeline.storage.artifact import Artifact, ArtifactSource
from pipeline.storage.folder import FolderSource
from pipeline.storage.images import EXTENSIONS
from pipeline.storage.listing import files_below
from pipeline.storage.npz import NpzSource
from pipeline.storage.parquet import ParquetSource
from pipeline.storage.source import Source
from pipeline.storage.webdataset import WebDatasetSource

SPLITS = {"train": ("train",), "test": ("test", "val", "valid", "validation")}
FORMS = (
    "an .npz archive (x_train, y_train, x_test, y_test), a folder of .parquet files with image and "
    "label, a folder of WebDataset .tar shards, or an image folder with one sub-folder a class "
    "(below train/ and val/ where there are two splits)"
)


def open_source(path: Path, split: str) -> Source | None:
    """The ``train`` or ``test`` split of the data set at ``path``.

    Where the data set is not split, all of it is the ``train`` split and ``test`` is ``None``.

    Raises:
        UsageError: nothing there is a data set of a known form.
    """
    if not path.exists():
        raise UsageError(
            "There is no data set at this path.",
            hint="Check the path given as DATASET or with --data.",
            code="no-data",
            where=str(path),
        )
    if path.suffix == ".npz":
        return _npz(path, split)
    if path.suffix in {".parquet", ".tar"}:
        return _files([path], split, split_by_name=False)
    if not path.is_dir():
        raise _unknown(path)
    if Artifact.exists(path):
        return ArtifactSource(Artifact.open(path)) if split == "train" else None
    for extension in ("parquet", "tar"):
        if files := files_below(path, frozenset({extension})):
            return _files(files, split, split_by_name=True)
    return _folder(path, split)


def _npz(path: Path, split: str) -> Source | None:
    found = next((name for name in SPLITS[split] if name in NpzSource.splits(path)), None)
    if found:
        return NpzSource(path, found)
    if split == "test" and "train" in NpzSource.splits(path):
        return None
    raise _unknown(path)


def _files(files: list[Path], split: str, *, split_by_name: bool) -> Source | None:
    """Parquet or tar files; ``train-00000...`` and ``val-00000...`` mark the splits."""
    marked = {
        side: [
            file
            for file in files
            if file.stem.split("-")[0].lower() in names or file.parent.name.lower() in names
        ]
        for side, names in SPLITS.items()
    }
    if split_by_name and marked["train"]:
        files = marked[split]
    elif split == "test":
        return None
    if not files:
        return None
    names = _class_names(files[0].parent)
    paths = tuple(files)
    if files[0].suffix == ".tar":
        return WebDatasetSource(paths, names)
    return ParquetSource(paths, names)


def _class_names(folder: Path) -> tuple[str, ...]:
    """Names from ``classes.tsv`` (label, ..., name) or ``classes.txt`` (one a line) if present."""
    if (folder / "classes.tsv").is_file():
        with (folder / "classes.tsv").open(encoding="utf-8", newline="") as file:
            return tuple(row[-1] for row in csv.reader(file, delimiter="\t"))
    if (folder / "classes.txt").is_file():
        return tuple((folder / "classes.txt").read_text(encoding="utf-8").splitlines())
    return ()


def _folder(path: Path, split: str) -> Source | None:
    sides = {
        side: next((path / name for name in names if (path / name).is_dir()), None)
        for side, names in SPLITS.items()
    }
    if sides["train"] and sides["test"]:
        source = FolderSource(sides["train"])
        if split == "test":
            source = FolderSource(sides["test"], source.classes)
            _check_folders(source)
    elif split == "test":
        return None
    else:
        source = FolderSource(sides["train"] or path)
    if not source.shards:
        raise _unknown(source.root)
    return source


def _check_folders(source: FolderSource) -> None:
    extra = sorted(set(source.folders) - set(source.classes))
    if extra:
        raise UsageError(
            f"{len(extra)} classes are not in the training split: {', '.join(extra[:5])}.",
            hint="Give every class of the test split a folder in the training split.",
            code="unknown-class",
            where=str(source.root),
        )


def _unknown(path: Path) -> UsageError:
    images = sum(1 for _ in files_below(path, EXTENSIONS)) if path.is_dir() else 0
    found = f"{images} images outside class folders" if images else "no images"
    return UsageError(
        f"This is not a data set of a known form ({found} found).",
        hint=f"Accepted are: {FORMS}.",
        code="unknown-form",
        where=str(path),
    )
