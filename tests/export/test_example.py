"""The exported plans under ``examples/`` are whole: unchanged since it was made, in agreement with itself, accepted by its checkers."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest

from planner.export.bill import read_bill_csv, read_bill_json
from planner.export.cluster import load_cluster
from planner.export.kubernetes_check import object_faults
from planner.export.kubernetes_read import counts_in, objects_in
from planner.export.prometheus_check import counts_in_rules, rule_faults
from planner.export.terraform import VARIABLES, counts_in_variables, variable_faults

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples" / "export"


@pytest.fixture(scope="module", params=["small", "provider"])
def texts(request: pytest.FixtureRequest) -> dict[str, str]:
    folder = EXAMPLES / request.param
    return {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def part(texts: dict[str, str], target: str) -> dict[str, str]:
    return {name: text for name, text in texts.items() if name.startswith(f"{target}/")}


def test_the_folder_holds_what_its_manifest_says(texts: dict[str, str]) -> None:
    listed = json.loads(texts["export.json"])["files"]
    held = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items() if name != "export.json"}
    assert held == listed


def test_every_target_states_the_same_sizes(texts: dict[str, str]) -> None:
    counts = read_bill_json(texts["json/bill.json"])
    assert counts == read_bill_csv(texts["csv/bill.csv"])
    assert counts == counts_in(objects_in(part(texts, "kubernetes")))
    assert counts == counts_in_rules(texts["prometheus/rules.yml"])
    assert counts == counts_in_variables(texts[f"terraform/{VARIABLES}"])


def test_todays_checkers_accept_it(texts: dict[str, str]) -> None:
    assert not object_faults(objects_in({**part(texts, "kubernetes"), **part(texts, "autoscaling")}))
    assert not rule_faults(texts["prometheus/rules.yml"], texts["prometheus/dashboard.json"])
    assert not variable_faults(texts[f"terraform/{VARIABLES}"])


def test_a_plan_of_several_nodes_says_in_every_file_what_its_cluster_does_with_the_promise(
    texts: dict[str, str],
) -> None:
    n_engines = sum(name.startswith("kubernetes/base/engine-") for name in texts)
    found = texts.get("kubernetes/as-exported.json")
    assert (found is None) == (n_engines == 1)
    if found is not None:
        assert json.loads(found)["is_kept"]
        for name, text in part(texts, "kubernetes").items():
            assert name.endswith(".json") or "keeps the promise" in text, name


def test_the_cluster_file_is_read_and_the_page_describes_each_of_its_fields() -> None:
    cluster, catalogue = load_cluster(EXAMPLES / "cluster.yaml")
    assert catalogue is None
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    described = set(re.findall(r"`([a-z_]+)", page))
    assert set(type(cluster).model_fields) <= described


def test_the_page_names_every_alert_and_every_column_of_the_bill(texts: dict[str, str]) -> None:
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    for alert in re.findall(r"alert: (\w+)", texts["prometheus/rules.yml"]):
        name = re.sub(r"(StageOutside).*", r"\1", alert).replace("SloBurn6h", "SloBurn1h")
        assert name in page, alert
    for column in json.loads(texts["json/bill.json"])["rows"][0]:
        assert f"`{column}`" in page, column
