"""The last doubt: whether something cheaper than what was confirmed would do, and whether the confirmed does.

Each topology's confirmed allocation is compared with one replica less of it, which takes its place if it holds as well; then the
choice, the cheapest, with all that comes near. Repetitions are added where they decide most, until the probability of correct
selection reaches the scenario's confidence or the budget is spent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import joblib
import numpy as np

from engine.allocation import Allocation
from planner.candidates import Counts
from planner.confirmation import Contender, Pace, confirm_all, mean_busy
from planner.evaluation import confirm
from planner.replication import Confirmation
from planner.scenario import Scenario
from planner.search import one_more
from planner.selection import correct_selection_probability, feasibility_repetitions, probability_at_least
from planner.statistics import t_interval

STEP_RATIO: Final = 0.005
"""Allocations that differ by less cost the same, as plans see it."""
CUT_MAX_RATIO: Final = 0.05
"""Another topology is cut to the choice's size only if that takes at most this share of its replicas: more never came close."""
ROUNDS_MAX: Final = 3
EXTRA_FACTOR: Final = 2
"""Each round adds this many times the scenario's repetitions, over all allocations in doubt."""
EXTRA_REQUESTS_MAX: Final = 100_000
"""Longer traffic gets no further repetitions: each costs seconds to build, and its means vary less."""
REPETITIONS_MAX: Final = 60
"""Of one allocation."""
CHANGES_MAX: Final = 8
"""Times the choice may change."""


@dataclass(slots=True)
class Doubt:
    """An allocation whose attainment decides the choice: the choice itself, or a cheaper one."""

    contender: Contender
    counts: Counts
    confirmations: list[Confirmation] = field(default_factory=list)

    @property
    def attained(self) -> list[float]:
        """Attainment of each repetition."""
        return [one.metrics.slo_attainment_ratio for one in self.confirmations]


@dataclass(frozen=True, slots=True)
class Settled:
    """The choice and what speaks for it."""

    chosen: Doubt
    cheaper: tuple[Doubt, ...]
    """Cheaper allocations that were repeated and do not hold."""
    probability: float
    """Lower bound on the probability that the choice meets the promise and none of the cheaper ones does."""

    def probability_of(self, doubt: Doubt, target: float) -> float:
        """Probability that one allocation's mean attainment is at least the target."""
        return probability_at_least(doubt.attained, target)


def settle(
    scenario: Scenario, folder: Path, contenders: Sequence[Contender], n_requests: int, pace: Pace
) -> Settled | None:
    """Replaces confirmed allocations by cheaper ones that hold as well, and says how sure the choice is; None if none is confirmed.

    An allocation is looked at up to ``1 + ROUNDS_MAX`` times as its repetitions grow, so a cheaper one holds only if its interval
    is over the target at the confidence that bounds the error of all looks together.
    """
    known: dict[tuple[str, Counts], list[Confirmation]] = {
        (contender.search.topology, contender.counts): list(contender.confirmations)
        for contender in contenders
        if contender.counts is not None
    }
    for contender in contenders if n_requests <= EXTRA_REQUESTS_MAX else ():
        # all with the same care: a saving is a difference of two sizes
        _tighten(scenario, folder, contender, known, n_requests, pace)
    settled = None
    for _ in range(CHANGES_MAX):
        good = [contender for contender in contenders if contender.is_confirmed]
        if not good:
            return None
        choice = min(good, key=lambda contender: contender.cost)
        known.setdefault((choice.search.topology, choice.counts or ()), list(choice.confirmations))
        chosen = _doubt(known, choice, choice.counts or ())
        cheaper = [_doubt(known, contender, counts) for contender, counts in _cheaper(choice, good)]
        settled = _examine(scenario, folder, chosen, cheaper, _rounds(n_requests), pace)
        choice.confirmations = tuple(chosen.confirmations)
        holding = [doubt for doubt in cheaper if _holds(doubt, scenario)]
        if holding:
            order = lambda doubt: (sum(doubt.counts), -float(np.mean(doubt.attained)), doubt.counts)  # noqa: E731
            _promote(min(holding, key=order), pace)
        elif not _take_back(scenario, folder, chosen, pace):
            break
    return settled


def _take_back(scenario: Scenario, folder: Path, doubt: Doubt, pace: Pace) -> bool:
    """Enlarges a topology's allocation if more repetitions say that it does not hold; False if it does."""
    slo, contender = scenario.slo, doubt.contender
    if t_interval(doubt.attained, slo.confidence).low >= slo.attainment_ratio:
        return False
    pace.progress(f"{contender.search.topology} with {sum(doubt.counts)} GPUs does not hold over more repetitions")
    contender.counts, contender.is_confirmed = one_more(doubt.counts, mean_busy(contender)), False
    if contender.may_have(contender.counts, scenario):
        confirm_all(scenario, folder, [contender], pace)
    return True


def _promote(doubt: Doubt, pace: Pace) -> None:
    """A smaller allocation takes the place of its topology's."""
    doubt.contender.counts, doubt.contender.confirmations = doubt.counts, tuple(doubt.confirmations)
    pace.progress(f"{doubt.contender.search.topology} holds with {sum(doubt.counts)} GPUs as well")


def _tighten(
    scenario: Scenario,
    folder: Path,
    contender: Contender,
    known: dict[tuple[str, Counts], list[Confirmation]],
    n_requests: int,
    pace: Pace,
) -> None:
    """Takes replicas away one by one while what is left holds, and adds some where more repetitions say that it does not."""
    name = contender.search.topology
    for _ in range(CHANGES_MAX):
        if not contender.is_confirmed:
            return
        known.setdefault((name, contender.counts or ()), list(contender.confirmations))
        own = _doubt(known, contender, contender.counts or ())
        smaller = [_doubt(known, contender, counts) for counts in _one_less(own.counts)]
        _examine(scenario, folder, own, smaller, 1, pace)
        contender.confirmations = tuple(own.confirmations)
        holding = [doubt for doubt in smaller if _holds(doubt, scenario)]
        if holding:
            order = lambda doubt: (-_cost(doubt), float(np.mean(doubt.attained)), doubt.counts)  # noqa: E731
            _promote(max(holding, key=order), pace)
        elif not _take_back(scenario, folder, own, pace):
            return


