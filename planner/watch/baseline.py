"""What the plan says its service looks like, as charts: in-plan means and dispersions from its simulated run, and the shifts to find."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
import pandas as pd
from scipy.stats import chi2

from planner.plan_record import PlanRecord, read_plan
from planner.watch.charts import Chart
from planner.watch.law_spread import LawSpread, law_spreads
from planner.watch.windows import MIX, QUANTILES, STAGES, Norms, Tally, WindowTable, norms_of, windows_of_records
from planner.workload import Floats
from traces.problems import one_problem
from traces.reader import read_table
from traces.records import REQUEST_RECORD_COLUMNS

DAY_S: Final = 86_400.0
HOUR_S: Final = 3600.0
WARMUP_S: Final = 300.0
"""Of the plan's run and of a live engine: empty caches are not what was planned for."""
FALSE_ALARM_S: Final = 30 * DAY_S
"""At most one false alarm in this time, over all charts together."""
RATE: Final = "traffic_rate"
RATE_BUDGET: Final = 0.5
"""Share of the false alarms that may come from the traffic's rate."""
OVERSHOOT: Final = 1.61
"""log of the least, over all g, of ``exp(1.166 * sqrt(2 g)) / g``: what the mean time to a false signal has over ``exp(h)`` in
Siegmund's approximation (Sequential Analysis, 1985, 2.52) for evidence of mean ``-g`` and variance ``2 g`` a window."""
TRAFFIC_SHIFT: Final = 0.25
STAGE_SHIFT: Final = 0.10
STAGE_SD_MIN: Final = 0.05
"""Composed laws and whole images of the shipped profile are up to 4 % apart: requests that differ by less are not evidence."""
STAGE_SHARE_MIN: Final = 0.02
"""Stages under 2 % of the service time are not watched (as in exported alerts)."""
MISS_SHIFT: Final = 0.05
MIX_SD_MIN_RATIO: Final = 0.1
MIX_ABSENT: Final = 0.1
"""Uses per request that are a change where the plan has none."""
QUANTILE_SHIFTED: Final = {"latency_p50": 0.65, "latency_p95": 0.10, "latency_p99": 0.03}
SHARE_MIN: Final = 1e-4
BATCHES_MIN: Final = 8
SCALES: Final = (1, 5, 15)
"""Windows put together to see how much more their sums vary than independent ones would."""
DISPERSION_LEVEL: Final = 0.95
"""Queues and caches remember: few windows know little of how much they vary, so their charts use an upper limit of it."""
REQUESTS_MIN: Final = 200
CAUSES: Final[Mapping[str, tuple[str, ...]]] = {
    "traffic_changed": ("traffic_rate", *MIX, "lora_misses"),
    "engine_drifted": tuple(f"stage_{stage}" for stage in STAGES),
    "capacity_short": ("late", *QUANTILES),
}


