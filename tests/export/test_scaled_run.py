"""Autoscaled pods are simulated as exported: one replica and one queue each, added and removed by KEDA's own rules."""

from __future__ import annotations

import dataclasses
import datetime
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from engine.allocation import Allocation, Policies
from engine.policies.autoscale_settings import Autoscale
from planner.decision_record import AutoscaledRow, AutoscalingRecord
from planner.export.ask import ExportQuestion, answer
from planner.export.balanced_run import run_pods
from planner.export.pods_figures import Front
from planner.export.scaled_run import ScaledServed, run_scaled_pods
from planner.plan_files import write_plan
from planner.plan_record import Estimate, read_plan, to_json
from planner.plan_run import make_plan
from planner.replication import Inputs, load_inputs
from planner.scenario import Scenario, load_scenario
from planner.traffic import build_traffic
from planner.workload import Workload
from tests.export.plans import pool
from tests.planner.planning import write_scenario
from traces.problems import InputError

FEWEST = Front("least_outstanding")
REPLICA = Allocation((pool(n=1, topology="diffusers"),))
Bench = tuple[Scenario, Inputs, Workload]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("bench")
    scenario, here = load_scenario(str(write_scenario(folder, more="topologies: [diffusers]\n")))
    return scenario, load_inputs(scenario, here), build_traffic(scenario, here, 0).workload


def scaled(bench: Bench, n_start: int, front: Front = FEWEST, **settings: float) -> ScaledServed:
    return run_scaled_pods(*bench, REPLICA, Autoscale(**settings), n_start, front, 0)  # type: ignore[arg-type]


def quiet_after(bench: Bench, stop_s: float, until_s: float) -> Bench:
    """The same requests up to a time, and nothing from then on but one at the very end."""
    scenario, inputs, workload = bench
    kept = workload.subset(workload.arrival_s < stop_s)
    arrival_s = kept.arrival_s.copy()
    arrival_s[-1] = until_s
    return scenario, inputs, dataclasses.replace(kept, arrival_s=arrival_s, duration_s=until_s)


@pytest.mark.parametrize("front", [FEWEST, Front("least_outstanding", 2)])
def test_an_autoscaler_that_may_not_scale_gives_the_pods_of_a_fixed_fleet(bench: Bench, front: Front) -> None:
    pinned = scaled(bench, 3, front, min_replicas=3, max_replicas=3)
    fixed = run_pods(*bench, [REPLICA] * 3, front, 0)
    pd.testing.assert_frame_equal(pinned.requests, fixed.requests, check_exact=True)
    assert (pinned.mean_gpus, pinned.n_starts) == (3.0, 0)


@pytest.mark.parametrize("front", [FEWEST, Front("random")])
def test_every_request_is_served_once_while_pods_come_and_go(bench: Bench, front: Front) -> None:
    served = scaled(bench, 1, front, min_replicas=1, max_replicas=6, target=1.0)
    assert served.n_starts > 0
    assert sorted(served.requests["request_id"]) == sorted(bench[2].request_ids)
    assert (served.requests["status"] == "done").all()
    assert 1.0 < served.mean_gpus < 6.0


def test_a_pod_serves_nothing_before_it_has_started(bench: Bench) -> None:
    """With a start longer than the traffic all pods but the first might as well not be there."""
    late = scaled(bench, 1, min_replicas=1, max_replicas=6, target=1.0, start_s=1e6)
    alone = scaled(bench, 1, min_replicas=1, max_replicas=1)
    assert late.n_starts > 0
    assert late.requests["latency_s"].tolist() == alone.requests["latency_s"].tolist()
    assert late.mean_gpus > alone.mean_gpus  # they are paid for all the same


def test_pods_that_go_finish_what_they_have_and_are_paid_for_until_then(bench: Bench) -> None:
    quiet = quiet_after(bench, 120.0, 7200.0)
    served = scaled(quiet, 4, min_replicas=1, max_replicas=4, target=1.0)
    assert (served.requests["status"] == "done").all()
    busy_until_s = float(np.sort(served.requests["end_s"])[-2])
    # three of four pods leave once the 300 s of KEDA's window have passed without need of them; a look comes every 15 s, and
    # the scale-down goes at most as fast as its policy, all at once
    least = (7200.0 + 3 * 300.0) / 7200.0
    most = (7200.0 + 3 * (busy_until_s + 300.0 + 2 * 15.0)) / 7200.0
    assert least <= served.mean_gpus <= most


