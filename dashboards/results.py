"""Draws a finished plan: the answer, its figures, the evidence, and the files to take away.

Sentences that the planner wrote into the plan are English there; :func:`dashboards.words.translated` says them in the page's language.
"""

from __future__ import annotations

from typing import Final

import pandas as pd
import streamlit as st

from calibrate.profile import GRADES
from dashboards import charts
from dashboards.decision_blocks import draw_blocks
from dashboards.elements import draw_chart, draw_csv, draw_grades
from dashboards.plain_text import NONE, breakable, escaped, interval, percent, rounded, rounded_seconds, unbroken
from dashboards.plan_job import Plan
from dashboards.words import say, translated
from planner.explain import usd
from planner.plan_record import PlanRecord, TopologyRow
from planner.report import count_words, money_words, seconds_words, share_words
from planner.report_blocks import Grid, Heading
from planner.report_choices import kind_blocks
from planner.report_risks import risks
from planner.report_words import PROFILE_NOTE, at_least_words

MIMES: Final = {
    "plan.json": "application/json",
    "allocation.json": "application/json",
    "report.html": "text/html",
    "report.md": "text/markdown",
    "report.ja.html": "text/html",
    "report.ja.md": "text/markdown",
    "scenario.yaml": "application/yaml",
}
"""Files that are offered beside the plan; the records of its run are on the page Export."""


def draw(plan: Plan) -> None:
    """The whole plan."""
    record = plan.record
    if record.recommended is not None:
        _draw_answer(record, record.row(record.recommended))
    else:
        _draw_infeasible(record)
    _draw_charts(record)
    st.subheader(say("plan.side_by_side"), anchor=False)
    table = _side_by_side(record)
    st.table(table, alt=say("plan.side_by_side.alt"))
    draw_csv(_plain(table), "topologies.csv")
    if charts.drawn_rows(record):
        st.caption(say("plan.side_by_side.note", n=record.n_replications, confidence=f"{100 * record.confidence:g}"))
    for why, names in reasons(record).items():
        st.text(f"{', '.join(names)}: {translated(why)}")
    if record.recommended is not None:
        _draw_allocation(record, record.row(record.recommended))
    draw_blocks(kind_blocks(record.kinds), "kinds")
    _draw_sureness(record)
    _draw_risks(record)
    _draw_grades(record)
    _draw_background(record)
    draw_files(plan.files)


def reasons(record: PlanRecord) -> dict[str, list[str]]:
    """Why topologies do not keep the promise, each reason once, with those that it holds for."""
    found: dict[str, list[str]] = {}
    for row in record.topologies:
        if row.verdict != "meets_slo":
            found.setdefault(row.why, []).append(row.topology)
    return found


def _draw_answer(record: PlanRecord, row: TopologyRow) -> None:
    st.success(escaped(translated(record.sentence)), icon=":material/check_circle:")
    _draw_figures(record, row)
    draw_grades(row.grades.values(), say("plan.these_figures"))


def _draw_figures(record: PlanRecord, row: TopologyRow) -> None:
    short, _ = charts.promised_quantile(record.slo_attainment_ratio)
    latency, cost, share = charts.latency_of(row, short), row.cost_usd_per_1000_images, row.slo_attainment_ratio
    shares = share.model_copy(update={"low": _hundred(share.low), "high": _hundred(share.high)})
    figures = (
        (
            say("plan.gpus"),
            count_words(row.n_gpus),
            say("plan.busy_gpus", n=rounded(row.mean_load_gpus)),
            say("plan.gpus.help"),
        ),
        (
            say("plan.cost"),
            usd(row.cost_usd_per_month),
            None,
            say("plan.cost.help", hours=f"{record.ids.hours_per_month:g}"),
        ),
        (say("plan.per_1000"), money_words(cost), interval(cost, "${:,.2f}"), say("plan.per_1000.help")),
        (
            say("plan.latency", quantile=short),
            rounded_seconds(latency),
            interval(latency, "{:.2f}"),
            say("plan.latency.help", quantile=say(f"quantile.{short}")),
        ),
        (say("plan.in_time"), percent(share.mean, 2), interval(shares, "{:.2f}"), say("plan.in_time.help")),
    )
    for column, (label, value, below, words) in zip(st.columns(5), figures, strict=True):
        column.metric(label, _label(value), _label(below), delta_color="off", delta_arrow="off", help=words)


def _hundred(ratio: float | None) -> float | None:
    return None if ratio is None else 100 * ratio


def _label(text: str | None) -> str | None:
    """Metric values are Markdown, in which dollars would start a formula."""
    return None if text is None else text.replace("$", "\\$")


def _draw_infeasible(record: PlanRecord) -> None:
    st.error(say("plan.infeasible"), icon=":material/block:")
    if record.infeasible is None:
        st.text(translated(record.sentence))
        return
    found = record.infeasible
    for key, text in (("plan.binds", found.binds), ("plan.why", found.why), ("plan.nearest", found.nearest)):
        st.markdown(f"**{say(key)}**")
        st.text(translated(text))
    if found.nearest_n_gpus is not None:
        columns = st.columns(2)
        columns[0].metric(say("plan.nearest_gpus"), count_words(found.nearest_n_gpus))
        columns[1].metric(say("plan.nearest_cost"), _label(usd(found.nearest_cost_usd_per_month)))


