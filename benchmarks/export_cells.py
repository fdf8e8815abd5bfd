"""What becomes of a plan when it is exported to nodes: one queue, a Service, HAProxy; and how many GPUs keep the promise.

    diffplan plan sample:provider --out provider; diffplan plan sample:provider_fast --out fast
    python benchmarks/export_cells.py provider fast [--gpus-per-node 8] [--balancers 2]

Each plan is simulated as ``diffplan export`` does it (``planner/export/pods_check.py``), over the plan's own repetitions. Writes
``benchmarks/results/export_cells.json``; wall seconds are of this machine, everything else is the same on every one.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from planner.export.cluster import Balancer, Cluster, Store
from planner.export.pods_check import check_pods
from planner.export.pods_text import check_plain
from planner.export.source import load_source

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "export_cells.json"


def row(plan: Path, gpus_per_node: int, n_balancers: int) -> dict[str, Any]:
    """One plan behind one kind of front; ``n_balancers`` 0: a Service."""
    source = load_source(plan, "", datetime.date(2026, 12, 1), is_forced=True)
    cluster = Cluster(
        image="a:1",
        store=Store(volume_claim="m"),
        gpus_per_node=gpus_per_node,
        balancer=Balancer(image="haproxy:3.0", replicas=n_balancers) if n_balancers else None,
    )
    start_s = time.perf_counter()
    check = check_pods(plan, source, cluster, lambda text: print(text, file=sys.stderr))
    wall_s = time.perf_counter() - start_s
    plain = check_plain(check, source, source.provenance)
    del plain["schema_version"], plain["provenance"]
    return {
        "scenario": source.provenance.scenario_name,
        "plan_id": source.provenance.plan_id,
        "gpus_per_node": gpus_per_node,
        **plain,
        "wall_s": round(wall_s, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", type=Path, nargs="+", help="folders that 'diffplan plan' wrote")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--balancers", type=int, default=2)
    asked = parser.parse_args()
    rows = [row(plan, asked.gpus_per_node, n) for plan in asked.plans for n in (0, asked.balancers)]
    for one in rows:
        seen, found = one["as_exported"], one["proposal"]
        print(
            f"{one['scenario']}, {one['balancing']}: {seen['slo_attainment_ratio']:.2%} in time, kept: {one['is_kept']}, "
            f"proposal: {found and found['n_gpus']} GPUs, {one['wall_s']} s"
        )
    plain = {
        "benchmark": "export_cells",
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 1),
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
