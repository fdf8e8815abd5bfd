"""The page Accuracy: a validation is drawn as it was written, and whose it is is said; images of one kind are told apart by their size."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from dashboards import accuracy_charts, evidence, validation_charts
from dashboards.money_charts import short_usd
from dashboards.validation_charts import gaps_of, short_names
from dashboards.validation_view import quantiles_table, runs_table

Open = Callable[..., AppTest]
Words = Callable[[AppTest], str]


def run(name: str, gap: float, band: str, floor: float | None = None) -> dict[str, Any]:
    """One run of a report: two seconds measured at p50, and ``gap`` between; 3 % are allowed at 70 % load."""
    is_past = band == "past saturation"
    return {
        "name": name, "holds": is_past or abs(gap) <= max(0.03, floor or 0.0), "band": band, "n_requests": 200,
        "latency_s": {
            "p50": {
                "measured": 2.0, "simulated": 2.0 * (1 + gap), "gap_ratio": gap, "gap_low": gap - 0.01, "gap_high": gap + 0.02,
                **({} if floor is None else {"floor_ratio": floor}),
            },
            "p95": {"measured": None, "simulated": 3.0, "gap_ratio": None},
            "mean": {"measured": 2.0, "simulated": 2.0, "gap_ratio": 0.0},
        },
        "carried_by": {"mean": "queue_wait_s"}, "busy": {"base": {"measured": 0.7, "simulated": 0.68}},
        "saturated": {"measured": is_past, "simulated": is_past},
    }  # fmt: skip


def report(profile_id: str = "of another") -> dict[str, Any]:
    runs = [run("w1-steady", -0.02, "70 %"), run("w2-bursty", 0.09, "70 %"), run("w3-past", 0.2, "past saturation")]
    return {"kind": "validation", "holds": False, "profile": {"profile_id": profile_id}, "runs": runs}


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], None]:
    """Puts a validation beside the shipped profile, for this test only."""

    def put(found: dict[str, Any]) -> None:
        path = tmp_path / "h200.validation.json"
        path.write_text(json.dumps(found), encoding="utf-8")
        beside = evidence.beside
        monkeypatch.setattr(
            evidence, "beside", lambda profile, ending: path if ending == "validation.json" else beside(profile, ending)
        )

    return put


def test_a_validation_is_shown_with_what_is_outside_its_bounds_and_whose_it_is(
    page: Open, words: Words, shipped: Callable[[dict[str, Any]], None]
) -> None:
    shipped(report())
    app = page(at="accuracy", scenario="small", profile="h200").run()
    assert not app.exception
    said = words(app)
    assert "1 of 3 runs are outside their bounds" in said
    assert "compared with the profile of another" in said
    assert "Not yet validated" not in said
    runs, quantiles = app.dataframe[0].value, app.dataframe[1].value
    assert list(runs["Verdict"]) == ["within", "outside", "within"]
    assert list(runs["Saturated, measured → simulated"]) == ["no → no", "no → no", "yes → yes"]
    assert list(quantiles["Gap"]) == ["-2.0%", "+9.0%", "+20.0%"]
    assert list(quantiles["Allowed"]) == ["±3.0%", "±3.0%", "–"]


def test_a_validation_of_the_profile_at_hand_needs_no_warning(
    page: Open, words: Words, shipped: Callable[[dict[str, Any]], None]
) -> None:
    app = page(at="accuracy", scenario="small", profile="h200").run()
    own = next(line for line in words(app).splitlines() if line.startswith("profile ")).split()[1]
    # the short form, in which the profile is named at the top
    shipped({"kind": "validation, short", "holds": True, "profile_id": own, "runs": report()["runs"][:1]})
    app = page(at="accuracy", scenario="small", profile="h200", lang="ja").run()
    assert not app.exception
    assert "1件の実行すべてが許容範囲内" in words(app)
    assert own not in "\n".join(str(warning.value) for warning in app.warning)


def test_only_quantiles_that_both_sides_have_are_drawn() -> None:
    gaps = gaps_of(report())
    assert [(gap.run, gap.quantile, gap.holds) for gap in gaps] == [
        ("w1-steady", "p50", True), ("w2-bursty", "p50", False), ("w3-past", "p50", None),
    ]  # fmt: skip
    bars = [trace for trace in validation_charts.validation(gaps).data if trace.type == "bar"]
    assert list(bars[0].y) == pytest.approx([-2.0, 9.0, 20.0])
    assert list(bars[0].error_y.array) == pytest.approx([2.0, 2.0, 2.0])
    marks = next(trace for trace in validation_charts.validation(gaps).data if trace.type == "scatter")
    assert list(marks.y) == pytest.approx([-3.0, 3.0, -3.0, 3.0])
    assert len(quantiles_table(gaps)) == 3
    assert list(runs_table(report()["runs"])["Load"]) == ["70 %", "70 %", "past saturation"]


def test_nothing_has_to_agree_better_with_the_engine_than_the_engine_itself() -> None:
    (gap,) = gaps_of({"runs": [run("w1", 0.05, "70 %", floor=-0.06)]})
    assert (gap.allowed, gap.holds) == (0.06, True)
    (gap,) = gaps_of({"runs": [run("w1", 0.05, "70 %", floor=0.04)]})
    assert (gap.allowed, gap.holds) == (0.04, False)


def test_names_are_cut_only_where_they_stay_apart() -> None:
    assert short_names(["w1-steady", "w2-bursty"]) == {"w1-steady": "w1", "w2-bursty": "w2"}
    assert short_names(["w1-steady", "w1-bursty"]) == {"w1-steady": "w1-steady", "w1-bursty": "w1-bursty"}


CHECKS = """\
topology,mode,n_controlnets,n_loras,variant,n_images,n_steps,forward_batch,megapixels,n_repetitions,measured_s,predicted_s,gap_ratio,is_held_out
colocated,graph,1,0,,1,50,2,1.0,9,2.12,2.1,-0.01,true
serving,graph,1,0,,1,4,2,0.25,4,0.1,0.11,0.1,true
serving,graph,1,0,,4,50,4,1.0,9,8.0,8.4,0.05,true
serving,graph,1,0,,1,50,2,1.0,9,2.14,2.1,-0.02,true
"""


def test_images_of_one_kind_and_several_sizes_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "p.check.csv"
    path.write_text(CHECKS, encoding="utf-8")
    checks = evidence._checks(str(path), path.stat().st_mtime_ns, "en")
    assert [check.size for check in checks] == [
        "1024², 50 steps", "512², 4 steps", "1024², 50 steps, 4 images, no guidance", "1024², 50 steps",
    ]  # fmt: skip
    bars = accuracy_charts.residuals(checks).data[0]
    assert list(bars.y) == [
        "1. serving 1C 0L 512², 4 steps", "2. serving 1C 0L 1024², 50 steps, 4 images, no guidance", "3. serving 1C 0L", "4. colocated 1C 0L",
    ]  # fmt: skip


def test_the_page_start_compares_images_of_one_size(
    page: Open, words: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "h200.check.csv"
    path.write_text(CHECKS, encoding="utf-8")
    monkeypatch.setattr(evidence, "beside", lambda profile, ending: path if ending == "check.csv" else None)
    app = page(at="start", scenario="small", profile="h200").run()
    assert not app.exception
    assert app.table[0].value.to_dict() == {
        "colocated": {"ControlNets 1, LoRAs 0": "2.12 s"}, "serving": {"ControlNets 1, LoRAs 0": "2.14 s"}
    }  # fmt: skip
    assert "1024², 50 steps" in words(app)


@pytest.mark.parametrize(
    ("value", "text"), [(71_540.4, "$71,540"), (1_014_300.0, "$1.01 M"), (-2_500_000.0, "−$2.50 M"), (-10.0, "−$10")]
)
def test_a_metric_says_millions_shortly(value: float, text: str) -> None:
    assert short_usd(value) == text
