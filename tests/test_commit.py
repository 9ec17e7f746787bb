"""Commit, kill, resume: whatever happens, readers see a whole output or none."""

from __future__ import annotations

import shutil
import tempfile
import threading
import uuid
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import fsspec
import pytest
from faults import (
    ERRORS,
    FORMATS,
    KILLS,
    POINTS,
    Faults,
    FaultyStore,
    Killed,
    Noting,
    each,
    output,
    rows,
    whole_run,
)
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from samples import attempt

from pipeline.errors import RunError
from pipeline.orchestration.executor import Unit, Work
from pipeline.orchestration.retry import in_quarantine
from pipeline.storage.artifact import Artifact, ArtifactSource
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.store import LocalStore, Store

SHARDS = 5
"""Of both steps: one of the first step's three comes out empty."""


pytestmark = pytest.mark.usefixtures("without_hold_and_patience")


def fresh_memory() -> ObjectStore:
    """An empty object store; the last one is gone, since each listing looks through them all."""
    fsspec.filesystem("memory").store.clear()
    return ObjectStore(f"memory://{uuid.uuid4().hex}/out")


@lru_cache
def reference(fmt: str) -> tuple[dict[str, bytes], dict[str, list[dict[str, Any]]]]:
    """Files and samples of a run that nothing disturbed, in a store that nothing else touches."""
    with tempfile.TemporaryDirectory() as folder:
        store = LocalStore(Path(folder))
        whole_run(store, FORMATS[fmt])
        return output(store), {role: rows(store, role) for role in ("first", "second")}


@lru_cache
def operations(fmt: str) -> tuple[str, ...]:
    """The operations of such a run, in their order."""
    faults = Faults()
    with tempfile.TemporaryDirectory() as folder:
        whole_run(FaultyStore(LocalStore(Path(folder)), faults), FORMATS[fmt])
    return tuple(faults.calls)


def check(store: Store, fmt: str) -> None:
    """What holds at any time."""
    expected, samples = reference(fmt)
    found = output(store)
    for name, data in found.items():
        assert name in expected, f"an extra file: {name}"
        assert data == expected[name], f"a wrong file: {name}"
    for folder in {name.partition("/")[0] for name in expected if "/" in name}:
        if f"{folder}/manifest.json" in found:
            artifact = Artifact.open(store.below(folder))
            assert artifact.files.keys() <= {name.removeprefix(f"{folder}/") for name in found}
            counts = artifact.manifest["counts"]
            left_out = sum(counts["filtered"].values()) + sum(counts["quarantined"].values())
            assert counts["in"] == counts["out"] + left_out
            read = [t.num_rows for t in ArtifactSource(artifact).tables()]
            assert sum(read) == counts["out"]
    if "manifest.json" in found:
        assert {role: rows(store, role) for role in samples} == samples


def check_finished(store: Store, fmt: str) -> None:
    """What holds when a run has ended."""
    assert output(store) == reference(fmt)[0]
    check(store, fmt)
    assert whole_run(store, FORMATS[fmt]).executed == 0
    assert output(store) == reference(fmt)[0]


def disturbed(store: Store, fmt: str, faults: Faults, executor: Any = None) -> bool:
    """Run with faults; whether it ended all the same."""
    try:
        whole_run(FaultyStore(store, faults), FORMATS[fmt], executor)
    except Killed:
        assert faults.dead
        return False
    except RunError as error:
        assert faults.fired
        return told_of_storage(error)
    # A log that cannot be kept is no reason to fail.
    assert not faults.fired or callable(faults.effect) or faults.calls[-1] == "log"
    return True


def told_of_storage(error: RunError) -> bool:
    assert error.code == "storage-error"
    assert error.hint.count("start the same command again") == 1
    return False


def test_the_run_of_these_tests_has_every_point() -> None:
    for fmt in FORMATS:
        calls = operations(fmt)
        assert {"scratch", "write", "create", "ledger", "step manifest", "run manifest"} <= {*calls}
        assert calls.count("ledger") == SHARDS
        _, samples = reference(fmt)
        assert [row["key"] for row in samples["first"]] == ["k0", "k1", "k3", "k5", "k6"]
        assert [row["key"] for row in samples["second"]] == ["k0", "k1", "k5", "k6"]
        assert samples["first"][0]["image"].startswith(b"\x89PNG")


@pytest.mark.parametrize("effect", [*KILLS, *ERRORS])
@pytest.mark.parametrize("fmt", FORMATS)
def test_a_fault_at_any_operation_is_made_good_by_the_next_start(fmt: str, effect: str) -> None:
    for kind, number in each(operations(fmt)):
        store, faults = fresh_memory(), Faults((kind, number), effect)
        ended = kind == "log" and effect in ERRORS
        assert disturbed(store, fmt, faults) == ended, kind
        assert faults.fired
        check(store, fmt)
        again = Faults()
        assert disturbed(store, fmt, again)
        if kind in {"step manifest", "run manifest"} and effect in KILLS:
            # A killed worker costs its shard; nothing that was committed is done again.
            assert again.calls.count("ledger") + faults.calls.count("ledger") == SHARDS
        check_finished(store, fmt)


