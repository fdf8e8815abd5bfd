"""``diffplan watch``: each drift gets its name, noise gets none, signals stay until they are refuted, and mistakes get a sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from planner.observe.ask import ObserveQuestion
from planner.watch.ask import WatchQuestion, answer
from planner.watch.charts import WINDOWS_MIN, Chart, run_chart
from planner.watch.windows import Tally
from tests.operate.records import records, write_live, write_plan_folder
from traces.problems import InputError


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_plan_folder(tmp_path_factory.mktemp("plan"))


def verdict(plan: Path, folder: Path, *parts: pd.DataFrame, **other: Any) -> dict[str, Any]:
    path = write_live(folder, *parts)
    return answer(WatchQuestion(ObserveQuestion(str(path)), plan, **other), lambda _: None).plain


def on(plain: dict[str, Any]) -> set[tuple[str, str]]:
    return {(chart["measure"], chart["direction"]) for chart in plain["charts"] if chart["is_on"]}


def test_an_engine_that_does_what_was_planned_is_in_plan(plan: Path, tmp_path: Path) -> None:
    # ten hours; all charts together signal once in thirty days, so this seed would have to be one of 1.4 % of seeds to fail
    plain = verdict(plan, tmp_path, records(7, 36_000.0))
    assert plain["verdict"] == "in_plan"
    assert not on(plain)


@pytest.mark.parametrize(
    ("drift", "expected", "chart"),
    [
        ({"slow": 1.1}, "engine_drifted", ("stage_denoise", "up")),
        ({"slow": 0.9}, "engine_drifted", ("stage_denoise", "down")),
        ({"rate": 1.25}, "traffic_changed", ("traffic_rate", "up")),
        ({"rate": 0.75}, "traffic_changed", ("traffic_rate", "down")),
        ({"controlnets": 0.75}, "traffic_changed", ("controlnets_per_request", "up")),
        ({"misses": 0.4}, "traffic_changed", ("lora_misses", "up")),
        ({"wait_s": 30.0}, "capacity_short", ("late", "up")),
    ],
)  # fmt: skip
def test_each_drift_is_found_within_half_an_hour_and_named(
    plan: Path, tmp_path: Path, drift: dict[str, float], expected: str, chart: tuple[str, str]
) -> None:
    # 20 s more than the half hour: the last windows wait for requests that may still run
    live = [records(11, 7200.0), records(12, 1820.0, begin_s=7200.0, **drift)]
    plain = verdict(plan, tmp_path, *live)
    assert (plain["verdict"], chart in on(plain)) == (expected, True)
    found = next(each for each in plain["charts"] if (each["measure"], each["direction"]) == chart)
    # where the shift began is estimated: some windows early by noise, or late if the first shifted windows looked normal
    assert 7200.0 - 600.0 <= found["changed_at_s"] <= 7200.0 + 600.0


def test_other_requests_are_not_taken_for_a_slower_engine(plan: Path, tmp_path: Path) -> None:
    plain = verdict(plan, tmp_path, records(3, 7200.0, controlnets=0.9))
    assert plain["verdict"] == "traffic_changed"
    assert "engine_drifted" not in plain["also"]


def test_a_slow_engine_under_more_traffic_is_said_to_be_both(plan: Path, tmp_path: Path) -> None:
    plain = verdict(plan, tmp_path, records(3, 7200.0, rate=1.4, slow=1.15))
    assert plain["verdict"] == "traffic_changed"
    assert "engine_drifted" in plain["also"]


def test_an_engine_that_recovers_is_in_plan_again(plan: Path, tmp_path: Path) -> None:
    parts = [records(1, 3600.0), records(2, 3600.0, begin_s=3600.0, slow=1.15), records(3, 10_800.0, begin_s=7200.0)]
    plain = verdict(plan, tmp_path, *parts)
    assert plain["verdict"] == "in_plan"
    assert any(chart["n_signals"] == 1 for chart in plain["charts"] if chart["measure"] == "stage_denoise")


def test_traffic_that_stops_is_seen_if_the_engine_is_known_to_live(plan: Path, tmp_path: Path) -> None:
    quiet = verdict(plan, tmp_path, records(5, 3600.0), until_s=5400.0)
    assert ("traffic_rate", "down") in on(quiet)


def test_one_window_never_decides() -> None:
    course = run_chart(np.array([1e9, 0.0, 0.0]), 10.0)
    assert not course.is_on.any()
    assert run_chart(np.full(WINDOWS_MIN, 1e9), 10.0).is_on[-1]


def test_a_shift_at_the_border_does_not_flap() -> None:
    # exactly between in plan and shifted, evidence has mean 0: a plain threshold would cross at every other window
    chart = Chart("traffic_rate", "up", "poisson", np.array(1.0), np.array(1.25))
    border = 0.25 / np.log(1.25)
    rng = np.random.default_rng(4)
    n_windows = 30 * 1440
    tally = Tally(np.full(n_windows, 60.0), rng.poisson(60 * border, n_windows).astype(float))
    h = 13.0
    # a random walk with this step changes state about every (h/sd)^2 windows; four times as often is still no flapping
    sd = float(np.std(chart.evidence(tally)))
    plain_crossings = int((np.diff((tally.total > 60 * border).astype(int)) != 0).sum())
    n_changes = int((np.diff(run_chart(chart.evidence(tally), h).is_on.astype(int)) != 0).sum())
    assert n_changes <= 4 * n_windows * (sd / h) ** 2
    assert n_changes < plain_crossings / 20


def test_false_signals_are_as_rare_as_the_bound_says() -> None:
    chart = Chart("late", "up", "binomial", np.array(0.05), np.array(0.10))
    h = float(np.log(1000.0))
    n_windows = 200_000
    rng = np.random.default_rng(0)
    tally = Tally(np.full(n_windows, 60.0), rng.binomial(60, 0.05, n_windows).astype(float))
    # Lorden: at most one in 1000 windows, 200 here; more than 3 Poisson deviations above that has probability 0.1 %
    assert run_chart(chart.evidence(tally), h).n_signals <= 200 + 3 * 200**0.5


def test_the_command_prints_one_json_line_and_ends_with_4_unless_in_plan(plan: Path, tmp_path: Path) -> None:
    path = write_live(tmp_path, records(3, 7200.0, slow=1.2))
    done = subprocess.run(
        [sys.executable, "-m", "planner", "watch", str(path), "--plan", str(plan), "--json"], capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 4, done.stderr
    assert done.stdout.count("\n") == 1
    assert json.loads(done.stdout)["verdict"] == "engine_drifted"


def test_a_drifted_engine_gets_no_plan_but_a_calibration(plan: Path, tmp_path: Path) -> None:
    plain = verdict(plan, tmp_path / "live", records(3, 7200.0, slow=1.2), propose=tmp_path / "new")
    assert plain["proposal"]["status"] == "recalibrate_first"
    assert not (tmp_path / "new").exists()


def test_the_same_records_give_the_same_bytes(plan: Path, tmp_path: Path) -> None:
    first, second = (verdict(plan, tmp_path / "live", records(3, 7200.0, rate=1.3)) for _ in range(2))
    assert json.dumps(first) == json.dumps(second)


def test_mistakes_get_a_sentence(plan: Path, tmp_path: Path) -> None:
    short = write_live(tmp_path / "short", records(1, 200.0))
    with pytest.raises(InputError, match="Wait until the engine has served longer"):
        answer(WatchQuestion(ObserveQuestion(str(short)), plan), lambda _: None)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "plan.json").write_text((plan / "plan.json").read_text())
    with pytest.raises(InputError, match=r"requests\.parquet"):
        answer(WatchQuestion(ObserveQuestion(str(short)), bare), lambda _: None)
    (bare / "plan.json").write_text((plan / "plan.json").read_text()[:500])
    with pytest.raises(InputError, match=r"plan\.json"):
        answer(WatchQuestion(ObserveQuestion(str(short)), bare), lambda _: None)
