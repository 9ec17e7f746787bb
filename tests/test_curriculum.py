"""How small a crop may be: the schedules of CDA."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.dataset_distill.curriculum import min_scale

KINDS = ["step", "linear", "cosine"]
TOTAL = 4000


def at(step: int, kind: Any, milestone: float = 1.0, floor: float = 0.08) -> float:
    return min_scale(step, TOTAL, kind=kind, milestone=milestone, floor=floor)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("cosine", [1.0, 0.8653, 0.54, 0.2147, 0.08]),
        ("linear", [1.0, 0.77, 0.54, 0.31, 0.08]),
        ("step", [1.0, 1.0, 1.0, 1.0, 0.08]),
    ],
)
def test_values_at_the_quarters(kind: str, values: list[float]) -> None:
    assert [at(TOTAL * q // 4, kind) for q in range(5)] == pytest.approx(values, abs=5e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_milestone_zero_is_constant(kind: str) -> None:
    assert {at(step, kind, milestone=0) for step in range(0, TOTAL, 100)} == {0.08}


@pytest.mark.parametrize("kind", KINDS)
def test_the_milestone_stretches_the_schedule(kind: str) -> None:
    for step in range(0, TOTAL // 2, 50):
        assert at(step, kind, milestone=0.5) == pytest.approx(at(2 * step, kind))
    assert {at(step, kind, milestone=0.5) for step in range(TOTAL // 2, TOTAL, 50)} == {0.08}


@given(
    st.sampled_from(KINDS),
    st.integers(0, TOTAL - 1),
    st.floats(0, 1),
    st.floats(0.01, 1),
)
def test_it_falls_from_one_to_the_floor(
    kind: str, step: int, milestone: float, floor: float
) -> None:
    now, later = at(step, kind, milestone, floor), at(step + 1, kind, milestone, floor)
    assert floor - 1e-12 <= later <= now + 1e-12 <= 1 + 2e-12
    if milestone:
        assert at(0, kind, milestone, floor) == pytest.approx(1)
