"""``roi.json`` and ``roi.md``: every figure with where it comes from; the same plan and assumptions give the same bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final

from planner.explain import usd
from planner.money.assumptions import stated
from planner.money.roi import Roi
from planner.money.shares import Share
from planner.plan_record import PhaseRow
from planner.report import seconds_words, share_words
from planner.sentences import chance_words, decision

SCHEMA_VERSION: Final = 1
FACTOR_WORDS: Final = {
    "traffic": "traffic",
    "gpu_price": "GPU price",
    "operation": "operating cost per service",
    "migration": "migration effort",
    "gpu_time_today": "GPU time of today's topology (calibration error)",
    "gpu_time_new": "GPU time of the recommendation (calibration error)",
}


def to_plain(roi: Roi, roadmap: Sequence[PhaseRow]) -> dict[str, Any]:
    """Everything, JSON-ready."""
    said = decision(roi)
    return {
        "schema_version": SCHEMA_VERSION,
        "decision": {"en": said.english, "ja": said.japanese},
        "plan": roi.plan.ids.model_dump(mode="json"),
        "price_usd_per_gpu_hour": roi.price_usd_per_gpu_hour,
        "model_traffic": asdict(roi.models) if roi.models is not None else None,
        "waterfall": [
            {**asdict(row), "cost_usd_per_month": row.cost.total_usd, "value_usd_per_month": row.value.total_usd if row.value else None}
            for row in roi.waterfall
        ],
        "returns": asdict(roi.returns) if roi.returns is not None else None,
        "gpu_time_ranges": {name: asdict(found) for name, found in roi.load_ranges},
        "buying": {words: asdict(found) for words, found in roi.bought},
        "attribution": asdict(roi.shares) if roi.shares is not None else None,
        "roadmap": [phase.model_dump(mode="json") for phase in roadmap],
        "assumptions": stated(roi.assumptions),
        "notes": list(roi.notes),
    }  # fmt: skip


def to_json(roi: Roi, roadmap: Sequence[PhaseRow]) -> str:
    """``roi.json``."""
    return json.dumps(to_plain(roi, roadmap), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def markdown(roi: Roi, roadmap: Sequence[PhaseRow]) -> str:
    """``roi.md``."""
    said = decision(roi)
    lines = [f"# Return on {_cell(roi.plan.ids.scenario_name)}", "", f"**{_cell(said.english)}**", "", f"**{_cell(said.japanese)}**", ""]  # fmt: skip
    lines += [*_waterfall(roi), *_returns(roi), *_buying(roi), *_attribution(roi)]
    lines += [*_roadmap(roadmap), *_playbook(roi, roadmap), *_assumptions(roi)]
    return "\n".join(lines).rstrip("\n") + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    made = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    return [*made, *(f"| {' | '.join(_cell(cell) for cell in row)} |" for row in rows), ""]


def _cell(text: object) -> str:
    plain = " ".join(str(text).split())
    return plain.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "ˋ")


def _waterfall(roi: Roi) -> list[str]:
    rows = [
        (
            f"{row.topology}{' (recommended)' if row.is_recommended else ''}", row.n_gpus, usd(row.cost.gpu_usd),
            usd(row.cost.unused_host_gpu_usd), usd(row.cost.storage_usd + row.cost.egress_usd), usd(row.cost.operation_usd),
            usd(row.cost.total_usd), usd(row.saving_usd_per_month), usd(row.value.total_usd) if row.value else "off",
        )
        for row in roi.waterfall
    ]  # fmt: skip
    header = (
        "topology",
        "GPUs",
        "GPU time",
        "unused GPUs of hosts",
        "storage, egress",
        "operation",
        "a month",
        "saving",
        "value",
    )
    return ["## Where the saving comes from", "", "Each row against the one before it: what kernels earn is not credited to decoupling.", "", *_table(header, rows)]  # fmt: skip


def _returns(roi: Roi) -> list[str]:
    found = roi.returns
    if found is None:
        return []
    spread, horizon = found.spread, roi.assumptions.horizon
    months = "not within the horizon" if found.payback_months is None else f"{found.payback_months:.1f} months"
    even = (
        "none"
        if found.break_even_traffic_ratio is None
        else f"×{found.break_even_traffic_ratio:.3g} of the traffic planned for"
    )
    facts = [
        ("today", f"{found.today_gpus} GPUs of {found.today_topology}, {usd(found.today_cost.total_usd)} a month"),
        ("saving a month", f"{usd(found.saving_usd_per_month)} (90 % of the draws: {usd(spread.saving_p05_usd_per_month)} to {usd(spread.saving_p95_usd_per_month)})"),
        ("one-time cost", usd(found.investment_usd)),
        ("payback", months),
        (f"net present value, {horizon.n_months} months at {horizon.discount_ratio_per_year:.0%} a year", f"{usd(found.npv_usd)} (90 % of the draws: {usd(spread.npv_p05_usd)} to {usd(spread.npv_p95_usd)})"),
        ("draws with a positive net present value", f"{chance_words(spread.probability_npv_positive)[0]} of {spread.n_draws:,}"),
        ("break-even traffic", even),
    ]  # fmt: skip
    swings = [
        (FACTOR_WORDS[s.factor], f"×{s.low:.3g} … ×{s.high:.3g}", usd(s.npv_at_low_usd), usd(s.npv_at_high_usd))
        for s in found.tornado
    ]
    return [
        "## The change as an investment", "", *_table(("", ""), facts),
        "What moves it, one input at a time:", "", *_table(("input", "from … to", "net present value at the first", "at the last"), swings),
    ]  # fmt: skip


def _buying(roi: Roi) -> list[str]:
    if not roi.bought:
        return []
    rows = [
        (
            words, b.n_gpus, usd(b.invested_usd), usd(b.rent_avoided_usd_per_month), usd(b.npv_usd),
            "not within their life" if b.payback_months is None else f"{b.payback_months:.1f} months",
            f"{b.break_even_hours_per_month:.0f} h a month",
        )
        for words, b in roi.bought
    ]  # fmt: skip
    header = (
        "bought",
        "GPUs",
        "invested",
        "rent avoided a month",
        "net present value",
        "payback",
        "cheaper than renting above",
    )
    return ["## Buying instead of renting", "", *_table(header, rows)]


def _attribution(roi: Roi) -> list[str]:
    if roi.shares is None:
        return []
    lines = ["## Who the cost is for", "", f"A month of the recommendation, {roi.shares.total_cents / 100:,.2f} USD, divided by GPU time; each table sums to it.", ""]  # fmt: skip

    def cells(rows: Sequence[Share]) -> list[tuple[object, ...]]:
        return [
            (row.kind, row.name, "–" if row.n_requests is None else row.n_requests, f"{row.cost_cents / 100:,.2f}")
            for row in rows
        ]

    for words, rows in (
        ("add-on", roi.shares.add_ons),
        ("checkpoint", roi.shares.checkpoints),
        ("tenant", roi.shares.tenants),
    ):
        lines += _table((words, "name", "requests", "USD a month"), cells(rows))
    return lines


def _roadmap(roadmap: Sequence[PhaseRow]) -> list[str]:
    if not roadmap:
        return []
    rows = [
        (
            phase.number, phase.name, "yes" if phase.is_worthwhile else "no", phase.n_gpus_today, phase.n_gpus_new,
            usd(phase.cost_usd_per_month), seconds_words(phase.latency_p50_s), seconds_words(phase.latency_p95_s), share_words(phase.slo_attainment_ratio),
        )
        for phase in roadmap
    ]  # fmt: skip
    header = ("phase", "name", "worthwhile", "GPUs as today", "new GPUs", "GPUs a month", "p50", "p95", "in time")
    lines = ["## Roadmap", "", *_table(header, rows)]
    for phase in roadmap:
        lines += [f"### {phase.number}. {phase.name.capitalize()}", "", _cell(phase.what), ""]
        if phase.is_worthwhile:
            lines += [f"- watch: {_cell('; '.join(phase.watch))}", f"- go on when: {_cell(phase.gate)}", f"- roll back when: {_cell(phase.roll_back)}"]  # fmt: skip
            lines += [f"- test: {_cell(words_of_test(phase))}", ""] if phase.topology else [""]
    return lines


def words_of_test(phase: PhaseRow) -> str:
    """The smallest test of a phase, in a sentence."""
    test = phase.test
    if test is None:
        return "no test of 14 days or less would show the promised difference"
    promised = (
        f"{test.promised_difference:+.2f} s in the mean latency"
        if test.figure == "mean latency"
        else f"no more than {-test.promised_difference:.1%} fewer requests in time"
    )
    return (
        f"{test.share_ratio:.0%} of the traffic for {test.duration_h:.1f} h ({test.n_requests_new} requests on the new fleet, "
        f"{test.n_requests_old} on the old) shows {promised} with {test.power:.0%} power at {test.significance:.0%} significance (design "
        f"effect {test.design_effect:.0f}); let it run for whole days all the same, so that every hour of the day is in it"
    )  # fmt: skip


def _playbook(roi: Roi, roadmap: Sequence[PhaseRow]) -> list[str]:
    """What docs/playbook.md asks, with this plan's answers."""
    plan = roi.plan
    by_name = {row.topology: row for row in roi.waterfall}
    lines = ["## Playbook, filled in", "", f"- promise to measure against: {100 * plan.slo_attainment_ratio:g} % within {plan.slo_latency_s:g} s"]  # fmt: skip
    apart, same = by_name.get("decoupled"), by_name.get("colocated")
    if apart is not None and same is not None:
        gain = same.cost.total_usd - apart.cost.total_usd
        lines.append(
            f"- ControlNets as services of their own: {'save' if gain > 0 else 'cost'} {usd(abs(gain))} a month against the same engine "
            f"without them, operation included: {'split' if gain > 0 else 'do not split for money'}"
        )
    elif apart is not None:
        lines.append(
            "- ControlNets as services of their own: needed, the same engine without them does not keep the promise"
        )
    worthwhile = [phase for phase in roadmap if phase.is_worthwhile]
    if roadmap:
        lines.append(f"- phases to do: {', '.join(f'{phase.number} {phase.name}' for phase in worthwhile)}")
    lines.append(f"- limits the recommendation: {_cell(plan.limited_by)}")
    return [*lines, ""]


def _assumptions(roi: Roi) -> list[str]:
    rows = [
        (row["field"], _value(row["value"]), row["source"])
        for row in stated(roi.assumptions)
        if row["value"] is not None
    ]
    lines = ["## Assumptions", "", *_table(("field", "value", "source"), rows)]
    lines += [
        *_table(
            ("GPU time of", "from … to", "source"),
            [(n, f"×{r.low:.3f} … ×{r.high:.3f}", r.source) for n, r in roi.load_ranges],
        )
    ]
    return [*lines, *(f"- {_cell(note)}" for note in roi.notes), ""]


def _value(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
