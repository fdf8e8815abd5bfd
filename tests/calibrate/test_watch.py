"""When a GPU counts as slowed, and the table of whole images."""

from __future__ import annotations

import pytest

from calibrate.image_rates import image_rates, plain_rates
from calibrate.measurement import Features, Measurement, Measurements, Session
from calibrate.throttle import POWER_CAP, GpuWatch, GpuWindow, flags_of, visible_gpus


def _window(sm_mhz: int, reasons: int) -> GpuWindow:
    window = GpuWindow()
    window.add(sm_mhz, 60, 690.0, reasons)
    return window


def test_full_load_at_the_power_limit_is_nothing_but_a_fallen_clock_is_noted() -> None:
    # seen on an H200: 1965 MHz at 670 W with the power bit set; 1785 MHz on the largest batches, of 1980
    assert _window(1965, POWER_CAP).slowed_by(1980) == []
    assert _window(1785, POWER_CAP).slowed_by(1980) == ["power_cap"]
    assert _window(1980, 0x1).slowed_by(1980) == []  # idle


@pytest.mark.parametrize(
    ("bit", "name"), [(0x8, "hardware_slowdown"), (0x20, "software_thermal"), (0x40, "hardware_thermal")]
)
def test_heat_and_hardware_count_at_any_clock(bit: int, name: str) -> None:
    assert _window(1980, bit).slowed_by(1980) == [name]


def test_windows_join_to_the_extremes_of_both() -> None:
    whole = GpuWindow()
    whole.join(_window(1900, 0x4))
    whole.join(GpuWindow())  # nothing was seen: nothing changes
    whole.join(_window(1700, 0x8))
    assert (whole.sm_mhz_min, whole.sm_mhz_max, whole.reasons, whole.n_samples) == (1700, 1900, 0xC, 2)


def test_a_machine_without_nvml_has_nothing_to_see() -> None:
    watch = GpuWatch()
    try:
        assert watch.can_see or watch.look() == []
    finally:
        watch.close()


def _image(
    order: int, quantity: str, value_s: float, n_controlnets: int = 0, variant: str = "", session: str = "s"
) -> Measurement:
    features = Features(2, 1, 1024, 1024, 50, n_controlnets, variant=variant)
    return Measurement(session, quantity, "", "", "", features, order, order, value_s)


def test_rates_stand_beside_ours_of_the_same_session_and_cell() -> None:
    rows = (
        _image(0, "e2e.colocated", 1.5), _image(1, "e2e.colocated", 1.7), _image(2, "e2e.colocated", 1.6),
        _image(3, "e2e.diffusers", 3.2), _image(4, "e2e.diffusers", 5.0, n_controlnets=1),
        _image(5, "e2e.diffusers", 4.0, session="other"), _image(6, "engine.unet_step", 0.03),
    )  # fmt: skip
    sessions = tuple(Session(name, "sdxl", "nvidia-h200", "", 0) for name in ("s", "other"))
    plain = {
        (r["session"], r["stack"], r["n_controlnets"]): r
        for r in plain_rates(image_rates(Measurements(rows, sessions)))
    }
    assert len(plain) == 4
    assert plain["s", "colocated", 0]["images_per_gpu_minute"] == pytest.approx(60 / 1.6)
    assert plain["s", "colocated", 0]["n_repetitions"] == 3
    assert plain["s", "diffusers", 0]["slower_than_ours"] == pytest.approx(2.0)
    assert plain["s", "diffusers", 1]["slower_than_ours"] is None  # ours was not measured there
    assert plain["other", "diffusers", 0]["slower_than_ours"] is None  # nor in that session


def test_a_gpu_at_its_power_limit_is_told_from_one_that_heat_slows_down() -> None:
    assert flags_of([]) == []
    assert flags_of(["power_cap"]) == ["power_limited"]
    assert flags_of(["power_cap", "software_thermal"]) == ["throttled", "power_limited"]


@pytest.mark.parametrize(
    ("named", "indices"), [("", [0, 1, 2]), ("1", [1]), ("2,0", [2, 0]), ("9", [0, 1, 2]), ("GPU-7f", [0, 1, 2])]
)
def test_only_the_gpus_that_the_session_may_use_are_watched(
    monkeypatch: pytest.MonkeyPatch, named: str, indices: list[int]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert visible_gpus(3) == indices