def test_the_same_question_gets_the_same_answer(bench: Bench) -> None:
    first, again = (scaled(bench, 2, min_replicas=1, max_replicas=5, target=2.0) for _ in range(2))
    pd.testing.assert_frame_equal(first.requests, again.requests, check_exact=True)
    assert first.mean_gpus == again.mean_gpus


@pytest.mark.parametrize(
    ("replica", "settings", "sentence"),
    [
        (REPLICA, Autoscale(max_replicas=3, kind="hpa"), "pods that hpa scales"),
        (REPLICA, Autoscale(max_replicas=3, min_replicas=0), "keda with min_replicas 0"),
        (dataclasses.replace(REPLICA, policies=Policies(deadline_s=1.0)), Autoscale(max_replicas=3), "with default_deadline"),
    ],
)  # fmt: skip
def test_what_is_not_simulated_is_refused_by_name(
    bench: Bench, replica: Allocation, settings: Autoscale, sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        run_scaled_pods(*bench, replica, settings, 1, FEWEST, 0)


def test_the_exported_variant_is_compared_with_what_the_plan_says_of_it(tmp_path: Path) -> None:
    scenario, here = load_scenario(str(write_scenario(tmp_path, more="topologies: [diffusers]\n")))
    result = make_plan(scenario, here, jobs=1)
    assert result.allocation is not None
    write_plan(result, scenario, here, tmp_path / "plan")
    plan = read_plan(tmp_path / "plan")
    base = result.allocation.pools[0]
    settings = Autoscale(min_replicas=1, max_replicas=base.n_replicas, target=1.0)
    variant = dataclasses.replace(
        result.allocation, pools=(dataclasses.replace(base, n_replicas=1, autoscale=settings),)
    )
    about = Estimate(mean=3.0, low=2.5, high=3.5)
    row = AutoscaledRow(
        kind="keda", min_replicas=1, max_replicas=base.n_replicas, target=1.0, cooldown_s=300.0, n_repetitions=3, mean_gpus=about,
        gpu_hours_per_month=2190.0, cost_usd_per_month=4380.0, slo_attainment_ratio=Estimate(mean=0.95, low=0.9, high=1.0),
        latency_p50_s=about, latency_p99_s=about, keeps_promise=True,
    )  # fmt: skip
    record = AutoscalingRecord(
        verdict="autoscale", why="", fixed_gpu_hours_per_month=2920.0, fixed_cost_usd_per_month=5840.0, saving_usd_per_month=1460.0,
        start_s=60.0, chosen=row, tried=(row,), allocation=dataclasses.asdict(variant),
    )  # fmt: skip
    text = to_json(plan.model_copy(update={"autoscaling": record}))
    (tmp_path / "plan" / "plan.json").write_text(text, encoding="utf-8")
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(
        "image: a:1\nstore: {volume_claim: models}\nbalancer: {image: 'haproxy:3.0'}\n", encoding="utf-8"
    )
    question = ExportQuestion(
        tmp_path / "plan", ("kubernetes",), tmp_path / "out", cluster, None, False, None, None, True, is_autoscaled=True
    )
    answer(question, datetime.date(2026, 12, 1))
    seen = json.loads((tmp_path / "out" / "kubernetes" / "as-exported.json").read_text(encoding="utf-8"))
    assert seen["pods_between"] == [1, base.n_replicas]
    assert seen["as_planned"]["mean_gpus"] == 3.0
    assert 1.0 <= seen["as_exported"]["mean_gpus"] <= base.n_replicas
    said = (tmp_path / "out" / "kubernetes" / "base" / "engine-base-1.yaml").read_text(encoding="utf-8")
    assert f"1 to {base.n_replicas} engines of one replica with a queue each, scaled by KEDA" in said
