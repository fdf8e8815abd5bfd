"""Judging a live test: real differences are found, chance is not, and what must not get worse stops the roll-out."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from planner.ab import REQUESTS_MIN, judge
from planner.cli import main
from traces.problems import InputError
from traces.records import REQUEST_RECORD_COLUMNS
from traces.writer import write_table


def log(path: Path, latency_s: np.ndarray, *, n_failed: int = 0, n_controlnets: int = 1) -> Path:
    n = len(latency_s)
    arrival_s = np.arange(n) * 2.0
    status = np.array(["failed"] * n_failed + ["done"] * (n - n_failed), dtype=object)
    is_done = status == "done"
    frame = pd.DataFrame(
        {
            "request_id": [f"r{row}" for row in range(n)], "arrival_s": arrival_s, "status": status, "end_s": arrival_s + latency_s,
            "start_s": arrival_s, "queue_wait_s": 0.0, "denoise_alone_s": np.nan, "latency_s": np.where(is_done, latency_s, np.nan),
            "n_controlnets": n_controlnets,
        }
    )  # fmt: skip
    for column in REQUEST_RECORD_COLUMNS:
        if column.name not in frame:
            frame[column.name] = column.default
    return write_table(frame, REQUEST_RECORD_COLUMNS, path)


def latencies(seed: int, mean_s: float, n: int = 1200) -> np.ndarray:
    return np.random.default_rng(seed).gamma(4.0, mean_s / 4.0, n)


def test_a_faster_side_is_better_and_the_interval_holds_the_true_difference(tmp_path: Path) -> None:
    found = judge(log(tmp_path / "a", latencies(1, 6.0)), log(tmp_path / "b", latencies(2, 4.0)), 12.0)
    assert found.verdict == "B is better"
    mean = next(item for item in found.differences if item.figure == "mean latency")
    assert mean.low < -2.0 < mean.high < 0


def test_a_slower_side_is_worse(tmp_path: Path) -> None:
    found = judge(log(tmp_path / "a", latencies(1, 6.0)), log(tmp_path / "b", latencies(2, 7.0)))
    assert found.verdict in {"B is worse", "guardrail broken"}


def test_two_samples_of_one_service_are_seldom_told_apart(tmp_path: Path) -> None:
    # at 5 % two-sided, 3 or more of 8 independent comparisons are wrong with probability 0.6 %; the seeds are fixed
    wrong = 0
    for seed in range(8):
        a = log(tmp_path / f"a{seed}", latencies(100 + seed, 5.0, 300))
        b = log(tmp_path / f"b{seed}", latencies(200 + seed, 5.0, 300))
        wrong += judge(a, b).verdict != "no difference shown"
    assert wrong <= 2


def test_queueing_neighbours_widen_the_interval(tmp_path: Path) -> None:
    """Latencies that come in runs say less than as many independent ones."""
    runs = np.repeat(latencies(3, 5.0, 40), 30)
    apart = np.random.default_rng(0).permutation(runs)
    width = {}
    for name, values in (("runs", runs), ("apart", apart)):
        found = judge(log(tmp_path / f"{name}a", values), log(tmp_path / f"{name}b", values[::-1].copy()))
        mean = found.differences[0]
        width[name] = mean.high - mean.low
    assert width["runs"] > 2 * width["apart"]


def test_a_faster_mean_does_not_hide_slower_slow_requests(tmp_path: Path) -> None:
    latency_s = latencies(1, 6.0)  # p95 11.6 s, p99 15 s
    faster = np.where(np.arange(1200) % 12 == 0, 13.0, np.maximum(latency_s - 3.0, 0.1))
    found = judge(log(tmp_path / "a", latency_s), log(tmp_path / "b", faster))
    assert found.verdict == "B is better"
    assert "slow requests are slower: p95 latency +" in found.sentence
    plain = judge(log(tmp_path / "c", latencies(1, 6.0)), log(tmp_path / "d", latencies(2, 4.0)))
    assert "slower" not in plain.sentence


def test_failures_stop_a_roll_out_that_is_faster(tmp_path: Path) -> None:
    found = judge(log(tmp_path / "a", latencies(1, 6.0)), log(tmp_path / "b", latencies(2, 4.0), n_failed=60))
    assert found.verdict == "guardrail broken"
    assert [rail.name for rail in found.guardrails if rail.is_broken] == ["requests without an image"]


def test_other_work_is_not_compared(tmp_path: Path) -> None:
    found = judge(log(tmp_path / "a", latencies(1, 6.0)), log(tmp_path / "b", latencies(2, 4.0), n_controlnets=0))
    assert found.verdict == "not comparable"
    assert found.mix_distance == 1.0


def test_too_few_requests_and_missing_logs_are_refused_together(tmp_path: Path) -> None:
    with pytest.raises(InputError) as refused:
        judge(log(tmp_path / "a", latencies(1, 6.0, REQUESTS_MIN - 1)), tmp_path / "nothing")
    assert len(refused.value.problems) == 2
    assert "99 requests" in str(refused.value)


def test_the_command_ends_with_4_when_the_new_side_is_worse_and_repeats_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = log(tmp_path / "a", latencies(1, 4.0)), log(tmp_path / "b", latencies(2, 6.0))
    said = []
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["diffplan", "ab", str(a), str(b), "--json"])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 4
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert json.loads(said[0])["verdict"] == "guardrail broken"
