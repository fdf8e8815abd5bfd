"""Laws of a request that comparisons with the engine brought in."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType

import pytest

from calibrate.profile import LatencyProfile
from planner.service import ServiceTable, Sizes, build_service
from tests.simulation_builders import constant_profile, workload_of

MIB = 2**20
SIZES = Sizes(lora_bytes=100 * MIB, controlnet_bytes=2**31, checkpoint_bytes=6 * 2**30)
WORKLOAD = workload_of(
    [0.0, 1.0, 2.0, 3.0],
    n_steps=10,
    lora_ids=[(), ("a",), ("a", "b"), ("a", "b", "c", "d")],
    controlnet_ids=[(), ("x",), ("x", "y", "z"), ()],
    width_px=[1024, 1024, 512, 1024],
)


def profile(most_mib: float = 1e6) -> LatencyProfile:
    """Patching takes 10 ms and 1 ms for 10 MiB; a control image 20 ms for 2**20 pixels."""
    plain = constant_profile()
    laws = dict(plain.laws)
    for stack in ("engine", "diffusers"):
        law = laws[f"{stack}.lora_attach"]
        laws[law.name] = dataclasses.replace(
            law, parameters={"fixed_s": 0.010, "per_unit_s": 0.001 / (10 * MIB)}, domain={"n_bytes": (MIB, most_mib * MIB)}
        )  # fmt: skip
    law = laws["engine.control_input"]
    laws[law.name] = dataclasses.replace(law, parameters={"fixed_s": 0.0, "per_unit_s": 0.020})
    return dataclasses.replace(plain, laws=MappingProxyType(laws))


def table(topology: str, of: LatencyProfile, **options: bool) -> ServiceTable:
    return build_service(WORKLOAD, topology, of, SIZES, **options)  # type: ignore[arg-type]


def test_our_engine_patches_the_loras_of_a_request_at_once() -> None:
    # 10 ms once, and 10 ms for each 100 MiB
    assert table("colocated", profile()).lora_attach_s.tolist() == pytest.approx([0.0, 0.020, 0.030, 0.050])


def test_the_stock_pipeline_attaches_one_lora_after_the_other() -> None:
    assert table("diffusers", profile()).lora_attach_s.tolist() == pytest.approx([0.0, 0.020, 0.040, 0.080])


def test_more_bytes_than_were_patched_at_once_count_one_by_one() -> None:
    attach_s = table("colocated", profile(most_mib=250)).lora_attach_s.tolist()
    assert attach_s == pytest.approx([0.0, 0.020, 0.030, 0.080])


def test_each_control_image_takes_its_time_by_its_pixels() -> None:
    plain = table("colocated", constant_profile())
    seconds = table("colocated", profile()).text_s - plain.text_s
    assert seconds.tolist() == pytest.approx([0.0, 0.020, 3 * 0.010, 0.0])


def test_a_profile_without_the_law_of_control_images_is_read_as_before() -> None:
    whole = profile()
    older = dataclasses.replace(
        whole, laws=MappingProxyType({name: law for name, law in whole.laws.items() if name != "engine.control_input"})
    )
    assert table("colocated", older).text_s.tolist() == pytest.approx([0.5] * 4)


def test_a_store_on_the_host_costs_the_check_and_not_the_way_over_a_network() -> None:
    remote = table("colocated", constant_profile()).lora_fetch_s
    local = table("colocated", constant_profile(), is_store_local=True).lora_fetch_s
    assert (remote - local).tolist() == pytest.approx([2.0] * 4)  # the constant profile's fetch, of each of four LoRAs


def test_a_store_on_the_host_costs_no_network_for_models_either() -> None:
    one_part, two_parts = constant_profile(), constant_profile(checkpoint_read=3.0, controlnet_read=0.5)
    for of, read_s in ((one_part, (0.0, 0.0)), (two_parts, (3.0, 0.5))):
        local = table("colocated", of, is_store_local=True)
        remote = table("colocated", of)
        assert (set(local.checkpoint_fetch_s), set(local.controlnet_fetch_s)) == ({read_s[0]}, {read_s[1]})
        # the constant profile's fetch over the network comes before the read
        assert (set(remote.checkpoint_fetch_s), set(remote.controlnet_fetch_s)) == ({8 + read_s[0]}, {8 + read_s[1]})


def test_only_our_engine_has_loads_in_two_parts() -> None:
    two_parts = constant_profile(checkpoint_read=3.0, controlnet_read=0.5)
    for topology in ("diffusers", "diffusers_tuned"):
        assert (
            table(topology, two_parts).checkpoint_fetch_s.tolist()
            == table(topology, constant_profile()).checkpoint_fetch_s.tolist()
        )
