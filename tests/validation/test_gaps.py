"""Gaps between logs: what they are where the answer is known by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from planner.validation.gaps import STAGES, carrier, latency_gaps, pair, stage_gaps, stage_quantiles, tail_of


def log_of(n: int = 200, seed: int = 1, **factors: float) -> pd.DataFrame:
    """Requests whose stages are drawn; a factor stretches one stage."""
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {"request_id": [f"r{k}" for k in range(n)], "arrival_s": np.arange(n, dtype=float), "status": "done"}
    )
    for stage in STAGES:
        frame[stage] = rng.uniform(0.5, 1.5, n) * factors.get(stage, 1.0)
    frame["latency_s"] = frame[list(STAGES)].sum(axis=1)
    return frame


def test_a_log_beside_itself_has_no_gap_and_no_doubt() -> None:
    log = log_of()
    for gap in latency_gaps(pair(log, [log, log]), seed=0).values():
        assert [gap.ratio, gap.low, gap.high] == pytest.approx([0.0] * 3, abs=1e-12)  # rounding of sums


def test_a_log_that_is_a_tenth_slower_has_a_gap_of_a_tenth_in_every_quantile_and_resample() -> None:
    log = log_of()
    slower = log.assign(latency_s=1.1 * log["latency_s"])
    for gap in latency_gaps(pair(log, [slower]), seed=0).values():
        assert [gap.ratio, gap.low, gap.high] == pytest.approx(
            [0.1] * 3, rel=1e-9
        )  # the same requests: nothing but rounding


def test_an_interval_covers_the_gap_of_long_logs_of_which_the_runs_are_pieces() -> None:
    # latencies uniform on 1..3 and 1.2..3.2: medians 2 and 2.2, so the true gap is 0.1
    covered = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        one = log_of().assign(latency_s=rng.uniform(1.0, 3.0, 200))
        two = log_of().assign(latency_s=rng.uniform(1.2, 3.2, 200))
        gap = latency_gaps(pair(one, [two]), seed=seed)["p50"]
        assert gap.low is not None
        assert gap.high is not None
        covered += gap.low <= 0.1 <= gap.high
    assert covered >= 33  # of Binomial(40, 0.95) 0.5 % lie below


def test_the_gaps_of_the_stages_sum_to_that_of_the_mean_latency() -> None:
    log, other = log_of(), log_of(seed=2, denoise_s=1.3)
    pairing = pair(log, [other])
    total_s = sum(stage.gap_s for stage in stage_gaps(pairing, seed=0))
    assert total_s == pytest.approx(float(other["latency_s"].mean() - log["latency_s"].mean()), rel=1e-9)  # rounding


@pytest.mark.parametrize("stage", ["denoise_s", "decode_s", "queue_wait_s"])
def test_the_stage_that_was_stretched_carries_the_gap_also_of_the_slowest(stage: str) -> None:
    log = log_of()
    other = log_of(**{stage: 1.2})
    pairing = pair(log, [other])
    assert carrier(stage_gaps(pairing, seed=0)) == stage
    assert carrier(stage_gaps(tail_of(pairing), seed=0)) == stage
    measured, simulated = stage_quantiles(pairing)[stage]["p95"]
    assert simulated == pytest.approx(1.2 * measured, rel=1e-9)  # every request's stage is


def test_a_stage_that_pulls_the_other_way_carries_nothing() -> None:
    log = log_of()
    pairing = pair(log, [log_of(denoise_s=1.2, decode_s=0.9)])
    assert carrier(stage_gaps(pairing, seed=0)) == "denoise_s"
    assert carrier(stage_gaps(pair(log, [log]), seed=0)) == ""


def test_only_requests_that_were_done_in_every_log_are_compared_in_the_order_of_the_first() -> None:
    log = log_of(30)
    other = log.sample(frac=1.0, random_state=3)
    other.loc[other["request_id"] == "r4", "status"] = "expired"
    third = log[log["request_id"] != "r7"]
    pairing = pair(log, [other, third])
    assert list(pairing.measured.index) == [f"r{k}" for k in range(30) if k not in (4, 7)]
    assert list(pairing.others[0].index) == list(pairing.measured.index)


def test_simulations_count_by_the_mean_of_their_quantiles() -> None:
    log = log_of()
    pairing = pair(log, [log, log.assign(latency_s=1.2 * log["latency_s"])])
    assert latency_gaps(pairing, seed=0)["p95"].ratio == pytest.approx(0.1, rel=1e-9)  # the mean of 0 and 0.2


def test_a_wait_of_nothing_has_no_ratio() -> None:
    log = log_of().assign(latency_s=0.0)
    gap = latency_gaps(pair(log, [log_of()]), seed=0)["p50"]
    assert (gap.ratio, gap.low, gap.high) == (None, None, None)
