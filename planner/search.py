"""Finds the fewest replicas of a shape that meet the SLO in simulation, under common random numbers.

With fixed arrays more replicas are never much worse, so what meets the SLO has a monotone frontier. A first allocation on it is
found by bisecting the base pool beside ControlNet pools of several utilisations. Then the frontier is searched for a cheaper
one: how far each pool can go down while the others have plenty bounds it from below, and only allocations between those bounds
and one GPU less than the best are looked at. Deterministic: no clock, no randomness of its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from planner.candidates import Counts, Shape

CONTROLNET_LOADS: Final = (0.8, 0.65, 0.5)
"""Mean utilisations of ControlNet workers that a search starts from, cheapest first."""
GROWTHS_MAX: Final = 12
QUEUE: Final = "queue_wait_s"
STALLS_MAX: Final = 2
GAIN_MIN_RATIO: Final = 0.1
"""A growth that closes less than this share of the gap to the target has stalled."""
DESCENTS_MAX: Final = 8
PLENTY: Final = 3
"""Others' replicas over the best's while one pool is lowered: with three times as many they no longer bind."""
PRICE_ROUNDING: Final = 1e-9
LINE_MAX: Final = 48
"""Allocations of one size that are looked at before that size is given up."""
BUSY_RATIO_MAX: Final = 0.85
"""ControlNet workers busier than this are not worth simulating: at 0.9 an M/D/c of a few workers already doubles its step."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One simulated allocation."""

    counts: Counts
    attainment_ratio: float
    in_slo_images_per_s: float
    busy_ratios: tuple[float, ...]
    """Of each pool, in the order of the counts."""
    is_saturated: bool
    lost_to: str = QUEUE
    """The record column in which late requests spend most time that an idle, warm system would not take."""
    latency_at_target_s: float = math.inf
    """Latency that the asked share of the offered requests stays under; infinite if too many have none."""

    @property
    def n_gpus(self) -> int:
        """GPUs of the allocation (one a replica)."""
        return sum(self.counts)


@dataclass(frozen=True, slots=True)
class SearchOutcome:
    """What a search found, and everything it looked at."""

    shape: Shape
    best: Evaluation | None
    """None: nothing within ``gpus_max`` meets the target."""
    looked_at: tuple[Evaluation, ...]
    """Every simulated allocation, fewest GPUs first."""


class Evaluator:
    """Simulates counts once each and remembers."""

    def __init__(
        self, evaluate: Callable[[Counts], Evaluation], target: float, gpus_max: int, workers_max: int | None = None
    ) -> None:
        """``workers_max``: most ControlNet replicas, where ``gpus_max`` limits base replicas alone; None: it limits all."""
        self._evaluate = evaluate
        self.target = target
        self._gpus_max = gpus_max
        self._workers_max = workers_max
        self.seen: dict[Counts, Evaluation] = {}
        self._misses: list[Counts] = []

    def __call__(self, counts: Counts) -> Evaluation:
        if counts not in self.seen:
            found = self.seen[counts] = self._evaluate(counts)
            if found.attainment_ratio < self.target:
                self._misses.append(counts)
        return self.seen[counts]

    def base_max(self, others: Counts) -> int:
        """Most base replicas beside these ControlNet replicas; 0 if even those are too many."""
        if self._workers_max is None:
            return max(0, self._gpus_max - sum(others))
        return self._gpus_max if sum(others) <= self._workers_max else 0

    def meets(self, counts: Counts) -> bool:
        """Whether the allocation is allowed and meets the target in simulation."""
        return counts[0] <= self.base_max(counts[1:]) and self.suffices(counts)

    def suffices(self, counts: Counts) -> bool:
        """Whether the allocation meets the target, allowed or not; not simulated if more of every pool was seen to miss it."""
        if counts not in self.seen and any(all(map(int.__le__, counts, missed)) for missed in self._misses):
            return False
        return self(counts).attainment_ratio >= self.target


