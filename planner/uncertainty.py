"""What the uncertainty of one allocation's figures is made of: days of the trace, calibration of the profile, service noise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import joblib
from rich.console import Console
from rich.table import Table
from rich.text import Text

from engine.allocation import Allocation, Topology
from planner.bootstrap import Source, variance_shares
from planner.replication import load_inputs, profile_draw, run_allocation, service_table
from planner.scenario import Scenario
from planner.statistics import Interval, t_interval
from planner.traffic import BOOTSTRAP_DAYS_MIN, build_traffic, source_trace, stream_seed, variation_of

Varied = Literal["all", "days", "profile", "noise"]
VARIED: Final[tuple[Varied, ...]] = ("all", "days", "profile", "noise")
FIGURES: Final = ("slo_attainment_ratio", "latency_p50_s", "latency_p95_s", "latency_p99_s")
WORDS: Final = {
    "all": "all together",
    "days": "arrivals (days, shifts)",
    "profile": "calibration of the profile",
    "noise": "service noise",
}


@dataclass(frozen=True, slots=True, eq=False)
class Uncertainty:
    """Each figure with its interval over repetitions in which everything varies, and each source varied alone."""

    n: int
    intervals: dict[str, Interval]
    sources: dict[str, tuple[Source, ...]]
    """Figure to the sources."""
    missing: tuple[str, ...]


def uncertainty(scenario: Scenario, folder: Path, allocation: Allocation, n: int, *, jobs: int = 1) -> Uncertainty:
    """Runs ``n`` repetitions with everything varied, and ``n`` for each source alone while the others stay as stated.

    Days are resampled whole (block bootstrap) where the trace has four or more and is not cut or scaled; scaled traffic gets
    new shifts. Otherwise day-to-day variation is missing, and so said.

    Raises:
        ValueError: fewer than 2 repetitions, or base pools of several topologies.
    """
    topologies = {pool.topology for pool in allocation.pools_of("base")}
    if n < 2 or len(topologies) != 1:
        raise ValueError(f"needs 2 repetitions or more and one topology, got {n} and {sorted(topologies)}")
    topology = next(iter(topologies))
    missing = {}
    if variation_of(scenario, source_trace(scenario, folder).duration_s) == "none":
        missing["days"] = (
            f"Day-to-day variation is missing: it needs a trace of {BOOTSTRAP_DAYS_MIN} days or more, neither cut nor scaled, or scaled traffic."
        )
    if load_inputs(scenario, folder).profile.n_draws == 0:
        missing["profile"] = "Calibration error is missing: the profile has no draws of its parameters."
    cases = [(varied, k) for varied in VARIED if varied not in missing for k in range(n)]
    values = list(
        joblib.Parallel(n_jobs=jobs)(
            joblib.delayed(_figures)(scenario, folder, topology, allocation, varied, k) for varied, k in cases
        )
    )
    found: dict[str, dict[str, list[float]]] = {name: {varied: [] for varied in VARIED} for name in FIGURES}
    for (varied, _), row in zip(cases, values, strict=True):
        for name in FIGURES:
            found[name][varied].append(row[name])
    sources = {
        name: tuple(Source(varied, tuple(columns[varied]), missing.get(varied, "")) for varied in VARIED[1:])
        for name, columns in found.items()
    }
    level = scenario.slo.confidence
    return Uncertainty(
        n, {name: t_interval(columns["all"], level) for name, columns in found.items()}, sources, tuple(missing.values())
    )  # fmt: skip


def _figures(
    scenario: Scenario, folder: Path, topology: Topology, allocation: Allocation, varied: Varied, repetition: int
) -> dict[str, float]:
    """One repetition in which only ``varied`` differs from the run as stated."""
    inputs = load_inputs(scenario, folder)
    workload = build_traffic(scenario, folder, repetition if varied in ("all", "days") else None).workload
    draw = profile_draw(scenario, inputs, repetition) if varied in ("all", "profile") else None
    index = 1 + repetition if varied in ("all", "noise") else 0
    service = service_table(
        scenario, inputs, workload, topology, draw=draw,
        noise_seed=stream_seed(scenario.simulation.seed, "noise", index), allocation=allocation,
    )  # fmt: skip
    run = run_allocation(
        scenario, inputs, workload, allocation, service, repetition if varied in ("all", "noise") else None
    )
    numbers = run.metrics.numbers()
    return {name: numbers[name] for name in FIGURES}


def to_plain(found: Uncertainty) -> dict[str, Any]:
    """JSON-ready."""
    return {
        "n": found.n,
        "intervals": {name: item.to_plain() for name, item in found.intervals.items()},
        "sd": {
            name: {s.name: s.standard_deviation if s.values else None for s in sources}
            for name, sources in found.sources.items()
        },
        "variance_share": {name: dict(variance_shares(sources)) for name, sources in found.sources.items()},
        "missing": list(found.missing),
    }


def print_uncertainty(found: Uncertainty, console: Console) -> None:
    """Intervals, and each source's share."""
    table = Table(title=f"Uncertainty over {found.n} repetitions", title_justify="left", title_style="", pad_edge=False)
    for name in ("figure", "mean", "interval of the mean", *(WORDS[v] for v in VARIED[1:])):
        table.add_column(name, justify="left" if name == "figure" else "right")
    for name, interval in found.intervals.items():
        shares = variance_shares(found.sources[name])
        cells = [
            "missing" if s.missing else f"sd {s.standard_deviation:.3g} ({shares[s.name]:.0%})"
            for s in found.sources[name]
        ]
        table.add_row(name, f"{interval.mean:.4g}", f"{interval.low:.4g} … {interval.high:.4g}", *cells)
    console.print(table)
    for line in found.missing:
        console.print(Text(line), soft_wrap=True)
