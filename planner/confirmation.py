"""Confirms what the searches found: every topology's best, over repetitions with their own arrivals, profile draws and noise."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import joblib

from engine.allocation import Allocation, Topology
from planner.candidates import Counts
from planner.evaluation import confirm
from planner.explain import gpus_words
from planner.replication import Confirmation
from planner.scenario import Scenario
from planner.search import one_more
from planner.statistics import t_interval
from planner.topology_search import TopologySearch, retune, search_topology

REPAIRS_MAX: Final = 8
"""Rounds of enlarging an allocation whose confirmation failed: at 3 % a round a quarter more, then it is said not to hold."""
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Pace:
    """How the work is spread and told about; no result depends on it."""

    jobs: int = 2
    backend: str = "loky"
    progress: Progress = lambda text: None
    store: Path | None = None
    """A run store, so that nothing is simulated twice; None: nothing is kept."""

    def run(self, tasks: Iterable[Any]) -> Iterator[Any]:
        """Results of joblib's delayed calls, in their order, each as soon as it and all before it are there.

        With several processes the work starts now, with one when results are asked for.
        """
        if self.jobs == 1:
            return (function(*arguments, **keywords) for function, arguments, keywords in tasks)
        # a cluster's backend is set around the whole plan; Ray's gives all results at the end
        backend = None if self.backend in ("ray", "dask") else self.backend
        return_as = "list" if self.backend == "ray" else "generator"
        _quiet()
        return _Results(iter(joblib.Parallel(n_jobs=self.jobs, backend=backend, return_as=return_as)(tasks)))


class _Results:
    """Results of work that goes on; dropping them ends it."""

    def __init__(self, found: Any) -> None:
        self._found = found

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self._found)

    def __del__(self) -> None:
        if hasattr(self._found, "close"):
            self._found.close()


def _quiet() -> None:
    """For good: loky warns from threads of its own, which a context around a call does not reach."""
    # it replaces a worker whose memory has grown, which large traces do, and tells users about it
    warnings.filterwarnings("ignore", message="A worker stopped while some jobs", category=UserWarning)
    # and tells them what else was under way when the first of several processes found their mistake
    warnings.filterwarnings("ignore", message=".*tasks which were still being processed", category=UserWarning)


@dataclass(slots=True)
class Contender:
    """A topology's best allocation on its way through the confirmation."""

    search: TopologySearch
    counts: Counts | None
    confirmations: tuple[Confirmation, ...] = ()
    is_confirmed: bool = False
    cost_max: float = math.inf
    """Where something cheaper is confirmed: what it may cost to win, in GPU-hours of its base pool's kind."""

    @property
    def allocation(self) -> Allocation:
        if self.search.shape is None or self.counts is None:
            raise ValueError(f"{self.search.topology} has no allocation; look at counts first")
        return self.search.shape.allocation(self.counts)

    @property
    def cost(self) -> float:
        """Of the allocation, in GPU-hours of its base pool's kind; raises ValueError if there is none."""
        if self.search.shape is None or self.counts is None:
            raise ValueError(f"{self.search.topology} has no allocation; look at counts first")
        return self.search.shape.cost(self.counts)

    def may_have(self, counts: Counts, scenario: Scenario) -> bool:
        """Whether so many replicas are within the scenario's limits, and could still win."""
        shape = self.search.shape
        return (
            shape is not None and shape.fits(counts, scenario.search.gpus_max) and shape.cost(counts) <= self.cost_max
        )


def search_all(scenario: Scenario, folder: Path, topologies: Sequence[Topology], pace: Pace) -> list[Contender]:
    """The best of every topology, not confirmed yet."""
    return searched(start_search(scenario, folder, topologies, pace), topologies, pace)


def start_search(
    scenario: Scenario, folder: Path, topologies: Sequence[Topology], pace: Pace
) -> Iterator[TopologySearch]:
    """Searches every topology, in the background if there are processes for it."""
    # the last ones have most pools and take longest, so they start first
    return pace.run(
        joblib.delayed(search_topology)(scenario, folder, name, pace.store) for name in reversed(topologies)
    )


def searched(found: Iterable[TopologySearch], topologies: Sequence[Topology], pace: Pace) -> list[Contender]:
    """Contenders of the searches as they end, in the order of ``topologies``."""
    contenders: dict[Topology, Contender] = {}
    for one in found:
        contender = contenders[one.topology] = Contender(one, one.counts)
        size = gpus_words(contender.allocation.n_gpus) if one.counts is not None else "cannot keep the promise"
        pace.progress(f"searched {one.topology}: {size}")
    return [contenders[topology] for topology in topologies]


def confirm_all(scenario: Scenario, folder: Path, contenders: Sequence[Contender], pace: Pace) -> None:
    """Repeats every contender; those that fail are sized again on their worst repetition, then grown, until they hold.

    The search has seen one arrival pattern and the fitted profile; the worst repetition says how lucky that was. An
    allocation counts as confirmed if the whole interval of its attainment is at or over the target.
    """
    live = [contender for contender in contenders if contender.counts is not None]
    _repeat(scenario, folder, live, pace)
    failed = [contender for contender in live if not contender.is_confirmed]
    tasks = (
        joblib.delayed(retune)(
            scenario, folder, one.search.topology, one.search.shape, one.counts, _worst_repetition(one), pace.store
        )
        for one in failed
    )
    resized = []
    for contender, counts in zip(failed, pace.run(tasks), strict=True):
        if counts is not None and sum(counts) > sum(contender.counts or ()) and contender.may_have(counts, scenario):
            contender.counts = counts
            resized.append(contender)
    _repeat(scenario, folder, resized, pace)
    for _ in range(REPAIRS_MAX):
        growing = []
        for contender in live:
            larger = one_more(contender.counts or (), mean_busy(contender))
            if not contender.is_confirmed and contender.may_have(larger, scenario):
                contender.counts = larger
                growing.append(contender)
        if not growing:
            return
        _repeat(scenario, folder, growing, pace)


def _repeat(scenario: Scenario, folder: Path, contenders: Sequence[Contender], pace: Pace) -> None:
    """Runs every repetition of these contenders and judges them."""
    if not contenders:
        return
    slo, n = scenario.slo, scenario.simulation.replications
    names = ", ".join(f"{one.search.topology} {gpus_words(one.allocation.n_gpus)}" for one in contenders)
    pace.progress(f"confirming over {n} repetitions: {names}")
    asked = tuple((contender.search.topology, contender.allocation) for contender in contenders)
    found = list(pace.run(joblib.delayed(confirm)(scenario, folder, index, asked, pace.store) for index in range(n)))
    for index, contender in enumerate(contenders):
        contender.confirmations = tuple(one[index] for one in found)
        attained = t_interval([c.metrics.slo_attainment_ratio for c in contender.confirmations], slo.confidence)
        contender.is_confirmed = attained.low >= slo.attainment_ratio


def _worst_repetition(contender: Contender) -> int:
    attained = [confirmation.metrics.slo_attainment_ratio for confirmation in contender.confirmations]
    return attained.index(min(attained))


def mean_busy(contender: Contender) -> tuple[float, ...]:
    runs = [confirmation.metrics for confirmation in contender.confirmations]
    return tuple(
        sum(run.busy_ratio.get(pool.name, 0.0) + run.loading_ratio.get(pool.name, 0.0) for run in runs) / len(runs)
        for pool in contender.allocation.pools
    )