def search(shape: Shape, evaluator: Evaluator, start: int, low: int, *, tolerance_ratio: float = 0.0) -> SearchOutcome:
    """Searches a shape from nothing.

    Args:
        start: base replicas to begin with (a screen's guess).
        low: fewest that could do.
        tolerance_ratio: how much too large the base pool may be left; 0 finds the fewest.
    """
    best: Counts | None = None
    if not shape.controlnet_pools:
        best = _fewest_base(evaluator, (), start, low, tolerance_ratio)
    for load in CONTROLNET_LOADS if shape.controlnet_pools else ():
        others = controlnet_counts(shape, load)
        if best is None:
            best = _fewest_base(evaluator, others, start, low, tolerance_ratio)
            continue
        # more ControlNet workers must save more base replicas than they are
        base = sum(best) - sum(others) - 1
        if base >= low and evaluator.meets((base, *others)):
            best = _fewest_base(evaluator, others, base, low, tolerance_ratio)
    if best is not None and tolerance_ratio == 0:
        best = _cheapest_on_frontier(evaluator, best, low)
        if shape.worker_price_ratio != 1.0:
            best = cheapest_by_price(shape, evaluator, best, low)
    return _outcome(shape, evaluator, best)


def controlnet_counts(shape: Shape, load: float) -> Counts:
    """Replicas of each ControlNet pool at this mean utilisation."""
    return tuple(max(1, math.ceil(mean / load)) for mean in shape.controlnet_loads)


def refine(shape: Shape, evaluator: Evaluator, start: Counts, low: int) -> SearchOutcome:
    """Searches near ``start``, which was found on other traffic of the same kind; for traffic too long to search at large."""
    best = _fewest_base(evaluator, start[1:], start[0], low)
    grown = start[1:]
    while best is None and grown and low < evaluator.base_max(grown):
        grown = tuple(math.ceil(n * 1.25) for n in grown)
        best = _fewest_base(evaluator, grown, start[0], low)
    if best is not None:
        best = _lower_each(evaluator, best, low)
        if shape.worker_price_ratio != 1.0:
            best = cheapest_by_price(shape, evaluator, best, low)
    return _outcome(shape, evaluator, best)


def one_more(counts: Counts, busy_ratios: tuple[float, ...]) -> Counts:
    """The next larger allocation when a confirmation failed: about 3 % more of the busiest pool, at least one replica."""
    busiest = max(range(len(counts)), key=lambda pool: (busy_ratios[pool], -pool))
    return tuple(n + (max(1, round(0.03 * n)) if pool == busiest else 0) for pool, n in enumerate(counts))


def _outcome(shape: Shape, evaluator: Evaluator, best: Counts | None) -> SearchOutcome:
    looked_at = tuple(sorted(evaluator.seen.values(), key=lambda seen: (seen.n_gpus, seen.counts)))
    return SearchOutcome(shape, evaluator.seen[best] if best is not None else None, looked_at)


