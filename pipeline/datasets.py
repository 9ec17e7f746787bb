"""Data sets by name: what they are, where they come from and how they look."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import Field

from pipeline.config import Config, build, read_yaml
from pipeline.errors import UsageError
from pipeline.storage.artifact import Artifact
from pipeline.storage.digits import open_digits
from pipeline.storage.open_source import FORMS, open_source
from pipeline.storage.selected import SelectedSource
from pipeline.storage.source import Source
from pipeline.storage.store import open_store

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
OWN = "datasets.yaml"


class DatasetInfo(Config):
    """A data set that has a name; also an entry of ``datasets.yaml``.

    Paths of an entry are relative to that file. Where ``train`` is not given, the data set is
    looked for under its name.
    """

    title: str = Field(default="a data set of your own", description="what it is, in a few words")
    origin: str = Field(default="where you keep it", description="where to obtain it")
    classes: int | tuple[str, ...] | None = Field(
        default=None, description="number of classes, or names"
    )
    size: int = Field(
        default=32, ge=1, description="side of the images that recipes work with, pixels"
    )
    channels: int = Field(default=3, description="1 or 3")
    mean: tuple[float, ...] = Field(default=IMAGENET["mean"], description="of pixels in [0, 1]")
    std: tuple[float, ...] = Field(default=IMAGENET["std"], description="of pixels in [0, 1]")
    flip: bool = Field(default=True, description="whether a mirrored image keeps its label")
    train: str | None = Field(
        default=None, description="path or URL of the training split, or of both"
    )
    test: str | None = Field(default=None, description="path or URL of the test split")

    @property
    def image(self) -> dict[str, Any]:
        """Fields of :class:`~pipeline.labelled_images.ImageConfig`."""
        names = ("size", "channels", "mean", "std", "flip")
        return {name: getattr(self, name) for name in names}

    @property
    def names(self) -> tuple[str, ...]:
        """Class names by label, where they are known before the data are read."""
        if isinstance(self.classes, int):
            return tuple(str(label) for label in range(self.classes))
        return self.classes or ()


def _gray(size: int, mean: float, std: float) -> dict[str, Any]:
    return {"size": size, "channels": 1, "mean": (mean,), "std": (std,), "flip": False}


NAMED = {
    "digits": DatasetInfo(
        title="1,797 handwritten digits of 8 x 8 pixels in 10 classes",
        origin="comes with scikit-learn",
        classes=10,
        **_gray(16, 0.305, 0.376),
    ),
    "mnist": DatasetInfo(
        title="70,000 handwritten digits of 28 x 28 pixels in 10 classes",
        origin="https://huggingface.co/datasets/ylecun/mnist",
        classes=10,
        **_gray(28, 0.131, 0.308),
    ),
    "fashion-mnist": DatasetInfo(
        title="70,000 pictures of clothes, 28 x 28 pixels in 10 classes",
        origin="https://github.com/zalandoresearch/fashion-mnist",
        classes=10,
        **{**_gray(28, 0.286, 0.353), "flip": True},
    ),
    "cifar10": DatasetInfo(
        title="60,000 colour images of 32 x 32 pixels in 10 classes",
        origin="https://www.cs.toronto.edu/~kriz/cifar.html",
        classes=10,
    ),
    "cifar100": DatasetInfo(
        title="60,000 colour images of 32 x 32 pixels in 100 classes",
        origin="https://www.cs.toronto.edu/~kriz/cifar.html",
        classes=100,
    ),
    "tiny-imagenet": DatasetInfo(
        title="110,000 colour images of 64 x 64 pixels in 200 classes",
        origin="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        classes=200,
        size=64,
    ),
    "imagenette": DatasetInfo(
        title="13,000 photographs in 10 classes of ImageNet",
        origin="https://github.com/fastai/imagenette",
        classes=10,
        size=128,
    ),
    "imagenet-1k": DatasetInfo(
        title="1.3 million photographs in 1,000 classes",
        origin="https://www.image-net.org (an account is needed)",
        classes=1000,
        size=224,
    ),
    "imagenet-21k": DatasetInfo(
        title="14 million photographs in 21,841 classes, or a cleaned part of them",
        origin="https://www.image-net.org (an account is needed)",
        size=224,
    ),
}
ALIASES = {
    "mnist": ("MNIST",),
    "fashion-mnist": ("FashionMNIST",),
    "cifar10": ("cifar-10-batches-bin", "cifar-10-batches-py"),
    "cifar100": ("cifar-100-binary", "cifar-100-python"),
    "tiny-imagenet": ("tiny-imagenet-200",),
    "imagenette": ("imagenette2", "imagenette2-320", "imagenette2-160"),
    "imagenet-1k": ("ILSVRC", "imagenet"),
    "imagenet-21k": ("imagenet21k_resized", "imagenet21k"),
}
"""Folders that the published archives unpack to."""


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


def find_dataset(name: str, data: str | Path | None) -> Dataset:
    """The data set called ``name``, or the one at the path or URL ``name``.

    Args:
        name: a name of :data:`NAMED` or of ``datasets.yaml`` in ``data``, or a path or URL of data
            in one of the accepted forms.
        data: where named data sets lie: a folder that holds ``<name>.npz`` or ``<name>/``, or the
            data set itself.

    Raises:
        UsageError: the name is unknown, or there is no data.
    """
    own = _own(data)
    if name in own and own[name].train:
        return _own_dataset(name, own[name], str(data))
    if name == "digits" and name not in own:
        return Dataset(name, open_digits(), None, NAMED[name])
    known = {**NAMED, **own}
    if name in known:
        return _open(name, _locate(name, data, known[name]), known[name])
    # Ranges such as train-{000..146}.tar name no file, but what they stand for does.
    if not ("://" in name or "{" in name or Path(name).exists()):
        near = get_close_matches(name, known, n=1)
        guess = f"Did you mean '{near[0]}'? " if near else ""
        raise UsageError(
            f"There is no data set named '{name}', and no file or folder of that name.",
            hint=f"{guess}Known names: {', '.join(known)}; anything else is a path or URL.",
            code="unknown-dataset",
        )
    return _open(_stem(name), name, None)


def with_selection(dataset: Dataset, selection: str | Path) -> Dataset:
    """The data set with the selected training samples alone; its test split stays whole.

    Args:
        dataset: what was pruned, or any copy of it: samples are found by key.
        selection: the output of ``pipeline run prune``, or its folder ``selection-...``.

    Raises:
        UsageError: there is no selection.
    """
    artifact = Artifact.open(open_store(selection))
    if "selection" in artifact.products:
        artifact = artifact.product("selection")
    if artifact.manifest.get("step") != "selection":
        raise UsageError(
            "This output holds no selection.",
            hint="Give the output of 'pipeline run prune'.",
            code="no-selection",
            where=str(selection),
        )
    return replace(dataset, train=SelectedSource(dataset.train, artifact))


def _stem(place: str) -> str:
    last = str(Path(place).resolve()) if "://" not in place else place.rstrip("/")
    return re.split(r"[.{]", last.rpartition("/")[2])[0].rstrip("-_") or "data"


def _own(data: str | Path | None) -> dict[str, DatasetInfo]:
    """The entries of ``datasets.yaml`` in ``data``."""
    if data is None or "://" in str(data) or not (Path(data) / OWN).is_file():
        return {}
    path = Path(data) / OWN
    return {str(name): _entry(str(name), fields, path) for name, fields in read_yaml(path).items()}


def _entry(name: str, fields: Any, path: Path) -> DatasetInfo:
    try:
        return build(DatasetInfo, {} if fields is None else fields)
    except UsageError as error:
        raise UsageError(
            f"The entry '{name}' does not hold. {error.message}",
            hint=f"An entry may have: {', '.join(DatasetInfo.model_fields)}.",
            code=error.code,
            where=str(path),
        ) from error


def _own_dataset(name: str, info: DatasetInfo, folder: str) -> Dataset:
    def place(path: str) -> str:
        return path if "://" in path else str(Path(folder).absolute() / path)

    where = place(info.train or "")
    if info.test is None:
        return _open(name, where, info)
    train = open_source(where, "train", info.names)
    test = open_source(place(info.test), "train", train.classes if train else ())
    return _checked(name, train, test, info, where)


def _locate(name: str, data: str | Path | None, info: DatasetInfo) -> str:
    tried = "nothing was given with --data or PIPELINE_DATA"
    if data is not None and "://" in str(data):
        return str(data)
    if data:
        folder = Path(data).absolute()
        for stem in (name, name.replace("-", "_"), *ALIASES.get(name, ())):
            for path in (folder / f"{stem}.npz", folder / stem):
                if path.exists():
                    return str(path)
        if folder.is_file() or (folder / "train").is_dir() or folder.name in ALIASES.get(name, ()):
            return str(folder)
        if any(any(folder.glob(pattern)) for pattern in ("*.parquet", "*.tar", "*-ubyte*")):
            return str(folder)
        tried = f"neither {name}.npz nor a folder {name} lies in {data}"
    raise UsageError(
        f"The data set '{name}' ({info.title}) was not found: {tried}.",
        hint=f"Obtain it from {info.origin} and give its folder with --data. Accepted are: "
        f"{FORMS}.",
        code="no-data",
    )


def _open(name: str, place: str, info: DatasetInfo | None) -> Dataset:
    train = open_source(place, "train", info.names if info else ())
    test = open_source(place, "test", train.classes if train else ())
    return _checked(name, train, test, info, place)


def _checked(
    name: str, train: Source | None, test: Source | None, info: DatasetInfo | None, place: str
) -> Dataset:
    if train is None or not train.shards:
        raise UsageError(
            "The data set has no training split.",
            hint=f"Accepted are: {FORMS}.",
            code="no-train-split",
            where=place,
        )
    # A test split may lack the last classes where they are known by their numbers alone.
    if test and test.classes != train.classes[: len(test.classes)]:
        raise UsageError(
            f"The test split has {_some(test.classes)} and the training split "
            f"{_some(train.classes)}.",
            hint="Both splits need the same classes with the same labels.",
            code="unknown-class",
            where=place,
        )
    return Dataset(name, train, test, info)


def _some(classes: tuple[str, ...]) -> str:
    names = ", ".join(classes[:3]) + (", ..." if len(classes) > 3 else "")
    return f"{len(classes)} classes ({names})" if classes else "no classes"
