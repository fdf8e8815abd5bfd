"""The tables about money, as texts: shared by ``roi.md``, the report of a plan, and whoever else shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from planner.explain import gpus_words, usd
from planner.money.assumptions import OFF, stated
from planner.money.roi import Priced, Roi
from planner.money.shares import Share
from planner.money.value import is_valued
from planner.sentences import chance_words
from planner.waterfall import holds_more

FACTOR_WORDS: Final = {
    "traffic": "traffic",
    "gpu_price": "GPU price",
    "operation": "operating cost per service",
    "migration": "migration effort",
    "gpu_time_today": "GPU time of today's topology (calibration error)",
    "gpu_time_new": "GPU time of the recommendation (calibration error)",
}


NAMELESS: Final = "(not named)"
"""A tenant or model that the trace leaves empty."""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of as many texts as the header has; a header of empty texts is none."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def cost_table(roi: Roi) -> Table:
    """Every topology that keeps the promise, with the lines of its full cost."""
    header = (
        "topology", "GPUs", "GPU time", "unused GPUs of hosts", "storage, egress", "operation", "a month", "saving", "value of speed",
    )  # fmt: skip
    rows = (
        (
            f"{row.topology}{' (recommended)' if row.is_recommended else ''}", str(row.n_gpus), usd(row.cost.gpu_usd),
            usd(row.cost.unused_host_gpu_usd), usd(row.cost.storage_usd + row.cost.egress_usd), usd(row.cost.operation_usd),
            usd(row.cost.total_usd), _saving(row), usd(row.value.total_usd) if row.value else "off",
        )
        for row in roi.waterfall
    )  # fmt: skip
    return Table(header, tuple(rows))


def _saving(row: Priced) -> str:
    """With what it is compared with where that is not simply the row above."""
    own = usd(row.saving_usd_per_month)
    return f"{own} ({row.against})" if holds_more(row.against) else own


def return_table(roi: Roi) -> Table | None:
    """The change as an investment; None if there is no fleet to compare with."""
    found = roi.returns
    if found is None:
        return None
    spread, horizon = found.spread, roi.assumptions.horizon
    months = "not within the horizon" if found.payback_months is None else f"{found.payback_months:.1f} months"
    even = (
        "none"
        if found.break_even_traffic_ratio is None
        else f"×{found.break_even_traffic_ratio:.3g} of the traffic planned for"
    )
    rows = (
        (
            "today" if roi.assumptions.today.n_gpus is not None else "compared with (no fleet of today is given)",
            f"{gpus_words(found.today_gpus)} of {found.today_topology}, {usd(found.today_cost.total_usd)} a month",
        ),
        ("saving a month", f"{usd(found.saving_usd_per_month)} (90 % of the draws: {usd(spread.saving_p05_usd_per_month)} to {usd(spread.saving_p95_usd_per_month)})"),
        ("one-time cost", usd(found.investment_usd)),
        ("payback", months),
        (f"net present value, {horizon.n_months} months at {horizon.discount_ratio_per_year:.0%} a year", f"{usd(found.npv_usd)} (90 % of the draws: {usd(spread.npv_p05_usd)} to {usd(spread.npv_p95_usd)})"),
        ("draws with a positive net present value", f"{chance_words(spread.probability_npv_positive)[0]} of {spread.n_draws:,}"),
        ("break-even traffic", even),
    )  # fmt: skip
    return Table(("", ""), rows)


def swing_table(roi: Roi) -> Table | None:
    """The net present value with one input at a time at its ends, the widest swing first."""
    if roi.returns is None:
        return None
    rows = (
        (FACTOR_WORDS[s.factor], f"×{s.low:.3g} … ×{s.high:.3g}", usd(s.npv_at_low_usd), usd(s.npv_at_high_usd))
        for s in roi.returns.tornado
    )
    return Table(("input", "from … to", "net present value at the first", "at the last"), tuple(rows))


def buying_table(roi: Roi) -> Table | None:
    """Buying GPUs instead of renting them; None if it is not priced."""
    if not roi.bought:
        return None
    header = (
        "bought", "GPUs", "invested", "rent avoided a month", "net present value", "payback", "cheaper than renting above",
    )  # fmt: skip
    rows = (
        (
            words, str(b.n_gpus), usd(b.invested_usd), usd(b.rent_avoided_usd_per_month), usd(b.npv_usd),
            "not within their life" if b.payback_months is None else f"{b.payback_months:.1f} months",
            f"{b.break_even_hours_per_month:.0f} h a month",
        )
        for words, b in roi.bought
    )  # fmt: skip
    return Table(header, tuple(rows))


def share_tables(roi: Roi) -> tuple[Table, ...]:
    """Who the monthly cost is for: by add-on, by checkpoint, by tenant; each sums to the same total."""
    if roi.shares is None:
        return ()

    def table(words: str, rows: Sequence[Share]) -> Table:
        cells = (
            (
                row.kind,
                row.name or NAMELESS,
                "–" if row.n_requests is None else str(row.n_requests),
                f"{row.cost_cents / 100:,.2f}",
            )
            for row in rows
        )
        return Table((words, "name", "requests", "USD a month"), tuple(cells))

    return (
        table("add-on", roi.shares.add_ons),
        table("checkpoint", roi.shares.checkpoints),
        table("tenant", roi.shares.tenants),
    )


def assumption_table(roi: Roi, *, is_short: bool = False) -> Table:
    """Every assumed figure with its source; ``is_short``: only those that change a number here."""
    idle = ["value."] * (not is_valued(roi.assumptions.value)) + ["ownership."] * (not roi.bought)
    rows = (
        (str(row["field"]), _value(row["value"]), str(row["source"]))
        for row in stated(roi.assumptions)
        if row["value"] is not None
        and not (is_short and (row["source"] == OFF or str(row["field"]).startswith(tuple(idle))))
    )
    return Table(("field", "value", "source"), tuple(rows))


def load_range_table(roi: Roi) -> Table:
    """How far the GPU time of each topology may lie from what the laws say."""
    rows = ((name, f"×{found.low:.3f} … ×{found.high:.3f}", found.source) for name, found in roi.load_ranges)
    return Table(("GPU time of", "from … to", "source"), tuple(rows))


def _value(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
