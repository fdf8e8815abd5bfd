"""A plan over several GPU kinds: the cheapest fleet wins, alone or mixed, and what cannot win is dropped with its reason."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from calibrate.profile import LatencyProfile
from calibrate.profile_file import load_profile, to_json
from calibrate.roofline import transfer_profile
from planner.cli import main
from planner.export.ask import ExportQuestion, answer
from planner.kind_option import with_other_kinds
from planner.kinds import lenses_of
from planner.money.assumptions import Assumptions
from planner.money.roi import make_roi
from planner.plan_files import write_plan
from planner.plan_record import PlanRecord, read_plan
from planner.plan_record import to_json as plan_json
from planner.plan_run import PlanResult, make_plan
from planner.profile_choice import absolute_reference, profile_of
from planner.scenario import Scenario, load_scenario, to_yaml
from planner.simulate_run import simulate_once
from traces.problems import InputError

MEASURED = Path(__file__).resolve().parents[1] / "data" / "provisional_profile.json"
CONTROLNET = ("engine.controlnet_step", "engine.controlnet_load")
Write = Callable[..., Path]


def profile_like(kind: str, factor: float, *, but: tuple[str, ...] = (), memory_gib: float | None = None) -> str:
    """The measured profile with every law's seconds multiplied, except those of ``but``; another kind, perhaps other memory."""
    own: LatencyProfile = load_profile(str(MEASURED))

    def of(name: str) -> float:
        return 1.0 if name in but else factor

    laws = {
        name: dataclasses.replace(law, parameters={key: of(name) * value for key, value in law.parameters.items()})
        for name, law in own.laws.items()
    }
    draws = {key: tuple(of(key.split(":")[0]) * value for value in drawn) for key, drawn in own.draws.items()}
    facts = dict(own.facts)
    if memory_gib is not None:
        facts["device_memory_gib"] = dataclasses.replace(facts["device_memory_gib"], value=memory_gib)
    return to_json(dataclasses.replace(own, gpu_kind=kind, laws=laws, draws=draws, facts=facts))


def others(*items: str) -> str:
    return "gpu:\n  others:\n" + "".join(f"  - {{{item}}}\n" for item in items)


def planned(path: Path, jobs: int = 1) -> PlanResult:
    return make_plan(*load_scenario(str(path)), jobs=jobs)


@pytest.fixture
def ask(tmp_path: Path, write_scenario: Write) -> Callable[..., Path]:
    """Writes a question beside profiles of other kinds; its own GPU, nvidia-h200, costs $2."""

    def write(
        more: str, profiles: dict[str, str], *, topologies: str = "colocated", latency_s: float = 12.0, scale: int = 8
    ) -> Path:
        for name, text in profiles.items():
            (tmp_path / f"{name}.json").write_text(text, encoding="utf-8")
        path = write_scenario(tmp_path, latency_s=latency_s, more=f"topologies: [{topologies}]\n{more}")
        path.write_text(path.read_text(encoding="utf-8").replace("scale_factor: 2", f"scale_factor: {scale}"))
        return path

    return write


def kinds_of(plan: PlanRecord) -> tuple[str | None, str | None]:
    assert plan.kinds is not None
    return plan.kinds.base_gpu_kind, plan.kinds.worker_gpu_kind


@pytest.mark.parametrize(
    ("price", "wins"), [(6.0, "nvidia-h200"), (3.0, "fast")], ids=["three times the price", "one and a half"]
)
def test_a_kind_twice_as_fast_wins_at_less_than_twice_the_price(ask: Any, price: float, wins: str) -> None:
    path = ask(
        others(f"kind: fast, profile: fast.json, price_usd_per_gpu_hour: {price}"),
        {"fast": profile_like("fast", 0.5)},
        latency_s=20.0,
    )
    plan = planned(path).record
    assert kinds_of(plan) == (wins, wins)
    assert plan.ids.profile_gpu_kind == wins
    assert f"the fleet is on {wins}" in plan.sentence
    rows = {row.gpu_kind: row for row in plan.kinds.rows} if plan.kinds else {}
    assert set(rows) == {"nvidia-h200", "fast"}
    dearer = rows["fast" if wins == "nvidia-h200" else "nvidia-h200"]
    assert dearer.verdict != "infeasible"
    least = dearer.cost_usd_per_month or dearer.bound_usd_per_month or 0.0
    assert least > (plan.row("colocated").cost_usd_per_month or 0.0)


