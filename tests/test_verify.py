"""Damage is found, set aside and made good; garbage is found and nothing else is."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY
from samples import encoded, pixels

import pipeline
from pipeline.cli import main
from pipeline.errors import RunError
from pipeline.orchestration.garbage import find_garbage
from pipeline.orchestration.verify import verify
from pipeline.storage.artifact import Artifact
from pipeline.storage.open_source import open_source
from pipeline.storage.records import to_table
from pipeline.storage.store import open_store
from pipeline.testing import tree_digest


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("source")
    for row in range(12):
        path = root / f"class{row % 3}" / f"{row}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(pixels(1, seed=row)[0]))
    (root / "class0" / "bad.png").write_bytes(b"bad")
    return root


@pytest.fixture(scope="module", params=["webdataset", "zarr", "parquet", "folder"])
def finished(
    source: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Path:
    """A conversion with something in quarantine, and the checkpoint of a training beside it."""
    out = tmp_path_factory.mktemp("out") / "run"
    config = {"format": request.param, "encode": "png"}
    pipeline.run("convert", str(source), out=out, config=config, max_bad=1)
    return out


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def command(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = main([*words, "--json"])
    return code, json.loads(capsys.readouterr().out)


def listed(out: Path) -> list[Path]:
    """Every file but the lock, the logs and what is recorded of the command."""
    others = {out / ".run", out / ".run" / "logs", out / ".run" / "live"}
    return [p for p in sorted(out.rglob("*")) if p.is_file() and p.parent not in others]


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place // 8] ^= 1 << place % 8
    path.write_bytes(data)


def test_a_whole_output_is_whole(out: Path) -> None:
    for share in (0.0, 1.0):
        found = verify(open_store(out), share)
        assert not found.damaged
        assert not found.unlisted
    everything = {path.relative_to(out).as_posix() for path in listed(out)}
    steps = {path.name for path in out.iterdir() if path.is_dir() and path.name != ".run"}
    manifests = 1 + len(steps)
    ledger = sum(".run" in path.parts for path in listed(out))
    data = len(everything) - manifests - ledger
    # The run's manifest lists the report and its products' manifests, which are then read twice.
    assert found.read >= data + ledger
    assert verify(open_store(out)).read == 0


def test_one_flipped_bit_in_any_file_is_found(out: Path) -> None:
    rng = random.Random(0)
    for path in listed(out):
        whole = path.read_bytes()
        for place in {0, len(whole) * 8 - 1, rng.randrange(len(whole) * 8)}:
            flip(path, place)
            found = verify(open_store(out), 1.0).damaged
            assert path.relative_to(out).as_posix() in found, path
            path.write_bytes(whole)
    assert not verify(open_store(out), 1.0).damaged


def test_missing_and_cut_files_are_found_without_reading(out: Path) -> None:
    for path in [p for p in listed(out) if ".run" not in p.parts and p.name != "manifest.json"]:
        whole = path.read_bytes()
        path.unlink()
        name = path.relative_to(out).as_posix()
        assert verify(open_store(out)).damaged == {name: "It is missing."}
        path.write_bytes(whole[:-1])
        assert list(verify(open_store(out)).damaged) == [name]
        path.write_bytes(whole)


def test_one_step_is_verified_alone(out: Path) -> None:
    step = next(path for path in out.iterdir() if path.name.startswith("train-"))
    assert not verify(open_store(step), 1.0).damaged
    file = next(path for path in listed(step) if path.name != "manifest.json")
    flip(file, 9)
    assert list(verify(open_store(step), 1.0).damaged) == [file.relative_to(step).as_posix()]


def test_a_file_that_no_manifest_lists_is_reported_and_is_garbage(out: Path) -> None:
    step = next(path for path in out.iterdir() if path.name.startswith("train-"))
    (step / "late.tar").write_bytes(b"zombie")
    (out / "notes.txt").write_text("mine")
    (out / "my-folder").mkdir()
    (out / "my-folder" / "a.txt").write_text("mine")
    found = verify(open_store(out), 1.0)
    assert not found.damaged
    assert f"{step.name}/late.tar" in found.unlisted
    groups = find_garbage(open_store(out))
    assert [[f.name for f in g.files] for g in groups] == [[f"{step.name}/late.tar"]]


def test_damage_is_repaired_to_the_same_bytes(
    out: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(1)
    for path in listed(out):
        if rng.random() < 0.5:
            flip(path, rng.randrange(path.stat().st_size * 8))
        elif path.suffix in {".tar", ".parquet", ".png"}:
            path.unlink()
    damaged = set(verify(open_store(out), 1.0).damaged)
    code, found = command(capsys, "repair", str(out))
    assert code == 0
    assert set(found["repaired"]) >= damaged
    assert tree_digest(out) == tree_digest(finished)
    assert command(capsys, "verify", str(out), "--deep")[0] == 0
    code, found = command(capsys, "repair", str(out))
    assert (code, found["repaired"]) == (0, {})


def test_verify_says_what_is_damaged(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(out)]) == 0
    assert main(["verify", str(out), "--subset", "100%"]) == 0
    assert "all are whole" in capsys.readouterr().out
    flip(out / "manifest.json", 100)
    assert main(["verify", str(out), "--deep"]) == 1
    assert "damaged: manifest.json" in capsys.readouterr().out


def test_garbage_goes_only_when_told_to(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    for quality in (50, 60):
        config = {"format": "zarr", "encode": "jpeg", "quality": quality}
        pipeline.run("convert", str(source), out=out, config=config, max_bad=1)
    (out / ".run" / "unfinished" / "x").mkdir(parents=True)
    (out / ".run" / "unfinished" / "x" / "half.tar").write_bytes(b"half")
    before = tree_digest(out)
    code, found = command(capsys, "gc", str(out))
    assert (code, found["deleted"]) == (0, False)
    assert set(found["groups"]) == {"left by processes that died"}
    _, found = command(capsys, "gc", str(out), "--snapshots")
    assert set(found["groups"]) == {"left by processes that died", "earlier snapshots"}
    assert tree_digest(out) == before
    command(capsys, "gc", str(out), "--delete")
    assert not list((out / ".run" / "unfinished").rglob("*.tar"))
    assert tree_digest(out) == before
    assert command(capsys, "verify", str(out), "--deep")[0] == 0
    command(capsys, "gc", str(out), "--delete", "--snapshots")
    assert {path.name.rpartition("-")[0] for path in out.iterdir() if path.is_dir()} == {
        "",
        "train",
        "train-samples",
    }
    assert command(capsys, "verify", str(out), "--deep")[0] == 0
    command(capsys, "gc", str(out), "--delete", "--intermediate")
    assert [path.name.rpartition("-")[0] for path in out.iterdir() if path.is_dir()] in (
        ["train", ""],
        ["", "train"],
    )
    assert command(capsys, "verify", str(out), "--deep")[0] == 0
    code, found = command(capsys, "gc", str(out), "--intermediate")
    assert found["groups"] == {}
    config = {"format": "zarr", "encode": "jpeg", "quality": 60}
    pipeline.run("convert", str(source), out=out, config=config, max_bad=1)
    assert command(capsys, "verify", str(out), "--deep")[0] == 0


def test_a_distillation_is_verified_and_repaired(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    pipeline.run("distill", "digits", out=out, config={**TINY, "ipc": 2, "seeds": 1})
    before = tree_digest(out)
    for pattern in ("teacher-*/model/weights.safetensors", "images-*/00001.tar", "report.html"):
        flip(next(out.glob(pattern)), 4001)
    code, found = command(capsys, "repair", str(out))
    assert (code, len(found["repaired"])) == (0, 3)
    assert tree_digest(out) == before


@pytest.mark.parametrize("name", ["verify", "repair", "retry", "gc"])
def test_what_is_no_output_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert main([name, str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.fixture
def recovered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """Of three files of a list the second came late, was taken up, and the third never came."""
    (tmp_path / "list.txt").write_text("a.png\nb.png\nc.png")
    (tmp_path / "a.png").write_bytes(encoded(pixels(1)[0]))
    out = tmp_path / "out"
    pipeline.run("convert", str(tmp_path / "list.txt"), out=out, max_bad=2)
    (tmp_path / "b.png").write_bytes(encoded(pixels(1, seed=1)[0]))
    assert command(capsys, "retry", str(out))[1]["train"]["out"] == 2
    return out


def test_repair_keeps_what_was_recovered(
    recovered: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree_digest(recovered)
    flip(next(recovered.glob("train-*-retry1/*.tar")), 600 * 8)
    assert command(capsys, "repair", str(recovered))[0] == 0
    assert tree_digest(recovered) == before


def test_what_was_added_to_another_output_is_not_added_twice(
    recovered: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the time the first round is made anew, the second file is there from the start."""
    first = next(p for p in recovered.glob("train-*") if "retry" not in p.name)
    flip(next(first.glob("*.tar")), 600 * 8)
    assert command(capsys, "repair", str(recovered))[0] == 0
    (recovered.parent / "c.png").write_bytes(encoded(pixels(1, seed=2)[0]))
    for keys in (["a.png", "b.png"], ["a.png", "b.png", "c.png"]):
        source = open_source(recovered, "train")
        assert source
        assert [key for table in source.tables() for key in table["key"].to_pylist()] == keys
        assert command(capsys, "verify", str(recovered), "--deep")[0] == 0
        command(capsys, "retry", str(recovered))


