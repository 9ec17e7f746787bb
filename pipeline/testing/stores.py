"""What every store promises."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from pipeline.storage.store import Store
from pipeline.testing.pickled import pickled

NAMES = (
    "a",
    "b/c",
    "b/d/e.json",
    "with space",
    "50%20.txt",
    "[1] (2) {3}.png",
    "star*?.jpg",
    "a+b&c=d#e,f",
    "\u00e4/\u4e2d/\U0001f40d",
    ".hidden/file",
)
"""Names that people give to files."""


def check_store(make: Callable[[], Store]) -> None:
    """Check the contract of :class:`~pipeline.storage.store.Store`.

    Args:
        make: gives a store of a place that no other call gave; nothing lies there.

    Raises:
        AssertionError: a promise is broken; the message says which.
    """
    for check in (_check_nothing, _check_create, _check_replace, _check_delete, _check_names):
        check(make())
    _check_places(make())
    _check_copies(make())
    _check_scratch(make())


def _create(store: Store, name: str, data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "file")
        file.write_bytes(data)
        store.create(name, file)
        assert file.read_bytes() == data, "creating a file changed what it was made from"


def _names(store: Store) -> list[str]:
    return [info.name for info in store.files()]


def _missing(store: Store, name: str) -> None:
    assert store.info(name) is None, f"'{name}' has a size and is not there"
    for read in (
        lambda: store.read(name),
        lambda: store.read_many([name]),
        lambda: _open(store, name),
    ):
        try:
            read()
        except FileNotFoundError:
            continue
        raise AssertionError("reading a file that is not there is not a FileNotFoundError")


def _open(store: Store, name: str) -> bytes:
    with store.open(name) as file:
        return file.read()


def _check_nothing(store: Store) -> None:
    assert store.files() == [], "there are files before any was written"
    assert store.read_many([]) == [], "no names give files"
    for name in ("a", "b/c"):
        _missing(store, name)
        store.delete(name)
    store.clear()
    store.remove()
    assert store.files() == [], "deleting what is not there leaves something"


def _check_create(store: Store) -> None:
    _create(store, "deep/file", b"first")
    try:
        _create(store, "deep/file", b"second")
    except FileExistsError:
        pass
    else:
        raise AssertionError("a name that is taken was given once more")
    assert store.read("deep/file") == b"first", "a file was replaced by one that was created"
    assert _names(store) == ["deep/file"], "a failed attempt left a file"
    _create(store, "empty", b"")
    found = store.info("empty")
    assert found, "an empty file is no file"
    assert found.bytes == 0, "an empty file has a size"
    assert store.read("empty") == b"", "an empty file holds something"
    assert store.info("deep") is None, "a folder is taken for a file"


def _check_replace(store: Store) -> None:
    marks = []
    for data in (b"first", b"second, and longer", b"3rd"):
        store.replace("deep/file", data)
        assert store.read("deep/file") == data, "a replaced file has other bytes"
        assert _names(store) == ["deep/file"], "replacing a file left another"
        info = store.info("deep/file")
        assert info == store.files()[0], "a listing says other things of a file than 'info'"
        assert info.bytes == len(data), "a file has another size than its bytes"
        marks.append(info.mark)
    assert len({repr(mark) for mark in marks}) == len(marks), "a changed file has the same version"
    try:
        _create(store, "deep/file", b"new")
    except FileExistsError:
        return
    raise AssertionError("a file that was put in place of another was overwritten")


def _check_delete(store: Store) -> None:
    for name in ("a/b/c", "a/d", "e"):
        store.replace(name, b"x")
    store.delete("a/b/c")
    assert _names(store) == ["a/d", "e"], "deleting a file took others with it"
    store.delete("a/b/c")
    store.delete("a/nothing")
    assert _names(store) == ["a/d", "e"], "deleting a missing file took another"
    store.replace("a/b/c", b"y")
    assert store.read("a/b/c") == b"y", "a deleted name cannot be used again"
    store.remove()
    assert _names(store) == [], "something is left of what was removed"


def _check_names(store: Store) -> None:
    wanted = {name: f"<{name}>".encode() for name in NAMES}
    for number, (name, data) in enumerate(wanted.items()):
        if number % 2:
            _create(store, name, data)
        else:
            store.replace(name, data)
    assert _names(store) == sorted(wanted), "names are listed otherwise, or in another order"
    order = sorted(wanted, key=lambda name: (len(name), name), reverse=True)
    assert store.read_many(order) == [wanted[name] for name in order], (
        "several files come in another order, or are others"
    )
    for name, data in wanted.items():
        info = store.info(name)
        assert info, f"'{name}' is listed and has no size"
        assert (info.name, info.bytes) == (name, len(data)), f"'{name}' is described otherwise"
        assert _open(store, name) == data, f"'{name}' holds other bytes when it is opened"
        with store.open(name) as file:
            file.seek(1)
            assert file.read(3) == data[1:4], f"'{name}' cannot be read from a place inside"
    with store.fetched(order[:4]) as folder:
        for name in order[:4]:
            assert (folder / name).read_bytes() == wanted[name], f"'{name}' was fetched otherwise"
    for name in NAMES:
        store.delete(name)
    assert _names(store) == [], "a name cannot be deleted"


def _check_places(store: Store) -> None:
    inner = store.below("step")
    inner.replace("x/y", b"in")
    inner.beside("step-2").replace("x", b"beside")
    assert _names(store) == ["step-2/x", "step/x/y"], "folders lie in other places"
    assert _names(inner) == ["x/y"], "a folder lists the files of its neighbour"
    assert _names(store.below("step-2")) == ["x"], "a folder next to another is elsewhere"
    assert store.below("step").below("x").read("y") == b"in", "a folder's folder is elsewhere"
    assert store.below("step/x").read("y") == b"in", "a path of folders leads elsewhere"
    assert str(inner).startswith(str(store)), "a folder's address is not below its parent's"
    inner.remove()
    assert _names(store) == ["step-2/x"], "removing a folder took its neighbour's files"


def _check_copies(store: Store) -> None:
    again = pickled(store)
    assert again == store, "a copy is another place"
    assert hash(again) == hash(store), "a copy has another hash"
    assert again.files() == [], "there are files before any was written"
    store.replace("a", b"x")
    again.replace("b", b"y")
    assert _names(store) == _names(again) == ["a", "b"], "a copy does not see what another wrote"
    again.replace("a", b"z")
    assert store.read("a") == b"z", "an old version was remembered"


def _check_scratch(store: Store) -> None:
    inner = store.writing_in("unfinished")
    for place in (store, inner, inner.below("step")):
        kept: list[Path] = []
        try:
            with place.scratch() as folder, place.scratch() as other:
                kept += [folder, other]
                assert folder != other, "two writers got one folder"
                for path in kept:
                    assert not list(path.iterdir()), "a new folder holds something"
                    (path / "deep").mkdir()
                    (path / "deep" / "file").write_bytes(b"x")
                place.create("made", folder / "deep" / "file")
                raise ZeroDivisionError  # as a stage may
        except ZeroDivisionError:
            pass
        assert not any(path.exists() for path in kept), "a folder to write in was left behind"
        assert place.read("made") == b"x", "a file went away with the folder it was written in"
        place.delete("made")
    inner.replace("a", b"x")
    inner.clear()
    assert _names(store) == ["a"], "something unfinished is left, or something finished is not"
