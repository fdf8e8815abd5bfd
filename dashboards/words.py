"""What the page says, in the visitor's language. All of it stands in :mod:`dashboards.catalogue`; nothing here decides anything."""

from __future__ import annotations

from typing import Final, Literal

import streamlit as st

from dashboards import link
from dashboards.catalogue import CATALOGUE

Language = Literal["en", "ja"]
LANGUAGES: Final[dict[Language, str]] = {"en": "English", "ja": "日本語"}
_KEY: Final = "lang"


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
