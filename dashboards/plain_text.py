"""Words for the page. Text from outside is shown with ``st.text`` or escaped here, never read as Markdown or HTML."""

from __future__ import annotations

import re
from typing import Final

from planner.plan_record import Estimate

JOINER: Final = "\u2060"
TOGETHER: Final = 6
"""Letters of a label that stay on one line."""
NONE: Final = "–"
_PUNCTUATION: Final = re.compile(r"([!-/:-@\[-`{-~])")


def escaped(text: str) -> str:
    """The text so that Markdown shows it as it is: every ASCII punctuation mark with a backslash, line ends as spaces."""
    return _PUNCTUATION.sub(r"\\\1", " ".join(text.split()))


def percent(ratio: float | None, decimals: int = 0) -> str:
    """``73 %``."""
    return NONE if ratio is None else f"{100 * ratio:.{decimals}f} %"


def rounded(value: float | None, unit: str = "") -> str:
    """Three significant digits: ``8.51 per s``."""
    if value is None:
        return NONE
    text = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{text} {unit}".rstrip()


def rounded_seconds(estimate: Estimate) -> str:
    """``5.35 s``."""
    return NONE if estimate.mean is None else f"{estimate.mean:.2f} s"


def interval(estimate: Estimate, words: str) -> str | None:
    """``4.45 – 6.25`` from a format such as ``{:.2f}``; None if there is no interval. Nothing here can be below zero."""
    if estimate.low is None or estimate.high is None:
        return None
    return f"{words.format(max(0.0, estimate.low))} – {words.format(estimate.high)}"


def unbroken(label: str) -> str:
    """A label whose Japanese words a narrow table does not break letter by letter: word joiners between six letters at a time."""
    if label.isascii():
        return label
    return "".join(JOINER.join(label[start : start + TOGETHER]) for start in range(0, len(label), TOGETHER))


def breakable(label: str) -> str:
    """The label without word joiners."""
    return label.replace(JOINER, "")
