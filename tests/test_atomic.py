"""Files appear whole or not at all, and never in place of others."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import RunError, UsageError
from pipeline.storage import atomic
from pipeline.storage.atomic import FileEntry, attempt_folder, exclusive, publish, write_atomic
from pipeline.testing import tree_digest


def attempt(root: Path, name: str, **files: str) -> Path:
    folder = root / name
    for path, text in files.items():
        file = folder / path.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def test_publish_gives_every_file_its_name_and_measures_it(tmp_path: Path) -> None:
    entries = publish(attempt(tmp_path, "try", b="bb", a__c="ccc"), tmp_path / "out")
    assert [(entry.path, entry.bytes) for entry in entries] == [("a/c", 3), ("b", 2)]
    assert tree_digest(tmp_path / "out") == {entry.path: entry.sha256 for entry in entries}
    assert entries[1].sha256 == hashlib.sha256(b"bb").hexdigest()
    assert all(entry.present(tmp_path / "out") for entry in entries)


def test_publishing_the_same_bytes_again_changes_nothing(tmp_path: Path) -> None:
    first = publish(attempt(tmp_path, "1", a="x", b="y"), tmp_path / "out")
    before = {path: path.stat().st_ino for path in (tmp_path / "out").iterdir()}
    assert publish(attempt(tmp_path, "2", a="x", b="y"), tmp_path / "out") == first
    assert {path: path.stat().st_ino for path in (tmp_path / "out").iterdir()} == before


def test_publish_never_replaces(tmp_path: Path) -> None:
    publish(attempt(tmp_path, "1", a="old"), tmp_path / "out")
    with pytest.raises(RunError, match="commit-conflict") as error:
        publish(attempt(tmp_path, "2", a="new"), tmp_path / "out")
    assert error.value.where == str(tmp_path / "out" / "a")
    assert (tmp_path / "out" / "a").read_text() == "old"


def test_publish_completes_what_a_killed_attempt_began(tmp_path: Path) -> None:
    publish(attempt(tmp_path, "1", a="x"), tmp_path / "out")
    publish(attempt(tmp_path, "2", a="x", b="y"), tmp_path / "out")
    assert sorted(tree_digest(tmp_path / "out")) == ["a", "b"]


def test_an_attempt_that_wrote_nothing_is_published_too(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    assert publish(tmp_path / "1", tmp_path / "deep" / "out") == []


@pytest.mark.parametrize(("text", "there"), [("abc", True), ("ab", False), (None, False)])
def test_a_file_is_present_with_its_size(tmp_path: Path, text: str | None, there: bool) -> None:
    (tmp_path / "f").write_text("xyz")
    entry = FileEntry.of(tmp_path, tmp_path / "f")
    (tmp_path / "f").unlink()
    if text is not None:
        (tmp_path / "f").write_text(text)
    assert entry.present(tmp_path) == there


def test_write_atomic_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    for data in (b"first", b"second"):
        write_atomic(path, data)
        assert path.read_bytes() == data
        assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_write_atomic_syncs_before_it_renames(
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

    monkeypatch.setattr(atomic.os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_replace)
    write_atomic(tmp_path / "file", b"data")
    assert events == ["sync", "rename", "sync"]


def test_what_was_there_stays_until_the_new_bytes_are_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError("no space left")

    write_atomic(tmp_path / "file", b"old")
    monkeypatch.setattr(atomic.os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        write_atomic(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"


def fail_in_an_attempt(parent: Path) -> None:
    with attempt_folder(parent) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "x").write_text("x")
        raise ZeroDivisionError


def test_an_attempt_folder_goes_away_on_success_and_on_error(tmp_path: Path) -> None:
    with attempt_folder(tmp_path / "attempts") as folder:
        (folder / "x").write_text("x")
        with attempt_folder(tmp_path / "attempts") as other:
            assert other != folder
    assert not list((tmp_path / "attempts").iterdir())
    with pytest.raises(ZeroDivisionError):
        fail_in_an_attempt(tmp_path / "attempts")
    assert not list((tmp_path / "attempts").iterdir())


HOLD = """
import sys
from pathlib import Path
from pipeline.storage.atomic import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_that_another_process_holds_is_busy_until_it_dies(tmp_path: Path) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / ".run")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert other.stdout
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(RunError, match="output-busy"), exclusive(tmp_path / ".run"):
            pass
    finally:
        other.kill()
        other.communicate()
    with exclusive(tmp_path / ".run"):
        pass
    with exclusive(tmp_path / ".run"):
        pass


def test_a_folder_that_cannot_be_made_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="unwritable-output"), exclusive(tmp_path / "file" / "run"):
        pass


def test_the_digest_of_a_tree_leaves_out_the_runs_own_folder(tmp_path: Path) -> None:
    attempt(tmp_path, "out", a="x", b__c="y")
    before = tree_digest(tmp_path / "out")
    attempt(tmp_path / "out", ".run", a="z")
    assert (
        tree_digest(tmp_path / "out")
        == before
        == {
            "a": hashlib.sha256(b"x").hexdigest(),
            "b/c": hashlib.sha256(b"y").hexdigest(),
        }
    )
    attempt(tmp_path / "out", "b", c="Y")
    assert tree_digest(tmp_path / "out") != before
