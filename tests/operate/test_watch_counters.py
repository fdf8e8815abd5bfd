"""``diffplan watch`` on counters: the same drifts from a summary, its gaps left out; and proposals, which are files and a difference only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from planner.export.metric_names import SECONDS_BUCKETS
from planner.files import write_texts
from planner.observe.ask import ObserveQuestion
from planner.observe.summary import Summary, WindowRow, to_json
from planner.plan_files import write_plan
from planner.plan_run import make_plan
from planner.scenario import load_scenario
from planner.watch.ask import WatchQuestion, answer
from tests.operate.records import records, write_live, write_plan_folder
from traces.problems import InputError
from traces.reader import read_table
from traces.records import REQUEST_RECORD_COLUMNS

WINDOW_S = 60.0


def summary_of(frame: pd.DataFrame, n_windows: int, gap: range = range(0)) -> Summary:
    """What an engine's counters would say of records; nothing was seen in the windows of ``gap``."""
    rows = []
    for k in range(n_windows):
        own = frame[(frame["end_s"] // WINDOW_S == k) & (k not in gap)]
        n = float(len(own))
        stages = {stage: float(own[f"{stage}_s"].sum()) for stage in ("denoise", "decode")}
        rows.append(
            WindowRow(
                start_s=WINDOW_S * k, end_s=WINDOW_S * (k + 1), is_covered=k not in gap, n_offered=n, n_answered=n, n_done=n,
                latency_le=tuple(float((own["latency_s"] <= bound).sum()) for bound in SECONDS_BUCKETS),
                latency_sum_s=float(own["latency_s"].sum()), stage_n=dict.fromkeys(stages, n), stage_sum_s=stages,
                n_uses={"controlnet": float(own["n_controlnets"].sum()), "lora": float(own["n_loras"].sum())}, n_images=n,
                n_lora_hits=float((own["n_loras"] - own["n_lora_misses"]).sum()), n_lora_misses=float(own["n_lora_misses"].sum()),
                busy_ratio={}, ready_replicas={}, queue_depth_mean=0.0,
            )
        )  # fmt: skip
    return Summary(
        source="counters", match="", window_s=WINDOW_S, scrape_interval_s=5.0, n_targets=1, n_counter_resets=0,
        bounds_s=tuple(map(float, SECONDS_BUCKETS)), windows=tuple(rows),
    )  # fmt: skip


def verdict(plan: Path, folder: Path, summary: Summary) -> dict[str, Any]:
    write_texts(folder, {"summary.json": to_json(summary)})
    return answer(WatchQuestion(ObserveQuestion(str(folder / "summary.json")), plan), lambda _: None).plain


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_plan_folder(tmp_path_factory.mktemp("plan"))


@pytest.mark.parametrize(
    ("drift", "expected"),
    [
        ({}, "in_plan"),
        ({"slow": 1.1}, "engine_drifted"),
        ({"rate": 1.25}, "traffic_changed"),
        ({"wait_s": 30.0}, "capacity_short"),
    ],
)
def test_counters_tell_the_same_drifts_apart(
    plan: Path, tmp_path: Path, drift: dict[str, float], expected: str
) -> None:
    frame = pd.concat([records(21, 3600.0), records(22, 1860.0, begin_s=3600.0, **drift)])
    assert verdict(plan, tmp_path, summary_of(frame, 91))["verdict"] == expected


def test_a_gap_in_the_scrapes_is_not_taken_for_traffic_that_fell(plan: Path, tmp_path: Path) -> None:
    found = verdict(plan, tmp_path, summary_of(records(21, 5400.0), 90, gap=range(30, 60)))
    assert (found["verdict"], found["n_windows"]) == ("in_plan", 60)


def test_a_summary_of_a_newer_schema_or_half_written_gets_a_sentence(plan: Path, tmp_path: Path) -> None:
    text = to_json(summary_of(records(21, 120.0), 2))
    for wrong in (text.replace('"schema_version": 1', '"schema_version": 2'), text[: len(text) // 2], "[]", ""):
        (tmp_path / "summary.json").write_text(wrong)
        with pytest.raises(InputError, match=r"summary\.json"):
            answer(WatchQuestion(ObserveQuestion(str(tmp_path / "summary.json")), plan), lambda _: None)


def test_a_proposal_for_more_traffic_is_a_plan_with_its_difference(tmp_path: Path) -> None:
    scenario, folder = load_scenario("sample:small")
    fewer = scenario.simulation.model_copy(update={"replications": 2})
    scenario = scenario.model_copy(update={"topologies": ("colocated",), "simulation": fewer})  # it plans twice
    held = tmp_path / "held"
    write_plan(make_plan(scenario, folder, jobs=1), scenario, folder, held)
    frame = read_table(held / "requests.parquet", REQUEST_RECORD_COLUMNS)
    more = frame.iloc[np.arange(len(frame)) % 2 == 0].copy()
    more["request_id"] = more["request_id"] + "-again"
    live = write_live(tmp_path / "live", frame, more)
    before = {path.name: path.read_bytes() for path in held.iterdir()}
    question = WatchQuestion(ObserveQuestion(str(live)), held, propose=tmp_path / "new", jobs=1)
    found = answer(question, lambda _: None).plain
    assert found["verdict"] == "traffic_changed"
    change = found["proposal"]["change"]
    assert change["n_gpus_after"] > change["n_gpus_before"]
    assert json.loads((tmp_path / "new" / "plan.json").read_text())["verdict"] == "recommended"
    assert {path.name: path.read_bytes() for path in held.iterdir()} == before


def test_other_requests_need_a_log_to_be_planned_for(plan: Path, tmp_path: Path) -> None:
    scenario, folder = load_scenario("sample:small")
    from planner.plan_files import with_absolute_paths
    from planner.scenario import to_yaml

    write_texts(plan, {"scenario.resolved.yaml": to_yaml(with_absolute_paths(scenario, folder))})
    live = write_live(tmp_path / "live", records(3, 7200.0, controlnets=0.9))
    with pytest.raises(InputError, match="Add --log FILE"):
        answer(WatchQuestion(ObserveQuestion(str(live)), plan, propose=tmp_path / "new"), lambda _: None)
