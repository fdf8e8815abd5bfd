"""A scenario file is checked strictly, and what is wrong is named with file, line and field."""

from __future__ import annotations

from pathlib import Path

import pytest

from planner.scenario import Scenario, load_scenario, scenario_sha256, shipped_scenarios, to_yaml
from planner.strict_yaml import parse_strict
from traces.problems import InputError

GOOD = "name: x\ntraffic:\n  trace: sample:katz_a_hour\nslo:\n  latency_s: 10\nprofile:\n  name: h200\n"
CASES = {
    "duplicate key": (GOOD + "name: y\n", "bad.yaml:8", "every key once"),
    "unknown key": (GOOD + "colour: red\n", "bad.yaml:8 colour", "is not a known field"),
    "misspelt key": (GOOD.replace("latency_s", "latency"), "bad.yaml:5 slo.latency", "Did you mean 'latency_s'?"),
    "missing key": (GOOD.replace("slo:\n  latency_s: 10\n", ""), "bad.yaml:1 slo", "is missing"),
    "zero latency": (GOOD.replace("10", "0"), "bad.yaml:5 slo.latency_s", "over 0..86400"),
    "text for number": (GOOD.replace("10", "fast"), "bad.yaml:5 slo.latency_s", "got 'fast', needs a number"),
    "quoted number": (GOOD.replace("10", '"10"'), "bad.yaml:5 slo.latency_s", "got '10'"),
    "not a number": (GOOD.replace("10", ".nan"), "bad.yaml:5 slo.latency_s", "got nan"),
    "attainment of one": (GOOD.replace("10", "10\n  attainment_ratio: 1"), "bad.yaml:6 slo.attainment_ratio", "under 1"),
    "negative factor": (GOOD.replace("hour\n", "hour\n  scale_factor: -1\n"), "bad.yaml:4 traffic.scale_factor", "over 0"),
    "unknown shift law": (
        GOOD.replace("hour\n", "hour\n  shift_law: random\n"), "bad.yaml:4 traffic.shift_law", "same_hours, independent, amplify",
    ),
    "reversed window": (
        GOOD.replace("hour\n", "hour\n  window: {start_h: 2, end_h: 1}\n"), "bad.yaml:4 traffic.window", "end_h is 1",
    ),
    "window and busiest": (
        GOOD.replace("hour\n", "hour\n  window: {start_h: 0, end_h: 1}\n  busiest: {length_h: 1}\n"), "traffic", "Keep one",
    ),
    "no GPU": (GOOD + "search:\n  gpus_max: 0\n", "bad.yaml:9 search.gpus_max", "got 0, needs a whole number 1..100000"),
    "unknown topology": (GOOD + "topologies:\n- colocated\n- magic\n", "bad.yaml:10 topologies[1]", "got 'magic'"),
    "topology twice": (GOOD + "topologies: [colocated, colocated]\n", "bad.yaml", "Name each once"),
    "one replication": (GOOD + "simulation: {replications: 1}\n", "bad.yaml:8 simulation.replications", "2..200"),
    "table expected": (GOOD.replace("slo:\n  latency_s: 10", "slo: 10"), "bad.yaml:4 slo", "a table with latency_s"),
    "not YAML": ("name: [x\n", "bad.yaml:2", "is not YAML"),
    "a list": ("- name\n", "bad.yaml:1", "got seq"),
    "empty": ("", "bad.yaml:1", "got nothing"),
    "a tag": (GOOD.replace("name: x", "name: !!python/object:os.system x"), "bad.yaml:1 name", "needs a text"),
    "a list with a tag": (GOOD.replace("name: x", "name: !!python/tuple [x]"), "bad.yaml:1 name", "got a list"),
    "nested without end": ("a: " + "[" * 3000 + "]" * 3000, "bad.yaml", "nested too deep"),
    "an alias bomb": (
        "a: &a [x,x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
        "d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: [*d,*d,*d,*d,*d,*d,*d,*d,*d,*d]\n", "bad.yaml", "too many",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda name: name.replace(" ", "-"))
def test_a_malformed_scenario_is_refused_with_its_place(case: str, tmp_path: Path) -> None:
    text, place, what = CASES[case]
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_scenario(str(path))
    assert place in str(caught.value)
    assert what in str(caught.value)


def test_all_problems_of_a_scenario_come_together(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(GOOD.replace("10", "-1") + "colour: red\ngpu: 3\n", encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_scenario(str(path))
    assert [problem.where for problem in caught.value.problems] == [
        "bad.yaml:5 slo.latency_s", "bad.yaml:8 colour", "bad.yaml:9 gpu",
    ]  # fmt: skip


def test_a_scenario_that_is_too_large_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "large.yaml"
    path.write_text("# " + "x" * 2**20, encoding="utf-8")
    with pytest.raises(InputError, match="at most 1048576"):
        load_scenario(str(path))


def test_an_unknown_sample_names_the_shipped_ones() -> None:
    with pytest.raises(InputError, match="sample:provider"):
        load_scenario("sample:nothing")


@pytest.mark.parametrize("name", sorted(shipped_scenarios()))
def test_every_shipped_scenario_is_valid(name: str) -> None:
    scenario, _ = load_scenario(f"sample:{name}")
    assert scenario.name == name


def test_the_resolved_scenario_states_every_default_and_reads_back_equal() -> None:
    scenario = parse_strict(GOOD, Scenario, "good.yaml")
    text = to_yaml(scenario)
    again = parse_strict(text, Scenario, "resolved.yaml")
    assert again == scenario
    assert scenario_sha256(again) == scenario_sha256(scenario)
    for name in ("hours_per_month: 730", "confidence: 0.95", "lora_patch_by_step: 10", "gpus_max:"):
        assert name in text


def test_another_question_has_another_digest() -> None:
    one, other = (parse_strict(GOOD.replace("10", latency), Scenario, "s.yaml") for latency in ("10", "11"))
    assert scenario_sha256(one) != scenario_sha256(other)
