"""The requests of a scenario and of its repetitions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from planner.scenario import load_scenario
from planner.traffic import build_traffic, busiest_stretch, resample_days, source_trace, stream_seed, variation_of
from planner.workload import build_workload
from traces.problems import InputError
from traces.reader import read_trace
from traces.scaling import DAY_S
from traces.trace import Trace


@pytest.fixture
def five_days(tmp_path: Path) -> Trace:
    # day d has d + 1 requests, an hour apart, and half a sixth day has one
    rows = [(f"d{day}h{hour}", day * DAY_S + 3600.0 * (hour + 1)) for day in range(5) for hour in range(day + 1)]
    rows.append(("last", 5.5 * DAY_S))
    path = tmp_path / "days.csv"
    path.write_text("request_id,arrival_s\n" + "".join(f"{name},{at}\n" for name, at in rows))
    return read_trace(path)


def test_resampled_days_are_whole_days_of_the_trace_at_their_own_hours(five_days: Trace) -> None:
    again = resample_days(five_days, 3)
    assert again.duration_s == five_days.duration_s
    assert again.requests["arrival_s"].is_monotonic_increasing
    assert again.requests["request_id"].is_unique
    for slot in range(5):
        day = again.requests[(again.requests["arrival_s"] // DAY_S) == slot]
        (source,) = {name.split("h")[0] for name in day["request_id"]}
        assert len(day) == int(source[1:]) + 1
        assert (day["arrival_s"] % DAY_S).tolist() == [3600.0 * (hour + 1) for hour in range(len(day))]


def test_a_last_day_that_is_cut_short_stays_last(five_days: Trace) -> None:
    again = resample_days(five_days, 3)
    assert again.requests["arrival_s"].iloc[-1] == 5.5 * DAY_S
    assert again.requests["request_id"].iloc[-1] == "last@5"


def test_other_seeds_resample_other_days(five_days: Trace) -> None:
    names = {tuple(resample_days(five_days, seed).requests["request_id"]) for seed in range(8)}
    # 5**5 orders of days: eight seeds that agree would be chance of 1 in 10**24
    assert len(names) > 1


def test_scaled_traffic_is_shifted_anew_in_every_repetition(
    write_scenario: Callable[..., Path], tmp_path: Path
) -> None:
    scenario, folder = load_scenario(str(write_scenario(tmp_path)))
    assert variation_of(scenario, source_trace(scenario, folder).duration_s) == "shifted copies"
    stated, first, again, second = (build_traffic(scenario, folder, index).workload for index in (None, 0, 0, 1))
    assert len(stated) == len(first) == len(second) == 300
    assert np.array_equal(first.arrival_s, again.arrival_s)
    assert not np.array_equal(first.arrival_s, stated.arrival_s)
    assert not np.array_equal(first.arrival_s, second.arrival_s)


def test_the_busiest_stretch_is_the_shortest_with_so_many_requests(five_days: Trace) -> None:
    part = busiest_stretch(build_workload(five_days), 5)
    assert part.request_ids == tuple(f"d4h{hour}" for hour in range(5))
    assert part.arrival_s.tolist() == [0.0, 3600.0, 7200.0, 10800.0, 14400.0]
    assert part.duration_s == 14400.0


def test_a_window_without_requests_names_the_field(write_scenario: Callable[..., Path], tmp_path: Path) -> None:
    path = write_scenario(tmp_path)
    path.write_text(path.read_text().replace("  scale_factor: 2\n", "  window: {start_h: 10, end_h: 11}\n"))
    scenario, folder = load_scenario(str(path))
    with pytest.raises(InputError, match=r"traffic\.window"):
        build_traffic(scenario, folder)


def test_streams_of_other_names_and_repetitions_are_apart() -> None:
    seeds = [stream_seed(seed, name, index) for seed in (0, 1) for name in ("days", "noise") for index in (0, 1)]
    assert len(set(seeds)) == len(seeds)
