"""The surface of what a form misses: exact at measured sizes, continuous between, flat beyond."""

from __future__ import annotations

import numpy as np
import pytest

from calibrate.surface import surface_ratio

POINTS = ((1.0, 0.25), (4.0, 0.25), (2.0, 1.0), (8.0, 1.0), (2.0, 0.5625))
RATIOS = (0.9, 1.1, 1.02, 0.98, 1.2)


def at(batch: float, megapixels: float) -> float:
    return float(surface_ratio(POINTS, RATIOS, np.array([batch, megapixels])))


def test_at_every_measured_size_it_is_the_measured_ratio() -> None:
    assert surface_ratio(POINTS, RATIOS, np.array(POINTS)) == pytest.approx(RATIOS, rel=1e-12)


def test_halfway_on_both_scales_it_is_the_geometric_mean() -> None:
    assert at(2.0, 0.25) == pytest.approx(np.sqrt(0.9 * 1.1))
    # half way from 0.5625 to 1 on a logarithmic scale is 0.75
    assert at(2.0, 0.75) == pytest.approx(np.sqrt(1.2 * 1.02))


def test_beyond_the_measured_sizes_it_stays_as_at_the_nearest() -> None:
    assert at(64.0, 4.0) == pytest.approx(0.98)
    assert at(0.5, 0.1) == pytest.approx(0.9)
    # one batch only was measured at 0.5625
    assert at(16.0, 0.5625) == pytest.approx(1.2)


def test_it_has_no_jumps() -> None:
    rng = np.random.default_rng(3)
    where = np.exp2(rng.uniform([0, -2.5], [4, 0.5], size=(500, 2)))
    moved = where * np.exp2(1e-7 * rng.standard_normal(where.shape))
    # at most a factor of 1.33 over log2(1 / 0.5625) = 0.83: a slope below 0.6, four standard deviations of both steps
    assert np.abs(np.log2(surface_ratio(POINTS, RATIOS, moved) / surface_ratio(POINTS, RATIOS, where))).max() < 1e-6


def test_one_measured_size_is_a_factor_everywhere() -> None:
    assert surface_ratio(((2.0, 1.0),), (1.3,), np.array([[1.0, 0.25], [8.0, 2.0]])) == pytest.approx([1.3, 1.3])
