"""A checkpoint may have base replicas of its own, of its own topology: fleets that mix both, sized like the recommended one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from planner.addon_placement import trial_of
from planner.candidates import shapes_of
from planner.checkpoint_placement import (
    OWN,
    best_of,
    busiest_checkpoints,
    checkpoints_record,
    place_checkpoint,
    splits_of,
    start_counts,
)
from planner.decision_record import CheckpointFleetRow
from planner.plan_run import make_plan
from planner.report_choices import checkpoint_blocks
from planner.scenario import load_scenario
from planner.simulator import simulate


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory, write_scenario: Callable[..., Path]) -> Any:
    """Traffic for two checkpoints, ``heavy`` with ControlNets on every request and ``light`` without, and both shapes."""
    folder = tmp_path_factory.mktemp("two")
    rng = np.random.default_rng(9)
    lines = ["request_id,arrival_s,n_steps,base_model_id,controlnet_ids"]
    for row, arrival_s in enumerate(np.cumsum(rng.exponential(2.0, 160))):
        name, used = [("heavy", '"[""depth"", ""canny""]"'), ("light", '"[]"')][row % 2]
        lines.append(f"r{row},{arrival_s:.3f},30,{name},{used}")
    (folder / "trace.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    scenario, here = load_scenario(str(write_scenario(folder, name="two")))
    trial = trial_of(scenario, here)
    shapes = {
        topology: shapes_of(
            scenario, topology, trial.workload, service, trial.inputs.sizes, trial.inputs.facts, trial.inputs.gpu_kind
        )[0]
        for topology, service in trial.services.items()
    }  # fmt: skip
    return SimpleNamespace(trial=trial, shapes=shapes, scenario=scenario, folder=here)


def row_of(n_gpus: int | None, *, own: bool = True) -> CheckpointFleetRow:
    return CheckpointFleetRow(
        has_own_pool=own, topology="colocated", pools={}, n_gpus=n_gpus, cost_usd_per_month=None, difference_usd_per_month=None,
        slo_attainment_ratio=None, latency_p50_s=None, latency_p99_s=None, with_it_p50_s=None,
    )  # fmt: skip


@pytest.mark.parametrize("topology", ["colocated", "decoupled"])
def test_every_fleet_serves_every_request_alike_in_both_models(ground: Any, topology: str) -> None:
    trial = ground.trial
    splits = splits_of("heavy", ground.shapes[topology], trial.workload.checkpoint_names, has_controlnets=True)
    assert {(split.name, split.own) for split in splits} == {
        (None, topology), ("heavy", "colocated"), ("heavy", "decoupled"),
    }  # fmt: skip
    for split in splits:
        n_pools = len(start_counts(trial, split, trial.workload.checkpoint == 0, {}))
        allocation = split.allocation((3,) * n_pools)
        services = {pool.name: trial.services[pool.topology] for pool in allocation.pools_of("base")}
        slow = simulate(trial.workload, allocation, services, trial.inputs.sizes, trial.inputs.facts).requests
        assert set(slow["status"]) == {"done"}
        fast, _ = trial.run(allocation)
        # the tiers agree to 1e-9 on every latency, so on their mean, too
        assert fast.latency_mean_s == pytest.approx(slow["latency_s"].mean(), rel=1e-9)


def test_a_checkpoint_with_its_own_replicas_runs_nowhere_else_and_nobody_else_there(ground: Any) -> None:
    trial = ground.trial
    split = splits_of("heavy", ground.shapes["colocated"], trial.workload.checkpoint_names, has_controlnets=True)[2]
    allocation = split.allocation((3, 3, 2))
    assert [(pool.name, pool.topology) for pool in allocation.pools] == [
        ("base", "colocated"), (OWN, "decoupled"), ("controlnets", "decoupled"),
    ]  # fmt: skip
    services = {pool.name: trial.services[pool.topology] for pool in allocation.pools_of("base")}
    requests = simulate(trial.workload, allocation, services, trial.inputs.sizes, trial.inputs.facts).requests
    heavy = trial.workload.checkpoint_names.index("heavy")
    for code, worker in zip(trial.workload.checkpoint.tolist(), requests["worker_id"], strict=True):
        assert worker.startswith(OWN) == (code == heavy)


def test_where_not_all_others_fit_the_pool_for_all_may_serve_everything(ground: Any) -> None:
    names = [*ground.trial.workload.checkpoint_names, *(f"m{k}" for k in range(50))]
    own = splits_of("heavy", ground.shapes["colocated"], names, has_controlnets=False)[1]
    assert own.allocation((1, 1)).pools[0].base_model_ids == ("light", "*")


def test_differences_are_against_the_recommended_fleet_and_sizes_keep_the_promise(ground: Any) -> None:
    row = place_checkpoint(ground.scenario, ground.folder, ground.shapes["colocated"], "heavy", 2.0)
    here, *others = row.fleets
    assert (here.has_own_pool, here.difference_usd_per_month) == (False, 0.0)
    assert [fleet.topology for fleet in others] == ["colocated", "decoupled"]
    assert row.use_ratio == 0.5
    for fleet in others:
        assert fleet.difference_usd_per_month == (fleet.n_gpus - here.n_gpus) * 2.0 * 730.0
        assert sum(fleet.pools.values()) == fleet.n_gpus
        assert fleet.slo_attainment_ratio >= ground.scenario.slo.attainment_ratio
    assert f"against {here.n_gpus} GPU" in row.why


def test_of_equal_fleets_the_recommended_one_is_best() -> None:
    assert best_of([row_of(4, own=False), row_of(4), row_of(5)]) == 0
    assert best_of([row_of(4, own=False), row_of(3), row_of(None)]) == 1
    assert best_of([row_of(None, own=False), row_of(None)]) is None


def test_nothing_is_tried_with_one_checkpoint_or_one_gpu(ground: Any, tiny_plan: Any) -> None:
    shape = ground.shapes["colocated"]
    assert busiest_checkpoints(ground.scenario, ground.folder, shape, 5) == ["heavy", "light"]
    assert busiest_checkpoints(ground.scenario, ground.folder, shape, 1) == []
    assert busiest_checkpoints(tiny_plan.scenario, tiny_plan.folder, shape, 5) == []
    assert checkpoints_record([], "") is None
    assert tiny_plan.result.record.checkpoints is None


def test_a_plan_of_two_checkpoints_says_where_each_should_run(ground: Any) -> None:
    ours = ground.scenario.model_copy(update={"topologies": ("colocated", "decoupled")})
    busier = ours.model_copy(update={"slo": ours.slo.model_copy(update={"latency_s": 9.0, "attainment_ratio": 0.95})})
    plan = make_plan(busier, ground.folder, jobs=1).record
    assert plan.row(plan.recommended).n_gpus >= 2
    assert [row.checkpoint_id for row in plan.checkpoints.rows] == ["heavy", "light"]
    assert all(row.fleets[0].n_gpus is not None for row in plan.checkpoints.rows)
    heading, sentence, grid, _ = checkpoint_blocks(plan.checkpoints)
    assert (heading.text, sentence.text) == ("Replicas for one checkpoint", plan.checkpoints.sentence)
    assert [cells[0] for cells in grid.rows] == ["heavy", "light"]
    assert checkpoint_blocks(None) == []
