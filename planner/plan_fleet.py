"""Which fleet a plan is about: the cheapest that was confirmed, of the one GPU kind there is or of several."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from engine.allocation import Topology
from planner.confirmation import Contender, Pace, confirm_all
from planner.evidence import topology_row
from planner.explain import runner_up_sentence
from planner.kind_record import KindsRecord
from planner.kind_rows import confirmed_of, kind_flips, kinds_record, other_kind_runner_up
from planner.kind_search import SAME_COST_RATIO, KindSearch, complete, probability_over_kinds, search_kinds
from planner.kinds import Lens, rebased
from planner.plan_record import Estimate, FlipPoint, TopologyRow
from planner.scenario import Scenario
from planner.settling import Settled, settle

SAME_LATENCY_RATIO: Final = 1.05


@dataclass(frozen=True, slots=True, eq=False)
class FleetFound:
    """What the search and the confirmation leave to be told."""

    lens: Lens
    """Kinds that the rest of the plan is about."""
    asked: Scenario
    """The whole question seen from there."""
    contenders: list[Contender]
    rows: dict[Topology, TopologyRow]
    settled: Settled | None
    kinds: KindsRecord | None = None
    flips: tuple[FlipPoint, ...] = ()
    runner_up: str = ""


def of_one_kind(
    scenario: Scenario, folder: Path, lens: Lens, contenders: list[Contender], n_requests: int, pace: Pace
) -> FleetFound:
    confirm_all(scenario, folder, contenders, pace)
    settled = settle(scenario, folder, contenders, n_requests, pace)
    rows = {contender.search.topology: topology_row(scenario, contender, lens.price) for contender in contenders}
    return FleetFound(
        lens,
        scenario,
        contenders,
        rows,
        settled,
        runner_up=runner_up_sentence(cheapest_row(rows.values()), tuple(rows.values())),
    )


def of_several_kinds(
    scenario: Scenario, folder: Path, lenses: Sequence[Lens], n_requests: int, pace: Pace
) -> FleetFound:
    """The cheapest fleet of any kind, with everything that a plan of its base replicas' kind has."""
    search = search_kinds(lenses, folder, n_requests, pace)
    alone = {lens.gpu_kind: lens for lens in lenses if lens.inputs.workers is None}
    seen = confirmed_of(search)
    winner = next((one.unit for one in seen if one.row is cheapest_row(other.row for other in seen)), None)
    home = alone[winner.lens.gpu_kind] if winner is not None else _countable_lens(search, lenses)
    settled = None
    if winner is not None:
        settled = complete(search, home, folder, n_requests, pace)
        seen = confirmed_of(search)
    units = {unit.topology: unit for unit in search.of(home)}
    if winner is not None:
        units[winner.topology] = winner
    contenders = {name: unit.contender for name in scenario.topologies if (unit := units.get(name)) and unit.contender}
    rows: dict[Topology, TopologyRow] = {
        name: topology_row(units[name].lens.scenario, contender, units[name].lens.price)
        for name, contender in contenders.items()
    }
    best = cheapest_row(rows.values())
    if best is not None:  # what was added last may be as cheap
        winner = units[best.topology]
    lens = winner.lens if winner is not None else home
    if lens is not home and winner is not None:
        settled = search.settled[search.units.index(winner)]
    if winner is not None and settled is not None:
        settled = replace(settled, probability=probability_over_kinds(search, winner, settled))
    record = kinds_record(lenses, search, seen, winner)
    asked = rebased(scenario, home, lens.worker_gpu_kind, alone) if winner is not None else scenario
    runner_up = runner_up_sentence(best, tuple(rows.values()))
    if winner is not None:
        own = next(one for one in seen if one.unit is winner)
        runner_up = other_kind_runner_up(seen, own, runner_up)
    return FleetFound(
        lens, asked, list(contenders.values()), rows, settled, record, kind_flips(search, winner) if winner else (), runner_up
    )  # fmt: skip


def _countable_lens(search: KindSearch, lenses: Sequence[Lens]) -> Lens:
    """Where the nearest plan is looked for: the first kind on which more GPUs or a longer latency could help."""
    for lens in lenses:
        if any(unit.bound.misfit is None for unit in search.of(lens)) and lens.inputs.workers is None:
            return lens
    return lenses[0]


def cheapest_row(rows: Iterable[TopologyRow]) -> TopologyRow | None:
    """Least cost per in-SLO image. Equal cost (within half a per cent, as fleets of equal size differ by luck): the fewest
    pools, then the first in the scenario's order, plain ones first by default, that is as fast as the fastest."""
    good = [row for row in rows if row.verdict == "meets_slo" and row.cost_usd_per_1000_images.mean is not None]
    if not good:
        return None
    least = min(row.cost_usd_per_1000_images.mean or 0.0 for row in good)
    close = [row for row in good if (row.cost_usd_per_1000_images.mean or 0.0) <= least * (1 + SAME_COST_RATIO)]
    n_pools = min(len(row.pools) for row in close)
    close = [row for row in close if len(row.pools) == n_pools]
    fastest = min(close, key=lambda row: row.latency_p99_s.mean or 0.0)
    return next(row for row in close if _is_as_fast(row, fastest))


def _is_as_fast(row: TopologyRow, fastest: TopologyRow) -> bool:
    """p99 within 5 %, or p50 and p99 not to be told apart: a simpler kind wins ties within the intervals."""

    def overlap(own: Estimate, other: Estimate) -> bool:
        return own.low is not None and other.high is not None and own.low <= other.high

    if (row.latency_p99_s.mean or 0.0) <= SAME_LATENCY_RATIO * (fastest.latency_p99_s.mean or 0.0):
        return True
    return overlap(row.latency_p99_s, fastest.latency_p99_s) and overlap(row.latency_p50_s, fastest.latency_p50_s)
