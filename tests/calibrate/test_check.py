"""``calibrate check``: what it measures, and when it says that a profile holds."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from calibrate import check as checking
from calibrate.check import TOLERANCE, CheckReport, LawCheck, check_blocks, check_extent, check_profile, verdicts
from calibrate.cli import app
from calibrate.measurement import Features, Measurement, Measurements, Session, read_measurements
from calibrate.profile import LatencyProfile, Law
from calibrate.profile_file import load_profile
from calibrate.run import RunOptions
from traces.problems import InputError

ROOT = Path(__file__).resolve().parents[2]
RESIDUALS = (0.97, 0.98, 0.99, 1.0, 1.01, 1.02, 1.03)


def _law(name: str, value_s: float, **changes: object) -> Law:
    law = Law(
        name, "affine", ("forward_batch", "megapixels"), {"fixed_s": 0.0, "per_unit_s": value_s}, "measured", "a test",
        {"forward_batch": (2.0, 8.0), "megapixels": (64 * 64 / 2**20, 1.0)}, ((2.0, 64 * 64 / 2**20), (8.0, 1.0)),
        n_repetitions=12, residual_ratio_quantiles=RESIDUALS,
    )  # fmt: skip
    return dataclasses.replace(law, **changes)  # type: ignore[arg-type]


def _profile(*laws: Law) -> LatencyProfile:
    return LatencyProfile("tiny", "cpu", {law.name: law for law in laws}, {}, {}, {}, {}, "")


def _measured(values_s: list[float], forward_batch: int = 2, side_px: int = 1024) -> Measurements:
    features = Features(forward_batch=forward_batch, n_images=1, width_px=side_px, height_px=side_px)
    rows = tuple(
        Measurement("s", "engine.unet_step", "engine", "", "graph", features, i, i, value_s)
        for i, value_s in enumerate(values_s)
    )
    return Measurements(rows, (Session("s", "tiny", "cpu", "", 0),))


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    # the law's own repetitions lie 0.98..1.02 around it; hosts of one kind differ by TOLERANCE besides
    [(1.0, "holds"), (1.02 * (1 + TOLERANCE) - 0.001, "holds"), (1.02 * (1 + TOLERANCE) + 0.001, "slower"),
     (0.98 * (1 - TOLERANCE) + 0.001, "holds"), (0.98 * (1 - TOLERANCE) - 0.001, "faster")],
)  # fmt: skip
def test_a_law_holds_within_what_its_profile_says_of_repetitions_and_hosts(ratio: float, verdict: str) -> None:
    profile = _profile(_law("engine.unet_step", 0.01))
    (found,) = verdicts(profile, _measured([0.02 * ratio] * 3))
    assert found.verdict == verdict
    assert found.ratio == pytest.approx(ratio)


def test_one_repetition_out_of_place_does_not_decide() -> None:
    (found,) = verdicts(_profile(_law("engine.unet_step", 0.01)), _measured([0.02, 0.02, 0.2]))
    assert found.verdict == "holds"


def test_a_size_outside_the_box_has_no_verdict() -> None:
    (found,) = verdicts(_profile(_law("engine.unet_step", 0.01)), _measured([9.0], forward_batch=16))
    assert found.verdict == "outside"


def test_laws_that_are_only_assumed_are_not_judged() -> None:
    assert verdicts(_profile(_law("engine.unet_step", 0.01, status="assumed")), _measured([9.0])) == ()


def test_the_shipped_profile_is_checked_at_sizes_that_it_was_fitted_at() -> None:
    profile = load_profile("h200")
    extent = check_extent(profile, "cuda")
    points = {(round(batch), round(mp * 2**20)) for batch, mp in profile.laws["engine.unet_step"].points}
    assert extent.fit_shapes[0] == (2, 1024, 1024)
    assert {(batch, width * height) for batch, width, height in extent.fit_shapes} <= points
    assert {task.station for block in check_blocks(extent) for task in block} == {"engine", "stock"}


@pytest.mark.parametrize(("has_host_tier", "variant"), [(True, "controlnet_host"), (False, "controlnet_serving")])
def test_a_load_is_measured_the_way_the_law_means_it(has_host_tier: bool, variant: str) -> None:
    blocks = check_blocks(check_extent(load_profile("h200"), "cuda"), has_host_tier=has_host_tier)
    assert [task.features.variant for block in blocks for task in block if task.part == "loads"] == [variant]


def test_laws_of_whole_jobs_are_not_judged_by_their_parts() -> None:
    law = _law("engine.unet_step", 0.01, source="median over kinds of jobs of serving.denoise")
    assert verdicts(_profile(law), _measured([9.0])) == ()


def test_a_fetch_is_judged_with_what_its_law_includes() -> None:
    features = Features(n_bytes=1000, n_loras=1, variant="rank4")
    rows = tuple(
        Measurement("s", quantity, "engine", "", "", features, i, i, value_s)
        for quantity, value_s in (("lora_fetch.local", 0.08), ("engine.lora_map", 0.02))
        for i in range(3)
    )
    measured = Measurements(rows, (Session("s", "tiny", "cpu", "", 0),))
    law = Law("lora_fetch.local", "affine", ("n_bytes",), {"fixed_s": 0.1, "per_unit_s": 0.0}, "measured",
              "sum of medians of lora_fetch.local and engine.lora_map", {"n_bytes": (1.0, 1e4)})  # fmt: skip
    (found,) = verdicts(_profile(law), measured)
    assert (found.measured_s, found.verdict) == (pytest.approx(0.1), "holds")
    assert verdicts(_profile(law), dataclasses.replace(measured, rows=rows[:3])) == ()  # half of it is not known


def test_the_shipped_profile_holds_on_the_host_that_it_was_measured_on() -> None:
    profile = load_profile("h200")
    shipped = read_measurements(ROOT / "calibrate" / "profiles" / "h200.measurements.parquet")
    extent = check_extent(profile, "cuda")
    sizes = {(batch, width) for batch, width, _ in extent.fit_shapes}
    decoded = {(n_images, width) for n_images, width, _ in extent.vae_shapes}
    at = {"engine.unet_step", "engine.encoder_step", "engine.decoder_step", "engine.controlnet_step"}
    # the session that timed most of the steps; sizes that check asks for
    timed = Counter(row.session for row in shipped.rows if row.quantity == "engine.encoder_step")
    session = timed.most_common(1)[0][0]
    rows = tuple(
        row
        for row in shipped.rows
        if row.session == session and not row.is_held_out
        and (row.quantity not in at or (row.features.forward_batch, row.features.width_px) in sizes)
        and (row.quantity != "engine.vae_decode" or (row.features.n_images, row.features.width_px) in decoded)
    )  # fmt: skip
    found = verdicts(profile, Measurements(rows, shipped.sessions))
    assert {check.law for check in found} >= at | {"engine.lora_attach", "engine.vae_decode", "lora_fetch.local"}
    assert [f"{c.law} {dict(c.features)} {c.ratio:.3f}" for c in found if c.verdict != "holds"] == []


def test_a_profile_of_another_gpu_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    profile = dataclasses.replace(_profile(_law("engine.unet_step", 0.01)), gpu_kind="nvidia-h200")
    with pytest.raises(InputError, match="was measured on nvidia-h200, this machine has cpu"):
        check_profile(profile, "cpu", RunOptions(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_check_measures_here_and_finds_the_drift(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a law a thousand times slower than this machine, and one a thousand times faster
    slow = _law(
        "engine.unet_step",
        1e6,
        points=((2.0, 32 * 32 / 2**20),),
        domain={"forward_batch": (2, 2), "megapixels": (0, 1)},
    )
    fast = _law("engine.encoder_step", 1e-3, points=slow.points, domain=slow.domain)
    blocks = checking.check_blocks
    monkeypatch.setattr(checking, "check_blocks", lambda extent, **how: [blocks(extent, **how)[0][:1]])
    report = check_profile(_profile(slow, fast), "cpu", RunOptions(tmp_path / "run", is_inline=True))
    assert {check.law: check.verdict for check in report.checks} == {
        "engine.unet_step": "faster", "engine.encoder_step": "slower",
    }  # fmt: skip
    assert report.has_drifted
    assert report.failures == ()
    assert report.path.exists()


@pytest.mark.parametrize(("verdict", "exit_code"), [("holds", 0), ("outside", 0), ("slower", 4), ("faster", 4)])
def test_the_exit_code_tells_drift_from_a_profile_that_holds(
    verdict: checking.Verdict, exit_code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = LawCheck("engine.unet_step", {"forward_batch": 2.0}, 16, 0.03, 0.0285, 0.027, 0.0295, verdict)
    asked: list[RunOptions] = []

    def measured(profile: LatencyProfile, device: str, options: RunOptions) -> CheckReport:
        asked.append(options)
        return CheckReport((found,), ("driver: 1 then, 2 here",), (), tmp_path / "run")

    monkeypatch.setattr(checking, "check_profile", measured)
    done = CliRunner().invoke(app, ["check", "h200", "--json"])
    assert done.exit_code == exit_code, done.output
    plain = json.loads(done.stdout)
    assert plain["has_drifted"] is (exit_code == 4)
    assert plain["checks"][0]["ratio"] == pytest.approx(0.03 / 0.0285)
    assert asked[0].budget_s == 120.0  # two minutes, building the stacks included
    shown = CliRunner().invoke(app, ["check", "h200"])
    assert ("does not hold here: engine.unet_step" in shown.stdout) is (exit_code == 4)
