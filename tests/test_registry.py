"""Plug-ins by name."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import registry as module
from pipeline.errors import UsageError
from pipeline.orchestration.executor import executors
from pipeline.recipes import recipes
from pipeline.registry import Registry
from pipeline.storage.formats import formats


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Entry points by group and name, as another distribution would declare them."""
    declared: dict[str, Any] = {}

    def found(group: str) -> list[Any]:
        return [
            SimpleNamespace(name=name, load=lambda value=value: value)
            for name, value in declared.get(group, {}).items()
        ]

    monkeypatch.setattr(module, "entry_points", found)
    return declared


def test_nothing_is_imported_before_it_is_asked_for() -> None:
    sys.modules.pop("colorsys", None)
    names: Registry[Any] = Registry("thing", {"a": "colorsys:rgb_to_hsv"})
    assert list(names) == ["a"]
    assert "a" in names
    assert "colorsys" not in sys.modules
    assert names.get("a") is sys.modules["colorsys"].rgb_to_hsv


def test_an_unknown_name_offers_the_nearest_and_lists_all() -> None:
    names: Registry[Any] = Registry("thing", {"zarr": "json:dumps", "parquet": "json:loads"})
    with pytest.raises(UsageError, match=r"Did you mean 'parquet'\? Known: parquet, zarr") as error:
        names.get("parket")
    assert error.value.code == "unknown-thing"
    assert error.value.exit_code == 2


def test_entry_points_add_names_and_built_in_names_win(entries: dict[str, Any]) -> None:
    entries["pipeline.things"] = {"b": 42, "a": 43}
    names: Registry[Any] = Registry("thing", {"a": "json:dumps"})
    assert list(names) == ["a", "b"]
    assert names.get("b") == 42
    assert names.get("a") is not entries["pipeline.things"]["a"]
    assert "c" not in names


@pytest.mark.parametrize("registry", [executors, formats, recipes], ids=lambda r: r.kind)
def test_every_built_in_entry_can_be_imported(registry: Registry[Any]) -> None:
    assert list(registry)
    for name in registry:
        assert registry.get(name) is not None


def test_formats_are_registered_by_their_own_name() -> None:
    assert {name: formats.get(name).name for name in formats} == {name: name for name in formats}
