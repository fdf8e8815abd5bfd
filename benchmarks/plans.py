"""What diffplan recommends for a list of scenarios, as rows that the README and notes may cite.

    python benchmarks/plans.py sample:provider sample:provider_fast examples/gentd26.yaml examples/gentd26_x100.yaml

Writes ``benchmarks/results/plans.json``. The GenTD26 scenarios need the imported trace beside them; see examples/README.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "plans.json"


def row_of(scenario: str) -> dict[str, object]:
    """Plans one scenario and keeps what decides."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "planner", "plan", scenario, "--out", f"{folder}/out", "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in (0, 3):
        sys.exit(f"{scenario}: exit code {done.returncode}")
    plan = json.loads(done.stdout)
    topologies = [
        {
            "topology": row["topology"],
            "verdict": row["verdict"],
            "pools": {pool["name"]: pool["n_replicas"] for pool in row["pools"]},
            "n_gpus": row["n_gpus"],
            "mean_load_gpus": row["mean_load_gpus"],
            "cost_usd_per_month": row["cost_usd_per_month"],
            "latency_p50_s": row["latency_p50_s"]["mean"],
            "latency_p99_s": row["latency_p99_s"]["mean"],
            "slo_attainment_ratio": row["slo_attainment_ratio"],
            "why": row["why"],
        }
        for row in plan["topologies"]
    ]
    return {
        "scenario": scenario,
        "exit_code": done.returncode,
        "sentence": plan["sentence"],
        "limited_by": plan["limited_by"],
        "runner_up": plan["runner_up"],
        "topologies": topologies,
        "ids": plan["ids"],
    }


def main() -> None:
    rows = [row_of(scenario) for scenario in sys.argv[1:]]
    RESULTS.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for row in rows:
        print(row["scenario"], "→", row["sentence"])


if __name__ == "__main__":
    main()
