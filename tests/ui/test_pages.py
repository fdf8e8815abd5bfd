"""Every page of every sample, sliders at their ends, and links that show the same numbers in another session."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from dashboards.frame import PAGES
from planner.scenario import shipped_scenarios
from tests.ui.conftest import go_to

Open = Callable[..., AppTest]
Words = Callable[[AppTest], str]
GENTD26 = Path(__file__).resolve().parents[2] / "examples" / "gentd26.yaml"
SAMPLES = (*sorted(shipped_scenarios()), GENTD26.name)


def address_of(app: AppTest) -> dict[str, str]:
    return {key: value if isinstance(value, str) else value[0] for key, value in app.query_params.items()}


def answer_of(app: AppTest) -> list[str]:
    """The figures that What-if shows, without the time that they took."""
    return [shown.value.to_csv() for kind in (app.table, app.dataframe) for shown in kind]


@pytest.mark.parametrize("scenario", SAMPLES)
def test_every_page_opens_for_every_sample_in_both_languages(page: Open, scenario: str) -> None:
    app = page(GENTD26, at="start", scenario=scenario, profile="h200", lang="ja")
    for name in PAGES:
        go_to(app, name).run()
        assert not app.exception, name
        assert re.search(r"[\u3040-\u30ff\u4e00-\u9fff]", app.title[0].value + app.caption[0].value), name
        assert not [element for element in app.markdown if element.proto.allow_html], name
    app.segmented_control(key="lang").set_value("en")
    go_to(app, "start").run()
    assert not app.exception
    assert app.query_params["lang"] in ("en", ["en"])


def test_the_first_page_has_an_address_of_its_own_name_too(page: Open) -> None:
    root, named = page(scenario="small", profile="h200"), page(scenario="small", profile="h200")
    go_to(root, "").run()
    go_to(named, "start").run()
    assert not root.exception
    assert not named.exception
    assert [title.value for title in named.title] == [title.value for title in root.title]
    assert {button.key for button in named.button} == {button.key for button in root.button}


def test_a_sample_is_loaded_in_one_click(page: Open, words: Words) -> None:
    app = page(at="start", scenario="provider", profile="h200").run()
    app.button(key="load_small").click()
    app.run()
    assert not app.exception
    assert "Loaded **small**" in words(app)
    assert address_of(app)["scenario"] == "small"
    assert app.number_input(key="slo").value == 25.0


@pytest.mark.parametrize("scenario", SAMPLES)
def test_sliders_at_their_ends_give_an_answer(page: Open, words: Words, scenario: str) -> None:
    if scenario == GENTD26.name and not GENTD26.with_suffix(".parquet").exists():
        pytest.skip("the GenTD26 trace is not here; examples/README.md says how to import it")
    app = page(GENTD26, at="what_if", scenario=scenario, profile="h200", topology="decoupled").run()
    usable = [slider.key for slider in app.slider if not slider.disabled]
    # GenTD26 has no ControlNets: no share of them to move, and no workers for them
    assert len(usable) == (4 if scenario == GENTD26.name else 6)
    for end in ("min", "max"):
        for key in usable:
            slider = app.slider(key=key)
            slider.set_value(getattr(slider, end))
        app.run()
        assert not app.exception, (end, [error.value for error in app.exception])
        assert not app.error, words(app)
        assert len(app.table[0].value.columns) == 3


def test_a_slider_moves_the_figures_the_way_it_must(page: Open) -> None:
    app = page(at="what_if", scenario="small", profile="h200", topology="colocated").run()

    def candidate() -> dict[str, str]:
        return {str(name): str(text) for name, text in app.table[0].value.iloc[:, 1].items()}

    before = candidate()
    app.slider(key="what_if_wp").set_value(7.0)  # twice the price of the table
    app.run()
    assert float(candidate()["Cost a month"].strip("\\$").replace(",", "")) == 2 * float(before["Cost a month"].strip("\\$").replace(",", ""))  # fmt: skip
    assert candidate()["p95 latency"] == before["p95 latency"]
    app.slider(key="what_if_wt").set_value(3.0)
    app.run()
    assert "misses" in candidate()["Promise"]
    assert float(candidate()["p95 latency"].split()[0]) > float(before["p95 latency"].split()[0])


def test_a_link_to_what_if_shows_the_same_numbers_to_somebody_else(page: Open) -> None:
    app = page(at="what_if", scenario="small", profile="h200").run()
    for name, value in (("wt", 1.35), ("ws", 18.5), ("wp", 2.75), ("wc", 40.0)):
        app.slider(key=f"what_if_{name}").set_value(value)
    app.selectbox(key="what_if_topology").set_value("decoupled")
    app.run()
    app.slider(key="what_if_wk_decoupled_").set_value(4)
    app.run()
    other = page(at="what_if", **address_of(app)).run()
    assert not other.exception
    assert answer_of(other) == answer_of(app)
    assert address_of(other) == address_of(app)


@pytest.mark.parametrize(
    ("at", "address"),
    [("what_if", {"fleets": "colocated:0"}), ("what_if", {"topology": "<b>"}), ("what_if", {"wt": "nan"}), ("traffic", {"view": "upside-down"}),
     ("traffic", {"instances": "1e9"}), ("accuracy", {"stack": "x"}), ("start", {"lang": "tlh"})],
)  # fmt: skip
def test_what_a_link_says_that_means_nothing_is_named(
    page: Open, words: Words, at: str, address: dict[str, str]
) -> None:
    app = page(at=at, scenario="small", profile="h200", **address).run()
    assert not app.exception
    (key, value), *_ = address.items()
    assert f"{key}={value}" in words(app)
    assert address_of(app).get(key) != value


def test_the_sliders_can_become_the_question_of_all_pages(page: Open) -> None:
    app = page(at="what_if", scenario="small", profile="h200").run()
    app.slider(key="what_if_wt").set_value(2.0)
    app.slider(key="what_if_ws").set_value(30.0)
    app.run()
    app.button(key="adopt").click()
    app.run()
    assert not app.exception
    assert (app.number_input(key="factor").value, app.number_input(key="slo").value) == (1.0, 30.0)
    assert app.slider(key="what_if_wt").value == 1.0


def test_searching_again_finds_fleets_that_can_be_taken(page: Open, question: Callable[..., Path]) -> None:
    app = page(question(), at="what_if", scenario="tiny.yaml", profile="provisional_profile.json").run()
    app.slider(key="what_if_wt").set_value(1.5)
    app.slider(key="what_if_wc").set_value(50.0)
    app.run()
    app.button(key="search_again").click()
    app.run()
    assert not app.exception
    sentence, found = app.session_state["_searched"]
    assert sentence.startswith("Use ")
    app.button(key="take").click()
    app.run()
    assert not app.exception
    assert app.session_state["_fleets"] == found


def test_where_time_goes_is_told_when_asked(page: Open, question: Callable[..., Path], words: Words) -> None:
    app = page(question(), at="traffic", scenario="tiny.yaml", profile="provisional_profile.json", today="colocated", gpus="2").run()  # fmt: skip
    assert "Users wait" not in words(app)
    app.button(key="diagnose").click()
    app.run()
    assert not app.exception
    assert "2 GPUs as colocated" in words(app)
    assert "Users wait" in words(app)
    app.number_input(key="traffic_gpus").set_value(3)
    app.run()
    assert "before your change" in words(app)


def test_traffic_as_planned_for_is_the_scaled_one(page: Open) -> None:
    app = page(at="traffic", scenario="small", profile="h200", instances="3").run()
    recorded = {metric.label: metric.value for metric in app.metric}
    app.segmented_control(key="traffic_view").set_value("planned")
    app.run()
    planned = {metric.label: metric.value for metric in app.metric}
    assert not app.exception
    assert int(recorded["Requests"].replace(",", "")) == 7960
    assert int(planned["Requests"].replace(",", "")) < 7960 / 2  # half of the requests, of which half an hour is kept
    assert address_of(app)["instances"] == "3"


def test_the_page_accuracy_says_what_is_not_validated_and_what_is_outside(
    page: Open, words: Words, question: Callable[..., Path]
) -> None:
    app = page(question(), at="accuracy", scenario="tiny.yaml", profile="provisional_profile.json").run()
    assert not app.exception
    assert "Not yet validated" in words(app)
    assert "No whole images were timed" in words(app)
