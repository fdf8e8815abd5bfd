"""How soon ``diffplan watch`` finds a drift, and how often it sees one that is not there.

    python benchmarks/watch.py [--days 30] [--trials 40] [--first-seed 0] [--jobs 1] [--json FILE]

Live engines are simulated with the plan's own model of its service, on the planned allocation. Their traffic is a block bootstrap of the
scenario's trace: five-minute pieces from random places, each thinned (or laid over others) at random to the scenario's factor, so that
bursts within five minutes are the trace's and those beyond are independent. In plan, every day is judged as a running engine is: all charts over all
days in one go, with hysteresis. Drifts begin after an hour in plan; the delay is from there to the moment at which a look at the
records would have said so, which is the end of the deciding window and the wait for requests that may still run. A trial that is not
decided within the drift's two hours counts as not found. Service times have the profile's noise; a live engine's bias against the plan is not
simulated. Published rows are of seeds that nobody had looked at when the thresholds were chosen.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from joblib import Parallel, delayed

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine.allocation import Allocation, read_allocation  # noqa: E402
from planner.plan_files import write_plan  # noqa: E402
from planner.plan_run import make_plan  # noqa: E402
from planner.replication import load_inputs, service_table  # noqa: E402
from planner.scenario import Scenario, load_scenario  # noqa: E402
from planner.simulator import simulate  # noqa: E402
from planner.traffic import source_trace, stream_seed  # noqa: E402
from planner.watch.baseline import WARMUP_S, Baseline, charts_for, read_baseline, thresholds  # noqa: E402
from planner.watch.charts import run_chart  # noqa: E402
from planner.watch.verdict import CAUSES  # noqa: E402
from planner.watch.windows import Tally, WindowTable, windows_of_records  # noqa: E402
from planner.workload import build_workload  # noqa: E402
from traces.trace import Provenance, Trace  # noqa: E402

WINDOW_S = 60.0
BLOCK_S = 1800.0
PIECE_S = 300.0
DAY_S = 86_400.0
DRIFTS = {
    "all stages take 10 % longer": (1.10, 1.0, "engine_drifted"),
    "traffic rises by 25 %": (1.0, 1.25, "traffic_changed"),
    "traffic falls by 25 %": (1.0, 0.75, "traffic_changed"),
}


def block(scenario: Scenario, rate_ratio: float, seed: int) -> pd.DataFrame:
    """Half an hour of traffic: pieces of the scenario's trace, each from a place of its own and thinned anew."""
    trace = source_trace(scenario, ROOT)
    requests, rng = trace.requests, np.random.default_rng(seed)
    arrival_s = requests["arrival_s"].to_numpy()
    factor = scenario.traffic.scale_factor * rate_ratio
    parts = []
    for k in range(round(BLOCK_S / PIECE_S)):
        for copy in range(int(np.ceil(factor))):
            begin_s = rng.uniform(0.0, trace.duration_s - PIECE_S)
            chosen = (arrival_s >= begin_s) & (arrival_s < begin_s + PIECE_S)
            chosen &= rng.uniform(size=len(chosen)) < min(1.0, factor - copy)
            parts.append(requests[chosen].assign(arrival_s=arrival_s[chosen] - begin_s + k * PIECE_S))
    return pd.concat(parts, ignore_index=True).sort_values("arrival_s", ignore_index=True)


def live(scenario: Scenario, allocation: Allocation, blocks: list[tuple[float, float]], seed: int) -> pd.DataFrame:
    """Records of an engine; ``blocks`` gives for each half hour how slow it is and how much is asked for.

    A change of speed starts a run of its own, with queues and caches empty: that only makes a slow-down harder to see.
    """
    parts: list[pd.DataFrame] = []
    for k, (slow_ratio, rate_ratio) in enumerate(blocks):
        frame = block(scenario, rate_ratio, stream_seed(seed, "watch", k))
        parts.append(frame.assign(arrival_s=frame["arrival_s"] + k * BLOCK_S, slow=slow_ratio))
    frame = pd.concat(parts, ignore_index=True)
    frame["request_id"] = [f"r{k}" for k in range(len(frame))]
    done = []
    for slow_ratio, own in frame.groupby("slow", sort=False):
        offset_s = float(own["arrival_s"].iloc[0]) // BLOCK_S * BLOCK_S
        requests = own.drop(columns="slow").assign(arrival_s=own["arrival_s"] - offset_s).reset_index(drop=True)
        workload = build_workload(
            Trace(requests, Provenance(source="watch benchmark"), float(requests["arrival_s"].iloc[-1]))
        )
        inputs = load_inputs(scenario, ROOT)
        topology = allocation.pools_of("base")[0].topology
        table = service_table(scenario, inputs, workload, topology, draw=None, noise_seed=seed, allocation=allocation)
        services = {pool.name: table.slowed(float(slow_ratio)) for pool in allocation.pools_of("base")}
        result = simulate(
            workload, allocation, services, inputs.sizes, inputs.facts, world=scenario.world.world(seed)
        ).requests
        times = {name: result[name] + offset_s for name in ("arrival_s", "start_s", "end_s")}
        done.append(result.assign(**times))
    return pd.concat(done, ignore_index=True)


def table_of(records: pd.DataFrame, baseline: Baseline, begin_s: float) -> WindowTable:
    """Windows of records; the engine was seen until the last of them ended."""
    until_s = float(records["arrival_s"].max()) + baseline.plan.slo_latency_s
    return windows_of_records(records, baseline.norms, window_s=WINDOW_S, begin_s=begin_s, until_s=until_s)


