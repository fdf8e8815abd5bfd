"""Draws a finished plan: the answer, its figures, the evidence, and the files to take away."""

from __future__ import annotations

from typing import Final

import pandas as pd
import streamlit as st

from calibrate.profile import GRADES
from dashboards import charts
from dashboards.plain_text import NONE, escaped, interval, percent, rounded, rounded_seconds
from dashboards.plan_job import Plan
from planner.explain import usd
from planner.plan_record import PlanRecord, TopologyRow
from planner.report import VERDICT_WORDS, count_words, money_words, seconds_words, share_words

MIMES: Final = {
    "plan.json": "application/json",
    "allocation.json": "application/json",
    "report.html": "text/html",
    "report.md": "text/markdown",
    "scenario.yaml": "application/yaml",
}
CHART: Final = {"displayModeBar": False, "scrollZoom": False}


def draw(plan: Plan) -> None:
    """The whole plan."""
    record = plan.record
    if record.recommended is not None:
        st.success(escaped(record.sentence), icon=":material/check_circle:")
        _draw_figures(record, record.row(record.recommended))
    else:
        _draw_infeasible(record)
    _draw_charts(record)
    st.subheader("Topologies side by side", anchor=False)
    st.table(_side_by_side(record), alt="Figures of each topology")
    if charts.drawn_rows(record):
        st.caption(
            f"Means of {record.n_replications} repetitions with {100 * record.confidence:g} % intervals. “Without add-ons” are requests that use "
            "neither a ControlNet nor a LoRA."
        )
    for row in record.topologies:
        if row.verdict != "meets_slo":
            st.text(f"{row.topology}: {row.why}")
    if record.recommended is not None:
        _draw_allocation(record, record.row(record.recommended))
    _draw_grades(record)
    _draw_background(record)
    draw_files(plan.files)


def _draw_figures(record: PlanRecord, row: TopologyRow) -> None:
    short, long = charts.promised_quantile(record.slo_attainment_ratio)
    latency, cost, share = charts.latency_of(row, short), row.cost_usd_per_1000_images, row.slo_attainment_ratio
    shares = share.model_copy(update={"low": _hundred(share.low), "high": _hundred(share.high)})
    figures = (
        (
            "GPUs",
            count_words(row.n_gpus),
            f"{rounded(row.mean_load_gpus)} busy on average",
            "Mean load of the bare work.",
        ),
        (
            "Cost a month",
            usd(row.cost_usd_per_month),
            None,
            f"{record.ids.hours_per_month:g} hours, idle GPUs included.",
        ),
        (
            "Per 1000 images",
            money_words(cost),
            interval(cost, "${:,.2f}"),
            "Total cost over images within the promise.",
        ),
        (f"{short} latency", rounded_seconds(latency), interval(latency, "{:.2f}"), f"{long}, waiting included."),
        ("Requests in time", percent(share.mean, 2), interval(shares, "{:.2f}"), "Share of all offered requests."),
    )
    for column, (label, value, below, words) in zip(st.columns(5), figures, strict=True):
        column.metric(label, _label(value), _label(below), delta_color="off", delta_arrow="off", help=words)


def _hundred(ratio: float | None) -> float | None:
    return None if ratio is None else 100 * ratio


def _label(text: str | None) -> str | None:
    """Metric values are Markdown, in which dollars would start a formula."""
    return None if text is None else text.replace("$", "\\$")


def _draw_infeasible(record: PlanRecord) -> None:
    st.error("No allocation keeps this promise.", icon=":material/block:")
    if record.infeasible is None:
        st.text(record.sentence)
        return
    found = record.infeasible
    for title, text in (("What binds", found.binds), ("Why", found.why), ("Nearest plan that would do", found.nearest)):
        st.markdown(f"**{title}**")
        st.text(text)
    if found.nearest_n_gpus is not None:
        columns = st.columns(2)
        columns[0].metric("GPUs of the nearest plan", count_words(found.nearest_n_gpus))
        columns[1].metric("Its cost a month", _label(usd(found.nearest_cost_usd_per_month)))


def _draw_charts(record: PlanRecord) -> None:
    if charts.drawn_rows(record):
        st.subheader("Cost against latency", anchor=False)
        words = charts.cost_against_latency_words(record)
        st.plotly_chart(charts.cost_against_latency(record), config=CHART, key="cost_against_latency", alt=words)
        st.caption(
            "Down and left is better. Bars are intervals; hollow points miss the promise; the large point is recommended."
        )
    if record.waterfall is None:
        return
    st.subheader("Where the saving comes from", anchor=False)
    missing = charts.unpriced_steps(record.waterfall)
    if len(record.waterfall.steps) - len(missing) < 2:
        st.text("Only the recommended topology keeps the promise: there is nothing to compare it with.")
        return
    words = charts.waterfall_words(record.waterfall)
    st.plotly_chart(charts.waterfall(record.waterfall), config=CHART, key="waterfall", alt=words)
    st.caption(
        "Each step is priced against the one before, so that what compiling and kernels save is not credited to decoupling."
    )
    if missing:
        st.text(f"No bar for {', '.join(topology for topology, _ in missing)}: the reasons are under the table.")


