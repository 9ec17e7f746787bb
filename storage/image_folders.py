"""How image folders are laid out: classes, splits, and validation images with a list of labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from pipeline.errors import UsageError
from pipeline.storage.classes import Names, read_text, settled, unknown_classes
from pipeline.storage.devkit import read_synsets
from pipeline.storage.folder import FolderSource, first_folder
from pipeline.storage.store import FileInfo, Store, open_store

SPLITS = {"train": ("train",), "test": ("test", "val", "valid", "validation")}
"""Words for the two sides of a data set, in files' and folders' names."""
WORDS = frozenset(word for words in SPLITS.values() for word in words)
KAGGLE = "LOC_val_solution.csv"


def open_images(
    store: Store,
    files: Sequence[FileInfo],
    images: Sequence[FileInfo],
    split: str,
    classes: Names = (),
) -> FolderSource | None:
    """The split of a data set whose images are files.

    Known are ``<class>/**/<image>``, the same below ``train/`` and ``val/`` or ``test/`` wherever
    these lie (ILSVRC, or ``imagenet21k_train/`` and ``imagenet21k_val/``), ILSVRC validation images
    with the devkit's or Kaggle's list, Tiny ImageNet's ``val_annotations.txt``, and images without
    any folder, which have no labels.

    Raises:
        UsageError: a split has classes that are not known, or there are several pairs of splits.
    """
    folders = _split_folders(images, store)
    if not folders:
        return _side(store, images, "", classes) if split == "train" else None
    train = _side(store, images, folders["train"], classes)
    if split == "train":
        return train
    tests = [folders[word] for word in SPLITS["test"] if word in folders]
    return _test(store, files, images, tests, train.classes)


def _split_folders(images: Sequence[FileInfo], store: Store) -> dict[str, str]:
    """The folder, with a final slash, of each split by its word; empty where there are none.

    They are neighbours: ``train`` and ``val``, or ``imagenet21k_train`` and ``imagenet21k_val``.
    """
    found: dict[tuple[str, str], dict[str, str]] = {}
    for folder in sorted(_folders(images)):
        parent, _, name = folder.rpartition("/")
        stem, _, word = name.lower().rpartition("_")
        if word in WORDS:
            found.setdefault((parent, stem), {})[word] = f"{folder}/"
    pairs = [pair for pair in found.values() if "train" in pair and len(pair) > 1]
    if pairs:
        depth = min(pair["train"].count("/") for pair in pairs)
        pairs = [pair for pair in pairs if pair["train"].count("/") == depth]
        if len(pairs) > 1:
            raise _several(pairs, store)
        return pairs[0]
    # A folder 'train' beside others is a class; one that holds every image is a split.
    for (_, stem), folders in found.items():
        start = folders.get("train")
        if start and not stem and all(image.name.startswith(start) for image in images):
            return folders
    return {}


def _folders(images: Iterable[FileInfo]) -> set[str]:
    """Every folder that has an image somewhere below it."""
    found: set[str] = set()
    for image in images:
        folder = image.name.rpartition("/")[0]
        while folder and folder not in found:
            found.add(folder)
            folder = folder.rpartition("/")[0]
    return found


def _several(pairs: Sequence[Mapping[str, str]], store: Store) -> UsageError:
    return UsageError(
        f"There are {len(pairs)} data sets with splits here: "
        f"{', '.join(pair['train'] for pair in pairs[:5])}.",
        hint="Give the folder of one of them; in one data set the classes lie inside the splits.",
        code="several-splits",
        where=str(store),
    )


def _side(store: Store, images: Sequence[FileInfo], folder: str, classes: Names) -> FolderSource:
    files, below = _below(store, images, folder)
    names = {first_folder(file) for file in files} - {""}
    return FolderSource(below, files, settled(names, classes, str(below)) if names else ())


def _below(
    store: Store, images: Sequence[FileInfo], folder: str
) -> tuple[tuple[FileInfo, ...], Store]:
    """The images in a folder by their paths in it, and its store."""
    if not folder:
        return tuple(images), store
    files = tuple(
        FileInfo(image.name.removeprefix(folder), image.bytes, image.version)
        for image in images
        if image.name.startswith(folder)
    )
    return files, store.below(folder.rstrip("/"))


def _test(
    store: Store,
    files: Sequence[FileInfo],
    images: Sequence[FileInfo],
    folders: Sequence[str],
    classes: Names,
) -> FolderSource | None:
    """The first of the folders whose images have labels; any, where training images have none."""
    listed = _listed_labels(store, files)
    strange: set[str] = set()
    for folder in folders:
        found, below = _below(store, images, folder)
        names = {first_folder(file) for file in found} - {""}
        if not classes or names & set(classes):
            if classes and names - set(classes):
                raise unknown_classes(names - set(classes), str(below))
            return FolderSource(below, found, classes)
        stems = [file.name.rpartition("/")[2].partition(".")[0] for file in found]
        if any(stem in listed for stem in stems):
            return FolderSource(below, found, classes, tuple(listed.get(s, "") for s in stems))
        strange = strange or names - {"images"}
    if strange:
        raise unknown_classes(strange, str(store))
    return None


def _listed_labels(store: Store, files: Sequence[FileInfo]) -> Mapping[str, str]:
    """Class by file stem, from the lists that ImageNet and its kin are published with."""
    by_name = {
        file.name.rpartition("/")[2]: file.name for file in files if file.has("txt", "csv", "mat")
    }
    if path := by_name.get("val_annotations.txt"):
        rows = [line.split("\t") for line in read_text(store, path).splitlines()]
        return {row[0].partition(".")[0]: row[1] for row in rows if len(row) > 1}
    if path := by_name.get(KAGGLE):
        return _kaggle_labels(store, path)
    truth, meta = by_name.get("ILSVRC2012_validation_ground_truth.txt"), by_name.get("meta.mat")
    if truth and meta:
        return _devkit_labels(store, truth, meta)
    if store.url.endswith("/ILSVRC"):  # Kaggle's archive has its list beside this folder
        above = open_store(store.url.removesuffix("/ILSVRC"))
        return _kaggle_labels(above, KAGGLE) if above.info(KAGGLE) else {}
    return {}


def _kaggle_labels(store: Store, path: str) -> Mapping[str, str]:
    rows = [line.partition(",") for line in read_text(store, path).splitlines()]
    return {image: boxes.split()[0] for image, _, boxes in rows if boxes.strip()}


def _devkit_labels(store: Store, truth: str, meta: str) -> Mapping[str, str]:
    try:
        wnids = read_synsets(store.read(meta))
        numbers = [int(text) for text in read_text(store, truth).split()]
    except ValueError as error:
        raise UsageError(
            f"The devkit's lists of classes cannot be read: {error}.",
            hint="Fetch ILSVRC2012_devkit_t12 anew.",
            code="damaged-devkit",
            where=f"{store}/{meta}",
        ) from error
    return {
        f"ILSVRC2012_val_{index:08d}": wnids.get(number, "")
        for index, number in enumerate(numbers, start=1)
    }
