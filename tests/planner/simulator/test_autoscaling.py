"""Pools that grow and shrink, on time lines worked out by hand from the autoscalers' documented rules."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from engine.allocation import Allocation
from engine.policies.autoscale import hpa_fewest, hpa_limited, hpa_most, hpa_stabilised
from engine.policies.autoscale_settings import Autoscale
from planner.service import ServiceTable, build_service
from planner.simulator import SimulationResult, simulate
from planner.simulator.allocated import gpu_hours
from planner.simulator.autoscaler import Gauge, WindowMean
from planner.simulator.environment import ExactEnvironment
from tests.simulation_builders import (
    FACTS,
    SIZES,
    base_pool,
    constant_profile,
    controlnet_pool,
    run,
    workload_of,
)
from traces.problems import InputError


def queue(
    arrival_s: list[float], service_s: float, n_start: int, settings: Autoscale, **options: Any
) -> SimulationResult:
    """Requests of one length on an autoscaled pool that needs no loading."""
    workload = workload_of(arrival_s, base_model_id="m", **options)
    service = ServiceTable.from_service_s(workload, np.full(len(arrival_s), service_s))
    return run(workload, [base_pool(n_start, base_model_ids=("m",), autoscale=settings)], service)


def spans(result: SimulationResult, worker: str, state: str) -> list[tuple[float, float]]:
    rows = result.workers[(result.workers["worker_id"] == worker) & (result.workers["state"] == state)]
    return list(zip(rows["start_s"].tolist(), rows["end_s"].tolist(), strict=True))


def test_keda_adds_what_the_queue_asks_for_and_new_replicas_serve_after_start_and_attach() -> None:
    settings = Autoscale(10, "keda", start_s=60.0, attach_s=2.0)
    result = queue([1.0] * 20, 10.0, 1, settings)
    # 15 s: 20 came, one has ended: ⌈19 / 5⌉ = 4; 3 more start and are ready at 15 + 60 + 2
    for worker in ("base-1", "base-2", "base-3"):
        assert spans(result, worker, "loading") == [(15.0, 77.0)]
        assert spans(result, worker, "down") == [(0.0, 15.0)]
    assert spans(result, "base-4", "down") == [(0.0, result.horizon_s)]
    # base-0 alone until 77 (starts at 1, 11, …, 71), then four: the 9th, 10th, 11th start at 77
    starts = np.sort(result.requests["start_s"].to_numpy())
    assert starts.tolist() == [1.0 + 10 * k for k in range(8)] + [77.0] * 3 + [
        81.0,
        87.0,
        87.0,
        87.0,
        91.0,
        97.0,
        97.0,
        97.0,
        101.0,
    ]


def test_keda_goes_down_after_the_stabilisation_window_and_to_zero_after_the_cooldown() -> None:
    settings = Autoscale(4, "keda", min_replicas=0, start_s=0.0, down_window_s=60.0, cooldown_s=120.0)
    # one late request keeps the run going until it has all happened
    result = queue([1.0] * 20 + [500.0], 4.0, 4, settings)
    # five rounds of four: the queue is empty at 21; recommendations: 15 s: 8 waiting and running → ⌈8/5⌉ = 2; later 0
    # stabilised: the 4 of time 0 leaves the window at 60, the 2 of 15 s at 75; then HPA holds one at least
    for worker, off_s in (("base-3", 60.0), ("base-2", 60.0), ("base-1", 75.0)):
        assert spans(result, worker, "down")[0][0] == off_s
    # KEDA polls every 30 s; at 0..30 the queue was not empty only before 21; its last look above 0 was never after 0,
    # so the first poll more than 120 s after that takes the last one: 150
    assert spans(result, "base-0", "down") == [(150.0, 510.0)]
    # 500: nothing until KEDA's poll at 510; start takes no time
    assert result.requests["start_s"].iloc[-1] == 510.0


def test_hpa_holds_the_busy_ratio() -> None:
    settings = Autoscale(10, "hpa", target=0.5, start_s=0.0)
    # two replicas always busy from 0 on: usage 1 of 0.5 asked: ⌈2 · 2⌉ = 4 at 15 s, four busy: 8 at 30 s
    result = queue([0.0] * 100, 30.0, 2, settings)
    assert [spans(result, f"base-{k}", "down")[0][1] for k in (2, 3, 4, 7)] == [15.0, 15.0, 30.0, 30.0]
    assert spans(result, "base-8", "down")[0][1] == 45.0


def test_hpa_ignores_replicas_that_still_start() -> None:
    settings = Autoscale(10, "hpa", target=0.8, start_s=100.0)
    result = queue([0.0] * 40, 40.0, 4, settings)
    # 15 s: 1 / 0.8 · 4 = 5; 30 s: four busy, one starting counts 0: mean 0.8 = target, so nothing happens until it is there
    assert spans(result, "base-4", "loading") == [(15.0, 115.0)]
    # 120 s: base-4 busy since 115, 5 of the 15 s: usage (4·15 + 5)/15/5 = 0.8667 → within the tolerance; 135 s: 5/0.8 = 6.25
    assert spans(result, "base-5", "loading")[0][0] == 135.0
    assert spans(result, "base-6", "loading")[0][0] == 135.0


def test_knative_panics_within_seconds_and_reaches_zero_after_window_and_grace() -> None:
    settings = Autoscale(20, "kpa", min_replicas=0, start_s=3.0)
    result = queue([100.0] * 10 + [400.0], 30.0, 0, settings)
    # at 100 the activator asks for one at once. 102 s: ten for 2 s of the last 6 and 60: 3.33 / 0.7 → 5 in panic
    assert spans(result, "base-0", "down")[0] == (0.0, 100.0)
    # the mean over 6 s: 2/6·10, 4/6·10, 10 → ⌈/0.7⌉ = 5, 10, 15
    assert [spans(result, f"base-{k}", "down")[0][1] for k in (1, 4, 5, 9, 10, 14)] == [
        102.0,
        102.0,
        104.0,
        104.0,
        106.0,
        106.0,
    ]
    # everything ends by 139; the 6 s mean falls under the threshold, the panic ends 60 s after its last moment; the
    # 60 s mean is 0 at the latest 200 s, the last goes at least 30 s later
    last_end_s = float(result.requests["end_s"].iloc[:10].max())
    off_s = spans(result, "base-0", "down")[1][0]
    assert last_end_s + 60.0 + 30.0 <= off_s <= last_end_s + 60.0 + 30.0 + 2 * 2.0 + 60.0
    # and the next request wakes one at once
    assert result.requests["start_s"].iloc[10] == 403.0


def test_ray_serve_waits_its_delay_and_averages_over_the_look_back() -> None:
    settings = Autoscale(10, "ray_serve", start_s=0.0)
    result = queue([0.0] * 12, 200.0, 3, settings)
    # 12 ongoing of 2 a replica asks for 6 from the first look on; more than 300 looks of 0.1 s: the 301st, at 30.1 s
    ups = [spans(result, f"base-{k}", "down")[0][1] for k in (3, 4, 5)]
    # 1e-9: the look's time is a product of its number and 0.1
    assert ups == pytest.approx([30.1] * 3, abs=1e-9)
    # six of the twelve end at 200, 200, 200, 230.1 …: never fewer than half for 600 s, so nobody leaves
    assert result.workers[result.workers["state"] == "down"]["start_s"].max() == 0.0


def test_a_busy_replica_finishes_before_it_goes_and_idle_ones_go_first() -> None:
    settings = Autoscale(4, "keda", start_s=0.0, down_window_s=0.0)
    # base-0..3 take one each; at 15 s two run (base-0, base-3): ⌈2/5⌉ = 1, so three go: idle base-2, base-1 at once,
    # of the busy ones the last place
    workload = workload_of([0.0] * 4, base_model_id="m")
    service = ServiceTable.from_service_s(workload, np.array([40.0, 5.0, 5.0, 40.0]))
    result = run(workload, [base_pool(4, base_model_ids=("m",), autoscale=settings)], service)
    assert spans(result, "base-2", "down") == [(15.0, 40.0)]
    assert spans(result, "base-1", "down") == [(15.0, 40.0)]
    assert spans(result, "base-3", "busy") == [(0.0, 40.0)]
    assert (result.requests["status"] == "done").all()


def test_gpu_hours_count_only_allocated_time() -> None:
    settings = Autoscale(10, "keda", start_s=60.0, attach_s=2.0)
    result = queue([1.0] * 20, 10.0, 1, settings)
    end_s = result.horizon_s
    # base-0 all the time, three from 15 s on (starting is paid for), the other six never
    assert gpu_hours(result.workers, 0.0, end_s)["base"] * 3600 == pytest.approx(end_s + 3 * (end_s - 15.0), rel=1e-12)
    assert gpu_hours(result.workers, 0.0, 15.0)["base"] * 3600 == pytest.approx(15.0, rel=1e-12)
    static = run(workload_of([0.0]), [base_pool(3)], ServiceTable.from_service_s(workload_of([0.0]), np.array([7.0])))
    assert gpu_hours(static.workers, 0.0, 7.0)["base"] * 3600 == pytest.approx(21.0, rel=1e-12)


def test_a_new_replica_loads_its_checkpoint_before_it_serves_and_a_warm_one_does_not_start_first() -> None:
    profile = constant_profile()
    workload = workload_of([0.0] * 12, n_steps=600, base_model_id="m")  # 61 s each
    service = build_service(workload, "colocated", profile, SIZES)
    load_s = 4.0 + 8.0  # onto the device, and from the remote store: a new machine's memory is empty
    for n_warm, ready_s in ((0, 15.0 + 60.0 + load_s + 1.0), (2, 15.0 + load_s + 1.0)):
        settings = Autoscale(3, "keda", start_s=60.0, attach_s=1.0, warm_replicas=n_warm)
        result = run(workload, [base_pool(1, base_model_ids=("m",), autoscale=settings)], service)
        assert spans(result, "base-1", "loading") == [(15.0, ready_s)]
        assert result.requests["is_switch"].sum() == 0
    # two are paid for from the start where two are kept warm
    assert gpu_hours(result.workers, 0.0, 15.0)["base"] * 3600 == pytest.approx(45.0, rel=1e-12)


def test_controlnet_workers_grow_with_the_requests_that_need_them() -> None:
    profile = constant_profile()
    workload = workload_of([0.0] * 8, n_steps=300, base_model_id="m", controlnet_ids=("depth",))
    service = build_service(workload, "decoupled", profile, SIZES)
    settings = Autoscale(4, "keda", target=2.0, start_s=20.0)
    pools = (base_pool(4, "decoupled", base_model_ids=("m",)), replace(controlnet_pool(1, "depth"), autoscale=settings))
    result = simulate(workload, Allocation(pools), {"base": service}, SIZES, FACTS)
    # 15 s: four denoise, four wait: ⌈8/2⌉ = 4; a ControlNet takes 1 s onto the device and 8 s from the store
    for worker in ("controlnet-1", "controlnet-2", "controlnet-3"):
        assert spans(result, worker, "loading") == [(15.0, 15.0 + 20.0 + 9.0)]
        assert spans(result, worker, "busy")
    assert (result.requests["status"] == "done").all()


def test_requests_that_need_a_controlnet_wait_for_a_worker_while_others_pass() -> None:
    profile = constant_profile()
    workload = workload_of([0.0, 1.0], n_steps=10, base_model_id="m", controlnet_ids=[("depth",), ()])
    service = build_service(workload, "decoupled", profile, SIZES)
    settings = Autoscale(1, "kpa", min_replicas=0, start_s=50.0)
    pools = (
        base_pool(1, "decoupled", base_model_ids=("m",)),
        replace(controlnet_pool(0, "depth"), n_replicas=0, autoscale=settings),
    )
    result = simulate(workload, Allocation(pools), {"base": service}, SIZES, FACTS)
    assert result.requests["start_s"].tolist() == [59.0, 1.0]  # 50 to start, 9 to load; asked for at once


def test_a_run_ends_although_nobody_ever_comes() -> None:
    # KEDA wakes a pool only above its activation; one request is not above one
    settings = Autoscale(2, "keda", min_replicas=0, activation=1.0)
    result = queue([10.0], 5.0, 0, settings)
    assert result.requests["status"].tolist() == ["failed"]
    assert result.requests["reason"].tolist() == ["no worker came up to serve it"]


@pytest.mark.parametrize(
    ("settings", "n_start", "sentence"),
    [
        (Autoscale(4, min_replicas=5), 4, "min_replicas is 5"),
        (Autoscale(0), 0, "max_replicas is 0"),
        (Autoscale(4), 5, "n_replicas is 5, needs min_replicas..max_replicas, 1..4"),
        (Autoscale(4, "hpa", min_replicas=0), 1, "1 or more for kind 'hpa'"),
        (Autoscale(4, target=0.0), 1, "target is 0.0"),
        (Autoscale(4, "kpa", max_down_ratio=1.0), 1, "max_down_ratio is 1.0"),
    ],
)
def test_impossible_settings_are_refused_with_a_sentence(settings: Autoscale, n_start: int, sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        queue([0.0], 1.0, n_start, settings)
    assert sentence in str(caught.value)


def test_a_window_mean_is_the_integral_over_its_length() -> None:
    gauge = Gauge()
    mean = WindowMean(gauge, 6.0)
    gauge.add(3.0, 1.0)
    mean.look(2.0)
    assert mean.mean(2.0, 6.0) == pytest.approx(1.5)  # 3 for one of the two seconds there were
    gauge.add(-2.0, 3.0)
    mean.look(4.0)
    assert mean.mean(4.0, 2.0) == pytest.approx((3.0 + 1.0) / 2)
    for now_s in (6.0, 8.0, 10.0, 12.0):
        mean.look(now_s)
    assert mean.mean(12.0, 6.0) == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "settings",
    [
        Autoscale(6, "keda", min_replicas=0, target=2.0, cooldown_s=60.0),
        Autoscale(6, "hpa", target=0.5),
        Autoscale(6, "kpa", min_replicas=0),
        Autoscale(6, "ray_serve", min_replicas=1, interval_s=5.0),
    ],
    ids=lambda settings: settings.kind,
)
def test_looks_that_skip_the_scheduler_leave_the_same_records(
    settings: Autoscale, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(seed)
    # whole seconds, so that arrivals fall on looks; long pauses, so that some looks lie alone
    arrival_s = np.cumsum(rng.choice([0.0, 1.0, 15.0, 400.0], 60, p=[0.3, 0.4, 0.2, 0.1])).tolist()
    skipping = queue(arrival_s, 10.0, 1, settings)
    monkeypatch.setattr(ExactEnvironment, "skip_to", lambda *_: False)
    scheduled = queue(arrival_s, 10.0, 1, settings)
    assert skipping.requests.equals(scheduled.requests)
    assert skipping.workers.equals(scheduled.workers)
    assert skipping.n_events == scheduled.n_events


@pytest.mark.parametrize("seed", range(50))
def test_an_hpa_that_asks_for_what_there_is_gets_it_whatever_windows_and_rates_say(seed: int) -> None:
    # the shortcut of Autoscaler: the rule in full would say the same
    rng = np.random.default_rng(seed)
    n_min, n_max = 1 + int(rng.integers(3)), 8
    n_current = int(rng.integers(n_min, n_max + 1))
    wanted = n_current if n_current > n_min or seed % 2 else int(rng.integers(0, n_min + 1))
    times_s = np.sort(rng.uniform(0, 300, 8)).tolist()
    earlier = rng.integers(0, 10, 8).tolist()
    held = hpa_stabilised(n_current, wanted, times_s, earlier, 300.0, float(rng.choice([0, 60])), 200.0)
    if wanted == n_current:
        assert held == n_current
    n_added, n_removed = (int(n) for n in rng.integers(0, 4, 2))
    most = hpa_most(n_current, n_added, n_removed, 4, 1.0)
    fewest = hpa_fewest(n_current, n_added, n_removed, int(rng.integers(0, 3)), 1.0)
    assert hpa_limited(n_current, held, n_min, n_max, most, fewest) == n_current
