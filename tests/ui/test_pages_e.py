"""The pages Time line, Allocation, ROI and Export: what they show is the plan's, what they hand out is complete."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streamlit.testing.v1 import AppTest

from dashboards import money_charts
from dashboards.folder_job import zipped
from dashboards.gpu_layout import layout_of
from dashboards.money_inputs import FIELDS, names_of
from dashboards.pages.roi import share_table
from dashboards.plan_job import Plan
from engine.allocation import Allocation, Link, Pool
from planner.money.assumptions import Assumptions
from planner.money.roi import Returns
from planner.money.shares import Share
from tests.ui.conftest import QUESTION, go_to, press_plan

Open = Callable[..., AppTest]
Words = Callable[[AppTest], str]


@pytest.fixture(scope="module")
def asked(
    tmp_path_factory: pytest.TempPathFactory, trace_csv: bytes, provisional_profile_path: Path
) -> Callable[[float], Path]:
    """The tiny question in one place, so that the server of this test run plans it once."""
    folder = tmp_path_factory.mktemp("asked")
    (folder / "trace.csv").write_bytes(trace_csv)

    def write(latency_s: float = 12.0) -> Path:
        path = folder / f"asked{latency_s:g}.yaml"
        path.write_text(
            QUESTION.format(name="asked", latency_s=latency_s, profile=provisional_profile_path), encoding="utf-8"
        )
        return path

    return write


def opened(page: Open, path: Path, at: str, **address: str) -> tuple[AppTest, Plan]:
    """A page with the plan of the question, made now if this run has not made it yet."""
    app = page(path, at=at, scenario=path.name, profile="provisional_profile.json", price="2", **address).run()
    assert not app.exception
    press_plan(app)
    assert not app.exception
    plan: Plan = app.session_state["_last_plan"]
    return app, plan


def address_of(app: AppTest) -> dict[str, str]:
    return {key: value if isinstance(value, str) else value[0] for key, value in app.query_params.items()}


def figures(app: AppTest) -> dict[str, str]:
    return {metric.label: str(metric.value).replace("\\", "") for metric in app.metric}


def alternatives(app: AppTest) -> list[str]:
    """What the charts say to people who cannot see them."""
    return [chart.proto.alt for chart in app.get("plotly_chart")]


# -- time line -------------------------------------------------------------------------------------------------------------


def test_the_time_line_draws_the_run_and_the_slowest_request(
    page: Open, words: Words, asked: Callable[..., Path]
) -> None:
    app, _plan = opened(page, asked(), "timeline")
    said = alternatives(app)
    assert len(said) == 4
    assert all(said)
    slowest = app.selectbox(key="tl_request").value
    assert f"Request {slowest} takes" in said[3]
    assert address_of(app)["request"] == slowest
    seconds = [float(text) for text in app.dataframe[-1].value["Seconds"]]
    latency_s = float(said[3].split("takes ")[1].split(" s")[0])
    assert sum(seconds) == pytest.approx(latency_s, abs=0.006)  # 0.005 of the sentence, 0.0005 a stage of the table


def test_another_request_and_a_part_of_the_run_are_in_the_link(
    page: Open, words: Words, asked: Callable[..., Path]
) -> None:
    app, _ = opened(page, asked(), "timeline", request="r7", **{"from": "25", "to": "50"})
    assert "Request r7 takes" in alternatives(app)[3]
    assert app.slider(key="tl_window").value == (25, 50)
    link = address_of(app)
    assert (link["request"], link["from"], link["to"]) == ("r7", "25", "50")
    app.text_input(key="tl_other").set_value("<b>nobody</b>")
    app.run()
    assert not app.exception
    assert "no such request" in words(app)
    app.slider(key="tl_window").set_value((100, 100))
    app.run()
    assert not app.exception
    assert (address_of(app)["from"], address_of(app)["to"]) == ("99", "100")


# -- allocation ------------------------------------------------------------------------------------------------------------


def test_the_map_names_every_worker_and_follows_the_size_of_a_host(page: Open, asked: Callable[..., Path]) -> None:
    app, plan = opened(page, asked(), "allocation", host="1")
    assert plan.record.recommended is not None
    row = plan.record.row(plan.record.recommended)
    assert app.number_input(key="al_per_host").value == 1
    app.number_input(key="al_per_host").set_value(8)
    app.run()
    assert figures(app)["GPUs"] == str(row.n_gpus)
    (said,) = alternatives(app)
    for pool in row.pools:
        assert all(f"{pool.name}-{n} " in said for n in range(pool.n_replicas))
    assert address_of(app)["host"] == "8"


pools = st.builds(
    lambda n_base, n_controlnet, per_gpu: (
        Pool("base", "base", n_base, "gpu", topology="decoupled", controlnet_ids=(), workers_per_gpu=per_gpu),
        *([Pool("nets", "controlnet", n_controlnet, "gpu", topology="decoupled")] if n_controlnet else []),
    ),
    st.integers(1, 40), st.integers(0, 12), st.integers(1, 3),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(pools, st.integers(1, 16), st.booleans())
def test_every_replica_is_on_the_map_once_and_no_host_is_overfull(
    found: tuple[Pool, ...], per_host: int, is_far: bool
) -> None:
    links = (Link("base", "nets", "network" if is_far else "nvlink"),) if len(found) > 1 else ()
    allocation = Allocation(found, links)
    layout = layout_of(allocation, per_host, {})
    assert all(len(host) <= per_host for host in layout.hosts)
    assert sum(len(host) for host in layout.hosts) == allocation.n_gpus
    placed = sorted(worker for host in layout.hosts for gpu in host for worker in gpu.workers)
    assert placed == sorted(f"{pool.name}-{n}" for pool in found for n in range(pool.n_replicas))
    assert layout.n_unused == len(layout.hosts) * per_host - allocation.n_gpus


# -- return ----------------------------------------------------------------------------------------------------------------


def test_the_return_is_the_planners_and_an_input_changes_it_and_the_link(
    page: Open, asked: Callable[..., Path]
) -> None:
    app, plan = opened(page, asked(), "roi", m_today="colocated", m_today_gpus="9")
    before = figures(app)
    assert plan.record.recommended is not None
    row = plan.record.row(plan.record.recommended)
    # nine GPUs of one service against the recommendation's, at 2 USD an hour and 800 USD a service and month
    new_usd = (row.n_gpus or 0) * 2 * plan.record.ids.hours_per_month + 800 * len(row.pools)
    assert before["Saving a month"] == f"${9 * 2 * plan.record.ids.hours_per_month + 800 - new_usd:,.0f}"
    app.number_input(key="roi_today_gpus").set_value(12)
    app.run()
    assert not app.exception
    assert float(figures(app)["Saving a month"].strip("$").replace(",", "")) == pytest.approx(
        float(before["Saving a month"].strip("$").replace(",", "")) + 3 * 2 * plan.record.ids.hours_per_month, abs=1.0
    )  # both are rounded to a dollar
    assert address_of(app)["m_today_gpus"] == "12"
    again, _ = opened(page, asked(), "roi", **{k: v for k, v in address_of(app).items() if k.startswith("m_")})
    assert figures(again) == figures(app)


def test_a_share_without_a_price_is_a_sentence_not_a_crash(
    page: Open, words: Words, asked: Callable[..., Path]
) -> None:
    app, _ = opened(page, asked(), "roi", m_reserved="60")
    assert "reserved_ratio needs reserved_price_usd_per_gpu_hour" in words(app)
    assert not app.metric
    app.number_input(key="roi_reserved_price").set_value(1.5)
    app.run()
    assert not app.exception
    assert "reserved_ratio needs" not in words(app)


def test_a_curve_is_off_by_default_and_once_on_its_points_change_the_value_and_the_link(
    page: Open, words: Words, asked: Callable[..., Path]
) -> None:
    app, _ = opened(page, asked(), "roi", m_today="colocated", m_today_gpus="9")
    assert "the value curves are off" in words(app)
    assert app.text_input(key="roi_churn_curve").value == "1: 0; 10: 0"  # no source is known: no effect
    app.toggle(key="roi_churn").set_value(True)
    app.run()
    assert "churn needs two points" in words(app)  # and whom it is about
    app.number_input(key="roi_customers").set_value(1000)
    app.number_input(key="roi_customer_value").set_value(50.0)
    app.text_input(key="roi_churn_curve").set_value("0.5: 0; 20: 40")
    app.run()
    assert not app.exception
    assert not app.error
    assert "the value curves are off" not in words(app)
    link = address_of(app)
    assert (link["m_churn"], link["m_churn_curve"]) == ("on", "0.5: 0; 20: 40")
    again, _ = opened(page, asked(), "roi", **{k: v for k, v in link.items() if k.startswith("m_")})
    assert figures(again) == figures(app)
    for hostile in ("1: 2: 3", "a: b", "1: nan; 2: 1", "2: 1; 1: 1", ";;;", "1: 101; 2: 0", "<b>"):
        app.text_input(key="roi_churn_curve").set_value(hostile)
        app.run()
        assert not app.exception, hostile
        assert app.error, hostile


def test_every_input_at_both_its_ends_gives_an_answer_or_a_sentence(
    page: Open, words: Words, asked: Callable[..., Path]
) -> None:
    app, _ = opened(page, asked(), "roi")
    for end in ("min", "max"):
        for field in FIELDS:
            number = app.number_input(key=f"roi_{field.name}")
            number.set_value(getattr(number, end))
        app.run()
        assert not app.exception, end
        assert app.metric or app.error or app.info, end


def test_the_tables_of_the_return_sum_to_the_cent_as_they_are_shown(page: Open, asked: Callable[..., Path]) -> None:
    app, _ = opened(page, asked(), "roi")
    tables = [frame.value for frame in app.dataframe if "Requests" in frame.value.columns]
    assert len(tables) == 3
    totals = set()
    for table in tables:
        cents = [round(100 * float(text)) for text in table["USD a month"]]
        assert sum(cents[:-1]) == cents[-1]
        totals.add(cents[-1])
    assert len(totals) == 1


@given(
    st.lists(st.tuples(st.sampled_from(["controlnet", "lora group", "images", "waiting", "idle", "line", "tenant"]), st.text(max_size=8), st.integers(0, 10**9)), min_size=1, max_size=60)
)  # fmt: skip
def test_no_cent_of_a_division_is_lost_on_the_way_to_the_chart_and_the_table(parts: list[tuple[str, str, int]]) -> None:
    rows = [Share(kind, name, None, cents) for kind, name, cents in parts]
    total = sum(row.cost_cents for row in rows)
    assert sum(cents for _, cents in money_charts.grouped(rows)) == total
    shown = [round(100 * float(text)) for text in share_table(rows)["USD a month"]]
    assert shown[-1] == total
    assert sum(shown[:-1]) == total


def test_every_input_of_the_page_is_a_field_of_the_assumptions() -> None:
    assert {field.path for field in FIELDS} <= names_of(Assumptions)
    assert len({field.name for field in FIELDS}) == len(FIELDS)


def test_the_line_of_the_payback_meets_zero_where_the_sentence_says(page: Open, asked: Callable[..., Path]) -> None:
    from dashboards.plan_folder import plan_folder  # noqa: F401  the page's own way to the plan
    from planner.money.roi import Ground, roi_on

    _, plan = opened(page, asked(), "roi")
    assumptions = Assumptions.model_validate(
        {"today": {"topology": "colocated", "n_gpus": 9}, "migration": {"double_running_months": 2.0}}
    )
    found = roi_on(Ground(plan.record, None, "", None, None), assumptions).returns
    assert isinstance(found, Returns)
    assert found.payback_months is not None
    before = int(found.payback_months)
    assert found.cumulative_usd[before] <= 0 <= found.cumulative_usd[before + 1]
    assert found.cumulative_usd[0] == -found.investment_usd


# -- export ----------------------------------------------------------------------------------------------------------------


def exported(app: AppTest) -> dict[str, str]:
    archive = app.session_state["_exported"][1].content
    with zipfile.ZipFile(io.BytesIO(archive)) as files:
        assert files.testzip() is None
        return {name: files.read(name).decode() for name in files.namelist()}


def test_the_bill_and_the_cluster_files_of_a_plan_come_as_one_archive(
    page: Open, words: Words, asked: Callable[..., Path]
) -> None:
    app, plan = opened(page, asked(), "export", to="kubernetes,json,nonsense")
    assert "to=nonsense" in words(app)
    assert app.button(key="export").disabled
    assert "which image runs" in words(app)
    app.text_input(key="ex_volume").set_value("models")
    app.text_input(key="ex_image").set_value("registry.example.com/engine:2")
    app.run()
    app.button(key="export").click()
    app.run()
    assert not app.exception
    files = exported(app)
    assert plan.record.recommended is not None
    assert json.loads(files["json/bill.json"])["total"]["n_gpus"] == plan.record.row(plan.record.recommended).n_gpus
    assert any(
        "registry.example.com/engine:2" in text for name, text in files.items() if name.startswith("kubernetes/")
    )
    link = address_of(app)
    assert (link["to"], link["c_image"]) == ("kubernetes,json", "registry.example.com/engine:2")


def test_a_wrong_field_of_the_cluster_is_a_sentence(page: Open, words: Words, asked: Callable[..., Path]) -> None:
    app, _ = opened(page, asked(), "export", to="kubernetes", c_image="a", c_volume="b", c_namespace="<script>")
    assert not app.exception
    assert "namespace" in words(app)
    assert app.error
    assert not [button for button in app.button if button.key == "export"]


def test_a_hostile_cluster_file_is_a_sentence_and_reads_nothing_of_this_machine(
    page: Open, words: Words, asked: Callable[..., Path]
) -> None:
    app, _ = opened(page, asked(), "export", to="kubernetes")
    good = b"image: registry.example.com/engine:1\nstore: {volume_claim: models}\n"
    for content, said in (
        (good + b"catalogue: /etc/passwd\n", "names the file '/etc/passwd'"),
        (good + b"image: again\n", "image"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b"# " + b"x" * 100_001, "at most 100,000 bytes"),
        (b"a: &a [x, x]\nb: [*a, *a]\n", "cluster.yaml"),
        (b"!!python/object/apply:os.system ['true']", "cluster.yaml"),
    ):
        app.file_uploader(key="ex_cluster_file").set_value(("../../cluster.yaml", content, "application/yaml"))
        app.run()
        assert not app.exception, content[:40]
        assert app.error, content[:40]
        assert said in words(app)
        assert not [button for button in app.button if button.key == "export"]
    app.file_uploader(key="ex_cluster_file").set_value(("cluster.yaml", good, "application/yaml"))
    app.run()
    assert not app.error
    assert not app.button(key="export").disabled


def test_a_plan_that_does_not_hold_is_exported_only_after_it_was_confirmed(
    page: Open, words: Words, asked: Callable[..., Path]
) -> None:
    app, plan = opened(page, asked(0.5), "export", to="json")
    assert plan.record.verdict == "infeasible"
    assert "the plan is infeasible" in words(app)
    assert app.button(key="export").disabled
    (box,) = [box for box in app.checkbox if str(box.key).startswith("ex_confirm")]
    box.check()
    app.run()
    assert not app.button(key="export").disabled
    app.button(key="export").click()
    app.run()
    assert not app.exception
    files = exported(app)
    assert "exported with --force" in files["json/bill.json"]
    for name in ("timeline", "allocation", "roi"):
        go_to(app, name).run()
        assert not app.exception, name


def test_a_phase_is_exported_once_the_phases_were_simulated(
    page: Open, words: Words, asked: Callable[..., Path]
) -> None:
    app, _plan = opened(page, asked(), "roi", m_today="colocated", m_today_gpus="9")
    app.button(key="roadmap").click()
    app.run()
    assert not app.exception
    assert "_phases" in app.session_state, words(app)
    known = app.session_state["_phases"]
    assert [phase.number for phase in known.phases] == [1, 2, 3, 4]
    assert all(phase.what in words(app) for phase in known.phases)
    app.number_input(key="roi_today_gpus").set_value(11)
    app.run()
    assert "simulated for other figures" in words(app)
    go_to(app, "export").run()
    number = next(phase.number for phase in known.phases if phase.allocation is not None)
    app.selectbox(key="ex_phase").set_value(number)
    app.run()
    for box in [box for box in app.checkbox if str(box.key).startswith("ex_confirm")]:
        box.check()
        app.run()
    app.button(key="export").click()
    app.run()
    assert not app.exception
    assert f"--phase {number}" in json.loads(exported(app)["json/bill.json"])["provenance"]["command"]


def test_the_same_files_give_the_same_archive() -> None:
    texts = {"b/two.yaml": "2", "a.json": "1"}
    assert zipped(texts) == zipped(dict(reversed(texts.items())))