def _examine(
    scenario: Scenario, folder: Path, chosen: Doubt, cheaper: Sequence[Doubt], n_rounds: int, pace: Pace
) -> Settled:
    """Repeats the cheaper ones like the choice, then adds repetitions where they decide most."""
    slo, n = scenario.slo, scenario.simulation.replications
    _repeat(scenario, folder, cheaper, [max(0, n - len(doubt.confirmations)) for doubt in cheaper], pace)
    everyone = [chosen, *cheaper]
    target = slo.attainment_ratio
    for _ in range(n_rounds):
        if _probability(everyone, target) >= slo.confidence or any(_holds(doubt, scenario) for doubt in cheaper):
            break
        extra = feasibility_repetitions(
            [float(np.mean(doubt.attained)) - target for doubt in everyone],
            [float(np.std(doubt.attained, ddof=1)) for doubt in everyone],
            [len(doubt.confirmations) for doubt in everyone],
            EXTRA_FACTOR * n,
        )
        if (
            not any(extra)
            or max(len(d.confirmations) + m for d, m in zip(everyone, extra, strict=True)) > REPETITIONS_MAX
        ):
            break
        pace.progress(f"{sum(extra)} further repetitions of allocations near the promise")
        _repeat(scenario, folder, everyone, extra, pace)
    return Settled(chosen, tuple(cheaper), _probability(everyone, target))


def _rounds(n_requests: int) -> int:
    return ROUNDS_MAX if n_requests <= EXTRA_REQUESTS_MAX else 0


def _cost(doubt: Doubt) -> float:
    shape = doubt.contender.search.shape
    return float(sum(doubt.counts)) if shape is None else shape.cost(doubt.counts)


def _doubt(known: dict[tuple[str, Counts], list[Confirmation]], contender: Contender, counts: Counts) -> Doubt:
    """An allocation with every repetition of it that there is; what is added to it is known from then on."""
    return Doubt(contender, counts, known.setdefault((contender.search.topology, counts), []))


def _probability(everyone: Sequence[Doubt], target: float) -> float:
    meets = [probability_at_least(doubt.attained, target) for doubt in everyone]
    return correct_selection_probability(meets[0], meets[1:])


def _holds(doubt: Doubt, scenario: Scenario) -> bool:
    level = 1.0 - (1.0 - scenario.slo.confidence) / (1 + ROUNDS_MAX)
    return t_interval(doubt.attained, level).low >= scenario.slo.attainment_ratio


def _one_less(counts: Counts) -> list[Counts]:
    """A step less of each pool in turn: one replica, or ``STEP_RATIO`` of the allocation."""
    step = max(1, round(STEP_RATIO * sum(counts)))
    return [
        tuple(n - step * (pool == taken) for pool, n in enumerate(counts))
        for taken in range(len(counts))
        if counts[taken] > step
    ]


def _cheaper(choice: Contender, contenders: Sequence[Contender]) -> list[tuple[Contender, Counts]]:
    """A step less of the choice, and every other topology that comes near, one GPU smaller than the choice."""
    counts = choice.counts or ()
    found = [(choice, smaller) for smaller in _one_less(counts)]
    for other in contenders:
        if other is choice or other.counts is None:
            continue
        n_cut = sum(other.counts) - (sum(counts) - 1)
        if 0 < n_cut <= max(1, math.ceil(CUT_MAX_RATIO * sum(other.counts))):
            smaller = _cut(other, n_cut)
            if smaller is not None:
                found.append((other, smaller))
    return found


def _cut(contender: Contender, n_cut: int) -> Counts | None:
    """Takes replicas away one by one, each from the pool that would then be least busy; None if a pool would be left empty."""
    counts = list(contender.counts or ())
    work = [ratio * n for ratio, n in zip(mean_busy(contender), counts, strict=True)]
    for _ in range(n_cut):
        able = [pool for pool, n in enumerate(counts) if n > 1]
        if not able:
            return None
        counts[min(able, key=lambda pool: (work[pool] / (counts[pool] - 1), pool))] -= 1
    return tuple(counts)


def _repeat(scenario: Scenario, folder: Path, doubts: Sequence[Doubt], n_more: Sequence[int], pace: Pace) -> None:
    """Adds repetitions, each allocation's next ones; all allocations see the same arrivals, draws and noise in one repetition."""
    wanted: dict[int, list[Doubt]] = {}
    for doubt, more in zip(doubts, n_more, strict=True):
        have = len(doubt.confirmations)
        for repetition in range(have, have + more):
            wanted.setdefault(repetition, []).append(doubt)
    order = sorted(wanted)
    tasks = (
        joblib.delayed(confirm)(
            scenario,
            folder,
            repetition,
            tuple((doubt.contender.search.topology, _allocation(doubt)) for doubt in wanted[repetition]),
            pace.store,
        )
        for repetition in order
    )
    for repetition, found in zip(order, pace.run(tasks), strict=True):
        for doubt, confirmation in zip(wanted[repetition], found, strict=True):
            doubt.confirmations.append(confirmation)


def _allocation(doubt: Doubt) -> Allocation:
    shape = doubt.contender.search.shape
    if shape is None:
        raise ValueError(f"{doubt.contender.search.topology} has no shape")
    return shape.allocation(doubt.counts)
