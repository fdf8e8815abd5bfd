"""Sums up a replay of ``benchmarks/replay_cells.py``: medians by number of ControlNets and LoRAs, starts and attaches.

python benchmarks/replay_cells_rows.py replayed --what "36 requests of 20 steps in 90 s on one NVIDIA H200"
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any, Final

import pandas as pd

RESULTS: Final = Path(__file__).parent / "results" / "engine_replay.json"
SECONDS: Final = ("latency_s", "denoise_s", "lora_wait_s", "text_s", "decode_s")
TIMED: Final = ("ready", "attach", "drain")


def cells(requests: pd.DataFrame) -> list[dict[str, Any]]:
    """Medians over what was done, by cell."""
    rows = []
    done = requests[requests["status"] == "done"]
    for (n_controlnets, n_loras), part in done.groupby(["n_controlnets", "n_loras"]):
        steps = sorted({int(step) for step in part["lora_patch_step"].dropna()})
        rows.append({
            "cell": f"{n_controlnets}C{n_loras}L",
            "n": len(part),
            **{name: float(part[name].median()) for name in SECONDS},
            "patch_steps": "–" if not steps else f"{steps[0]}–{steps[-1]}" if len(steps) > 1 else str(steps[0]),
        })  # fmt: skip
    return rows


def durations(events: Path) -> dict[str, dict[str, float]]:
    """Starts, attaches and drains by pool."""
    found: dict[str, list[float]] = {}
    for line in events.read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        if event["kind"] in TIMED and event["duration_s"] is not None:
            name = f"{event['kind']} {event['pool']}" + (f" {event['detail']}" if event["kind"] == "attach" else "")
            found.setdefault(name, []).append(event["duration_s"])
    return {
        name: {"n": len(values), "median": round(statistics.median(values), 4), "max": round(max(values), 4)}
        for name, values in sorted(found.items())
    }


def sentence(summary: dict[str, Any]) -> str:
    """The whole replay in words."""
    latency, busy = summary["latency_s"]["all"], summary["busy_ratio"]
    shares = ", ".join(f"{worker} {share:.0%}" for worker, share in sorted(busy.items()))
    return (
        f"{summary['n_by_status'].get('done', 0)} of {summary['n_due']} requests done, {summary['n_retried']} tried again, "
        f"{summary['slo_attainment_ratio']:.0%} within {summary['slo_latency_s']:g} s; latency {latency['p50']:.2f} s (median), "
        f"{latency['p95']:.2f} s (p95); LoRAs in the host tier for {summary['lora_warm_hit_ratio']:.0%} of their uses; busy: {shares}."
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", type=Path, help="with requests.parquet, summary.json and events.jsonl (or engine/events.jsonl)"
    )
    parser.add_argument("--what", required=True, help="what was played, on which GPU")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    summary = json.loads((options.folder / "summary.json").read_text(encoding="utf-8"))
    events = next(
        path for path in (options.folder / "events.jsonl", options.folder / "engine" / "events.jsonl") if path.exists()
    )
    row = {
        "benchmark": "replay_cells",
        "what": options.what,
        "sentence": sentence(summary),
        "cells": cells(pd.read_parquet(options.folder / "requests.parquet")),
        "duration_s": durations(events),
        "summary": summary,
    }
    beside = options.out.with_name(options.out.name + ".part")
    beside.write_text(json.dumps(row, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(options.out)


if __name__ == "__main__":
    main()
