"""Names of layers as other programs write them mean what diffusers says they mean."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import convert_unet_state_dict_to_peft

from engine.models import SdxlModels
from engine.registry.lora_check import KOHYA_PREFIX, kohya_names, plan_lora
from engine.registry.safetensors_header import AddOnRefusedError, parse_header
from engine.registry.shapes import architecture
from tests.engine.registry.files import check, file_of, lora_bytes, parts, tensors_of, tiny


def with_kohya_names(style: str) -> dict[str, np.ndarray]:
    """The right file in kohya's names: ``diffusers`` or ``original`` spelling of the modules."""
    spelled = {}
    for written, layer in kohya_names(tiny().lora_targets).items():
        is_original = any(part in written for part in ("input_blocks", "middle_block", "output_blocks"))
        if is_original == (style == "original"):
            spelled[layer] = written
    tensors = {}
    for name, values in tensors_of(lora_bytes()).items():
        layer, _, role = name.removeprefix("unet.").partition(".lora_")
        tensors[f"{spelled[layer]}.lora_{'down' if role[0] == 'A' else 'up'}.weight"] = values
        tensors[f"{spelled[layer]}.alpha"] = np.array(2.0, np.float16)
    return tensors


@pytest.mark.parametrize("style", ["diffusers", "original"])
def test_kohyas_names_mean_the_layers_that_diffusers_makes_of_them(models: SdxlModels, style: str) -> None:
    tensors = with_kohya_names(style)
    converted, alphas = StableDiffusionXLPipeline.lora_state_dict(
        {name: torch.from_numpy(values) for name, values in tensors.items()}, unet_config=models.unet.config
    )
    data = file_of(tensors)
    header, _ = parts(data)
    planned = plan_lora(
        "file", parse_header("file", json.dumps(header).encode(), len(data), n_dims_max=2), tiny().lora_targets
    )
    assert planned
    ours = {pair.layer: (tensors[pair.down.name], tensors[pair.up.name]) for pair in planned}
    theirs: dict[str, dict[str, np.ndarray]] = {}
    for name, values in convert_unet_state_dict_to_peft(converted).items():
        layer, _, role = name.removeprefix("unet.").partition(".lora_")
        theirs.setdefault(layer, {})["down" if role[0] == "A" else "up"] = values.numpy()
    assert set(theirs) == set(ours)
    for layer, (down, up) in ours.items():
        assert np.array_equal(theirs[layer]["down"], down)
        assert np.array_equal(theirs[layer]["up"], up)
    assert set(alphas.values()) == {2.0}
    assert check(data).n_layers == len(planned)


def test_every_layer_of_sdxl_has_two_spellings_and_none_is_ambiguous() -> None:
    targets = architecture("sdxl").lora_targets
    names = kohya_names(targets)
    assert len(names) == 2 * len(targets)
    assert names[f"{KOHYA_PREFIX}input_blocks_8_1_transformer_blocks_9_ff_net_0_proj"] == (
        "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.0.proj"
    )
    assert names[f"{KOHYA_PREFIX}output_blocks_5_1_proj_out"] == "up_blocks.1.attentions.2.proj_out"


def test_a_layer_in_both_spellings_is_refused() -> None:
    tensors = {**with_kohya_names("diffusers"), **with_kohya_names("original")}
    with pytest.raises(AddOnRefusedError, match="twice"):
        check(file_of(tensors))


@pytest.mark.parametrize("name", ["lora_unet_input_blocks_1_0_in_layers_2", "lora_unet_time_embed_0"])
def test_kohyas_layers_outside_attention_are_refused_by_name(name: str) -> None:
    tensors = {
        f"{name}.lora_down.weight": np.ones((4, 32), np.float16),
        f"{name}.lora_up.weight": np.ones((32, 4), np.float16),
    }
    with pytest.raises(AddOnRefusedError, match=f"layer '{name}' does not exist in the target"):
        check(file_of(tensors))


def said(settings: dict[str, object], **extra: np.ndarray) -> bytes:
    text = json.dumps({f"unet.{key}": value for key, value in settings.items()})
    return file_of({**tensors_of(lora_bytes()), **extra}, lora_adapter_metadata=text)


def test_alpha_in_diffusers_metadata_counts() -> None:
    data = said({"r": 4, "lora_alpha": 8, "alpha_pattern": {}, "use_rslora": False})
    header, _ = parts(data)
    planned = plan_lora(
        "file", parse_header("file", json.dumps(header).encode(), len(data), n_dims_max=2), tiny().lora_targets
    )
    assert {pair.factor(None) for pair in planned} == {2.0}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"lora_alpha": 8, "use_rslora": True}, "says use_rslora = True"),
        ({"lora_alpha": 8, "use_dora": True}, "says use_dora = True"),
        ({"lora_alpha": 8, "alpha_pattern": {"attn1": 3}}, "says alpha_pattern"),
        ({"lora_alpha": "8"}, "says lora_alpha = 8"),
        ({"lora_alpha": True}, "says lora_alpha = True"),
    ],
)
def test_settings_that_change_more_than_one_factor_are_refused_by_name(
    settings: dict[str, object], reason: str
) -> None:
    with pytest.raises(AddOnRefusedError, match=reason):
        check(said(settings))


def test_alpha_given_twice_is_refused() -> None:
    layer = next(iter(tensors_of(lora_bytes()))).removeprefix("unet.").partition(".lora_")[0]
    with pytest.raises(AddOnRefusedError, match="gives alpha twice"):
        check(said({"lora_alpha": 8}, **{f"{layer}.alpha": np.ones(1, np.float16)}))


def test_broken_metadata_is_refused() -> None:
    with pytest.raises(AddOnRefusedError, match="broken lora_adapter_metadata"):
        check(file_of(tensors_of(lora_bytes()), lora_adapter_metadata="{"))
