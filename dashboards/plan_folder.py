"""A plan's files in a folder of the session, for those who read a plan from its folder: the return, the roadmap, the export."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import pandas as pd

from dashboards.plan_job import Plan
from dashboards.uploads import session_folder
from planner.files import make_folder, write_texts
from planner.plan_files import with_absolute_paths
from planner.scenario import to_yaml

RECORDS = ("requests.parquet", "workers.parquet")


def plan_digest(plan: Plan) -> str:
    """Identity of a plan: sixteen hex digits of its ``plan.json``."""
    return hashlib.sha256(plan.files["plan.json"]).hexdigest()[:16]


def plan_folder(plan: Plan) -> Path:
    """The folder with everything that lies beside a plan; it goes away with the session."""
    session = session_folder()
    folder = session / f"plan-of-{plan_digest(plan)}"
    if not (folder / "plan.json").is_file():
        make_folder(folder)
        for name in RECORDS:
            if name in plan.files:
                (folder / name).write_bytes(plan.files[name])
        texts: dict[str, str] = {
            name: plan.files[name].decode("utf-8") for name in ("allocation.json", "plan.json") if name in plan.files
        }
        # uploaded files are named relative to the session that asks
        write_texts(folder, {"scenario.resolved.yaml": to_yaml(with_absolute_paths(plan.scenario, session)), **texts})
    return folder


def records_of(plan: Plan) -> tuple[pd.DataFrame, pd.DataFrame] | None:
    """Request and worker records of the plan's first repetition; None if the plan does not keep them."""
    if any(name not in plan.files for name in RECORDS):
        return None
    requests, workers = (pd.read_parquet(io.BytesIO(plan.files[name])) for name in RECORDS)
    return requests, workers
