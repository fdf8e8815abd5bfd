"""How much faster a sweep of 200 allocations is on two processes than on one: wall seconds in turn, in one run.

    python benchmarks/sweep_scaling.py [--rounds 1] [--json FILE]

Each sweep is a command of its own with a fresh store, start-up included; the stores must hold the same figures.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SCENARIO = """name: sweep_scaling
traffic: {trace: "sample:katz_a_hour", scale_factor: 0.5, shift_law: independent, window: {start_h: 0, end_h: 0.5}}
slo: {latency_s: 25}
profile: {name: h200}
"""
POINTS = ("--topology", "colocated", "--replicas", "4:203")
N_ALLOCATIONS = 200


def timed(jobs: int) -> tuple[float, str]:
    """Wall seconds of one sweep, and the digest of what it said."""
    with tempfile.TemporaryDirectory() as folder:
        question = Path(folder) / "scenario.yaml"
        question.write_text(SCENARIO, encoding="utf-8")
        command = [
            sys.executable, "-m", "planner", "sweep", str(question), *POINTS, "--store", f"{folder}/store", "--jobs", str(jobs), "--json",
        ]  # fmt: skip
        began = time.perf_counter()
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
        wall_s = time.perf_counter() - began
    if len(json.loads(done.stdout)) != N_ALLOCATIONS:
        sys.exit(f"the sweep has {len(json.loads(done.stdout))} rows, not {N_ALLOCATIONS}")
    return wall_s, hashlib.sha256(done.stdout).hexdigest()[:16]


def main() -> None:
    """Times both in turn, prints and writes the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "sweep_scaling.json")
    options = parser.parse_args()
    seconds: dict[int, list[float]] = {1: [], 2: []}
    digests = set()
    for _ in range(options.rounds):
        for jobs, walls in seconds.items():
            wall_s, digest = timed(jobs)
            walls.append(wall_s)
            digests.add(digest)
            print(f"{jobs} process{'es' if jobs > 1 else ''}: {wall_s:.1f} s", flush=True)
    if len(digests) != 1:
        sys.exit("the sweeps differ, and must not")
    # the ratio of one round's two runs, then the median: a disturbance of a shared machine hits both
    ratio = statistics.median(one / two for one, two in zip(seconds[1], seconds[2], strict=True))
    print(f"two processes are {ratio:.2f} times as fast as one; equal bytes")
    record: dict[str, Any] = {
        "benchmark": "sweep_scaling", "n_allocations": N_ALLOCATIONS, "rounds": options.rounds, "digest": digests.pop(),
        "one_process_s": [round(wall_s, 1) for wall_s in seconds[1]], "two_processes_s": [round(wall_s, 1) for wall_s in seconds[2]],
        "ratio": round(ratio, 3),
    }  # fmt: skip
    options.json.parent.mkdir(parents=True, exist_ok=True)
    beside = options.json.with_suffix(".tmp")
    beside.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    beside.replace(options.json)


if __name__ == "__main__":
    main()
