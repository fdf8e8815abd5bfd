"""Times whole commands as their users run them: wall time and peak memory, several runs, spread shown.

    python benchmarks/commands.py make-plan -- diffplan plan sample:provider --out {out}

``{out}`` becomes a fresh folder for each run. Appends one JSON row to ``benchmarks/results/commands.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "commands.jsonl"


def memory_of_tree_bytes(pid: int) -> int:
    """Proportional resident memory of a process and all its children, from Linux' /proc; 0 where it is gone."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
        except OSError:  # the process ended while we looked
            continue
    total, todo = 0, [pid]
    while todo:
        one = todo.pop()
        todo += children.get(one, [])
        try:
            for line in Path(f"/proc/{one}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
        except OSError:
            continue
    return total


def run_once(command: list[str]) -> tuple[float, int, int]:
    """Wall seconds, peak bytes of the process tree, exit code."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = [0]

    def watch() -> None:
        while process.poll() is None:
            peak[0] = max(peak[0], memory_of_tree_bytes(process.pid))
            time.sleep(0.25)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    code = process.wait()
    seconds = time.perf_counter() - start
    watcher.join()
    return seconds, peak[0], code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="name of the row")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("command", nargs=argparse.REMAINDER, help="after --, the command")
    arguments = parser.parse_args()
    command = [part for part in arguments.command if part != "--"]
    runs = []
    for _ in range(arguments.runs):
        with tempfile.TemporaryDirectory() as folder:
            runs.append(run_once([part.replace("{out}", f"{folder}/out") for part in command]))
        sys.stderr.write(f"{runs[-1][0]:.1f} s, {runs[-1][1] / 2**30:.2f} GiB, exit code {runs[-1][2]}\n")
    row = {
        "benchmark": arguments.name,
        "command": " ".join(command),
        "wall_s_median": round(statistics.median(run[0] for run in runs), 2),
        "wall_s_min": round(min(run[0] for run in runs), 2),
        "wall_s_max": round(max(run[0] for run in runs), 2),
        "peak_gib_max": round(max(run[1] for run in runs) / 2**30, 3),
        "exit_codes": sorted({run[2] for run in runs}),
        "n_runs": len(runs),
        "n_cores": os.cpu_count(),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as stream:
        stream.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=2))


if __name__ == "__main__":
    main()
