"""The page ROI: the visitor's figures, the change as an investment, where the money goes, and the phases."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import streamlit as st

from dashboards import money_charts as charts
from dashboards import money_inputs
from dashboards.decision_blocks import draw_blocks
from dashboards.elements import draw_chart, draw_empty, draw_grades, draw_problem, draw_table
from dashboards.folder_job import compute_roadmap
from dashboards.here import Here
from dashboards.phases import keep_phases, known_phases
from dashboards.plain_text import escaped
from dashboards.plan_folder import plan_digest, plan_folder
from dashboards.plan_job import Plan
from dashboards.planning import ask_plan, store, with_progress
from dashboards.words import language, say, translated
from planner.explain import usd
from planner.money.returns import BREAK_EVEN_FROM, BREAK_EVEN_TO
from planner.money.roi import Ground, Priced, Returns, Roi, read_ground, roi_on
from planner.money.shares import Share
from planner.money.text import markdown, to_json
from planner.plan_files import MONEY_REQUESTS_MAX
from planner.plan_record import PhaseRow
from planner.report import html as report_html
from planner.report_choices import purchasing_blocks
from planner.report_words import seconds_words, share_words, words_of_test
from planner.sentences import chance_words, decision
from traces.problems import InputError


def draw(here: Here) -> None:
    """The whole page below the frame."""
    plan = ask_plan(here)
    if plan is None:
        return
    if plan.record.recommended is None:
        draw_empty(say("roi.none"))
        if "plan" in here.pages:
            st.page_link(here.pages["plan"])
        return
    try:
        assumptions, text = money_inputs.ask([row.topology for row in plan.record.topologies])
        with st.spinner(say("roi.reading")):
            ground = _ground(plan_digest(plan), language(), plan)
        roi = roi_on(ground, assumptions)
    except InputError as error:
        draw_problem(say("roi.refused"), str(error))
        return
    _draw_decision(roi)
    if roi.returns is not None:
        _draw_returns(roi.returns)
    else:
        draw_empty(say("roi.no_returns"))
    _draw_cost(roi)
    if roi.returns is not None and roi.returns.tornado:
        st.subheader(say("roi.tornado"), anchor=False)
        draw_chart(charts.tornado(roi.returns), charts.tornado_words(roi.returns), "roi_tornado")
        st.caption(say("roi.tornado.note"))
    draw_blocks(purchasing_blocks(plan.record.purchasing), "purchasing")
    _draw_buying(roi)
    _draw_shares(roi)
    phases = _draw_roadmap(plan, roi, text)
    st.subheader(say("roi.notes"), anchor=False)
    st.text("\n".join(f"• {translated(note)}" for note in roi.notes))
    recommended = plan.record.row(plan.record.recommended)
    draw_grades(recommended.grades.values(), say("roi.grades"))
    _draw_files(roi, phases, text)


@st.cache_resource(max_entries=2, show_spinner=False)
def _ground(digest: str, words: str, _plan: Plan) -> Ground:
    """What the return rests on; without its records where dividing them would hold the server up."""
    requests = _plan.record.traffic.n_requests
    if requests > MONEY_REQUESTS_MAX:
        return Ground(_plan.record, None, say("roi.left_out", n=f"{MONEY_REQUESTS_MAX:,}"), None, None)
    return read_ground(plan_folder(_plan))


def _draw_decision(roi: Roi) -> None:
    said = decision(roi)
    pays = roi.returns is not None and roi.returns.pays
    (st.success if pays else st.info)(
        escaped(said.japanese if language() == "ja" else said.english), icon=":material/gavel:"
    )


def _draw_returns(found: Returns) -> None:
    spread = found.spread

    def between(low: float, high: float) -> str:
        return say("roi.range", low=usd(low), high=usd(high))

    columns = st.columns(5)
    columns[0].metric(say("roi.saving"), escaped(charts.short_usd(found.saving_usd_per_month)), help=escaped(between(spread.saving_p05_usd_per_month, spread.saving_p95_usd_per_month)))  # fmt: skip
    columns[1].metric(say("roi.investment"), escaped(charts.short_usd(found.investment_usd)))
    months = say("roi.months.never") if found.payback_months is None else f"{found.payback_months:.1f}"
    columns[2].metric(say("roi.payback"), months, help=say("roi.payback.help", months=len(found.cumulative_usd) - 1))
    columns[3].metric(
        say("roi.npv"),
        escaped(charts.short_usd(found.npv_usd)),
        help=escaped(between(spread.npv_p05_usd, spread.npv_p95_usd)),
    )
    chance = chance_words(spread.probability_npv_positive)[1 if language() == "ja" else 0]
    chance = chance.replace("more than", ">").replace("less than", "<")  # a metric has room for few letters
    columns[4].metric(say("roi.chance"), escaped(chance), help=say("roi.chance.help", n=f"{spread.n_draws:,}"))
    lines = [
        say("roi.today", n=found.today_gpus, topology=found.today_topology, cost=usd(found.today_cost.total_usd)),
        f"{say('roi.saving')}: {between(spread.saving_p05_usd_per_month, spread.saving_p95_usd_per_month)}",
        f"{say('roi.npv')}: {between(spread.npv_p05_usd, spread.npv_p95_usd)}",
    ]
    even = found.break_even_traffic_ratio
    if even is None:
        lines.append(say("roi.even.none", high=f"{BREAK_EVEN_TO:g}"))
    else:
        key = "roi.even" if even > BREAK_EVEN_FROM else "roi.even.always"
        lines.append(say(key, ratio=f"{even:.3g}"))
    st.text("\n".join(lines))
    st.subheader(say("roi.payback.chart"), anchor=False)
    draw_chart(charts.payback(found), charts.payback_words(found), "roi_payback")


def _draw_cost(roi: Roi) -> None:
    if len(charts.steps_to(roi)) > 1:
        st.subheader(say("roi.steps"), anchor=False)
        draw_chart(charts.full_cost_steps(roi), charts.full_cost_steps_words(roi), "roi_steps")
        st.caption(say("roi.steps.note"))
    st.subheader(say("roi.lines"), anchor=False)
    draw_chart(charts.cost_lines(roi), charts.cost_lines_words(roi), "roi_lines", shows_words=False)
    rows = [
        {
            say("roi.topology"): _named(row), say("roi.gpus"): row.n_gpus,
            **{say(f"roi.line.{line}"): usd(charts.line_usd(row, line)) for line, _, _ in charts.LINES},
            say("roi.total"): usd(row.cost.total_usd), say("roi.against"): usd(row.saving_usd_per_month),
            say("roi.value"): usd(row.value.total_usd) if row.value is not None else say("roi.off"),
        }
        for row in roi.waterfall
    ]  # fmt: skip
    draw_table(pd.DataFrame(rows), say("roi.lines.alt"), "cost.csv", is_wide=True)


def _named(row: Priced) -> str:
    return f"{row.topology} ({say('roi.recommended')})" if row.is_recommended else row.topology


def _draw_buying(roi: Roi) -> None:
    st.subheader(say("roi.buying"), anchor=False)
    if not roi.bought:
        draw_empty(say("roi.buying.none"))
        return
    st.caption(say("roi.buying.note"))
    rows = [
        {
            say("roi.bought"): say("roi.bought.all") if words == "all GPUs" else say("roi.bought.peak"), say("roi.gpus"): one.n_gpus,
            say("roi.invested"): round(one.invested_usd), say("roi.rent_avoided"): round(one.rent_avoided_usd_per_month),
            say("roi.npv_usd"): round(one.npv_usd), say("roi.payback_months"): None if one.payback_months is None else round(one.payback_months, 1),
            say("roi.break_even_hours"): round(one.break_even_hours_per_month),
        }
        for words, one in roi.bought
    ]  # fmt: skip
    draw_table(pd.DataFrame(rows), say("roi.buying.alt"), "buying.csv", is_wide=True)


def _draw_shares(roi: Roi) -> None:
    if roi.shares is None:
        return
    st.subheader(say("roi.shares"), anchor=False)
    st.caption(escaped(say("roi.shares.note", total=f"${roi.shares.total_cents / 100:,.2f}")))
    named = (
        ("add_ons", say("roi.shares.add_ons"), roi.shares.add_ons),
        ("checkpoints", say("roi.shares.checkpoints"), roi.shares.checkpoints),
        ("tenants", say("roi.shares.tenants"), roi.shares.tenants),
    )
    for (name, _, rows), tab in zip(named, st.tabs([words for _, words, _ in named]), strict=True):
        with tab:
            draw_chart(charts.shares(rows), charts.shares_words(rows), f"roi_shares_{name}", shows_words=False)
            draw_table(share_table(rows), say("roi.shares.alt"), f"{name}.csv", is_wide=True)


def share_table(rows: Sequence[Share]) -> pd.DataFrame:
    """The rows of a division and their total; dollars as texts, exact to the cent; what no request asks for has no number of requests."""
    total = sum(row.cost_cents for row in rows)
    cells = [
        (
            translated(row.kind),
            charts.share_name(row),
            "" if row.n_requests is None else str(row.n_requests),
            f"{row.cost_cents / 100:.2f}",
        )
        for row in rows
    ]
    cells.append(("", say("roi.share.total"), "", f"{total / 100:.2f}"))
    return pd.DataFrame(cells, columns=[say("roi.kind"), say("roi.name"), say("roi.requests"), say("roi.usd_month")])


def _draw_roadmap(plan: Plan, roi: Roi, text: str) -> tuple[PhaseRow, ...]:
    """The phases if they are known for this plan and this fleet of today, and the button that simulates them."""
    st.subheader(say("roi.roadmap"), anchor=False)
    if roi.returns is None or roi.evidence is None:
        draw_empty(say("roi.no_returns"))
        return ()
    if st.button(say("roi.roadmap.make"), key="roadmap", icon=":material/route:"):
        found = with_progress(plan.scenario, lambda waiting: compute_roadmap(store(), plan, text, waiting))
        if found is not None:
            keep_phases(plan, roi.returns, found)
    known = known_phases(plan)
    if known is None:
        draw_empty(say("roi.roadmap.ask"))
        return ()
    if known.today not in (None, (roi.returns.today_topology, roi.returns.today_gpus)):
        draw_empty(say("roi.roadmap.old"))
        return ()
    phases = known.phases
    draw_chart(charts.phases(phases), charts.phases_words(phases), "roi_phases")
    for phase in phases:
        _draw_phase(phase)
    return phases


def _draw_phase(phase: PhaseRow) -> None:
    name = f"{phase.number}. {say(f'roi.phase.{phase.name.split()[0]}')}"
    with st.container(border=True):
        st.markdown(f"**{escaped(name)}**" + ("" if phase.is_worthwhile else f" · {say('roi.phase.skipped')}"))
        st.text(translated(phase.what))
        if not phase.is_worthwhile:
            return
        figures = [
            f"{say('roi.phase.cost')}: {usd(phase.cost_usd_per_month)}", f"p50 {seconds_words(phase.latency_p50_s)}",
            f"p95 {seconds_words(phase.latency_p95_s)}", f"{say('roi.phase.in_time')} {share_words(phase.slo_attainment_ratio)}",
        ]  # fmt: skip
        st.text(" · ".join(figures))
        lines = [
            (say("roi.phase.watch"), "; ".join(translated(one) for one in phase.watch)), (say("roi.phase.gate"), translated(phase.gate)), (say("roi.phase.back"), translated(phase.roll_back)),
            (say("roi.phase.test"), translated(words_of_test(phase)) if phase.topology is not None else ""),
        ]  # fmt: skip
        for title, words in lines:
            if words:
                st.caption(title)
                st.text(words)


def _draw_files(roi: Roi, phases: tuple[PhaseRow, ...], text: str) -> None:
    st.subheader(say("roi.files"), anchor=False)
    record = roi.plan.model_copy(update={"roadmap": phases}) if phases else roi.plan
    files = (
        ("roi.json", to_json(roi, phases), "application/json"),
        ("roi.md", markdown(roi, phases), "text/markdown"),
        ("assumptions.yaml", text, "application/yaml"),
        ("report.html", report_html(record, roi), "text/html"),
        ("report.ja.html", report_html(record, roi, "ja"), "text/html"),
    )
    with st.container(horizontal=True):
        for name, content, mime in files:
            st.download_button(
                escaped(name), content, name, mime, key=f"roi_{name}", on_click="ignore", icon=":material/download:"
            )
