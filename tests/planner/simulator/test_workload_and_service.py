"""From a trace to service times: what is counted, and what each topology adds up to."""

from __future__ import annotations

import numpy as np
import pytest

from calibrate.profile import OutOfDomainError
from calibrate.profile_file import load_profile
from engine.allocation import Catalogue, CatalogueEntry
from planner.service import Sizes, build_service
from planner.workload import build_workload
from tests.simulation_builders import CONSTANT_S, SIZES, constant_profile, trace_of, workload_of
from traces.problems import InputError

S = CONSTANT_S
ADD_ONS = {"n_steps": 20, "controlnet_ids": [("canny", "depth")], "lora_ids": [("style",)]}


def test_guidance_doubles_the_forward_batch() -> None:
    workload = workload_of([0.0, 1.0, 2.0], n_images=[1, 4, 4], guidance_scale=[7.5, 1.1, 1.0])
    assert workload.forward_batch.tolist() == [2, 8, 4]


def test_controlnets_that_do_nothing_are_dropped() -> None:
    workload = workload_of(
        [0.0, 1.0],
        n_steps=10,
        controlnet_ids=[("a", "b", "c"), ("c",)],
        controlnet_scales=[(1.0, 0.0, 0.5), ()],
        control_start=[(0.0, 0.0, 0.25), (0.98,)],
        control_end=[(0.5, 1.0, 1.0), (1.0,)],
    )
    assert [[workload.controlnet_names[c] for c in codes] for codes in workload.controlnets] == [["a", "c"], []]
    # step i of 10 is inside if i/10 ≥ start and (i + 1)/10 ≤ end: from 0.25 on that is steps 3..9
    assert workload.control_steps == (((0, 5), (3, 10)), ())


def test_a_decimal_share_of_the_steps_is_not_lost_to_rounding() -> None:
    workload = workload_of([0.0], n_steps=30, controlnet_ids=[("a",)], control_start=[(0.1,)], control_end=[(0.7,)])
    assert workload.control_steps == (((3, 21),),)


def test_a_subset_keeps_rows_together() -> None:
    workload = workload_of([0.0, 1.0, 2.0], n_images=[1, 2, 4], lora_ids=[("x",), (), ("y", "x")])
    part = workload.subset(np.array([False, True, True]))
    assert part.request_ids == ("r1", "r2")
    assert part.n_loras.tolist() == [0, 2]
    assert part.lora_sum(np.array([10.0, 1.0])).tolist() == [0.0, 11.0]
    with pytest.raises(ValueError, match=r"bool\[3\]"):
        workload.subset(np.array([True]))


def test_a_trace_out_of_order_is_refused() -> None:
    with pytest.raises(ValueError, match="row 1 arrives at 1 s"):
        build_workload(trace_of([2.0, 1.0]))


@pytest.mark.parametrize(
    ("topology", "denoise_s"),
    [
        ("diffusers", 20 * (S["unet_lora_step"] + 2 * S["controlnet_step"])),
        ("diffusers_tuned", 20 * (S["unet_step"] + 2 * S["controlnet_step"])),
        ("colocated", 20 * (S["unet_step"] + 2 * S["controlnet_step"])),
        # two ControlNets on two workers, whose residuals share the way into the base GPU
        ("decoupled", 20 * (S["controlnet_step"] + 2 * S["residual_transfer"] + S["decoder_step"] + S["remote_join"])),
    ],
)
def test_a_request_with_add_ons_adds_up_by_topology(topology: str, denoise_s: float) -> None:
    service = build_service(workload_of([0.0], **ADD_ONS), topology, constant_profile(), SIZES)  # type: ignore[arg-type]
    assert service.denoise_alone_s[0] == pytest.approx(denoise_s, rel=1e-12)
    assert service.text_s[0] == S["text_encode"]
    assert service.decode_s[0] == S["vae_decode"] + S["request_overhead"]
    assert service.lora_attach_s[0] + service.lora_detach_s[0] == S["lora_attach"] + S["lora_detach"]
    hidden_s = 10 * denoise_s / 20 if topology == "decoupled" else 0.0
    assert service.lora_hidden_s[0] == pytest.approx(hidden_s, rel=1e-12)


