"""Scaled traffic: the count is exact, popularity stays, the shift law does what it says."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from traces.character import rates
from traces.frame import checked_frame
from traces.problems import InputError
from traces.scaling import DAY_S, SHIFT_LAWS, busiest_window, scale_traffic, scaled_busiest_window, window
from traces.trace import Provenance


@pytest.fixture
def days(make_trace):
    """Three and a half days with all requests between noon and one o'clock, in short bursts."""
    arrivals = [day * DAY_S + 43_200 + 600 * burst + k for day in range(3) for burst in range(6) for k in range(5)]
    return make_trace(
        arrival_s=arrivals,
        lora_ids=[[f"x{row % 4}"] for row in range(len(arrivals))],
        instance_id=[f"i{row % 2}" for row in range(len(arrivals))],
        duration_s=3.5 * DAY_S,
    )


@pytest.mark.parametrize("law", SHIFT_LAWS)
@pytest.mark.parametrize("factor", [0.3, 2, 7.5])
def test_count_window_and_popularity_are_kept(days, law, factor) -> None:
    scaled = scale_traffic(days, factor, law, seed=3)
    assert len(scaled) == round(factor * len(days))
    assert scaled.duration_s == days.duration_s
    assert scaled.requests["request_id"].is_unique
    arrivals = scaled.requests["arrival_s"].to_numpy()
    assert (np.diff(arrivals) >= 0).all()
    assert arrivals[0] >= 0
    assert arrivals[-1] <= days.duration_s
    before = Counter(name for names in days.requests["lora_ids"] for name in names)
    after = Counter(name for names in scaled.requests["lora_ids"] for name in names)
    # Whole copies keep the counts exactly; only the thinned last copy (at most len(days) requests) can differ.
    for name, count in before.items():
        assert int(factor) * count <= after[name] <= (int(factor) + 1) * count
    assert f"×{factor:g}" in scaled.provenance.notes[-1]
    assert law in scaled.provenance.notes[-1]


def test_same_hours_keeps_the_hour_of_the_day(days) -> None:
    scaled = scale_traffic(days, 50, "same_hours", seed=1)
    hours = scaled.requests["arrival_s"].to_numpy() % DAY_S
    assert hours.min() >= 43_200 - 900  # noon to one, and the jitter of 15 minutes either way
    assert hours.max() <= 43_200 + 3_600 + 900
    # The half fourth day ends at noon: of these hours it has only the quarter before.
    assert set((scaled.requests["arrival_s"] // DAY_S).astype(int)) == {0, 1, 2, 3}
    assert scaled.requests["arrival_s"].max() < days.duration_s


def test_burstiness_follows_the_law(days) -> None:
    peak = {law: rates(scale_traffic(days, 40, law, seed=2)).peak_to_mean for law in SHIFT_LAWS}
    assert peak["independent"] < peak["same_hours"]
    assert peak["independent"] < peak["amplify"]
    moved = scale_traffic(days, 40, "amplify", seed=2).requests["arrival_s"].to_numpy() % DAY_S
    assert moved.min() >= 43_200
    assert moved.max() <= 43_200 + 7_200  # an hour of requests, shifted by less than an hour


def test_a_trace_shorter_than_two_days_gets_the_jitter_alone(make_trace) -> None:
    hour = make_trace(arrival_s=[1800.0, 1801.0], duration_s=3600.0)
    scaled = scale_traffic(hour, 30, "same_hours", seed=0)
    arrivals = scaled.requests["arrival_s"]
    assert arrivals.between(1800 - 900, 1801 + 900).all()
    assert arrivals.nunique() > 50
    assert "no whole days" in scaled.provenance.notes[-1]


def test_factor_one_changes_nothing(days) -> None:
    assert scale_traffic(days, 1) is days


def test_scaling_twice_still_gives_unique_names(days) -> None:
    twice = scale_traffic(scale_traffic(days, 3, seed=1), 3, seed=2)
    assert twice.requests["request_id"].is_unique
    assert twice.requests["instance_id"].nunique() == 2 * 9


def test_a_copy_does_not_depend_on_how_many_there_are(days) -> None:
    few, many = scale_traffic(days, 3, seed=9).requests, scale_traffic(days, 5, seed=9).requests
    shared = many[many["request_id"].isin(few["request_id"])].reset_index(drop=True)
    assert shared[["request_id", "arrival_s"]].equals(few[["request_id", "arrival_s"]])


@pytest.mark.parametrize(
    ("factor", "law", "sentence"),
    [
        (0, "same_hours", "got 0, needs a number above 0"),
        (float("nan"), "same_hours", "got nan"),
        (0.001, "same_hours", "makes 0 requests of 90"),
        (1e5, "independent", r"needs one that makes 1\.\.20000000 requests|1e\+05"),
        (2, "weekly", "got 'weekly', needs one of same_hours, independent, amplify"),
    ],
)
def test_a_senseless_scaling_is_refused(days, factor, law, sentence) -> None:
    if factor == 1e5:
        days = scale_traffic(days, 3)  # 27 million requests
    with pytest.raises(InputError, match=sentence):
        scale_traffic(days, factor, law)


@pytest.mark.parametrize("law", SHIFT_LAWS)
@pytest.mark.parametrize("factor", [1, 0.5, 6.2])
def test_the_busiest_window_can_be_cut_without_building_the_rest(days, law, factor) -> None:
    scaled = scale_traffic(days, factor, law, seed=4)
    wanted = window(scaled, *busiest_window(scaled, DAY_S))
    found = scaled_busiest_window(days, factor, DAY_S, law, seed=4)
    assert found.requests.equals(wanted.requests)
    assert (found.provenance, found.duration_s) == (wanted.provenance, wanted.duration_s)


def test_a_window_starts_at_zero_and_keeps_its_requests(make_trace) -> None:
    trace = make_trace(arrival_s=[0.0, 5.0, 9.0, 10.0], duration_s=10.0)
    part = window(trace, 5.0, 10.0)
    assert part.requests["arrival_s"].tolist() == [0.0, 4.0, 5.0]  # the trace's own end belongs to its last window
    assert window(trace, 0.0, 5.0).requests["arrival_s"].tolist() == [0.0]
    assert part.duration_s == 5.0
    for start_s, end_s in ((-1, 5), (5, 5), (0, 11)):
        with pytest.raises(InputError, match="window: got"):
            window(trace, start_s, end_s)
    with pytest.raises(InputError, match="holds no request"):
        window(trace, 6.0, 7.0)


arrivals_of = st.lists(st.integers(0, 100), min_size=1, max_size=30)


@given(arrivals_of, st.integers(1, 120))
@settings(max_examples=100, deadline=None)
def test_no_window_holds_more_than_the_busiest_one(arrivals, length) -> None:
    frame = pd.DataFrame(
        {"request_id": [str(k) for k in range(len(arrivals))], "arrival_s": [float(a) for a in arrivals]}
    )
    trace = checked_frame(frame, "t", Provenance("t"), 101.0)
    start_s, end_s = busiest_window(trace, float(length))
    assert 0 <= start_s < end_s <= 101.0
    held = len(window(trace, start_s, end_s))
    assert held == max(sum(start <= a < start + length for a in arrivals) for start in range(-length, 101))
