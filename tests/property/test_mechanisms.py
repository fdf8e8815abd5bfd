"""Laws that hold for every run with mechanisms, switched on at random."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.allocation import Allocation, Link, Policies, Pool, TenantShare
from engine.policies.autoscale_settings import Autoscale
from planner.service import build_service
from planner.simulator import SimulationResult, simulate
from planner.simulator.allocated import gpu_hours
from planner.simulator.mechanisms import mechanisms_in_use
from planner.simulator.model import simulate_fully
from planner.simulator.world import STILL, Failures, LoraStore, Reclaims, Retries, World
from planner.statistics import littles_law_gap
from planner.workload import Workload
from tests.property.test_every_run import FACTS, NAMES, PROFILE, allocations, simulated, workloads
from tests.simulation_builders import SIZES, base_pool, controlnet_pool, workload_of


@st.composite
def asked(draw: st.DrawFn) -> Workload:
    n = draw(st.integers(1, 25))
    gaps = draw(st.lists(st.sampled_from([0.0, 0.3, 2.0, 9.0, 60.0]), min_size=n, max_size=n))

    def column(values: st.SearchStrategy[Any]) -> list[Any]:
        return draw(st.lists(values, min_size=n, max_size=n))

    return workload_of(
        np.cumsum(gaps).tolist(),
        base_model_id=column(st.sampled_from(["a", "b"])),
        n_steps=column(st.sampled_from([7, 30])),
        n_images=column(st.sampled_from([1, 4])),
        controlnet_ids=column(st.sampled_from([(), (), ("a",), ("a", "b")])),
        control_end=column(st.sampled_from([(), (0.5,)])),
        lora_ids=column(st.lists(NAMES, max_size=2, unique=True).map(tuple)),
        deadline_s=column(st.sampled_from([np.nan, np.nan, 5.0, 30.0])),
        tenant_id=column(st.sampled_from(["x", "y"])),
        priority=column(st.sampled_from([0, 0, 3])),
    )


def scaled(draw: st.DrawFn, n: int) -> Autoscale | None:
    kind = draw(st.sampled_from([None, "hpa", "keda", "kpa", "ray_serve"]))
    if kind is None:
        return None
    return Autoscale(
        n + draw(st.integers(0, 2)), kind, min_replicas=1 if kind == "hpa" else draw(st.integers(0, 1)),
        target=0.5 if kind == "hpa" else 1.0, interval_s=2.0, start_s=draw(st.sampled_from([0.0, 7.0])), attach_s=1.0,
        warm_replicas=draw(st.integers(0, 1)), down_window_s=10.0, polling_s=4.0, cooldown_s=20.0, zero_grace_s=6.0,
        stable_window_s=20.0, look_back_s=6.0, upscale_delay_s=4.0, downscale_delay_s=10.0,
    )  # fmt: skip


@st.composite
def served(draw: st.DrawFn) -> tuple[Allocation, World]:
    pools: list[Pool] = []
    links: list[Link] = []
    for number in range(draw(st.integers(1, 2))):
        topology = draw(st.sampled_from(["diffusers", "colocated", "decoupled"]))
        n = draw(st.integers(1, 3))
        pool = base_pool(n, topology, f"base{number}", autoscale=scaled(draw, n))
        if pool.autoscale is None and draw(st.booleans()):
            pool = replace(pool, workers_per_gpu=2, speed_ratio=draw(st.sampled_from([None, 0.7])), gpu_kind="older")
        pools.append(pool)
    if draw(st.booleans()):
        n = draw(st.integers(1, 2))
        pools.append(replace(controlnet_pool(n), autoscale=scaled(draw, n)))
        uplink = draw(st.sampled_from(["", "rack"]))
        links = [
            Link(pool.name, "controlnet", "network", uplink, 0.5 if uplink else None, draw(st.sampled_from([1.0, 2.0])))
            for pool in pools
            if pool.role == "base"
        ]
    cache = draw(st.sampled_from(["lru", "lfu", "ttl"]))
    policies = Policies(
        queue_limit=draw(st.sampled_from([None, 0, 2])),
        lora_cache_gib=draw(st.sampled_from([0.3, 64.0])),
        checkpoint_host_cache_gib=draw(st.sampled_from([7.0, 256.0])),
        queue_order=draw(st.sampled_from(["fifo", "priority", "weighted_tenants"])),
        tenants=draw(st.sampled_from([(), (TenantShare("x", 3.0, running_max=1),)])),
        tenant_waiting_max=draw(st.sampled_from([None, 2])),
        forward_batch_max=draw(st.sampled_from([None, 8])),
        batch_window_s=draw(st.sampled_from([0.0, 1.5])),
        switch_overtake_max=draw(st.sampled_from([0, 2])),
        deadline_s=draw(st.sampled_from([None, 40.0])),
        admission_slack_ratio=draw(st.sampled_from([None, 1.0])),
        lora_cache_policy=cache,
        lora_cache_ttl_s=30.0 if cache == "ttl" else None,
        replicas_per_host=draw(st.sampled_from([1, 2])),
    )
    world = World(
        retries=draw(st.sampled_from([None, Retries(2, 3.0)])),
        failures=draw(st.sampled_from([None, Failures(60.0, 5.0, 3.0)])),
        reclaims=draw(st.sampled_from([None, Reclaims(90.0, 4.0, 10.0, 3.0)])),
        lora_store=draw(st.sampled_from([None, LoraStore(0.1)])),
        seed=draw(st.integers(0, 3)),
    )
    return Allocation(tuple(pools), tuple(links), policies), world


def run_it(workload: Workload, allocation: Allocation, world: World) -> SimulationResult:
    services = {
        pool.name: build_service(
            workload, pool.topology, PROFILE, SIZES, forward_batch_max=allocation.policies.forward_batch_max,
            links=allocation.links,
        )
        for pool in allocation.pools_of("base")
    }  # fmt: skip
    facts = replace(FACTS, device_memory_gib=50.0)  # halves of it still hold every request
    return simulate(workload, allocation, services, SIZES, facts, world=world)


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(asked(), served())
def test_every_request_ends_once_and_every_worker_does_one_thing_at_a_time(
    workload: Workload, case: tuple[Allocation, World]
) -> None:
    allocation, world = case
    result = run_it(workload, allocation, world)  # checks itself: causality, stages, overlap, work within spans
    frame = result.requests
    assert len(frame) == len(workload)
    assert frame["status"].isin(["done", "rejected", "expired", "failed"]).all()
    assert (frame["reason"][frame["status"] != "done"] != "").all()
    # sums of at most a few hundred doubles of one sign
    assert littles_law_gap(result) < 1e-12
    done = frame[frame["status"] == "done"]
    assert (done["denoise_s"] >= done["denoise_alone_s"] * (1 - 1e-9)).all()
    if world.failures is None and world.reclaims is None:
        assert not frame["reason"].str.contains("worker failed|reclaimed", regex=True).any()


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(asked(), served())
def test_gpus_stay_within_what_the_pools_may_have(workload: Workload, case: tuple[Allocation, World]) -> None:
    allocation, world = case
    result = run_it(workload, allocation, world)
    hours = gpu_hours(result.workers, 0.0, result.horizon_s)
    for pool in allocation.pools:
        most = pool.n_replicas if pool.autoscale is None else pool.autoscale.max_replicas
        gpus = -(-most // pool.workers_per_gpu)
        assert hours[pool.name] * 3600 <= gpus * result.horizon_s * (1 + 1e-9)
        if pool.autoscale is None and world.reclaims is None:
            assert hours[pool.name] * 3600 == pytest.approx(gpus * result.horizon_s, rel=1e-9)
    workers = result.workers[result.workers["role"] == "base"]
    busy_s = workers["busy_s"].sum()
    one_each = result.requests.drop_duplicates(["worker_id", "start_s"])
    done = one_each[one_each["status"] == "done"]
    computed_s = (done["end_s"] - done["start_s"] - done["switch_s"] - done["controlnet_load_s"]).sum()
    waits_s = done["lora_wait_s"].sum()
    # what was lost under a failure is work beside what the finished requests took
    assert busy_s >= (computed_s - waits_s) * (1 - 1e-9)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(workloads(), allocations())
def test_with_everything_off_the_full_run_is_the_static_run(workload: Workload, allocation: Allocation) -> None:
    assert mechanisms_in_use(allocation) == ()
    services = {
        pool.name: build_service(workload, pool.topology, PROFILE, SIZES) for pool in allocation.pools_of("base")
    }
    static = simulated(workload, allocation)
    full = simulate_fully(workload, allocation, services, SIZES, FACTS, len(workload), workload.duration_s, STILL)
    for table in ("requests", "workers"):
        # transfers of several workers are added, not multiplied: the last digit may differ
        pd.testing.assert_frame_equal(getattr(static, table), getattr(full, table), rtol=1e-9, atol=1e-9)


LOG_PROGRAM = """
import hashlib
from tests.property.test_mechanisms import *

