"""Steps over shards: memoised, accounted for, and finished by a second start."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import attempt, folder_of, keyed, local_run

from pipeline.errors import RunError
from pipeline.orchestration.executor import Record, Resources, Unit, Work
from pipeline.orchestration.ledger import Ledger
from pipeline.orchestration.local_executor import LocalExecutor
from pipeline.orchestration.run import Run, open_run
from pipeline.stage import ShardContext
from pipeline.storage.artifact import Artifact, ArtifactSource
from pipeline.storage.atomic import FileEntry
from pipeline.storage.formats import Format
from pipeline.storage.parquet import ParquetFormat
from pipeline.storage.records import add_counts
from pipeline.storage.store import LocalStore
from pipeline.storage.zarr import ZarrFormat
from pipeline.testing import check_stage, tree_digest

DONE: list[str] = []
"""Shards that a Sieve has worked on."""
BROKEN: set[str] = set()
"""Shards at which a Sieve fails."""


@dataclass(frozen=True)
class Sieve:
    """Does with each sample what its letter says, by the number in its key.

    k: keep, f and g: filter for that reason, b: set aside, l: lose without a word.
    """

    fates: str = "k"

    version: ClassVar[int] = 1

    def __call__(self, table: pa.Table, context: ShardContext) -> pa.Table:
        DONE.append(context.shard)
        if context.shard in BROKEN:
            raise ValueError("not today")
        fates = [self.fate(key) for key in table["key"].to_pylist()]
        for key, fate in zip(table["key"].to_pylist(), fates, strict=True):
            if fate in "fg":
                context.filter(fate)
            if fate == "b":
                context.quarantine(key, "bad", "It is bad.")
        context.metrics["seed"] = context.seed
        return table.filter(pa.array([fate == "k" for fate in fates], pa.bool_()))

    def fate(self, key: str) -> str:
        return self.fates[int(key[1:]) % len(self.fates)]


class Backwards(LocalExecutor):
    """An executor that begins at the end."""

    def run(self, work: Work, units: Iterable[Unit], resources: Resources) -> Iterator[Record]:
        for unit in reversed(list(units)):
            yield attempt(work, unit)

    def close(self) -> None:
        DONE.append("closed")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    DONE.clear()
    BROKEN.clear()
    yield
    BROKEN.clear()


def sieve(
    run: Run, *sizes: int, fates: str = "k", to: Format | None = None, stages: int = 1
) -> ArtifactSource:
    return run.map("sieve", keyed(*sizes), [Sieve(fates)] * stages, to=to or ParquetFormat())


def keys(source: ArtifactSource) -> list[str]:
    return [key for table in source.tables() for key in table["key"].to_pylist()]


def test_the_sieve_of_these_tests_keeps_the_contract() -> None:
    table = keyed(12).read(keyed(12).shards[0])
    check_stage(Sieve("kfbg"), table, ShardContext("00000", 3))
    with pytest.raises(AssertionError, match="went in"):
        check_stage(Sieve("kl"), table, ShardContext("00000", 3))


@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    fates=st.text("kfgb", min_size=1, max_size=7),
    executor=st.sampled_from(["local", "backwards"]),
)
@settings(max_examples=25)
def test_every_sample_is_accounted_for(sizes: list[int], fates: str, executor: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = local_run(Path(folder), max_bad=1.0)
        if executor == "backwards":
            run.executor = Backwards()
        source = sieve(run, *sizes, fates=fates)
        artifact = Artifact.open(source.artifact.store)
        manifest, shards = artifact.manifest, list(artifact.records())
        given_ = [key for table in keyed(*sizes).tables() for key in table["key"].to_pylist()]
        fate = {key: Sieve(fates).fate(key) for key in given_}
        assert keys(source) == [key for key in given_ if fate[key] == "k"]
        check_counts(manifest["counts"], fate)
        assert manifest["counts"] == add_counts([s["counts"] for s in shards])
        aside = {}
        for path in sorted((folder_of(source) / "quarantine").glob("*.parquet")):
            for row in pq.read_table(path, partitioning=None).to_pylist():
                assert (row.pop("reason"), row.pop("detail")) == ("bad", "It is bad.")
                aside[row.pop("key")] = row
        labels = {row["key"]: row["label"] for t in keyed(*sizes).tables() for row in t.to_pylist()}
        assert aside == {key: {"label": labels[key]} for key in given_ if fate[key] == "b"}
        offsets = [sum(s["rows"] for s in shards[:i]) for i in range(len(sizes))]
        assert [shard["offset"] for shard in shards] == offsets
        assert not any(Path(folder, ".run", "unfinished").iterdir())


def check_counts(counts: dict[str, Any], fate: dict[str, str]) -> None:
    letters = list(fate.values())
    assert counts["in"] == len(letters)
    assert counts["out"] == letters.count("k")
    assert counts["filtered"] == {f: letters.count(f) for f in "fg" if f in letters}
    assert counts["quarantined"] == ({"bad": letters.count("b")} if "b" in letters else {})
    assert counts["in"] == counts["out"] + sum(
        sum(counts[side].values()) for side in ("filtered", "quarantined")
    )


def test_reasons_add_up_over_the_stages_of_a_step(tmp_path: Path) -> None:
    source = sieve(local_run(tmp_path), 7, fates="kkf", stages=2)
    assert source.artifact.manifest["counts"]["filtered"] == {"f": 2}
    assert keys(source) == ["k0", "k1", "k3", "k4", "k6"]


@pytest.mark.parametrize("fmt", [ParquetFormat(), ZarrFormat()], ids=lambda fmt: fmt.name)
def test_a_finished_step_is_found_and_not_repeated(tmp_path: Path, fmt: Format) -> None:
    first = sieve(local_run(tmp_path), 3, 3, 1, to=fmt)
    before, DONE[:] = tree_digest(tmp_path), []
    run = local_run(tmp_path, max_bad=0.5)
    second = sieve(run, 3, 3, 1, to=fmt)
    assert (run.executed, DONE) == (0, [])
    assert tree_digest(tmp_path) == before
    assert second.identity == first.identity
    assert second.classes == ("0", "1")
    assert keys(second) == keys(first) == [f"k{row}" for row in range(7)]


def test_identity_follows_all_that_the_bytes_depend_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def identity(**options: Any) -> str:
        sizes = options.pop("sizes", (2, 1))
        arguments = {name: options.pop(name) for name in ("fates", "to") if name in options}
        with tempfile.TemporaryDirectory() as folder:
            return sieve(local_run(Path(folder), **options), *sizes, **arguments).identity

    same = {identity(), identity(max_bad=0.5), identity()}
    assert len(same) == 1
    others = [
        identity(seed=1),
        identity(threads=2),
        identity(fates="kk"),
        identity(to=ZarrFormat()),
        identity(sizes=(1, 2)),
    ]
    other_name = local_run(tmp_path).map("other", keyed(2, 1), [Sieve()], to=ParquetFormat())
    monkeypatch.setattr(Sieve, "version", 2)
    others += [identity(), other_name.identity]
    assert len({*same, *others}) == 1 + len(others)


def test_order_of_work_does_not_reach_the_bytes(tmp_path: Path) -> None:
    sieve(local_run(tmp_path / "a"), 2, 3, 2, fates="kkf")
    sieve(Run(LocalStore(tmp_path / "b"), Backwards()), 2, 3, 2, fates="kkf")
    assert DONE[3:] == ["00002", "00001", "00000"]
    assert tree_digest(tmp_path / "a") == tree_digest(tmp_path / "b")


def test_a_stage_gets_the_seed_of_run_and_step(tmp_path: Path) -> None:
    def seeds(name: str, seed: int) -> set[int]:
        run = local_run(tmp_path, seed=seed)
        source = run.map(name, keyed(1, 1), [Sieve()], to=ParquetFormat())
        return {shard["metrics"]["seed"] for shard in source.artifact.records()}

    found = [seeds("a", 0), seeds("b", 0), seeds("a", 1)]
    assert [len(one) for one in found] == [1, 1, 1]
    assert len(set.union(*found)) == 3


def test_a_lost_sample_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="Sieve took 3 samples, gave 2") as error:
        sieve(local_run(tmp_path), 3, fates="kkl")
    assert error.value.code == "lost-samples"
    assert not list(tmp_path.glob("sieve-*/manifest.json"))


def test_a_failing_shard_lets_the_others_go_on_and_is_done_by_the_next_start(
    tmp_path: Path,
) -> None:
    BROKEN.update({"00001"})
    with pytest.raises(RunError, match=r"1 of 4 shards .* ValueError: not today") as error:
        sieve(local_run(tmp_path / "a"), 2, 2, 2, 1)
    assert error.value.where == "00001"
    assert DONE == ["00000", "00001", "00002", "00003"]
    BROKEN.clear()
    DONE.clear()
    run = local_run(tmp_path / "a")
    sieve(run, 2, 2, 2, 1)
    assert (run.executed, DONE) == (1, ["00001"])
    sieve(local_run(tmp_path / "b"), 2, 2, 2, 1)
    assert tree_digest(tmp_path / "a") == tree_digest(tmp_path / "b")


@pytest.mark.parametrize("fmt", [ParquetFormat(), ZarrFormat()], ids=lambda fmt: fmt.name)
def test_shards_whose_files_are_gone_are_done_again(tmp_path: Path, fmt: Format) -> None:
    finished = sieve(local_run(tmp_path), 2, 2, 2, to=fmt).artifact
    whole = tree_digest(tmp_path)
    entries = [shard["files"] for shard in finished.records()]
    own = [{e["path"] for e in files} for files in entries]
    (folder_of(finished) / min(own[0] - own[1])).unlink()
    (folder_of(finished) / min(own[2] - own[1])).unlink()
    (folder_of(finished) / "manifest.json").unlink()
    DONE.clear()
    sieve(local_run(tmp_path), 2, 2, 2, to=fmt)
    assert DONE == ["00000", "00002"]
    assert tree_digest(tmp_path) == whole


def test_a_shard_of_which_nothing_is_left_is_a_finished_shard(tmp_path: Path) -> None:
    source = sieve(local_run(tmp_path), 2, 2, fates="ffkk")
    assert keys(source) == ["k2", "k3"]
    assert [shard["rows"] for shard in source.artifact.records()] == [0, 2]
    (folder_of(source) / "manifest.json").unlink()
    DONE.clear()
    assert keys(sieve(local_run(tmp_path), 2, 2, fates="ffkk")) == ["k2", "k3"]
    assert DONE == []


def test_a_format_of_fixed_regions_refuses_left_out_samples(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="ragged-shards"):
        sieve(local_run(tmp_path), 2, 2, fates="kkkf", to=ZarrFormat())


def test_bad_samples_are_borne_up_to_max_bad(tmp_path: Path) -> None:
    assert len(keys(sieve(local_run(tmp_path / "a", max_bad=0.1), 5, 5, fates="k" * 9 + "b"))) == 9
    with pytest.raises(RunError, match=r"1 of 10 samples .* 1 bad") as error:
        sieve(local_run(tmp_path / "b", max_bad=0.09), 5, 5, fates="k" * 9 + "b")
    assert error.value.code == "too-many-bad"
    DONE.clear()
    run = local_run(tmp_path / "b", max_bad=0.1)
    assert len(keys(sieve(run, 5, 5, fates="k" * 9 + "b"))) == 9
    assert (run.executed, DONE) == (0, [])
    assert tree_digest(tmp_path / "a") == tree_digest(tmp_path / "b")


def test_what_a_killed_attempt_left_is_cleared_away(tmp_path: Path) -> None:
    unfinished = tmp_path / ".run" / "unfinished"
    with open_run(LocalStore(tmp_path), LocalExecutor()) as run:
        (unfinished / "killed").mkdir(parents=True)
        (unfinished / "killed" / "00000.parquet").write_text("half")
        sieve(run, 1, 1)
        assert [path.name for path in unfinished.iterdir()] == ["killed"]
    with open_run(LocalStore(tmp_path), LocalExecutor()):
        assert not unfinished.exists()


DIES = """
import os, sys
from pathlib import Path
from samples import folder_of, keyed, local_run
from pipeline.storage.parquet import ParquetFormat

