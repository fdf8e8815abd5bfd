"""Two profiles side by side: what moved, by how much, and what can have moved it."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from calibrate import profile_commands
from calibrate.diff import ProfileDifference, profile_difference
from calibrate.fit import fit_profile
from calibrate.output import write_fit
from calibrate.profile import LatencyProfile, Law
from calibrate.profile_file import load_profile
from calibrate.roofline import transfer_profile
from tests.calibrate.sessions import HARDWARE, TRUTH, known_session


@functools.cache
def profile_of(seed: int, slower: float = 1.0, **hardware: object) -> LatencyProfile:
    data = known_session(seed=seed, slower=slower, fingerprint={**HARDWARE, **hardware})
    return fit_profile(data, n_draws=12).profile


@pytest.fixture(scope="module")
def before() -> LatencyProfile:
    return profile_of(1)


def verdicts(difference: ProfileDifference) -> dict[str, str]:
    return {law.law: law.verdict for law in difference.laws}


def test_a_profile_does_not_differ_from_itself(before: LatencyProfile) -> None:
    difference = profile_difference(before, before)
    assert set(verdicts(difference).values()) == {"same"}
    assert all(law.ratio == 1.0 for law in difference.laws)
    assert difference.fingerprint == {}
    assert "nothing differs" in difference.sentences[-1]


def test_laws_that_became_faster_are_named_with_their_ratio_and_the_others_are_not(before: LatencyProfile) -> None:
    difference = profile_difference(before, profile_of(2, slower=0.9, engine_sources="bbbb"))
    found = {law.law: law for law in difference.laws}
    for law in TRUTH:
        assert found[law].verdict == "faster"
        # two fits, each within 0.6 % at one size; four of these
        assert found[law].ratio == pytest.approx(0.9, abs=0.03)
        assert found[law].ratio_low < found[law].ratio < found[law].ratio_high
    assert found["engine.text_encode"].verdict == "same"
    assert difference.fingerprint == {"engine": (("engine_sources", "aaaa", "bbbb"),)}
    image = next(i for i in difference.images if (i.topology, i.n_controlnets) == ("colocated", 1))
    assert image.after_s / image.before_s == pytest.approx(0.9, abs=0.03)


def test_stock_diffusers_is_the_control_for_the_engines_sources(before: LatencyProfile) -> None:
    stock = load_profile("h200").laws["diffusers.unet_step"]

    def with_stock(profile: LatencyProfile, factor: float) -> LatencyProfile:
        law: Law = dataclasses.replace(stock, parameters={k: factor * v for k, v in stock.parameters.items()})
        return dataclasses.replace(profile, laws={**profile.laws, law.name: law})

    after = profile_of(2, slower=0.9, engine_sources="bbbb")
    still = profile_difference(with_stock(before, 1.0), with_stock(after, 1.0))
    assert any("so the engine's sources explain" in sentence for sentence in still.sentences)
    after = profile_of(2, slower=0.9, engine_sources="bbbb", driver="999")
    moved = profile_difference(with_stock(before, 1.0), with_stock(after, 0.8))
    assert any("engine's sources alone do not explain" in sentence for sentence in moved.sentences)


def test_a_change_that_nothing_recorded_explains_is_said(before: LatencyProfile) -> None:
    difference = profile_difference(before, profile_of(2, slower=0.9))
    assert "Nothing recorded explains the change" in difference.sentences[-1]


def test_a_transferred_profile_can_be_compared_with_a_measured_one() -> None:
    measured = load_profile("h200")
    moved = transfer_profile(measured, "L40S")
    difference = profile_difference(moved, dataclasses.replace(measured, gpu_kind="nvidia-l40s"))
    step = next(law for law in difference.laws if law.law == "engine.unet_step")
    assert step.verdict == "faster"
    assert "assumed, then measured" in step.remarks
    assert difference.only_after == ("engine.residual_transfer.nvlink",)
    assert any("transferred, not measured" in sentence for sentence in difference.sentences)


def test_boxes_that_do_not_meet_are_said_and_forms_and_missing_laws_too(before: LatencyProfile) -> None:
    law = before.laws["engine.unet_step"]
    elsewhere = dataclasses.replace(
        law, domain={"forward_batch": (32.0, 64.0), "megapixels": (0.25, 1.0)}, form="affine",
        parameters={"fixed_s": 0.001, "per_unit_s": 0.012},
    )  # fmt: skip
    laws = {**before.laws, law.name: elsewhere}
    del laws["engine.text_encode"]
    difference = profile_difference(before, dataclasses.replace(before, laws=laws))
    remarks = next(found for found in difference.laws if found.law == law.name).remarks
    assert "forward_batch: measured in different boxes, the second is extrapolated" in remarks
    assert "form roofline_attention, then affine" in remarks
    assert difference.only_before == ("engine.text_encode",)


def test_the_command_prints_laws_images_and_causes_and_the_same_as_json(tmp_path: Path) -> None:
    for name, slower in (("a", 1.0), ("b", 0.9)):
        fingerprint = {**HARDWARE, "engine_sources": name}
        write_fit(
            fit_profile(known_session(slower=slower, fingerprint=fingerprint), n_draws=3), tmp_path / f"{name}.json"
        )
    app = typer.Typer()
    profile_commands.register(app)
    paths = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    shown = CliRunner().invoke(app, ["diff", *paths])
    assert shown.exit_code == 0, shown.output
    for text in ("engine.unet_step", "faster", "50 steps, colocated, 1 ControlNet", "engine_sources: a, then b"):
        assert text in shown.stdout
    plain = json.loads(CliRunner().invoke(app, ["diff", *paths, "--json"]).stdout)
    assert {law["law"]: law["verdict"] for law in plain["laws"]}["engine.unet_step"] == "faster"