def test_outside_its_window_a_controlnet_costs_stock_diffusers_a_step_and_our_engine_none() -> None:
    workload = workload_of([0.0], n_steps=20, controlnet_ids=[("a",)], control_end=[(0.5,)])
    steps = {
        name: float(build_service(workload, name, constant_profile(), SIZES).denoise_alone_s[0])  # type: ignore[arg-type]
        for name in ("diffusers", "colocated", "decoupled")
    }
    joined_s = S["controlnet_step"] + S["residual_transfer"] + S["decoder_step"] + S["remote_join"]
    assert steps["diffusers"] == pytest.approx(20 * (S["unet_step"] + S["controlnet_step"]))
    assert steps["colocated"] == pytest.approx(20 * S["unet_step"] + 10 * S["controlnet_step"])
    assert steps["decoupled"] == pytest.approx(10 * S["unet_step"] + 10 * joined_s)


def test_a_request_without_add_ons_pays_for_none() -> None:
    times = [
        build_service(workload_of([0.0]), name, constant_profile(), SIZES).alone_s[0]  # type: ignore[arg-type]
        for name in ("diffusers", "diffusers_tuned", "colocated", "decoupled")
    ]
    assert times == [pytest.approx(50 * S["unet_step"] + 1.0)] * 4


def test_noise_is_keyed_by_request_and_seed_alone() -> None:
    profile = constant_profile(noise=(0.9, 0.95, 0.98, 1.0, 1.02, 1.1, 1.3))
    workload = workload_of(np.arange(200.0))
    whole = build_service(workload, "colocated", profile, SIZES, noise_seed=1)
    part = build_service(workload.subset(np.arange(200) % 3 == 0), "diffusers", profile, SIZES, noise_seed=1)
    assert (whole.noise_ratio[::3] == part.noise_ratio).all()
    other = build_service(workload, "colocated", profile, SIZES, noise_seed=2)
    assert (whole.noise_ratio != other.noise_ratio).mean() > 0.9
    # of 200 draws, about half lie above the median: 100 ± 4 standard deviations of 7.1
    assert abs(int((whole.noise_ratio > 1.0).sum()) - 100) < 29
    assert whole.noise_ratio.min() >= 0.9
    assert whole.noise_ratio.max() <= 1.3


def test_outside_the_measured_box_nothing_is_predicted_unless_asked(provisional_profile_path) -> None:  # type: ignore[no-untyped-def]
    profile = load_profile(str(provisional_profile_path))
    workload = workload_of([0.0], width_px=2048)
    with pytest.raises(OutOfDomainError, match="megapixels is 2"):
        build_service(workload, "colocated", profile, SIZES)
    service = build_service(workload, "colocated", profile, SIZES, extrapolate=True)
    assert service.grades["engine.unet_step"] in {"extrapolated", "assumed"}


def test_what_cannot_be_modelled_is_refused() -> None:
    with pytest.raises(InputError, match="decoupled_cfg2"):
        build_service(workload_of([0.0]), "decoupled_cfg2", constant_profile(), SIZES)
    with pytest.raises(InputError, match="link kind: got 'local'"):
        build_service(workload_of([0.0]), "decoupled", constant_profile(), SIZES, link_kind="local")


def test_the_catalogue_overrides_default_sizes() -> None:
    sizes = Sizes(1, 2, 3, Catalogue({"big": CatalogueEntry("big", "lora", bytes=7)}))
    assert sizes.of_loras(["big", "other"]).tolist() == [7, 1]
    assert Sizes.from_profile(constant_profile(), lora_bytes=5) == Sizes(5, 2 * 2**30, 6 * 2**30)


def test_a_lora_miss_costs_our_engine_the_pinning_that_stock_pays_at_each_attach() -> None:
    stock, ours = (
        build_service(workload_of([0.0], **ADD_ONS), topology, constant_profile(), SIZES)
        for topology in ("diffusers_tuned", "colocated")
    )
    assert stock.lora_fetch_s.tolist() == [S["lora_fetch"]]
    assert ours.lora_fetch_s.tolist() == [2 * S["lora_fetch"]]
