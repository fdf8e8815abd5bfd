"""The page as a visitor sees it: what it shows, what it computes, what a link carries."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from dashboards.plain_text import escaped
from planner.plan_run import make_plan
from planner.scenario import Scenario, load_scenario, shipped_scenarios
from tests.ui.conftest import press_plan, question_writer

Open = Callable[..., AppTest]
Words = Callable[[AppTest], str]


@pytest.fixture(scope="module")
def question(
    tmp_path_factory: pytest.TempPathFactory, trace_csv: bytes, provisional_profile_path: Path
) -> Callable[..., Path]:
    """The tiny question in one place for all tests here, so that the server of this test run plans it once."""
    return question_writer(tmp_path_factory.mktemp("question"), trace_csv, provisional_profile_path)


def figures(app: AppTest) -> dict[str, str]:
    return {metric.label: str(metric.value).replace("\\", "") for metric in app.metric}


def planned(app: AppTest) -> AppTest:
    return press_plan(app.run())


def test_the_page_renders_and_asks_for_a_plan(page: Open, words: Words) -> None:
    app = page(profile="provisional_profile.json").run()
    assert not app.exception
    assert app.title[0].value == "Which GPUs should run what?"
    assert "Press Plan" in words(app)
    assert not app.metric


def test_without_any_profile_the_page_says_what_to_do(
    page: Open, words: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dashboards.settings.shipped_profiles", dict)
    app = page(profiles=()).run()
    assert not app.exception
    assert "ships no measured profile" in words(app)
    assert "--profile FILE" in words(app)


@pytest.mark.parametrize("name", sorted(shipped_scenarios()))
def test_every_shipped_scenario_can_be_chosen(
    page: Open, words: Words, question: Callable[..., Path], name: str
) -> None:
    app = page(question(), scenario="tiny.yaml", profile="provisional_profile.json").run()
    app.selectbox(key="scenario").set_value(name)
    app.run()
    scenario, _ = load_scenario(f"sample:{name}")
    assert not app.exception
    assert app.number_input(key="slo").value == scenario.slo.latency_s
    assert app.number_input(key="factor").value == scenario.traffic.scale_factor
    assert "Press Plan" in words(app)


def test_the_page_shows_the_figures_of_the_plan(page: Open, words: Words, question: Callable[..., Path]) -> None:
    app = planned(page(question(), scenario="tiny.yaml"))
    assert not app.exception
    # that this is what the planner says of the question is held below, of a changed one
    record = app.session_state["_last_plan"].record
    assert record.recommended is not None
    row = record.row(record.recommended)
    assert app.success[0].value == escaped(record.sentence)
    shown = figures(app)
    assert shown["GPUs"] == str(row.n_gpus)
    assert shown["Cost a month"] == f"${row.cost_usd_per_month:,.0f}"
    assert shown["Per 1000 images"] == f"${row.cost_usd_per_1000_images.mean:,.2f}"
    # 0.9 promised: the 95th percentile is the nearest of those recorded
    assert shown["p95 latency"] == f"{row.latency_p95_s.mean:.2f} s"
    assert shown["Requests in time"] == f"{100 * (row.slo_attainment_ratio.mean or 0):.2f} %"


def test_changed_inputs_reach_the_plan_and_the_files(page: Open, question: Callable[..., Path], tmp_path: Path) -> None:
    app = page(question(), scenario="tiny.yaml").run()
    app.number_input(key="slo").set_value(9.0)
    app.number_input(key="attainment").set_value(80.0)
    app.number_input(key="factor").set_value(2.0)
    app.number_input(key="price").set_value(1.25)
    press_plan(app.run())
    assert not app.exception
    plan = app.session_state["_last_plan"]
    assert (plan.record.slo_latency_s, plan.record.slo_attainment_ratio) == (9.0, 0.8)
    assert plan.record.traffic.scale_factor == 2.0
    assert plan.record.ids.price_usd_per_gpu_hour == 1.25
    assert {"plan.json", "allocation.json", "report.html", "scenario.yaml"} <= set(plan.files)
    assert json.loads(plan.files["plan.json"])["slo_latency_s"] == 9.0
    offered = {button.label.replace("\\", "") for button in app.download_button}
    assert set(plan.files) - {"requests.parquet", "workers.parquet"} <= offered  # those are on the page Export
    # and the scenario to download is the question: the planner makes the same plan of it
    copy = tmp_path / "downloaded.yaml"
    copy.write_bytes(plan.files["scenario.yaml"])
    again, _ = load_scenario(str(copy))
    assert isinstance(again, Scenario)
    assert make_plan(again, tmp_path, jobs=1).record == plan.record


def test_after_a_change_the_old_plan_is_shown_as_old(page: Open, words: Words, question: Callable[..., Path]) -> None:
    app = planned(page(question(), scenario="tiny.yaml"))
    assert "before your change" not in words(app)
    app.number_input(key="slo").set_value(10.5)
    app.run()
    assert "before your change" in words(app)
    assert app.metric
    assert not app.button(key="plan").disabled
    app.number_input(key="slo").set_value(12.0)
    app.run()
    assert "before your change" not in words(app)
    assert app.button(key="plan").disabled  # this question is planned


def test_an_infeasible_question_says_what_binds_and_what_would_do(
    page: Open, words: Words, question: Callable[..., Path]
) -> None:
    app = planned(page(question(latency_s=0.5), scenario="tiny.yaml"))
    assert not app.exception
    record = app.session_state["_last_plan"].record
    assert record.infeasible is not None
    said = words(app)
    assert "No allocation keeps this promise" in said
    for text in (record.infeasible.binds, record.infeasible.why, record.infeasible.nearest):
        assert text in said
    assert not app.success


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("factor", 0.0, "traffic.scale_factor"),
        ("factor", 100_000.0, "at most 5,000,000"),
        ("slo", 0.0, "slo.latency_s"),
        ("slo", 86_400.0, "Press Plan"),
        ("slo", None, "is empty"),
        ("attainment", 0.0, "slo.attainment_ratio"),
        ("attainment", 100.0, "slo.attainment_ratio"),
        ("price", 0.0, "prices.price_usd_per_gpu_hour"),
        ("price", 10_000.0, "Press Plan"),
        ("price", None, "a price in USD"),
    ],
)
def test_extreme_values_give_a_sentence_or_a_question(
    page: Open, words: Words, question: Callable[..., Path], key: str, value: float | None, said: str
) -> None:
    app = page(question(), scenario="tiny.yaml").run()
    app.number_input(key=key).set_value(value)
    app.run()
    assert not app.exception
    assert said in words(app)
    assert not re.search(r"question:\d", words(app))  # a line of a text that the visitor never saw


def test_too_little_traffic_is_refused_by_the_planner_in_a_sentence(
    page: Open, words: Words, question: Callable[..., Path]
) -> None:
    app = page(question(), scenario="tiny.yaml", factor="0.001")
    planned(app)
    assert not app.exception
    assert "cannot be planned" in words(app)
    assert not app.metric


def test_a_link_reproduces_the_question(page: Open, question: Callable[..., Path]) -> None:
    path = question()
    link = {
        "scenario": "tiny.yaml",
        "profile": "provisional_profile.json",
        "factor": "2.5",
        "slo": "7",
        "attainment": "95.5",
        "price": "2.2",
        "lang": "en",
    }
    app = page(path, **link).run()
    assert not app.exception
    shown = {key: app.number_input(key=key).value for key in ("factor", "slo", "attainment", "price")}
    assert shown == {"factor": 2.5, "slo": 7.0, "attainment": 95.5, "price": 2.2}
    assert {key: value if isinstance(value, str) else value[0] for key, value in app.query_params.items()} == link


def test_the_address_follows_the_fields(page: Open, question: Callable[..., Path]) -> None:
    path = question()
    app = page(path, scenario="tiny.yaml").run()
    app.number_input(key="slo").set_value(8.25)
    app.run()
    address = {key: value if isinstance(value, str) else value[0] for key, value in app.query_params.items()}
    assert address["slo"] == "8.25"
    again = page(path, **address).run()
    assert again.number_input(key="slo").value == 8.25


@pytest.mark.parametrize("text", ["abc", "nan", "inf", "-1", "1e300", "", "<b>x</b>"])
def test_a_bad_number_in_a_link_is_named_and_left_out(
    page: Open, words: Words, question: Callable[..., Path], text: str
) -> None:
    app = page(question(), scenario="tiny.yaml", slo=text).run()
    assert not app.exception
    assert app.number_input(key="slo").value == 12.0
    assert f"slo={text}" in words(app)


def test_an_unknown_scenario_in_a_link_is_named_and_left_out(
    page: Open, words: Words, question: Callable[..., Path]
) -> None:
    app = page(question(), scenario="<img src=x onerror=alert(1)>").run()
    assert not app.exception
    assert "scenario=<img src=x onerror=alert(1)>" in words(app)
    assert not [element for element in app.markdown if element.proto.allow_html]


def test_another_scenario_brings_its_own_values(page: Open, question: Callable[..., Path]) -> None:
    first, second = question(), question(latency_s=30.0, file_name="other.yaml")
    app = page(first, second, scenario="tiny.yaml", slo="5").run()
    assert app.number_input(key="slo").value == 5.0
    app.selectbox(key="scenario").set_value("other.yaml")
    app.run()
    assert app.number_input(key="slo").value == 30.0


def test_a_hostile_name_is_shown_as_text(page: Open, words: Words, question: Callable[..., Path]) -> None:
    name = "'<script>alert(1)</script> [x](http://example.com) $y$ **z**'"
    app = page(question(name=name), scenario="tiny.yaml").run()
    assert not app.exception
    assert any(name.strip("'") in element.value for element in app.text)
    for kind in (app.markdown, app.caption, app.success, app.error, app.info, app.warning):
        assert not any("<script>" in str(element.value) for element in kind)
