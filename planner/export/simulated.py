"""Figures of the simulated run that a plan keeps beside it: what a healthy engine should show, for thresholds and alerts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from planner.export.metric_names import SERVICE_STAGES
from traces.problems import one_problem

FILE_NAME: Final = "requests.parquet"
FILE_BYTES_MAX: Final = 4 * 2**30
ROWS_MAX: Final = 50_000_000


@dataclass(frozen=True, slots=True)
class SimulatedFigures:
    """Of one simulated run, over its finished requests, the first ones with empty caches included."""

    n_requests: int
    stage_mean_s: Mapping[str, float]
    """Service stage (``denoise``, …) to its mean over requests."""
    lora_hit_ratio: float | None
    """Share of LoRA uses found in the host tier; None if no request has a LoRA."""


def read_simulated(plan_path: Path) -> SimulatedFigures | None:
    """Figures of the run beside a plan; None if the plan's folder has no ``requests.parquet``.

    Raises:
        InputError: the file is there and cannot be used.
    """
    path = (plan_path if plan_path.is_dir() else plan_path.parent) / FILE_NAME
    if not path.is_file():
        return None
    columns = ["status", "n_loras", "n_lora_misses", *(f"{stage}_s" for stage in SERVICE_STAGES)]
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise one_problem(str(path), f"is {path.stat().st_size} bytes", f"at most {FILE_BYTES_MAX}")
        with pq.ParquetFile(path) as stored:  # read_table would load pandas
            if stored.metadata.num_rows > ROWS_MAX:
                raise one_problem(str(path), "has too many rows", f"at most {ROWS_MAX}")
            table = stored.read(columns=columns)
    except (OSError, pa.ArrowException) as error:
        raise one_problem(
            str(path), f"cannot be read: {str(error)[:200]}", "the records that 'diffplan plan' wrote",
            "Plan again, or move the file away to export without the alerts that need it",
        ) from None  # fmt: skip
    missing = sorted(set(columns) - set(table.column_names))
    if missing:
        raise one_problem(
            str(path), f"lacks {', '.join(missing)}", "the records that 'diffplan plan' wrote", "Plan again"
        )
    try:
        done = table.filter(pc.match_like(table["status"], "done"))  # comparing with a Python text would load pandas
        totals = {name: float(pc.sum(done[name]).as_py() or 0.0) for name in columns if name != "status"}
    except (pa.ArrowException, TypeError) as error:
        raise one_problem(
            str(path),
            f"has columns of another type: {str(error)[:200]}",
            "the records that 'diffplan plan' wrote",
            "Plan again",
        ) from None
    if not all(math.isfinite(total) and total >= 0 for total in totals.values()):
        raise one_problem(str(path), "has times that are negative or no numbers", "finite times", "Plan again")
    if done.num_rows == 0:
        return None
    n_loras = totals["n_loras"]
    return SimulatedFigures(
        n_requests=done.num_rows,
        stage_mean_s={stage: totals[f"{stage}_s"] / done.num_rows for stage in SERVICE_STAGES},
        lora_hit_ratio=1.0 - totals["n_lora_misses"] / n_loras if n_loras else None,
    )
