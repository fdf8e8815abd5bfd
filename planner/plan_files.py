"""The files of a plan in one folder, written atomically; the same plan gives the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pandas as pd

from engine.allocation import Allocation
from engine.allocation import to_json as allocation_json
from planner import report
from planner.files import make_folder, write_texts
from planner.money.assumptions import Assumptions
from planner.money.evidence import evidence_of
from planner.money.roi import Ground, ground_on, roi_on
from planner.plan_record import to_json
from planner.plan_run import PlanResult
from planner.prices import shipped_tables
from planner.profile_choice import absolute_reference
from planner.replication import Run
from planner.scenario import SAMPLE_PREFIX, Scenario, resolve, to_yaml
from traces.problems import InputError
from traces.records import REQUEST_RECORD_COLUMNS, WORKER_INTERVAL_COLUMNS
from traces.writer import write_table

MONEY_REQUESTS_MAX: Final = 100_000
"""Requests of a run up to which the report divides its cost: about two seconds (0.5 s for 30,000 with ControlNets)."""


def write_plan(result: PlanResult, scenario: Scenario, folder: Path, out: Path) -> list[Path]:
    """Writes every file of a plan; an infeasible one has no allocation and no logs, and stale ones of an earlier plan go.

    Raises:
        InputError: the folder cannot be written.
    """
    make_folder(out)
    scenario = result.scenario or scenario
    texts = {
        "plan.json": to_json(result.record),
        **report_texts(result, scenario, folder),
        "scenario.resolved.yaml": to_yaml(with_absolute_paths(scenario, folder)),
    }
    if result.allocation is not None:
        texts["allocation.json"] = allocation_json(result.allocation)
    else:
        for name in ("allocation.json", "requests.parquet", "workers.parquet"):
            (out / name).unlink(missing_ok=True)
    logs = write_logs(result.run, out) if result.run is not None else []
    return [*write_texts(out, texts), *logs]


def report_texts(result: PlanResult, scenario: Scenario, folder: Path) -> dict[str, str]:
    """The report's files in both languages, with the return under the default assumptions."""
    plan, roi = result.record, None
    scenario = result.scenario or scenario
    is_mixed = plan.kinds is not None and plan.kinds.is_mixed  # one price a fleet is what a return is worked out with
    if result.allocation is not None and result.run is not None and not is_mixed:
        roi = roi_on(_ground(result, scenario, folder, result.allocation, result.run.result.requests), Assumptions())
    return report.reports(plan, roi)


def _ground(
    result: PlanResult, scenario: Scenario, folder: Path, allocation: Allocation, requests: pd.DataFrame
) -> Ground:
    """What the return rests on; without the records where they cannot be divided, and then the report says why."""
    why_not = f"the run has more than {MONEY_REQUESTS_MAX:,} requests; diffplan roi adds them"
    if len(requests) <= MONEY_REQUESTS_MAX:
        try:
            return ground_on(evidence_of(result.record, scenario, folder, allocation, requests))
        except InputError as error:  # the plan stands without them
            why_not = f"the plan's records cannot be used: {error.problems[0]}"
    return Ground(result.record, None, why_not, None, None)


def write_logs(run: Run, out: Path) -> list[Path]:
    """The request and worker records of a run, in the engine's own schema."""
    return [
        write_table(run.result.requests, REQUEST_RECORD_COLUMNS, out / "requests.parquet"),
        write_table(run.result.workers, WORKER_INTERVAL_COLUMNS, out / "workers.parquet"),
    ]


def with_absolute_paths(scenario: Scenario, folder: Path) -> Scenario:
    """The scenario with every file named so that it can be read from any folder."""

    def absolute(reference: str) -> str:
        return str(resolve(reference, folder).resolve())

    traffic, profile, prices, add_ons = scenario.traffic, scenario.profile, scenario.prices, scenario.add_ons
    if not traffic.trace.startswith(SAMPLE_PREFIX):
        traffic = traffic.model_copy(update={"trace": absolute(traffic.trace)})
    profile = profile.model_copy(update={"name": absolute_reference(profile.name, folder)})
    gpu = scenario.gpu
    if gpu.others:
        others = (item.model_copy(update={"profile": absolute_reference(item.profile, folder)}) for item in gpu.others)
        gpu = gpu.model_copy(update={"others": tuple(others)})
    if prices.table not in shipped_tables():
        prices = prices.model_copy(update={"table": absolute(prices.table)})
    if add_ons.catalogue is not None:
        add_ons = add_ons.model_copy(update={"catalogue": absolute(add_ons.catalogue)})
    return scenario.model_copy(
        update={"traffic": traffic, "profile": profile, "gpu": gpu, "prices": prices, "add_ons": add_ons}
    )
