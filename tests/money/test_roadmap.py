"""The phases: every one keeps the promise or says that it does not pay, and its new fleet can be exported."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from engine.allocation import allocation_from_plain
from planner.cli import main
from planner.money.evidence import read_evidence
from planner.plan_files import write_plan
from planner.plan_record import read_plan, to_json
from planner.plan_run import make_plan
from planner.roadmap import make_roadmap
from planner.scenario import load_scenario

DATA = Path(__file__).resolve().parents[1] / "data"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["diffplan", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def with_roadmap(katz_a: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("roadmap") / "plan"
    shutil.copytree(katz_a, folder)
    patch = pytest.MonkeyPatch()
    assert run(patch, "roi", folder, "--into-plan") == 0
    patch.undo()
    return folder


def test_every_worthwhile_phase_keeps_the_promise_with_no_more_gpus_than_today(with_roadmap: Path) -> None:
    plan = read_plan(with_roadmap)
    assert [phase.name for phase in plan.roadmap] == ["measure", "carve out", "parallelise and tune", "autoscale"]
    today = plan.roadmap[0].n_gpus_today
    for phase in plan.roadmap:
        if phase.is_worthwhile:
            assert (phase.slo_attainment_ratio.mean or 0) >= plan.slo_attainment_ratio, phase.name
            assert phase.n_gpus_new + phase.n_gpus_today <= today
            assert phase.gate
            assert phase.roll_back
            assert phase.watch


def test_the_third_phase_is_the_recommendation_with_the_plans_own_figures(with_roadmap: Path) -> None:
    plan = read_plan(with_roadmap)
    third = plan.roadmap[2]
    assert third.allocation == plan.allocation
    assert third.latency_p95_s == plan.row(plan.recommended or "").latency_p95_s


def test_carving_out_names_the_add_ons_and_hosts_only_them(with_roadmap: Path) -> None:
    second = read_plan(with_roadmap).roadmap[1]
    assert second.is_worthwhile
    assert second.allocation is not None
    base = allocation_from_plain(second.allocation, "phase 2").pools_of("base")[0]
    named = [name for name in base.controlnet_ids if name != "*"]
    assert named
    assert all(name in second.what for name in named)


def test_a_test_needs_whole_gpus_and_states_its_power(with_roadmap: Path) -> None:
    plan = read_plan(with_roadmap)
    for phase in plan.roadmap[1:3]:
        assert phase.test is not None
        assert phase.test.share_ratio >= 1 / phase.n_gpus_new
        assert (phase.test.power, phase.test.significance) == (0.8, 0.05)


def test_traffic_without_a_peak_is_not_autoscaled(with_roadmap: Path) -> None:
    assert not read_plan(with_roadmap).roadmap[3].is_worthwhile


def test_a_plan_without_a_roadmap_keeps_its_bytes_and_the_report_shows_one_that_is_there(
    katz_a: Path, with_roadmap: Path
) -> None:
    assert "roadmap" not in json.loads((katz_a / "plan.json").read_text(encoding="utf-8"))
    assert to_json(read_plan(katz_a)) == (katz_a / "plan.json").read_text(encoding="utf-8")
    without, having = ((folder / "report.md").read_text(encoding="utf-8") for folder in (katz_a, with_roadmap))
    assert "are not simulated yet" in without
    assert "diffplan roi PLAN --into-plan" in without
    assert "are not simulated yet" not in having
    page = (with_roadmap / "report.html").read_text(encoding="utf-8")
    for phase in read_plan(with_roadmap).roadmap:
        assert f"### {phase.number}. {phase.name.capitalize()}" in having
        assert f"<h3>{phase.number}. {phase.name.capitalize()}</h3>" in page


def test_the_new_fleet_of_a_phase_is_exported_and_the_others_say_why_not(
    with_roadmap: Path,
    katz_a: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    second = read_plan(with_roadmap).roadmap[1]
    assert run(monkeypatch, "export", with_roadmap, "--to", "json", "--phase", 2, "--out", tmp_path / "two") == 0
    bill = json.loads((tmp_path / "two" / "json" / "bill.json").read_text(encoding="utf-8"))
    assert bill["total"]["n_gpus"] == second.n_gpus_new
    assert bill["expected"] is None
    assert "--phase 2" in bill["provenance"]["command"]
    for plan, phase, said in (
        (with_roadmap, 1, "runs nothing new"),
        (with_roadmap, 4, "runs nothing new"),
        (with_roadmap, 5, "is not in the roadmap"),
        (katz_a, 2, "a plan without a roadmap"),
    ):
        assert run(monkeypatch, "export", plan, "--to", "json", "--phase", phase, "--out", tmp_path / "no") == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "no").exists()


def test_the_recommendation_as_todays_fleet_leaves_nothing_to_carve_out(katz_b: Path) -> None:
    _, evidence, _ = read_evidence(katz_b)
    assert evidence is not None
    phases = make_roadmap(evidence, "decoupled", evidence.allocation.n_gpus)
    assert not phases[1].is_worthwhile
    assert "already" in phases[1].what
    assert not phases[2].is_worthwhile


def test_a_service_that_cannot_keep_the_promise_today_is_changed_in_full(katz_b: Path) -> None:
    _, evidence, _ = read_evidence(katz_b)
    assert evidence is not None
    phases = make_roadmap(evidence, "colocated", evidence.allocation.n_gpus)
    assert (phases[0].slo_attainment_ratio.mean or 0) < evidence.plan.slo_attainment_ratio
    assert phases[2].is_worthwhile


def test_a_saving_that_does_not_pay_for_the_change_is_not_worthwhile(katz_b: Path) -> None:
    _, evidence, _ = read_evidence(katz_b)
    assert evidence is not None
    more = evidence.allocation.n_gpus + 3
    phases = make_roadmap(evidence, "decoupled", more, pays=False)
    assert not phases[2].is_worthwhile
    assert "does not pay for the change" in phases[2].what


def test_one_busy_hour_of_four_is_autoscaled_for_less(tmp_path: Path) -> None:
    rates = (0.05, 1.0, 0.05, 0.05)
    lines, second = [], 0
    for hour, rate in enumerate(rates):
        for index in range(round(3600 * rate)):
            lines.append(f"r{second},{hour * 3600 + index / rate:.3f},30")
            second += 1
    (tmp_path / "trace.csv").write_text("request_id,arrival_s,n_steps\n" + "\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "profile.json").write_bytes((DATA / "provisional_profile.json").read_bytes())
    (tmp_path / "s.yaml").write_text(
        "name: rush\ntraffic:\n  trace: trace.csv\nslo:\n  latency_s: 120\n  attainment_ratio: 0.8\nprofile:\n  name: profile.json\n"
        "topologies: [diffusers]\nprices:\n  price_usd_per_gpu_hour: 3\nsimulation:\n  replications: 2\n  warmup_s: 0\n",
        encoding="utf-8",
    )
    scenario, folder = load_scenario(str(tmp_path / "s.yaml"))
    write_plan(make_plan(scenario, folder, jobs=1), scenario, folder, tmp_path / "plan")
    plan, evidence, _ = read_evidence(tmp_path / "plan")
    assert evidence is not None
    fourth = make_roadmap(evidence, "diffusers", plan.row("diffusers").n_gpus or 0)[3]
    assert plan.recommended is not None
    fixed = plan.row(plan.recommended)
    assert (fixed.n_gpus or 0) >= 2, "the busy hour needs two replicas, or there is nothing to scale"
    assert fourth.is_worthwhile
    assert (fourth.cost_usd_per_month or 0) < (fixed.cost_usd_per_month or 0)
    assert (fourth.slo_attainment_ratio.mean or 0) >= 0.8
    assert plan.autoscaling is not None
    assert plan.autoscaling.chosen is not None
    assert fourth.allocation == plan.autoscaling.allocation
    assert fourth.cost_usd_per_month == plan.autoscaling.chosen.cost_usd_per_month
    # the same repetitions of the same fleet as in the plan
    assert fourth.slo_attainment_ratio.mean == pytest.approx(
        plan.autoscaling.chosen.slo_attainment_ratio.mean, rel=1e-9
    )
    assert fourth.test is not None
    assert fourth.test.is_no_worse_test


def test_the_roadmap_says_of_autoscaling_what_the_plan_says(with_roadmap: Path) -> None:
    plan = read_plan(with_roadmap)
    assert plan.autoscaling is not None
    fourth = plan.roadmap[3]
    assert fourth.is_worthwhile == (plan.autoscaling.verdict == "autoscale")
    assert fourth.what == plan.autoscaling.why