rng = np.random.default_rng(3)
names = [f"n{k}" for k in range(8)]
pick = lambda most: [tuple(str(x) for x in rng.choice(names, rng.integers(0, most), replace=False)) for _ in range(400)]
workload = workload_of(np.cumsum(rng.exponential(1.0, 400)), base_model_id=[str(x) for x in rng.choice(names, 400)],
    n_steps=30, controlnet_ids=pick(4), lora_ids=pick(3), tenant_id=[str(x) for x in rng.choice(names, 400)])
pools = (base_pool(6, "decoupled", autoscale=Autoscale(9, "kpa", min_replicas=1, start_s=5.0)), base_pool(2, "colocated", "other"),
    replace(controlnet_pool(3), autoscale=Autoscale(5, "keda", start_s=5.0)))
links = (Link("base", "controlnet", "network", "rack", 1.0, 2.0),)
policies = Policies(queue_order="weighted_tenants", tenants=(TenantShare("n1", 2.0, 3),), tenant_running_max=4, queue_limit=30,
    forward_batch_max=8, batch_window_s=0.5, lora_cache_policy="lfu", lora_cache_gib=0.6, replicas_per_host=2)
world = World(Retries(), Failures(200.0, 10.0, 5.0), Reclaims(300.0, 10.0, 20.0, 5.0), LoraStore(0.2), 5)
allocation = Allocation(pools, links, policies)
services = {p.name: build_service(workload, p.topology, PROFILE, SIZES, forward_batch_max=8, links=links) for p in pools[:2]}
result = simulate(workload, allocation, services, SIZES, replace(FACTS, device_memory_gib=80.0), world=world)
for table in (result.requests, result.workers):
    print(len(table), hashlib.sha256(table.to_csv(index=False).encode()).hexdigest())
print(result.requests["status"].value_counts().to_dict(), mechanisms_in_use(allocation, world))
"""


def test_logs_with_mechanisms_are_the_same_bytes_in_another_process_with_another_hash_seed() -> None:
    outputs = []
    for hash_seed in ("0", "4242"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1"}
        outputs.append(
            subprocess.run(
                [sys.executable, "-c", LOG_PROGRAM], env=environment, capture_output=True, text=True, check=True
            ).stdout
        )
    assert outputs[0].startswith("400 ")
    assert "'done'" in outputs[0]
    assert outputs[0] == outputs[1]
