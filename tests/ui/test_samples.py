"""Every page of every sample with that sample's plan: in both languages, with every slider and field at both its ends.

Each sample is cut to its busiest minutes and planned once for all tests here, in this process: the pages show it as the session's last plan.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from dashboards.choices import anchored
from dashboards.frame import PAGES
from dashboards.money_inputs import FIELDS
from dashboards.plan_job import Plan
from planner.japanese.patterns import is_english
from planner.money.assumptions import Assumptions
from planner.money.roi import make_roi
from planner.plan_files import with_absolute_paths, write_plan
from planner.plan_record import to_json
from planner.plan_run import make_plan
from planner.roadmap import make_roadmap
from planner.scenario import Busiest, load_scenario, shipped_scenarios, to_yaml
from tests.ui.conftest import go_to

Open = Callable[..., AppTest]
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MINUTES = {"small": 6.0, "provider": 0.5, "provider_fast": 0.5, "gentd26": 60.0, "kinds": 0.2}
"""Of each sample's busiest stretch: some hundreds of requests, planned in one to four seconds."""
FILES = {"gentd26": EXAMPLES / "gentd26.yaml", "kinds": EXAMPLES / "kinds.yaml"}
WITH_PHASES = "small"
"""The sample whose phases of the introduction are simulated too."""
PLAN_PAGES = ("plan", "timeline", "allocation", "roi", "export", "accuracy")
OWN_WORDS = re.compile(
    r"SDXL and other names|registry\.example\.com\S*|USENIX ATC 2025|S3 Standard|diffplan [a-z]+( [a-z]+)*|torch\.compile|CUDA graphs?"
)
"""Names and commands, which are the same in every language."""


def test_the_samples_here_are_all_that_are_shipped() -> None:
    assert set(shipped_scenarios()) <= set(MINUTES)


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Plan]]:
    """Makes a sample's question and its plan, with the phases of the introduction."""
    made: dict[str, tuple[Path, Plan]] = {}

    def make(name: str) -> tuple[Path, Plan]:
        if name in made:
            return made[name]
        scenario, folder = load_scenario(str(FILES[name]) if name in FILES else f"sample:{name}")
        if name == "gentd26" and not FILES[name].with_suffix(".parquet").exists():
            pytest.skip(f"the trace of {name} is not here; examples/README.md says how to get it")
        hours = MINUTES[name] / 60
        scenario = with_absolute_paths(scenario, folder).model_copy(
            update={
                "traffic": scenario.traffic.model_copy(
                    update={"window": None, "busiest": Busiest(length_h=hours), "trace": anchored(scenario, folder).traffic.trace}
                ),
                "simulation": scenario.simulation.model_copy(update={"replications": 2, "warmup_s": 0.0}),
            }
        )  # fmt: skip
        here = tmp_path_factory.mktemp(name)
        path = here / f"cut-{name}.yaml"
        path.write_text(to_yaml(scenario), encoding="utf-8")
        made[name] = path, _plan(path, here)
        return made[name]

    return make


def _plan(path: Path, here: Path) -> Plan:
    scenario, folder = load_scenario(str(path))
    result = make_plan(scenario, folder, jobs=1)
    write_plan(result, scenario, folder, here / "plan")
    record = result.record
    if scenario.name == WITH_PHASES:
        found = make_roi(here / "plan", Assumptions())
        assert found.evidence is not None
        assert found.returns is not None
        today = next(row.topology for row in record.topologies if row.topology == found.returns.today_topology)
        phases = make_roadmap(found.evidence, today, found.returns.today_gpus, pays=found.returns.pays)
        record = record.model_copy(update={"roadmap": phases})
    files = {file.name: file.read_bytes() for file in (here / "plan").iterdir()}
    files["scenario.yaml"] = files.pop("scenario.resolved.yaml")
    return Plan(record, files | {"plan.json": to_json(record).encode()}, scenario)


