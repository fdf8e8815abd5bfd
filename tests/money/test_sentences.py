"""The decision sentences: their numbers are the plan's, gains are rounded down, and nothing is promised that is not known."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.money.assumptions import Assumptions, read_assumptions
from planner.money.roi import Roi, make_roi
from planner.plan_record import Estimate
from planner.sentences import chance_words, decision, rounded

KANA = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]")
CERTAIN = re.compile(r"guarantee|certainly|will save|always|\b100(\.0+)? %|必ず|確実に|保証|100%", re.IGNORECASE)


def check(roi: Roi) -> tuple[str, str]:
    said = decision(roi)
    for text in (said.english, said.japanese):
        assert "\n" not in text
        # a share in time may be printed as the upper end of an interval, nothing else may read as certain
        assert not CERTAIN.search(re.sub(r"95 ?%[^;、)）]*100\.00 ?%", "", text)), text
    assert "not a measurement" in said.english
    assert "実測ではありません" in said.japanese
    assert KANA.search(said.japanese)
    assert not KANA.search(said.english)
    return said.english, said.japanese


def test_service_a_moves_and_both_languages_have_the_same_numbers(katz_a: Path) -> None:
    roi = make_roi(katz_a, Assumptions())
    english, japanese = check(roi)
    assert roi.returns is not None
    new = roi.plan.row("colocated").n_gpus
    start = f"Against the {roi.returns.today_gpus} GPUs that diffusers would need, {new} GPUs of colocated should save about $"
    assert english.startswith(start)
    shown = int(re.findall(r"about \$([\d,]+)", english)[0].replace(",", ""))
    assert 0.9 * roi.returns.saving_usd_per_month <= shown <= roi.returns.saving_usd_per_month
    amounts = re.compile(r"\$[\d,]*\d")
    assert amounts.findall(english) == amounts.findall(japanese)
    assert len(amounts.findall(english)) == 5


def test_what_compiling_alone_would_save_is_not_passed_off_as_the_engines_gain(katz_a: Path) -> None:
    roi = make_roi(katz_a, Assumptions())
    assert roi.returns is not None
    english, _ = check(roi)
    shown = int(
        re.findall(r"Compiling Diffusers alone would give about \$([\d,]+) of that", english)[0].replace(",", "")
    )
    tuned = next(row for row in roi.waterfall if row.topology == "diffusers_tuned")
    assert tuned.saving_usd_per_month is not None
    assert tuned.saving_usd_per_month <= shown <= 1.1 * tuned.saving_usd_per_month
    alone = tuple(row for row in roi.waterfall if row.topology != "diffusers_tuned")
    assert "Compiling" not in decision(replace(roi, waterfall=alone)).english


def test_only_a_fleet_that_its_owner_has_stated_is_moved_from(katz_a: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("today:\n  topology: diffusers\n  n_gpus: 18\n", encoding="utf-8")
    english, japanese = check(make_roi(katz_a, read_assumptions(tmp_path / "mine.yaml")))
    assert english.startswith("Moving from 18 GPUs of diffusers to ")
    assert "GPU 18台から" in japanese


def test_service_b_has_no_saving_to_state_and_states_none(katz_b: Path) -> None:
    english, japanese = check(make_roi(katz_b, Assumptions()))
    assert english.startswith("To keep 95 % of the requests within 3 s")
    assert "no saving to state" in english
    assert "save about" not in english
    assert "節約額は示せません" in japanese


@pytest.mark.real_traces
def test_gentd26_has_no_reason_to_change(gentd26: Path) -> None:
    english, japanese = check(make_roi(gentd26, Assumptions()))
    assert english.startswith("On cost alone there is no reason to leave 1 GPU of diffusers")
    assert "変える理由はありません" in japanese


def test_a_saving_that_may_be_a_loss_is_called_likely_only(katz_a: Path) -> None:
    roi = make_roi(katz_a, Assumptions())
    assert roi.returns is not None
    spread = replace(roi.returns.spread, saving_p05_usd_per_month=-1_234.0, probability_npv_positive=0.8)
    english, japanese = check(replace(roi, returns=replace(roi.returns, spread=spread)))
    assert "A saving is likely, not certain." in english
    assert "−$1,300" in english
    assert "確実ではありません" in japanese


def test_an_unlikely_return_is_no_reason_to_change(katz_a: Path) -> None:
    roi = make_roi(katz_a, Assumptions())
    assert roi.returns is not None
    spread = replace(roi.returns.spread, probability_npv_positive=0.49)
    english, japanese = check(replace(roi, returns=replace(roi.returns, spread=spread)))
    assert english.startswith("On cost alone there is no reason to leave")
    old, new = roi.plan.row("diffusers").latency_p50_s, roi.plan.row("colocated").latency_p50_s
    before, after = map(float, re.findall(r"would fall from ([\d.]+) s to ([\d.]+) s", english)[0])
    # the gain is never shown larger than it is
    assert before <= (old.mean or 0.0)
    assert after >= (new.mean or 0.0)
    assert f"{before:g}秒から{after:g}秒" in japanese


def test_a_latency_that_may_be_the_same_is_not_called_lower(katz_a: Path) -> None:
    roi = make_roi(katz_a, Assumptions())
    assert roi.returns is not None
    spread = replace(roi.returns.spread, probability_npv_positive=0.49)
    rows = tuple(
        row.model_copy(update={"latency_p50_s": Estimate(mean=5.0, low=4.0, high=6.0)}) for row in roi.plan.topologies
    )
    same = roi.plan.model_copy(update={"topologies": rows})
    english, _ = check(replace(roi, plan=same, returns=replace(roi.returns, spread=spread)))
    assert "median" not in english


@settings(deadline=None)
@given(st.floats(1e-3, 1e9), st.booleans())
def test_gains_are_never_rounded_up_and_costs_never_down(value: float, is_gain: bool) -> None:
    for signed in (value, -value):
        shown = rounded(signed, is_gain=is_gain)
        slack = abs(value) * 1e-8  # the step's own rounding
        assert (shown <= signed + slack) if is_gain else (shown >= signed - slack)
        assert abs(shown - signed) <= 0.1 * value + slack


@settings(deadline=None)
@given(st.floats(0, 1))
def test_no_chance_reads_as_certain(probability: float) -> None:
    english, japanese = chance_words(probability)
    assert not re.match(r"(100|0) ?%", english)
    assert not re.match(r"(100|0)%$", japanese)
