"""Backtests, paired comparisons, uncertainty and sweeps from the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from planner.plan_record import read_plan


@pytest.fixture
def growing(tmp_path: Path, question: Path) -> Path:
    """Traffic that grows eightfold half way: a plan on the past cannot know."""
    arrival_s = np.concatenate([np.arange(0, 1800, 4.0), np.arange(1800, 3600, 0.5)])
    rows = [f"r{i},{at},50\n" for i, at in enumerate(arrival_s)]
    (tmp_path / "trace.csv").write_text("request_id,arrival_s,n_steps\n" + "".join(rows), encoding="utf-8")
    text = question.read_text().replace("latency_s: 10", "latency_s: 4")
    question.write_text(text + "topologies: [diffusers, colocated]\n", encoding="utf-8")
    return question


def test_a_backtest_sees_a_plan_fail_that_could_not_know(diffplan: Callable, growing: Path, tmp_path: Path) -> None:
    done = diffplan("plan", growing, "--train-until", 0.5, "--out", tmp_path / "bt", "--jobs", 1, "--json")
    assert done.code == 0, done.err
    said = json.loads(done.out)
    assert said == json.loads((tmp_path / "bt" / "backtest.json").read_text())
    scores = {row["name"]: row for row in said["scores"]}
    assert said["mean_per_s"]["rest"] > 3 * said["mean_per_s"]["train"]
    # eight times the traffic: the past's fleet is too small, hindsight's keeps the promise and costs more
    assert not scores["plan"]["keeps_promise"]
    assert scores["hindsight"]["keeps_promise"]
    assert said["regret_usd_per_month"] < 0
    assert "breaks the promise" in said["sentence"]
    assert read_plan(tmp_path / "bt").recommended == scores["plan"]["topology"]


def test_a_backtest_needs_a_time_inside_an_uncut_trace(diffplan: Callable, growing: Path, tmp_path: Path) -> None:
    done = diffplan("plan", growing, "--train-until", 5, "--out", tmp_path / "bt")
    assert done.code == 2
    assert "--train-until: got 5 h, needs hours inside the trace" in done.err
    growing.write_text(growing.read_text().replace("slo:", "  busiest:\n    length_h: 0.2\nslo:", 1))
    done = diffplan("plan", growing, "--train-until", 0.5, "--out", tmp_path / "bt")
    assert done.code == 2
    assert "traffic.window or traffic.busiest" in done.err


def test_paired_plans_are_compared_on_the_same_arrivals(diffplan: Callable, growing: Path, tmp_path: Path) -> None:
    diffplan("plan", growing, "--out", tmp_path / "one", "--jobs", 1)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    smaller = json.loads((tmp_path / "two" / "allocation.json").read_text())
    smaller["pools"][0]["n_replicas"] -= 1
    (tmp_path / "two" / "allocation.json").write_text(json.dumps(smaller))
    done = diffplan("compare", tmp_path / "one", tmp_path / "one", tmp_path / "two", "--paired", "--repetitions", 3, "--jobs", 1, "--json")  # fmt: skip
    assert done.code == 0, done.err
    itself, other = json.loads(done.out)
    # common random numbers: a plan against itself differs by exactly nothing
    assert {row["difference"]["mean"] for row in itself["figures"].values()} == {0.0}
    assert other["figures"]["latency_p95_s"]["verdict"] == "more"  # one GPU less, on the same requests
    kept = ("--paired", "--repetitions", 3, "--jobs", 1, "--json", "--store", tmp_path / "store")
    stored = [diffplan("compare", tmp_path / "one", tmp_path / "two", *kept).out for _ in range(2)]
    assert stored[0] == stored[1]
    assert json.loads(stored[0])[0]["figures"] == other["figures"]  # the store changes nothing
    assert diffplan("compare", tmp_path / "one", "--paired").code == 2


def test_uncertainty_says_what_is_missing(diffplan: Callable, growing: Path, tmp_path: Path) -> None:
    trace = tmp_path / "t.json.gz"
    done = diffplan(
        "simulate", growing, "--topology", "colocated", "--replicas", 3, "--out", tmp_path / "sim", "--uncertainty", 3,
        "--chrome-trace", trace, "--jobs", 1, "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    said = json.loads(done.out)
    assert trace.exists()
    assert any("Day-to-day variation is missing" in line for line in said["uncertainty"]["missing"])
    assert said["uncertainty"]["variance_share"]["latency_p95_s"]["days"] == 0.0
    p95 = said["latency_intervals"]["all"]["p95_s"]
    assert p95["low"] <= p95["mean"] <= p95["high"]
    assert p95["mean"] == said["metrics"]["latency_p95_s"]


def test_a_sweep_gives_the_same_rows_on_threads_and_refuses_backends_that_are_not_there(
    diffplan: Callable, growing: Path, tmp_path: Path
) -> None:
    common = ("sweep", growing, "--topology", "colocated", "--replicas", "2:3", "--json")
    one = diffplan(*common, "--store", tmp_path / "a", "--jobs", 1)
    two = diffplan(*common, "--store", tmp_path / "b", "--jobs", 2, "--backend", "threading")
    assert one.code == 0, one.err
    assert one.out == two.out
    assert diffplan(*common, "--store", tmp_path / "c", "--backend", "magic").code == 2
