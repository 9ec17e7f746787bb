"""How lengths are chosen, against trying everything."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from pipeline.errors import UsageError
from pipeline.tokenizers.lengths import (
    LengthRule,
    byte_costs,
    candidates,
    lagrangian,
    multiplier_for,
    threshold,
)
from pipeline.tokenizers.tokens import form_of_bits, form_of_vocabulary


def curves(count: int, seed: int = 0) -> np.ndarray:
    """Errors of images of unlike difficulty; more tokens do not always help."""
    rng = np.random.default_rng(seed)
    scale, decay = rng.uniform(0.1, 3, (count, 1)), rng.uniform(0.1, 1.2, (count, 1))
    falling = scale * np.exp(-decay * np.arange(6))
    return np.asarray(falling * rng.uniform(0.8, 1.2, falling.shape))


COSTS = np.array([1.0, 2, 3, 5, 8, 13])


def test_no_other_choice_of_the_same_cost_has_less_error() -> None:
    """Of five images, all 6^5 choices are tried."""
    errors = curves(5)
    every = np.array(list(itertools.product(range(6), repeat=5)))
    costs = COSTS[every].sum(1)
    totals = errors[np.arange(5), every].sum(1)
    for multiplier in (0.003, 0.01, 0.03, 0.1):
        chosen = lagrangian(errors, COSTS, multiplier)
        cost, total = COSTS[chosen].sum(), errors[np.arange(5), chosen].sum()
        assert total <= totals[costs <= cost].min() + 1e-12


@pytest.mark.parametrize("budget", [1.0, 1.7, 4.0, 12.9, 13.0, 20.0])
def test_a_budget_is_kept_and_used(budget: float) -> None:
    errors = curves(2000)
    multiplier = multiplier_for(errors, COSTS, budget)
    cost = COSTS[lagrangian(errors, COSTS, multiplier)].mean()
    assert cost <= budget
    best = COSTS[errors.argmin(1)].mean()
    assert cost == best if budget >= best else cost > budget - 0.02


def test_spending_where_it_helps_beats_one_length_for_all() -> None:
    errors = curves(2000)
    for place, budget in enumerate(COSTS[1:-1], 1):
        chosen = lagrangian(errors, COSTS, multiplier_for(errors, COSTS, float(budget)))
        assert errors[np.arange(2000), chosen].mean() < errors[:, place].mean()


def test_less_than_one_token_is_refused() -> None:
    with pytest.raises(UsageError) as caught:
        multiplier_for(curves(3), COSTS, 0.5)
    assert caught.value.code == "budget-too-small"


def test_a_threshold_takes_the_first_length_that_is_good_enough() -> None:
    errors = np.array([[9.0, 4, 5, 3], [1, 2, 0, 0], [9, 7, 8, 7.5]])
    assert threshold(errors, 4.0).tolist() == [1, 0, 1]  # the last image: the best that it has


def test_candidates_reach_from_one_token_to_all() -> None:
    for most in (1, 2, 7, 32, 128, 256):
        found = candidates(most)
        assert found[0] == 1
        assert found[-1] == most
        assert found == sorted(set(found))
        assert len(found) <= 16


def test_bytes_count_those_that_say_how_long_an_image_is() -> None:
    assert byte_costs(form_of_bits(12, 32), [1, 2, 3]).tolist() == [3, 4, 6]
    assert byte_costs(form_of_vocabulary(4096, 256), [256]).tolist() == [386]


def test_rules_by_place() -> None:
    form = form_of_bits(8, 4)
    errors = np.array([[4.0, 1, 0.9], [2, 1.9, 0]])
    rule = LengthRule("lagrangian", 0.5, (1, 2, 4))
    assert rule.places(errors, form).tolist() == [1, 2]
    assert LengthRule("threshold", 2.0, (1, 2, 4)).places(errors, form).tolist() == [1, 0]
