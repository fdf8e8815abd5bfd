"""What diffplan recommends for a list of scenarios, and how long it takes, as rows that the README and notes may cite.

    python benchmarks/plans.py --suite [--jobs 2]
    python benchmarks/plans.py sample:provider examples/gentd26.yaml

Writes ``benchmarks/results/plans.json``, with the decision sentences of ``diffplan roi``, and from it ``docs/decisions.md``; ``--keep``
keeps the rows of scenarios that are not named. ``--suite`` is the standard suite of examples/suite/README.md; synthetic traces that are
not there yet are made first. The GenTD26 scenarios need the imported trace beside them (examples/README.md) and are left out without.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "plans.json"
SUITE: Final = (
    "sample:small", "sample:provider", "sample:provider_fast", "examples/gentd26.yaml", "examples/gentd26_x100.yaml",
    "examples/suite/katz_a.yaml", "examples/suite/katz_a_x100.yaml", "examples/suite/katz_b.yaml", "examples/suite/katz_b_x100.yaml",
)  # fmt: skip
SYNTHETIC: Final = {
    "katz_a": ("A", 164_194, 165, 480.0), "katz_a_x100": ("A", 164_194, 165, 4.8),
    "katz_b": ("B", 385_239, 302, 480.0), "katz_b_x100": ("B", 385_239, 302, 4.8),
}  # fmt: skip
"""Trace to service, requests, instances (as published) and hours."""


def make_traces(folder: Path) -> None:
    """Synthesises what is not there yet; the seed gives the same bytes."""
    for name, (service, n_requests, n_instances, hours) in SYNTHETIC.items():
        path = folder / f"{name}.parquet"
        if not path.exists():
            subprocess.run(
                [
                    sys.executable, "-m", "planner", "trace", "synth", "--service", service, "--requests", str(n_requests),
                    "--instances", str(n_instances), "--hours", str(hours), "--seed", "0", "--out", str(path),
                ],
                stdout=subprocess.DEVNULL, check=True,
            )  # fmt: skip


def row_of(scenario: str, jobs: int) -> dict[str, Any]:
    """Plans one scenario and keeps what decides."""
    before, began = _children_s(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "planner", "plan", scenario, "--out", f"{folder}/out", "--jobs", str(jobs), "--json"
        ]  # fmt: skip
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        wall_s, cpu_s = time.perf_counter() - began, _children_s() - before
        if done.returncode not in (0, 3):
            sys.exit(f"{scenario}: exit code {done.returncode}")
        plan = json.loads(done.stdout)
        decision = decision_of(f"{folder}/out") if plan["recommended"] is not None else None
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
    found: dict[str, Any] = {
        "scenario": scenario,
        "exit_code": done.returncode,
        "wall_s": round(wall_s, 1),
        "cpu_s": round(cpu_s, 1),
        "jobs": jobs,
        "n_requests": plan["traffic"]["n_requests"],
        "sentence": plan["sentence"],
        "decision": decision,
        "limited_by": plan["limited_by"],
        "runner_up": plan["runner_up"],
        "topologies": topologies,
        "flip_points": [
            {name: flip[name] for name in ("what", "winner_until", "then", "simulated", "is_confirmed")}
            for flip in plan["flip_points"]
            if flip["winner_until"] is not None
        ],
        "ids": plan["ids"],
    }
    if plan["selection"]:
        found["checked_by"] = plan["selection"].get("checked_by")
    if plan["autoscaling"]:
        found["autoscaling"] = {name: plan["autoscaling"][name] for name in ("verdict", "why", "saving_usd_per_month")}
    if plan["add_ons"]:
        found["add_ons"] = [
            {name: row[name] for name in ("add_on_id", "kind", "use_ratio", "cost_usd_per_month", "placement", "why")}
            for row in plan["add_ons"]["rows"]
        ]
    for name in ("settings", "purchasing"):
        if plan.get(name):
            found[name] = plan[name]["sentence"]
    return found


def decision_of(plan: str) -> dict[str, str]:
    """The sentences for a meeting, under the default assumptions: ``en`` and ``ja``."""
    command = [sys.executable, "-m", "planner", "roi", plan, "--no-roadmap", "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    said: dict[str, str] = json.loads(done.stdout)["decision"]
    return said


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Plans every scenario, prints a line each, writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenarios", nargs="*")
    parser.add_argument("--suite", action="store_true")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    wanted = list(options.scenarios)
    if options.suite:
        make_traces(ROOT / "examples" / "suite")
        has_log = (ROOT / "examples" / "gentd26.parquet").exists()
        wanted += [name for name in SUITE if has_log or "gentd26" not in name]
    old = json.loads(RESULTS.read_text(encoding="utf-8")) if options.keep else []
    known = {row["scenario"]: row for row in old}
    for scenario in wanted:
        row = row_of(scenario, options.jobs)
        known[scenario] = row
        _write(list(known.values()))  # after each: minutes of work are not lost with the next one
        print(f"{scenario}: {row['wall_s']:.1f} s ({row['cpu_s']:.1f} s of CPU) → {row['sentence']}", flush=True)
    subprocess.run([sys.executable, str(ROOT / "docs" / "make_decisions_page.py")], check=True)


def _write(rows: list[dict[str, Any]]) -> None:
    ordered = sorted(rows, key=lambda row: SUITE.index(row["scenario"]) if row["scenario"] in SUITE else len(SUITE))
    beside = RESULTS.with_suffix(".tmp")
    beside.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(RESULTS)


if __name__ == "__main__":
    main()
