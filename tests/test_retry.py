"""Samples in quarantine, taken up once more."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pytest
from faults import ERRORS, KILLS, Faults, FaultyStore, Killed, each, output, samples
from samples import folder_of, keyed, local_run

from pipeline.errors import RunError
from pipeline.orchestration.local_executor import LocalExecutor
from pipeline.orchestration.retry import RetrySource, in_quarantine
from pipeline.orchestration.run import Run
from pipeline.stage import ShardContext
from pipeline.storage.artifact import Artifact, ArtifactSource
from pipeline.storage.folder import FolderFormat
from pipeline.storage.parquet import ParquetFormat, read_table
from pipeline.storage.source import Source, TableSource
from pipeline.storage.store import LocalStore, Store
from pipeline.testing import check_source, pickled, tree_digest

SEEN: list[str] = []
"""Keys that a Fetch was given."""
TROUBLE: dict[str, str] = {}
"""Why a Fetch cannot take a key, for as long as it cannot."""
ALL = frozenset[str]()


pytestmark = pytest.mark.usefixtures("without_hold_and_patience")


@dataclass(frozen=True)
class Fetch:
    """Sets aside what is in trouble at the moment and filters what ends with 9."""

    version: ClassVar[int] = 1

    def __call__(self, table: pa.Table, context: ShardContext) -> pa.Table:
        keys = table["key"].to_pylist()
        SEEN.extend(keys)
        for key in keys:
            if key in TROUBLE:
                context.quarantine(key, TROUBLE[key], "It is in trouble.")
            elif key.endswith("9"):
                context.filter("nine")
        good = [key not in TROUBLE and not key.endswith("9") for key in keys]
        return table.filter(pa.array(good, pa.bool_()))


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    SEEN.clear()
    TROUBLE.clear()
    TROUBLE.update({"k1": "net", "k4": "net", "k5": "disk"})
    yield
    TROUBLE.clear()


def fetch(
    run: Run, retry: frozenset[str] | None = None, source: Source | None = None
) -> ArtifactSource:
    run.retry, run.max_bad = retry, 1.0
    return run.map("fetch", source or keyed(3, 3, 2), [Fetch()], to=ParquetFormat())


def once_more(out: Path, *reasons: str, source: Source | None = None) -> ArtifactSource:
    SEEN.clear()
    return fetch(local_run(out), frozenset(reasons), source)


def keys(source: ArtifactSource) -> list[str]:
    return [key for table in source.tables() for key in table["key"].to_pylist()]


def counts(source: ArtifactSource) -> dict[str, Any]:
    found: dict[str, Any] = source.artifact.manifest["counts"]
    left_out = sum(found["filtered"].values()) + sum(found["quarantined"].values())
    assert found["in"] == found["out"] + left_out
    assert found["out"] == len(keys(source)) == sum(shard.rows or 0 for shard in source.shards)
    return found


def test_what_can_be_used_now_is_added(tmp_path: Path) -> None:
    first = fetch(local_run(tmp_path))
    before = tree_digest(tmp_path)
    assert counts(first) == {
        "in": 8,
        "out": 5,
        "filtered": {},
        "quarantined": {"net": 2, "disk": 1},
    }
    TROUBLE.clear()
    source = once_more(tmp_path)
    assert SEEN == ["k1", "k4", "k5"], "only what was in quarantine is worked on"
    assert keys(source) == ["k0", "k2", "k3", "k6", "k7", "k1", "k4", "k5"]
    assert counts(source) == {"in": 8, "out": 8, "filtered": {}, "quarantined": {}}
    assert source.artifact.name == f"{first.artifact.name}-retry1"
    assert before.items() < tree_digest(tmp_path).items(), "the first artifact stays as it was"
    again = ArtifactSource(Artifact.open(source.artifact.store))
    assert pa.concat_tables(again.tables()) == pa.concat_tables(source.tables())
    check_source(source)
    labels = {r["key"]: r["label"] for t in source.tables() for r in t.to_pylist()}
    assert labels == {f"k{row}": row % 2 for row in range(8)}


def test_only_the_named_reasons_are_taken_up(tmp_path: Path) -> None:
    fetch(local_run(tmp_path))
    TROUBLE.clear()
    source = once_more(tmp_path, "net", "no such reason")
    assert SEEN == ["k1", "k4"]
    assert counts(source) == {"in": 8, "out": 7, "filtered": {}, "quarantined": {"disk": 1}}
    source = once_more(tmp_path, "disk")
    assert SEEN == ["k5"]
    assert counts(source)["quarantined"] == {}
    assert once_more(tmp_path).identity == source.identity
    assert SEEN == []


@pytest.mark.parametrize("reasons", [(), ("net",), ("no such reason",)])
def test_where_nothing_is_recovered_nothing_changes(
    tmp_path: Path, reasons: tuple[str, ...]
) -> None:
    first = fetch(local_run(tmp_path))
    before = sorted(tmp_path.rglob("*")), tree_digest(tmp_path)
    source = once_more(tmp_path, *reasons)
    assert source.identity == first.identity
    assert source.artifact.name == first.artifact.name
    assert counts(source) == counts(first)
    assert (sorted(tmp_path.rglob("*")), tree_digest(tmp_path)) == before
    TROUBLE.clear()
    assert counts(once_more(tmp_path))["out"] == 8


def test_rounds_add_up(tmp_path: Path) -> None:
    fetch(local_run(tmp_path))
    del TROUBLE["k1"]
    TROUBLE["k5"] = "other"
    second = once_more(tmp_path)
    assert counts(second) == {
        "in": 8,
        "out": 6,
        "filtered": {},
        "quarantined": {"net": 1, "other": 1},
    }
    assert in_quarantine(second.artifact, ()) == {"00001": [("k4", "net"), ("k5", "other")]}
    assert in_quarantine(second.artifact, ["disk"]) == {}
    TROUBLE.clear()
    third = once_more(tmp_path, "other")
    assert SEEN == ["k5"]
    fourth = once_more(tmp_path)
    assert SEEN == ["k4"]
    assert [part.name.rpartition("-")[2] for part in fourth.artifacts[1:]] == [
        "retry1",
        "retry2",
        "retry3",
    ]
    assert keys(fourth) == ["k0", "k2", "k3", "k6", "k7", "k1", "k5", "k4"]
    assert counts(third)["quarantined"] == {"net": 1}
    assert counts(fourth) == {"in": 8, "out": 8, "filtered": {}, "quarantined": {}}
    check_source(pickled(fourth))


def test_what_is_filtered_in_a_later_round_is_accounted_for(tmp_path: Path) -> None:
    TROUBLE.update({"k9": "net"})
    fetch(local_run(tmp_path), source=keyed(6, 6))
    TROUBLE.clear()
    source = once_more(tmp_path, source=keyed(6, 6))
    assert counts(source) == {"in": 12, "out": 11, "filtered": {"nine": 1}, "quarantined": {}}


def test_a_later_run_keeps_what_was_added_and_does_nothing(tmp_path: Path) -> None:
    first = fetch(local_run(tmp_path))
    TROUBLE.clear()
    added = once_more(tmp_path)
    before, run = tree_digest(tmp_path), local_run(tmp_path)
    SEEN.clear()
    later = fetch(run)
    assert (run.executed, SEEN) == (0, [])
    assert later.identity == added.identity != first.identity
    assert keys(later) == keys(added)
    assert tree_digest(tmp_path) == before


def test_steps_that_follow_are_done_anew_with_what_was_added(tmp_path: Path) -> None:
    run = local_run(tmp_path)
    follow = run.map("follow", fetch(run), [], to=ParquetFormat())
    TROUBLE.clear()
    run = local_run(tmp_path)
    again = run.map("follow", fetch(run, ALL), [], to=ParquetFormat())
    assert again.identity != follow.identity
    assert sorted(keys(again)) == [f"k{row}" for row in range(8)]
    run.publish("things", {"follow": again.artifact}, {})
    published = Artifact.open(run.out)
    # All that the products are made of is part of the run: nobody takes the first round for waste.
    assert published.manifest["steps"] == [part.name for part in fetch(run).artifacts] + [
        again.artifact.name
    ]


def test_a_product_that_was_added_to_is_vouched_for_with_its_base(tmp_path: Path) -> None:
    fetch(local_run(tmp_path))
    TROUBLE.clear()
    run = local_run(tmp_path)
    source = fetch(run, ALL)
    published = run.publish("things", {"fetch": source.artifact}, {})
    assert run.published("things", {"fetch": source.artifact})
    base = folder_of(source.artifacts[0])
    assert f"{base.name}/manifest.json" in published.files
    (base / "manifest.json").write_bytes(b"{}")
    assert not run.published("things", {"fetch": source.artifact})


def test_too_many_bad_samples_are_counted_after_the_round(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="too-many-bad"):
        local_run(tmp_path, max_bad=2).map("s", keyed(3, 3, 2), [Fetch()], to=ParquetFormat())
    del TROUBLE["k1"]
    run = local_run(tmp_path, max_bad=2, retry=ALL)
    assert len(keys(run.map("s", keyed(3, 3, 2), [Fetch()], to=ParquetFormat()))) == 6
    with pytest.raises(RunError, match=r"2 of 8 samples .*: (1 net, 1 disk|1 disk, 1 net)\."):
        local_run(tmp_path, max_bad=1).map("s", keyed(3, 3, 2), [Fetch()], to=ParquetFormat())


def test_a_sample_of_a_doubled_key_is_taken_up_once_and_its_double_never(tmp_path: Path) -> None:
    table = pa.table({"key": ["k1", "x", "k1", "k1"], "label": pa.array([1, 0, 0, 1])})
    source = TableSource((("00000", table),), ("0", "1"))
    first = fetch(local_run(tmp_path), source=source)
    assert counts(first)["quarantined"] == {"duplicate-key": 2, "net": 1}
    TROUBLE.clear()
    again = once_more(tmp_path, source=source)
    assert SEEN == ["k1"]
    assert counts(again) == {
        "in": 4,
        "out": 2,
        "filtered": {},
        "quarantined": {"duplicate-key": 2},
    }
    assert [r for t in again.tables() for r in t.to_pylist()][-1] == {"key": "k1", "label": 1}
    once_more(tmp_path, source=source)
    assert SEEN == []
    once_more(tmp_path, "duplicate-key", source=source)
    assert SEEN == []


def test_a_label_that_no_class_has_does_not_stop_the_round(tmp_path: Path) -> None:
    table = pa.table({"key": ["k1", "x", "y"], "label": pa.array([1, 7, 0])})
    source = TableSource((("00000", table),), ("0", "1"))
    fetch(local_run(tmp_path), source=source)
    TROUBLE.clear()
    for reasons in ((), ("bad-label",)):
        again = once_more(tmp_path, *reasons, source=source)
    assert keys(again) == ["y", "k1"]
    assert counts(again)["quarantined"] == {"bad-label": 1}


@dataclass(frozen=True)
class Url(TableSource):
    """A source that reads no more than it is asked for."""

    def read(self, shard: Any) -> pa.Table:
        table = super().read(shard)
        errors = [TROUBLE.get(key) for key in table["key"].to_pylist()]
        return table.append_column("error", pa.array(errors, pa.string()))

    def take(self, shard: Any, keys: Any) -> pa.Table:
        SEEN.extend(keys)
        return super().take(shard, keys)


def test_what_could_not_be_read_is_asked_for_by_its_key(tmp_path: Path) -> None:
    source = Url(keyed(3, 3, 2).parts, ("0", "1"))

    def read(retry: frozenset[str] | None = None) -> ArtifactSource:
        run = local_run(tmp_path, retry=retry, max_bad=1.0)
        return run.map("read", source, [], to=ParquetFormat())

    assert counts(read())["quarantined"] == {"unreadable": 3}
    TROUBLE.clear()
    again = read(ALL)
    assert SEEN == ["k1", "k4", "k5"]
    assert counts(again)["out"] == 8
    assert "error" not in next(iter(again.tables())).column_names


def test_a_damaged_quarantine_is_an_error(tmp_path: Path) -> None:
    first = fetch(local_run(tmp_path))
    file = min((folder_of(first) / "quarantine").iterdir())
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    before = tree_digest(tmp_path)
    with pytest.raises(RunError, match="damaged-artifact"):
        once_more(tmp_path)
    assert SEEN == []
    assert tree_digest(tmp_path) == before
    assert keys(fetch(local_run(tmp_path))) == keys(first)


def test_a_class_may_be_named_quarantine(tmp_path: Path) -> None:
    source, fmt = samples(4, 1, 3), FolderFormat(("quarantine", "odd"))

    def write(retry: frozenset[str] | None = None) -> ArtifactSource:
        run = local_run(tmp_path, retry=retry, max_bad=1.0)
        return run.map("write", source, [Fetch()], to=fmt)

    assert counts(write())["quarantined"] == {"net": 2, "disk": 1}
    TROUBLE.clear()
    again = write(ALL)
    assert counts(again)["quarantined"] == {}
    assert sorted(keys(again)) == [f"k{row}" for row in range(8)]


def test_quarantine_keeps_the_rows_as_they_were_read(tmp_path: Path) -> None:
    first = fetch(local_run(tmp_path))
    TROUBLE["k4"] = "again"
    del TROUBLE["k1"]
    second = once_more(tmp_path)
    for source, reason in ((first, "net"), (second, "again")):
        rows = []
        for file in (folder_of(source) / "quarantine").iterdir():
            rows += read_table(file).to_pylist()
        (found,) = [row for row in rows if row["key"] == "k4"]
        assert found == {"key": "k4", "label": 0, "reason": reason, "detail": "It is in trouble."}


def test_the_source_of_a_round_keeps_the_contract(tmp_path: Path) -> None:
    chosen = in_quarantine(fetch(local_run(tmp_path)).artifact, ())
    source = RetrySource(keyed(3, 3, 2), chosen, 1)
    check_source(source)
    assert len(source) == 3
    assert source.retried == {"disk": 1, "net": 2}
    others = [
        RetrySource(keyed(3, 3, 2), chosen, 2),
        RetrySource(keyed(3, 3, 2), {"00001": chosen["00001"]}, 1),
        RetrySource(keyed(3, 3, 2), {**chosen, "00001": [("k4", "net"), ("k5", "net")]}, 1),
    ]
    assert len({source.identity, *(other.identity for other in others)}) == 4


def faulty(store: Store, faults: Faults, *reasons: str) -> ArtifactSource | None:
    """A round with faults; ``None`` if it did not come to its end."""
    run = Run(FaultyStore(store, faults), LocalExecutor())
    try:
        return fetch(run, frozenset(reasons))
    except Killed:
        return None
    except RunError as error:
        return failed(error)
    except OSError:  # outside of 'open_run'
        return None


def failed(error: RunError) -> None:
    assert error.code == "storage-error"


@pytest.mark.parametrize("effect", [*KILLS, *ERRORS])
@pytest.mark.parametrize("recovered", ["all", "some", "none"])
def test_a_round_that_was_stopped_anywhere_is_taken_up(
    tmp_path: Path, effect: str, recovered: str
) -> None:
    def begin(name: str) -> Store:
        TROUBLE.update({"k1": "net", "k4": "net", "k5": "disk"})
        store = LocalStore(tmp_path / name).writing_in(".run/unfinished")
        fetch(Run(store, LocalExecutor()))
        if recovered != "none":
            del TROUBLE["k1"]
        if recovered == "all":
            TROUBLE.clear()
        return store

    whole, undisturbed = begin("whole"), Faults()
    expected = faulty(whole, undisturbed)
    assert expected
    assert ("delete" in undisturbed.calls) == (recovered == "none")
    for at in each(undisturbed.calls):
        store = begin("-".join(map(str, at)))
        faults = Faults(at, effect)
        assert faulty(store, faults) is None
        assert faults.fired
        between = fetch(Run(store, LocalExecutor()))  # an ordinary run sees one or the other
        assert counts(between)["in"] == 8
        assert between.identity in {expected.identity, expected.artifacts[0].identity}
        found = faulty(store, Faults())
        assert found
        assert found.identity == expected.identity
        assert counts(found) == counts(expected)
        assert output(store) == output(whole)


def test_a_stopped_round_of_other_samples_is_not_taken_for_this_one(tmp_path: Path) -> None:
    store = LocalStore(tmp_path).writing_in(".run/unfinished")
    fetch(Run(store, LocalExecutor()))
    TROUBLE.clear()
    assert faulty(store, Faults(("step manifest", 0), "kill before"), "net") is None
    SEEN.clear()
    source = faulty(store, Faults(), "disk")
    assert source
    assert SEEN == ["k5"]
    assert keys(source)[5:] == ["k5"]
    assert counts(source)["quarantined"] == {"net": 2}
    assert counts(once_more(tmp_path, "net"))["quarantined"] == {}


def test_nor_where_the_step_was_published_before(tmp_path: Path) -> None:
    """Then its shards are looked at too, to be taken over."""
    store = LocalStore(tmp_path).writing_in(".run/unfinished")
    run = Run(store, LocalExecutor())
    run.publish("things", {"fetch": fetch(run).artifact}, {})
    TROUBLE.clear()
    assert faulty(store, Faults(("step manifest", 0), "kill before"), "net") is None
    SEEN.clear()
    source = faulty(store, Faults(), "disk")  # of one shard, where the other round had two
    assert source
    assert SEEN == ["k5"]
    assert counts(source)["quarantined"] == {"net": 2}
