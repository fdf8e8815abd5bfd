"""Workers that fail, are repaired, reclaimed and given back. Moments come from the workers' own streams, drawn again here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine.allocation import Allocation, Policies
from engine.policies.autoscale_settings import Autoscale
from planner.service import ServiceTable, build_service
from planner.simulator import SimulationResult, simulate
from planner.simulator.allocated import gpu_hours
from planner.simulator.world import Failures, Reclaims, World
from planner.statistics import t_interval
from tests.simulation_builders import FACTS, SIZES, base_pool, constant_profile, controlnet_pool, run, workload_of
from traces.problems import InputError

SEED = 4


def draws(purpose: str, worker: str, seed: int = SEED) -> Any:
    return World(seed=seed).stream(purpose, worker).standard_exponential


def queue(arrival_s: list[float], service_s: list[float], n: int, world: World, **options: Any) -> SimulationResult:
    workload = workload_of(arrival_s, base_model_id="m", **options.pop("columns", {}))
    service = ServiceTable.from_service_s(workload, np.asarray(service_s))
    autoscale = options.pop("autoscale", None)
    return run(workload, [base_pool(n, base_model_ids=("m",), autoscale=autoscale)], service, world=world, **options)


def spans(result: SimulationResult, worker: str, state: str) -> list[tuple[float, float]]:
    rows = result.workers[(result.workers["worker_id"] == worker) & (result.workers["state"] == state)]
    return list(zip(rows["start_s"].tolist(), rows["end_s"].tolist(), strict=True))


def test_a_request_that_loses_its_worker_starts_anew_when_the_machine_is_back() -> None:
    draw = draws("failure", "base-0")
    fails_s, repair_s, up_s = draw() * 100.0, draw() * 50.0, draw() * 100.0
    ready_s = fails_s + repair_s + 7.0
    # long enough to be lost the first time, short enough to be done before the second failure
    service_s = up_s * 0.9
    arrival_s = fails_s - service_s / 2
    assert arrival_s > 0
    world = World(failures=Failures(mtbf_s=100.0, mttr_s=50.0, start_s=7.0), seed=SEED)
    result = queue([arrival_s], [service_s], 1, world)
    row = result.requests.iloc[0]
    # rel 1e-12: the simulator adds the same numbers in another order
    assert row["status"] == "done"
    assert row["start_s"] == pytest.approx(ready_s, rel=1e-12)
    assert row["latency_s"] == pytest.approx(ready_s + service_s - arrival_s, rel=1e-12)
    assert spans(result, "base-0", "down") == [pytest.approx((fails_s, fails_s + repair_s), rel=1e-12)]
    assert spans(result, "base-0", "loading") == [pytest.approx((fails_s + repair_s, ready_s), rel=1e-12)]
    # the lost half of the work was work too
    busy_s = sum(end - begin for begin, end in spans(result, "base-0", "busy"))
    assert busy_s == pytest.approx(1.5 * service_s, rel=1e-9)


def test_a_request_is_tried_again_once_and_then_failed_with_its_reason() -> None:
    world = World(failures=Failures(mtbf_s=10.0, mttr_s=1.0, start_s=0.0), seed=SEED)
    result = queue([0.0], [1e6], 1, world)
    row = result.requests.iloc[0]
    assert (row["status"], row["reason"]) == ("failed", "its worker failed, tried 2 times")
    assert np.isnan(row["start_s"])
    assert np.isnan(row["latency_s"])
    draw = draws("failure", "base-0")
    assert row["end_s"] == pytest.approx(draw() * 10.0 + draw() * 1.0 + draw() * 10.0, rel=1e-12)
    never = queue([0.0], [1e6], 1, world, policies=Policies(retry_max=0))
    assert never.requests["reason"].tolist() == ["its worker failed"]


def test_a_lost_request_goes_before_those_that_came_after_it() -> None:
    draw = draws("failure", "base-0")
    fails_s = draw() * 100.0
    world = World(failures=Failures(mtbf_s=100.0, mttr_s=0.0, start_s=0.0), seed=SEED)
    result = queue([fails_s - 1.0, fails_s - 0.5, fails_s - 0.5], [1.5, 0.01, 0.01], 1, world)
    starts = result.requests["start_s"].tolist()
    assert starts[0] == pytest.approx(fails_s, rel=1e-12)
    assert starts[1] > starts[0]


def test_a_deadline_that_passed_meanwhile_ends_it() -> None:
    fails_s = draws("failure", "base-0")() * 100.0
    world = World(failures=Failures(mtbf_s=100.0, mttr_s=1.0), seed=SEED)
    result = queue([0.0], [1e6], 1, world, columns={"deadline_s": [fails_s / 2]})
    row = result.requests.iloc[0]
    assert (row["status"], row["reason"]) == ("failed", "its worker failed")
    assert row["end_s"] == pytest.approx(fails_s, rel=1e-12)


def test_availability_is_mtbf_over_mtbf_and_repair_and_start() -> None:
    # 150 workers over 100 000 s, one request at the end keeps the run going; each worker is an independent on-off process
    mtbf_s, mttr_s, start_s = 2000.0, 400.0, 100.0
    world = World(failures=Failures(mtbf_s, mttr_s, start_s), seed=1)
    result = queue([100_000.0], [1.0], 150, world)
    away = result.workers[result.workers["state"].isin(["down", "loading"])]
    length_s = (away["end_s"] - away["start_s"]).groupby(away["worker_id"]).sum() / result.horizon_s
    found = t_interval((1.0 - length_s).to_numpy(), 0.999)
    exact = mtbf_s / (mtbf_s + mttr_s + start_s)
    # it serves from the start: until that is forgotten it is up for at most 1 − availability = 0.2 of a cycle of 2500 s more
    bias = 0.2 * 2500.0 / 100_000.0
    assert found.low - bias < exact < found.high
    assert found.high - found.low < 0.02


def test_streams_belong_to_workers_so_more_workers_change_nobody_elses_moments() -> None:
    world = World(failures=Failures(mtbf_s=50.0, mttr_s=5.0), seed=SEED)
    few = queue([500.0], [1.0], 1, world)
    many = queue([500.0], [1.0], 3, world)
    begun = [begin for begin, _ in spans(few, "base-0", "down")]
    assert begun
    assert begun == [begin for begin, _ in spans(many, "base-0", "down")][: len(begun)]


def test_a_reclaimed_worker_finishes_what_fits_the_notice_and_is_not_paid_while_it_is_gone() -> None:
    draw = draws("reclaim", "base-0")
    notice_s, gone_for_s = draw() * 100.0, draw() * 300.0
    world = World(reclaims=Reclaims(mean_s=100.0, notice_s=20.0, return_s=300.0, start_s=9.0), seed=SEED)
    # the first is at work when the notice comes and ends 10 s later; the second comes after the notice
    result = queue([notice_s - 5.0, notice_s + 1.0], [15.0, 2.0], 1, world)
    ends_s = notice_s + 10.0
    back_s = ends_s + gone_for_s + 9.0
    assert result.requests["end_s"].iloc[0] == pytest.approx(ends_s, rel=1e-12)
    assert result.requests["start_s"].iloc[1] == pytest.approx(back_s, rel=1e-12)
    assert spans(result, "base-0", "down") == [pytest.approx((ends_s, ends_s + gone_for_s), rel=1e-12)]
    paid_s = gpu_hours(result.workers, 0.0, result.horizon_s)["base"] * 3600
    assert paid_s == pytest.approx(result.horizon_s - gone_for_s, rel=1e-12)


def test_what_outlasts_the_notice_is_tried_again() -> None:
    draw = draws("reclaim", "base-0")
    notice_s = draw() * 100.0
    world = World(reclaims=Reclaims(mean_s=100.0, notice_s=20.0, return_s=0.0, start_s=0.0), seed=SEED)
    result = queue([notice_s - 5.0], [26.0], 1, world)
    assert result.requests["start_s"].iloc[0] == pytest.approx(notice_s + 20.0, rel=1e-12)
    assert result.requests["status"].tolist() == ["done"]


def test_losing_a_controlnet_worker_retries_its_requests_and_leaves_the_others_alone() -> None:
    profile = constant_profile()
    fails_s = draws("failure", "controlnet-0")() * 200.0
    n_steps = 400
    workload = workload_of(
        [fails_s - 10.0, fails_s - 10.0], n_steps=n_steps, base_model_id="m", controlnet_ids=[("depth",), ()]
    )
    service = build_service(workload, "decoupled", profile, SIZES)
    pools = (base_pool(2, "decoupled", base_model_ids=("m",)), controlnet_pool(1, "depth"))
    world = World(failures=Failures(200.0, 0.0, start_s=3.0, pools=("controlnet",)), seed=SEED)
    result = simulate(workload, Allocation(pools), {"base": service}, SIZES, FACTS, world=world)
    # back after 3 s of start, 1 s of load and 8 s of fetch
    assert result.requests["start_s"].tolist() == pytest.approx([fails_s + 12.0, fails_s - 10.0], rel=1e-12)
    assert result.requests["status"].tolist() == ["done", "done"]
    # the base worker was free meanwhile; the ControlNet worker's lost forwards count as work
    lost = spans(result, "base-0", "busy")[0]
    assert lost == pytest.approx((fails_s - 10.0, fails_s), rel=1e-12)
    work_s = result.workers.loc[result.workers["worker_id"] == "controlnet-0", "busy_s"].sum()
    step_s = max(0.04, 0.05 + 0.01) + 0.06 + 0.002
    done_alone_s = (10.0 - 0.5) / step_s * 0.05  # text takes 0.5 s before the first step
    assert work_s == pytest.approx(done_alone_s + n_steps * 0.05, rel=1e-9)


def test_an_autoscaled_pool_counts_a_failed_replica_until_it_is_back() -> None:
    settings = Autoscale(3, "keda", start_s=11.0)
    fails_s = draws("failure", "base-0")() * 100.0
    world = World(failures=Failures(mtbf_s=100.0, mttr_s=0.0, start_s=999.0), seed=SEED)
    result = queue([fails_s + 100.0], [1.0], 1, world, autoscale=settings)
    # the pool's own start_s, not that of the failures
    assert spans(result, "base-0", "loading")[0] == pytest.approx((fails_s, fails_s + 11.0), rel=1e-12)
    assert len(result.workers[(result.workers["worker_id"] == "base-1")]) == 1


def test_hazards_out_of_range_and_unknown_pools_are_refused_together() -> None:
    world = World(failures=Failures(0.0, -1.0, pools=("bass",)), reclaims=Reclaims(-3.0, notice_s=-1.0))
    with pytest.raises(InputError) as caught:
        queue([0.0], [1.0], 1, world)
    text = str(caught.value)
    for sentence in (
        "failures.mtbf_s: got 0.0",
        "failures.mttr_s: got -1.0",
        "got 'bass', needs one of base",
        "reclaims.notice_s",
    ):
        assert sentence in text
