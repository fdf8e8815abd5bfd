"""Pods are simulated as they are exported: a queue each, an equal share of the traffic."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest

from planner.export.ask import ExportQuestion, answer
from planner.plan_files import write_plan
from planner.plan_run import make_plan
from planner.scenario import load_scenario
from tests.planner.planning import write_scenario
from traces.problems import InputError

TODAY = datetime.date(2026, 12, 1)
CLUSTER = "image: a:1\nstore: {volume_claim: models}\n"


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


def notes(plan: Path, folder: Path, cluster: str, *, check: bool = True) -> list[str]:
    (folder / "cluster.yaml").write_text(cluster, encoding="utf-8")
    question = ExportQuestion(
        plan, ("kubernetes",), folder / "out", folder / "cluster.yaml", None, False, None, None, True, check
    )
    answer(question, TODAY)
    found: list[str] = json.loads((folder / "out" / "export.json").read_text(encoding="utf-8"))["notes"]
    return found


def test_a_plan_on_one_node_is_simulated_as_it_was_planned(plan: Path, tmp_path: Path) -> None:
    said = notes(plan, tmp_path, CLUSTER + "gpus_per_node: 64\n")
    assert said[-1].endswith("the cluster keeps the promise.")
    assert not [note for note in said if "do NOT hold" in note]


def test_the_same_gpus_with_a_queue_each_serve_fewer_requests_in_time_and_the_export_says_so(
    plan: Path, tmp_path: Path
) -> None:
    def in_time(gpus_per_node: int) -> float:
        last = notes(plan, tmp_path, CLUSTER + f"gpus_per_node: {gpus_per_node}\n")[-1]
        return float(last.removeprefix("All pods together: ").partition("%")[0])

    assert in_time(1) < in_time(64)
    text = (tmp_path / "out" / "kubernetes" / "base" / "engine-base-1.yaml").read_text(encoding="utf-8")
    assert "NOTE:" not in text  # the last export was on one node
    said = notes(plan, tmp_path, CLUSTER + "gpus_per_node: 1\n", check=False)
    assert any("do NOT hold" in note and "--check-pods" in note for note in said)
    text = (tmp_path / "out" / "kubernetes" / "base" / "engine-base-1.yaml").read_text(encoding="utf-8")
    assert "not shown to hold here" in text


def test_without_its_scenario_a_plan_cannot_be_checked(plan: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes((plan / "plan.json").read_bytes())
    with pytest.raises(InputError, match=r"finds no scenario.resolved.yaml"):
        notes(tmp_path / "plan.json", tmp_path, CLUSTER)
    assert not (tmp_path / "out").exists()
