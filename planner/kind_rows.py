"""The kinds' part of a plan: rows, the sentence, the runner-up of another kind, and how far prices may move before one wins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from planner.evidence import topology_row
from planner.explain import gpus_words, usd
from planner.kind_record import KindPrice, KindRow, KindsRecord, KindVerdict
from planner.kind_search import KindSearch, Unit
from planner.kinds import Lens
from planner.plan_record import Estimate, FlipPoint, TopologyRow
from planner.search import Evaluation

PRICE_RANGE: Final = (0.1, 10.0)
NOT_ON_TWO_KINDS: Final = (
    "Where each ControlNet or checkpoint should live otherwise, other settings, and other ways to buy the GPUs are looked at for "
    "fleets of one GPU kind only: plan without gpu.others for them.",
    "Not simulated: whether a fleet on two GPU kinds should scale by itself.",
)


@dataclass(frozen=True, slots=True)
class Confirmed:
    """A unit with what its repetitions say."""

    unit: Unit
    row: TopologyRow


def confirmed_of(found: KindSearch) -> list[Confirmed]:
    """Every unit that was repeated, in order."""
    return [
        Confirmed(unit, topology_row(unit.lens.scenario, unit.contender, unit.lens.price))
        for unit in found.units
        if unit.is_repeated and unit.contender is not None
    ]


def kinds_record(
    lenses: Sequence[Lens], found: KindSearch, rows: Sequence[Confirmed], winner: Unit | None
) -> KindsRecord:
    """Every kind and pair, in order."""
    seen = {id(one.unit): one.row for one in rows}
    made = tuple(_row(unit, seen.get(id(unit))) for unit in found.units)
    return KindsRecord(
        sentence=_sentence(lenses, found, made, winner),
        base_gpu_kind=None if winner is None else winner.lens.gpu_kind,
        worker_gpu_kind=None if winner is None else winner.lens.worker_gpu_kind,
        kinds=tuple(_kind(lens) for lens in lenses if lens.inputs.workers is None),
        rows=made,
        not_looked_at=NOT_ON_TWO_KINDS if winner is not None and winner.lens.inputs.workers is not None else (),
    )


def _kind(lens: Lens) -> KindPrice:
    return KindPrice(
        gpu_kind=lens.gpu_kind, profile_name=lens.scenario.profile.name, profile_id=lens.inputs.profile.profile_id,
        is_assumed=bool(lens.assumed_kinds), price_usd_per_gpu_hour=lens.price.price_usd_per_gpu_hour,
        purchase=lens.price.purchase, source=lens.price.source, gpus_max=lens.scenario.search.gpus_max,
        device_memory_gib=lens.inputs.facts.device_memory_gib,
    )  # fmt: skip


def _row(unit: Unit, row: TopologyRow | None) -> KindRow:
    lens, contender = unit.lens, unit.contender
    none = Estimate.of(None)
    bound = unit.bound_usd
    counts = contender.counts if contender is not None else None
    pools: dict[str, int] = {}
    n_gpus = None
    if contender is not None and counts is not None:
        allocation = contender.allocation
        pools, n_gpus = {pool.name: pool.n_replicas for pool in allocation.pools}, allocation.n_gpus
    attained, p50, p99, per_1000 = none, none, none, none
    if row is not None:
        verdict: KindVerdict = "dearer in the confirmation" if unit.why else row.verdict
        why = f"{row.why}; {unit.why}" if unit.why else row.why
        attained, per_1000 = row.slo_attainment_ratio, row.cost_usd_per_1000_images
        p50, p99 = row.latency_p50_s, row.latency_p99_s
    elif contender is None:
        verdict, why = "dearer by its bound", unit.why
    else:
        verdict, why = "dearer in the search", unit.why
        seen = _evaluation(unit)
        if seen is not None:
            attained = Estimate(mean=seen.attainment_ratio, low=None, high=None)
    return KindRow(
        gpu_kind=lens.gpu_kind, worker_gpu_kind=lens.worker_gpu_kind, topology=unit.topology, verdict=verdict, why=why, pools=pools,
        n_gpus=n_gpus, cost_usd_per_month=unit.cost_usd if math.isfinite(unit.cost_usd) else None,
        bound_usd_per_month=bound if math.isfinite(bound) else None, cost_usd_per_1000_images=per_1000,
        slo_attainment_ratio=attained, latency_p50_s=p50, latency_p99_s=p99, is_assumed=bool(lens.assumed_kinds),
    )  # fmt: skip


def _evaluation(unit: Unit) -> Evaluation | None:
    contender = unit.contender
    if contender is None:
        return None
    shape, counts = contender.search.shape, contender.counts
    return next((seen for own, seen in contender.search.looked_at if own is shape and seen.counts == counts), None)


def kind_words(gpu_kind: str, worker_gpu_kind: str) -> str:
    """``on nvidia-h200``, or with workers on another kind."""
    apart = f", ControlNet workers on {worker_gpu_kind}" if worker_gpu_kind != gpu_kind else ""
    return f"on {gpu_kind}{apart}"


def assumed_sentence(kinds: Sequence[str]) -> str:
    """What it means that profiles were carried over by datasheet; empty if none was."""
    if not kinds:
        return ""
    names = " and ".join(dict.fromkeys(kinds))
    return f"This rests on an assumed profile: nothing was measured on {names}, its latencies are carried over by datasheet rates."


def _sentence(lenses: Sequence[Lens], found: KindSearch, rows: Sequence[KindRow], winner: Unit | None) -> str:
    kinds = [lens.gpu_kind for lens in lenses if lens.inputs.workers is None]
    if winner is None:
        return f"None of the {len(kinds)} GPU kinds at hand ({', '.join(kinds)}) keeps the promise."
    own = next(row for row, unit in zip(rows, found.units, strict=True) if unit is winner)
    others = [kind for kind in kinds if kind != own.gpu_kind]
    said = [f"{len(kinds)} GPU kinds were at hand; the fleet is {kind_words(own.gpu_kind, own.worker_gpu_kind)}."]
    said += [_against(kind, rows, own) for kind in others]
    pairs = [row for row in rows if row.gpu_kind != row.worker_gpu_kind]
    if pairs and own.gpu_kind == own.worker_gpu_kind:
        said.append(_against_pairs(pairs, own))
    elif pairs:
        same = [row for row in rows if row.gpu_kind == row.worker_gpu_kind and row.cost_usd_per_month is not None]
        best = min(same, key=lambda row: row.cost_usd_per_month or 0.0, default=None)
        if best is not None:
            gap = (best.cost_usd_per_month or 0.0) - (own.cost_usd_per_month or 0.0)
            said.append(
                f"The cheapest fleet of one kind, {best.topology} with {gpus_words(best.n_gpus)} {kind_words(best.gpu_kind, best.gpu_kind)}, "
                f"costs {usd(gap)} a month more."
            )
    return " ".join(said)


def _against(kind: str, rows: Sequence[KindRow], own: KindRow) -> str:
    theirs = [row for row in rows if row.gpu_kind == kind and row.worker_gpu_kind == kind]
    priced = [row for row in theirs if row.cost_usd_per_month is not None and row.verdict != "misses_slo"]
    assumed = " (assumed profile)" if any(row.is_assumed for row in theirs) else ""
    if priced:
        best = min(priced, key=lambda row: row.cost_usd_per_month or 0.0)
        gap = (best.cost_usd_per_month or 0.0) - (own.cost_usd_per_month or 0.0)
        fleet = f"{kind}{assumed} takes {gpus_words(best.n_gpus)} as {best.topology}"
        if best.verdict == "dearer in the search":
            fleet += " in the search"
        if best.verdict == "dearer in the confirmation":
            return f"{kind}{assumed} takes more than {gpus_words(best.n_gpus)} as {best.topology}: too dear to win."
        more = (
            f"{usd(gap)} a month more"
            if gap > 0
            else "as much"
            if gap == 0
            else f"{usd(-gap)} a month less, but more per image in time"
        )
        return f"{fleet}: {more}."
    bounded = [row.bound_usd_per_month for row in theirs if row.verdict == "dearer by its bound"]
    known = [bound for bound in bounded if bound is not None]
    if known:
        return f"{kind}{assumed} is left out: its work alone costs {usd(min(known))} a month or more."
    why = theirs[0].why if theirs else "no topology was asked for"
    return f"{kind}{assumed} cannot keep the promise ({why})."


def _against_pairs(pairs: Sequence[KindRow], own: KindRow) -> str:
    priced = [row for row in pairs if row.cost_usd_per_month is not None]
    if not priced:
        return "ControlNet workers on another kind than their base replicas cannot pay: their work alone costs more."
    best = min(priced, key=lambda row: row.cost_usd_per_month or 0.0)
    gap = (best.cost_usd_per_month or 0.0) - (own.cost_usd_per_month or 0.0)
    words = f"decoupled {kind_words(best.gpu_kind, best.worker_gpu_kind)} with {gpus_words(best.n_gpus)}"
    if gap < 0:
        return f"The best mix of two kinds, {words}, does not win: {best.why}."
    if gap == 0:
        return f"The best mix of two kinds, {words}, would cost as much."
    return f"The best mix of two kinds, {words}, would cost {usd(gap)} a month more."


def other_kind_runner_up(rows: Sequence[Confirmed], winner: Confirmed, said: str) -> str:
    """The next best fleet of any kind and its gap; ``said`` (of the same kind) if none of another kind is nearer."""
    same = [one for one in rows if one.unit is not winner.unit and one.row.verdict == "meets_slo"]
    if not same:
        return said
    own_usd = winner.row.cost_usd_per_month or 0.0
    best = min(same, key=lambda one: one.row.cost_usd_per_1000_images.mean or math.inf)
    if best.unit.lens is winner.unit.lens and said:
        return said
    gap = (best.row.cost_usd_per_month or 0.0) - own_usd
    lens = best.unit.lens
    fleet = f"{best.row.topology} with {gpus_words(best.row.n_gpus)} {kind_words(lens.gpu_kind, lens.worker_gpu_kind)}"
    return (
        f"{fleet}, {usd(gap)} a month more"
        if gap >= 0
        else f"{fleet}: {usd(-gap)} a month less, but more per image in time"
    )


def kind_flips(found: KindSearch, winner: Unit) -> tuple[FlipPoint, ...]:
    """How far each kind's price may move before a fleet of other kinds costs less, exact for the sizes that were found."""
    own = _parts(winner)
    total = math.fsum(own.values())
    kinds = list(dict.fromkeys(unit.lens.gpu_kind for unit in found.units if unit.lens.inputs.workers is None))
    rivals = [(unit, _parts(unit)) for unit in found.units if unit is not winner and math.isfinite(unit.cost_usd)]
    flips = []
    for kind in kinds:
        crossings = []
        for place, (unit, parts) in enumerate(rivals):
            moved = own.get(kind, 0.0) - parts.get(kind, 0.0)
            if not _may_win(unit) or math.isclose(moved, 0.0, abs_tol=1e-9):
                continue
            factor = 1.0 + (math.fsum(parts.values()) - total) / moved
            if PRICE_RANGE[0] <= factor <= PRICE_RANGE[1]:
                crossings.append((factor, place))
        for below in (True, False):
            side = [item for item in crossings if (item[0] < 1) == below]
            if side:
                factor, place = max(side) if below else min(side)
                flips.append(_flip(kind, factor, rivals[place][0]))
    return tuple(flips)


def _may_win(unit: Unit) -> bool:
    """Confirmed, or only too dear to be."""
    contender = unit.contender
    return contender is not None and (contender.is_confirmed or not unit.is_repeated)


def _parts(unit: Unit) -> dict[str, float]:
    return (
        {}
        if unit.contender is None or unit.contender.counts is None
        else unit.lens.usd_of_kinds(unit.contender.allocation)
    )


def _flip(kind: str, factor: float, unit: Unit) -> FlipPoint:
    size = "the confirmed sizes" if unit.is_repeated else "the confirmed size and the search's, which was not repeated"
    return FlipPoint(
        what=f"price of {kind} GPUs", winner_until=round(factor, 4), then=unit.topology, looked_from=PRICE_RANGE[0],
        looked_to=PRICE_RANGE[1], how=f"exact for {size}; then {unit.topology} {kind_words(unit.lens.gpu_kind, unit.lens.worker_gpu_kind)}",
        then_kinds=kind_words(unit.lens.gpu_kind, unit.lens.worker_gpu_kind),
    )  # fmt: skip
