"""GPUs of several kinds or in parts, links of several lengths and lines that are shared: added up by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from calibrate.profile import LatencyProfile
from engine.allocation import GIB, Allocation, Link, Pool
from planner.service import ServiceTable, build_service
from planner.simulator import ProfileFacts, SimulationResult, simulate
from planner.simulator.allocated import gpu_hours
from planner.simulator.mechanisms import mechanisms_in_use
from tests.simulation_builders import FACTS, SIZES, base_pool, constant_profile, controlnet_pool, run, workload_of
from traces.problems import InputError

ENCODER_S, DECODER_S, FORWARD_S = 0.04, 0.06 + 0.002, 0.05


def test_a_pool_of_a_faster_kind_has_its_own_times_and_memory() -> None:
    workload = workload_of([0.0, 0.0, 0.0], n_steps=10, base_model_id="m")
    fast = build_service(workload, "colocated", constant_profile(), SIZES)
    slow = build_service(workload, "colocated", constant_profile(unet_step=0.3), SIZES)
    pools = (
        base_pool(1, name="new", base_model_ids=("m",)),
        replace(base_pool(2, name="old", base_model_ids=("m",)), gpu_kind="older"),
    )
    result = simulate(workload, Allocation(pools), {"new": fast, "old": slow}, SIZES, {"new": FACTS, "old": FACTS})
    assert result.requests["latency_s"].tolist() == pytest.approx([2.0, 4.0, 4.0], rel=1e-12)
    assert sorted(set(result.workers["gpu_kind"])) == ["older", "test"]
    tight = {"new": FACTS, "old": ProfileFacts(device_memory_gib=5.0, activation_gib_per_sample=0.5)}
    with pytest.raises(InputError, match="pool 'old': a checkpoint with the ControlNets"):
        simulate(workload, Allocation(pools), {"new": fast, "old": slow}, SIZES, tight)


def test_controlnet_workers_of_another_kind_compute_and_load_by_their_own_table() -> None:
    workload = workload_of([0.0], n_steps=10, base_model_id="m", controlnet_ids=("c",))
    base = build_service(workload, "decoupled", constant_profile(), SIZES)
    old = build_service(workload, "decoupled", constant_profile(controlnet_step=0.15, controlnet_load=3.0), SIZES)
    pools = (base_pool(1, "decoupled", base_model_ids=("m",)), replace(controlnet_pool(1), gpu_kind="older"))
    result = simulate(workload, Allocation(pools), {"base": base, "controlnet": old}, SIZES, FACTS)
    row = result.requests.iloc[0]
    assert row["denoise_s"] == pytest.approx(10 * (0.15 + 0.01 + DECODER_S), rel=1e-12)
    assert row["controlnet_load_s"] == pytest.approx(3.0 + 8.0 - 0.5, rel=1e-12)  # text is encoded meanwhile


def test_half_a_gpu_has_half_the_memory_costs_half_and_goes_at_its_stated_speed() -> None:
    workload = workload_of([0.0] * 3, base_model_id="m")
    service = ServiceTable.from_service_s(workload, np.full(3, 10.0))
    for speed, took_s in ((None, 20.0), (0.8, 12.5)):
        pool = base_pool(3, base_model_ids=("m",), workers_per_gpu=2, speed_ratio=speed)
        result = run(workload, [pool], service)
        assert result.requests["latency_s"].tolist() == [took_s] * 3
        assert pool.n_gpus == 2
        hours = gpu_hours(result.workers, 0.0, took_s)["base"]
        assert hours * 3600 == pytest.approx(2 * took_s, rel=1e-12)
    # 6 GiB of checkpoint beside 1 GiB of activations fit 8 GiB, not 4
    small = ProfileFacts(device_memory_gib=8.0, activation_gib_per_sample=0.5)
    run(workload, [base_pool(1, base_model_ids=("m",))], service, facts=small)
    with pytest.raises(InputError, match=r"at most 3\.0 GiB"):
        run(workload, [base_pool(2, base_model_ids=("m",), workers_per_gpu=2)], service, facts=small)


def test_half_a_gpu_for_controlnets_halves_their_speed_only() -> None:
    workload = workload_of([0.0], n_steps=10, base_model_id="m", controlnet_ids=("c",))
    service = build_service(workload, "decoupled", constant_profile(), SIZES)
    pools = (base_pool(1, "decoupled", base_model_ids=("m",)), replace(controlnet_pool(2, "c"), workers_per_gpu=2))
    result = simulate(workload, Allocation(pools), {"base": service}, SIZES, FACTS)
    assert result.requests["denoise_s"].iloc[0] == pytest.approx(10 * (2 * FORWARD_S + 0.01 + DECODER_S), rel=1e-12)
    assert Allocation(pools).n_gpus == 2


def profile_with_links(nvlink_s: float, network_s: float) -> LatencyProfile:
    profile = constant_profile()
    laws = dict(profile.laws)
    for kind, per_byte in (("nvlink", nvlink_s), ("network", network_s)):
        law = laws[f"engine.residual_transfer.{kind}"]
        # 1e8 bytes: two samples of 5e7
        laws[law.name] = replace(law, parameters={"fixed_s": 0.0, "per_unit_s": per_byte / 1e8})
    return replace(profile, laws=laws)


def two_lengths(links: tuple[Link, ...], ids: list[tuple[str, ...]], n: int = 2, **columns: Any) -> SimulationResult:
    workload = workload_of([0.0] * len(ids), n_steps=10, base_model_id="m", controlnet_ids=ids, **columns)
    service = build_service(workload, "decoupled", profile_with_links(0.01, 0.04), SIZES, links=links)
    pools: tuple[Pool, ...] = (
        base_pool(n, "decoupled", base_model_ids=("m",)), controlnet_pool(1, "near", name="here"),
        controlnet_pool(1, "far", name="there"),
    )  # fmt: skip
    return simulate(workload, Allocation(pools, links), {"base": service}, SIZES, FACTS)


def test_each_controlnet_pool_is_reached_over_its_own_link() -> None:
    links = (Link("base", "here", "nvlink"), Link("base", "there", "network"))
    result = two_lengths(links, [("near",), ("far",)])
    steps = [FORWARD_S + 0.01 + DECODER_S, FORWARD_S + 0.04 + DECODER_S]
    assert result.requests["denoise_s"].tolist() == pytest.approx([10 * s for s in steps], rel=1e-12)
    both = two_lengths(links, [("near", "far")])
    assert both.requests["denoise_s"].iloc[0] == pytest.approx(10 * (FORWARD_S + 0.05 + DECODER_S), rel=1e-12)


def test_compressed_residuals_take_their_share_of_the_time() -> None:
    links = (Link("base", "here"), Link("base", "there", "network", compression_ratio=4.0))
    result = two_lengths(links, [("far",)])
    assert result.requests["denoise_s"].iloc[0] == pytest.approx(10 * (FORWARD_S + 0.01 + DECODER_S), rel=1e-12)


def test_a_shared_line_slows_those_who_send_through_it_at_once() -> None:
    # the line carries a step's 1e8 bytes in 0.1 s: alone a step takes 0.05 + 0.1 + 0.062 = 0.212 s and loads it by 0.47
    gib_per_s = 1e8 / GIB / 0.1
    links = (
        Link("base", "here", "nvlink"),
        Link("base", "there", "network", uplink="rack", uplink_gib_per_s=gib_per_s),
    )
    one = two_lengths(links, [("far",)])
    assert one.requests["denoise_s"].iloc[0] == pytest.approx(10 * 0.212, rel=1e-12)
    two = two_lengths(links, [("far",), ("far",)])
    assert two.requests["denoise_s"].tolist() == pytest.approx([10 * 0.212] * 2, rel=1e-12)
    # three would load it by 1.42: each gets a third of its time, 0.3 s a step
    three = two_lengths(links, [("far",)] * 3, 3)
    assert three.requests["denoise_s"].tolist() == pytest.approx([10 * 0.3] * 3, rel=1e-12)
    assert three.requests["denoise_alone_s"].tolist() == pytest.approx([10 * 0.212] * 3, rel=1e-12)
    # others are not held up by it
    mixed = two_lengths(links, [("far",), ("far",), ("far",), ("near",)], 4)
    assert mixed.requests["denoise_s"].iloc[3] == pytest.approx(10 * (FORWARD_S + 0.01 + DECODER_S), rel=1e-12)


def test_links_that_lack_a_law_or_contradict_one_another_are_refused() -> None:
    workload = workload_of([0.0], n_steps=10, base_model_id="m", controlnet_ids=("near",))
    plain = build_service(workload, "decoupled", constant_profile(), SIZES)
    pools = (base_pool(1, "decoupled", base_model_ids=("m",)), controlnet_pool(1, "near", name="here"))
    links = (Link("base", "here", "network", uplink="rack", uplink_gib_per_s=1.0),)
    with pytest.raises(InputError, match="lacks a link's transfers, needs network"):
        simulate(workload, Allocation(pools, links), {"base": plain}, SIZES, FACTS)
    half = (Link("base", "here", uplink="rack"), Link("base", "here", compression_ratio=0.5))
    with pytest.raises(InputError) as caught:
        simulate(workload, Allocation(pools, half), {"base": plain}, SIZES, FACTS)
    assert "one of uplink and uplink_gib_per_s" in str(caught.value)
    assert "compression_ratio is 0.5" in str(caught.value)


def test_the_mechanisms_in_use_are_named() -> None:
    pools = (base_pool(1, "decoupled"), controlnet_pool(1, name="here"))
    assert mechanisms_in_use(Allocation(pools)) == ()
    assert mechanisms_in_use(Allocation(pools, (Link("base", "here", "pcie"),))) == ()
    shared = (replace(pools[0], workers_per_gpu=2), replace(pools[1], gpu_kind="older"))
    links = (Link("base", "here", compression_ratio=2.0),)
    assert mechanisms_in_use(Allocation(shared, links)) == ("shared_gpus", "gpu_kinds", "links")


def test_a_lora_larger_than_a_gpu_is_refused() -> None:
    workload = workload_of([0.0], base_model_id="m", lora_ids=("a",))
    service = ServiceTable.from_service_s(workload, np.ones(1))
    small = ProfileFacts(device_memory_gib=8.0, activation_gib_per_sample=0.5)
    pools = Allocation((base_pool(1, base_model_ids=("m",)),))
    with pytest.raises(InputError, match="the largest LoRA takes 9\\.0 GiB"):
        simulate(workload, pools, {"base": service}, replace(SIZES, lora_bytes=9 * GIB), small)
