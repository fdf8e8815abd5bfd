"""Profiles: what is refused, what is predicted inside and outside the measured box, and that files are stable."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from calibrate.profile import OutOfDomainError, load_profile, profile_from_plain, to_json
from traces.problems import InputError

STEP = "engine.unet_step"


@pytest.fixture
def plain(provisional_profile_path: Path) -> dict[str, Any]:
    return json.loads(provisional_profile_path.read_text(encoding="utf-8"))


def _set(*path: str, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(plain: dict[str, Any]) -> None:
        for key in path[:-1]:
            plain = plain[key]
        plain[path[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (_set("schema_version", to=99), "schema_version: got 99"),
        (_set("architecture", to=""), "architecture: got ''"),
        (_set("surprise", to=1), "surprise: is not a known field"),
        (_set("laws", "engine.flux_step", to={}), "laws.engine.flux_step: is not a known law"),
        (_set("laws", STEP, "form", to="cubic"), f"laws.{STEP}.form: got 'cubic'"),
        (_set("laws", STEP, "features", to=["n_bytes"]), f"laws.{STEP}.features: got"),
        (_set("laws", STEP, "status", to="guessed"), f"laws.{STEP}.status: got 'guessed'"),
        (_set("laws", STEP, "source", to=""), f"laws.{STEP}.source: is missing"),
        (_set("laws", STEP, "parameters", to={"value_s": 1.0}), f"laws.{STEP}.parameters: got"),
        (_set("laws", STEP, "parameters", "fixed_s", to="fast"), f"laws.{STEP}.parameters.fixed_s: got 'fast'"),
        (_set("laws", STEP, "domain", to={"forward_batch": [8, 2]}), f"laws.{STEP}.domain.forward_batch: got"),
        (_set("facts", "colour", to={"value": 1}), "facts.colour: is not a known fact"),
        (_set("noise_ratio_quantiles", "engine", to=[1.0]), "noise_ratio_quantiles.engine: got"),
        (_set("draws", f"{STEP}:fixed_s", to=[0.1]), "draws: have different lengths"),
    ],
)
def test_a_broken_profile_is_refused_with_the_place(
    plain: dict[str, Any], change: Callable[[dict[str, Any]], None], place: str
) -> None:
    change(plain)
    with pytest.raises(InputError) as caught:
        profile_from_plain(plain, "profile p")
    assert place in str(caught.value)


def test_all_problems_of_a_profile_are_reported_together(plain: dict[str, Any]) -> None:
    plain["architecture"] = ""
    plain["laws"][STEP]["status"] = "guessed"
    with pytest.raises(InputError) as caught:
        profile_from_plain(plain, "p")
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("text", ["", "[1, 2", "[]", '{"schema_version": NaN}'])
def test_a_file_that_is_no_profile_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"p\.json"):
        load_profile(str(path))


def test_a_name_that_no_profile_has_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(InputError, match="one of the shipped"):
        load_profile("h9000")


def test_writing_what_was_read_gives_the_same_bytes(plain: dict[str, Any]) -> None:
    profile = profile_from_plain(plain, "p")
    text = to_json(profile)
    again = profile_from_plain(json.loads(text), "p")
    assert to_json(again) == text
    assert again.profile_id == profile.profile_id


@pytest.fixture
def measured(plain: dict[str, Any]) -> Any:
    plain["laws"][STEP] |= {
        "status": "measured",
        "domain": {"forward_batch": [2, 8], "megapixels": [1, 1]},
        "points": [[2, 1], [8, 1]],
    }
    return profile_from_plain(plain, "p")


@pytest.mark.parametrize(
    ("features", "grade"),
    [
        ({"forward_batch": 2, "megapixels": 1}, "measured"),
        ({"forward_batch": 6, "megapixels": 1}, "interpolated"),
        ({"forward_batch": 12, "megapixels": 1}, "extrapolated"),
        ({"forward_batch": 2, "megapixels": 2}, "extrapolated"),
    ],
)
def test_a_prediction_says_whether_it_was_measured(measured: Any, features: dict[str, float], grade: str) -> None:
    predictor = measured.predictor(extrapolate=True)
    predictor.seconds(STEP, **features)
    assert predictor.used == {STEP: grade}


def test_outside_the_measured_box_a_prediction_is_refused(measured: Any) -> None:
    with pytest.raises(OutOfDomainError, match=r"forward_batch is 12, the profile was measured for 2\.\.8"):
        measured.predictor().seconds(STEP, forward_batch=12, megapixels=1)


def test_an_assumed_law_makes_every_prediction_assumed(plain: dict[str, Any]) -> None:
    predictor = profile_from_plain(plain, "p").predictor()
    predictor.seconds("lora_fetch.remote", n_bytes=1e8)
    assert predictor.used == {"lora_fetch.remote": "assumed"}


def test_a_draw_that_does_not_exist_is_refused(measured: Any) -> None:
    with pytest.raises(IndexError, match=f"has {measured.n_draws}"):
        measured.predictor(measured.n_draws)
