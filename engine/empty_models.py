"""Networks of the SDXL family whose weights are still to come: no time is spent on drawing what a load will overwrite."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from engine.models import ModelSpec, SdxlModels


def empty_models(spec: ModelSpec, device: str | torch.device, dtype: torch.dtype) -> SdxlModels:
    """A checkpoint's networks on ``device`` whose weights are still to be written: they hold whatever was in that memory."""
    return SdxlModels(
        spec,
        _build_empty(lambda: UNet2DConditionModel(**spec.unet_config()), device, dtype),
        _build_empty(lambda: AutoencoderKL(**spec.vae_config()), device, dtype),
        _build_empty(lambda: CLIPTextModel(CLIPTextConfig(**spec.text_1)), device, dtype),
        _build_empty(lambda: CLIPTextModelWithProjection(CLIPTextConfig(**spec.text_2)), device, dtype),
    )


def empty_controlnet(spec: ModelSpec, device: str | torch.device, dtype: torch.dtype) -> ControlNetModel:
    """:func:`empty_models` of a ControlNet."""
    return _build_empty(lambda: ControlNetModel(**spec.controlnet_config()), device, dtype)


def _build_empty(make: Any, device: str | torch.device, dtype: torch.dtype) -> Any:
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        module = make()
    module = nn.Module.to(module, dtype=dtype).to_empty(device=device).eval().requires_grad_(False)
    in_files = set(module.state_dict())
    for name, buffer in module.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1], device=device).expand(buffer.shape))
        elif name not in in_files:
            raise RuntimeError(f"{type(module).__name__}: nobody knows what its buffer {name!r} holds")
    return module
