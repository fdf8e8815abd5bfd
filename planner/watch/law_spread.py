"""How well the plan knows its own stages: the profile's laws have intervals, and the run beside a plan was made with one draw of them.

A stage that is off by what the calibration left open has not drifted. So live stages are compared with the fitted laws, and a chart
starts to count where 95 % of the laws' joint draws end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from planner.plan_record import PlanRecord
from planner.replication import load_inputs, profile_draw, service_table
from planner.scenario import load_scenario
from planner.service import ServiceTable
from planner.traffic import build_traffic, busiest_stretch
from planner.watch.windows import STAGES

REQUESTS_MAX: Final = 1000
DRAWS: Final = 40
LEVELS: Final = (0.025, 0.975)
SCENARIO_FILE: Final = "scenario.resolved.yaml"


@dataclass(frozen=True, slots=True)
class LawSpread:
    """Of one stage."""

    run_ratio: float = 1.0
    """Mean of the stage in the run beside the plan over the fitted laws'."""
    low: float = 0.0
    """Deviation from the fitted laws at the lower end of their draws, 0 or less."""
    high: float = 0.0
    """The same at the upper end."""


def law_spreads(plan: PlanRecord, folder: Path) -> Mapping[str, LawSpread] | None:
    """Stage to its spread; None where the scenario is not beside the plan or its profile is another one by now.

    Raises:
        InputError: the scenario is there and cannot be used.
    """
    if not (folder / SCENARIO_FILE).is_file() or plan.recommended is None:
        return None
    scenario, base = load_scenario(str(folder / SCENARIO_FILE))
    inputs = load_inputs(scenario, base)
    if inputs.profile.profile_id != plan.ids.profile_id:
        return None
    workload = busiest_stretch(build_traffic(scenario, base).workload, REQUESTS_MAX)

    def means(draw: int | None) -> Mapping[str, float]:
        table = service_table(scenario, inputs, workload, plan.recommended or "colocated", draw=draw, noise_seed=0)
        return {stage: float(_column(table, stage).mean()) for stage in STAGES}

    fitted, of_run = means(None), means(profile_draw(scenario, inputs, 0))
    drawn = [means(draw) for draw in range(min(DRAWS, inputs.profile.n_draws))]
    found = {}
    for stage in STAGES:
        if fitted[stage] <= 0:
            continue
        deviation = [each[stage] / fitted[stage] - 1.0 for each in drawn] or [0.0]
        low, high = (float(np.quantile(deviation, level)) for level in LEVELS)
        found[stage] = LawSpread(of_run[stage] / fitted[stage], min(low, 0.0), max(high, 0.0))
    return found


def _column(table: ServiceTable, stage: str) -> np.ndarray:
    return {"text": table.text_s, "denoise": table.denoise_alone_s, "decode": table.decode_s}[stage]
