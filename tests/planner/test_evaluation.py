"""The search's compiled evaluations are the SimPy model's, and a plan is checked against it before it is published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planner.agreement import TierMismatchError, _compare, check_allocation
from planner.candidates import shapes_of
from planner.evaluation import Bench, confirm, evaluate_counts, repetition_bench
from planner.replication import evaluate, load_inputs, repeat_allocation, service_table
from planner.scenario import load_scenario
from planner.traffic import build_traffic


@pytest.fixture(scope="module")
def question(tmp_path_factory: pytest.TempPathFactory, write_scenario: Any) -> tuple[Any, Path]:
    return load_scenario(str(write_scenario(tmp_path_factory.mktemp("evaluation"))))


@pytest.mark.parametrize("topology", ["diffusers", "decoupled"])
def test_an_evaluation_is_the_simpy_models_in_every_field(question: tuple[Any, Path], topology: Any) -> None:
    scenario, folder = question
    inputs = load_inputs(scenario, folder)
    workload = build_traffic(scenario, folder).workload
    service = service_table(scenario, inputs, workload, topology, draw=None, noise_seed=1)
    shape = shapes_of(scenario, topology, workload, service, inputs.sizes, inputs.facts, inputs.gpu_kind)[0]
    bench = Bench.of(scenario, inputs, workload, service)
    for n in (1, 4, 9):
        counts = (n, *(1 for _ in shape.controlnet_pools))
        assert bench.run(shape.allocation(counts)) is not None
        expected = evaluate(scenario, inputs, workload, shape, service, counts)
        got = evaluate_counts(bench, shape, counts)
        assert got.lost_to == expected.lost_to
        assert got.is_saturated == expected.is_saturated
        for name in ("attainment_ratio", "in_slo_images_per_s", "latency_at_target_s", "busy_ratios"):
            # sums over 300 requests in another order
            assert getattr(got, name) == pytest.approx(getattr(expected, name), rel=1e-9), name


def test_a_repetition_is_the_simpy_models(question: tuple[Any, Path]) -> None:
    scenario, folder = question
    bench = repetition_bench(scenario, folder, "colocated", 1)
    shape = shapes_of(
        scenario, "colocated", bench.workload, bench.service, bench.inputs.sizes, bench.inputs.facts, bench.inputs.gpu_kind
    )[0]  # fmt: skip
    (found,) = confirm(scenario, folder, 1, (("colocated", shape.allocation((3,))),))
    slow = repeat_allocation(scenario, bench.inputs, bench.workload, "colocated", shape.allocation((3,)), 1)
    assert found.in_slo_images_per_s == pytest.approx(slow.in_slo_images_per_s, rel=1e-9)
    for name, value in slow.metrics.numbers().items():
        assert found.metrics.numbers()[name] == pytest.approx(value, rel=1e-9, abs=1e-12, nan_ok=True), name
    agreed = check_allocation(bench, shape.allocation((3,)))
    assert agreed is not None
    assert agreed.n_requests == len(bench.workload)
    run = bench.run(shape.allocation((3,)))
    assert run is not None
    moved = run.outcome.times_s.copy()
    moved[5, 1] += 1e-3
    with pytest.raises(TierMismatchError, match="differ by"):
        _compare(slow.result, moved, "colocated")
    moved[5, 0] = np.nan
    with pytest.raises(TierMismatchError, match="which requests"):
        _compare(slow.result, moved, "colocated")


def test_what_the_compiled_tier_does_not_model_is_simulated_by_simpy(tmp_path: Path, write_scenario: Any) -> None:
    more = "world:\n  failures:\n    mtbf_s: 4000\n    mttr_s: 60\n"
    scenario, folder = load_scenario(str(write_scenario(tmp_path, name="failing", more=more)))
    inputs = load_inputs(scenario, folder)
    workload = build_traffic(scenario, folder).workload
    service = service_table(scenario, inputs, workload, "colocated", draw=None, noise_seed=1)
    shape = shapes_of(scenario, "colocated", workload, service, inputs.sizes, inputs.facts, inputs.gpu_kind)[0]
    bench = Bench.of(scenario, inputs, workload, service)
    assert bench.run(shape.allocation((4,))) is None
    assert evaluate_counts(bench, shape, (4,)) == evaluate(scenario, inputs, workload, shape, service, (4,))