def one_day(
    scenario: Scenario, allocation: Allocation, folder: Path, day: int, first_seed: int = 0
) -> dict[str, tuple[Any, Any]]:
    """Tallies of a day in plan."""
    baseline = read_baseline(folder, WINDOW_S)
    records = live(scenario, allocation, [(1.0, 1.0)] * round(DAY_S / BLOCK_S), first_seed + 1000 + day)
    table = table_of(records, baseline, WARMUP_S)
    return {name: (tally.n, tally.total) for name, tally in table.tallies.items()}


def one_drift(
    scenario: Scenario, allocation: Allocation, folder: Path, what: str, trial: int, first_seed: int = 0
) -> dict[str, Any]:
    """Delay of the first signal after a drift, and the verdict then."""
    baseline = read_baseline(folder, WINDOW_S)
    slow_ratio, rate_ratio, _ = DRIFTS[what]
    onset_s, n_before = 3600.0, 2
    blocks = [(1.0, 1.0)] * n_before + [(slow_ratio, rate_ratio)] * 4
    records = live(scenario, allocation, blocks, first_seed + 100_000 * (1 + list(DRIFTS).index(what)) + trial)
    table = table_of(records, baseline, WARMUP_S)
    charts = charts_for(baseline, table)
    first: dict[int, set[str]] = {}
    for chart, h in zip(charts, thresholds(charts, WINDOW_S), strict=True):
        on = run_chart(chart.evidence(table.tallies[chart.measure]), h).is_on
        if on.any():
            first.setdefault(int(np.argmax(on)), set()).add(chart.measure)
    if not first:
        return {"delay_s": None, "cause": None}
    place = min(first)
    cause = next(cause for cause, measures in CAUSES.items() if first[place] & set(measures))
    return {"delay_s": float(table.start_s[place]) + WINDOW_S + baseline.plan.slo_latency_s - onset_s, "cause": cause}


def in_plan(baseline: Baseline, days: list[dict[str, tuple[Any, Any]]]) -> dict[str, Any]:
    """All days as one run of an engine."""
    tallies = {
        name: Tally(np.concatenate([day[name][0] for day in days]), np.concatenate([day[name][1] for day in days]))
        for name in days[0]
    }
    n = len(tallies["traffic_rate"].n)
    table = WindowTable(WARMUP_S + WINDOW_S * np.arange(n), WINDOW_S, tallies)
    charts = charts_for(baseline, table)
    needed = {f"{c.measure} {c.direction}": h for c, h in zip(charts, thresholds(charts, WINDOW_S), strict=True)}
    courses = {
        name: run_chart(c.evidence(tallies[c.measure]), h) for c, (name, h) in zip(charts, needed.items(), strict=True)
    }
    alarms = {name: course.n_signals for name, course in courses.items() if course.n_signals}
    highest = {name: round(float(course.score.max()) / needed[name], 3) for name, course in courses.items()}
    n_days = n * WINDOW_S / DAY_S
    return {
        "case": "in plan", "n_days": round(n_days, 2), "n_charts": len(charts),
        "thresholds": {name: round(h, 3) for name, h in needed.items()},
        "n_requests": int(tallies["late"].n.sum()), "n_false_alarms": sum(alarms.values()), "false_alarms_by_chart": alarms,
        "false_alarms_per_30_days": round(30 * sum(alarms.values()) / n_days, 3),
        "highest_score_over_threshold": highest,
        "dispersion": {f"{c.measure} {c.direction}": round(c.dispersion, 2) for c in charts if c.dispersion > 1},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--scenario", default="sample:small")
    parser.add_argument("--days", type=int, default=30)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--first-seed", type=int, default=0, help="shifts every seed: other traffic, other noise")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    scenario, folder = load_scenario(args.scenario)
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        result = make_plan(scenario, folder, jobs=args.jobs)
        write_plan(result, scenario, folder, out)
        baseline = read_baseline(out, WINDOW_S)
        allocation = read_allocation(out / "allocation.json")
        run = Parallel(n_jobs=args.jobs)
        days = run(delayed(one_day)(scenario, allocation, out, day, args.first_seed) for day in range(args.days))
        rows = [in_plan(baseline, days)]
        print(json.dumps(rows[0]), flush=True)
        for what, (_, _, cause) in DRIFTS.items():
            found = run(
                delayed(one_drift)(scenario, allocation, out, what, trial, args.first_seed)
                for trial in range(args.trials)
            )
            delays = sorted(each["delay_s"] for each in found if each["delay_s"] is not None)
            rows.append(
                {
                    "case": what, "n_trials": len(found),
                    "found_within_30_min": sum(0 < delay <= 1800 for delay in delays),
                    "signalled_before": sum(delay <= 0 for delay in delays),
                    "not_found_within_2_h": len(found) - len(delays),
                    "right_cause": sum(each["cause"] == cause for each in found),
                    "delay_min": {str(q): round(float(np.quantile(delays, q)) / 60, 1) for q in (0.5, 0.9, 1.0)} if delays else {},
                }
            )  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    plain = {
        "benchmark": "watch", "scenario": args.scenario, "first_seed": args.first_seed, "window_s": WINDOW_S, "planned_per_s": round(baseline.plan.traffic.mean_per_s, 4),
        "n_gpus": allocation.n_gpus, "rows": rows,
    }  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
