"""What the page says, in the visitor's language. Its own texts stand in :mod:`dashboards.catalogue`, those of the planner in
:mod:`planner.japanese`; nothing here decides anything."""

from __future__ import annotations

import re
from typing import Final, Literal

import streamlit as st

from dashboards import link
from dashboards.catalogue import CATALOGUE
from planner.japanese import in_japanese

Language = Literal["en", "ja"]
LANGUAGES: Final[dict[Language, str]] = {"en": "English", "ja": "日本語"}
_KEY: Final = "lang"
_PROBLEM: Final = re.compile(
    r"(?P<where>.{1,200}?): (?P<what>.+?)(?:, needs (?P<needs>.+?))?\.(?: (?P<repair>[A-Z].*))?"
)
_MORE: Final = re.compile(r"… and (\d+) more problems of this input\.")


def ask() -> None:
    """Draws the choice of language; starts at the address, then at the browser's."""
    if _KEY not in st.session_state:
        own: Language = "ja" if str(st.context.locale or "").lower().startswith("ja") else "en"
        st.session_state[_KEY] = link.choice(_KEY, list(LANGUAGES)) or own
    st.segmented_control(
        "Language / 言語", list(LANGUAGES), format_func=lambda code: LANGUAGES[code], key=_KEY, required=True, label_visibility="collapsed",
        persist_state="session",
    )  # fmt: skip
    link.put(lang=language())


def language() -> Language:
    """The language of this session."""
    chosen: Language = st.session_state.get(_KEY) or "en"
    return chosen


def say(key: str, /, **values: object) -> str:
    """The text of this key in the session's language, with its values filled in.

    The text is ours and may be Markdown; a value from outside must be escaped by whoever passes it, unless the text goes to ``st.text``.

    Raises:
        KeyError: there is no such text, or one of its values is missing.
    """
    said = CATALOGUE[key][0 if language() == "en" else 1]
    return said.format(**values) if values else said


def translated(text: str) -> str:
    """A sentence that the planner wrote in English, in the session's language; what is not the planner's stays as it is."""
    return text if language() == "en" else in_japanese(text)


def problem_words(text: str) -> str:
    """What is wrong with an input (``str`` of an ``InputError``), in the session's language as far as its parts are known."""
    return text if language() == "en" else "\n".join(map(_problem, text.split("\n")))


def _problem(line: str) -> str:
    """``where: what, needs this. Do that.`` with each part by itself; a line of another form as a whole."""
    whole = in_japanese(line)
    if whole != line:
        return whole
    more = _MORE.fullmatch(line)
    if more:
        return say("frame.more_problems", n=more[1])
    found = _PROBLEM.fullmatch(line)
    if found is None:
        return line
    parts = [in_japanese(found["what"])]
    if found["needs"]:
        parts.append(say("frame.needs", needs=in_japanese(found["needs"])))
    if found["repair"]:
        parts.append(in_japanese(found["repair"].rstrip(".")))
    return f"{in_japanese(found['where'])}: {''.join(part.rstrip('。') + '。' for part in parts)}"
