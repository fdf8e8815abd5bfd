"""The stated power is the power: repeated tests of the stated size find the difference as often as they say."""

from __future__ import annotations

import numpy as np
import pytest

from planner.power import DURATION_MAX_H, Group, detectable, group_of

Z_TWO_SIDED = 1.959964 + 0.841621  # 97.5 % and 80 % quantiles of the normal law


def test_equal_groups_need_the_textbook_number() -> None:
    size = detectable(Group(5, 4.0, 1.0), Group(4, 4.0, 1.0), -1.0, 1000.0, is_one_sided=False, shares=(0.5,))
    assert size is not None
    # n a group = 2 z² σ² / δ² = 62.8, but never fewer than 100 in the smaller group
    assert 2 * Z_TWO_SIDED**2 * 4 < 100
    assert (size.n_new, size.n_old) == (100, 100)
    harder = detectable(Group(5, 4.0, 1.0), Group(4.5, 4.0, 1.0), -0.5, 1000.0, is_one_sided=False, shares=(0.5,))
    assert harder is not None
    assert harder.n_new == pytest.approx(2 * Z_TWO_SIDED**2 * 4 / 0.25, abs=1.5)


def test_tests_of_the_stated_size_find_the_difference_four_times_in_five() -> None:
    old, new = Group(5.0, 4.0, 1.0), Group(4.6, 1.0, 1.0)
    size = detectable(old, new, -0.4, 1000.0, is_one_sided=False, shares=(0.2,))
    assert size is not None
    rng = np.random.default_rng(4)
    n_tests = 2000
    a = rng.normal(5.0, 2.0, (n_tests, size.n_old))
    b = rng.normal(4.6, 1.0, (n_tests, size.n_new))
    z = (b.mean(axis=1) - a.mean(axis=1)) / np.sqrt(4.0 / size.n_old + 1.0 / size.n_new)
    # binomial standard error of 2000 tests at 0.8 is 0.009: four of them
    assert float((np.abs(z) > 1.959964).mean()) == pytest.approx(0.8, abs=0.036)


def test_the_smallest_share_that_fits_fourteen_days_is_taken() -> None:
    old = new = Group(5.0, 25.0, 1.0)
    size = detectable(old, new, -0.1, 300.0, is_one_sided=False)
    assert size is not None
    assert size.duration_h <= DURATION_MAX_H
    smaller = detectable(old, new, -0.1, 300.0, is_one_sided=False, shares=(size.share_ratio / 2,))
    assert smaller is None


def test_a_difference_that_no_test_shows_has_none() -> None:
    assert detectable(Group(5, 25, 1), Group(5, 25, 1), -1e-4, 10.0, is_one_sided=False) is None
    assert detectable(Group(5, 25, 1), Group(5, 25, 1), 0.0, 10.0, is_one_sided=False) is None


def test_requests_that_come_in_runs_have_a_design_effect_of_about_the_run() -> None:
    rng = np.random.default_rng(1)
    independent = group_of(rng.normal(5, 1, 40_000))
    in_runs = group_of(np.repeat(rng.normal(5, 1, 4_000), 10))
    # 200 batch means: their variance is known to 10 % (√(2/199)); four of them
    assert independent.design_effect == pytest.approx(1.0, abs=0.4)
    assert in_runs.design_effect == pytest.approx(10.0, rel=0.4)
