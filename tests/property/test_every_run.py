"""Laws that hold for every run, whatever is asked and wherever it runs."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.allocation import Allocation, Policies, Pool
from planner.consistency import check_run
from planner.service import build_service
from planner.simulator import ProfileFacts, SimulationResult, simulate
from planner.statistics import littles_law_gap
from planner.workload import Workload
from tests.simulation_builders import SIZES, base_pool, constant_profile, controlnet_pool, run_queue, workload_of

PROFILE = constant_profile(noise=(0.9, 0.95, 0.98, 1.0, 1.02, 1.1, 1.3))
# 21 GiB for weights: three checkpoints, or one with a few ControlNets, so that every cache turns over
FACTS = ProfileFacts(device_memory_gib=25.0, activation_gib_per_sample=0.5)
NAMES = st.sampled_from(["a", "b", "c", "d"])


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    n = draw(st.integers(1, 25))
    gaps = draw(st.lists(st.sampled_from([0.0, 0.3, 2.0, 9.0, 60.0]), min_size=n, max_size=n))

    def column(values: st.SearchStrategy[Any]) -> list[Any]:
        return draw(st.lists(values, min_size=n, max_size=n))

    return workload_of(
        np.cumsum(gaps).tolist(),
        base_model_id=column(NAMES),
        n_steps=column(st.sampled_from([1, 7, 30])),
        n_images=column(st.sampled_from([1, 4])),
        controlnet_ids=column(st.lists(NAMES, max_size=3).map(tuple)),
        control_end=column(st.sampled_from([(), (0.5,), (1.0, 0.2)])),
        lora_ids=column(st.lists(NAMES, max_size=2, unique=True).map(tuple)),
        deadline_s=column(st.sampled_from([np.nan, np.nan, 0.0, 5.0, 30.0])),
    )


@st.composite
def allocations(draw: st.DrawFn) -> Allocation:
    pools: list[Pool] = []
    for number in range(draw(st.integers(1, 2))):
        topology = draw(st.sampled_from(["diffusers", "colocated", "decoupled"]))
        checkpoints = draw(st.sampled_from([("*",), ("a", "b")]))
        pools.append(base_pool(draw(st.integers(1, 3)), topology, f"base{number}", base_model_ids=checkpoints))
    if draw(st.booleans()):
        pools.append(controlnet_pool(draw(st.integers(1, 2)), *draw(st.sampled_from([(), ("a", "b")]))))
    policies = Policies(
        queue_limit=draw(st.sampled_from([None, 0, 2])),
        lora_cache_gib=draw(st.sampled_from([0.3, 64.0])),
        checkpoint_host_cache_gib=draw(st.sampled_from([7.0, 256.0])),
    )
    return Allocation(tuple(pools), policies=policies)


def simulated(workload: Workload, allocation: Allocation) -> SimulationResult:
    services = {
        pool.name: build_service(workload, pool.topology, PROFILE, SIZES) for pool in allocation.pools_of("base")
    }
    return simulate(workload, allocation, services, SIZES, FACTS)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(workloads(), allocations())
def test_nothing_is_lost_and_littles_law_holds(workload: Workload, allocation: Allocation) -> None:
    result = simulated(workload, allocation)
    check_run(result, workload)
    frame = result.requests
    assert len(frame) == len(workload)
    assert (frame["status"].isin(["done", "rejected", "expired"])).all()
    # sums of at most a few hundred doubles of one sign: 1e-12 relative is a thousand roundings
    assert littles_law_gap(result) < 1e-12
    # nobody is faster than alone on an idle system
    done = frame[frame["status"] == "done"]
    assert (done["denoise_s"] >= done["denoise_alone_s"] * (1 - 1e-9)).all()
    # whoever waited was taken up before the deadline; whoever expired waited exactly until it
    deadline_s = workload.deadline_s[done.index]
    wait_s = done["queue_wait_s"].to_numpy()
    assert not ((wait_s > 0) & (wait_s >= deadline_s)).any()
    expired = frame[frame["status"] == "expired"]
    assert (expired["end_s"] == expired["arrival_s"] + workload.deadline_s[expired.index]).all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(workloads(), allocations())
def test_work_arrives_at_the_workers_that_did_it(workload: Workload, allocation: Allocation) -> None:
    result = simulated(workload, allocation)
    workers = result.workers[result.workers["role"] == "base"]
    occupied_s = (workers["end_s"] - workers["start_s"])[workers["state"] != "idle"].sum()
    served_s = (result.requests["end_s"] - result.requests["start_s"]).sum()
    assert occupied_s == pytest.approx(served_s, rel=1e-9, abs=1e-9)
    forwards_s = result.workers.loc[result.workers["role"] == "controlnet", "busy_s"].sum()
    remote = result.requests["topology"] == "decoupled"
    table = build_service(workload, "decoupled", PROFILE, SIZES)
    assert forwards_s == pytest.approx(table.controlnet_work_s[remote.to_numpy()].sum(), rel=1e-9, abs=1e-9)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    gaps=st.lists(st.floats(0, 5), min_size=1, max_size=40),
    service_s=st.floats(0.1, 10),
    n_servers=st.integers(1, 6),
)
def test_one_more_replica_makes_no_request_later(gaps: list[float], service_s: float, n_servers: int) -> None:
    # on the same arrays, first come first served, one class of request: true of each path, not only on average
    arrival_s = np.cumsum(gaps).tolist()
    services = [service_s] * len(gaps)
    fewer = run_queue(arrival_s, services, n_servers).requests["end_s"].to_numpy()
    more = run_queue(arrival_s, services, n_servers + 1).requests["end_s"].to_numpy()
    assert (more <= fewer + 1e-9).all()


@settings(max_examples=80, deadline=None, derandomize=True)
@given(gaps=st.lists(st.floats(0, 3), min_size=1, max_size=40), n_servers=st.integers(1, 3), limit=st.integers(0, 4))
def test_no_more_wait_than_the_queue_limit_allows(gaps: list[float], n_servers: int, limit: int) -> None:
    arrival_s = np.cumsum(gaps)
    frame = run_queue(arrival_s.tolist(), [4.0] * len(gaps), n_servers, policies=Policies(queue_limit=limit)).requests
    done = frame[frame["status"] == "done"]
    for i, now_s in enumerate(arrival_s):
        before = done[(done.index <= i) & (done["start_s"] > now_s)]
        assert len(before) <= limit
        if frame["status"].iloc[i] == "rejected":
            assert len(before) == limit


LOG_PROGRAM = """
import hashlib, sys
import numpy as np, pandas as pd
from engine.allocation import Allocation
from planner.service import build_service
from planner.simulator import simulate
from tests.simulation_builders import *