def _side_by_side(record: PlanRecord) -> pd.DataFrame:
    """One column a topology, one row a figure; cells are escaped because tables read Markdown."""

    def cells(row: TopologyRow) -> dict[str, str]:
        return {
            "Promise": f"**{VERDICT_WORDS[row.verdict]}**"
            if row.topology == record.recommended
            else VERDICT_WORDS[row.verdict],
            "GPUs": count_words(row.n_gpus),
            "GPUs busy on average": rounded(row.mean_load_gpus),
            "Cost a month": escaped(usd(row.cost_usd_per_month)),
            "Per 1000 images in time": escaped(money_words(row.cost_usd_per_1000_images)),
            "Requests in time": escaped(share_words(row.slo_attainment_ratio)),
            "p50 latency": escaped(seconds_words(row.latency_p50_s)),
            "p95 latency": escaped(seconds_words(row.latency_p95_s)),
            "p99 latency": escaped(seconds_words(row.latency_p99_s)),
            "p50 without add-ons": escaped(seconds_words(row.plain_latency_p50_s)),
            "p99 without add-ons": escaped(seconds_words(row.plain_latency_p99_s)),
            "Mean wait in queue": escaped(seconds_words(row.queue_wait_mean_s)),
            "Rejected": percent(row.rejected_ratio, 2),
        }

    columns = {escaped(row.topology): cells(row) for row in record.topologies}
    frame = pd.DataFrame(columns)
    return frame[(frame != NONE).any(axis=1)]  # a figure that nobody has says nothing


def _draw_allocation(record: PlanRecord, row: TopologyRow) -> None:
    st.subheader("Recommended allocation", anchor=False)
    shape = f", {row.shape}" if row.shape else ""
    st.text(f"{row.topology}{shape}")
    st.dataframe(
        pd.DataFrame({
            "Pool": [pool.name for pool in row.pools],
            "Role": [pool.role for pool in row.pools],
            "Replicas": [pool.n_replicas for pool in row.pools],
            "GPUs": [pool.n_gpus for pool in row.pools],
            "Hosts": ["any ControlNet" if "*" in pool.hosts else ", ".join(pool.hosts) or "no ControlNet" for pool in row.pools],
            "Busy": [_hundred(pool.busy_ratio) for pool in row.pools],
            "Loading": [_hundred(pool.loading_ratio) for pool in row.pools],
        }),
        hide_index=True,
        column_config={
            "Busy": st.column_config.ProgressColumn("Busy", format="%.0f %%", min_value=0, max_value=100, help="Busy of allocated time."),
            "Loading": st.column_config.NumberColumn("Loading", format="%.1f %%", help="Time in which it loads models."),
        },
        alt="Pools of the recommended allocation",
    )  # fmt: skip
    for title, text in (("Limited by", record.limited_by), ("Runner-up", record.runner_up)):
        if text:
            st.text(f"{title}: {text}")


def _draw_grades(record: PlanRecord) -> None:
    st.subheader("How well the numbers are known", anchor=False)
    st.table(grade_counts(record), alt="Latency laws by grade, each topology")
    assumed = sorted({law for row in record.topologies for law, grade in row.grades.items() if grade == "assumed"})
    outside = sorted({law for row in record.topologies for law, grade in row.grades.items() if grade == "extrapolated"})
    if outside:
        st.warning(f"Predicted outside the measured box: {escaped(', '.join(outside))}.")
    if assumed:
        with st.expander(f"{len(assumed)} assumed latency laws"):
            st.text("\n".join(assumed))


def grade_counts(record: PlanRecord) -> pd.DataFrame:
    """Latency laws behind each topology, counted by grade."""
    counts = {
        escaped(row.topology): {grade: list(row.grades.values()).count(grade) for grade in GRADES}
        for row in record.topologies
    }
    return pd.DataFrame(counts)


def _draw_background(record: PlanRecord) -> None:
    if record.notes:
        st.subheader("What the numbers leave out", anchor=False)
        st.text("\n".join(f"• {note}" for note in record.notes))
    with st.expander("Traffic"):
        traffic = record.traffic
        rows = {
            "Requests": (f"{traffic.n_requests_before:,}", f"{traffic.n_requests:,}"),
            "Mean rate": (rounded(traffic.mean_per_s_before, "per s"), rounded(traffic.mean_per_s, "per s")),
            "Variation of gaps (CV)": (rounded(traffic.interarrival_cv_before), rounded(traffic.interarrival_cv)),
            "Peak to mean": (rounded(traffic.peak_to_mean_before), rounded(traffic.peak_to_mean)),
        }
        st.table(pd.DataFrame(rows, index=["as recorded", "as planned for"]).T, alt="Traffic before and after scaling")
        st.text(
            f"{traffic.source}; times {traffic.scale_factor:g} ({traffic.shift_law}); {rounded(traffic.duration_s / 3600, 'h')}"
        )
        if traffic.notes:
            st.text("\n".join(f"• {note}" for note in traffic.notes))
    with st.expander("Close alternatives and what reproduces this plan"):
        if record.alternatives:
            st.dataframe(
                pd.DataFrame({
                    "Topology": [one.topology for one in record.alternatives],
                    "Pools": [", ".join(f"{n} {name}" for name, n in one.pools.items()) for one in record.alternatives],
                    "GPUs": [one.n_gpus for one in record.alternatives],
                    "USD a month": [one.cost_usd_per_month for one in record.alternatives],
                    "In time (%), one run": [round(100 * one.slo_attainment_ratio, 2) for one in record.alternatives],
                }),
                hide_index=True,
                alt="Allocations of nearly the same cost",
            )  # fmt: skip
        st.text("\n".join(f"{name}: {value}" for name, value in record.ids.model_dump().items() if value != ""))


def draw_files(files: dict[str, bytes]) -> None:
    """One button a file."""
    st.subheader("Files", anchor=False)
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