def _draw_charts(record: PlanRecord) -> None:
    if charts.drawn_rows(record):
        st.subheader(say("plan.cost_against_latency"), anchor=False)
        words = charts.cost_against_latency_words(record)
        draw_chart(charts.cost_against_latency(record), words, "cost_against_latency")
        st.caption(say("plan.cost_against_latency.note"))
    if record.waterfall is None:
        return
    st.subheader(say("plan.waterfall"), anchor=False)
    missing = charts.unpriced_steps(record.waterfall)
    if len(record.waterfall.steps) - len(missing) < 2:
        st.text(say("plan.waterfall.alone"))
        return
    draw_chart(charts.waterfall(record.waterfall), charts.waterfall_words(record.waterfall), "waterfall")
    st.caption(say("plan.waterfall.note"))
    if missing:
        st.text(say("plan.waterfall.missing", names=", ".join(topology for topology, _ in missing)))


def _side_by_side(record: PlanRecord) -> pd.DataFrame:
    """One column a topology, one row a figure; cells are escaped because tables read Markdown."""

    def cells(row: TopologyRow) -> dict[str, str]:
        verdict = say(f"verdict.{row.verdict}")
        return {
            say("plan.promise"): f"**{verdict}**" if row.topology == record.recommended else verdict,
            say("plan.gpus"): count_words(row.n_gpus),
            say("plan.gpus_busy"): rounded(row.mean_load_gpus),
            say("plan.cost"): escaped(usd(row.cost_usd_per_month)),
            say("plan.per_1000_in_time"): escaped(money_words(row.cost_usd_per_1000_images)),
            say("plan.in_time"): escaped(share_words(row.slo_attainment_ratio)),
            say("plan.latency", quantile="p50"): escaped(seconds_words(row.latency_p50_s)),
            say("plan.latency", quantile="p95"): escaped(seconds_words(row.latency_p95_s)),
            say("plan.latency", quantile="p99"): escaped(seconds_words(row.latency_p99_s)),
            say("plan.without_add_ons", quantile="p50"): escaped(seconds_words(row.plain_latency_p50_s)),
            say("plan.without_add_ons", quantile="p99"): escaped(seconds_words(row.plain_latency_p99_s)),
            say("plan.mean_wait"): escaped(seconds_words(row.queue_wait_mean_s)),
            say("plan.rejected"): percent(row.rejected_ratio, 2),
        }

    columns = {escaped(row.topology): cells(row) for row in record.topologies}
    frame = pd.DataFrame(columns)
    frame.index = [unbroken(name) for name in frame.index]
    return frame[(frame != NONE).any(axis=1)]  # a figure that nobody has says nothing


def _plain(frame: pd.DataFrame) -> pd.DataFrame:
    """The table without Markdown, its figures' names as a column."""
    plain = frame.map(lambda cell: str(cell).replace("\\", "").strip("*"))
    plain.columns = [name.replace("\\", "") for name in frame.columns]
    plain.index = [breakable(name) for name in frame.index]
    plain.index.name = say("plan.figure")
    return plain


def _draw_allocation(record: PlanRecord, row: TopologyRow) -> None:
    st.subheader(say("plan.allocation"), anchor=False)
    shape = f", {translated(row.shape)}" if row.shape else ""
    st.text(f"{row.topology}{shape}")
    busy, loading = say("plan.busy"), say("plan.loading")
    st.dataframe(
        pd.DataFrame({
            say("plan.pool"): [pool.name for pool in row.pools],
            say("plan.role"): [say(f"role.{pool.role}") for pool in row.pools],
            say("plan.replicas"): [pool.n_replicas for pool in row.pools],
            say("plan.gpus"): [pool.n_gpus for pool in row.pools],
            say("plan.hosts"): [
                say("plan.any_controlnet") if "*" in pool.hosts else ", ".join(pool.hosts) or say("plan.no_controlnet") for pool in row.pools
            ],
            busy: [_hundred(pool.busy_ratio) for pool in row.pools],
            loading: [_hundred(pool.loading_ratio) for pool in row.pools],
        }),
        hide_index=True,
        column_config={
            busy: st.column_config.ProgressColumn(busy, format="%.0f %%", min_value=0, max_value=100, help=say("plan.busy.help")),
            loading: st.column_config.NumberColumn(loading, format="%.1f %%", help=say("plan.loading.help")),
        },
        alt=say("plan.allocation"),
    )  # fmt: skip
    for key, text in (("plan.limited_by", record.limited_by), ("plan.runner_up", record.runner_up)):
        if text:
            st.text(f"{say(key)}: {translated(text)}")


