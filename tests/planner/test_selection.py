"""Repetitions go where they decide something, and the probability of a right choice is neither hidden nor flattered."""

from __future__ import annotations

import numpy as np
import pytest

from planner.selection import (
    correct_selection_probability,
    feasibility_repetitions,
    ocba_repetitions,
    probability_at_least,
)


def test_the_published_example_of_ocba_is_reproduced() -> None:
    # SPOT's manual: five alternatives with these estimates after these repetitions, 100 more
    extra = ocba_repetitions((1.2, 2.1, 3.4, 4.87, 6.05), (3.3, 2.0, 4.5, 5.3, 6.9), (12, 6, 5, 5, 4), 100)
    assert extra == [48, 38, 11, 2, 1]


def test_who_has_too_many_repetitions_already_gets_none_and_all_are_given_out() -> None:
    extra = ocba_repetitions((1.0, 1.5, 4.0), (1.0, 1.0, 1.0), (2, 2, 60), 20)
    assert extra[2] == 0
    assert sum(extra) == 20


@pytest.mark.parametrize(("means", "variances"), [((1.0,), (1.0,)), ((1.0, 1.0), (1.0, 1.0)), ((1.0, 2.0), (1.0, 0.0))])
def test_what_ocba_cannot_divide_is_refused(means: tuple[float, ...], variances: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="one smallest mean"):
        ocba_repetitions(means, variances, [5] * len(means), 10)


def test_repetitions_go_to_the_allocation_nearest_to_the_promise() -> None:
    extra = feasibility_repetitions((0.001, -0.01, 0.05), (0.01, 0.01, 0.01), (5, 5, 5), 30)
    assert extra[0] > extra[1] >= extra[2]
    assert sum(extra) == 30
    assert feasibility_repetitions((0.1, 0.2), (0.0, 0.0), (5, 5), 30) == [0, 0]


def test_the_probability_of_meeting_the_target_has_the_coverage_of_a_t_interval() -> None:
    # with a flat prior, P(mean ≥ truth) is uniform over data sets: its mean is 1/2 ± 4 standard errors of 1/√12/√2000
    rng = np.random.default_rng(3)
    found = [probability_at_least(rng.normal(0.95, 0.01, 5).tolist(), 0.95) for _ in range(2000)]
    assert np.mean(found) == pytest.approx(0.5, abs=4 * 0.2887 / 2000**0.5)
    assert np.mean(np.array(found) < 0.05) == pytest.approx(0.05, abs=4 * (0.05 * 0.95 / 2000) ** 0.5)


def test_a_certain_outcome_is_certain_and_one_value_says_nothing() -> None:
    assert probability_at_least([1.0, 1.0, 1.0], 0.99) == 1.0
    assert probability_at_least([0.5, 0.5], 0.99) == 0.0
    with pytest.raises(ValueError, match="two or more"):
        probability_at_least([1.0], 0.99)


def test_a_wrong_choice_is_either_a_miss_or_a_cheaper_one_passed_over() -> None:
    assert correct_selection_probability(0.99, []) == pytest.approx(0.99)
    assert correct_selection_probability(0.99, [0.02, 0.03]) == pytest.approx(0.94)
    assert correct_selection_probability(0.5, [0.9]) == 0.0