replace = Path.replace
def die(path, target):
    if target.name == "manifest.json":
        os._exit(9)
    return replace(path, target)

Path.replace = die
local_run(Path(sys.argv[1])).map("step", keyed(2, 1), [], to=ParquetFormat())
"""


def test_dying_just_before_a_manifest_appears_leaves_no_trace(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DIES, str(tmp_path / "a")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert done.returncode == 9
    for name in "ab":
        local_run(tmp_path / name).map("step", keyed(2, 1), [], to=ParquetFormat())
    assert tree_digest(tmp_path / "a") == tree_digest(tmp_path / "b")


def test_the_ledger_believes_files_and_not_records(tmp_path: Path) -> None:
    files = LocalStore(tmp_path / "files")
    ledger = Ledger(LocalStore(tmp_path / "ledger"), files)
    (tmp_path / "files").mkdir()
    records = []
    for index, name in enumerate("abcd"):
        (tmp_path / "files" / name).write_text("text")
        entry = vars(FileEntry.of(files, name))
        records.append({"index": index, "name": name, "rows": 1, "files": [entry], "at": 1.0})
        ledger.write(records[-1])

    def finished() -> list[str]:
        return sorted(name for t in ledger.finished() for name in t["name"].to_pylist())

    assert finished() == ["a", "b", "c", "d"]
    (tmp_path / "files" / "b").unlink()
    (tmp_path / "files" / "c").write_text("tex")
    (tmp_path / "ledger" / "shards" / ".e.json.0123").write_text("{")
    assert finished() == ["a", "d"]
    ledger.compact(records[:3])
    assert [path.name for path in (tmp_path / "ledger" / "shards").glob("[a-z]*")] == ["d.json"]
    assert finished() == ["a", "d"]
    assert ledger.totals().rows == 4
    ledger.write(records[0])  # by a worker that was thought dead
    assert finished() == ["a", "d"]
    assert ledger.totals().rows == 4
    assert not list(Ledger(LocalStore(tmp_path / "none"), files).finished())


def test_counts_add_up_by_reason() -> None:
    one = {"in": 3, "out": 1, "filtered": {"a": 1}, "quarantined": {"x": 1}}
    two = {"in": 4, "out": 1, "filtered": {"a": 1, "b": 1}, "quarantined": {"y": 1}}
    assert add_counts([one, two]) == {
        "in": 7,
        "out": 2,
        "filtered": {"a": 2, "b": 1},
        "quarantined": {"x": 1, "y": 1},
    }
    assert add_counts([]) == {"in": 0, "out": 0, "filtered": {}, "quarantined": {}}


def test_steps_feed_one_another(tmp_path: Path) -> None:
    run = local_run(tmp_path)
    first = sieve(run, 3, 3, fates="kkf")
    again = run.map("again", first, [Sieve("kf")], to=ParquetFormat())
    assert keys(again) == ["k0", "k4"]
    assert again.artifact.manifest["spec"]["input"] == first.identity


def test_an_open_run_holds_its_folder_and_closes_the_executor(tmp_path: Path) -> None:
    with open_run(LocalStore(tmp_path), Backwards(), seed=4) as run:
        assert run.seed == 4
        with (
            pytest.raises(RunError, match="output-busy"),
            open_run(LocalStore(tmp_path), Backwards()),
        ):
            pass
    with pytest.raises(ZeroDivisionError), open_run(LocalStore(tmp_path), Backwards()):
        raise ZeroDivisionError
    assert DONE.count("closed") >= 2


def test_a_publication_is_known_by_its_kind_and_products(tmp_path: Path) -> None:
    run = local_run(tmp_path)
    one, two = sieve(run, 2).artifact, sieve(run, 3).artifact
    assert not run.published("things", {"a": one})
    published = run.publish("things", {"a": one}, {"about": 1}, b"<html>")
    assert run.published("things", {"a": one})
    for kind, products in (("others", {"a": one}), ("things", {"b": one}), ("things", {"a": two})):
        assert not run.published(kind, products)
    assert published.read("report.html") == b"<html>"
    assert published.product("a").store.url == one.store.url
    entry = FileEntry.of(run.out, f"{one.name}/manifest.json")
    assert published.files[entry.path] == entry
    (folder_of(one) / "manifest.json").write_text("{}")
    assert not run.published("things", {"a": one})
    with pytest.raises(RunError, match="missing or damaged"):
        published.product("a")
