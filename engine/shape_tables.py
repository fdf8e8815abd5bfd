"""Writes ``engine/registry/architectures/*.json`` from the networks themselves: ``python -m engine.shape_tables``.

The tables let a process without torch check files; a test compares them with the networks.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from engine.lora_file import lora_targets
from engine.models import ModelSpec
from engine.registry.checkpoint_check import PARTS, plain_name
from engine.registry.shapes import TABLES, compress


def table(spec: ModelSpec) -> dict[str, Any]:
    """The table of one architecture; the networks are built without memory."""
    with torch.device("meta"):
        controlnet = ControlNetModel(**spec.controlnet_config())
        parts: dict[str, Any] = {
            "unet": UNet2DConditionModel(**spec.unet_config()),
            "vae": AutoencoderKL(**spec.vae_config()),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**spec.text_1)),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**spec.text_2)),
        }
    return {
        "lora_targets": compress(lora_targets(parts["unet"])),
        "controlnet": compress(_shapes(controlnet)),
        "controlnet_config": {key: value for key, value in sorted(controlnet.config.items()) if key[0] != "_"},
        "checkpoint": compress(
            {
                f"{part}.{plain_name(part, name)}": shape
                for part in parts
                for name, shape in _shapes(parts[part]).items()
            }
        ),
        "checkpoint_config": {
            f"{name}.{key}": getattr(parts[name].config, key) for name, part in PARTS.items() for key in part.settings
        },
    }


def _shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in network.state_dict().items()}


def as_text(table: dict[str, Any]) -> str:
    """JSON, one row a line."""
    parts = []
    for part, rows in table.items():
        lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(value)}" for name, value in rows.items())
        parts.append(f"  {json.dumps(part)}: {{\n{lines}\n  }}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def write_tables() -> None:
    """Writes the tables of all architectures."""
    TABLES.mkdir(exist_ok=True)
    for spec in (ModelSpec.sdxl(), ModelSpec.tiny()):
        beside = TABLES / f"{spec.name}.json.part"
        beside.write_text(as_text(table(spec)), encoding="utf-8")
        beside.replace(TABLES / f"{spec.name}.json")


if __name__ == "__main__":
    write_tables()
