"""What serving adds to a request by laws that older profiles lack: one prompt or two, starting noise, looking LoRAs up."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType

import pytest

from calibrate.profile import LatencyProfile
from planner.service import ServiceTable, Sizes, build_service
from tests.simulation_builders import constant_profile, workload_of

SIZES = Sizes(lora_bytes=2**27, controlnet_bytes=2**31, checkpoint_bytes=6 * 2**30)
WORKLOAD = workload_of(
    [0.0, 1.0, 2.0], n_images=[1, 4, 2], guidance_scale=[5.0, 5.0, 1.0], width_px=[1024, 512, 1024],
    height_px=[1024, 512, 512], lora_ids=[(), ("a",), ("a", "b")],
)  # fmt: skip
NEW = ("engine.text_encode_unguided", "engine.latent_input", "engine.lora_wait")


def table(profile: LatencyProfile, topology: str = "colocated") -> ServiceTable:
    return build_service(WORKLOAD, topology, profile, SIZES)  # type: ignore[arg-type]


def without(profile: LatencyProfile, *names: str) -> LatencyProfile:
    kept = {name: law for name, law in profile.laws.items() if name not in names}
    return dataclasses.replace(profile, laws=MappingProxyType(kept))


def test_a_request_without_guidance_encodes_one_prompt() -> None:
    assert table(constant_profile(text_encode_unguided=0.375)).text_s.tolist() == [0.5, 0.5, 0.375]


def test_starting_noise_grows_with_the_pixels_of_all_images() -> None:
    profile = constant_profile()
    law = profile.laws["engine.latent_input"]
    steep = dataclasses.replace(law, parameters={"fixed_s": 0.0, "per_unit_s": 0.25})
    changed = dataclasses.replace(profile, laws=MappingProxyType({**profile.laws, law.name: steep}))
    # 1 x 1 MP, 4 x 0.25 MP, 2 x 0.5 MP: as many pixels each
    assert (table(changed).text_s - table(profile).text_s).tolist() == pytest.approx([0.25] * 3)


def test_loras_are_looked_up_once_a_request_and_only_by_our_engine() -> None:
    one, other = constant_profile(lora_wait=0.0), constant_profile(lora_wait=0.25)
    assert (table(other).lora_attach_s - table(one).lora_attach_s).tolist() == pytest.approx([0.0, 0.25, 0.25])
    assert table(other, "diffusers").lora_attach_s.tolist() == table(one, "diffusers").lora_attach_s.tolist()


def test_a_profile_without_these_laws_is_read_as_before() -> None:
    older = table(without(constant_profile(text_encode_unguided=0.375, lora_wait=0.25), *NEW))
    assert older.text_s.tolist() == [0.5] * 3
    assert older.lora_attach_s.tolist() == table(constant_profile()).lora_attach_s.tolist()
