"""Writes ``engine/registry/architectures/*.json`` from the networks themselves: ``python -m engine.shape_tables``.

The tables let a process without torch check files; a test compares them with the networks.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel

from engine.lora_file import lora_targets
from engine.models import ModelSpec
from engine.registry.shapes import TABLES, compress


def table(spec: ModelSpec) -> dict[str, Any]:
    """The table of one architecture; the networks are built without memory."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**spec.unet_config())
        controlnet = ControlNetModel(**spec.controlnet_config())
    return {
        "lora_targets": compress(lora_targets(unet)),
        "controlnet": compress({name: tuple(weight.shape) for name, weight in controlnet.state_dict().items()}),
        "controlnet_config": {key: value for key, value in sorted(controlnet.config.items()) if key[0] != "_"},
    }


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
