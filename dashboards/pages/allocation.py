"""The page Allocation: the recommended fleet as a map of GPUs, and what each pool hosts."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Final

import pandas as pd
import streamlit as st

from dashboards import link
from dashboards.allocation_charts import HOSTS_MAX, gpu_map, gpu_map_words
from dashboards.decision_blocks import draw_blocks
from dashboards.elements import draw_chart, draw_empty, draw_grades, draw_table
from dashboards.gpu_layout import Layout, layout_of
from dashboards.here import Here
from dashboards.plain_text import escaped, percent
from dashboards.plan_folder import plan_digest, records_of
from dashboards.plan_job import Plan
from dashboards.planning import ask_plan
from dashboards.words import problem_words, say, translated
from engine.allocation import ANY, Allocation, Policies, allocation_from_plain, to_json
from planner.explain import usd
from planner.report_choices import checkpoint_blocks, settings_blocks
from planner.report_words import share_words
from planner.run_series import WorkerLoad, worker_loads

PER_HOST: Final = "al_per_host"
PER_HOST_MAX: Final = 72


def draw(here: Here) -> None:
    """The whole page below the frame."""
    plan = ask_plan(here)
    if plan is None:
        return
    allocation = _allocation(plan)
    if allocation is None:
        draw_empty(say("allocation.none"))
        if "plan" in here.pages:
            st.page_link(here.pages["plan"])
        return
    is_recommended = plan.record.recommended is not None
    if not is_recommended and plan.record.infeasible is not None:
        st.warning(
            say("allocation.nearest", words=escaped(translated(plan.record.infeasible.nearest))),
            icon=":material/block:",
        )
    loads = _loads(plan_digest(plan), plan) if is_recommended else {}
    if plan.record.recommended is not None:
        draw_grades(plan.record.row(plan.record.recommended).grades.values(), say("roi.grades"))
    _draw_map(plan, allocation, loads)
    _draw_pools(plan, allocation)
    _draw_add_ons(plan)
    _draw_autoscaling(plan)
    draw_blocks(checkpoint_blocks(plan.record.checkpoints), "checkpoints")
    draw_blocks(settings_blocks(plan.record.settings), "settings")


def _allocation(plan: Plan) -> Allocation | None:
    record = plan.record
    plain = (
        record.allocation
        if record.allocation is not None
        else record.infeasible and record.infeasible.nearest_allocation
    )
    return None if plain is None else allocation_from_plain(plain, "allocation")


@st.cache_data(max_entries=8, show_spinner=False)
def _loads(digest: str, _plan: Plan) -> dict[str, WorkerLoad]:
    """Worker to load; empty if the plan keeps no records."""
    tables = records_of(_plan)
    if tables is None:
        return {}
    requests, workers = tables
    return worker_loads(workers, float(max(requests["end_s"].max(), requests["arrival_s"].max())))


def _ask_per_host() -> int:
    if PER_HOST not in st.session_state:
        st.session_state[PER_HOST] = int(link.number("host", 1, PER_HOST_MAX) or 8)
    n = st.number_input(
        say("allocation.gpus_per_host"), 1, PER_HOST_MAX, key=PER_HOST, help=say("allocation.gpus_per_host.help"), persist_state="session"
    )  # fmt: skip
    link.put(host=float(n))
    return int(n)


def _draw_map(plan: Plan, allocation: Allocation, loads: dict[str, WorkerLoad]) -> None:
    columns = st.columns(4)
    with columns[0]:
        per_host = _ask_per_host()
    layout = layout_of(allocation, per_host, loads)
    gpus = [gpu for host in layout.hosts for gpu in host]
    known = [gpu.busy_ratio for gpu in gpus if gpu.busy_ratio is not None]
    columns[1].metric(say("allocation.gpus"), len(gpus))
    columns[2].metric(say("allocation.hosts"), len(layout.hosts))
    columns[3].metric(say("allocation.unused"), layout.n_unused, help=say("allocation.unused.help"))
    st.subheader(say("allocation.map"), anchor=False)
    if layout.not_cut:
        st.warning(say("allocation.not_cut"))
        st.text(problem_words(layout.not_cut))
    if known:
        st.caption(f"{say('allocation.legend')} {say('allocation.mean_busy')}: {percent(sum(known) / len(known))}")
    elif plan.record.recommended is not None:
        st.caption(say("allocation.not_recorded"))
    draw_chart(gpu_map(layout), gpu_map_words(layout), "allocation_map")
    if len(layout.hosts) > HOSTS_MAX:
        st.caption(say("allocation.more", n=len(layout.hosts) - HOSTS_MAX))
    _draw_gpu_table(layout)


def _draw_gpu_table(layout: Layout) -> None:
    rows = [
        {
            say("allocation.hosts"): index, "GPU": column, say("allocation.pool"): gpu.pool, say("allocation.role"): say(f"role.{gpu.role}") if gpu.role else "",
            "Worker": ", ".join(gpu.workers), say("allocation.busy_percent"): _hundred(gpu.busy_ratio),
            say("allocation.loading_percent"): _hundred(gpu.loading_ratio),
        }
        for index, host in enumerate(layout.hosts, start=1)
        for column, gpu in enumerate(host)
    ]  # fmt: skip
    with st.expander(say("allocation.gpus")):
        draw_table(pd.DataFrame(rows), say("allocation.map"), "gpus.csv", is_wide=True)


def _draw_pools(plan: Plan, allocation: Allocation) -> None:
    st.subheader(say("allocation.pools"), anchor=False)
    recommended = plan.record.recommended
    seen = {pool.name: pool for pool in plan.record.row(recommended).pools} if recommended is not None else {}

    def hosted(names: tuple[str, ...], none: str) -> str:
        named = [name for name in names if name != ANY]
        return ", ".join([*named, *([say("allocation.any")] if ANY in names else [])]) or none

    rows: list[dict[str, Any]] = []
    for pool in allocation.pools:
        row = seen.get(pool.name)
        rows.append(
            {
                say("allocation.pool"): pool.name, say("allocation.role"): say(f"role.{pool.role}"), say("allocation.replicas"): pool.n_replicas,
                say("allocation.gpus"): pool.n_gpus, say("allocation.busy_percent"): _hundred(row.busy_ratio) if row else None,
                say("allocation.loading_percent"): _hundred(row.loading_ratio) if row else None,
                say("allocation.checkpoints"): hosted(pool.base_model_ids, "–") if pool.role == "base" else "–",
                say("allocation.controlnets"): hosted(pool.controlnet_ids, say("allocation.no_controlnet")),
            }
        )  # fmt: skip
    draw_table(pd.DataFrame(rows), say("allocation.pools.alt"), "pools.csv", is_wide=True)
    with st.expander(say("allocation.policies")):
        plain, usual = dataclasses.asdict(allocation.policies), dataclasses.asdict(Policies())
        changed = {name: value for name, value in plain.items() if value != usual[name]}
        links = [f"{one.base_pool} → {one.controlnet_pool}: {one.kind}" for one in allocation.links]
        st.text(
            "\n".join(
                [
                    *links,
                    *(f"{name}: {json.dumps(value)}" for name, value in changed.items()),
                    say("allocation.default"),
                ]
            )
        )
    st.download_button(
        say("allocation.file"), to_json(allocation), "allocation.json", "application/json", key="file_allocation", on_click="ignore",
        icon=":material/download:",
    )  # fmt: skip


def _draw_add_ons(plan: Plan) -> None:
    found = plan.record.add_ons
    if found is None or not found.rows:
        return
    st.subheader(say("allocation.add_ons"), anchor=False)
    rows = [
        {
            say("allocation.add_on"): row.add_on_id, say("allocation.kind"): row.kind,
            say("allocation.placement"): say(f"placement.{row.placement.replace(' ', '_')}"),
            say("allocation.use_percent"): round(100 * row.use_ratio, 1), say("allocation.gpu_hours"): round(row.gpu_hours_per_month, 1),
            say("allocation.usd_month"): round(row.cost_usd_per_month, 2), say("allocation.adds"): round(row.latency_added_s, 2),
            say("allocation.why"): translated(row.why),
        }
        for row in found.rows
    ]  # fmt: skip
    draw_table(pd.DataFrame(rows), say("allocation.add_ons.alt"), "add_ons.csv", is_wide=True)
    with st.expander(say("allocation.why")):  # sentences, which the table cuts
        st.text("\n".join(f"• {row.add_on_id}: {translated(row.why)}" for row in found.rows))
    st.text(
        say(
            "allocation.others", n=found.n_others, cost=usd(found.others_cost_usd_per_month), controlnets=found.n_controlnets_on_demand,
            loras=found.n_loras_on_demand,
        )
    )  # fmt: skip


def _draw_autoscaling(plan: Plan) -> None:
    found = plan.record.autoscaling
    if found is None:
        return
    st.subheader(say("allocation.autoscaling"), anchor=False)
    st.text(translated(found.why))
    if not found.tried:
        return
    fixed = {
        say("allocation.setting"): say("allocation.fixed"), say("allocation.replicas"): "", say("allocation.gpu_hours"): round(found.fixed_gpu_hours_per_month),
        say("allocation.usd_month"): round(found.fixed_cost_usd_per_month), say("plan.in_time"): "", say("plan.promise"): say("verdict.meets_slo"),
    }  # fmt: skip
    tried = [
        {
            say("allocation.setting"): f"{row.kind}, {row.target:g}", say("allocation.replicas"): f"{row.min_replicas}–{row.max_replicas}",
            say("allocation.gpu_hours"): None if row.gpu_hours_per_month is None else round(row.gpu_hours_per_month),
            say("allocation.usd_month"): None if row.cost_usd_per_month is None else round(row.cost_usd_per_month),
            say("plan.in_time"): share_words(row.slo_attainment_ratio),
            say("plan.promise"): say("verdict.meets_slo") if row.keeps_promise else say("verdict.misses_slo"),
        }
        for row in found.tried
    ]  # fmt: skip
    draw_table(pd.DataFrame([fixed, *tried]), say("allocation.autoscaling"), "autoscaling.csv", is_wide=True)
    st.caption(say("allocation.start", seconds=f"{found.start_s:g}"))


def _hundred(ratio: float | None) -> float | None:
    return None if ratio is None else round(100 * ratio, 1)
