"""How the GPUs should be bought: on demand, reserved or spot, for a fleet of fixed size and for one that scales by itself.

A reserved GPU is paid for all hours, one on demand for those it is held. GPUs are nested: the k-th is held while at least k are. So each
is decided alone: the k-th is reserved if it is held for a larger share of the time than reserved costs of on demand, and the sum is the
cheapest mix there is (the load duration curve of power plants; Stoft, Power System Economics, 2002, chapter 2-2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, get_args

from engine.allocation import Allocation
from planner.decision_record import AutoscalingRecord, PurchasePrice, PurchaseRow, PurchasingRecord
from planner.explain import gpus_words, usd
from planner.prices import Price, Purchase, find_price, shipped_tables
from planner.scenario import Scenario, resolve
from traces.problems import InputError

ROUNDING: Final = 1e-12
WORDS: Final[Mapping[Purchase, str]] = {"on_demand": "on demand", "reserved": "reserved", "spot": "spot"}


def n_reserved(held_ratio: Sequence[float], reserved_usd: float, on_demand_usd: float) -> int:
    """GPUs worth reserving: those held for a larger share of the time than the prices' ratio.

    Args:
        held_ratio: share of the time in which at least 1, 2, … GPUs are held; never grows.
    """
    return sum(share * on_demand_usd > reserved_usd * (1 + ROUNDING) for share in held_ratio)


def purchasing_record(
    scenario: Scenario, folder: Path, price: Price, allocation: Allocation, autoscaling: AutoscalingRecord
) -> PurchasingRecord:
    """Prices every purchase type for the recommended fleet, and for the chosen setting of the autoscaler if there is one.

    Spot counts only as far as the scenario says how GPUs are taken back (``world.reclaims``): then the fleet was sized with that.

    Args:
        price: the plan's price, of one of the types.
    """
    prices = _prices(scenario, folder, price)
    hours = scenario.prices.hours_per_month
    planned_usd = allocation.n_gpus * price.price_usd_per_gpu_hour * hours
    rows: list[PurchaseRow] = []

    def add(is_scaled: bool, n_of: Mapping[Purchase, int], usd_per_hour: float, is_simulated: bool) -> None:
        rows.append(
            PurchaseRow(
                is_scaled=is_scaled,
                n_on_demand=n_of.get("on_demand", 0),
                n_reserved=n_of.get("reserved", 0),
                n_spot=n_of.get("spot", 0),
                cost_usd_per_month=usd_per_hour * hours,
                difference_usd_per_month=usd_per_hour * hours - planned_usd,
                is_simulated=is_simulated,
            )
        )

    on_demand, reserved, spot = (_usd_of(prices, name) for name in ("on_demand", "reserved", "spot"))
    n = allocation.n_gpus
    n_spot = _n_on_spot(scenario, allocation)
    whole: tuple[tuple[Purchase, float | None], ...] = (("on_demand", on_demand), ("reserved", reserved))
    for name, its_usd in whole:
        if its_usd is not None:
            add(False, {name: n}, n * its_usd, True)
    held = autoscaling.held_ratio
    if on_demand is not None and held:
        add(True, {"on_demand": len(held)}, math.fsum(held) * on_demand, True)
        if reserved is not None:
            k = n_reserved(held, reserved, on_demand)
            if k > 0:
                mixed = k * reserved + math.fsum(held[k:]) * on_demand
                add(True, {"reserved": k, "on_demand": len(held) - k}, mixed, True)
    if spot is not None:
        rest = on_demand if on_demand is not None else price.price_usd_per_gpu_hour
        if n_spot:
            add(False, {"spot": n_spot, "on_demand": n - n_spot}, n_spot * spot + (n - n_spot) * rest, True)
        else:
            add(False, {"spot": n}, n * spot, False)
    able = [place for place, row in enumerate(rows) if row.is_simulated]
    best = min(able, key=lambda place: (rows[place].cost_usd_per_month, place), default=None)
    ratio = reserved / on_demand if reserved is not None and on_demand is not None else None
    return PurchasingRecord(
        sentence=_sentence(rows, best, ratio, prices, price.gpu_kind),
        prices=prices,
        break_even_ratio=ratio,
        rows=tuple(rows),
        best=best,
    )


def _prices(scenario: Scenario, folder: Path, price: Price) -> tuple[PurchasePrice, ...]:
    """One of each type: the plan's own, the others from the scenario's table; null where the table has none."""
    wanted = scenario.prices
    path = shipped_tables().get(wanted.table, resolve(wanted.table, folder))
    found = []
    for name in get_args(Purchase):
        own: Price | None = price
        if name != price.purchase:
            try:
                own = find_price(path, price.gpu_kind, name)
            except (
                InputError
            ):  # a table that cannot be read is no reason to drop the plan: its own price may be the scenario's
                own = None
        found.append(
            PurchasePrice(
                purchase=name,
                price_usd_per_gpu_hour=own.price_usd_per_gpu_hour if own else None,
                source=own.source if own else "",
            )
        )
    return tuple(found)


def _usd_of(prices: Sequence[PurchasePrice], name: str) -> float | None:
    return next(one.price_usd_per_gpu_hour for one in prices if one.purchase == name)


def _n_on_spot(scenario: Scenario, allocation: Allocation) -> int:
    """GPUs in the pools that the scenario's reclaims may take."""
    reclaims = scenario.world.reclaims
    if reclaims is None:
        return 0
    return sum(pool.n_gpus for pool in allocation.pools if not reclaims.pools or pool.name in reclaims.pools)


def _sentence(
    rows: Sequence[PurchaseRow],
    best: int | None,
    ratio: float | None,
    prices: Sequence[PurchasePrice],
    gpu_kind: str,
) -> str:
    said = []
    if best is not None:
        row = rows[best]
        parts = [(row.n_reserved, "reserved"), (row.n_on_demand, "on demand"), (row.n_spot, "on spot")]
        bought = " and ".join(
            f"{'up to ' if row.is_scaled and words == 'on demand' else ''}{gpus_words(count)} {words}"
            for count, words in parts
            if count
        )
        how = "scaled by demand" if row.is_scaled else "of fixed size"
        saving = -row.difference_usd_per_month
        gap = f", {usd(saving)} less than planned" if saving > 0.5 else ""
        said.append(f"Cheapest as simulated: the fleet {how}, {bought}: {usd(row.cost_usd_per_month)} a month{gap}.")
    if ratio is not None:
        said.append(f"A GPU held for more than {ratio:.0%} of the time is cheaper reserved.")
    else:
        missing = " and no ".join(
            WORDS[one.purchase] for one in prices if one.price_usd_per_gpu_hour is None and one.purchase != "spot"
        )
        said.append(
            f"What reserving saves is not known: the price table has no {missing} price of {gpu_kind}; give one in a table of your own "
            "(prices.table)."
        )
    spot = next((row for row in rows if row.n_spot and not row.is_simulated), None)
    if spot is not None:
        said.append(
            f"All on spot would be {usd(spot.cost_usd_per_month)} a month; interruptions are not simulated until world.reclaims says how "
            "often GPUs are taken back."
        )
    return " ".join(said)
