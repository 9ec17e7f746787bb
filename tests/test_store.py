"""Stores: local folders and object stores keep the same promises."""

from __future__ import annotations

import itertools
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import RunError, UsageError
from pipeline.storage import store as module
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.store import FileInfo, LocalStore, Store, open_store
from pipeline.testing import check_store

Make = Callable[[], Store]


@pytest.fixture(params=["local", "local-unfinished", "memory", "s3"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """Gives empty stores of one kind."""
    if request.param == "s3":
        bucket = request.getfixturevalue("s3_bucket")
        return lambda: ObjectStore(f"{bucket}/{uuid.uuid4().hex}")
    if request.param == "memory":
        return lambda: ObjectStore(f"memory://{uuid.uuid4().hex}/deep")
    numbers = itertools.count()
    if request.param == "local":
        return lambda: LocalStore(tmp_path / str(next(numbers)) / "deep")
    return lambda: LocalStore(tmp_path / str(next(numbers))).writing_in(".run/unfinished")


def test_every_store_keeps_the_contract(make: Make) -> None:
    check_store(make)


@dataclass(frozen=True)
class Broken(LocalStore):
    """A local store that breaks one promise."""

    fault: str = ""

    def create(self, name: str, file: Path) -> None:
        if self.fault == "overwrites":
            self.replace(name, file.read_bytes())
        else:
            super().create(name, file)

    def replace(self, name: str, data: bytes) -> None:
        super().replace(name, data[:-1] if self.fault == "cuts" else data)
        if self.fault == "litters":
            super().replace(f"{name}.tmp", data)

    def files(self) -> list[FileInfo]:
        found = super().files()
        return found[::-1] if self.fault == "unsorted" else found

    def delete(self, name: str) -> None:
        if self.fault == "strict" and not (self.root / name).exists():
            raise FileNotFoundError(name)
        super().delete(name)

    def read_many(self, names: Any) -> list[bytes]:
        return super().read_many(sorted(names) if self.fault == "sorts" else names)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        path = self.root.with_name(uuid.uuid4().hex)
        path.mkdir(parents=True)
        yield path
        if self.fault != "keeps":
            raise AssertionError("not reached: the body of every test raises")

    def below(self, name: str) -> LocalStore:
        return Broken(self.root / name, self.unfinished, self.fault)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("overwrites", "given once more"),
        ("cuts", "other bytes"),
        ("litters", "left another"),
        ("unsorted", "took others with it|another order"),
        ("strict", ""),
        ("sorts", "come in another order"),
        ("keeps", "left behind"),
    ],
)
def test_the_contract_of_stores_sees_a_broken_promise(
    tmp_path: Path, fault: str, message: str
) -> None:
    numbers = itertools.count()
    with pytest.raises((AssertionError, FileNotFoundError), match=message or "a"):
        check_store(lambda: Broken(tmp_path / str(next(numbers)) / "x", None, fault))


def test_of_many_writers_of_one_name_one_wins(make: Make, tmp_path: Path) -> None:
    store, won = make(), []
    if store.url.startswith("memory"):
        pytest.skip("fsspec's memory looks first and writes then")
    files = [tmp_path / f"file{number}" for number in range(8)]
    for file in files:
        file.write_text(file.name * 1000)
    start = threading.Barrier(len(files))

    def write(file: Path) -> None:
        start.wait()
        try:
            store.create("name", file)
        except FileExistsError:
            return
        won.append(file)

    threads = [threading.Thread(target=write, args=(file,)) for file in files]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.read("name") == won[0].read_bytes()


