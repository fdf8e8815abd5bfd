"""Before a plan is published, the SimPy model runs what the compiled tier decided on: both must tell the same story."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from engine.allocation import Allocation
from planner.evaluation import Bench
from planner.fast import arrays as a
from planner.fast import simulate_fast
from planner.replication import Run
from planner.simulator import SimulationResult, simulate

RELATIVE_MAX: Final = 1e-9
CHECKED_REQUESTS_MAX: Final = 50_000
"""Requests of the runner-up that both run; later ones cannot change what happened to these."""


class TierMismatchError(AssertionError):
    """The two tiers disagree on a run: a fault of ours, and no plan."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """What was compared."""

    n_requests: int
    largest_gap_ratio: float
    """Largest relative difference of any request's start or end."""


def check_run(bench: Bench, allocation: Allocation, run: Run) -> Agreement | None:
    """Compares a SimPy run of the whole traffic with the compiled one; None if only the SimPy model can run it."""
    fast = bench.run(allocation)
    return None if fast is None else _compare(run.result, fast.outcome.times_s, f"{bench.service.topology}")


def check_allocation(bench: Bench, allocation: Allocation) -> Agreement | None:
    """Runs both tiers on (at most the first 50,000 requests of) the traffic; None if only the SimPy model can run it."""
    if bench.prepared is None or not bench.is_compiled(allocation):
        return None
    arrival_s = bench.workload.arrival_s
    until_s = float(arrival_s[CHECKED_REQUESTS_MAX]) if len(arrival_s) > CHECKED_REQUESTS_MAX else None
    services = {pool.name: bench.service for pool in allocation.pools_of("base")}
    sizes, facts = bench.inputs.sizes, bench.inputs.facts_of(allocation)
    slow = simulate(bench.workload, allocation, services, sizes, facts, until_s=until_s)
    fast = simulate_fast(bench.prepared, bench.as_one_kind(allocation), services, sizes, facts, until_s=until_s)
    return _compare(slow, fast.outcome.times_s, f"{bench.service.topology}")


def _compare(
    slow: SimulationResult, times_s: np.ndarray[tuple[int, ...], np.dtype[np.float64]], what: str
) -> Agreement:
    worst = 0.0
    for column, name in ((a.START_S, "start_s"), (a.END_S, "end_s")):
        expected, got = slow.requests[name].to_numpy(np.float64), times_s[:, column]
        if len(expected) != len(got) or (np.isnan(expected) != np.isnan(got)).any():
            raise TierMismatchError(f"{what}: the tiers disagree on which requests were taken up")
        gap = np.abs(got - expected) / np.maximum(np.abs(expected), 1e-300)
        gap = gap[~np.isnan(gap) & (got != expected)]
        worst = max(worst, float(gap.max(initial=0.0)))
    if worst > RELATIVE_MAX:
        raise TierMismatchError(
            f"{what}: the tiers' times differ by {worst:.3g} relative, at most {RELATIVE_MAX:g} is allowed"
        )
    return Agreement(len(slow.requests), worst)
