"""``diffplan export`` as people use it: everything or nothing is written, and a mistake gets a sentence."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from engine.allocation import Allocation
from engine.policies.autoscale_settings import Autoscale
from planner.export.ask import ExportAnswer, ExportQuestion, answer
from planner.plan_record import PlanRecord, to_json
from tests.export.plans import decoupled, plan_of, pool
from traces.problems import InputError

TODAY = datetime.date(2026, 12, 1)
LATER = datetime.date(2027, 6, 1)
ROOT = Path(__file__).resolve().parents[2]
CLUSTER_FILE = ROOT / "examples" / "export" / "cluster.yaml"


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    return saved(tmp_path, plan_of(decoupled(4, 2)))


def saved(folder: Path, record: PlanRecord, name: str = "plan.json") -> Path:
    path = folder / name
    path.write_text(to_json(record), encoding="utf-8")
    return path


def ask(
    plan: Path | None,
    to: tuple[str, ...] = ("json",),
    out: Path | None = None,
    *,
    diff: tuple[Path, Path] | None = None,
    rollback: bool = False,
    phase: int | None = None,
    profile: Path | None = None,
    force: bool = False,
    today: datetime.date = TODAY,
) -> ExportAnswer:
    return answer(ExportQuestion(plan, to, out, CLUSTER_FILE, diff, rollback, phase, profile, force), today)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_all_targets_are_written_as_one_folder(plan: Path, tmp_path: Path) -> None:
    said = ask(plan, ("all",), tmp_path / "out")
    files = tree(tmp_path / "out")
    assert {name.partition("/")[0] for name in files} == {
        "kubernetes", "autoscaling", "prometheus", "terraform", "json", "csv", "export.json",
    }  # fmt: skip
    assert sorted(said.to_plain()["files"]) == sorted(files)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "plan.json"]  # nothing is left beside it


def test_the_same_plan_gives_the_same_bytes_wherever_it_lies_and_whatever_the_hash_seed(
    plan: Path, tmp_path: Path
) -> None:
    trees = []
    for seed in ("1", "2"):
        folder = tmp_path / f"elsewhere {seed}"
        folder.mkdir()
        copy = folder / "p.json"
        copy.write_bytes(plan.read_bytes())
        done = subprocess.run(
            [sys.executable, "-m", "planner", "export", str(copy), "--to", "all", "--cluster", str(CLUSTER_FILE), "--force",
             "--out", str(folder / "out")],
            cwd=tmp_path, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        trees.append(tree(folder / "out"))
    assert trees[0] == trees[1]


def test_exporting_again_replaces_an_export_and_never_a_users_file(plan: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ask(plan, ("json", "csv"), out)
    ask(plan, ("json",), out)
    assert sorted(tree(out)) == ["export.json", "json/bill.json"]
    (out / "mine.txt").write_text("keep me", encoding="utf-8")
    with pytest.raises(InputError, match=r"'mine.txt', which no export wrote"):
        ask(plan, ("csv",), out)
    (out / "mine.txt").unlink()
    (out / "json" / "bill.json").write_text("edited", encoding="utf-8")
    with pytest.raises(InputError, match="which was changed since"):
        ask(plan, ("csv",), out)
    assert (out / "json" / "bill.json").read_text(encoding="utf-8") == "edited"


def test_a_link_is_not_followed(plan: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(InputError, match="is not a folder"):
        ask(plan, ("json",), tmp_path / "link")


def test_a_half_written_plan_gets_a_sentence_and_nothing_is_written(plan: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.json"
    half.write_bytes(plan.read_bytes()[: plan.stat().st_size // 2])
    with pytest.raises(InputError, match=r"half.json.*EOF"):
        ask(half, ("json",), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_plan_of_a_newer_schema_is_called_that(plan: Path, tmp_path: Path) -> None:
    newer = json.loads(plan.read_text(encoding="utf-8"))
    newer |= {"schema_version": 99, "roadmap": []}
    (tmp_path / "newer.json").write_text(json.dumps(newer), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        ask(tmp_path / "newer.json", ("json",), tmp_path / "out")
    assert len(caught.value.problems) == 1
    assert "written by a newer diffplan (plan schema 99)" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_plan_whose_cost_is_not_its_gpus_is_refused(tmp_path: Path) -> None:
    record = plan_of(decoupled(4, 2))
    row = record.topologies[0].model_copy(update={"cost_usd_per_month": 1.0})
    wrong = saved(tmp_path, record.model_copy(update={"topologies": (row,)}))
    with pytest.raises(InputError, match=r"says 1\.00 USD a month"):
        ask(wrong, ("json",), tmp_path / "out")


def test_an_autoscaled_plan_may_cost_less_than_its_gpus_all_month(tmp_path: Path) -> None:
    record = plan_of(Allocation((pool(n=4, autoscale=Autoscale(max_replicas=9)),)))
    row = record.topologies[0].model_copy(update={"cost_usd_per_month": 5000.0})
    ask(saved(tmp_path, record.model_copy(update={"topologies": (row,)})), ("all",), tmp_path / "out")
    total = json.loads((tmp_path / "out" / "json" / "bill.json").read_text(encoding="utf-8"))["total"]
    assert total["planned_cost_usd_per_month"] == 5000.0 < total["cost_usd_per_month"]


def test_a_plan_of_several_gpu_kinds_has_no_price_for_each_and_is_refused(tmp_path: Path) -> None:
    record = plan_of(Allocation((pool(n=4), pool("other", 2, gpu_kind="nvidia-h100"))))
    with pytest.raises(InputError, match="uses 2 GPU kinds and states one price"):
        ask(saved(tmp_path, record), ("json",), tmp_path / "out")


@pytest.mark.parametrize(
    ("changed", "today", "sentence"),
    [
        ({"verdict": "infeasible"}, TODAY, "the plan is infeasible"),
        ({}, LATER, "more than 90 days old"),
        ({"profile_name": "h200", "profile_id": "ffffffffffff"}, TODAY, "its profile has drifted"),
    ],
    ids=["infeasible", "old prices", "drifted"],
)
def test_an_infeasible_or_stale_plan_leaves_only_by_force_and_says_so_in_every_file(
    tmp_path: Path, changed: dict[str, str], today: datetime.date, sentence: str
) -> None:
    plan = saved(tmp_path, plan_of(decoupled(4, 2), **changed))
    with pytest.raises(InputError, match=sentence):
        ask(plan, ("all",), tmp_path / "out", today=today)
    assert not (tmp_path / "out").exists()
    ask(plan, ("all",), tmp_path / "out", force=True, today=today)
    for name, content in tree(tmp_path / "out").items():
        assert sentence in content.decode(), name
        assert "exported with --force" in content.decode(), name


def test_prices_that_the_scenario_gave_never_go_stale(tmp_path: Path) -> None:
    plan = saved(tmp_path, plan_of(decoupled(4, 2), price_as_of="", price_table_id="scenario"))
    ask(plan, ("json",), tmp_path / "out", today=LATER)
    assert "given by the scenario" in (tmp_path / "out" / "json" / "bill.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"phase": 2}, "a plan without a roadmap"),
        ({"to": ("helm",)}, "got 'helm'"),
        ({"to": ()}, "--to: is missing"),
        ({"out": None}, "--out: is missing"),
        ({"rollback": True}, "--rollback: is given without --diff"),
        ({"plan": None}, "PLAN: is missing"),
        ({"plan": Path("/nowhere/plan.json")}, "cannot be read"),
    ],
)
def test_a_question_that_makes_no_sense_gets_a_sentence(
    plan: Path, tmp_path: Path, changed: dict[str, object], sentence: str
) -> None:
    arguments: dict[str, object] = {"plan": plan, "to": ("json",), "out": tmp_path / "out", **changed}
    with pytest.raises(InputError, match=sentence):
        ask(**arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_all_problems_of_a_question_are_shown_together() -> None:
    with pytest.raises(InputError) as caught:
        answer(ExportQuestion(None, (), None, None, None, True, 3, None, False, True), TODAY)
    assert len(caught.value.problems) == 5


def test_the_difference_is_told_in_replicas_dollars_and_objects(tmp_path: Path) -> None:
    old = saved(tmp_path, plan_of(Allocation((pool(n=4),))), "old.json")
    new = saved(tmp_path, plan_of(decoupled(12, 4)), "new.json")
    said = ask(None, (), diff=(old, new))
    # 3.5 USD x 730 h a GPU: 4 GPUs are 10,220, 16 are 40,880
    assert "4 to 16 GPUs, $10,220 to $40,880 a month (+$30,660)" in said.text
    assert "controlnets (controlnet, nvidia-h200): 0 to 4 replicas" in said.text
    assert "~ Deployment/diffplan-base-1" in said.text
    assert said.to_plain()["total"]["change_usd_per_month"] == 12 * 3.5 * 730


def test_the_same_plan_twice_changes_nothing(plan: Path) -> None:
    said = ask(None, (), diff=(plan, plan)).to_plain()
    assert said["objects"] == {"added": [], "removed": [], "altered": []}
    assert said["total"]["change_usd_per_month"] == 0


def test_rolling_back_writes_the_old_plan_and_how_to_get_there(tmp_path: Path) -> None:
    old = saved(tmp_path, plan_of(Allocation((pool(n=4),))), "old.json")
    new = saved(tmp_path, plan_of(decoupled(12, 5)), "new.json")
    ask(None, (), tmp_path / "back", diff=(old, new), rollback=True)
    ask(old, ("kubernetes",), tmp_path / "then")
    back, then = tree(tmp_path / "back"), tree(tmp_path / "then")
    engine = "kubernetes/base/engine-base-1.yaml"

    def bare(content: bytes) -> list[str]:
        return [line for line in content.decode().split("\n") if "diffplan export" not in line]

    assert bare(back[engine]) == bare(then[engine])
    commands = back["change.md"].decode()
    assert "kubectl apply --server-side -k kubernetes/overlays/cluster" in commands
    assert "delete" in commands
    assert "deployment/diffplan-base-2" in commands
    assert json.loads(back["change.json"])["total"]["n_gpus_after"] == 4


def test_a_service_turns_to_balancers_only_when_they_run_and_a_lone_engine_is_named(tmp_path: Path) -> None:
    one = saved(tmp_path, plan_of(Allocation((pool(n=4),))), "one.json")
    three = saved(tmp_path, plan_of(Allocation((pool(n=20),))), "three.json")

    def change(diff: tuple[Path, Path], name: str) -> tuple[str, list[str]]:
        ask(None, ("kubernetes",), tmp_path / name, diff=diff)
        text = (tmp_path / name / "change.md").read_text()
        return text, text.partition("```sh\n")[2].splitlines()

    text, commands = change((one, three), "grown")
    assert "diffplan-base-1 has one pod: until its successor is ready, nothing serves its requests" in text
    everything = "kubectl apply --server-side -k kubernetes/overlays/cluster"
    waits = [line for line in commands if "rollout status" in line]
    assert any("diffplan-balancer-base" in line for line in waits)
    assert commands[: 2 + len(waits)] == [f"{everything} -l 'diffplan/entry!=true'", *waits, everything]
    (entry,) = [
        item
        for item in yaml.safe_load_all((tmp_path / "grown/kubernetes/base/services.yaml").read_text())
        if item["metadata"]["labels"].get("diffplan/entry") == "true"
    ]
    assert entry["spec"]["selector"]["app.kubernetes.io/name"] == "diffplan-balancer"
    text, commands = change((three, saved(tmp_path, plan_of(Allocation((pool(n=23),))), "more.json")), "more")
    assert "has one pod" not in text
    assert commands[0] == everything


def test_a_phase_of_the_roadmap_says_what_it_is(tmp_path: Path) -> None:
    plain = plan_of(Allocation((pool(n=4),))).model_dump(mode="json")
    nothing = {"mean": 1.0, "low": 1.0, "high": 1.0}
    part = Allocation((pool(n=2),))
    plain["roadmap"] = [
        {
            "number": 2, "name": "carve out", "is_worthwhile": True, "what": "Serve the sketches by colocated on 2 GPUs.",
            "topology": "colocated", "allocation": dataclasses.asdict(part), "n_gpus_new": 2, "n_gpus_today": 5,
            "cost_usd_per_month": 7 * 3.5 * 730, "latency_p50_s": nothing, "latency_p95_s": nothing,
            "slo_attainment_ratio": nothing, "watch": [], "gate": "", "roll_back": "", "test": None,
        }
    ]  # fmt: skip
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plain))
    said = ask(path, ("json",), tmp_path / "out", phase=2)
    sentence = "Phase 2 of the plan's roadmap, carve out: Serve the sketches by colocated on 2 GPUs."
    assert said.text.startswith(f"{sentence}\n")
    bill = json.loads((tmp_path / "out" / "json" / "bill.json").read_text())
    assert bill["sentence"] == sentence
    assert bill["total"]["n_gpus"] == 2
    assert bill["total"]["planned_cost_usd_per_month"] == 2 * 3.5 * 730


def test_going_back_to_a_plan_with_old_prices_needs_force_and_showing_it_does_not(plan: Path, tmp_path: Path) -> None:
    assert "more than 90 days old" in ask(None, (), diff=(plan, plan), today=LATER).text
    with pytest.raises(InputError, match="more than 90 days old"):
        ask(None, (), tmp_path / "back", diff=(plan, plan), rollback=True, today=LATER)


def test_the_command_line_ends_with_2_and_a_sentence(plan: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "planner", "export", str(plan), "--to", "kubernetes", "--out", str(tmp_path / "out"), "--force"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "--cluster" in done.stderr
    assert "Traceback" not in done.stderr


def with_autoscaling(verdict: str = "autoscale", cost: float | None = 5000.0) -> PlanRecord:
    """A plan of four replicas, with a variant of two to six beside it."""
    from planner.decision_record import AutoscaledRow, AutoscalingRecord
    from planner.plan_record import Estimate

    about = Estimate(mean=3.0, low=2.5, high=3.5)
    row = AutoscaledRow(
        kind="keda", min_replicas=2, max_replicas=6, target=1.0, cooldown_s=300.0, n_repetitions=5, mean_gpus=about,
        gpu_hours_per_month=cost and cost / 3.5, cost_usd_per_month=cost, slo_attainment_ratio=about, latency_p50_s=about,
        latency_p99_s=about, keeps_promise=True,
    )  # fmt: skip
    scaled = Allocation((pool(n=4, autoscale=Autoscale(min_replicas=2, max_replicas=6, target=1.0)),))
    record = AutoscalingRecord(
        verdict=verdict, why="nights are quiet", fixed_gpu_hours_per_month=2920.0, fixed_cost_usd_per_month=10_220.0,
        saving_usd_per_month=None, start_s=60.0, chosen=row if cost else None, tried=(row,),
        allocation=dataclasses.asdict(scaled) if cost else None,
    )  # fmt: skip
    return plan_of(Allocation((pool(n=4),))).model_copy(update={"autoscaling": record})


def test_the_variant_that_scales_is_exported_with_its_own_settings_and_cost(tmp_path: Path) -> None:
    path = saved(tmp_path, with_autoscaling())
    question = ExportQuestion(
        path, ("all",), tmp_path / "out", CLUSTER_FILE, None, False, None, None, False, None, False, True
    )
    answer(question, TODAY)
    scaler = (tmp_path / "out" / "autoscaling" / "keda-base-1.yaml").read_text(encoding="utf-8")
    assert "minReplicaCount: 2" in scaler
    assert "maxReplicaCount: 6" in scaler
    bill = json.loads((tmp_path / "out" / "json" / "bill.json").read_text(encoding="utf-8"))
    assert bill["total"]["planned_cost_usd_per_month"] == 5000.0
    assert "--autoscaled" in bill["provenance"]["command"]


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        (plan_of(decoupled(4, 2)), "a plan without an autoscaled variant"),
        (with_autoscaling(cost=None), "without an autoscaled variant: nights are quiet"),
        (with_autoscaling("fixed"), "does not recommend to autoscale: nights are quiet"),
    ],
)
def test_a_variant_that_is_not_there_or_not_recommended_gets_a_sentence(
    tmp_path: Path, record: PlanRecord, sentence: str
) -> None:
    path = saved(tmp_path, record)
    question = ExportQuestion(
        path, ("json",), tmp_path / "out", None, None, False, None, None, False, None, False, True
    )
    with pytest.raises(InputError, match=sentence):
        answer(question, TODAY)
    assert not (tmp_path / "out").exists()


def test_a_plan_keeps_its_id_when_a_roadmap_is_written_into_it_and_under_a_later_diffplan(
    plan: Path, tmp_path: Path
) -> None:
    before = ask(plan, out=tmp_path / "a").plain["provenance"]["plan_id"]
    plain = json.loads(plan.read_text(encoding="utf-8"))
    plain["roadmap"] = []
    del plain["autoscaling"], plain["add_ons"]  # as an earlier diffplan wrote it, which did not know them
    plan.write_text(json.dumps(plain, indent=7), encoding="utf-8")
    older = ask(plan, out=tmp_path / "a").plain["provenance"]["plan_id"]
    plain["sentence"] += " "
    plan.write_text(json.dumps(plain), encoding="utf-8")
    assert older != ask(plan, out=tmp_path / "a").plain["provenance"]["plan_id"]
    plain["sentence"] = plain["sentence"][:-1]
    del plain["roadmap"]
    plan.write_text(json.dumps(plain), encoding="utf-8")
    assert older == ask(plan, out=tmp_path / "a").plain["provenance"]["plan_id"] != before
