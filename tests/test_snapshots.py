"""A source that grows: only what is new is done, and what was published stays readable."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from samples import encoded, pixels

import pipeline
from pipeline.cli import main
from pipeline.errors import UsageError
from pipeline.orchestration.snapshots import open_snapshot, snapshots
from pipeline.stages.encode import Encode
from pipeline.storage.artifact import Artifact, ArtifactSource
from pipeline.storage.formats import Region
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.store import LocalStore, Store
from pipeline.storage.webdataset import WebDatasetFormat
from pipeline.testing import tree_digest

ROWS = 200
SEEN: list[int] = []


@pytest.fixture(autouse=True)
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many samples each call of the stage was given."""
    SEEN.clear()
    real = Encode.__call__

    def counted(self: Encode, table: pa.Table, context: Any) -> pa.Table:
        SEEN.append(table.num_rows)
        return real(self, table, context)

    monkeypatch.setattr(Encode, "__call__", counted)
    return SEEN


def shard(folder: Path, number: int, rows: int = ROWS) -> None:
    """One tar of a source; two are too large to be joined."""
    pictures = pixels(rows, 32, seed=number)
    table = pa.table(
        {
            "key": [f"s{number}-{row}" for row in range(rows)],
            "image": [encoded(picture) for picture in pictures],
            "label": pa.array([row % 2 for row in range(rows)], pa.int64()),
        }
    )
    folder.mkdir(exist_ok=True)
    WebDatasetFormat().write(table, folder, Region(f"{number:05d}", 0, rows, rows))
    (folder / "classes.txt").write_text("even\nodd\n")


def convert(source: Path, out: Store, fmt: str = "parquet", **options: Any) -> dict[str, Any]:
    config = {"format": fmt, "encode": "png", "shard_mb": 1, **options.pop("config", {})}
    return pipeline.run("convert", str(source), out=out.url, config=config, **options)


def keys(artifact: Artifact) -> list[str]:
    tables = ArtifactSource(artifact.product("train")).tables()
    return [key for table in tables for key in table["key"].to_pylist()]


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], Store]:
    if request.param == "disk":
        return lambda name: LocalStore(tmp_path / name)
    store: ObjectStore = request.getfixturevalue("s3")
    return store.below


def files(store: Store) -> dict[str, bytes]:
    names = [info.name for info in store.files() if not info.name.startswith((".run/", "snap"))]
    return {name: store.read(name) for name in names}


def sources_of(artifact: Artifact) -> set[str]:
    return {key.partition("-")[0] for key in keys(artifact)}


@pytest.mark.parametrize("fmt", ["parquet", "webdataset", "folder", "zarr"])
def test_only_new_shards_are_done_and_the_bytes_are_those_of_a_fresh_run(
    place: Callable[[str], Store], tmp_path: Path, fmt: str
) -> None:
    source = tmp_path / "source"
    for number in (1, 2, 4):
        shard(source, number)
    grown, fresh = place("grown"), place("fresh")
    if fmt == "folder" and isinstance(grown, ObjectStore):
        pytest.skip("two thousand small objects: the same as on a disk, and slow")
    convert(source, grown, fmt)
    before = files(grown)
    assert len(SEEN) == 3
    SEEN.clear()
    shard(source, 5)
    convert(source, grown, fmt)
    assert SEEN == [ROWS]
    convert(source, fresh, fmt)
    after, expected = files(grown), files(fresh)
    assert {name: after[name] for name in expected} == expected
    steps = {name: data for name, data in before.items() if "/" in name}
    assert {name: after.get(name) for name in steps} == steps
    assert snapshots(grown) == [1]
    assert sources_of(open_snapshot(grown, 1)) == {"s1", "s2", "s4"}
    assert sources_of(open_snapshot(grown)) == {"s1", "s2", "s4", "s5"}
    assert len(keys(open_snapshot(grown))) == 4 * ROWS
    assert main(["verify", grown.url, "--deep"]) == 0


def test_a_shard_in_the_middle_moves_the_others_and_the_order_is_that_of_a_fresh_run(
    tmp_path: Path,
) -> None:
    source, grown, fresh = tmp_path / "source", tmp_path / "grown", tmp_path / "fresh"
    for number in (1, 2, 4):
        shard(source, number)
    convert(source, LocalStore(grown))
    shard(source, 3)
    SEEN.clear()
    convert(source, LocalStore(grown))
    assert SEEN == [ROWS, ROWS]  # the new one, and the one whose name it took
    convert(source, LocalStore(fresh))
    found = tree_digest(grown)
    assert {name: found[name] for name in tree_digest(fresh)} == tree_digest(fresh)