def test_a_run_killed_at_every_operation_in_turn_comes_to_its_end() -> None:
    store, starts = fresh_memory(), 0
    while not disturbed(store, "parquet", Faults(("ledger", 0), "kill after")):
        check(store, "parquet")
        starts += 1
    assert starts == SHARDS  # a shard a start: each goes on where the last one stopped
    check_finished(store, "parquet")


@pytest.mark.parametrize("number", range(0, 40, 3))
def test_a_second_run_in_the_middle_of_the_first_agrees_with_it(number: int) -> None:
    store = fresh_memory()
    faults = Faults(("any", number), lambda: whole_run(store, FORMATS["webdataset"]))
    assert disturbed(store, "webdataset", faults)
    check_finished(store, "webdataset")


def test_runs_at_once_on_an_object_store_agree(s3: ObjectStore) -> None:
    failed: list[BaseException] = []
    start = threading.Barrier(3)

    def work() -> None:
        start.wait()
        try:
            whole_run(s3, FORMATS["parquet"])
        except BaseException as error:  # noqa: BLE001 - looked at below
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    check_finished(s3, "parquet")


def test_a_late_worker_whose_folder_was_cleared_away_publishes_nothing(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    executor = Noting()
    assert not disturbed(store, "parquet", Faults(("create", 0), "kill before"), executor)
    work, unit = executor.work[0]
    work.folders.artifact.faults.__init__(("create", 0), store.writing_in(".run/unfinished").clear)
    record = attempt(work, unit)
    assert record["error"]["code"] == "storage-error"
    assert output(store) == {}
    whole_run(store, FORMATS["parquet"])
    check_finished(store, "parquet")


@pytest.mark.parametrize("fmt", FORMATS)
def test_nor_does_one_whose_folder_was_cleared_away_before_it_looked(
    tmp_path: Path, fmt: str
) -> None:
    store = LocalStore(tmp_path)
    executor = Noting()
    assert not disturbed(store, fmt, Faults(("create", 0), "kill before"), executor)
    work, unit = executor.work[0]
    work.folders.artifact.faults.__init__()
    rest = work(unit)
    assert callable(rest)
    store.writing_in(".run/unfinished").clear()
    with pytest.raises(FileNotFoundError):
        rest()
    assert output(store) == {}
    whole_run(store, FORMATS[fmt])
    check_finished(store, fmt)


def test_a_full_disk_is_one_clear_paragraph(tmp_path: Path) -> None:
    faults = Faults(("create", 0), "no space")
    with pytest.raises(RunError) as error:
        whole_run(FaultyStore(LocalStore(tmp_path), faults), FORMATS["parquet"])
    text = str(error.value)
    assert "No space left on device" in text
    assert "Make room there" in text
    assert "(00000)" in text
    assert "\n" not in text
    assert "Errno" not in text


def test_a_disk_that_fails_the_driver_is_one_clear_paragraph(tmp_path: Path) -> None:
    for kind in ("step manifest", "run manifest"):
        faults = Faults((kind, 0), "error after")
        with pytest.raises(RunError, match="Input/output error") as error:
            whole_run(FaultyStore(LocalStore(tmp_path / kind), faults), FORMATS["parquet"])
        assert error.value.code == "storage-error"
        assert error.value.where == str(tmp_path / kind)


def flipped(path: Path, places: int) -> Iterator[int]:
    """Flip one bit of a file, at about so many places in turn; at the end it is as it was."""
    data = path.read_bytes()
    for place in sorted({*range(0, len(data), 1 + len(data) // places), len(data) - 1}):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        yield place
    path.write_bytes(data)


def read_all(store: Store) -> None:
    for role in ("first", "second"):
        rows(store, role)
        in_quarantine(Artifact.open(store).product(role), ())


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_flipped_bit_of_a_finished_run_is_never_read(fmt: str, tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    whole_run(store, FORMATS[fmt])
    files = [info.name for info in store.files() if not info.name.startswith(".run/")]
    kinds = {name.partition("/")[2].partition("/")[0] for name in files}
    assert {"", "manifest.json", "quarantine"} <= kinds
    for name in files:
        if name == "report.html":
            continue
        for place in flipped(tmp_path / name, 12):
            with pytest.raises(RunError) as error:
                read_all(store)
            assert error.value.code in {"damaged-artifact", "damaged-manifest"}, (name, place)
            assert "pipeline repair" in error.value.hint
    read_all(store)


def test_a_flipped_bit_in_a_report_is_written_anew(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    whole_run(store, FORMATS["parquet"])
    for _ in flipped(tmp_path / "report.html", 3):
        whole_run(store, FORMATS["parquet"])
        assert (tmp_path / "report.html").read_bytes() == b"<html>"


def test_a_flipped_bit_in_a_ledger_means_that_the_shard_is_done_again(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    whole_run(store, FORMATS["parquet"])
    manifests = list(tmp_path.glob("*-*/manifest.json"))
    records = sorted((tmp_path / ".run").glob("*/ledger/shards/*.json"))
    assert (len(manifests), len(records)) == (2, SHARDS)
    for record in records:
        for _ in flipped(record, 8):
            for path in [*manifests, tmp_path / "manifest.json"]:
                path.unlink(missing_ok=True)
            again = Noting()
            assert whole_run(store, FORMATS["parquet"], again).executed == 1
            assert [unit.name for _, unit in again.work] == [record.stem]
            assert output(store) == reference("parquet")[0]


def test_a_shard_that_was_damaged_before_its_manifest_is_not_read_either(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    assert not disturbed(store, "parquet", Faults(("step manifest", 0), "kill before"))
    shard = next(tmp_path.glob("first-*/00000.parquet"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(RunError, match="missing or damaged") as error:
        whole_run(store, FORMATS["parquet"])
    assert error.value.code == "damaged-artifact"


def test_a_shard_that_was_damaged_before_its_record_is_a_conflict(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    assert not disturbed(store, "parquet", Faults(("ledger", 0), "kill before"))
    shard = next(tmp_path.glob("first-*/00000.parquet"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(RunError, match="commit-conflict"):
        whole_run(store, FORMATS["parquet"])
    shard.unlink()
    whole_run(store, FORMATS["parquet"])
    check_finished(store, "parquet")


FAULTS = st.one_of(
    st.none(),
    st.tuples(st.sampled_from(POINTS), st.integers(0, 6), st.sampled_from([*KILLS, *ERRORS])),
    st.tuples(st.just("any"), st.integers(0, 45), st.sampled_from([*KILLS, *ERRORS])),
)


class Commit(RuleBasedStateMachine):
    """Runs, faults and late workers in any order, on one output."""

    def make(self) -> Store:
        """An empty store."""
        raise NotImplementedError

    @initialize(fmt=st.sampled_from(sorted(FORMATS)))
    def begin(self, fmt: str) -> None:
        self.store, self.fmt = self.make(), fmt
        self.late: list[tuple[Work, Unit]] = []
        self.finished = False
        self.gone: list[Faults] = []

    @rule(fault=FAULTS)
    def start(self, fault: tuple[str, int, str] | None) -> None:
        faults = Faults(fault[:2], fault[2]) if fault else Faults()
        executor = Noting()
        ended = disturbed(self.store, self.fmt, faults, executor)
        self.gone.append(faults)
        self.late += executor.work
        assert ended or faults.fired
        self.finished |= ended
        if ended:
            assert output(self.store) == reference(self.fmt)[0]

    @rule(data=st.data(), fault=FAULTS)
    def late_worker(self, data: st.DataObject, fault: tuple[str, int, str] | None) -> None:
        """A worker of a run that is gone does its shard, or dies over it, whatever came since."""
        if not self.late:
            return
        work, unit = data.draw(st.sampled_from(self.late))
        faults = work.folders.artifact.faults  # type: ignore[attr-defined]
        faults.__init__(fault[:2] if fault else None, fault[2] if fault else "")
        try:
            record = attempt(work, unit)
        except Killed:
            return
        assert "error" not in record or record["error"]["code"] == "storage-error"

    @invariant()
    def readers_see_a_whole_output_or_none(self) -> None:
        if hasattr(self, "store"):
            check(self.store, self.fmt)
            assert not self.finished or output(self.store) == reference(self.fmt)[0]

    def teardown(self) -> None:
        if hasattr(self, "store"):
            assert disturbed(self.store, self.fmt, Faults())
            check_finished(self.store, self.fmt)


class OnDisk(Commit):
    def make(self) -> Store:
        self.folder = tempfile.mkdtemp()
        return LocalStore(Path(self.folder, "out"))

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self, "folder"):
            assert [p.name for p in Path(self.folder, "out", ".run", "unfinished").glob("*")] == []
            shutil.rmtree(self.folder)


class InMemory(Commit):
    def make(self) -> Store:
        return fresh_memory()

    @rule(number=st.integers(0, 45), fault=FAULTS)
    def two_at_once(self, number: int, fault: tuple[str, int, str] | None) -> None:
        """A second run, which may be killed, in the middle of the first."""
        inner = Faults(fault[:2], fault[2]) if fault else Faults()

        def second() -> None:
            disturbed(self.store, self.fmt, inner)
            self.gone.append(inner)

        outer = Faults(("any", number), second)
        self.finished |= disturbed(self.store, self.fmt, outer)
        assert self.finished


class OnS3(InMemory):
    bucket = ""

    def make(self) -> Store:
        return ObjectStore(f"{self.bucket}/{uuid.uuid4().hex}")


def explore(machine: type[Commit], examples: int) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=6,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_any_story_on_a_disk() -> None:
    explore(OnDisk, 30)


def test_any_story_in_an_object_store() -> None:
    explore(InMemory, 40)


def test_any_story_on_s3(s3_bucket: str) -> None:
    OnS3.bucket = s3_bucket
    explore(OnS3, 3)
