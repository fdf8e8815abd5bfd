"""Prices are dated, have a source, and are never guessed."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from planner.prices import Price, age_warning, find_price, load_table, shipped_tables
from traces.problems import InputError

SHIPPED = shipped_tables()["default"]


def test_every_shipped_price_has_a_source_and_the_table_a_day() -> None:
    table = load_table(SHIPPED)
    assert datetime.date.fromisoformat(table.as_of).year == 2026
    assert all(row.source for row in table.rows)


def test_the_shipped_h200_costs_what_its_quote_says() -> None:
    assert find_price(SHIPPED, "nvidia-h200", "on_demand").price_usd_per_gpu_hour == 3.50
    assert find_price(SHIPPED, "nvidia-h200", "spot").price_usd_per_gpu_hour == 1.45


def test_a_missing_price_is_refused_and_the_remedy_named() -> None:
    with pytest.raises(InputError, match="price_usd_per_gpu_hour"):
        find_price(SHIPPED, "nvidia-gtx-1080", "on_demand")


def test_the_scenarios_own_price_wins_over_the_table() -> None:
    price = find_price(SHIPPED, "nvidia-gtx-1080", "on_demand", 0.25)
    assert (price.price_usd_per_gpu_hour, price.as_of) == (0.25, "")


@pytest.mark.parametrize(("age_days", "is_warned"), [(0, False), (90, False), (91, True)])
def test_a_price_is_stale_after_ninety_days(age_days: int, is_warned: bool) -> None:
    price = Price(3.5, "nvidia-h200", "on_demand", "somewhere", "t", "2026-01-01")
    today = datetime.date(2026, 1, 1) + datetime.timedelta(days=age_days)
    assert bool(age_warning(price, today)) is is_warned


BREAKS: dict[str, tuple[dict[str, Any], str]] = {
    "negative price": (
        {"rows": [{"gpu_kind": "a", "purchase": "spot", "price_usd_per_gpu_hour": -1, "source": "s"}]},
        "rows[0]",
    ),
    "no source": ({"rows": [{"gpu_kind": "a", "purchase": "spot", "price_usd_per_gpu_hour": 1}]}, "rows[0].source"),
    "no rows": ({"rows": []}, "rows"),
    "not a day": ({"as_of": "2026-02-30"}, "as_of"),
    "other currency": ({"currency": "EUR"}, "currency"),
    "unknown field": ({"colour": "red"}, "colour"),
    "row twice": (
        {"rows": [{"gpu_kind": "a", "purchase": "spot", "price_usd_per_gpu_hour": 1, "source": "s"}] * 2},
        "rows",
    ),
}


@pytest.mark.parametrize("case", BREAKS)
def test_a_malformed_price_table_is_refused_with_its_place(case: str, tmp_path: Path) -> None:
    change, place = BREAKS[case]
    path = tmp_path / "prices.json"
    path.write_text(json.dumps({**json.loads(SHIPPED.read_text()), **change}), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_table(path)
    assert f"prices.json {place}" in str(caught.value)