def _draw_sureness(record: PlanRecord) -> None:
    """How sure the choice is, and what would change it."""
    chosen = record.selection
    if chosen is None and not record.flip_points:
        return
    st.subheader(say("plan.sureness"), anchor=False)
    if chosen is not None:
        st.text(say("plan.selection", share=translated(at_least_words(chosen.probability_of_correct_selection))))
        if chosen.checked_by:
            st.caption(escaped(translated(chosen.checked_by)))
    if record.flip_points:
        frame = pd.DataFrame({
            say("plan.flip.what"): [escaped(translated(point.what)) for point in record.flip_points],
            say("plan.flip.until"): [
                f"× {point.winner_until:.3g}" if point.winner_until is not None
                else say("plan.flip.never", low=f"{point.looked_from:g}", high=f"{point.looked_to:g}")
                for point in record.flip_points
            ],
            say("plan.flip.then"): [escaped(point.then or NONE) for point in record.flip_points],
        })  # fmt: skip
        st.table(frame, hide_index=True, alt=say("plan.flip.alt"))


def _draw_risks(record: PlanRecord) -> None:
    """What could make the plan wrong, each with what shows it and what to do."""
    found = risks(record, None)
    if found:
        rows = tuple((risk.what, risk.shown_by, risk.do) for risk in found)
        draw_blocks((Heading("Risks"), Grid(("risk", "shown by", "do"), rows)), "risks", is_long=True)


def _draw_grades(record: PlanRecord) -> None:
    st.subheader(say("plan.grades"), anchor=False)
    st.table(grade_counts(record), alt=say("plan.grades.alt"))
    assumed = sorted({law for row in record.topologies for law, grade in row.grades.items() if grade == "assumed"})
    outside = sorted({law for row in record.topologies for law, grade in row.grades.items() if grade == "extrapolated"})
    if outside:
        st.warning(escaped(say("plan.outside", laws=", ".join(outside))))
    if assumed:
        with st.expander(say("plan.assumed", n=len(assumed))):
            st.text("\n".join(assumed))


def grade_counts(record: PlanRecord) -> pd.DataFrame:
    """Latency laws behind each topology, counted by grade."""
    counts = {
        escaped(row.topology): {
            unbroken(say(f"grade.{grade}")): list(row.grades.values()).count(grade) for grade in GRADES
        }
        for row in record.topologies
    }
    return pd.DataFrame(counts)


def _draw_background(record: PlanRecord) -> None:
    if record.notes:
        st.subheader(say("plan.left_out"), anchor=False)
        own = [note for note in record.notes if not note.startswith(PROFILE_NOTE)]
        st.text("\n".join(f"• {translated(note)}" for note in own))
        others = [note.removeprefix(PROFILE_NOTE) for note in record.notes if note.startswith(PROFILE_NOTE)]
        if others:
            with st.expander(say("plan.left_out.profile", n=len(others))):
                st.text("\n".join(f"• {translated(note)}" for note in others))
    with st.expander(say("plan.traffic")):
        traffic = record.traffic
        rows = {
            say("plan.requests"): (f"{traffic.n_requests_before:,}", f"{traffic.n_requests:,}"),
            say("plan.mean_rate"): (rounded(traffic.mean_per_s_before), rounded(traffic.mean_per_s)),
            say("plan.cv"): (rounded(traffic.interarrival_cv_before), rounded(traffic.interarrival_cv)),
            say("plan.peak"): (rounded(traffic.peak_to_mean_before), rounded(traffic.peak_to_mean)),
        }
        index = [say("plan.as_recorded"), say("plan.as_planned")]
        st.table(pd.DataFrame(rows, index=index).T, alt=say("plan.traffic"))
        st.text(
            f"{translated(traffic.source)}; × {traffic.scale_factor:g} ({traffic.shift_law}); {rounded(traffic.duration_s / 3600, 'h')}"
        )
        if traffic.notes:
            st.text("\n".join(f"• {translated(note)}" for note in traffic.notes))
    with st.expander(say("plan.alternatives")):
        if record.alternatives:
            st.dataframe(
                pd.DataFrame({
                    say("plan.topology"): [one.topology for one in record.alternatives],
                    say("plan.pools"): [", ".join(f"{n} {name}" for name, n in one.pools.items()) for one in record.alternatives],
                    say("plan.gpus"): [one.n_gpus for one in record.alternatives],
                    say("plan.cost"): [one.cost_usd_per_month for one in record.alternatives],
                    say("plan.in_time_one_run"): [round(100 * one.slo_attainment_ratio, 2) for one in record.alternatives],
                }),
                hide_index=True,
                alt=say("plan.alternatives"),
            )  # fmt: skip
        st.text(
            "\n".join(
                f"{name}: {translated(str(value))}" for name, value in record.ids.model_dump().items() if value != ""
            )
        )


def draw_files(files: dict[str, bytes]) -> None:
    """One button a file."""
    st.subheader(say("plan.files"), anchor=False)
    with st.container(horizontal=True):
        for name, mime in MIMES.items():
            if name in files:
                st.download_button(
                    escaped(name),
                    files[name],
                    name,
                    mime,
                    key=f"file_{name}",
                    on_click="ignore",
                    icon=":material/download:",
                )
