"""Other settings, one at a time: what may be tried for which traffic, and that each is sized like the scenario's own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from planner import variations
from planner.plan_run import make_plan
from planner.run_store import FILE
from planner.traffic import build_traffic
from planner.variations import Sized, settings_record, sized, variations_of
from tests.simulation_builders import workload_of
from traces.problems import InputError


def named(found: Any) -> set[str]:
    return {one.setting for one in found}


def test_only_what_the_traffic_and_the_topology_have_is_tried(tiny_plan: Any) -> None:
    scenario, folder = tiny_plan.scenario, tiny_plan.folder
    bare = workload_of([0.0, 1.0])
    assert named(variations_of(scenario, folder, "colocated", bare)) == {"", "policies.forward_batch_max"}
    full = build_traffic(scenario, folder).workload
    apart = named(variations_of(scenario, folder, "decoupled", full))
    assert {"policies.lora_patch_by_step", "policies.link", "policies.lora_cache_gib"} <= apart
    assert "policies.link" not in named(variations_of(scenario, folder, "colocated", full))
    two = workload_of([0.0, 1.0], base_model_id=["a", "b"])
    assert "policies.switch_overtake_max" in named(variations_of(scenario, folder, "colocated", two))


def test_each_variation_changes_one_field_of_the_scenario(tiny_plan: Any) -> None:
    scenario, folder = tiny_plan.scenario, tiny_plan.folder
    plain = scenario.model_dump()
    for one in variations_of(scenario, folder, "decoupled", build_traffic(scenario, folder).workload):
        other = one.scenario.model_dump()
        changed = [name for name, value in plain["policies"].items() if other["policies"][name] != value]
        assert [f"policies.{name}" for name in changed] == ([one.setting] if one.setting else [])
        assert {**other, "policies": None} == {**plain, "policies": None}


def test_the_scenario_as_it_is_needs_what_its_plan_recommends(tiny_plan: Any) -> None:
    record = tiny_plan.result.record
    here = record.settings.rows[0]
    # the same requests, one run: the plan's repetitions may ask for more, never for fewer than that run
    assert here.setting == ""
    assert here.difference_usd_per_month == 0.0
    assert here.n_gpus <= record.row(record.recommended).n_gpus
    for row in record.settings.rows:
        if row.n_gpus is not None:
            assert row.cost_usd_per_month == row.n_gpus * 2.0 * 730.0


def test_a_slow_link_is_felt(tiny_plan: Any) -> None:
    from planner.topology_search import search_topology

    scenario, folder = tiny_plan.scenario, tiny_plan.folder
    found = search_topology(scenario, folder, "decoupled")
    options = variations_of(scenario, folder, "decoupled", build_traffic(scenario, folder).workload)
    by_value = {one.value: sized(one, folder, "decoupled", found.shape, found.counts) for one in options}
    assert by_value["network"].latency_at_target_s > by_value["as planned"].latency_at_target_s


def test_what_the_profile_does_not_know_is_not_found_and_a_broken_store_is_said(tiny_plan: Any, tmp_path: Path) -> None:
    scenario, folder = tiny_plan.scenario, tiny_plan.folder
    plain = variations_of(scenario, folder, "colocated", build_traffic(scenario, folder).workload)[0]
    missing = scenario.model_copy(update={"profile": scenario.profile.model_copy(update={"name": "nowhere.json"})})
    shape = None
    nothing = sized(variations.Variation("profile", "x", missing), folder, "colocated", shape, (1,))
    assert nothing.counts is None
    assert math.isnan(nothing.attainment_ratio)
    (tmp_path / FILE).write_bytes(b"no database" * 1000)
    with pytest.raises(InputError, match="run store"):
        make_plan(scenario, folder, jobs=1, store=tmp_path)
    assert plain.value == variations.PRESENT


def test_the_cheapest_other_value_is_named_and_called_unconfirmed(tiny_plan: Any) -> None:
    scenario, folder = tiny_plan.scenario, tiny_plan.folder
    options = variations_of(scenario, folder, "colocated", build_traffic(scenario, folder).workload)[:3]
    found = [Sized((5,), 1.0, 1.0), Sized((4,), 1.0, 1.0), Sized(None, 0.5, 2.0)]
    record = settings_record(scenario, folder, options, found, tiny_plan.result.price, 100)
    assert "in place of 5" in record.sentence
    assert "plan again" in record.sentence
    assert [row.difference_usd_per_month for row in record.rows] == [0.0, -2.0 * 730.0, None]
