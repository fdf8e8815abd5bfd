"""The choice is doubted with repetitions: a cheaper allocation that holds wins, and what cannot be told is said to be unsure."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.allocation import Allocation, Policies
from planner import confirmation, settling
from planner.candidates import Shape
from planner.confirmation import Contender, Pace
from planner.scenario import Scenario
from planner.settling import REPETITIONS_MAX, settle
from planner.topology_search import TopologySearch

SCENARIO = Scenario.model_validate({
    "name": "doubt", "traffic": {"trace": "none"}, "slo": {"latency_s": 5.0, "attainment_ratio": 0.95}, "profile": {"name": "none"},
})  # fmt: skip
N = SCENARIO.simulation.replications


def contender(topology: Any, n: int, means: dict[int, float], spread: float, *others: int) -> Contender:
    pools = tuple((f"pool{k}", ("*",)) for k in range(len(others)))
    shape = Shape(topology, "", pools, ("*",), ("*",), tuple(1.0 for _ in others), "gpu", "nvlink", Policies())
    found = TopologySearch(topology, None, shape, (n, *others), (), 5.0, 5.0, {})
    one = Contender(found, (n, *others))
    one.confirmations = tuple(drawn(means.get(n + sum(others), 0.0), spread, k) for k in range(N))
    one.is_confirmed = True
    return one


def drawn(mean: float, spread: float, repetition: int) -> Any:
    noise = (1.0, -1.0, 0.5, -0.5, 0.0)[repetition % N]  # mean 0, so that tests can be followed by hand
    metrics = SimpleNamespace(
        slo_attainment_ratio=min(1.0, mean + spread * noise), busy_ratio={"base": 0.8}, loading_ratio={}
    )
    return SimpleNamespace(metrics=metrics, in_slo_images_per_s=1.0)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[dict[int, float], float]]:
    """Topology to the mean attainment of each size, and its spread; sizes left out attain nothing."""
    truth: dict[str, tuple[dict[int, float], float]] = {}

    def confirm(
        scenario: Scenario, folder: Path, repetition: int, allocations: tuple[tuple[str, Allocation], ...], store: None
    ) -> tuple[Any, ...]:
        return tuple(
            drawn(truth[topology][0].get(allocation.n_gpus, 0.0), truth[topology][1], repetition)
            for topology, allocation in allocations
        )

    monkeypatch.setattr(settling, "confirm", confirm)
    monkeypatch.setattr(confirmation, "confirm", confirm)
    return truth


def test_an_allocation_that_was_made_too_large_is_taken_down_to_what_holds(world: dict[str, Any]) -> None:
    world["colocated"] = ({12: 0.999, 11: 0.99, 10: 0.97, 9: 0.80}, 0.002)
    one = contender("colocated", 12, *world["colocated"])
    settled = settle(SCENARIO, Path(), [one], 1000, Pace(jobs=1))
    assert one.counts == (10,)
    assert settled is not None
    assert settled.chosen.counts == (10,)
    assert [doubt.counts for doubt in settled.cheaper] == [(9,)]
    assert settled.probability > 0.999


def test_a_lucky_confirmation_is_taken_back(world: dict[str, Any]) -> None:
    # 10 and 9 replicas lie as close to 95 % on either side, so both are repeated; from then on 10 does much worse
    world["colocated"] = ({11: 0.999, 10: 0.93, 9: 0.9485}, 0.002)
    one = contender("colocated", 10, {10: 0.9515}, 0.002)
    settle(SCENARIO, Path(), [one], 1000, Pace(jobs=1))
    assert one.counts == (11,)
    assert one.is_confirmed


def test_another_topology_that_comes_near_is_cut_to_less_than_the_choice(world: dict[str, Any]) -> None:
    world["colocated"] = ({40: 0.98, 39: 0.5}, 0.001)
    world["decoupled"] = ({41: 0.98, 39: 0.97, 38: 0.4}, 0.001)  # at 40 it fails as drawn: none is given for it
    contenders = [
        contender("colocated", 40, *world["colocated"]),
        contender("decoupled", 31, world["decoupled"][0], 0.001, 10),
    ]
    settled = settle(SCENARIO, Path(), contenders, 1000, Pace(jobs=1))
    assert settled is not None
    assert settled.chosen.contender.search.topology == "decoupled"
    assert sum(settled.chosen.counts) == 39


def test_what_repetitions_cannot_tell_is_said_to_be_unsure(world: dict[str, Any]) -> None:
    world["colocated"] = ({10: 0.99, 9: 0.9502}, 0.02)
    one = contender("colocated", 10, {10: 0.99}, 0.001)
    settled = settle(SCENARIO, Path(), [one], 1000, Pace(jobs=1))
    assert settled is not None
    assert settled.probability < 0.9
    assert N < len(settled.cheaper[0].confirmations) <= REPETITIONS_MAX


def test_nothing_confirmed_leaves_nothing_to_settle() -> None:
    one = contender("colocated", 10, {10: 0.99}, 0.001)
    one.is_confirmed = False
    assert settle(SCENARIO, Path(), [one], 1000, Pace(jobs=1)) is None
