"""Configurations: typed, frozen, merged and read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.config import (
    Config,
    TrainConfig,
    build,
    dump_yaml,
    merge,
    parse_assignments,
    read_yaml,
)
from pipeline.errors import UsageError
from pipeline.recipes.distill import DistillConfig

NAMES = st.sampled_from("abc")
TREES = st.recursive(
    st.dictionaries(NAMES, st.integers()),
    lambda inner: st.dictionaries(NAMES, st.integers() | inner),
    max_leaves=8,
)


class Outer(Config):
    name: str = "x"
    train: TrainConfig = TrainConfig()


def leaves(tree: dict[str, Any], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], int]:
    found: dict[tuple[str, ...], int] = {}
    for key, value in tree.items():
        inner = isinstance(value, dict)
        found |= leaves(value, (*path, key)) if inner else {(*path, key): value}
    return found


@given(TREES, TREES)
def test_merge_takes_every_leaf_of_the_upper_and_what_it_does_not_cover(
    base: dict[str, Any], over: dict[str, Any]
) -> None:
    before = repr(base), repr(over)
    merged = leaves(merge(base, over))
    assert merged.items() >= leaves(over).items()
    for path, value in leaves(base).items():
        covered = any(path[: len(o)] == o or o[: len(path)] == path for o in leaves(over))
        assert covered or merged.get(path, value) == value
    assert set(merged) <= set(leaves(base)) | set(leaves(over))
    assert (repr(base), repr(over)) == before
    assert merge(base, {}) == base
    assert merge(merge(base, over), over) == merge(base, over)


def test_assignments_nest_and_later_ones_win() -> None:
    given_ = ["a.b=1", "a.c=[1, 2]", "d=x=y", "a.b=2.5", "e=", "f=true", "g=null"]
    expected = {"a": {"b": 2.5, "c": [1, 2]}, "d": "x=y", "e": None, "f": True, "g": None}
    assert parse_assignments(given_) == expected
    assert parse_assignments(["a=*"]) == {"a": "*"}


@pytest.mark.parametrize("text", ["a", "=1", "a..b=1", ".a=1", "a.=1"])
def test_what_is_no_assignment_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="bad-assignment"):
        parse_assignments([text])


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ({"nmae": 1}, "nmae"),
        ({"train": {"epochs": 0}}, r"train\.epochs"),
        ({"train": {"optimizer": "adam"}}, r"train\.optimizer"),
        ({"train": {"lr": "fast"}}, r"train\.lr"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(values: dict[str, Any], place: str) -> None:
    with pytest.raises(UsageError, match=place) as error:
        build(Outer, values)
    assert error.value.code == "bad-config"


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        TrainConfig().lr = 1.0  # type: ignore[misc]


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = build(DistillConfig, {"ipc": 3, "image": {"size": 8, "mean": [0.1], "std": [0.2]}})
    (tmp_path / "c.yaml").write_text(dump_yaml(config))
    assert build(DistillConfig, read_yaml(tmp_path / "c.yaml")) == config


@pytest.mark.parametrize(
    "text", [b"- a\n- b\n", b"a: [", b"\xff\xfe", b"a: !!python/object/apply:os.getcwd []\n", b""]
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(text)
    with pytest.raises(UsageError, match="bad-config-file"):
        read_yaml(path)
    with pytest.raises(UsageError, match="bad-config-file"):
        read_yaml(tmp_path / "none.yaml")
