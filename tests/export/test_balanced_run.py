"""Pods behind a Service or a balancer are simulated as those decide: by lot, or by the fewest open requests each balancer knows of."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from engine.allocation import Allocation, Policies
from planner.export.balanced_run import run_pods
from planner.export.pods_figures import Front
from planner.replication import Inputs, load_inputs
from planner.scenario import Scenario, load_scenario
from planner.simulator import mechanisms_in_use
from planner.traffic import build_traffic
from planner.workload import Workload
from tests.export.plans import pool
from tests.planner.planning import write_scenario

LOT = Front("random")
FEWEST = Front("least_outstanding")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> tuple[Scenario, Inputs, Workload]:
    folder = tmp_path_factory.mktemp("bench")
    scenario, here = load_scenario(str(write_scenario(folder, more="topologies: [diffusers]\n")))
    return scenario, load_inputs(scenario, here), build_traffic(scenario, here, 0).workload


def pods(*n_bases: int, **policies: object) -> list[Allocation]:
    """Engines with so many replicas each."""
    return [
        Allocation((pool(n=n, topology="diffusers"),), policies=Policies(**policies))  # type: ignore[arg-type]
        for n in n_bases
    ]


def latencies(frame: pd.DataFrame) -> np.ndarray:
    return frame.set_index("request_id")["latency_s"].sort_index().to_numpy()


def test_one_pod_is_the_plans_one_queue_whatever_stands_before_it(bench: tuple[Scenario, Inputs, Workload]) -> None:
    by_lot, by_fewest = (run_pods(*bench, pods(3), front, 0).requests for front in (LOT, FEWEST))
    assert latencies(by_lot).tolist() == latencies(by_fewest).tolist()


def test_every_request_is_served_once_and_by_lot_all_pods_get_alike(bench: tuple[Scenario, Inputs, Workload]) -> None:
    workload = bench[2]
    served = run_pods(*bench, pods(2, 2, 1), LOT, 0)
    assert sorted(served.requests["request_id"]) == sorted(workload.request_ids)
    expected = len(workload) / 3
    # a binomial's standard deviation is sqrt(n·p·q) = sqrt(2/3 · expected); four of them are passed once in 16,000 draws
    assert max(abs(n - expected) for n in served.n_of_pod) < 4 * np.sqrt(2 / 3 * expected)


def test_a_requests_lot_does_not_depend_on_the_other_requests(bench: tuple[Scenario, Inputs, Workload]) -> None:
    scenario, inputs, workload = bench
    half = workload.subset(np.arange(len(workload)) % 2 == 0)
    whole = run_pods(scenario, inputs, workload, pods(1, 1), LOT, 0)
    part = run_pods(scenario, inputs, half, pods(1, 1), LOT, 0)
    assert part.pod_of == {name: whole.pod_of[name] for name in half.request_ids}


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 2)])
def test_each_request_goes_to_the_pod_with_the_fewest_open_ones_for_its_size(
    bench: tuple[Scenario, Inputs, Workload], sizes: tuple[int, ...]
) -> None:
    """Looked up in the finished records, which the decisions could not see."""
    served = run_pods(*bench, pods(*sizes), FEWEST, 0)
    frame = served.requests
    pod = np.array([served.pod_of[name] for name in frame["request_id"]])
    arrival_s, end_s = frame["arrival_s"].to_numpy(), frame["end_s"].to_numpy()
    n_ties_broken = 0
    for i in range(len(frame)):
        here = (arrival_s < arrival_s[i]) & (end_s > arrival_s[i])
        n_open = np.bincount(pod[here], minlength=len(sizes))
        keys = [0.0 if n == 0 else (n + 1) / size for n, size in zip(n_open, sizes, strict=True)]
        assert keys[pod[i]] == min(keys)
        n_ties_broken += keys.count(min(keys)) > 1
    assert n_ties_broken < len(frame)  # some decisions were forced, or the test would hold for any rule


def test_the_fewest_open_requests_wait_less_than_a_lot_and_little_more_than_one_queue(
    bench: tuple[Scenario, Inputs, Workload],
) -> None:
    waits = {
        name: float(run_pods(*bench, split, front, 0).requests["queue_wait_s"].mean())
        for name, split, front in (
            ("one", pods(4), LOT), ("fewest", pods(2, 2), FEWEST), ("two balancers", pods(2, 2), Front("least_outstanding", 2)),
            ("lot", pods(2, 2), LOT),
        )
    }  # fmt: skip
    assert waits["one"] <= waits["fewest"] <= waits["two balancers"] < waits["lot"]


def test_mechanisms_of_the_engines_are_simulated_behind_a_balancer_too(
    bench: tuple[Scenario, Inputs, Workload],
) -> None:
    split = pods(1, 1, deadline_s=1.0)
    assert mechanisms_in_use(split[0]) == ("default_deadline",)
    served = run_pods(*bench, split, FEWEST, 0).requests
    patient = run_pods(*bench, pods(1, 1), FEWEST, 0).requests
    assert "expired" in set(served["status"])
    assert "expired" not in set(patient["status"])


def test_pods_that_advance_together_do_what_each_does_by_itself(bench: tuple[Scenario, Inputs, Workload]) -> None:
    """The engine's mechanisms are simulated apart from the others; one that never acts must change nothing."""
    together = run_pods(*bench, pods(2, 1), FEWEST, 0)
    apart = run_pods(*bench, pods(2, 1, deadline_s=1e9), FEWEST, 0)
    assert mechanisms_in_use(pods(1, deadline_s=1e9)[0])
    assert together.pod_of == apart.pod_of
    pd.testing.assert_frame_equal(together.requests, apart.requests, check_exact=True)


def test_the_same_question_gets_the_same_bytes_and_another_repetition_others(
    bench: tuple[Scenario, Inputs, Workload],
) -> None:
    first, again, other = (run_pods(*bench, pods(2, 1), FEWEST, k).requests for k in (0, 0, 1))
    pd.testing.assert_frame_equal(first, again, check_exact=True)
    assert latencies(first).tolist() != latencies(other).tolist()


def test_fields_of_policies_are_either_static_or_switches_of_mechanisms() -> None:
    """A new policy must be given to the balancer's view of a pod, or be known as a mechanism, which that view leaves out."""
    from planner.export.balanced_run import STATIC_POLICIES

    mechanisms = {
        "lora_prefetch_depth", "overtake_max", "switch_overtake_max", "forward_batch_max", "batch_window_s", "deadline_s",
        "admission_slack_ratio", "tenant_running_max", "tenant_waiting_max", "retry_max", "queue_order", "tenants",
        "lora_cache_policy", "lora_cache_ttl_s", "replicas_per_host",
    }  # fmt: skip
    assert {item.name for item in dataclasses.fields(Policies)} == mechanisms | set(STATIC_POLICIES)


def test_a_queue_limit_counts_in_each_pod(bench: tuple[Scenario, Inputs, Workload], tmp_path: Path) -> None:
    served = run_pods(*bench, pods(1, 1, queue_limit=0), FEWEST, 0)
    frame = served.requests
    rejected = frame[frame["status"] == "rejected"]
    assert len(rejected)
    pod = np.array([served.pod_of[name] for name in frame["request_id"]])
    busy = [(pod == k) & (frame["status"] == "done").to_numpy() for k in (0, 1)]
    arrival_s, end_s = frame["arrival_s"].to_numpy(), frame["end_s"].to_numpy()
    for i in rejected.index:  # nobody is turned away while an engine is idle
        assert all(((arrival_s <= arrival_s[i]) & (end_s > arrival_s[i]) & rows).any() for rows in busy)
