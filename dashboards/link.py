"""What the page's address says: every choice that numbers depend on, so that a copied link shows the same numbers again.

The address is read once a session. A choice starts at what the address says (:func:`number`, :func:`choice`, :func:`text`), and whoever
draws it says what the address shall say from now on (:func:`put`). What an address says that cannot be used is named on the
page, not obeyed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import streamlit as st

TEXT_MAX: Final = 400
"""Characters of one value; an address carries choices, not files."""
_TAKEN: Final = "_link"
_IGNORED: Final = "_link_ignored"
_PUT: Final = "_link_put"


def begin() -> None:
    """To be called first in every run: reads the address, if this is the session's first, and forgets what was put in the last run."""
    state = st.session_state
    if _TAKEN not in state:
        state[_TAKEN] = {key: value for key, value in st.query_params.to_dict().items() if len(value) <= TEXT_MAX}
        state[_IGNORED] = []
    state[_PUT] = {}


def text(key: str) -> str | None:
    """What the address says about this, once; None if nothing, or if it was asked before."""
    taken: dict[str, str] = st.session_state.get(_TAKEN, {})
    return taken.pop(key, None)


def number(key: str, low: float, high: float) -> float | None:
    """A number from ``low`` to ``high`` that the address gives, once. Anything else is named as unusable."""
    said = text(key)
    if said is None:
        return None
    try:
        value = float(said)
    except ValueError:
        value = math.nan
    if low <= value <= high:  # false for nan
        return value
    ignore(key, said)
    return None


def choice(key: str, options: Sequence[str]) -> str | None:
    """One of the options that the address gives, once. Anything else is named as unusable."""
    said = text(key)
    if said is None or said in options:
        return said
    ignore(key, said)
    return None


def ignore(key: str, said: str) -> None:
    """Notes that the address says something that cannot be used."""
    st.session_state.setdefault(_IGNORED, []).append(f"{key}={said[:40]}")


def ignored() -> list[str]:
    """Everything of the address that could not be used."""
    found: list[str] = st.session_state.get(_IGNORED, [])
    return found


def put(**values: str | float | None) -> None:
    """What the address shall say after this run; numbers with twelve digits, None for nothing."""
    for key, value in values.items():
        if value is not None:
            st.session_state[_PUT][key] = value if isinstance(value, str) else f"{value:.12g}"


def finish() -> None:
    """To be called last in every run: writes the address if it changed."""
    put_now: dict[str, str] = st.session_state[_PUT]
    if st.query_params.to_dict() != put_now:
        st.query_params.from_dict(put_now)