def test_what_changed_is_not_taken_over(tmp_path: Path) -> None:
    source, out = tmp_path / "source", LocalStore(tmp_path / "out")
    shard(source, 1)
    shard(source, 2)
    for options in ({}, {"seed": 1}, {"config": {"encode": "webp-lossless"}}):
        SEEN.clear()
        convert(source, out, **options)
        assert len(SEEN) == 2
    (source / "classes.txt").write_text("even\nodd\nother\n")
    SEEN.clear()
    convert(source, out, config={"encode": "webp-lossless"})
    assert len(SEEN) == 2
    assert snapshots(out) == [1, 2, 3]


def test_a_damaged_shard_is_not_taken_over(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shard(source, 1)
    shard(source, 2)
    convert(source, LocalStore(out))
    (next(out.glob("train-*/00001.parquet"))).write_bytes(b"short")
    shard(source, 3)
    SEEN.clear()
    convert(source, LocalStore(out))
    assert SEEN == [ROWS, ROWS]
    assert len(keys(Artifact.open(LocalStore(out)))) == 3 * ROWS


def test_repair_makes_the_present_anew_and_sets_lost_snapshots_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shard(source, 1)
    convert(source, LocalStore(out))
    shard(source, 2)
    convert(source, LocalStore(out))
    present = Artifact.open(LocalStore(out)).products["train"]
    whole = tree_digest(out / present)
    path = out / present / "00000.parquet"  # one file with the earlier snapshot's
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    assert main(["verify", str(out), "--deep"]) == 1
    assert main(["repair", str(out)]) == 0
    assert tree_digest(out / present) == whole
    assert main(["verify", str(out), "--deep"]) == 0
    assert len(keys(Artifact.open(LocalStore(out)))) == 2 * ROWS
    capsys.readouterr()


def test_a_snapshot_is_opened_by_its_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shard(source, 1)
    convert(source, LocalStore(out))
    shard(source, 2)
    convert(source, LocalStore(out))
    assert main(["inspect", str(out)]) == 0
    told = capsys.readouterr().out
    earlier = out / "snapshots" / "000001"
    assert str(earlier) in told
    assert main(["convert", str(earlier), str(tmp_path / "again")]) == 0
    assert sources_of(Artifact.open(LocalStore(tmp_path / "again"))) == {"s1"}


def test_the_same_run_again_is_no_snapshot(tmp_path: Path) -> None:
    source, out = tmp_path / "source", LocalStore(tmp_path / "out")
    shard(source, 1)
    convert(source, out)
    convert(source, out)
    assert snapshots(out) == []
    with pytest.raises(UsageError, match="no-snapshot"):
        open_snapshot(out, 1)


def test_a_kill_between_keeping_and_publishing_keeps_one_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "source", LocalStore(tmp_path / "out")
    shard(source, 1)
    convert(source, out)
    shard(source, 2)
    real = Artifact.finish

    def killed(store: Store, *given: Any) -> Artifact:
        if store.url == out.url:
            raise KeyboardInterrupt
        return real(store, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Artifact, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            convert(source, out)
    assert sources_of(open_snapshot(out)) == {"s1"}
    convert(source, out)
    assert snapshots(out) == [1]
    assert sources_of(open_snapshot(out)) == {"s1", "s2"}


def test_expired_snapshots_go_with_what_only_they_need(tmp_path: Path) -> None:
    source, out = tmp_path / "source", LocalStore(tmp_path / "out")
    shard(source, 1)
    convert(source, out)
    shard(source, 2)
    convert(source, out)
    assert main(["gc", out.url, "--delete"]) == 0
    assert sources_of(open_snapshot(out, 1)) == {"s1"}
    assert main(["gc", out.url, "--delete", "--snapshots"]) == 0
    assert snapshots(out) == []
    assert len(list(out.root.glob("train-*"))) == 1
    assert len(keys(Artifact.open(out))) == 2 * ROWS
    assert main(["verify", out.url, "--deep"]) == 0
