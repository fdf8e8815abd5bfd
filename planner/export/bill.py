"""The bill of GPUs as JSON and CSV, for finance and for other tools; the fields are described in ``docs/export.md``."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Final

from planner.export.counts import PoolCount
from planner.export.source import Source
from planner.plan_record import Estimate, PlanRecord

SCHEMA_VERSION: Final = 1
CSV_COLUMNS: Final = (
    "pool", "role", "topology", "gpu_kind", "purchase", "n_replicas", "n_gpus_per_replica", "workers_per_gpu", "n_gpus",
    "price_usd_per_gpu_hour", "hours_per_month", "gpu_hours_per_month", "cost_usd_per_month", "price_date",
    "price_table_id", "plan_id", "profile_id", "scenario_name", "command", "warnings",
)  # fmt: skip
_FORMULA_STARTS: Final = ("=", "+", "-", "@", "\t", "\r", "'")


def bill_plain(source: Source) -> dict[str, Any]:
    """The bill as JSON values. Dollars and hours are exact decimal products of the plan's numbers."""
    plan, ids = source.plan, source.plan.ids
    hours = Decimal(str(ids.hours_per_month))
    price_of = {pool.gpu_kind: _price(plan, pool.gpu_kind) for pool in source.allocation.pools}
    rows = [
        {
            "pool": pool.name,
            "role": pool.role,
            "topology": pool.topology,
            "gpu_kind": pool.gpu_kind,
            "purchase": ids.purchase,
            "n_replicas": pool.n_replicas,
            "n_gpus_per_replica": pool.n_gpus_per_replica,
            "workers_per_gpu": pool.workers_per_gpu,
            "n_gpus": pool.n_gpus,
            "price_usd_per_gpu_hour": float(price_of[pool.gpu_kind]),
            "hours_per_month": float(hours),
            "gpu_hours_per_month": float(pool.n_gpus * hours),
            "cost_usd_per_month": float(pool.n_gpus * hours * price_of[pool.gpu_kind]),
        }
        for pool in source.allocation.pools
    ]
    n_gpus = source.allocation.n_gpus
    row = source.row
    return {
        "schema_version": SCHEMA_VERSION,
        "provenance": source.provenance.to_plain(),
        "verdict": plan.verdict,
        "sentence": source.sentence,
        "promise": {"latency_s": plan.slo_latency_s, "attainment_ratio": plan.slo_attainment_ratio},
        "expected": None
        if row is None
        else {
            "topology": row.topology,
            "slo_attainment_ratio": _estimate(row.slo_attainment_ratio),
            "in_slo_images_per_s": _estimate(row.in_slo_images_per_s),
            "latency_p50_s": _estimate(row.latency_p50_s),
            "latency_p95_s": _estimate(row.latency_p95_s),
            "latency_p99_s": _estimate(row.latency_p99_s),
            "cost_usd_per_1000_images": _estimate(row.cost_usd_per_1000_images),
        },
        "currency": "USD",
        "rows": rows,
        "total": {
            "n_gpus": n_gpus,
            "gpu_hours_per_month": float(n_gpus * hours),
            "cost_usd_per_month": float(
                sum(pool.n_gpus * hours * price_of[pool.gpu_kind] for pool in source.allocation.pools)
            ),
            "planned_cost_usd_per_month": source.cost_usd_per_month,
        },
    }


def _price(plan: PlanRecord, gpu_kind: str) -> Decimal:
    """Of a kind that the plan weighed against its own, or its own."""
    if plan.kinds is None or gpu_kind == plan.ids.profile_gpu_kind:
        return Decimal(str(plan.ids.price_usd_per_gpu_hour))
    return Decimal(str(plan.kinds.price_of(gpu_kind)))


def bill_json(source: Source) -> str:
    """The bill as a JSON file."""
    return json.dumps(bill_plain(source), indent=2, ensure_ascii=True, allow_nan=False) + "\n"


def bill_csv(source: Source) -> str:
    """The bill as a CSV file (RFC 4180, every text quoted, ``\\n`` line ends), one row a pool.

    A text that a spreadsheet would take for a formula, or that begins with an apostrophe, gets an apostrophe in front;
    :func:`read_bill_csv` takes it away again.
    """
    plain = bill_plain(source)
    shared = {key: plain["provenance"][key] for key in CSV_COLUMNS if key in plain["provenance"]}
    shared["warnings"] = " ".join(source.provenance.warnings)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, CSV_COLUMNS, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writeheader()
    for row in plain["rows"]:
        writer.writerow({key: _cell(value) for key, value in {**shared, **row}.items()})
    return stream.getvalue()


def read_bill_json(text: str) -> tuple[PoolCount, ...]:
    """The counts a JSON bill states."""
    return _counts(json.loads(text)["rows"])


def read_bill_csv(text: str) -> tuple[PoolCount, ...]:
    """The counts a CSV bill states."""
    rows = csv.DictReader(io.StringIO(text, newline=""))
    return _counts([{key: value.removeprefix("'") for key, value in row.items()} for row in rows])


def _counts(rows: list[Mapping[str, Any]]) -> tuple[PoolCount, ...]:
    return tuple(
        sorted(
            PoolCount(row["pool"], row["role"], row["gpu_kind"], int(row["n_replicas"]), int(row["n_gpus"]))
            for row in rows
        )
    )


def _estimate(estimate: Estimate) -> dict[str, float | None]:
    return {"mean": estimate.mean, "low": estimate.low, "high": estimate.high}


def _cell(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA_STARTS) else value
