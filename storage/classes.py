"""Class names by label: from lists beside the data, and whether two sets of names agree."""

from __future__ import annotations

from collections.abc import Collection

from pipeline.errors import UsageError
from pipeline.storage.store import Store

MAX_CLASSES = 2**20

Names = tuple[str, ...]


def numbered(top: int, where: str) -> Names:
    """Names of classes that have none: the numbers from 0 to the highest label.

    Raises:
        UsageError: there would be more than a million of them.
    """
    if top >= MAX_CLASSES:
        raise UsageError(
            f"The highest label is {top}, more than there can be classes.",
            hint="Labels count from 0; name every class in classes.txt, one a line.",
            code="bad-labels",
            where=where,
        )
    return tuple(map(str, range(top + 1)))


def agreed(own: Names, given: Names, where: str) -> Names:
    """The names in a data set's files, or where it has none those that were given.

    Numbers in their order stand for names that are not known.

    Raises:
        UsageError: both are names, and differ.
    """
    if not own or not given or own == given[: len(own)]:
        return given or own
    if _unnamed(given):
        return own
    if _unnamed(own):
        return given
    differing = next((pair for pair in zip(own, given, strict=False) if pair[0] != pair[1]), None)
    what = f"'{differing[0]}' and '{differing[1]}'" if differing else f"{len(own)} and {len(given)}"
    raise UsageError(
        f"These files name other classes than were given: {what}.",
        hint="Give the same names in the same order for both splits and in classes.txt.",
        code="other-classes",
        where=where,
    )


def settled(found: Collection[str], given: Names, where: str) -> Names:
    """The given names, or where these are not known the names that were found, in their order.

    Raises:
        UsageError: a name that was found is not among those given.
    """
    extra = set(found) - set(given)
    if given and not extra:
        return given
    if given and not _unnamed(given):
        raise unknown_classes(extra, where)
    return tuple(sorted(found))


def unknown_classes(extra: Collection[str], where: str) -> UsageError:
    """There are classes that the training split does not have, or whoever gave the names."""
    return UsageError(
        f"{len(extra)} classes are not in the training split: {', '.join(sorted(extra)[:5])}.",
        hint="Both splits need the same classes, and a list of classes must name them all.",
        code="unknown-class",
        where=where,
    )


def _unnamed(names: Names) -> bool:
    return names == tuple(map(str, range(len(names))))


def listed_classes(store: Store, name: str) -> Names:
    """Names from ``classes.tsv`` (label, ..., name) or ``classes.txt`` beside a file or above it.

    Raises:
        UsageError: the list is not text, or its labels do not count from 0.
    """
    folder = name
    while folder:
        folder = folder.rpartition("/")[0]
        place = f"{folder}/" if folder else ""
        if store.info(f"{place}classes.tsv"):
            return _from_table(store, f"{place}classes.tsv")
        if store.info(f"{place}classes.txt"):
            lines = read_text(store, f"{place}classes.txt").rstrip().splitlines()
            return tuple(line.strip() for line in lines)
    return ()


def _from_table(store: Store, name: str) -> Names:
    lines = read_text(store, name).splitlines()
    rows = [line.split("\t") for line in lines if line.strip()]
    if [row[0].strip() for row in rows] != [str(label) for label in range(len(rows))]:
        raise UsageError(
            "The first column of the list of classes does not count from 0.",
            hint="Write the label, a tab and the name of one class a line, in order.",
            code="bad-labels",
            where=f"{store}/{name}",
        )
    return tuple(row[-1].strip() for row in rows)


def read_text(store: Store, name: str) -> str:
    """A text file, with or without a byte-order mark.

    Raises:
        UsageError: it is not in UTF-8.
    """
    try:
        return store.read(name).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"The file is not text in UTF-8: {error.reason} at byte {error.start}.",
            hint="Save it in UTF-8, or leave it out if it is no list.",
            code="bad-text",
            where=f"{store}/{name}",
        ) from error