def test_a_large_file_is_created_in_parts_and_never_replaced(
    s3: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs.core

    monkeypatch.setattr(s3fs.core, "calculate_chunksize", lambda *_, **__: 5 * 2**20)
    file = tmp_path / "large"
    file.write_bytes(os.urandom(2**20) * 12)
    s3.create("large", file)
    assert s3.read("large") == file.read_bytes()
    found = s3.info("large")
    assert found is not None
    assert "-3" in found.version, "it was not written in parts"
    other = tmp_path / "other"
    other.write_bytes(b"x" * file.stat().st_size)
    with pytest.raises(FileExistsError):
        s3.create("large", other)
    assert s3.read("large") == file.read_bytes()


def test_a_replaced_file_is_synced_before_it_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []
    sync, replace = os.fsync, Path.replace

    def note_sync(handle: int) -> None:
        events.append("sync")
        sync(handle)

    def note_replace(path: Path, target: Path) -> Path:
        events.append("rename")
        assert path.read_bytes() == b"data"
        return replace(path, target)

    monkeypatch.setattr(module.os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_replace)
    LocalStore(tmp_path).replace("file", b"data")
    assert events == ["sync", "rename", "sync"]


def test_a_created_file_is_synced_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, sync, link = [], module.sync, os.link

    def note_link(source: Path, target: Path) -> None:
        synced.append("link")
        link(source, target)

    monkeypatch.setattr(module, "sync", lambda path: (synced.append(path), sync(path)))
    monkeypatch.setattr(module.os, "link", note_link)
    (tmp_path / "file").write_text("x")
    LocalStore(tmp_path / "out").create("deep/name", tmp_path / "file")
    at = synced.index("link")
    assert tmp_path / "file" in synced[:at]
    assert synced[at + 1 :] == [tmp_path / "out" / "deep"]
    # The new folders' own names are on the disk too.
    assert {tmp_path, tmp_path / "out"} <= set(synced[:at])


def test_a_scratch_folder_that_was_cleared_away_is_not_taken_for_whole(tmp_path: Path) -> None:
    store = LocalStore(tmp_path).writing_in("unfinished")
    scratch = store.scratch()
    folder = scratch.__enter__()
    (folder / "first").touch()
    store.clear()
    folder.mkdir(parents=True)  # as a format's library may do
    (folder / "second").touch()
    with pytest.raises(FileNotFoundError, match="cleared away"):
        scratch.__exit__(None, None, None)
    assert not folder.exists()
    store.clear()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("at", ["write", "sync", "rename"])
def test_what_was_there_stays_until_the_new_bytes_are_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no space left")

    store = LocalStore(tmp_path)
    store.replace("file", b"old")
    if at == "rename":
        monkeypatch.setattr(Path, "replace", fail)
    else:
        monkeypatch.setattr(module.os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        store.replace("file", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"old")]


def test_what_is_being_replaced_is_not_seen_among_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, seen, replace = LocalStore(tmp_path).writing_in(".run/unfinished"), [], Path.replace

    def look(path: Path, target: Path) -> Path:
        seen.extend(info.name for info in store.below("step").files())
        assert path.is_relative_to(tmp_path / ".run" / "unfinished")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", look)
    store.below("step").replace("file", b"x")
    assert seen == []
    assert [info.name for info in store.files()] == ["step/file"]


def test_a_failing_object_store_says_where_and_what_to_do(s3: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    store = ObjectStore("s3://no-such-bucket-here/x")
    for attempt in (
        lambda: store.create("a", tmp_path / "file"),
        lambda: store.replace("a", b"x"),
    ):
        with pytest.raises((RunError, FileNotFoundError)) as error:
            attempt()
        if isinstance(error.value, RunError):
            assert error.value.code == "storage-error"
            assert error.value.where == "s3://no-such-bucket-here/x/a"


@pytest.mark.parametrize("url", ["https://example.org/x", "http://x", "hf://datasets/x"])
def test_nothing_is_written_where_writers_could_overwrite_each_other(
    url: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="unwritable-output"):
        ObjectStore(url).create("a", tmp_path / "file")
    with pytest.raises(UsageError, match="unwritable-output"):
        ObjectStore(url).replace("a", b"x")


def test_places_are_opened_by_what_they_look_like(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_store("a/b") == LocalStore(tmp_path / "a" / "b")
    assert open_store(Path("a")) == LocalStore(tmp_path / "a")
    assert open_store(f"file://{tmp_path}/c") == LocalStore(tmp_path / "c")
    assert open_store("memory://a/b/") == ObjectStore("memory://a/b")
    store = ObjectStore("memory://a")
    assert open_store(store) is store
    with pytest.raises(UsageError, match="missing-file-system"):
        open_store("nosuch://a")