rng = np.random.default_rng(3)
names = [f"n{k}" for k in range(8)]
pick = lambda most: [tuple(str(x) for x in rng.choice(names, rng.integers(0, most), replace=False)) for _ in range(400)]
workload = workload_of(np.cumsum(rng.exponential(1.0, 400)), base_model_id=[str(x) for x in rng.choice(names, 400)],
    n_steps=30, controlnet_ids=pick(4), lora_ids=pick(3), tenant_id=[str(x) for x in rng.choice(names, 400)])
profile = constant_profile(noise=(0.9, 0.95, 0.98, 1.0, 1.02, 1.1, 1.3))
pools = (base_pool(6, "decoupled"), base_pool(2, "colocated", "other"), controlnet_pool(3))
services = {p.name: build_service(workload, p.topology, profile, SIZES) for p in pools if p.role == "base"}
result = simulate(workload, Allocation(pools), services, SIZES, FACTS)
for table in (result.requests, result.workers):
    print(len(table), hashlib.sha256(table.to_csv(index=False).encode()).hexdigest())
"""


def test_logs_are_the_same_bytes_in_another_process_with_another_hash_seed() -> None:
    outputs = []
    for hash_seed in ("0", "1", "4242"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1"}
        outputs.append(
            subprocess.run(
                [sys.executable, "-c", LOG_PROGRAM], env=environment, capture_output=True, text=True, check=True
            ).stdout
        )
    assert outputs[0].startswith("400 ")
    assert len(set(outputs)) == 1
