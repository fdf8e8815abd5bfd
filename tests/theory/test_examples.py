"""examples/theory: what ``diffplan theory`` runs agrees with the exact answers, and can tell when it does not."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from planner import theory_exact as exact
from planner.theory import check_system
from planner.theory_system import System, load_system, shipped_systems
from traces.problems import InputError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "theory.md"
FILES = shipped_systems()


def shorter(path: Path, **changed: object) -> System:
    """A fifth of the requests or more, so that CI stays short; the intervals are wider, not wrong."""
    system = load_system(path)
    return system.model_copy(update={"n_requests": 2500, **changed})


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_example_lies_inside_its_intervals(path: Path) -> None:
    rows = check_system(shorter(path), path.parent)
    assert rows
    assert [row.quantity for row in rows if not row.is_inside] == []


def test_a_wrong_answer_lies_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    path = next(path for path in FILES if path.stem == "mmck")
    # one place to wait less: theory for another system than the one that runs
    real = exact.mmck
    monkeypatch.setattr(exact, "mmck", lambda rate, mean, n, places: real(rate, mean, n, places - 2))
    assert not all(row.is_inside for row in check_system(shorter(path), path.parent))


def test_the_page_shows_the_exact_figures_of_the_files() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for path in FILES:
        for row in check_system(shorter(path, n_requests=100, replications=5), path.parent):
            line = next(line for line in text.splitlines() if line.startswith(f"| {row.system} | {row.quantity} |"))
            assert f"| {row.exact:.4f} |" in line
            assert line.endswith("| inside |")


def test_exact_formulas_agree_where_two_of_them_cover_one_system() -> None:
    # M/M/1 by four ways; 1e-9: a few hundred roundings, and 1e-12 of truncated mass
    assert exact.mmc_wait_s(0.7, 1.0, 1) == pytest.approx(exact.mg1_wait_s(0.7, 1.0, 2.0), rel=1e-9)
    assert exact.cobham_waits_s(0.7, [1.0], 1.0, 2.0)[0] == pytest.approx(7 / 3, rel=1e-9)
    assert exact.mmck(0.7, 1.0, 1, 500)[1] == pytest.approx(7 / 3, rel=1e-9)
    # patience without end: Erlang A is Erlang C
    assert exact.erlang_a(3.2, 1.0, 4, 1e4)[1] == pytest.approx(exact.mmc_wait_s(3.2, 1.0, 4), rel=5e-3)  # 1e4 is not ∞
    # M/D/1 is M/G/1 with constant services
    assert exact.mdc_wait_s(0.7, 1.0, 1) == pytest.approx(exact.mg1_wait_s(0.7, 1.0, 1.0), rel=1e-9)
    # equal popularity: every item is held with the same chance
    assert exact.lru_hit_ratio([0.2] * 5, 2) == pytest.approx(0.4, rel=1e-12)


def test_the_moments_of_a_profile_s_noise_are_those_of_its_draws() -> None:
    quantiles = (0.4, 0.5, 0.75, 1.0, 1.25, 1.8, 2.6)
    first, second = exact.noise_moments(quantiles)
    uniform = (np.arange(1_000_000) + 0.5) / 1_000_000  # midpoints: the error of the sum is below 1e-5
    drawn = np.interp(uniform, exact.RESIDUAL_LEVELS, quantiles)
    assert first == pytest.approx(drawn.mean(), rel=1e-5)
    assert second == pytest.approx((drawn**2).mean(), rel=1e-5)


def test_impossible_systems_are_refused_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    service = "service:\n  law: exponential\n  mean_s: 1.0\n"
    path.write_text("name: x\nsystem: mmc\narrivals_per_s: 2\nn_servers: 2\n" + service)
    with pytest.raises(InputError, match="load is 1 of the servers"):
        load_system(path)
    path.write_text("name: x\nsystem: mmck\narrivals_per_s: 2\n" + service)
    with pytest.raises(InputError, match="waiting_places is missing"):
        load_system(path)
    path.write_text("name: x\nsystem: mdc\narrivals_per_s: 0.5\n" + service)
    with pytest.raises(InputError, match="mdc is exact for constant, profile"):
        load_system(path)
    assert math.isfinite(exact.mdc_wait_s(0.9, 1.0, 1))
