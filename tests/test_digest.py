"""Identities depend on content alone."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import Config
from pipeline.digest import canonical, digest, dumps, seed_for

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@dataclass(frozen=True)
class Step:
    rows: int
    names: tuple[str, ...] = ()

    version: ClassVar[int] = 1


@dataclass(frozen=True)
class Stored:
    identity: str
    path: str


class Settings(Config):
    lr: float = 0.1
    step: Step = Step(1)


def reference(value: Any) -> str:
    return hashlib.sha256(json.dumps([value], sort_keys=True).encode()).hexdigest()


@given(PLAIN)
def test_digest_of_plain_values_is_the_sha256_of_sorted_json(value: Any) -> None:
    assert digest(value) == reference(value)


@given(PLAIN)
def test_dumps_reads_back_and_ends_with_a_newline(value: Any) -> None:
    assert json.loads(dumps(value)) == value
    assert dumps(value).endswith(b"\n")


def test_order_of_insertion_does_not_count_and_order_of_a_list_does() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest([1, 2]) != digest([2, 1])
    assert digest(1, 2) != digest([1, 2])
    assert digest("1") != digest(1)


def test_a_dataclass_counts_with_its_name_fields_and_version() -> None:
    later = type("Step", (Step,), {"version": 2})
    renamed = type("Other", (Step,), {})
    values = [Step(1), Step(2), Step(1, ("a",)), later(1), renamed(1)]
    assert len({digest(value) for value in values}) == len(values)
    fields = {"rows": 1, "names": []}
    assert canonical(Step(1)) == {"type": f"{__name__}.Step", "fields": fields, "version": 1}


def test_a_configuration_counts_with_every_field() -> None:
    assert digest(Settings()) == digest(Settings(lr=0.1))
    assert digest(Settings()) != digest(Settings(lr=0.2))
    assert digest(Settings()) != digest(Settings(step=Step(2)))


def test_what_has_an_identity_counts_by_it_alone() -> None:
    assert digest(Stored("a", "here")) == digest(Stored("a", "there"))
    assert digest(Stored("a", "here")) != digest(Stored("b", "here"))


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", {1: "x"}])
def test_what_has_no_canonical_form_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="identity"):
        digest(value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_json_does_not_know_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        digest(value)


@given(st.lists(st.text() | st.integers(), min_size=1, max_size=3))
def test_seeds_are_63_bit_numbers(parts: list[Any]) -> None:
    assert 0 <= seed_for(*parts) < 2**63
    assert seed_for(*parts) == seed_for(*parts)


def test_seeds_differ_by_each_part() -> None:
    seeds = {seed_for(s, n, k) for s in range(4) for n in ("a", "b") for k in ("x", "y", "ax")}
    assert len(seeds) == 24
    assert seed_for("a", "bc") != seed_for("ab", "c")


def test_another_process_with_another_hash_seed_agrees() -> None:
    code = "from pipeline.digest import digest; print(digest({'b': 1, 'a': [1.5, None, 'x']}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == digest({"a": [1.5, None, "x"], "b": 1})
