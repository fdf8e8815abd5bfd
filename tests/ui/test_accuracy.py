"""The page Accuracy: a validation is drawn as it was written, and whose it is is said; images of one kind are told apart by their size."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from dashboards import accuracy_charts, evidence, validation_charts
from dashboards.plain_text import short_usd
from dashboards.validation_charts import gaps_of, short_names
from dashboards.validation_view import quantiles_table, runs_table

Open = Callable[..., AppTest]
Words = Callable[[AppTest], str]


def run(name: str, gap: float, allowed: float | None) -> dict[str, Any]:
    """One run of a report: two seconds measured at p50, and ``gap`` between."""
    checks = (
        []
        if allowed is None
        else [{"name": "latency p50", "gap": gap, "allowed": allowed, "holds": abs(gap) <= allowed}]
    )
    return {
        "name": name, "holds": all(check["holds"] for check in checks), "band": "past saturation" if allowed is None else "70 %", "n_requests": 200,
        "latency_s": {
            "p50": {"measured": 2.0, "simulated": 2.0 * (1 + gap), "gap_ratio": gap, "gap_low": gap - 0.01, "gap_high": gap + 0.02},
            "p95": {"measured": None, "simulated": 3.0, "gap_ratio": None},
            "mean": {"measured": 2.0, "simulated": 2.0, "gap_ratio": 0.0},
        },
        "checks": checks, "carried_by": {"mean": "queue_wait_s"}, "busy": {"base": {"measured": 0.7, "simulated": 0.68}},
        "saturated": {"measured": allowed is None, "simulated": allowed is None},
    }  # fmt: skip


def report(profile_id: str = "of another") -> dict[str, Any]:
    runs = [run("w1-steady", -0.02, 0.03), run("w2-bursty", 0.09, 0.03), run("w3-past", 0.2, None)]
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
    found = report(own)
    found["runs"] = found["runs"][:1]
    shipped(found)
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


def test_names_are_cut_only_where_they_stay_apart() -> None:
    assert short_names(["w1-steady", "w2-bursty"]) == {"w1-steady": "w1", "w2-bursty": "w2"}
    assert short_names(["w1-steady", "w1-bursty"]) == {"w1-steady": "w1-steady", "w1-bursty": "w1-bursty"}


def test_images_of_one_kind_and_several_sizes_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "p.check.csv"
    path.write_text(
        "topology,mode,n_controlnets,n_loras,variant,n_images,n_steps,forward_batch,megapixels,n_repetitions,measured_s,predicted_s,gap_ratio,is_held_out\n"
        "serving,graph,1,0,,1,4,2,0.25,4,0.1,0.11,0.1,true\n"
        "serving,graph,1,0,,4,50,4,1.0,9,2.0,2.1,0.05,true\n",
        encoding="utf-8",
    )
    checks = evidence._checks(str(path), path.stat().st_mtime_ns, "en")
    assert [check.size for check in checks] == ["512², 4 steps", "1024², 50 steps, 4 images, no guidance"]
    bars = accuracy_charts.residuals(checks).data[0]
    assert len(set(bars.y)) == 2  # bars of one name would be drawn over each other


@pytest.mark.parametrize(
    ("value", "text"), [(71_540.4, "$71,540"), (1_014_300.0, "$1.01 M"), (-2_500_000.0, "−$2.50 M"), (-10.0, "−$10")]
)
def test_a_metric_says_millions_shortly(value: float, text: str) -> None:
    assert short_usd(value) == text
