"""What is exported is simulated as exported: a queue in each pod, something blind before them, and the difference to the plan is said."""

from __future__ import annotations

import dataclasses
import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from planner.export.ask import ExportQuestion, answer
from planner.export.bill import read_bill_json
from planner.export.cluster import load_cluster
from planner.export.pods_check import check_pods
from planner.export.source import load_source
from planner.plan_files import write_plan
from planner.plan_run import make_plan
from planner.scenario import load_scenario
from tests.planner.planning import write_scenario
from traces.problems import InputError

TODAY = datetime.date(2026, 12, 1)
CLUSTER = "image: a:1\nstore: {volume_claim: models}\n"
BALANCED = CLUSTER + "balancer: {image: 'haproxy:3.0'}\n"


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan with its scenario beside it, made in about a second."""
    folder = tmp_path_factory.mktemp("planned")
    scenario, here = load_scenario(str(write_scenario(folder, more="topologies: [diffusers]\n")))
    result = make_plan(scenario, here, jobs=1)
    assert result.allocation is not None
    assert result.allocation.n_gpus >= 2  # or there would be nothing to part
    write_plan(result, scenario, here, folder / "plan")
    return folder / "plan"


def export(plan: Path, folder: Path, cluster: str, **asked: Any) -> dict[str, Any]:
    """The manifest, and what is known of the pods under ``as_exported``."""
    (folder / "cluster.yaml").write_text(cluster, encoding="utf-8")
    question = ExportQuestion(
        plan, ("kubernetes", "json"), folder / "out", folder / "cluster.yaml", None, False, None, None, True, **asked
    )
    answer(question, TODAY)
    out = folder / "out"
    found: dict[str, Any] = json.loads((out / "export.json").read_text(encoding="utf-8"))
    figures = out / "kubernetes" / "as-exported.json"
    found["as_exported"] = json.loads(figures.read_text(encoding="utf-8")) if figures.is_file() else None
    return found


def engine_file(folder: Path) -> str:
    return (folder / "out" / "kubernetes" / "base" / "engine-base-1.yaml").read_text(encoding="utf-8")


def test_a_plan_on_one_node_is_exported_as_it_was_planned_and_needs_no_run(plan: Path, tmp_path: Path) -> None:
    found = export(plan, tmp_path, CLUSTER + "gpus_per_node: 64\n")
    assert found["as_exported"] is None
    assert "Simulated" not in engine_file(tmp_path)


def test_a_run_of_one_pod_gives_what_the_plan_says(plan: Path, tmp_path: Path) -> None:
    seen = export(plan, tmp_path, CLUSTER + "gpus_per_node: 64\n", is_checking_pods=True)["as_exported"]
    assert seen["is_kept"]
    for name, planned in seen["as_planned"].items():
        # the same repetitions, draws and noise through the same simulator
        assert seen["as_exported"][name] == pytest.approx(planned, rel=1e-9), name


def test_where_one_queue_becomes_several_they_are_simulated_and_every_file_says_what_came_of_it(
    plan: Path, tmp_path: Path
) -> None:
    found = export(plan, tmp_path, CLUSTER + "gpus_per_node: 1\n")
    seen = found["as_exported"]
    assert (seen["balancing"], seen["as_exported"]["n_pods"]) == ("random", seen["as_planned"]["n_gpus"])
    assert seen["as_exported"]["slo_attainment_ratio"] < seen["as_planned"]["slo_attainment_ratio"]
    said = next(note for note in found["notes"] if note.startswith("Simulated as exported"))
    assert "BREAKS the promise" in said
    for path in (tmp_path / "out" / "kubernetes").rglob("*.yaml"):
        assert f"# {said}\n" in path.read_text(encoding="utf-8"), path


def test_a_balancer_comes_nearer_to_the_plan_than_a_lot(plan: Path, tmp_path: Path) -> None:
    seen = export(plan, tmp_path, BALANCED + "gpus_per_node: 2\n")["as_exported"]
    assert (seen["balancing"], seen["n_balancers"]) == ("least_outstanding", 2)
    by_lot, as_exported, planned = (
        seen[name]["slo_attainment_ratio"] for name in ("behind_a_service", "as_exported", "as_planned")
    )
    assert by_lot < as_exported <= planned


def test_a_fleet_that_keeps_the_promise_is_proposed_and_grow_exports_it(plan: Path, tmp_path: Path) -> None:
    proposed = export(plan, tmp_path, CLUSTER + "gpus_per_node: 1\n")["as_exported"]["proposal"]
    assert proposed["low"] >= 0.9  # the promise of the scenario, by the rule of plans: the whole interval
    found = export(plan, tmp_path, CLUSTER + "gpus_per_node: 1\n", is_growing=True)
    seen = found["as_exported"]
    assert seen["is_kept"]
    assert seen["as_exported"]["n_gpus"] == proposed["n_gpus"] > seen["as_planned"]["n_gpus"]
    assert seen["n_gpus_grown_from"] == seen["as_planned"]["n_gpus"]
    (bill,) = read_bill_json((tmp_path / "out" / "json" / "bill.json").read_text(encoding="utf-8"))
    assert bill.n_gpus == proposed["n_gpus"]
    assert "grown: " in engine_file(tmp_path)
    assert "--grow" in found["provenance"]["command"]


def test_one_replica_less_than_proposed_breaks_the_promise(plan: Path, tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text(CLUSTER + "gpus_per_node: 1\n", encoding="utf-8")
    cluster, _ = load_cluster(tmp_path / "cluster.yaml")
    source = load_source(plan, "", TODAY, is_forced=True)
    found = check_pods(plan, source, cluster).proposal
    assert found is not None
    (proposed,) = found.allocation.pools
    smaller = dataclasses.replace(
        found.allocation, pools=(dataclasses.replace(proposed, n_replicas=proposed.n_replicas - 1),)
    )
    assert not check_pods(plan, dataclasses.replace(source, allocation=smaller), cluster).is_kept
    larger = check_pods(plan, dataclasses.replace(source, allocation=found.allocation), cluster)
    assert (larger.is_kept, larger.exported) == (True, found.figures)


def test_growing_a_fleet_that_keeps_its_promise_changes_nothing(plan: Path, tmp_path: Path) -> None:
    found = export(plan, tmp_path, CLUSTER + "gpus_per_node: 64\n", is_growing=True)
    assert found["as_exported"]["n_gpus_grown_from"] is None
    assert found["as_exported"]["as_exported"]["n_gpus"] == found["as_exported"]["as_planned"]["n_gpus"]


def test_a_step_from_plan_to_plan_is_simulated_like_the_plan_by_itself(plan: Path, tmp_path: Path) -> None:
    alone = export(plan, tmp_path, BALANCED + "gpus_per_node: 2\n")["as_exported"]
    question = ExportQuestion(
        None, ("kubernetes",), tmp_path / "step", tmp_path / "cluster.yaml", (plan, plan), False, None, None, True
    )
    answer(question, TODAY)
    step = json.loads((tmp_path / "step" / "kubernetes" / "as-exported.json").read_text(encoding="utf-8"))
    assert step["as_exported"] == alone["as_exported"]


def test_what_was_not_simulated_is_said_not_to_be_shown(plan: Path, tmp_path: Path) -> None:
    export(plan, tmp_path, CLUSTER + "gpus_per_node: 1\n", is_checking_pods=False)
    assert "NOT shown to hold for this cluster. Not simulated, as asked" in engine_file(tmp_path)


def test_without_its_scenario_a_plan_is_exported_and_said_not_to_be_simulated(plan: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes((plan / "plan.json").read_bytes())
    found = export(tmp_path / "plan.json", tmp_path, CLUSTER + "gpus_per_node: 1\n")
    assert any("finds no scenario.resolved.yaml" in note for note in found["notes"])
    assert found["as_exported"] is None


@pytest.mark.parametrize("asked", [{"is_checking_pods": True}, {"is_growing": True}])
def test_a_simulation_that_was_asked_for_and_cannot_be_run_writes_nothing(
    plan: Path, tmp_path: Path, asked: dict[str, bool]
) -> None:
    (tmp_path / "plan.json").write_bytes((plan / "plan.json").read_bytes())
    with pytest.raises(InputError, match=r"finds no scenario.resolved.yaml"):
        export(tmp_path / "plan.json", tmp_path, CLUSTER, **asked)
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_it_simulates_and_gives_the_same_bytes_as_the_call(plan: Path, tmp_path: Path) -> None:
    export(plan, tmp_path, CLUSTER + "gpus_per_node: 1\n")
    words = ["export", str(plan), "--to", "kubernetes", "--to", "json", "--cluster", str(tmp_path / "cluster.yaml"), "--out", str(tmp_path / "again"), "--force"]  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "planner", *words], capture_output=True, text=True, timeout=120, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "simulating " in done.stderr
    assert "BREAKS the promise" in done.stdout
    ours, theirs = tmp_path / "out", tmp_path / "again"
    for path in sorted(ours.rglob("*.*")):
        assert path.read_bytes() == (theirs / path.relative_to(ours)).read_bytes(), path
