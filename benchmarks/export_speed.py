"""Times ``diffplan export --to all`` on a plan of 500 workers: in process, target by target, and as a whole command.

    diffplan plan sample:small --out plan-out
    python benchmarks/export_speed.py plan-out

The plan is that of the sample with its base pool grown to 500 replicas, its cost with it; its simulated records stay as they are.
Simulating the exported pods is left out: it is planning, not writing, and takes as long as the traffic makes it (``export_cells.py``).
The command is set beside ``diffplan --help``, which loads nothing: the difference is what exporting costs. Writes
``benchmarks/results/export_speed.json``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from planner.export.cluster import load_cluster
from planner.export.run import TARGETS, export_texts
from planner.export.source import load_source
from planner.export.tree import write_tree

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "export_speed.json"
CLUSTER = ROOT / "examples" / "export" / "cluster.yaml"
N_WORKERS = 500


def grown(plan_folder: Path, out: Path) -> Path:
    """The plan with 500 base replicas, in a folder of its own."""
    plain = json.loads((plan_folder / "plan.json").read_text(encoding="utf-8"))
    (pool,) = plain["allocation"]["pools"]
    pool["n_replicas"] = N_WORKERS
    n_gpus = N_WORKERS * pool["n_gpus_per_replica"]
    ids = plain["ids"]
    for row in plain["topologies"]:
        if row["topology"] == plain["recommended"]:
            row["cost_usd_per_month"] = n_gpus * ids["price_usd_per_gpu_hour"] * ids["hours_per_month"]
            row["n_gpus"] = n_gpus
    out.mkdir()
    (out / "plan.json").write_text(json.dumps(plain), encoding="utf-8")
    shutil.copy(plan_folder / "requests.parquet", out)
    return out


def median_s(what: Callable[[], object], runs: int) -> dict[str, float]:
    """Median and extremes of wall seconds, median of CPU seconds; the first call is not counted."""
    what()
    seconds, cpu_seconds = [], []
    for _ in range(runs):
        start, before = time.perf_counter(), os.times()
        what()
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(
            sum(os.times()[:4]) - sum(before[:4])
        )  # children's too; on a busy machine the steadier figure
    return {
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "max_s": max(seconds),
        "median_cpu_s": statistics.median(cpu_seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path, help="folder of a plan with one pool")
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        plan = grown(arguments.plan, folder / "plan")
        cluster, _ = load_cluster(CLUSTER)
        today = datetime.date(2026, 12, 1)

        def whole() -> None:
            source = load_source(plan, "diffplan export", today, is_forced=True)
            write_tree(folder / "out", export_texts(source, TARGETS, cluster).texts)

        source = load_source(plan, "diffplan export", today, is_forced=True)
        rows = {"read, all targets, written": median_s(whole, arguments.runs)}
        for target in TARGETS:
            rows[target] = median_s(lambda target=target: export_texts(source, (target,), cluster), arguments.runs)

        def command(*words: str) -> Callable[[], object]:
            return lambda: subprocess.run(
                [sys.executable, "-m", "planner", *words], check=True, capture_output=True, timeout=120
            )

        words = (
            "export",
            str(plan),
            "--to",
            "all",
            "--cluster",
            str(CLUSTER),
            "--out",
            str(folder / "o"),
            "--force",
            "--no-check-pods",
        )
        rows["whole command"] = median_s(command(*words), arguments.runs)
        rows["diffplan --help"] = median_s(command("--help"), arguments.runs)
        files = [path for path in (folder / "out").rglob("*") if path.is_file()]
        n_bytes = sum(path.stat().st_size for path in files)
    ratio = rows["whole command"]["median_s"] / rows["diffplan --help"]["median_s"]
    result = {
        "benchmark": "export_speed",
        "n_workers": N_WORKERS,
        "n_files": len(files),
        "n_bytes": n_bytes,
        "runs": arguments.runs,
        "rows": rows,
        "command_over_help_ratio": ratio,
        "machine": {"python": platform.python_version(), "cores": os.cpu_count(), "load_before": os.getloadavg()[0]},
    }
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for name, row in rows.items():
        sys.stdout.write(
            f"{name:<28} {row['median_s']:.3f} s ({row['min_s']:.3f}..{row['max_s']:.3f}), {row['median_cpu_s']:.3f} s of CPU\n"
        )
    sys.stdout.write(f"{len(files)} files, {n_bytes} bytes; the command takes {ratio:.1f} times as long as --help\n")


if __name__ == "__main__":
    main()
