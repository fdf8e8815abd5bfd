"""What a report is made of: sections of blocks that the templates turn into HTML and Markdown, so that both say the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Tone = Literal["plain", "answer", "muted", "command"]
COLUMNS_MAX: Final = 5
CELL_MAX: Final = 60
Shade = Literal["chosen", "other", "saves", "costs"]


@dataclass(frozen=True, slots=True)
class Paragraph:
    """A text; ``command`` is something to type."""

    text: str
    tone: Tone = "plain"
    language: str = "en"
    twin: str = ""
    """Language in which the next paragraph says the same."""
    kind: str = "paragraph"


@dataclass(frozen=True, slots=True)
class Heading:
    """A title inside a section."""

    text: str
    kind: str = "heading"


@dataclass(frozen=True, slots=True)
class Bullets:
    """A list."""

    items: tuple[str, ...]
    kind: str = "bullets"


@dataclass(frozen=True, slots=True)
class Grid:
    """A table; one row may be marked as the chosen one."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    chosen: int | None = None
    kind: str = "grid"

    @property
    def is_wide(self) -> bool:
        """Whether a phone shows its rows as blocks of lines, each with its column's title."""
        longest = max((len(cell) for row in self.rows for cell in row), default=0)
        return any(self.header) and (len(self.header) > COLUMNS_MAX or longest > CELL_MAX)


@dataclass(frozen=True, slots=True)
class Card:
    """One figure of the answer at a glance."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Cards:
    """Figures side by side."""

    cards: tuple[Card, ...]
    kind: str = "cards"


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar: where it starts and how long it is, in per cent of the width; the words say the same."""

    label: str
    words: str
    left_percent: float
    width_percent: float
    shade: Shade


@dataclass(frozen=True, slots=True)
class Bars:
    """Bars one under the other, all on one scale from 0 unless ``mark_percent`` names another line."""

    title: str
    bars: tuple[Bar, ...]
    mark_percent: float | None = None
    kind: str = "bars"


@dataclass(frozen=True, slots=True)
class Point:
    """One point with an interval on each axis, in the chart's own units."""

    label: str
    words: str
    x: float
    y: float
    x_from: float
    x_to: float
    y_from: float
    y_to: float
    shape: str
    """SVG path around 0,0."""
    shade: Shade
    is_hollow: bool


@dataclass(frozen=True, slots=True)
class Tick:
    """A mark on an axis."""

    at: float
    words: str


@dataclass(frozen=True, slots=True)
class Scatter:
    """Points on two axes, with one vertical line."""

    title: str
    width: float
    height: float
    left: float
    bottom: float
    x_title: str
    y_title: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    points: tuple[Point, ...]
    line_at: float
    line_words: str
    kind: str = "scatter"


@dataclass(frozen=True, slots=True)
class Rack:
    """The GPUs of one pool, one square each; ``n_hidden`` more are only counted."""

    label: str
    words: str
    letter: str
    n_shown: int
    n_hidden: int
    shade: Shade


@dataclass(frozen=True, slots=True)
class Racks:
    """The GPUs of an allocation."""

    racks: tuple[Rack, ...]
    kind: str = "racks"


Block = Paragraph | Heading | Bullets | Grid | Cards | Bars | Scatter | Racks


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the report with a title."""

    title: str
    blocks: tuple[Block, ...]
