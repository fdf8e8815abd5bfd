"""Fleets as the address carries them: ``colocated:5,decoupled:3+2``, so that a link to What-if shows the same numbers on any server."""

from __future__ import annotations

from collections.abc import Mapping

from dashboards.plan_job import Plan
from planner.candidates import Counts
from planner.what_if import Ground

Fleets = dict[str, Counts]


def to_text(fleets: Mapping[str, Counts]) -> str:
    """The fleets in one short text."""
    return ",".join(f"{topology}:{'+'.join(map(str, counts))}" for topology, counts in fleets.items())


def from_text(text: str, ground: Ground) -> Fleets | None:
    """The fleets of a text; None unless it names each topology of the question once, with a shape that it has and no more GPUs than allowed."""
    found: Fleets = {}
    for part in text.split(","):
        topology, _, numbers = part.partition(":")
        pieces = numbers.split("+")
        if (
            topology not in ground.shapes
            or topology in found
            or not all(p.isascii() and p.isdigit() and len(p) < 7 for p in pieces)
        ):
            return None
        counts = tuple(map(int, pieces))
        if min(counts) < 1 or sum(counts) > ground.scenario.search.gpus_max or ground.shape(topology, counts) is None:  # type: ignore[arg-type]
            return None
        found[topology] = counts
    return found if found.keys() == ground.shapes.keys() else None


def of_plan(plan: Plan, ground: Ground) -> Fleets:
    """The best fleet that a plan found for each topology, as far as it found any of a shape that is known here."""
    found: Fleets = {}
    for row in plan.record.topologies:
        counts = tuple(pool.n_replicas for pool in row.pools)
        if counts and row.topology in ground.shapes and ground.shape(row.topology, counts) is not None:
            found[row.topology] = counts
    return found
