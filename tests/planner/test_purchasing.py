"""GPUs are bought in the cheapest mix of purchase types that the held GPUs allow."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from engine.allocation import Allocation, Pool
from planner.decision_record import AutoscalingRecord, PurchasingRecord
from planner.plan_record import to_json
from planner.prices import Price, find_price
from planner.purchasing import n_reserved, purchasing_record
from planner.scenario import Scenario
from planner.simulator.allocated import gpu_hours, held_ratio
from planner.strict_yaml import parse_strict

FLEET = Allocation((Pool("base", "base", 3, "gpu"), Pool("nets", "controlnet", 1, "gpu")))
HELD = (1.0, 1.0, 0.6, 0.2)
HOURS = 730.0


def asked(tmp_path: Path, rows: dict[str, float], world: str = "", held: tuple[float, ...] = HELD) -> PurchasingRecord:
    """The record of ``FLEET``, planned on demand, with a table of these prices."""
    table = {
        "schema_version": 1, "table_id": "t", "as_of": "2026-01-01", "currency": "USD",
        "rows": [
            {"gpu_kind": "gpu", "purchase": name, "price_usd_per_gpu_hour": usd, "source": "a quote"} for name, usd in rows.items()
        ],
    }  # fmt: skip
    (tmp_path / "prices.json").write_text(json.dumps(table), encoding="utf-8")
    text = f"name: x\ntraffic: {{trace: none}}\nslo: {{latency_s: 9}}\nprofile: {{name: p}}\nprices: {{table: prices.json}}\n{world}"
    scenario = parse_strict(text, Scenario, "here")
    price = find_price(tmp_path / "prices.json", "gpu", "on_demand")
    return purchasing_record(scenario, tmp_path, price, FLEET, scaling(held))


def scaling(held: tuple[float, ...]) -> AutoscalingRecord:
    return AutoscalingRecord(
        verdict="autoscale" if held else "fixed", why="", fixed_gpu_hours_per_month=0.0, fixed_cost_usd_per_month=0.0,
        saving_usd_per_month=None, start_s=60.0, chosen=None, tried=(), allocation=None, held_ratio=held,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_no_other_number_of_reserved_gpus_is_cheaper(seed: int) -> None:
    rng = np.random.default_rng(seed)
    held = sorted(rng.uniform(0, 1, int(rng.integers(1, 30))), reverse=True)
    reserved, on_demand = sorted(rng.uniform(0.5, 4.0, 2))

    def cost(k: int) -> float:
        return k * reserved + on_demand * math.fsum(held[k:])

    k = n_reserved(held, reserved, on_demand)
    # rounding of two sums of at most 30 terms
    assert cost(k) <= min(cost(other) for other in range(len(held) + 1)) * (1 + 1e-12)


def test_gpus_that_are_always_held_are_reserved_and_the_rest_bought_by_the_hour(tmp_path: Path) -> None:
    found = asked(tmp_path, {"on_demand": 4.0, "reserved": 2.0})
    best = found.rows[found.best]
    assert found.break_even_ratio == 0.5
    assert (best.is_scaled, best.n_reserved, best.n_on_demand) == (True, 3, 1)  # 0.6 is over one half, 0.2 is not
    assert best.cost_usd_per_month == pytest.approx((3 * 2.0 + 0.2 * 4.0) * HOURS)
    assert best.difference_usd_per_month == pytest.approx(best.cost_usd_per_month - 4 * 4.0 * HOURS)
    assert "3 GPUs reserved and up to 1 GPU on demand" in found.sentence


def test_a_fleet_of_fixed_size_is_reserved_as_a_whole_if_that_is_cheaper(tmp_path: Path) -> None:
    found = asked(tmp_path, {"on_demand": 4.0, "reserved": 2.0}, held=())
    assert not any(row.is_scaled for row in found.rows)
    assert (found.rows[found.best].n_reserved, found.rows[found.best].n_on_demand) == (4, 0)


def test_a_price_that_the_table_lacks_is_not_guessed(tmp_path: Path) -> None:
    found = asked(tmp_path, {"on_demand": 4.0})
    assert {one.purchase: one.price_usd_per_gpu_hour for one in found.prices} == {
        "on_demand": 4.0, "reserved": None, "spot": None,
    }  # fmt: skip
    assert found.break_even_ratio is None
    assert "What reserving saves is not known: the price table has no reserved price of gpu" in found.sentence


def test_spot_is_no_answer_until_the_scenario_says_how_gpus_are_taken_back(tmp_path: Path) -> None:
    found = asked(tmp_path, {"on_demand": 4.0, "spot": 1.0})
    spot = next(row for row in found.rows if row.n_spot)
    assert (spot.n_spot, spot.is_simulated) == (4, False)
    assert found.rows[found.best].n_spot == 0
    assert "interruptions are not simulated" in found.sentence


def test_spot_covers_the_pools_that_were_simulated_with_reclaims(tmp_path: Path) -> None:
    found = asked(
        tmp_path, {"on_demand": 4.0, "spot": 1.0}, "world: {reclaims: {mean_s: 3600, pools: [nets]}}\n", held=()
    )
    best = found.rows[found.best]
    assert (best.n_spot, best.n_on_demand, best.is_simulated) == (1, 3, True)
    assert best.cost_usd_per_month == (1 * 1.0 + 3 * 4.0) * HOURS


def test_the_price_of_the_scenario_itself_stays_the_plans(tmp_path: Path) -> None:
    scenario = Scenario.model_validate({
        "name": "x", "traffic": {"trace": "none"}, "slo": {"latency_s": 9}, "profile": {"name": "p"},
        "prices": {"table": "no such table"},
    })  # fmt: skip
    price = Price(1.5, "gpu", "on_demand", "scenario", "scenario", "")
    found = purchasing_record(scenario, tmp_path, price, FLEET, scaling(()))
    assert [one.price_usd_per_gpu_hour for one in found.prices] == [1.5, None, None]
    assert found.rows[found.best].cost_usd_per_month == 4 * 1.5 * HOURS


def test_the_held_gpus_are_counted_from_the_records_and_sum_to_their_mean() -> None:
    spans = [
        ("a", "busy", 0.0, 30.0, 2), ("a", "down", 30.0, 80.0, 0), ("a", "busy", 80.0, 120.0, 2), ("b", "loading", 0.0, 40.0, 1),
        ("b", "down", 60.0, 70.0, 1),
    ]  # fmt: skip
    workers = pd.DataFrame(
        [
            {"worker_id": w, "pool": "p", "state": s, "start_s": t, "end_s": u, "n_gpus": n}
            for w, s, t, u, n in spans
        ]
    )  # fmt: skip
    held = held_ratio(workers, 0.0, 100.0)  # b is down but paid for; a's two GPUs are given back for half of the time
    assert held == (1.0, 0.5, 0.5)
    assert sum(held) * 100.0 / 3600 == pytest.approx(sum(gpu_hours(workers, 0.0, 100.0).values()))
    with pytest.raises(ValueError, match="empty"):
        held_ratio(workers, 5.0, 5.0)


def test_a_plan_says_how_to_buy_its_gpus(tiny_plan) -> None:  # type: ignore[no-untyped-def]
    plan = tiny_plan.result.record
    found = plan.purchasing
    fixed = next(row for row in found.rows if row.n_on_demand and not row.is_scaled)
    assert fixed.cost_usd_per_month == plan.row(plan.recommended).cost_usd_per_month
    if plan.autoscaling.chosen is not None:
        assert sum(plan.autoscaling.held_ratio) == pytest.approx(plan.autoscaling.chosen.mean_gpus.mean)
    assert '"purchasing"' in to_json(plan)


def test_the_report_says_how_to_buy_and_what_other_settings_would_take(tiny_plan) -> None:  # type: ignore[no-untyped-def]
    plan, text = tiny_plan.result.record, (tiny_plan.out / "report.md").read_text(encoding="utf-8")
    assert "On demand, reserved or spot" in text
    assert plan.purchasing.sentence.split(":")[0] in text
    assert "Other settings, one at a time" in text
    assert plan.settings.sentence in text
