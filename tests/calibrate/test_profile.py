"""Profiles: what is refused, what is predicted inside and outside the measured box, and that files are stable."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrate.fit import fit_profile
from calibrate.measurement import read_measurements
from calibrate.profile import OutOfDomainError
from calibrate.profile_file import load_profile, profile_from_plain, shipped_profiles, to_json
from traces.problems import InputError

STEP = "engine.unet_step"
DATA = Path(__file__).resolve().parents[1] / "data"
PROVISIONAL = json.loads((DATA / "provisional_profile.json").read_text(encoding="utf-8"))


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
        (_set("laws", STEP, "source", to=""), f"laws.{STEP}.source: got ''"),
        (_set("laws", STEP, to={"form": "constant"}), f"laws.{STEP}.source: is missing"),
        (
            _set("laws", STEP, "parameters", to={"value_s": 1.0}),
            f"laws.{STEP}.parameters.value_s: is not a known param",
        ),
        (_set("laws", STEP, "parameters", to={"floor_s": 1.0}), f"laws.{STEP}.parameters.fixed_s: is missing"),
        (_set("laws", STEP, "parameters", "fixed_s", to="fast"), f"laws.{STEP}.parameters.fixed_s: got 'fast'"),
        (_set("laws", STEP, "domain", to={"forward_batch": [8, 2]}), f"laws.{STEP}.domain.forward_batch: got"),
        (_set("laws", STEP, "form", to=[]), f"laws.{STEP}.form: got []"),
        (_set("laws", STEP, "features", to=[["forward_batch"]]), f"laws.{STEP}.features: got [['forward_batch']]"),
        (_set("laws", STEP, "domian", to={}), f"laws.{STEP}.domian: is not a known field"),
        (_set("laws", STEP, "points", to=[[2, 1], [2]]), f"laws.{STEP}.points: got [2], needs 2 numbers"),
        (_set("laws", STEP, "points", to=3), f"laws.{STEP}.points: got 3"),
        (_set("laws", STEP, "n_repetitions", to="many"), f"laws.{STEP}.n_repetitions: got 'many'"),
        (_set("laws", STEP, "n_repetitions", to=2.5), f"laws.{STEP}.n_repetitions: got 2.5"),
        (_set("laws", STEP, "residual_ratio_quantiles", to=[1.0]), f"laws.{STEP}.residual_ratio_quantiles: got [1.0]"),
        (_set("laws", STEP, "parameters", "fixed_s", to=10**400), f"laws.{STEP}.parameters.fixed_s: got 1000"),
        (_set("laws", STEP, "parameters", "fixed_s", to=math.nan), f"laws.{STEP}.parameters.fixed_s: got nan"),
        (_set("laws", STEP, "parameters", "fixed_s", to=True), f"laws.{STEP}.parameters.fixed_s: got True"),
        (_set("facts", "checkpoint_gib", "status", to="hearsay"), "facts.checkpoint_gib.status: got 'hearsay'"),
        (_set("facts", "checkpoint_gib", "value", to=-1), "facts.checkpoint_gib.value: got -1"),
        (_set("notes", to="one"), "notes: got 'one'"),
        (_set("notes", to=[1]), "notes: got 1"),
        (_set("notes", to=["half a pair: \ud800"]), "notes: got 'half a pair: \\ud800'"),
        (_set("fingerprint", to=["gpu"]), "fingerprint: got"),
        (_set("created", to=2026), "created: got 2026"),
        (_set("raw_sha256", to=None), "raw_sha256: got None"),
        (_set("noise_ratio_quantiles", "vllm", to=[]), "noise_ratio_quantiles.vllm: is not a known stack"),
        (_set("noise_ratio_quantiles", "engine", to=[0.0] + [1.0] * 6), "noise_ratio_quantiles.engine: got 0.0"),
        (_set("draws", f"{STEP}:speed", to=[0.1] * 16), f"draws.{STEP}:speed: is not a known parameter of a law"),
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


@pytest.mark.parametrize("text", ["", "[1, 2", "[]", "[" * 100_000, '{"schema_version": NaN}'])
def test_a_file_that_is_no_profile_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"p\.json"):
        load_profile(str(path))


def test_a_name_that_no_profile_has_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(InputError, match="one of the shipped"):
        load_profile("h9000")


def test_a_folder_is_refused_as_a_profile(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a file"):
        load_profile(str(tmp_path))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters()), inner, max_size=3),
    max_leaves=6,
)


@given(st.data())
@settings(max_examples=300, deadline=None, derandomize=True)
def test_a_profile_with_one_value_replaced_is_either_whole_or_refused(data: st.DataObject) -> None:
    plain = copy.deepcopy(PROVISIONAL)
    # From the root a step down is drawn at every level, so that each level is as likely to be hit as the leaves.
    node: Any = plain
    while True:
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if not isinstance(node[key], dict | list) or not node[key] or data.draw(st.booleans()):
            break
        node = node[key]
    if isinstance(node, dict) and data.draw(st.booleans()):
        del node[key]
        key = data.draw(st.text(st.characters()) | st.just(key))
    node[key] = data.draw(JSON)
    try:
        profile = profile_from_plain(plain, "p")
    except InputError:
        return
    text = to_json(profile)
    assert to_json(profile_from_plain(json.loads(text), "p")) == text
    predictor = profile.predictor(extrapolate=True)
    for law in profile.laws.values():
        assert predictor.seconds(law.name, **dict.fromkeys(law.features, 1.0)) >= 0


def test_the_shipped_h200_profile_is_written_back_to_the_same_bytes() -> None:
    profile = load_profile("h200")
    assert to_json(profile).encode() == shipped_profiles()["h200"].read_bytes()


def test_the_shipped_h200_profile_names_the_digest_of_the_measurements_beside_it() -> None:
    raw = shipped_profiles()["h200"].with_name("h200.measurements.parquet")
    assert load_profile("h200").raw_sha256 == hashlib.sha256(raw.read_bytes()).hexdigest()


def test_the_shipped_h200_profile_comes_out_of_the_measurements_beside_it() -> None:
    shipped = load_profile("h200")
    raw = read_measurements(shipped_profiles()["h200"].with_name("h200.measurements.parquet"))
    fitted = fit_profile(raw, n_draws=2, served_since=shipped.fingerprint.get("served_since", "")).profile
    assert fitted.laws.keys() == shipped.laws.keys()
    assert fitted.facts == shipped.facts
    for name, law in shipped.laws.items():
        # searches of other processors stop a billionth apart
        assert fitted.laws[name].parameters == pytest.approx(dict(law.parameters), rel=1e-6, abs=1e-12), name
        assert fitted.laws[name].point_ratios == pytest.approx(law.point_ratios, rel=1e-6), name
        assert (fitted.laws[name].status, fitted.laws[name].source) == (law.status, law.source)


def test_the_draws_of_the_provisional_profile_are_those_its_script_makes(provisional_profile_path: Path) -> None:
    script = runpy.run_path(str(DATA / "make_provisional_profile.py"))
    assert script["regenerated"](provisional_profile_path).encode() == provisional_profile_path.read_bytes()


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
