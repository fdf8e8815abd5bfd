"""The report of a plan as Markdown and as one self-contained HTML page, in English and Japanese; every number in it is the plan's or
its return's.

It is composed in English; the Japanese one is the same blocks with each of their texts in Japanese.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, Final, Literal

import jinja2
from markupsafe import Markup, escape

from planner.japanese import in_japanese
from planner.money.roi import Roi
from planner.plan_record import PlanRecord
from planner.report_blocks import Paragraph, Section
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
    "reports",
    "seconds_words",
    "sections",
    "share_words",
    "topology_cells",
]

TEMPLATES: Final = Path(__file__).parent / "templates"
Language = Literal["en", "ja"]
_SAME_IN_BOTH: Final = {"kind", "tone", "language", "shade", "shape", "letter"}
"""Fields of blocks that are no text to be read."""
_INTERVAL: Final = re.compile(r"([^()]{1,14}) (\([^()]{3,24}\))")


def sections(plan: PlanRecord, roi: Roi | None = None, language: Language = "en") -> tuple[Section, ...]:
    """The report's content.

    Args:
        roi: the plan's return (``planner.money.roi.make_roi``). None: the section on money says how to get it.
    """
    found = (
        answer(plan, roi), question(plan), why(plan), evidence(plan), money(plan, roi), risk_section(plan, roi), roadmap(plan),
        playbook_section(plan, roi), reproduction(plan),
    )  # fmt: skip
    return tuple(section if language == "en" else _japanese(section) for section in found if section is not None)


def reports(plan: PlanRecord, roi: Roi | None = None) -> dict[str, str]:
    """Every file of the report by its name: ``report.md`` and ``report.html``, and the same in Japanese."""
    return {
        "report.md": markdown(plan, roi),
        "report.html": html(plan, roi),
        "report.ja.md": markdown(plan, roi, "ja"),
        "report.ja.html": html(plan, roi, "ja"),
    }


def markdown(plan: PlanRecord, roi: Roi | None = None, language: Language = "en") -> str:
    """``report.md``, or ``report.ja.md``."""
    return _render("report.md.j2", plan, roi, language, autoescape=False)


def html(plan: PlanRecord, roi: Roi | None = None, language: Language = "en") -> str:
    """``report.html``, or ``report.ja.html``: no script, no request to anywhere; every text is escaped."""
    return _render("report.html.j2", plan, roi, language, autoescape=True)


def _japanese(block: Any) -> Any:
    """A section or block with its texts in Japanese; what is to be typed stays, and a sentence that is in both languages is said once."""
    if isinstance(block, str):
        return in_japanese(block)
    if isinstance(block, tuple):
        return tuple(_japanese(item) for item in block if not (isinstance(item, Paragraph) and item.twin == "ja"))
    if not dataclasses.is_dataclass(block) or isinstance(block, type):
        return block
    if isinstance(block, Paragraph) and (block.tone == "command" or block.language == "ja"):
        return block
    changed = {
        field.name: _japanese(getattr(block, field.name))
        for field in dataclasses.fields(block)
        if field.name not in _SAME_IN_BOTH
    }
    return dataclasses.replace(block, **changed)


def _render(template: str, plan: PlanRecord, roi: Roi | None, language: Language, *, autoescape: bool) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=autoescape,  # noqa: S701  off for Markdown only, whose cells are escaped by their own filter
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    said = in_japanese if language == "ja" else str
    environment.filters |= {"cell": markdown_cell, "unbroken": _unbroken, "said": said}
    return environment.get_template(template).render(
        name=plan.ids.scenario_name, sections=sections(plan, roi, language), language=language
    )


def _unbroken(text: str) -> Markup:
    """A figure with its interval in parentheses, which stays on one line."""
    found = _INTERVAL.fullmatch(text)
    return escape(text) if found is None else Markup('{} <span class="unbroken">{}</span>').format(*found.groups())
