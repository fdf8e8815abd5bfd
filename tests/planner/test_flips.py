"""How far something may move before another topology is cheaper: worked out by hand on small numbers."""

from __future__ import annotations

import math

import pytest

from planner.flips import Rival, _law_flips, _price_flips, _traffic_flips

COLOCATED = Rival("colocated", 30, 0, 20.0)
DECOUPLED = Rival("decoupled", 22, 12, 20.0)


def test_controlnet_gpus_at_two_thirds_of_the_price_make_decoupled_cheaper() -> None:
    # 30 = 22 + 12 r
    (flip,) = _price_flips([COLOCATED, DECOUPLED], "colocated")
    assert (flip.winner_until, flip.then) == (pytest.approx(8 / 12, abs=1e-4), "decoupled")


def test_if_decoupled_wins_dearer_controlnet_gpus_end_that() -> None:
    cheaper = Rival("decoupled", 20, 5, 20.0)
    (flip,) = _price_flips([COLOCATED, cheaper], "decoupled")
    assert (flip.winner_until, flip.then) == (2.0, "colocated")


def test_without_controlnet_workers_no_price_changes_the_order() -> None:
    assert _price_flips([COLOCATED, Rival("diffusers_tuned", 40, 0, 30.0)], "colocated") == []


def test_traffic_lets_the_topology_with_less_work_overtake_one_with_less_slack() -> None:
    # 24 = 20 + 4 of slack; 25 = 16 + 9: at ×f 20 f + 4 √f = 16 f + 9 √f where √f = 5/4; whole sizes move it a little
    lean, slack = Rival("colocated", 24, 0, 20.0), Rival("decoupled", 25, 0, 16.0)
    flips = _traffic_flips([lean, slack], "colocated")
    assert [flip.then for flip in flips] == ["decoupled"]
    assert flips[0].winner_until == pytest.approx((5 / 4) ** 2, rel=0.15)


def test_equal_sizes_leave_the_winner_in_place() -> None:
    (flip,) = _traffic_flips([COLOCATED, Rival("decoupled", 30, 0, 20.0)], "colocated")
    assert flip.winner_until is None


def test_a_law_flips_the_choice_where_its_share_of_the_work_says() -> None:
    # the winner's work is half this law: 10 (1 + g) / 2 > 13 + 0.5 from g = 1.7 on
    flips = _law_flips("law", lambda g: {"colocated": 10 * (1 + g) / 2, "decoupled": 13.0}, "colocated")
    assert [(flip.what, flip.then) for flip in flips] == [("law", "decoupled")]
    # 7 bisections of log 2
    assert flips[0].winner_until == pytest.approx(1.7, rel=math.log(2) / 2**7)


def test_a_topology_that_can_no_longer_keep_the_promise_loses() -> None:
    flips = _law_flips("law", lambda g: {"colocated": math.inf if g > 1.3 else 10.0, "decoupled": 90.0}, "colocated")
    assert flips[0].winner_until == pytest.approx(1.3, rel=math.log(2) / 2**7)


def test_fleets_of_one_gpu_that_idle_do_not_change_places_over_a_fraction_of_a_gpu() -> None:
    assert _law_flips("law", lambda g: {"colocated": 0.9 + 0.1 * g, "decoupled": 1.0}, "colocated") == []
