"""The phases of a plan's introduction that this session has simulated, shared by the pages that show and export them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import streamlit as st

from dashboards.plan_folder import plan_digest
from dashboards.plan_job import Plan
from planner.money.roi import Returns
from planner.plan_record import PhaseRow

_KEY: Final = "_phases"


@dataclass(frozen=True, slots=True)
class Known:
    """Phases and what they were simulated for."""

    digest: str
    today: tuple[str, int] | None
    """Topology and GPUs of the fleet they start from; None for those that came with the plan."""
    phases: tuple[PhaseRow, ...]


def keep_phases(plan: Plan, returns: Returns, phases: tuple[PhaseRow, ...]) -> None:
    """Remembers phases that were just simulated."""
    st.session_state[_KEY] = Known(plan_digest(plan), (returns.today_topology, returns.today_gpus), phases)


def known_phases(plan: Plan) -> Known | None:
    """What is known of this plan's phases, whatever fleet they start from; None if nothing is."""
    found: Known | None = st.session_state.get(_KEY)
    if found is not None and found.digest == plan_digest(plan):
        return found
    return Known(plan_digest(plan), None, plan.record.roadmap) if plan.record.roadmap else None
