"""Files appear whole or not at all, and never in place of others."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.digest import dumps
from pipeline.errors import RunError, UsageError
from pipeline.storage.atomic import FileEntry, exclusive, publish, seal, unseal
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.store import LocalStore
from pipeline.testing import tree_digest

DAMAGED = "not a record|match its digest|JSON|Expecting|Invalid|Extra data|codec can't|escape"


def attempt(root: Path, name: str, **files: str) -> Path:
    folder = root / name
    for path, text in files.items():
        file = folder / path.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def out(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "out")


def test_publish_gives_every_file_its_name_and_measures_it(tmp_path: Path) -> None:
    entries = publish(attempt(tmp_path, "try", b="bb", a__c="ccc"), out(tmp_path))
    assert [(entry.path, entry.bytes) for entry in entries] == [("a/c", 3), ("b", 2)]
    assert tree_digest(tmp_path / "out") == {entry.path: entry.sha256 for entry in entries}
    assert entries[1].sha256 == hashlib.sha256(b"bb").hexdigest()
    assert all(entry.present(out(tmp_path)) for entry in entries)


def test_publishing_the_same_bytes_again_changes_nothing(tmp_path: Path) -> None:
    first = publish(attempt(tmp_path, "1", a="x", b="y"), out(tmp_path))
    before = {path: path.stat().st_ino for path in (tmp_path / "out").iterdir()}
    assert publish(attempt(tmp_path, "2", a="x", b="y"), out(tmp_path)) == first
    assert {path: path.stat().st_ino for path in (tmp_path / "out").iterdir()} == before


def test_publish_never_replaces(tmp_path: Path) -> None:
    publish(attempt(tmp_path, "1", a="old"), out(tmp_path))
    with pytest.raises(RunError, match="commit-conflict") as error:
        publish(attempt(tmp_path, "2", a="new"), out(tmp_path))
    assert error.value.where == str(tmp_path / "out" / "a")
    assert (tmp_path / "out" / "a").read_text() == "old"


def test_publish_completes_what_a_killed_attempt_began(tmp_path: Path) -> None:
    publish(attempt(tmp_path, "1", a="x"), out(tmp_path))
    publish(attempt(tmp_path, "2", a="x", b="y"), out(tmp_path))
    assert sorted(tree_digest(tmp_path / "out")) == ["a", "b"]


def test_an_attempt_that_wrote_nothing_is_published_too(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    assert publish(tmp_path / "1", LocalStore(tmp_path / "deep" / "out")) == []


@pytest.mark.parametrize(("text", "there"), [("abc", True), ("ab", False), (None, False)])
def test_a_file_is_present_with_its_size(tmp_path: Path, text: str | None, there: bool) -> None:
    (tmp_path / "f").write_text("xyz")
    entry = FileEntry.of(LocalStore(tmp_path), "f")
    assert entry == FileEntry("f", 3, hashlib.sha256(b"xyz").hexdigest())
    assert entry.intact(LocalStore(tmp_path))
    (tmp_path / "f").unlink()
    if text is not None:
        (tmp_path / "f").write_text(text)
    assert entry.present(LocalStore(tmp_path)) == there
    assert not entry.intact(LocalStore(tmp_path))


def test_a_sealed_record_comes_back_and_no_other_bytes_do() -> None:
    record = {"name": "a", "rows": 3, "files": [{"path": "x", "bytes": 1}], "metrics": {"m": 0.5}}
    data = seal(record)
    assert unseal(data) == record
    assert seal(dict(reversed(record.items()))) == data
    assert json.loads(data)["sha256"] == hashlib.sha256(dumps(record)).hexdigest()
    for place in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[place] ^= 1 << bit
            with pytest.raises(ValueError, match=DAMAGED):
                unseal(bytes(flipped))
    for cut in (b"", data[:-1], data + b"\n", data * 2, b"[]\n", b"{}\n", dumps(record), b"\xff"):
        with pytest.raises(ValueError, match=DAMAGED):
            unseal(cut)


HOLD = """
import sys
from pathlib import Path
from pipeline.storage.atomic import exclusive
from pipeline.storage.store import LocalStore
with exclusive(LocalStore(Path(sys.argv[1]))):
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
        with pytest.raises(RunError, match="output-busy"), exclusive(LocalStore(tmp_path / ".run")):
            pass
    finally:
        other.kill()
        other.communicate()
    with exclusive(LocalStore(tmp_path / ".run")):
        pass
    with exclusive(LocalStore(tmp_path / ".run")):
        pass


def test_an_object_store_is_never_busy() -> None:
    store = ObjectStore("memory://held")
    with exclusive(store), exclusive(store):
        assert store.files() == []


def test_a_folder_that_cannot_be_made_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(UsageError, match="unwritable-output"),
        exclusive(LocalStore(tmp_path / "file" / "run")),
    ):
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
