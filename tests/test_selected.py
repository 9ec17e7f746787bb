"""A selection is a list of keys, and every recipe and loader obeys it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from layouts import column
from samples import encoded, keyed, local_run, pixels

import pipeline
from pipeline.api import resume
from pipeline.datasets import find_dataset, with_selection
from pipeline.errors import RunError, UsageError
from pipeline.storage.artifact import ArtifactSource
from pipeline.storage.parquet import ParquetFormat
from pipeline.storage.selected import SelectedSource
from pipeline.storage.source import TableSource
from pipeline.testing import check_source


def selection(out: Path, *keys: str) -> ArtifactSource:
    """The output of a step named ``selection``."""
    source = TableSource((("00000", pa.table({"key": pa.array(keys, pa.string())})),))
    return local_run(out).map("selection", source, [], to=ParquetFormat())


def folder(root: Path, rows: int = 12) -> Path:
    for row in range(rows):
        path = root / "train" / "ab"[row % 2] / f"{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(pixels(1, 8, seed=row)[0]))
    return root


def test_only_selected_samples_are_read_in_the_order_of_the_source(tmp_path: Path) -> None:
    base = keyed(3, 3, 2)
    source = SelectedSource(base, selection(tmp_path, "k7", "k1", "k0", "k9").artifact)
    assert column(source, "key") == ["k0", "k1", "k7"]
    assert source.classes == base.classes
    assert source.take(source.shards[0], ["k1", "k2"])["key"].to_pylist() == ["k1"]
    check_source(source)


def test_sources_that_need_to_know_their_rows_are_told(tmp_path: Path) -> None:
    digits = find_dataset("digits", None).train
    keys = column(digits, "key")[::100]
    source = SelectedSource(digits, selection(tmp_path, *keys).artifact)
    assert column(source, "key") == keys
    check_source(source)


def test_another_selection_is_another_source(tmp_path: Path) -> None:
    base = keyed(3, 3)
    one, same, other = (
        SelectedSource(base, selection(tmp_path / str(n), *keys).artifact)
        for n, keys in enumerate((("k1", "k4"), ("k1", "k4"), ("k1", "k5")))
    )
    assert one.identity == same.identity
    assert len({one.identity, other.identity, base.identity}) == 3


def test_recipes_use_the_selected_samples_alone(tmp_path: Path) -> None:
    chosen = selection(tmp_path / "s", "a/0.png", "b/3.png", "a/10.png")
    place = folder(tmp_path / "pictures")
    summary = pipeline.run(
        "convert", str(place), out=tmp_path / "out", selection=chosen.artifact.store.url
    )
    assert summary["train"]["in"] == summary["train"]["out"] == 3
    kept = find_dataset(str(tmp_path / "out"), None).train
    assert sorted(column(kept, "key")) == ["a/0.png", "a/10.png", "b/3.png"]
    # Found again by whoever resumes it.
    again: dict[str, Any] = resume(tmp_path / "out")
    assert again["train"] == summary["train"]


def test_a_selection_of_another_data_set_is_refused(tmp_path: Path) -> None:
    chosen = selection(tmp_path / "s", "k1", "k2")
    place = folder(tmp_path / "pictures")
    with pytest.raises(RunError, match="None of the 2 samples") as caught:
        pipeline.run(
            "convert", str(place), out=tmp_path / "out", selection=chosen.artifact.store.url
        )
    assert caught.value.code == "other-selection"
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_what_is_no_selection_is_refused(tmp_path: Path) -> None:
    dataset = find_dataset("digits", None)
    other = local_run(tmp_path).map("other", keyed(2), [], to=ParquetFormat())
    with pytest.raises(UsageError, match="no selection") as caught:
        with_selection(dataset, other.artifact.store.url)
    assert caught.value.code == "no-selection"
    with pytest.raises(UsageError, match="no finished output"):
        with_selection(dataset, tmp_path / "nothing")
