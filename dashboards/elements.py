"""What pages are built of: charts with their words, tables to take away, grades, and the states in which there is nothing to show.

Text from outside is shown with ``st.text`` or escaped; tables and charts get a sentence for people who cannot see them.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any, Final

import pandas as pd
import plotly.graph_objects as go
import streamlit as st

from calibrate.profile import GRADES
from dashboards.words import language, problem_words, say

CHART: Final = {"displayModeBar": False, "scrollZoom": False}
HEIGHT_PX: Final = 380
FORMULA_STARTS: Final = ("=", "+", "-", "@", "\t", "\r")
"""A cell that begins so is a formula to a spreadsheet."""
GRADE_ICONS: Final = {"measured": ":material/straighten:", "interpolated": ":material/timeline:", "extrapolated": ":material/open_in_full:", "assumed": ":material/help:"}  # fmt: skip
GRADE_COLOURS: Final[dict[str, Any]] = {"measured": "blue", "interpolated": "blue", "extrapolated": "orange", "assumed": "orange"}  # fmt: skip
"""Blue and orange are told apart by people who see red and green alike; the word is always there too."""


def draw_chart(figure: go.Figure, words: str, key: str, *, shows_words: bool = True) -> None:
    """A figure with its alternative text, which stands under it for everybody unless ``shows_words`` is False."""
    st.plotly_chart(figure, config=CHART, key=key, alt=words)
    if shows_words:
        with st.expander(say("frame.in_words")):
            st.text(words)


def plain_layout(figure: go.Figure, height_px: int = HEIGHT_PX) -> go.Figure:
    """The layout that all figures share: narrow margins, the legend below, no zooming by accident on a phone."""
    figure.update_layout(
        height=height_px, margin={"l": 10, "r": 10, "t": 32, "b": 10}, dragmode=False,
        # about 64 pixels under the plot, where the axis has its title
        legend={"orientation": "h", "yanchor": "top", "y": -64 / max(60, height_px - 110), "x": 0, "xanchor": "left"},
    )  # fmt: skip
    return figure


def draw_table(frame: pd.DataFrame, words: str, file_name: str, *, is_wide: bool = False, **options: Any) -> None:
    """A table and a button that takes it away as CSV.

    Args:
        words: what the table shows, for people who cannot see it.
        file_name: of the CSV; also the button's key, so each is used once a page.
        is_wide: scrolls sideways inside its own frame (``st.dataframe``) instead of being laid out in full (``st.table``, whose
            cells are Markdown: escape what comes from outside).
        options: of ``st.dataframe``, such as ``column_config``.
    """
    if is_wide:
        st.dataframe(frame, hide_index=True, alt=words, **options)
    else:
        st.table(frame, alt=words, **options)
    draw_csv(frame, file_name)


def draw_csv(frame: pd.DataFrame, file_name: str) -> None:
    """A button that takes a table away as CSV."""
    st.download_button(
        say("frame.as_csv"), csv_of(frame), file_name, "text/csv", key=f"csv_{file_name}", on_click="ignore",
        icon=":material/download:", type="tertiary",
    )  # fmt: skip


def csv_of(frame: pd.DataFrame) -> bytes:
    """CSV in UTF-8, in which no cell is a formula to a spreadsheet: one that would be gets an apostrophe in front.

    An index is a column if it has names or labels of its own.
    """
    plain = frame if isinstance(frame.index, pd.RangeIndex) else frame.reset_index()
    safe = plain.map(_neutral)
    safe.columns = [_neutral(str(name)) for name in plain.columns]
    stream = io.StringIO()
    safe.to_csv(stream, index=False, lineterminator="\r\n")
    return stream.getvalue().encode("utf-8-sig")  # the mark tells a spreadsheet that it is UTF-8


def _neutral(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA_STARTS) else cell


def worst_grade(grades: Iterable[str]) -> str:
    """The worst of these grades; ``assumed`` if there are none, for then nothing says where the number is from."""
    return max(grades, key=GRADES.index, default="assumed")


def draw_grades(grades: Iterable[str], what: str) -> None:
    """A mark that says how well the numbers beside it are known: by their worst grade, and how many laws have which.

    Args:
        grades: of every law behind the numbers.
        what: which numbers, in words of ours.
    """
    found = list(grades)
    worst = worst_grade(found)
    parts = [
        say("grade.count", n=found.count(grade), grade=say(f"grade.{grade}")) for grade in GRADES if grade in found
    ]
    counts = ("、" if language() == "ja" else ", ").join(parts)
    label, help_text = say(f"grade.{worst}"), say(f"grade.{worst}.help")
    st.badge(f"{what}: {label}", icon=GRADE_ICONS[worst], color=GRADE_COLOURS[worst], help=help_text)
    if len(found) > 1:
        st.caption(say("grade.counts", counts=counts))


def draw_problem(title: str, sentences: str) -> None:
    """What is wrong; the sentences may quote a visitor's file, so they are shown as they are."""
    with st.container(border=True):
        st.error(title, icon=":material/error:")
        st.text(problem_words(sentences))


def draw_empty(sentence: str) -> None:
    """That there is nothing to show yet, and what would change that."""
    st.info(sentence, icon=":material/info:")
