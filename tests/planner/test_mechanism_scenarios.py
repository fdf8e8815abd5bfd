"""Mechanisms as a user switches them on: in a scenario file and in an allocation file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.allocation import Allocation, Policies, read_allocation, to_json
from engine.policies.autoscale_settings import Autoscale
from planner.replication import load_inputs, service_table
from planner.scenario import Scenario, load_scenario, to_yaml
from planner.service import ServiceTable
from planner.simulate_run import chosen_allocation, simulate_once
from planner.simulator.world import STILL
from planner.statistics import summarise
from planner.strict_yaml import parse_strict
from planner.traffic import build_traffic
from tests.planner.planning import write_scenario
from tests.simulation_builders import base_pool, run, workload_of
from traces.problems import InputError

WORLD = """\
world:
  retries: {n_max: 2}
  failures: {mtbf_s: 400.0, mttr_s: 20.0, start_s: 5.0}
  lora_store: {bandwidth_gib_per_s: 1.0}
policies:
  queue_order: weighted_tenants
  tenants:
  - {tenant_id: a, weight: 2.0}
  queue_limit: 20
  lora_cache_policy: ttl
  lora_cache_ttl_s: 600.0
"""


def test_a_scenario_without_them_asks_for_the_still_world_and_the_plain_policies(tmp_path: Path) -> None:
    scenario, _ = load_scenario(str(write_scenario(tmp_path)))
    assert scenario.world.world(0) == STILL
    assert scenario.policies.policies() == Policies()


def test_a_scenario_with_them_reads_back_and_runs(tmp_path: Path) -> None:
    scenario, folder = load_scenario(str(write_scenario(tmp_path, more=WORLD)))
    assert parse_strict(to_yaml(scenario), Scenario, "again.yaml") == scenario
    allocation = chosen_allocation(scenario, folder, None, "colocated", 3, 0)
    done = simulate_once(scenario, folder, allocation).to_plain()
    assert done["mechanisms"] == ["queue_order", "tenants", "lora_cache_policy", "retries", "failures", "lora_store"]
    assert done["allocation"]["policies"]["tenants"][0]["weight"] == 2.0
    again = simulate_once(scenario, folder, allocation).to_plain()
    assert json.dumps(done) == json.dumps(again)


def test_an_autoscaled_fleet_is_paid_for_while_it_is_allocated(tmp_path: Path) -> None:
    scenario, folder = load_scenario(str(write_scenario(tmp_path)))
    fixed = chosen_allocation(scenario, folder, None, "colocated", 6, 0)
    pool = replace(
        fixed.pools[0], n_replicas=1, autoscale=Autoscale(6, "keda", target=2.0, start_s=5.0, down_window_s=30.0)
    )
    path = tmp_path / "allocation.json"
    path.write_text(to_json(replace(fixed, pools=(pool,))), encoding="utf-8")
    allocation = read_allocation(path)
    assert allocation.pools[0] == pool
    scaled = simulate_once(scenario, folder, allocation)
    full = simulate_once(scenario, folder, fixed)
    assert scaled.cost.gpu_hours_per_month < full.cost.gpu_hours_per_month
    # 2 USD a GPU hour
    assert scaled.cost.cost_usd_per_month == pytest.approx(2.0 * scaled.cost.gpu_hours_per_month, rel=1e-12)
    assert full.cost.cost_usd_per_month == pytest.approx(2.0 * 6 * 730.0, rel=1e-12)
    # busy over allocated time: the same work on fewer GPU hours
    assert scaled.run.metrics.busy_ratio["base"] > full.run.metrics.busy_ratio["base"]


def test_pools_of_different_topologies_run_in_one_fleet(tmp_path: Path) -> None:
    scenario, folder = load_scenario(str(write_scenario(tmp_path)))
    one = chosen_allocation(scenario, folder, None, "colocated", 2, 0)
    pools = (one.pools[0], replace(one.pools[0], name="stock", topology="diffusers"))
    path = tmp_path / "allocation.json"
    path.write_text(to_json(replace(one, pools=pools)), encoding="utf-8")
    done = simulate_once(scenario, folder, chosen_allocation(scenario, folder, path, None, None, 0))
    assert set(done.run.result.requests["topology"]) == {"colocated", "diffusers"}
    assert {law.split(".")[0] for law in done.grades} >= {"engine", "diffusers"}


def test_a_pool_that_is_never_there_is_never_busy() -> None:
    settings = Autoscale(2, "keda", min_replicas=0)
    pools = [base_pool(1, base_model_ids=("m",)), base_pool(0, name="more", base_model_ids=("m",), autoscale=settings)]
    workload = workload_of([0.0, 5.0], base_model_id="m")
    result = run(workload, pools, ServiceTable.from_service_s(workload, np.ones(2)))
    metrics = summarise(result, 10.0)
    assert metrics.busy_ratio["more"] == 0.0
    assert metrics.busy_ratio["base"] == pytest.approx(
        1.0 / 5.0, rel=1e-12
    )  # of the five offered seconds the first second


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ("world:\n  failures: {mtbf_s: 0, mttr_s: 1}\n", "world.failures.mtbf_s"),
        ("world:\n  retries: {backoff_s: 9.0, backoff_max_s: 1.0}\n", "backoff_max_s is 1, below backoff_s, 9"),
        ("world:\n  storms: {}\n", "world.storms"),
        ("policies:\n  lora_cache_policy: ttl\n", "lora_cache_ttl_s is None"),
        ("policies:\n  batch_window_s: 1.0\n", "batch_window_s is set without forward_batch_max"),
        ("policies:\n  tenants: [{tenant_id: a}, {tenant_id: a}]\n", "tenants names a twice"),
        ("policies:\n  tenants: [{tenant_id: a, weight: -1.0}]\n", "policies.tenants"),
    ],
)
def test_what_cannot_be_is_refused_with_its_line(tmp_path: Path, more: str, sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        load_scenario(str(write_scenario(tmp_path, more=more)))
    assert sentence in str(caught.value)


def test_a_pool_that_does_not_exist_cannot_be_reclaimed(tmp_path: Path) -> None:
    more = "world:\n  reclaims: {mean_s: 100.0, pools: [bass]}\n"
    scenario, folder = load_scenario(str(write_scenario(tmp_path, more=more)))
    allocation = chosen_allocation(scenario, folder, None, "colocated", 1, 0)
    with pytest.raises(InputError, match="got 'bass', needs one of base"):
        simulate_once(scenario, folder, allocation)


def test_another_gpu_kind_needs_a_profile(tmp_path: Path) -> None:
    scenario, folder = load_scenario(str(write_scenario(tmp_path)))
    one = chosen_allocation(scenario, folder, None, "colocated", 1, 0)
    other = Allocation((*one.pools, replace(one.pools[0], name="more", gpu_kind="abacus")), policies=one.policies)
    with pytest.raises(InputError, match=r"got abacus.*gpu\.others"):
        simulate_once(scenario, folder, other)


def test_a_store_on_each_host_s_own_disk_costs_no_network(tmp_path: Path) -> None:
    plain, folder = load_scenario(str(write_scenario(tmp_path)))
    local, _ = load_scenario(str(write_scenario(tmp_path, more="world: {is_store_local: true}\n")))
    assert parse_strict(to_yaml(local), Scenario, "again.yaml") == local
    assert "is_store_local" not in to_yaml(plain)
    fetched = [
        service_table(
            scenario,
            load_inputs(scenario, folder),
            build_traffic(scenario, folder).workload,
            "colocated",
            draw=None,
            noise_seed=0,
        )
        for scenario in (plain, local)
    ]
    assert (fetched[0].checkpoint_fetch_s > 0).all()
    # the profile of these tests has its reads in the loads, so nothing is left
    assert not fetched[1].checkpoint_fetch_s.any()
    assert "model_fetch.remote" not in fetched[1].grades
    with pytest.raises(InputError, match="is_store_local and lora_store"):
        load_scenario(
            str(
                write_scenario(tmp_path, more="world: {is_store_local: true, lora_store: {bandwidth_gib_per_s: 1.0}}\n")
            )
        )