def _fewest_base(
    evaluator: Evaluator, others: Counts, start: int, low: int, tolerance_ratio: float = 0.0
) -> Counts | None:
    """Gallops from ``start`` until the answer is bracketed, then bisects; None if nothing within reach meets the target."""
    highest = evaluator.base_max(others)
    if highest < low:
        return None
    here = min(max(start, low), highest)
    if evaluator.meets((here, *others)):
        good, bad, step = here, low - 1, 1
        while good > low:
            trial = max(low, good - step)
            if evaluator.meets((trial, *others)):
                good, step = trial, step * 2
            else:
                bad = trial
                break
    else:
        bad, step, growths, stalls = here, max(1, here // 25), 0, 0
        while True:
            if bad >= highest or growths >= GROWTHS_MAX or _is_held_up_elsewhere(evaluator, (bad, *others), stalls):
                return None
            trial = min(highest, bad + step)
            growths += 1
            if evaluator.meets((trial, *others)):
                good = trial
                break
            before, after = evaluator((bad, *others)).attainment_ratio, evaluator((trial, *others)).attainment_ratio
            stalls = stalls + 1 if after - before < GAIN_MIN_RATIO * (evaluator.target - before) else 0
            bad, step = trial, step * 2
    while good - bad > max(1, tolerance_ratio * good):
        middle = (good + bad) // 2
        if evaluator.meets((middle, *others)):
            good = middle
        else:
            bad = middle
    return (good, *others)


def _is_held_up_elsewhere(evaluator: Evaluator, counts: Counts, stalls: int) -> bool:
    """Whether more base replicas are of no use: a ControlNet pool is full, or late requests wait for loads, not for a replica."""
    here = evaluator(counts)
    is_full = len(counts) > 1 and max(here.busy_ratios[1:]) > 0.97
    return is_full or (stalls >= STALLS_MAX and here.lost_to != QUEUE)


def _cheapest_on_frontier(evaluator: Evaluator, best: Counts, low: int) -> Counts:
    """The smallest allocation that meets the target if attainment is monotone in every pool; ``best`` if none is smaller.

    Exact under that assumption for one ControlNet pool; with several, the moves of :func:`_one_smaller` are tried until none helps.
    """
    if len(best) == 1:
        return best
    floors = _floors(evaluator, best, low)
    while True:
        cheaper = next(
            (trial for trial in _one_smaller(best, floors) if evaluator.meets(trial)),
            None,
        )
        if cheaper is None:
            return best
        lowered = _fewest_base(evaluator, cheaper[1:], cheaper[0], floors[0])
        best = lowered if lowered is not None else cheaper


def _floors(evaluator: Evaluator, best: Counts, low: int) -> list[int]:
    """How far each pool can go down while the others have plenty."""
    floors = [low if pool == 0 else 1 for pool in range(len(best))]
    for pool in range(len(best)):
        bad, good = floors[pool] - 1, best[pool]
        while good - bad > 1:
            middle = (good + bad) // 2
            trial = tuple(middle if other == pool else PLENTY * n for other, n in enumerate(best))
            if evaluator.suffices(trial):
                good = middle
            else:
                bad = middle
        floors[pool] = good
    return floors


def cheapest_by_price(shape: Shape, evaluator: Evaluator, best: Counts, low: int) -> Counts:
    """The cheapest allocation near ``best``, which meets the target, where a ControlNet replica does not cost what a base one does.

    Exact for one ControlNet pool if attainment is monotone and no better one lies more than ``LINE_MAX`` sizes of that pool away:
    for each size only the most base replicas that would still be cheaper are simulated, then bisected. With several pools one is
    resized at a time until none helps.
    """
    if len(best) == 1:
        return best
    floors = _floors(evaluator, best, low)
    while True:
        before = best
        for pool in range(1, len(best)):
            sizes = range(floors[pool], best[pool] + LINE_MAX)
            for n in sorted(sizes, key=lambda n, own=best[pool]: (abs(n - own), n)):  # type: ignore[misc]
                others = (*best[1:pool], n, *best[pool + 1 :])
                spare = shape.cost(best) - shape.cost((0, *others))
                most = min(math.ceil(spare - PRICE_ROUNDING) - 1, evaluator.base_max(others))
                if most < floors[0] or not evaluator.meets((most, *others)):
                    continue
                bad, good = floors[0] - 1, most
                while good - bad > 1:
                    middle = (good + bad) // 2
                    if evaluator.meets((middle, *others)):
                        good = middle
                    else:
                        bad = middle
                best = (good, *others)
        if best == before:
            return best


def _one_smaller(near: Counts, floors: Sequence[int]) -> Iterator[Counts]:
    """Allocations of one replica less than ``near`` and at least ``floors`` of each pool, nearest first; ``LINE_MAX`` at most."""
    spare = sum(near) - 1 - sum(floors)
    if spare < 0:
        return
    if len(floors) == 2:
        line = [(floors[0] + k, floors[1] + spare - k) for k in range(spare + 1)]
        yield from sorted(line, key=lambda counts: (abs(counts[0] - near[0]), counts))[:LINE_MAX]
        return
    # with several ControlNet pools: one replica less of a pool, or two less (of one or of two pools) and one more of another
    pools = range(len(near))
    moves = [((taken,), None) for taken in pools] + [
        (taken, given)
        for taken in itertools.combinations_with_replacement(pools, 2)
        for given in pools
        if given not in taken
    ]
    n_looked_at = 0
    for taken, given in moves:
        trial = tuple(n - taken.count(pool) + (pool == given) for pool, n in enumerate(near))
        if all(map(int.__ge__, trial, floors)):
            yield trial
            n_looked_at += 1
            if n_looked_at == LINE_MAX:
                return


def _lower_each(evaluator: Evaluator, counts: Counts, low: int) -> Counts:
    """Takes ControlNet replicas away one at a time, least loaded pool first, while the target is still met.

    A pool that would be over ``BUSY_RATIO_MAX`` is left alone: its queue would hold up every base replica.
    """
    for _ in range(DESCENTS_MAX if len(counts) > 1 else 0):
        busy = evaluator(counts).busy_ratios
        after = {pool: busy[pool] * n / (n - 1) for pool, n in enumerate(counts) if pool > 0 and n > 1}
        lowered = None
        for pool in sorted(
            (pool for pool, ratio in after.items() if ratio <= BUSY_RATIO_MAX), key=lambda p: (after[p], p)
        ):
            trial = tuple(n - (index == pool) for index, n in enumerate(counts))
            if trial not in evaluator.seen and evaluator.meets(trial):
                lowered = trial
                break
        if lowered is None:
            return counts
        counts = lowered
    return counts
