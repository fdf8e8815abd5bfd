"""Plans compared on the same arrivals, profile draws and service noise: differences of pairs, far tighter than of two intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import joblib
from rich.console import Console
from rich.table import Table
from rich.text import Text

from engine.allocation import Allocation, Topology, read_allocation
from planner.bootstrap import paired_difference
from planner.cost import cost_of
from planner.plan_run import scenario_price
from planner.replication import Confirmation, load_inputs
from planner.scenario import Scenario, load_scenario
from planner.statistics import Interval, t_interval
from planner.stored_runs import confirm_stored
from traces.problems import InputError, Problem, one_problem

FIGURES: Final = (
    "slo_attainment_ratio", "latency_p50_s", "latency_p95_s", "latency_p99_s", "plain_latency_p95_s", "add_on_latency_p95_s",
    "cost_usd_per_1000_images",
)  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class PairedFigure:
    """One figure of the first plan, and how much another one's differs."""

    figure: str
    first: Interval
    other: Interval
    difference: Interval
    """other − first over the pairs."""

    @property
    def verdict(self) -> str:
        """``more``, ``less`` or ``no difference seen`` of the other plan."""
        if self.difference.low > 0:
            return "more"
        return "less" if self.difference.high < 0 else "no difference seen"


@dataclass(frozen=True, slots=True, eq=False)
class Paired:
    """The first plan against one other."""

    first: str
    other: str
    n_pairs: int
    figures: tuple[PairedFigure, ...]


def compare_paired(
    plans: Sequence[Path],
    repetitions: int,
    *,
    store: Path | None = None,
    jobs: int = 1,
    progress: Callable[[str], None] = lambda text: None,
) -> tuple[Paired, ...]:
    """Repeats every plan's allocation under the first plan's scenario.

    Args:
        plans: folders that ``diffplan plan`` wrote, two or more.
        repetitions: 2 or more; repetition k is the same for all plans.
        store: a run store; runs that it has are not simulated again.

    Raises:
        InputError: a folder lacks its files, an allocation is not of the profile's GPU kind, or mixes topologies.
    """
    if len(plans) < 2:
        raise one_problem("PLAN", f"got {len(plans)}", "two or more with --paired")
    folders = [path if path.is_dir() else path.parent for path in plans]
    scenario, folder = load_scenario(str(folders[0] / "scenario.resolved.yaml"))
    gpu_kind = load_inputs(scenario, folder).gpu_kind
    found, problems = [], list[Problem]()
    for path in folders:
        try:
            found.append(_one_topology(read_allocation(path / "allocation.json"), gpu_kind, path))
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    progress(f"{repetitions} repetitions of {len(found)} allocations under {scenario.name}")
    tasks = (joblib.delayed(confirm_stored)(store, scenario, folder, k, tuple(found)) for k in range(repetitions))
    runs = list(joblib.Parallel(n_jobs=jobs)(tasks))
    price = scenario_price(scenario, folder, load_inputs(scenario, folder)).price_usd_per_gpu_hour
    columns = [
        [_figures(scenario, price, allocation, run[place]) for run in runs]
        for place, (_, allocation) in enumerate(found)
    ]
    level = scenario.slo.confidence
    return tuple(
        Paired(str(plans[0]), str(path), repetitions, _pairs(columns[0], column, level))
        for path, column in zip(plans[1:], columns[1:], strict=True)
    )


def _one_topology(allocation: Allocation, gpu_kind: str, where: Path) -> tuple[Topology, Allocation]:
    topologies = sorted({pool.topology for pool in allocation.pools_of("base")})
    kinds = sorted({pool.gpu_kind for pool in allocation.pools})
    if len(topologies) != 1 or kinds != [gpu_kind]:
        raise one_problem(
            str(where / "allocation.json"), f"has {', '.join(topologies)} on {', '.join(kinds)}", f"one topology on {gpu_kind}, the first plan's kind"
        )  # fmt: skip
    return topologies[0], allocation


def _figures(scenario: Scenario, price_usd: float, allocation: Allocation, run: Confirmation) -> dict[str, float]:
    cost = cost_of(allocation.n_gpus, run.in_slo_images_per_s, price_usd, scenario.prices.hours_per_month)
    numbers = run.metrics.numbers()
    return {
        name: 1000 * cost.cost_usd_per_image if name == "cost_usd_per_1000_images" else numbers[name]
        for name in FIGURES
    }


def _pairs(first: Sequence[dict[str, float]], other: Sequence[dict[str, float]], level: float) -> tuple[PairedFigure, ...]:  # fmt: skip
    rows = []
    for name in FIGURES:
        a, b = [row[name] for row in first], [row[name] for row in other]
        if any(value != value for value in (*a, *b)):  # NaN: no such requests
            continue
        rows.append(PairedFigure(name, t_interval(a, level), t_interval(b, level), paired_difference(a, b, level)))
    return tuple(rows)


def to_plain(pairs: Sequence[Paired]) -> list[dict[str, Any]]:
    """JSON-ready."""
    return [
        {
            "first": pair.first, "other": pair.other, "n_pairs": pair.n_pairs,
            "figures": {
                row.figure: {
                    "first": row.first.to_plain(), "other": row.other.to_plain(), "difference": row.difference.to_plain(),
                    "verdict": row.verdict,
                }
                for row in pair.figures
            },
        }
        for pair in pairs
    ]  # fmt: skip


def print_paired(pairs: Sequence[Paired], console: Console) -> None:
    """One table for each other plan."""
    for pair in pairs:
        table = Table(
            title=Text(f"{pair.other} − {pair.first}: {pair.n_pairs} pairs on the same arrivals, draws and noise"),
            title_justify="left", pad_edge=False,
        )  # fmt: skip
        for name in ("figure", "first", "other", "difference", "interval", "other has"):
            table.add_column(name, justify="left" if name in {"figure", "other has"} else "right")
        for row in pair.figures:
            d = row.difference
            table.add_row(
                row.figure, f"{row.first.mean:.4g}", f"{row.other.mean:.4g}", f"{d.mean:+.4g}", f"{d.low:+.4g} … {d.high:+.4g}",
                row.verdict,
            )  # fmt: skip
        console.print(table)
