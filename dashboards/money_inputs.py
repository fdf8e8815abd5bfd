"""The visitor's own figures about money: every field of the assumptions that the page asks for, with unit, bounds and source.

A field that is left as it is keeps the assumptions' default and its source; the address carries those that were changed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import streamlit as st
import yaml
from pydantic import BaseModel

from dashboards import link
from dashboards.plain_text import escaped
from dashboards.words import say, translated
from planner.money.assumptions import Assumptions, stated
from planner.strict_yaml import parse_strict
from traces.problems import one_problem

Group = Literal["today", "gpus", "effort", "horizon", "storage", "buying", "value"]
GROUPS: Final[tuple[Group, ...]] = ("today", "gpus", "effort", "horizon", "storage", "buying", "value")
TODAY_TOPOLOGY: Final = "roi_today_topology"
CURVE_MAX: Final = 400
"""Letters of a curve."""


@dataclass(frozen=True, slots=True)
class Field:
    """One number that may be changed."""

    name: str
    """In the address (``m_…``), and the end of the key of its words."""
    group: Group
    path: str
    """Of the assumptions."""
    low: float
    high: float
    step: float
    scale: float = 1.0
    """Shown number over stored one: 100 for a share in per cent."""
    is_whole: bool = False


FIELDS: Final = (
    Field("today_gpus", "today", "today.n_gpus", 1, 100_000, 1, is_whole=True),
    Field("reserved", "gpus", "purchase.reserved_ratio", 0, 100, 5, 100),
    Field("reserved_price", "gpus", "purchase.reserved_price_usd_per_gpu_hour", 0, 10_000, 0.1),
    Field("spot", "gpus", "purchase.spot_ratio", 0, 100, 5, 100),
    Field("spot_price", "gpus", "purchase.spot_price_usd_per_gpu_hour", 0, 10_000, 0.1),
    Field("per_host", "gpus", "purchase.gpus_per_host", 1, 64, 1, is_whole=True),
    Field("hours_service", "effort", "operation.operating_hours_per_service_month", 0, 10_000, 1),
    Field("engineer", "effort", "operation.engineer_usd_per_hour", 0, 10_000, 10),
    Field("to_tuned", "effort", "migration.diffusers_tuned_hours", 0, 100_000, 10),
    Field("to_colocated", "effort", "migration.colocated_hours", 0, 100_000, 10),
    Field("to_decoupled", "effort", "migration.decoupled_hours", 0, 100_000, 10),
    Field("beside", "effort", "migration.double_running_months", 0, 24, 0.5),
    Field("months", "horizon", "horizon.n_months", 1, 240, 1, is_whole=True),
    Field("discount", "horizon", "horizon.discount_ratio_per_year", 0, 200, 1, 100),
    Field("growth", "horizon", "horizon.traffic_growth_ratio_per_month", -50, 50, 1, 100),
    Field("price_change", "horizon", "horizon.price_change_ratio_per_month", -50, 50, 1, 100),
    Field("storage", "storage", "add_ons.storage_usd_per_gib_month", 0, 1000, 0.01),
    Field("egress", "storage", "add_ons.egress_usd_per_gib", 0, 1000, 0.01),
    Field("gpu_usd", "buying", "ownership.gpu_purchase_usd", 0, 10_000_000, 1000),
    Field("hosting", "buying", "ownership.hosting_usd_per_gpu_month", 0, 1_000_000, 50),
    Field("life", "buying", "ownership.life_months", 1, 240, 1, is_whole=True),
    Field("resale", "buying", "ownership.resale_ratio", 0, 100, 5, 100),
    Field("customers", "value", "value.churn.n_customers", 0, 1_000_000_000, 100, is_whole=True),
    Field("customer_value", "value", "value.churn.value_usd_per_customer", 0, 1_000_000, 10),
    Field("image_value", "value", "value.completion.value_usd_per_image", 0, 1000, 0.01),
    Field("late", "value", "value.penalty_usd_per_late_image", 0, 1000, 0.01),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Curve:
    """One curve over latency that may be switched on and changed."""

    name: str
    """In the address (``m_…`` and ``m_…_curve``), and the end of the key of its words."""
    path: str
    """Of its group in the assumptions."""
    values: str
    """The field of its values."""
    scale: float
    """Shown number over stored one."""


CURVES: Final = (
    Curve("completion", "value.completion", "completion_ratio", 100),
    Curve("churn", "value.churn", "churn_ratio_per_month", 100),
    Curve("price", "value.price", "price_usd_per_image", 1),
)


def ask(topologies: list[str]) -> tuple[Assumptions, str]:
    """Draws the inputs; gives the assumptions and the YAML file that says the same to ``diffplan roi --assumptions``.

    Raises:
        InputError: what is given contradicts itself, such as a reserved share without a price.
    """
    default = {row["field"]: row for row in stated(Assumptions())}
    given: dict[str, Any] = {}
    with st.expander(say("roi.inputs"), icon=":material/edit:"):
        st.caption(say("roi.inputs.note"))
        tabs = st.tabs([say(f"roi.group.{group}") for group in GROUPS])
        for group, tab in zip(GROUPS, tabs, strict=True):
            with tab:
                if group == "today":
                    _ask_today(topologies, given)
                if group == "value":
                    st.caption(say("roi.value.note"))
                    for curve in CURVES:
                        _ask_curve(curve, default, given)
                columns = st.columns(2)
                for index, field in enumerate(field for field in FIELDS if field.group == group):
                    with columns[index % 2]:
                        _ask_number(field, default[field.path], given)
    text = yaml.safe_dump(given, sort_keys=False) if given else "{}\n"
    return parse_strict(text, Assumptions, "assumptions"), text


def _ask_number(field: Field, default: dict[str, Any], given: dict[str, Any]) -> None:
    key = f"roi_{field.name}"
    usual = None if default["value"] is None else default["value"] * field.scale
    if key not in st.session_state:
        linked = link.number(f"m_{field.name}", field.low, field.high)
        start = linked if linked is not None else usual
        st.session_state[key] = start if start is None else int(start) if field.is_whole else float(start)
    shown = say("roi.none_given") if usual is None else f"{usual:g}"
    kind: Any = int if field.is_whole else float
    value = st.number_input(
        say(f"roi.field.{field.name}"), value=None, min_value=kind(field.low), max_value=kind(field.high), step=kind(field.step), key=key,
        format=None if field.is_whole else "%.6g", help=escaped(say("roi.source", value=shown, source=translated(default["source"]))), persist_state="session",
        placeholder=say("roi.none_given"),
    )  # fmt: skip
    if value is None or (usual is not None and abs(value - usual) < 1e-12 * max(1.0, abs(usual))):
        return
    link.put(**{f"m_{field.name}": float(value)})
    _set(given, field.path, int(value) if field.is_whole else round(value / field.scale, 12))


def _ask_today(topologies: list[str], given: dict[str, Any]) -> None:
    options = ["", *topologies]
    if st.session_state.get(TODAY_TOPOLOGY) not in options:
        st.session_state[TODAY_TOPOLOGY] = link.choice("m_today", options) or ""
    first = say("roi.today.first")
    chosen = st.selectbox(
        say("roi.field.today_topology"), options, key=TODAY_TOPOLOGY, format_func=lambda name: name or first,
        help=say("roi.field.today_topology.help"), persist_state="session",
    )  # fmt: skip
    if chosen:
        link.put(m_today=chosen)
        _set(given, "today.topology", chosen)


def _ask_curve(curve: Curve, default: dict[str, Any], given: dict[str, Any]) -> None:
    """A switch, and the curve as a text such as ``1: 90; 3: 86.8``: seconds and value, point by point."""
    key = f"roi_{curve.name}"
    if key not in st.session_state:
        st.session_state[key] = link.choice(f"m_{curve.name}", ["on"]) == "on"
    left, right = st.columns([2, 3], vertical_alignment="bottom")
    is_on = left.toggle(
        say(f"roi.field.{curve.name}"), key=key, help=say(f"roi.field.{curve.name}.help"), persist_state="session"
    )
    seconds, values = (default[f"{curve.path}.{name}"] for name in ("latency_s", curve.values))
    usual = curve_text(seconds["value"], [round(value * curve.scale, 9) for value in values["value"]])
    place = f"{key}_curve"
    if place not in st.session_state:
        st.session_state[place] = link.text(f"m_{curve.name}_curve") or usual
    text = right.text_input(
        say(f"roi.curve.{curve.name}"), key=place, max_chars=CURVE_MAX, persist_state="session",
        help=escaped(say("roi.source", value=usual, source=translated(values["source"]))),
    )  # fmt: skip
    if is_on:
        link.put(**{f"m_{curve.name}": "on"})
        _set(given, f"{curve.path}.is_on", True)
    if text.strip() and text.strip() != usual:
        link.put(**{f"m_{curve.name}_curve": text})
        points = points_of(text, say(f"roi.curve.{curve.name}"))
        _set(given, f"{curve.path}.latency_s", [latency_s for latency_s, _ in points])
        _set(given, f"{curve.path}.{curve.values}", [round(value / curve.scale, 12) for _, value in points])


def curve_text(seconds: Sequence[float], values: Sequence[float]) -> str:
    """``1: 90; 3: 86.8``."""
    return "; ".join(f"{latency_s:g}: {value:g}" for latency_s, value in zip(seconds, values, strict=True))


def points_of(text: str, where: str) -> list[tuple[float, float]]:
    """Seconds and value of each point of a text such as ``1: 90; 3: 86.8``; raises :class:`InputError` for anything else."""
    found = []
    for part in text.strip().rstrip(";").split(";"):
        numbers = part.split(":")
        try:
            latency_s, value = (float(number) for number in numbers)
        except ValueError:
            raise one_problem(
                where, f"got {part.strip()[:40]!r}", "points such as 1: 90; 3: 86.8", "Write seconds, a colon, the value, and a semicolon"
            ) from None  # fmt: skip
        if not (math.isfinite(latency_s) and math.isfinite(value)):
            raise one_problem(where, f"got {part.strip()[:40]!r}", "finite numbers")
        found.append((latency_s, value))
    return found


def _set(given: dict[str, Any], path: str, value: Any) -> None:
    *groups, name = path.split(".")
    for group in groups:
        given = given.setdefault(group, {})
    given[name] = value


def names_of(model: type[BaseModel], place: str = "") -> set[str]:
    """Every path of a model, dotted; for checking that each field of the page exists."""
    found: set[str] = set()
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= names_of(kind, f"{place}{name}.")
        else:
            found.add(f"{place}{name}")
    return found
