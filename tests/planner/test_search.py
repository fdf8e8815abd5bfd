"""The search finds the smallest allocation of a known landscape, and looks at little of it."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.allocation import Policies
from planner.candidates import Counts, Shape
from planner.search import Evaluation, Evaluator, one_more, search

ALONE = Shape("colocated", "", (), ("*",), ("*",), (), "gpu", "nvlink", Policies())
SHARED = Shape("decoupled", "", (("controlnets", ("*",)),), ("*",), (), (6.0,), "gpu", "nvlink", Policies())


def landscape(base_needed: int, others_needed: Counts = (), gpus_max: int = 500) -> Evaluator:
    """Attainment 1 from these counts on, falling with each missing replica."""

    def evaluate(counts: Counts) -> Evaluation:
        needed = (base_needed, *others_needed)
        missing = sum(max(0, want - have) for want, have in zip(needed, counts, strict=True))
        busy = tuple(min(1.0, 0.8 * want / have) for want, have in zip(needed, counts, strict=True))
        return Evaluation(counts, 1.0 / (1 + missing), 1.0, busy, False)

    return Evaluator(evaluate, 0.99, gpus_max)


@settings(deadline=None)
@given(needed=st.integers(1, 300), start=st.integers(1, 300))
def test_the_fewest_base_replicas_are_found_from_any_start(needed: int, start: int) -> None:
    evaluator = landscape(needed)
    found = search(ALONE, evaluator, start, 1)
    assert found.best is not None
    assert found.best.counts == (needed,)
    # galloping and bisection each at most double per look, down to the answer from 500 at most
    assert len(evaluator.seen) <= 2 * math.ceil(math.log2(500)) + 4


def test_nothing_is_found_when_the_gpus_do_not_suffice() -> None:
    evaluator = landscape(41, gpus_max=40)
    assert search(ALONE, evaluator, 10, 1).best is None
    assert max(sum(counts) for counts in evaluator.seen) <= 40


def test_controlnet_workers_are_lowered_to_what_is_needed() -> None:
    found = search(SHARED, landscape(20, (7,)), 20, 1)
    assert found.best is not None
    assert found.best.counts == (20, 7)


def test_a_failed_confirmation_grows_the_busiest_pool() -> None:
    assert one_more((100, 10), (0.9, 0.5)) == (103, 10)
    assert one_more((10, 4), (0.5, 0.9)) == (10, 5)


def test_an_allocation_needs_one_count_a_pool() -> None:
    with pytest.raises(ValueError, match="needs 2"):
        SHARED.allocation((3,))


@pytest.mark.parametrize("ratio", [0.2, 0.5, 1.7, 4.0])
def test_with_another_price_of_workers_the_cheapest_of_all_sizes_is_found(ratio: float) -> None:
    """Attainment is reached where base replicas and workers, of diminishing use, do enough together."""

    def attained(counts: Counts) -> float:
        base, workers = counts
        return 1.0 if base >= 6 and workers >= 2 and base * (1 - 0.8**workers) >= 9 else 0.5

    def evaluate(counts: Counts) -> Evaluation:
        return Evaluation(counts, attained(counts), 1.0, (0.5, 0.5), False)

    one = Shape("decoupled", "", (("controlnets", ("*",)),), ("*",), ("*",), (3.0,), "gpu", "nvlink", Policies())
    shape = dataclasses.replace(one, worker_gpu_kind="other", worker_price_ratio=ratio)
    found = search(shape, Evaluator(evaluate, 0.99, 200), 20, 1)
    sizes = [(base, workers) for base in range(1, 60) for workers in range(1, 60) if attained((base, workers)) >= 0.99]
    assert found.best is not None
    assert shape.cost(found.best.counts) == min(map(shape.cost, sizes))
    assert len(found.looked_at) < len(sizes) / 10


def test_limits_of_two_kinds_hold_each_for_itself() -> None:
    evaluator = Evaluator(lambda counts: Evaluation(counts, 1.0, 1.0, (0.5, 0.5), False), 0.99, 8, 4)
    assert evaluator.meets((8, 4))
    assert not evaluator.meets((9, 4))
    assert not evaluator.meets((8, 5))
