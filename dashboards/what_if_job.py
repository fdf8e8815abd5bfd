"""What the page What-if computes, within bounds: one answer at a time for the whole server, of traffic that is short enough, remembered."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Final

import streamlit as st

from planner.candidates import Counts
from planner.scenario import Scenario
from planner.what_if import Change, Changed, Ground, Outcome, Terms, change, first_guess, lay_out, run

TURN: Final = threading.Semaphore(1)
"""However many visitors move sliders, they use one core."""


@st.cache_resource(max_entries=3, show_spinner=False)
def ground_of(key: str, _scenario: Scenario, _folder: Path) -> Ground:
    """The question laid out; ``key`` says which.

    Raises:
        InputError, NotModelledError: as :func:`planner.what_if.lay_out`.
    """
    with TURN:
        return lay_out(_scenario, _folder)


@st.cache_resource(max_entries=4, show_spinner=False)
def changed_of(key: str, asked: Change, _ground: Ground) -> Changed:
    """The question's traffic after a change."""
    with TURN:
        return change(_ground, asked)


@st.cache_data(max_entries=500, show_spinner=False)
def outcome_of(
    key: str, asked: Change, topology: str, counts: Counts, terms: Terms, _ground: Ground, _changed: Changed
) -> Outcome:
    """One allocation under changed traffic."""
    with TURN:
        return run(_ground, _changed, topology, counts, terms)  # type: ignore[arg-type]


@st.cache_data(max_entries=50, show_spinner=False)
def guess_of(key: str, topology: str, terms: Terms, _ground: Ground) -> Counts:
    """A fleet of a topology to begin with."""
    with TURN:
        return first_guess(_ground, topology, terms)  # type: ignore[arg-type]