def opened(page: Open, path: Path, plan: Plan, language: str) -> AppTest:
    """The app on the page Plan with the sample's plan at hand: the last one of the session, and the server's."""
    app = page(path, at="plan", scenario=path.name, lang=language, profiles=()).run()
    assert not app.exception
    app.session_state["_last_plan"] = plan
    app.run()
    assert app.metric or app.error
    return app


def texts_of(app: AppTest) -> Iterator[str]:
    """Everything a page says, tables and their titles too."""
    kinds = (
        app.title,
        app.text,
        app.caption,
        app.markdown,
        app.subheader,
        app.success,
        app.info,
        app.warning,
        app.error,
    )
    for kind in kinds:
        for element in kind:
            yield str(element.value)
    for metric in app.metric:
        yield from (metric.label, str(metric.value), str(metric.delta))
    for widget in (
        *app.selectbox,
        *app.slider,
        *app.number_input,
        *app.text_input,
        *app.toggle,
        *app.checkbox,
        *app.button,
    ):
        yield widget.label
        yield str(getattr(widget, "help", "") or "")
    for chart in app.get("plotly_chart"):
        yield chart.proto.alt
    for frame in (*app.table, *app.dataframe):
        yield from map(str, frame.value.columns)
        for column in frame.value.columns:
            yield from (str(cell) for cell in frame.value[column])


def english_in(app: AppTest) -> list[str]:
    """What a Japanese page still says in English."""
    found = []
    for text in texts_of(app):
        for line in text.replace("\\", "").splitlines():
            if is_english(OWN_WORDS.sub("", line)):
                found.append(line)
    return found


@pytest.mark.parametrize("sample", sorted(MINUTES))
def test_every_page_shows_the_samples_plan_and_nothing_english_on_japanese_pages(
    page: Open, planned: Callable[[str], tuple[Path, Plan]], sample: str
) -> None:
    app = opened(page, *planned(sample), "ja")
    for name in PAGES:
        go_to(app, name).run()
        assert not app.exception, name
        assert not english_in(app), name
        assert not [element for element in app.markdown if element.proto.allow_html], name
    go_to(app, "start").run()
    if sample == "kinds":
        return  # four searches take long enough; what differs from the other samples are its sentences
    app.segmented_control(key="lang").set_value("en")
    app.run()
    for name in PLAN_PAGES:
        go_to(app, name).run()
        assert not app.exception, name
        assert not app.error or name == "accuracy", name  # where it says how many replays are outside their bounds
        assert app.metric or app.dataframe or app.table or app.get("download_button"), name


@pytest.mark.parametrize("sample", sorted(set(MINUTES) - {"kinds"}))
def test_every_slider_and_field_at_both_its_ends_gives_an_answer_or_a_sentence(
    page: Open, planned: Callable[[str], tuple[Path, Plan]], sample: str
) -> None:
    app = opened(page, *planned(sample), "en")
    for name in PLAN_PAGES:
        go_to(app, name).run()
        assert not app.exception, name
        for end in ("min", "max"):
            for number in app.number_input:
                if number.key in {"factor", "slo", "attainment", "price"} or number.disabled:
                    continue  # of the question: below
                number.set_value(getattr(number, end))
            for slider in app.slider:
                both = isinstance(slider.value, tuple)
                slider.set_value((getattr(slider, end),) * 2 if both else getattr(slider, end))
            app.run()
            assert not app.exception, (name, end)
            if name == "roi":
                assert {f"roi_{field.name}" for field in FIELDS} <= {number.key for number in app.number_input}
    for end in ("min", "max"):  # the question of all pages: the plan that was made stays, and is said to be the old one
        for key in ("factor", "slo", "attainment", "price"):
            app.number_input(key=key).set_value(getattr(app.number_input(key=key), end))
        for name in PLAN_PAGES:
            go_to(app, name).run()
            assert not app.exception, (name, end)
