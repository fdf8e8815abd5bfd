"""Profiles end to end: what lies outside the box or was never measured is said in every result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from calibrate.profile_file import load_profile


def narrowed(folder: Path) -> None:
    """The scenario's profile with steps measured for larger batches only."""
    path = folder / "profile.json"
    plain = json.loads(path.read_text(encoding="utf-8"))
    plain["laws"]["engine.unet_step"] |= {
        "status": "measured", "domain": {"forward_batch": [4, 8], "megapixels": [1, 1]}, "points": [[4, 1]],
    }  # fmt: skip
    path.write_text(json.dumps(plain), encoding="utf-8")


def test_outside_the_box_a_simulation_is_refused_and_where_allowed_says_so_in_words_and_files(
    diffplan: Callable, question: Path, tmp_path: Path
) -> None:
    narrowed(question.parent)
    wanted = ("simulate", question, "--topology", "colocated", "--replicas", 2, "--out", tmp_path / "out")
    done = diffplan(*wanted)
    assert done.code == 2
    assert "engine.unet_step: forward_batch is 2, the profile was measured for 4..8" in done.err
    question.write_text(question.read_text().replace("name: profile.json", "name: profile.json\n  extrapolate: true"))
    done = diffplan(*wanted)
    assert done.code == 0, done.err
    assert "Latency laws extrapolated: 1 of " in done.out
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["grades"]["engine.unet_step"] == "extrapolated"


def test_a_plan_on_extrapolated_laws_says_so_in_its_record_and_its_report(
    diffplan: Callable, question: Path, tmp_path: Path
) -> None:
    narrowed(question.parent)
    question.write_text(question.read_text().replace("name: profile.json", "name: profile.json\n  extrapolate: true"))
    done = diffplan("plan", question, "--out", tmp_path / "out", "--jobs", 1)
    assert done.code == 0, done.err
    plan = json.loads((tmp_path / "out" / "plan.json").read_text(encoding="utf-8"))
    ours = [row["grades"] for row in plan["topologies"] if row["topology"] == "colocated"]
    assert ours[0]["engine.unet_step"] == "extrapolated"
    assert "1 extrapolated (engine.unet_step)" in " ".join((tmp_path / "out" / "report.md").read_text().split())


def test_a_transferred_profile_simulates_and_every_law_it_used_is_listed_as_assumed(
    diffplan: Callable, question: Path, tmp_path: Path
) -> None:
    done = diffplan("calibrate", "transfer", "h200", "--to", "L40S", "--out", question.parent / "profile.json")
    assert done.code == 0, done.err
    assert load_profile(str(question.parent / "profile.json")).gpu_kind == "nvidia-l40s"
    done = diffplan("simulate", question, "--topology", "colocated", "--replicas", 4, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    grades = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))["grades"]
    assert set(grades.values()) == {"assumed"}
    assert f"Latency laws assumed: {len(grades)} of {len(grades)}" in done.out


def test_two_shipped_and_transferred_profiles_are_compared_from_the_root_command(
    diffplan: Callable, question: Path
) -> None:
    path = question.parent / "b200.json"
    assert diffplan("calibrate", "transfer", "h200", "--to", "B200", "--out", path).code == 0
    done = diffplan("calibrate", "diff", "h200", path)
    assert done.code == 0
    assert "measured, then assumed" in done.out
    wrong = diffplan("calibrate", "transfer", "h200", "--to", "TPU", "--out", path)
    assert wrong.code == 2
    assert "no datasheet of 'TPU'" in wrong.err