@dataclass(frozen=True, slots=True, eq=False)
class Baseline:
    """A plan, ready to be compared with."""

    plan: PlanRecord
    path: Path
    norms: Norms
    table: WindowTable
    """The plan's own windows, after its warm-up."""
    requests: pd.DataFrame
    spreads: Mapping[str, LawSpread] | None
    """Stage to what the calibration leaves open; None if it is not known."""
    is_by_bucket: bool = False
    """Whether latencies and stages are those of counters."""

    def expected_rate_per_s(self, start_s: Floats, offset_s: float) -> Floats:
        """Planned requests a second at each live window: by hour of the day where the plan has whole days, else their mean."""
        duration_s = self.plan.traffic.duration_s
        arrival_s = self.requests["arrival_s"].to_numpy(dtype=np.float64)
        if duration_s < DAY_S:
            return np.full(len(start_s), len(arrival_s) / duration_s)
        n_days = int(duration_s // DAY_S)
        hour = (arrival_s[arrival_s < n_days * DAY_S] % DAY_S // HOUR_S).astype(np.int64)
        rate = np.bincount(hour, minlength=24) / (n_days * HOUR_S)
        # an hour without any planned request still gets some: half of one, or its first would be beyond all doubt
        rate = np.maximum(rate, 0.5 / (n_days * HOUR_S))
        live: Floats = rate[((start_s + offset_s) % DAY_S // HOUR_S).astype(np.int64)]
        return live


def read_baseline(path: Path, window_s: float, buckets_s: Sequence[float] = ()) -> Baseline:
    """Reads a plan and the run it keeps beside it.

    Args:
        buckets_s: bounds of the live histogram, where counters are compared: latencies are then told apart there only.

    Raises:
        InputError: the plan recommends nothing, has no run beside it, or too few requests to compare with.
    """
    plan = read_plan(path)
    folder = path if path.is_dir() else path.parent
    if not (folder / "requests.parquet").is_file():
        raise one_problem(
            str(folder), "has no requests.parquet", "the run that 'diffplan plan' writes beside a plan", "Plan again"
        )
    requests = read_table(folder / "requests.parquet", REQUEST_RECORD_COLUMNS)
    spreads = law_spreads(plan, folder)
    if plan.recommended is None:
        raise one_problem(str(folder), "recommends nothing", "a plan that is in force", "Name the plan you deployed")
    row = plan.row(plan.recommended)
    steady = requests[requests["arrival_s"] >= WARMUP_S]
    if len(steady) < REQUESTS_MIN:
        raise one_problem(
            f"{folder}/requests.parquet", f"has {len(steady)} requests after its first {WARMUP_S:g} s", f"at least {REQUESTS_MIN}",
            "Plan with a longer stretch of traffic",
        )  # fmt: skip
    latency_s = steady["latency_s"].dropna().to_numpy(dtype=np.float64)
    bounds = {}
    for name, share in QUANTILES.items():
        interval = getattr(row, f"{name}_s")
        bound_s = max(
            [float(np.quantile(latency_s, share)), *(v for v in (interval.mean, interval.high) if v is not None)]
        )
        bounds[name] = min((bucket for bucket in buckets_s if bucket >= bound_s), default=bound_s)
    run_ratio = {stage: spread.run_ratio for stage, spread in (spreads or {}).items()}
    norms = norms_of(steady, plan.slo_latency_s, bounds, run_ratio)
    until_s = max(plan.traffic.duration_s, float(requests["arrival_s"].max())) + plan.slo_latency_s
    table = windows_of_records(requests, norms, window_s=window_s, begin_s=WARMUP_S, until_s=until_s)
    return Baseline(plan, folder, norms, table, requests, spreads, is_by_bucket=bool(buckets_s))


def charts_for(baseline: Baseline, live: WindowTable, offset_s: float = 0.0) -> list[Chart]:
    """Every test that the live windows allow."""
    return [chart for chart in _all_charts(baseline, live, offset_s) if chart.measure in live.tallies]


def thresholds(charts: Sequence[Chart], window_s: float) -> list[float]:
    """``h`` of every chart, with which all together have the stated mean time between false alarms.

    The charts of the traffic's rate share half of the false alarms that are allowed, the others the rest: they are the ones
    that need the longest, and a stage's signal is as clear that a little more evidence costs it nothing. Lorden's bound
    ``exp(h)`` is low by the overshoot, at least by ``OVERSHOOT`` in Siegmund's approximation; that is taken off for the rate,
    whose windows are counts of arrivals. Queues, caches and stages remember, so their charts keep the bound.
    """
    n_windows = FALSE_ALARM_S / window_s
    n_rate = sum(chart.measure == RATE for chart in charts)
    share = {True: RATE_BUDGET / max(n_rate, 1), False: (1.0 - RATE_BUDGET) / max(len(charts) - n_rate, 1)}
    return [
        float(np.log(n_windows / share[chart.measure == RATE])) - (OVERSHOOT if chart.measure == RATE else 0.0)
        for chart in charts
    ]


def _all_charts(baseline: Baseline, live: WindowTable, offset_s: float) -> Iterator[Chart]:
    planned = baseline.table
    rate = baseline.expected_rate_per_s(live.start_s, offset_s)
    own_rate = baseline.expected_rate_per_s(planned.start_s, 0.0)
    dispersion = _dispersion(planned.tallies["traffic_rate"], own_rate, "poisson", 0.0)
    yield from _both("traffic_rate", "poisson", rate, rate * TRAFFIC_SHIFT, dispersion=dispersion)
    steady = baseline.requests[baseline.requests["arrival_s"] >= WARMUP_S]
    for name, column in MIX.items():
        values = steady[column].to_numpy(dtype=np.float64)
        mean = float(values.mean())
        shift = TRAFFIC_SHIFT * mean if mean > 0 else MIX_ABSENT
        sd = max(float(values.std()), MIX_SD_MIN_RATIO * mean, shift)
        yield from _both(
            name, "normal", np.array(mean), np.array(shift), sd=sd,
            dispersion=_dispersion(planned.tallies[name], np.array(mean), "normal", sd), with_down=mean > 0,
        )  # fmt: skip
    yield from _share(planned, "lora_misses", None, MISS_SHIFT)
    service_s = sum(baseline.norms.stage_mean_s.values())
    for stage in STAGES:
        name = f"stage_{stage}"
        if baseline.norms.stage_mean_s[stage] < STAGE_SHARE_MIN * service_s:
            continue
        cv = (
            0.0 if not baseline.is_by_bucket else float(steady[f"{stage}_s"].std()) / baseline.norms.stage_mean_s[stage]
        )
        sd = max(STAGE_SD_MIN, cv)
        spread = (baseline.spreads or {}).get(stage, LawSpread())
        own = _dispersion(planned.tallies[name], np.array(spread.run_ratio - 1.0), "normal", sd)
        low, high = np.array(spread.low), np.array(spread.high)
        yield Chart(name, "up", "normal", high, high + STAGE_SHIFT, sd, own)
        yield Chart(name, "down", "normal", low, low - STAGE_SHIFT, sd, own)
    budget = 1.0 - baseline.plan.slo_attainment_ratio
    yield from _share(planned, "late", budget, budget)
    for name, quantile in QUANTILES.items():
        # past the next bucket's bound lies less of the plan than past the quantile
        share = None if baseline.is_by_bucket else 1.0 - quantile
        yield from _share(planned, name, share, QUANTILE_SHIFTED[name] - (1.0 - quantile))


def _both(
    name: str, law: Literal["poisson", "normal"], mean: Floats, shift: Floats, *, dispersion: float, sd: float = 0.0,
    with_down: bool = True,
) -> Iterator[Chart]:  # fmt: skip
    yield Chart(name, "up", law, mean, mean + shift, sd, dispersion)
    if with_down:
        yield Chart(name, "down", law, mean, mean - shift, sd, dispersion)


def _share(planned: WindowTable, name: str, share: float | None, shift: float) -> Iterator[Chart]:
    """A share that should not rise. ``share`` None: the plan's own."""
    tally = planned.tallies[name]
    n = float(tally.n.sum())
    if n == 0:
        return
    own = float(tally.total.sum()) / n
    mean = min(max(own if share is None else max(own, share), SHARE_MIN), 1.0)
    shifted = mean + shift
    if shifted >= 1.0 - SHARE_MIN:  # so much of it is planned that it cannot rise by the shift
        return
    # one queue makes all slow requests: where a tail has hardly any of them, its own windows cannot show how they clump
    alike = ("late", *QUANTILES) if name == "late" or name in QUANTILES else (name,)
    dispersion = max(_share_dispersion(planned.tallies[each]) for each in alike)
    yield Chart(name, "up", "binomial", np.array(mean), np.array(shifted), 0.0, dispersion)


def _share_dispersion(tally: Tally) -> float:
    own = float(tally.total.sum()) / max(float(tally.n.sum()), 1.0)
    mean = min(max(own, SHARE_MIN), 1.0 - SHARE_MIN)
    return _dispersion(tally, np.array(mean), "binomial", 0.0, level=DISPERSION_LEVEL)


def _dispersion(
    tally: Tally, mean: Floats, law: Literal["poisson", "binomial", "normal"], sd: float, level: float = 0.5
) -> float:
    """Largest ratio of seen to lawful variance over the scales that have enough batches; at least 1.

    Args:
        level: confidence that the ratio is no larger (chi-squared, as of independent batches); 0.5 is about the estimate itself.
    """
    expected = tally.n * mean
    lawful = {"poisson": expected, "binomial": tally.n * mean * (1 - mean), "normal": tally.n * sd**2}[law]
    error = tally.total - expected
    found = [1.0]
    for scale in SCALES:
        n_batches = len(error) // scale
        if n_batches < BATCHES_MIN:
            continue
        held = slice(0, n_batches * scale)
        variance = lawful[held].reshape(n_batches, scale).sum(axis=1)
        squared = error[held].reshape(n_batches, scale).sum(axis=1) ** 2
        counted = variance > 0
        if counted.sum() >= BATCHES_MIN:
            ratios = squared[counted] / variance[counted]
            found.append(float(ratios.sum() / chi2.ppf(1.0 - level, len(ratios))))
    return max(found)
