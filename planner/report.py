"""The report of a plan as Markdown and as one self-contained HTML page; every number in it is the plan's or its return's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import jinja2
from markupsafe import Markup, escape

from planner.money.roi import Roi
from planner.plan_record import PlanRecord
from planner.report_blocks import Section
from planner.report_money import money
from planner.report_sections import (
    answer,
    evidence,
    playbook_section,
    question,
    reproduction,
    risk_section,
    roadmap,
    why,
)
from planner.report_words import (
    TOPOLOGY_HEADER,
    VERDICT_WORDS,
    count_words,
    grades_words,
    markdown_cell,
    money_words,
    seconds_words,
    share_words,
    topology_cells,
)

__all__ = [
    "TOPOLOGY_HEADER",
    "VERDICT_WORDS",
    "count_words",
    "grades_words",
    "html",
    "markdown",
    "money_words",
    "seconds_words",
    "sections",
    "share_words",
    "topology_cells",
]

TEMPLATES: Final = Path(__file__).parent / "templates"
_INTERVAL: Final = re.compile(r"([^()]{1,14}) (\([^()]{3,24}\))")


def sections(plan: PlanRecord, roi: Roi | None = None) -> tuple[Section, ...]:
    """The report's content.

    Args:
        roi: the plan's return (``planner.money.roi.make_roi``). None: the section on money says how to get it.
    """
    found = (
        answer(plan, roi), question(plan), why(plan), evidence(plan), money(plan, roi), risk_section(plan, roi), roadmap(plan),
        playbook_section(plan, roi), reproduction(plan),
    )  # fmt: skip
    return tuple(section for section in found if section is not None)


def markdown(plan: PlanRecord, roi: Roi | None = None) -> str:
    """``report.md``."""
    return _render("report.md.j2", plan, roi, autoescape=False)


def html(plan: PlanRecord, roi: Roi | None = None) -> str:
    """``report.html``: no script, no request to anywhere; every text is escaped."""
    return _render("report.html.j2", plan, roi, autoescape=True)


def _render(template: str, plan: PlanRecord, roi: Roi | None, *, autoescape: bool) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=autoescape,  # noqa: S701  off for Markdown only, whose cells are escaped by their own filter
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"cell": markdown_cell, "unbroken": _unbroken}
    return environment.get_template(template).render(name=plan.ids.scenario_name, sections=sections(plan, roi))


def _unbroken(text: str) -> Markup:
    """A figure with its interval in parentheses, which stays on one line."""
    found = _INTERVAL.fullmatch(text)
    return escape(text) if found is None else Markup('{} <span class="unbroken">{}</span>').format(*found.groups())
