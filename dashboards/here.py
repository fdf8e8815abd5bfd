"""What every page is given: the visitor's question and the server's settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from streamlit.navigation.page import Page

from dashboards.choices import Choices
from dashboards.settings import Settings
from traces.trace import Trace


@dataclass(frozen=True, slots=True, eq=False)
class Here:
    """One run of the page for one visitor."""

    settings: Settings
    asked: Choices | None
    """None: the question cannot be planned yet; the frame has said why."""
    trace: Trace | None
    """The recorded traffic of the question, before scaling."""
    pages: Mapping[str, Page] = field(default_factory=dict)
    """Name to page, for links between them."""
