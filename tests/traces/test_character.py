"""The description of traces whose character is known by construction."""

from __future__ import annotations

import json
from statistics import mean, stdev

import pytest

from traces.character import describe, rates, spread
from traces.problems import InputError

HOUR = 3600.0


def test_rates_of_a_level_stream(make_trace) -> None:
    trace = make_trace(arrival_s=[60.0 * k for k in range(24 * 60)], duration_s=24 * HOUR)
    found = rates(trace)
    assert (found.slot_s, found.slot_mean, found.slot_median, found.slot_max) == (HOUR, 60.0, 60.0, 60)
    assert found.peak_to_mean == 1.0
    assert found.interarrival_cv == pytest.approx(0.0, abs=1e-12)  # equal gaps of whole seconds: exact in float64
    assert found.dispersion == 0.0
    assert found.mean_per_s == pytest.approx(1 / 60)


def test_rates_of_a_stream_with_one_busy_hour(make_trace) -> None:
    arrivals = [3 * HOUR + k for k in range(70)] + [k * HOUR for k in range(10)]
    found = rates(make_trace(arrival_s=arrivals, duration_s=10 * HOUR))
    assert found.slot_counts == (1, 1, 1, 71, 1, 1, 1, 1, 1, 1)
    assert found.slot_max == 71
    assert found.peak_to_mean == pytest.approx(71 / 8)
    assert found.slot_median == 1
    gaps = [3600] * 3 + [0] + [1] * 69 + [3600 - 69] + [3600] * 5
    assert found.interarrival_cv == pytest.approx(stdev(gaps) / mean(gaps))


def test_a_short_trace_is_counted_by_the_minute_and_few_requests_have_no_cv(make_trace) -> None:
    found = rates(make_trace(arrival_s=[0.0, 30.0], duration_s=120.0))
    assert (found.slot_s, found.slot_counts, found.interarrival_cv) == (60.0, (2, 0), None)


def test_a_trace_without_length_is_refused(make_trace) -> None:
    with pytest.raises(InputError, match="window longer than 0"):
        describe(make_trace(arrival_s=[0.0]))


def test_add_ons_popularity_switches_and_mixes(make_trace) -> None:
    trace = make_trace(
        arrival_s=[0, 1, 2, 3],
        base_model_id=["m", "n", "n", "m"],
        controlnet_ids=[["c", "d"], ["c"], [], ["c"]],
        lora_ids=[[], [], [], ["x"]],
        n_images=[1, 4, 1, 1],
        tenant_id=["t", "t", "u", "t"],
    )
    found = describe(trace)
    assert found.controlnets.per_request == {0: 0.25, 1: 0.5, 2: 0.25}
    assert found.controlnets.mean_per_request == 1.0
    assert found.controlnets.popularity.top_shares == {1: 0.75, 2: 1.0}
    assert found.checkpoint_switch_share == pytest.approx(2 / 3)
    assert found.images_mix == {"1": 0.75, "4": 0.25}
    assert found.size_mix == {"1024×1024": 1.0}
    assert found.n_tenants == 2
    # c d c c: with one place c loads twice and d once, with two places each loads once.
    assert dict(zip(found.controlnets.loads.cache_sizes, found.controlnets.loads.loads_per_request, strict=True)) == {
        1: 0.75,
        2: 0.5,
    }
    plain = found.to_plain()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain


def test_requests_go_round_the_instances_or_where_the_trace_says(make_trace) -> None:
    in_turn = make_trace(arrival_s=[0, 1, 2, 3, 4])
    assert spread(in_turn, 2)[0].tolist() == [0, 1, 0, 1, 0]
    named = make_trace(arrival_s=[0, 1, 2, 3], instance_id=["b", "a", "b", "c"])
    assert spread(named)[:2][0].tolist() == [0, 1, 0, 2]
    assert spread(named)[1] == 3
    folded, n_instances, rule = spread(named, 2)
    assert (folded.tolist(), n_instances) == ([0, 1, 0, 0], 2)
    assert "folded" in rule
    with pytest.raises(InputError, match="number of instances: got 0"):
        spread(named, 0)


def test_a_thing_on_two_instances_loads_twice(make_trace) -> None:
    trace = make_trace(arrival_s=[0, 1, 2, 3], lora_ids=[["x"]] * 4)
    assert describe(trace, 1).loras.loads.loads_per_request == (0.25,)
    assert describe(trace, 2).loras.loads.loads_per_request == (0.5,)


def test_days_are_counted_from_the_start(make_trace) -> None:
    trace = make_trace(arrival_s=[0, 10, 90_000, 90_001, 90_002], duration_s=100_000)
    assert [(day.day, day.n_requests, day.busiest_slot) for day in describe(trace).days] == [(0, 2, 2), (1, 3, 3)]
