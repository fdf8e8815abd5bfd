"""A short session on another GPU is made whole by a profile from elsewhere, and says which part of it."""

from __future__ import annotations

import dataclasses
import json

import pytest

from calibrate.fill import filled_from
from calibrate.profile import Fact, LatencyProfile
from calibrate.profile_file import load_profile, profile_from_plain, to_json
from calibrate.roofline import transfer_profile
from traces.problems import InputError

LEFT_OUT = ("engine.checkpoint_load", "lora_fetch.remote")


@pytest.fixture(scope="module")
def h200() -> LatencyProfile:
    return load_profile("h200")


@pytest.fixture(scope="module")
def short(h200: LatencyProfile) -> LatencyProfile:
    """As if an H100 had been measured, but for two laws and the size of its memory."""
    other = transfer_profile(h200, "H100")
    laws = {
        name: dataclasses.replace(law, status="measured", source="test")
        for name, law in other.laws.items()
        if name not in LEFT_OUT
    }
    return dataclasses.replace(
        other,
        laws=laws,
        draws={key: values for key, values in other.draws.items() if key.partition(":")[0] in laws},
        facts={**other.facts, "device_memory_gib": Fact(0.0, "assumed", "no GPU in these sessions")},
        fingerprint={"gpu": "NVIDIA H100 80GB HBM3"},
        notes=(),
    )


def test_what_was_not_measured_is_carried_over_and_says_so(short: LatencyProfile, h200: LatencyProfile) -> None:
    filled = filled_from(short, h200)
    assert set(filled.laws) == {*short.laws, *LEFT_OUT}
    assert {filled.laws[name].status for name in LEFT_OUT} == {"assumed"}
    assert all(h200.profile_id in filled.laws[name].source for name in LEFT_OUT)
    assert filled.facts["device_memory_gib"].value == pytest.approx(80e9 / 2**30)
    assert filled.n_draws == short.n_draws == h200.n_draws
    assert all(name in filled.notes[-1] for name in (*LEFT_OUT, "device_memory_gib", h200.profile_id))
    assert profile_from_plain(json.loads(to_json(filled)), "test").profile_id == filled.profile_id


def test_what_was_measured_stays(short: LatencyProfile, h200: LatencyProfile) -> None:
    filled = filled_from(short, h200)
    assert {name: filled.laws[name] for name in short.laws} == short.laws
    assert {key: filled.draws[key] for key in short.draws} == short.draws
    whole = filled_from(filled, h200)
    assert whole is filled


def test_profiles_that_do_not_belong_together_are_refused(short: LatencyProfile, h200: LatencyProfile) -> None:
    with pytest.raises(InputError, match="sd15"):
        filled_from(short, dataclasses.replace(h200, architecture="sd15"))
    with pytest.raises(InputError, match="joint draws"):
        filled_from(short, dataclasses.replace(h200, draws={key: values[:3] for key, values in h200.draws.items()}))
    with pytest.raises(InputError, match="the GPU of the profile"):
        filled_from(dataclasses.replace(h200, laws={}), h200)
