"""Data sets by name: what they are, where they come from and how they look."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pipeline.errors import UsageError
from pipeline.storage.digits import DigitsSource
from pipeline.storage.open_source import FORMS, open_source
from pipeline.storage.source import Source

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@dataclass(frozen=True)
class DatasetInfo:
    """A data set that has a name.

    Attributes:
        title: what it is, in a few words.
        origin: where to obtain it.
        image: fields of :class:`~pipeline.dataset_distill.config.ImageConfig`.
    """

    title: str
    origin: str
    image: dict[str, Any]


def _gray(size: int, mean: float, std: float) -> dict[str, Any]:
    return {"size": size, "channels": 1, "mean": (mean,), "std": (std,), "flip": False}


NAMED = {
    "digits": DatasetInfo(
        "1,797 handwritten digits of 8 x 8 pixels in 10 classes",
        "comes with scikit-learn",
        _gray(16, 0.305, 0.376),
    ),
    "mnist": DatasetInfo(
        "70,000 handwritten digits of 28 x 28 pixels in 10 classes",
        "https://huggingface.co/datasets/ylecun/mnist",
        _gray(28, 0.131, 0.308),
    ),
    "fashion-mnist": DatasetInfo(
        "70,000 pictures of clothes, 28 x 28 pixels in 10 classes",
        "https://github.com/zalandoresearch/fashion-mnist",
        {**_gray(28, 0.286, 0.353), "flip": True},
    ),
    "cifar10": DatasetInfo(
        "60,000 colour images of 32 x 32 pixels in 10 classes",
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        {"size": 32, **IMAGENET},
    ),
    "cifar100": DatasetInfo(
        "60,000 colour images of 32 x 32 pixels in 100 classes",
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        {"size": 32, **IMAGENET},
    ),
    "tiny-imagenet": DatasetInfo(
        "110,000 colour images of 64 x 64 pixels in 200 classes",
        "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        {"size": 64, **IMAGENET},
    ),
    "imagenette": DatasetInfo(
        "13,000 photographs in 10 classes of ImageNet",
        "https://github.com/fastai/imagenette",
        {"size": 128, **IMAGENET},
    ),
    "imagenet-1k": DatasetInfo(
        "1.3 million photographs in 1,000 classes",
        "https://www.image-net.org (an account is needed)",
        {"size": 224, **IMAGENET},
    ),
}


@dataclass(frozen=True)
class Dataset:
    """A data set that was found.

    Attributes:
        name: its name, or the last part of its path.
        train: the training split, or all there is.
        test: the test split, where there is one.
        info: what is known of it, where it was asked for by name.
    """

    name: str
    train: Source
    test: Source | None
    info: DatasetInfo | None = None


def find_dataset(name: str, data: Path | None) -> Dataset:
    """The data set called ``name``, or the one at the path ``name``.

    Args:
        name: a name of :data:`NAMED`, or a path to data in one of the accepted forms.
        data: where named data sets lie: a folder that holds ``<name>.npz`` or ``<name>/``, or the
            data set itself.

    Raises:
        UsageError: the name is unknown, or there is no data.
    """
    if name == "digits":
        return Dataset(name, DigitsSource(), None, NAMED[name])
    if name in NAMED:
        return _open(name, _locate(name, data), NAMED[name])
    path = Path(name)
    if not path.exists():
        near = get_close_matches(name, NAMED, n=1)
        guess = f"Did you mean '{near[0]}'? " if near else ""
        raise UsageError(
            f"There is no data set named '{name}', and no file or folder of that name.",
            hint=f"{guess}Known names: {', '.join(NAMED)}; anything else is a path.",
            code="unknown-dataset",
        )
    return _open(path.resolve().stem, path.absolute(), None)


def _locate(name: str, data: Path | None) -> Path:
    info = NAMED[name]
    tried = "nothing was given with --data or PIPELINE_DATA"
    if data:
        for stem in (name, name.replace("-", "_")):
            for path in (data / f"{stem}.npz", data / stem):
                if path.exists():
                    return path
        if data.is_file() or (data / "train").is_dir():
            return data
        if any(data.glob("*.parquet")) or any(data.glob("*.tar")):
            return data
        tried = f"neither {name}.npz nor a folder {name} lies in {data}"
    raise UsageError(
        f"The data set '{name}' ({info.title}) was not found: {tried}.",
        hint=f"Obtain it from {info.origin} and give its folder with --data. Accepted are: "
        f"{FORMS}.",
        code="no-data",
    )


def _open(name: str, path: Path, info: DatasetInfo | None) -> Dataset:
    train = open_source(path, "train")
    if train is None or not train.shards:
        raise UsageError(
            "The data set has no training split.",
            hint=f"Accepted are: {FORMS}.",
            code="no-train-split",
            where=str(path),
        )
    test = open_source(path, "test")
    if test and len(test.classes) > len(train.classes):
        raise UsageError(
            f"The test split has {len(test.classes)} classes and the training split "
            f"{len(train.classes)}.",
            hint="Both splits need the same classes with the same labels.",
            code="unknown-class",
            where=str(path),
        )
    return Dataset(name, train, test, info)