def test_only_the_kind_that_can_keep_the_promise_is_recommended_however_dear(ask: Any) -> None:
    path = ask(
        others("kind: fast, profile: fast.json, price_usd_per_gpu_hour: 40.0"),
        {"fast": profile_like("fast", 0.4)},
        latency_s=1.5,
    )
    plan = planned(path).record
    assert kinds_of(plan) == ("fast", "fast")
    assert "nvidia-h200 cannot keep the promise (slo.latency_s" in plan.sentence


def test_a_kind_whose_work_alone_costs_more_is_dropped_without_a_simulation_and_the_plan_says_so(ask: Any) -> None:
    path = ask(
        others("kind: slow, profile: slow.json, price_usd_per_gpu_hour: 2.0"),
        {"slow": profile_like("slow", 3.0)},
        latency_s=30.0,
    )
    plan = planned(path).record
    assert plan.kinds is not None
    (row,) = [row for row in plan.kinds.rows if row.gpu_kind == "slow"]
    assert row.verdict == "dearer by its bound"
    assert row.n_gpus is None
    assert (row.bound_usd_per_month or 0.0) > (plan.row("colocated").cost_usd_per_month or 0.0)
    assert "slow is left out: its work alone costs" in plan.sentence


def test_models_that_do_not_fit_a_kind_make_it_infeasible_by_its_memory(ask: Any) -> None:
    path = ask(
        others(
            "kind: small, profile: small.json, price_usd_per_gpu_hour: 0.01",
            "kind: large, profile: large.json, price_usd_per_gpu_hour: 0.9, gpus_max: 1",
        ),
        {"small": profile_like("small", 1.0, memory_gib=6.0), "large": profile_like("large", 1.0)},
    )
    plan = planned(path).record
    assert kinds_of(plan) == ("nvidia-h200", "nvidia-h200")
    why = {row.gpu_kind: row.why for row in plan.kinds.rows} if plan.kinds else {}
    assert why["small"].startswith("gpu.device_memory_gib: a request needs")
    assert why["large"] == "search.gpus_max: no allocation of up to 1 GPUs meets the SLO"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, write_scenario: Write) -> tuple[PlanResult, Scenario, Path, Path]:
    """Base work is slow on the cheap kind, ControlNets are as fast there: they belong on it, base replicas do not."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "cheap.json").write_text(profile_like("cheap", 8.0, but=CONTROLNET), encoding="utf-8")
    more = "topologies: [colocated, decoupled]\n" + others(
        "kind: cheap, profile: cheap.json, price_usd_per_gpu_hour: 0.35"
    )
    path = write_scenario(folder, latency_s=9.0, more=more)
    path.write_text(path.read_text(encoding="utf-8").replace("scale_factor: 2", "scale_factor: 16"), encoding="utf-8")
    scenario, here = load_scenario(str(path))
    result = make_plan(scenario, here, jobs=1)
    write_plan(result, scenario, here, folder / "out")
    return result, scenario, here, folder / "out"


def test_controlnets_go_to_the_kind_where_their_work_is_cheaper(mixed: Any) -> None:
    result, _, _, _ = mixed
    plan = result.record
    assert kinds_of(plan) == ("nvidia-h200", "cheap")
    assert plan.recommended == "decoupled"
    assert {pool.gpu_kind for pool in result.allocation.pools_of("base")} == {"nvidia-h200"}
    assert {pool.gpu_kind for pool in result.allocation.pools_of("controlnet")} == {"cheap"}
    n_base, n_workers = (sum(p.n_gpus for p in result.allocation.pools_of(role)) for role in ("base", "controlnet"))
    # 730 h at $2 and at $0.35
    assert plan.row("decoupled").cost_usd_per_month == pytest.approx(730 * (2.0 * n_base + 0.35 * n_workers))
    assert "ControlNet workers on cheap" in plan.sentence
    assert plan.runner_up.startswith("colocated with")


def test_the_simpy_model_with_both_kinds_gives_the_times_that_the_search_went_by(mixed: Any) -> None:
    result, _, _, _ = mixed
    assert result.record.selection is not None
    assert "winner (2400 requests)" in result.record.selection.checked_by
    assert "the SimPy model gives the same times to 1e-09" in result.record.selection.checked_by


def test_workers_of_another_kind_are_taken_to_be_on_another_host(mixed: Any) -> None:
    result, _, _, _ = mixed
    assert {link.kind for link in result.allocation.links} == {"network"}
    assert "engine.residual_transfer.network" in result.record.row("decoupled").grades


def test_what_a_fleet_on_two_kinds_has_no_answer_to_is_said(mixed: Any) -> None:
    result, _, _, out = mixed
    plan = result.record
    assert plan.autoscaling is not None
    assert plan.autoscaling.verdict == "not simulated"
    assert plan.autoscaling.fixed_cost_usd_per_month == plan.row("decoupled").cost_usd_per_month
    assert (plan.purchasing, plan.add_ons, plan.settings, plan.checkpoints) == (None, None, None, None)
    assert plan.kinds is not None
    assert set(plan.kinds.not_looked_at) <= set(plan.notes)
    with pytest.raises(InputError, match="a fleet on two GPU kinds"):
        make_roi(out, Assumptions())


def test_prices_of_both_kinds_have_flip_points_at_which_the_costs_are_equal(mixed: Any) -> None:
    result, _, _, _ = mixed
    plan = result.record
    flips = {flip.what: flip for flip in plan.flip_points}
    flip = flips["price of cheap GPUs"]
    n_workers = sum(pool.n_gpus for pool in result.allocation.pools_of("controlnet"))
    own, rival = plan.row("decoupled").cost_usd_per_month, plan.row("colocated").cost_usd_per_month
    # all else as planned, the workers cost ((rival - own) / theirs) more until both cost the same; rounded to 4 digits
    assert flip.winner_until == pytest.approx(1 + (rival - own) / (730 * 0.35 * n_workers), abs=1e-4)
    assert (flip.then, flip.then_kinds) == ("colocated", "on nvidia-h200")


def test_the_bill_of_a_mixed_fleet_prices_each_pool_by_its_kind_and_a_cluster_of_it_is_refused(
    mixed: Any, tmp_path: Path
) -> None:
    result, _, _, out = mixed

    def export(to: tuple[str, ...], cluster: Path | None = None) -> None:
        asked = ExportQuestion(out, to, tmp_path / to[0], cluster, None, False, None, None, False)
        answer(asked, datetime.date(2026, 11, 24), lambda text: None)

    export(("json", "csv"))
    bill = json.loads((tmp_path / "json" / "json" / "bill.json").read_text(encoding="utf-8"))
    assert {row["gpu_kind"]: row["price_usd_per_gpu_hour"] for row in bill["rows"]} == {
        "nvidia-h200": 2.0,
        "cheap": 0.35,
    }
    assert bill["total"]["cost_usd_per_month"] == pytest.approx(result.record.row("decoupled").cost_usd_per_month)
    cluster = Path(__file__).resolve().parents[2] / "examples" / "export" / "cluster.yaml"
    with pytest.raises(InputError, match="is of kind 'network'"):
        export(("terraform",), cluster)


def test_the_files_ask_the_same_question_again_and_give_the_same_fleet(mixed: Any) -> None:
    result, scenario, _, out = mixed
    again, here = load_scenario(str(out / "scenario.resolved.yaml"))
    assert again.gpu.controlnet_kind == "cheap"
    assert scenario.gpu.controlnet_kind is None
    assert make_plan(again, here, jobs=1).record.allocation == result.record.allocation
    done = simulate_once(again, here, result.allocation)
    assert done.run.metrics.n_done == done.run.metrics.n_offered
    assert done.cost.cost_usd_per_month == pytest.approx(result.record.row("decoupled").cost_usd_per_month)


def test_a_plan_over_kinds_is_the_same_however_many_processes_work_on_it(mixed: Any, tmp_path: Path) -> None:
    result, scenario, here, _ = mixed
    twice = make_plan(scenario, here, jobs=2, backend="threading", store=tmp_path / "store")
    assert plan_json(twice.record) == plan_json(result.record)


def test_a_plan_over_kinds_is_read_back_as_it_was_written(mixed: Any) -> None:
    result, _, _, out = mixed
    assert read_plan(out) == result.record


def test_a_kind_that_was_not_measured_is_carried_over_on_the_fly_and_called_assumed(ask: Any) -> None:
    text = others(f"kind: nvidia-h100, profile: {MEASURED} as H100, price_usd_per_gpu_hour: 0.5")
    plan = planned(ask(text, {}, latency_s=20.0)).record
    assert kinds_of(plan) == ("nvidia-h100", "nvidia-h100")
    assert plan.sentence.endswith(
        "This rests on an assumed profile: nothing was measured on nvidia-h100, its latencies are carried over by datasheet rates."
    )
    assert set(plan.row("colocated").grades.values()) == {"assumed"}
    assert plan.kinds is not None
    assert [kind.is_assumed for kind in plan.kinds.kinds] == [False, True]


def test_a_name_with_as_is_the_profile_that_calibrate_transfer_writes() -> None:
    carried = profile_of("h200 as L40S", Path())
    assert to_json(carried) == to_json(transfer_profile(load_profile("h200"), "L40S"))
    assert absolute_reference("h200 as L40S", Path("/somewhere")) == "h200 as L40S"
    assert absolute_reference("own.json as L40S", Path("/somewhere")) == "/somewhere/own.json as L40S"
    with pytest.raises(InputError, match=r"profile 'h200 as 8086'.*no datasheet"):
        profile_of("h200 as 8086", Path())


def test_a_kind_without_nvlink_sends_over_pcie(ask: Any) -> None:
    scenario, here = load_scenario(str(ask(others("kind: nvidia-l40s, profile: h200 as L40S"), {})))
    own, other = lenses_of(scenario, here)
    assert own.inputs.link(scenario.policies.link) == "nvlink"
    assert other.inputs.link(scenario.policies.link) == "pcie"


def test_every_kind_that_cannot_be_used_is_named_at_once(ask: Any) -> None:
    path = ask(
        others(
            "kind: fast, profile: slow.json, price_usd_per_gpu_hour: 1.0",
            "kind: unpriced, profile: unpriced.json",
            "kind: gone, profile: gone.json",
        ),
        {"slow": profile_like("slow", 2.0), "unpriced": profile_like("unpriced", 2.0)},
    )
    with pytest.raises(InputError) as refused:
        planned(path)
    said = str(refused.value)
    assert "gpu.others fast: scenario gpu.kind: got 'fast', needs 'slow'" in said
    assert "gpu.others unpriced: price table default.json: has no on_demand price for 'unpriced'" in said
    assert "gpu.others gone:" in said


def test_a_kind_of_another_model_and_one_that_is_there_already_are_refused(ask: Any) -> None:
    flux = json.loads(profile_like("other", 1.0)) | {"architecture": "flux"}
    path = ask(
        others(
            "kind: other, profile: other.json, price_usd_per_gpu_hour: 1.0",
            "kind: nvidia-h200, profile: same.json, price_usd_per_gpu_hour: 1.0",
        ),
        {"other": json.dumps(flux), "same": profile_like("nvidia-h200", 1.0)},
    )
    with pytest.raises(InputError) as refused:
        planned(path)
    assert "gpu.others nvidia-h200: is the kind of profile" in str(refused.value)
    assert "gpu.others other: its profile is of flux, needs sdxl" in str(refused.value)
    with pytest.raises(InputError, match="names other twice"):
        load_scenario(str(ask(others(*["kind: other, profile: other.json"] * 2), {})))


def test_the_command_line_adds_kinds_and_says_what_it_cannot_read(ask: Any) -> None:
    scenario, _ = load_scenario(str(ask("", {})))
    asked = with_other_kinds(scenario, ["nvidia-l40s=h200 as l40s@1.10", "nvidia-h100=h200 as H100"])
    assert [(one.kind, one.profile, one.price_usd_per_gpu_hour) for one in asked.gpu.others] == [
        ("nvidia-l40s", "h200 as l40s", 1.10),
        ("nvidia-h100", "h200 as H100", None),
    ]
    with pytest.raises(InputError) as refused:
        with_other_kinds(scenario, ["nvidia-l40s", "a=h200 as l40s@free", "b=h200", "b=h200"])
    assert [problem.what.split(",")[0] for problem in refused.value.problems] == [
        "got 'nvidia-l40s'", "got 'a=h200 as l40s@free'", "names b twice",
    ]  # fmt: skip


def test_a_question_about_one_kind_keeps_its_digest_and_its_plan_has_nothing_of_kinds(tiny_plan: Any) -> None:
    text = to_yaml(tiny_plan.scenario)
    assert "controlnet_kind" not in text
    shipped, _ = load_scenario("sample:small")
    # these keys and no others, as before there were kinds to choose from: the digest is taken over them
    assert json.loads(shipped.model_dump_json())["gpu"] == {"kind": None, "device_memory_gib": None, "others": []}
    plain = json.loads(plan_json(tiny_plan.result.record))
    assert "kinds" not in plain
    assert all("then_kinds" not in flip for flip in plain["flip_points"])


def test_where_no_kind_keeps_the_promise_every_kind_says_why_and_the_nearest_plan_is_named(ask: Any) -> None:
    path = ask(
        others("kind: slow, profile: slow.json, price_usd_per_gpu_hour: 0.5"),
        {"slow": profile_like("slow", 2.0)},
        latency_s=0.5,
    )
    result = planned(path)
    plan = result.record
    assert result.allocation is None
    assert kinds_of(plan) == (None, None)
    assert "None of the 2 GPU kinds at hand (nvidia-h200, slow) keeps the promise." in plan.sentence
    assert plan.kinds is not None
    assert {row.gpu_kind: row.verdict for row in plan.kinds.rows} == {"nvidia-h200": "infeasible", "slow": "infeasible"}
    assert plan.infeasible is not None
    assert plan.infeasible.nearest.startswith("slo.latency_s of")


def test_the_command_weighs_a_further_kind_and_shows_a_row_for_each(
    ask: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = ask("", {"fast": profile_like("fast", 0.5)}, latency_s=20.0)
    also = f"fast={tmp_path / 'fast.json'}@0.5"
    arguments = ["plan", str(path), "--out", str(tmp_path / "out"), "--jobs", "1", "--also-kind", also]
    monkeypatch.setattr("sys.argv", ["diffplan", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert "GPU kinds: nvidia-h200 $2.00, fast $0.50" in said
    assert kinds_of(read_plan(tmp_path / "out")) == ("fast", "fast")
    again, _ = load_scenario(str(tmp_path / "out" / "scenario.resolved.yaml"))
    assert (again.gpu.kind, [one.kind for one in again.gpu.others]) == ("fast", ["nvidia-h200"])