def test_what_cannot_be_made_anew_is_not_set_aside(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(out / ".run")
    flip(next(path for path in listed(out) if path.name != "manifest.json"), 3)
    before = tree_digest(out)
    assert main(["repair", str(out)]) == 2
    assert "no-command" in capsys.readouterr().err
    assert tree_digest(out) == before


def test_an_unfinished_run_has_no_garbage(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (out / "manifest.json").unlink()
    assert main(["gc", str(out), "--delete"]) == 2
    assert "unfinished-run" in capsys.readouterr().err


def test_what_an_attempt_left_in_the_way_is_repaired(
    out: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A worker died between giving a file its name and recording it, and the input has changed."""
    step = next(path for path in out.iterdir() if path.name.startswith("train-"))
    (out / "manifest.json").unlink()
    (step / "manifest.json").unlink()
    shutil.rmtree(out / ".run" / step.name / "ledger")
    (out / ".run" / step.name / "ledger").mkdir()
    (out / ".run" / step.name / "ledger" / "stale.txt").write_text("")
    file = next(path for path in listed(step) if path.suffix != ".json" or path.parent != step)
    flip(file, 3)
    assert main(["retry", str(out)]) == 1
    assert "commit-conflict" in capsys.readouterr().err
    assert command(capsys, "repair", str(out))[0] == 0
    assert tree_digest(out) == tree_digest(finished)


def test_a_manifest_cannot_name_files_outside(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    store = open_store(tmp_path / "out")
    entry = {"path": "../secret", "bytes": 6, "sha256": "0" * 64}
    for manifest in (
        {"files": [entry]},
        {"products": {"train": "../other"}},
        {"base": "a/b"},
        {"base": ".."},
    ):
        Artifact.finish(store, {"kind": "table", "identity": "x", **manifest})
        with pytest.raises(RunError, match="damaged-manifest"):
            Artifact.open(store)
    for path in ("../secret", "/etc/passwd"):
        records = to_table([{"index": 0, "name": "a", "files": [{**entry, "path": path}]}])
        artifact = Artifact.finish(store, {"kind": "table", "identity": "x"}, records)
        with pytest.raises(RunError, match="damaged-manifest"):
            artifact.records_table()
