"""What lies beside a plan: its scenario, its traffic and its simulated records, from which shares of the cost are read."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd

from calibrate.profile_file import shipped_profiles
from engine.allocation import GIB, Allocation, read_allocation
from planner.attribution import Attribution, attribute
from planner.diagnose_question import table_of, weights_of
from planner.money.lines import ModelTraffic
from planner.plan_record import PlanRecord, read_plan
from planner.replication import Inputs, load_inputs
from planner.scenario import Scenario, load_scenario
from planner.traffic import build_traffic
from planner.workload import Workload
from traces.problems import InputError, one_problem
from traces.reader import read_table
from traces.records import REQUEST_RECORD_COLUMNS

CHECKED_MIN: Final = 3
"""Held-out kinds of images below which a topology counts as unchecked."""
SECONDS_PER_HOUR: Final = 3600.0


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """A plan with what its folder holds."""

    plan: PlanRecord
    scenario: Scenario
    folder: Path
    inputs: Inputs
    workload: Workload
    """Of the repetition whose records the plan keeps."""
    allocation: Allocation
    records: pd.DataFrame


def read_evidence(path: Path) -> tuple[PlanRecord, Evidence | None, str]:
    """The plan, what lies beside it, and, where that is nothing usable, why.

    Raises:
        InputError: the plan itself cannot be read.
    """
    plan = read_plan(path)
    folder = path if path.is_dir() else path.parent
    names = ("scenario.resolved.yaml", "allocation.json", "requests.parquet")
    missing = [name for name in names if not (folder / name).is_file()]
    if plan.recommended is None:
        return plan, None, "the plan recommends nothing"
    if missing:
        return plan, None, f"{', '.join(missing)} of the plan's folder is not there"
    try:
        scenario, here = load_scenario(str(folder / "scenario.resolved.yaml"))
        inputs = load_inputs(scenario, here)
        workload = build_traffic(scenario, here, 0).workload
        allocation = read_allocation(folder / "allocation.json")
        path = folder / "requests.parquet"
        records = _ordered(read_table(path, REQUEST_RECORD_COLUMNS), workload, str(path))
    except InputError as error:  # the plan stands without them: said in the result, not swallowed
        return plan, None, f"what lies beside the plan cannot be used: {error.problems[0]}"
    return plan, Evidence(plan, scenario, here, inputs, workload, allocation, records), ""


def evidence_of(
    plan: PlanRecord, scenario: Scenario, folder: Path, allocation: Allocation, requests: pd.DataFrame
) -> Evidence:
    """The same of a plan that was just made: ``requests`` are the records of its first repetition."""
    workload = build_traffic(scenario, folder, 0).workload
    records = _ordered(requests, workload, "the plan's records")
    return Evidence(plan, scenario, folder, load_inputs(scenario, folder), workload, allocation, records)


def _ordered(frame: pd.DataFrame, workload: Workload, where: str) -> pd.DataFrame:
    if sorted(frame["request_id"]) != sorted(workload.request_ids):
        raise one_problem(
            where, f"has {len(frame)} requests that are not the scenario's {len(workload)}",
            "the records of this plan's first repetition", "Plan again",
        )  # fmt: skip
    return frame.set_index("request_id").loc[list(workload.request_ids)].reset_index()


def attribution_of(evidence: Evidence) -> Attribution:
    """Where the recommended fleet's time goes."""
    topology = evidence.allocation.pools_of("base")[0].topology
    service = table_of(evidence.scenario, evidence.inputs, evidence.workload, topology, evidence.allocation)
    weights = weights_of(evidence.scenario, evidence.inputs, evidence.workload, service, evidence.allocation)
    end_s = max(float(evidence.records["end_s"].max()), evidence.workload.duration_s)
    allocated_s = end_s * sum(pool.n_replicas for pool in evidence.allocation.pools)
    return attribute(evidence.workload, evidence.records, weights, allocated_s)


def model_traffic(evidence: Evidence) -> ModelTraffic:
    """GiB that the models take in the store, and that are fetched a month; sizes as the scenario states them."""
    workload, sizes = evidence.workload, evidence.inputs.sizes
    loras = sizes.of_loras(workload.lora_names).astype(np.float64)
    controlnets = sizes.of_controlnets(workload.controlnet_names).astype(np.float64)
    checkpoints = sizes.of_checkpoints(workload.checkpoint_names).astype(np.float64)
    stored = float(loras.sum() + controlnets.sum() + checkpoints.sum()) / GIB

    def mean_gib(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
        return float(values.mean()) / GIB if len(values) else 0.0

    records = evidence.records
    fetched = (
        float(records["n_lora_misses"].sum()) * mean_gib(loras)
        + float(records["n_controlnet_misses"].sum()) * mean_gib(controlnets)
        + float(records["is_switch"].sum()) * mean_gib(checkpoints)
    )
    months = workload.duration_s / (SECONDS_PER_HOUR * evidence.plan.ids.hours_per_month)
    return ModelTraffic(stored, fetched / months)


@dataclass(frozen=True, slots=True)
class LoadRange:
    """How far the GPU time of a topology's images may lie from what the laws say."""

    low: float
    high: float
    source: str


def load_range(profile_name: str, topology: str, unchecked: tuple[float, float]) -> LoadRange:
    """Measured over composed time of held-out images, lowest and highest; the assumed range where too few were checked."""
    shipped = shipped_profiles().get(profile_name)
    path = shipped.with_name(f"{profile_name}.check.csv") if shipped is not None else None
    if path is not None and path.is_file():
        with path.open(encoding="utf-8", newline="") as stream:
            rows = [
                row for row in csv.DictReader(stream) if row["topology"] == topology and row["is_held_out"] == "true"
            ]
        if len(rows) >= CHECKED_MIN:
            ratios = [float(row["measured_s"]) / float(row["predicted_s"]) for row in rows]
            return LoadRange(min(1.0, *ratios), max(1.0, *ratios), f"{len(rows)} held-out kinds of images, {path.name}")
    return LoadRange(*unchecked, "assumed: not checked on held-out images")
