"""What a run would do, and how far it is."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import pyarrow as pa
import pytest
from conftest import TINY
from samples import attempt, encoded, pixels

import pipeline
from pipeline.api import plan
from pipeline.cli import main
from pipeline.errors import RunError, UsageError
from pipeline.orchestration import execute
from pipeline.orchestration.executor import KILLS, Record, Resources, Unit, Work
from pipeline.orchestration.ledger import Ledger
from pipeline.orchestration.local_executor import LocalExecutor
from pipeline.orchestration.run import open_run
from pipeline.orchestration.status import status
from pipeline.storage.artifact import ArtifactSource
from pipeline.storage.parquet import ParquetFormat
from pipeline.storage.source import Shard, Source
from pipeline.storage.store import LocalStore
from pipeline.testing import tree_digest


class Killer(LocalExecutor):
    """An executor on which one unit kills each worker that tries it."""

    victim = "00001"

    def run(self, work: Work, units: Iterable[Unit], resources: Resources) -> Iterator[Record]:
        for unit in units:
            if unit.name == self.victim:
                error = {"message": "It died.", "hint": "h", "code": KILLS, "where": unit.name}
                yield {"name": unit.name, "error": error}
            else:
                yield attempt(work, unit)


@dataclass
class Numbers(Sequence[Shard]):
    """A million shards that are made when they are asked for."""

    count: int

    def __len__(self) -> int:
        return self.count

    @overload
    def __getitem__(self, index: int) -> Shard: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Shard]: ...
    def __getitem__(self, index: int | slice) -> Shard | Sequence[Shard]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.count))]
        place = range(self.count)[index]
        return Shard(f"{place:07d}", f"id{place}", 1, {"place": place}, 10)


@dataclass(frozen=True)
class Many(Source):
    """One row a shard."""

    count: int

    @property
    def shards(self) -> Sequence[Shard]:
        return Numbers(self.count)

    @property
    def classes(self) -> tuple[str, ...]:
        return ()

    def read(self, shard: Shard) -> pa.Table:
        return pa.table({"key": [shard.name]})


def steps(summary: dict[str, Any]) -> dict[str, tuple[int, int, int, int]]:
    names = ("shards", "finished", "adopted", "missing")
    return {step["step"]: tuple(step[n] for n in names) for step in summary["steps"]}


@pytest.mark.parametrize(("preset", "more"), [("cda", ["images"]), ("best", [])])
def test_a_plan_goes_as_far_as_it_can_be_seen_and_writes_nothing(
    tmp_path: Path, preset: str, more: list[str]
) -> None:
    config = {**TINY, "ipc": 2, "preset": preset}
    options: dict[str, Any] = {"out": tmp_path / "run", "config": config}
    found = plan("distill", "digits", **options)
    assert found["until"] == ("images" if preset == "cda" else "index")
    assert found["todo"]
    assert [step["step"] for step in found["steps"]] == [
        "index",
        "test",
        "train",
        "teacher",
        *more,
    ]
    if preset == "cda":
        assert steps(found)["images"] == (4, 0, 0, 4)
        assert found["steps"][4]["stages"] == ["read", "Recover", "write webdataset"]
    assert not (tmp_path / "run").exists()


def test_what_was_planned_is_what_is_done(tmp_path: Path) -> None:
    options: dict[str, Any] = {"out": tmp_path / "run", "config": {**TINY, "ipc": 2}}
    folders = [step["folder"] for step in plan("distill", "digits", **options)["steps"]]
    pipeline.run("distill", "digits", **options)
    digest = tree_digest(tmp_path / "run")
    assert all((tmp_path / "run" / folder / "manifest.json").exists() for folder in folders)
    after = plan("distill", "digits", **options)
    assert (after["until"], after["todo"]) == (None, False)
    assert all(step["missing"] == 0 for step in after["steps"])
    assert len(after["steps"]) == 19
    (tmp_path / "run" / "manifest.json").unlink()
    assert plan("distill", "digits", **options)["todo"]
    pipeline.run("distill", "digits", **options)
    assert tree_digest(tmp_path / "run") == digest


def test_the_command_says_when_there_is_nothing_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, picture in enumerate(pixels(4)):
        folder = tmp_path / "source" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(encoded(picture))
    words = ["convert", str(tmp_path / "source"), str(tmp_path / "out")]
    assert main(["plan", *words, "--executor", "ray", "--workers", "2"]) == 0
    told = capsys.readouterr().out
    assert "read > write webdataset, in one process: Ray tasks, 1 thread, 2 at a time" in told
    assert main(words) == 0
    capsys.readouterr()
    assert main(["plan", *words, "--json"]) == 3
    assert not json.loads(capsys.readouterr().out)["todo"]


@pytest.fixture
def killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStore:
    """An output of which one shard is in quarantine."""
    monkeypatch.setattr(Killer, "victim", "0000001")
    out = LocalStore(tmp_path / "out")
    with pytest.raises(RunError, match="kills-worker"), open_run(out, Killer()) as run:
        run.map("step", Many(3), [], to=ParquetFormat())
    return out


def test_the_others_are_done_and_the_killer_is_not_tried_again(killed: LocalStore) -> None:
    found = status(killed)
    assert found.state == "stopped"
    (step,) = found.steps
    assert (step.state, step.done, step.shards) == ("failed", 2, 3)
    assert step.failed == {"0000001": "It died."}
    with pytest.raises(RunError, match="kills-worker"), open_run(killed, LocalExecutor()) as run:
        run.map("step", Many(3), [], to=ParquetFormat())
    assert run.executed == 0
    with open_run(killed, LocalExecutor(), retry=frozenset()) as run:
        run.map("step", Many(3), [], to=ParquetFormat())
    assert run.executed == 1
    assert status(killed).steps[0].state == "finished"


def test_a_step_of_many_shards_is_gathered_into_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part_of = 256
    monkeypatch.setattr(execute, "PART", part_of)
    count = part_of + 100
    with open_run(LocalStore(tmp_path), LocalExecutor()) as run:
        source = run.map("step", Many(count), [], to=ParquetFormat())
    ledger = next(tmp_path.glob(".run/step-*/ledger"))
    assert len(list(ledger.glob("parts/*"))) == 1
    assert len(list(ledger.glob("shards/*"))) == 100
    assert len(source.shards) == count
    assert [shard.name for shard in source.shards[-2:]] == [f"{count - 2:07d}", f"{count - 1:07d}"]
    assert source.read(source.shards[part_of])["key"].to_pylist() == [f"{part_of:07d}"]
    (next(tmp_path.glob("step-*")) / "manifest.json").unlink()
    with open_run(LocalStore(tmp_path), LocalExecutor()) as run:
        again = run.map("step", Many(count), [], to=ParquetFormat())
    assert run.executed == 0
    assert isinstance(again, ArtifactSource)
    found = status(LocalStore(tmp_path)).steps[0]
    assert (found.state, found.done, found.totals.counts["in"]) == ("finished", count, count)
    # A damaged part costs its shards, which come out as they were.
    part = next(ledger.glob("parts/*"))
    part.write_bytes(part.read_bytes()[:-1])
    (next(tmp_path.glob("step-*")) / "manifest.json").unlink()
    with open_run(LocalStore(tmp_path), LocalExecutor()) as run:
        run.map("step", Many(count), [], to=ParquetFormat())
    assert run.executed == part_of


def test_status_tells_of_a_run_that_works(tmp_path: Path) -> None:
    seen, go = threading.Event(), threading.Event()

    class Slow(LocalExecutor):
        def run(self, work: Work, units: Iterable[Unit], resources: Resources) -> Iterator[Record]:
            for unit in units:
                yield attempt(work, unit)
                seen.set()
                go.wait(60)

    def work() -> None:
        with open_run(LocalStore(tmp_path), Slow(), command="tests") as run:
            run.map("step", Many(3), [], to=ParquetFormat())

    thread = threading.Thread(target=work)
    thread.start()
    assert seen.wait(60)
    found = status(LocalStore(tmp_path))
    go.set()
    thread.join()
    assert found.state == "running"
    assert found.holder
    assert found.holder.command == "tests"
    assert (found.steps[0].state, found.steps[0].done) == ("working", 1)
    assert status(LocalStore(tmp_path)).steps[0].state == "finished"


def test_where_nothing_was_started_there_is_no_status(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no-run"):
        status(LocalStore(tmp_path))


def test_a_ledger_counts_what_its_records_say(tmp_path: Path) -> None:
    ledger = Ledger(LocalStore(tmp_path / "ledger"), LocalStore(tmp_path / "files"))
    records = [
        {
            "index": index,
            "name": f"{index}",
            "rows": index,
            "bytes": 10 * index,
            "files": [],
            "counts": {"in": index + 1, "out": index, "filtered": {}, "quarantined": {"bad": 1}},
            "at": 100.0 + index,
            "seconds": 0.5,
        }
        for index in range(6)
    ]
    for record in records:
        ledger.write(record)
    ledger.compact(records[1:4])
    ledger.compact(records[3:5])  # by another driver, which had one of them too
    totals = ledger.totals()
    assert (totals.shards, totals.rows, totals.bytes, totals.seconds) == (6, 15, 150, 3.0)
    assert (totals.first, totals.last) == (100.0, 105.0)
    assert totals.counts == {"in": 21, "out": 15, "filtered": {}, "quarantined": {"bad": 6}}
    table = ledger.collect()
    assert table["name"].to_pylist() == list("012345")
    assert table["offset"].to_pylist() == [0, 0, 1, 3, 6, 10]
