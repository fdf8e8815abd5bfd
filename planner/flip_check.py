"""The nearest flip point of a plan, searched for real: just beyond it both topologies get the smallest fleet they can have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import joblib

from engine.allocation import Topology
from planner.answers import answers_about
from planner.confirmation import Pace
from planner.explain import gpus_words
from planner.flips import TRAFFIC, with_law_scaled
from planner.plan_record import FlipPoint
from planner.replication import load_inputs
from planner.scenario import Scenario
from planner.topology_search import search_with
from planner.traffic import build_traffic

BEYOND: Final = 1.05
"""How far past the point is searched: sizes are whole, so at the point itself both may be equal."""
REQUESTS_MAX: Final = 400_000
"""Of traffic that is searched again; a flip point at more is left an estimate."""


def check_nearest(
    scenario: Scenario, folder: Path, flips: Sequence[FlipPoint], winner: Topology, n_requests: int, pace: Pace
) -> tuple[FlipPoint, ...]:
    """The flip points, the nearest of traffic or a law with what a search beyond it found.

    Each topology is searched once with the fitted profile, as in the plan's search; nothing is repeated. Prices need none: the
    sizes do not depend on them.
    """
    place = _nearest(flips, n_requests)
    if place is None:
        return tuple(flips)
    flip = flips[place]
    assert flip.winner_until is not None  # noqa: S101  the nearest has a factor and a successor
    assert flip.then is not None  # noqa: S101
    factor = flip.winner_until * BEYOND if flip.winner_until > 1 else flip.winner_until / BEYOND
    pace.progress(f"searching just beyond the nearest flip point: {flip.what} ×{factor:.3g}")
    tasks = (
        joblib.delayed(size_beyond)(scenario, folder, flip.what, factor, name, pace.store)
        for name in (flip.then, winner)
    )
    (then, then_cost), (own, own_cost) = pace.run(tasks)
    said = f"at ×{factor:.4g}: {_words(flip.then, then)}, {_words(winner, own)} (one search each)"
    is_confirmed = then_cost < own_cost
    checked = flip.model_copy(update={"simulated": said, "is_confirmed": is_confirmed})
    return (*flips[:place], checked, *flips[place + 1 :])


def size_beyond(
    scenario: Scenario, folder: Path, what: str, factor: float, topology: Topology, store: Path | None = None
) -> tuple[int | None, float]:
    """The smallest fleet with the traffic or one law's seconds multiplied.

    Returns:
        Its GPUs, None if no number of them will do; and its cost in GPU-hours of its base pool's kind, infinite then.
    """
    inputs = load_inputs(scenario, folder)
    if what == TRAFFIC:
        scale = scenario.traffic.scale_factor * factor
        scenario = scenario.model_copy(update={"traffic": scenario.traffic.model_copy(update={"scale_factor": scale})})
    else:
        inputs = with_law_scaled(inputs, what, factor)
    with answers_about(store, scenario, folder, None) as known:
        about = known if what == TRAFFIC else known.under(f"{what} x{factor!r}")
        found = search_with(scenario, inputs, build_traffic(scenario, folder).workload, topology, about)
    if found.counts is None or found.shape is None:
        return None, math.inf
    return sum(found.counts), found.shape.cost(found.counts)


def _nearest(flips: Sequence[FlipPoint], n_requests: int) -> int | None:
    able = [
        place
        for place, flip in enumerate(flips)
        if flip.winner_until is not None
        and flip.then is not None
        and not flip.what.startswith("price")
        and n_requests * (flip.winner_until * BEYOND if flip.what == TRAFFIC else 1.0) <= REQUESTS_MAX
    ]
    return min(able, key=lambda place: (abs(math.log(flips[place].winner_until or 1.0)), place), default=None)


def _words(topology: Topology, n_gpus: int | None) -> str:
    return f"{topology} {gpus_words(n_gpus)}" if n_gpus is not None else f"{topology} cannot keep the promise"
