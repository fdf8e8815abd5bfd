"""Intervals of percentiles, pairs, and shares of variance."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from planner.bootstrap import Source, paired_difference, percentile_intervals, variance_shares


def test_intervals_of_independent_latencies_cover_the_true_percentile_about_as_often_as_they_say() -> None:
    hits = 0
    rng = np.random.default_rng(1)
    for seed in range(40):
        found = percentile_intervals(rng.exponential(1.0, 900), levels=(0.9,), block=1, seed=seed)[0.9]
        hits += found.low <= stats.expon.ppf(0.9) <= found.high
    # 95 % of 40 is 38; fewer than 32 would happen once in 7,000 (binomial)
    assert hits >= 32


def test_blocks_make_intervals_wider_where_neighbours_are_alike() -> None:
    rng = np.random.default_rng(2)
    bursts = np.repeat(rng.exponential(1.0, 100), 30)
    alone = percentile_intervals(bursts, levels=(0.95,), block=1)[0.95]
    blocks = percentile_intervals(bursts, levels=(0.95,))[0.95]
    assert blocks.high - blocks.low > 2 * (alone.high - alone.low)


def test_too_few_requests_have_no_interval_and_none_at_all_are_refused() -> None:
    found = percentile_intervals(np.arange(1.0, 31.0))
    assert found[0.5].mean == 15.5
    assert math.isnan(found[0.5].low)
    with pytest.raises(ValueError, match="at least one"):
        percentile_intervals(np.zeros(0))


def test_pairs_see_a_difference_that_two_intervals_hide() -> None:
    rng = np.random.default_rng(3)
    common = rng.normal(100.0, 10.0, 12)
    first, second = common + rng.normal(0, 0.1, 12), common + 0.5 + rng.normal(0, 0.1, 12)
    found = paired_difference(first.tolist(), second.tolist())
    assert 0.0 < found.low < 0.5 < found.high < 1.0
    with pytest.raises(ValueError, match="as many of each"):
        paired_difference([1.0], [1.0, 2.0])


def test_a_missing_source_has_no_share_and_the_others_sum_to_one() -> None:
    shares = variance_shares(
        [Source("days", (), "too short"), Source("profile", (1.0, 3.0)), Source("noise", (1.0, 2.0))]
    )
    assert shares["days"] == 0.0
    assert shares["profile"] == pytest.approx(0.8)  # variances 2 and 0.5
    assert sum(shares.values()) == pytest.approx(1.0)
