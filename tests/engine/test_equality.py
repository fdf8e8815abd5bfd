"""The engine's image is the stock Diffusers image: same modules, same noise, same embeddings; PEFT is the oracle for LoRAs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionXLControlNetPipeline, StableDiffusionXLPipeline

from engine.base import BaseWorker
from engine.lora import PinnedLora, pin_lora
from engine.models import SdxlModels, write_random_lora
from engine.options import ControlInput, EngineOptions, ImageRequest, PromptEmbeddings

SIZE_PX = 64
N_STEPS = 4
# What the engine promises; fp32 sums in another order differ by some 1e-6 here.
LIMIT = 1e-4
# An add-on that changes no pixel by more than a hundred times the bound would prove nothing.
VISIBLE = 1e-2
LORA_SCALES = (0.8, 0.5)

Prompts = tuple[PromptEmbeddings, PromptEmbeddings]


@pytest.fixture(scope="module")
def lora_files(models: SdxlModels, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("loras")
    paths = [folder / f"{i}.safetensors" for i in range(2)]
    for i, path in enumerate(paths):
        write_random_lora(path, models.unet, rank=4 + 4 * i, seed=i)
    return paths


@pytest.fixture(scope="module")
def noise() -> torch.Tensor:
    return torch.randn((2, 4, 32, 32), generator=torch.Generator().manual_seed(8))


def stock_image(
    models: SdxlModels,
    controlnets: dict[str, ControlNetModel],
    prompts: Prompts,
    controls: list[ControlInput],
    loras: list[Path],
    noise: torch.Tensor,
    guidance: float = 5.0,
) -> torch.Tensor:
    prompt, negative = prompts
    options: dict[str, Any] = {
        "prompt_embeds": prompt.context,
        "pooled_prompt_embeds": prompt.pooled,
        "negative_prompt_embeds": negative.context,
        "negative_pooled_prompt_embeds": negative.pooled,
        "num_images_per_prompt": noise.shape[0],
        "num_inference_steps": N_STEPS,
        "guidance_scale": guidance,
        "height": SIZE_PX,
        "width": SIZE_PX,
        "latents": noise.clone(),
        "output_type": "pt",
    }
    networks = (models.vae, models.text_encoder, models.text_encoder_2, None, None, models.unet)
    if controls:
        nets = [controlnets[control.name] for control in controls]
        pipeline = StableDiffusionXLControlNetPipeline(*networks, nets, models.scheduler(), add_watermarker=False)
        options |= {
            "image": [control.image for control in controls],
            "controlnet_conditioning_scale": [control.scale for control in controls],
            "control_guidance_start": [control.start for control in controls],
            "control_guidance_end": [control.end for control in controls],
        }
    else:
        pipeline = StableDiffusionXLPipeline(*networks, models.scheduler(), add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    try:
        for i, path in enumerate(loras):
            pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=f"lora_{i}")
        if loras:
            pipeline.set_adapters([f"lora_{i}" for i in range(len(loras))], list(LORA_SCALES[: len(loras)]))
        return pipeline(**options).images
    finally:
        if loras:
            pipeline.unload_lora_weights()


def our_image(
    worker: BaseWorker,
    prompts: Prompts,
    controls: list[ControlInput],
    loras: list[PinnedLora],
    noise: torch.Tensor,
    guidance: float = 5.0,
) -> torch.Tensor:
    request = ImageRequest(
        prompt=prompts[0],
        negative=prompts[1],
        n_images=noise.shape[0],
        n_steps=N_STEPS,
        width=SIZE_PX,
        height=SIZE_PX,
        guidance=guidance,
        controls=controls,
        loras=list(zip(loras, LORA_SCALES, strict=False)),
        latents=noise,
    )
    return worker.generate(request).images


# every combination is painted in workers/test_topologies.py
@pytest.mark.parametrize(("n_controlnets", "n_loras"), [(0, 0), (1, 2), (2, 1)])
def test_the_image_is_that_of_the_stock_pipeline_and_each_add_on_shows(
    models: SdxlModels,
    controlnets: dict[str, ControlNetModel],
    prompts: Prompts,
    controls: list[ControlInput],
    lora_files: list[Path],
    noise: torch.Tensor,
    n_controlnets: int,
    n_loras: int,
) -> None:
    worker = BaseWorker(models, controlnets, EngineOptions())
    pinned = [pin_lora(path, models.unet) for path in lora_files]
    used_controls, used_loras = controls[:n_controlnets], pinned[:n_loras]
    stock = stock_image(models, controlnets, prompts, used_controls, lora_files[:n_loras], noise[:1])
    ours = our_image(worker, prompts, used_controls, used_loras, noise[:1])
    assert float((ours - stock).abs().max()) <= LIMIT
    for fewer_controls, fewer_loras in ((used_controls[:-1], used_loras), (used_controls, used_loras[:-1])):
        if (len(fewer_controls), len(fewer_loras)) != (n_controlnets, n_loras):
            without = our_image(worker, prompts, fewer_controls, fewer_loras, noise[:1])
            assert float((ours - without).abs().max()) >= VISIBLE


@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_two_images_with_and_without_guidance(
    models: SdxlModels,
    controlnets: dict[str, ControlNetModel],
    prompts: Prompts,
    controls: list[ControlInput],
    noise: torch.Tensor,
    guidance: float,
) -> None:
    worker = BaseWorker(models, controlnets, EngineOptions())
    stock = stock_image(models, controlnets, prompts, controls[:1], [], noise, guidance)
    ours = our_image(worker, prompts, controls[:1], [], noise, guidance)
    assert float((ours - stock).abs().max()) <= LIMIT


def test_nhwc_memory_gives_the_same_image(models: SdxlModels, prompts: Prompts, noise: torch.Tensor) -> None:
    ours = our_image(BaseWorker(models, {}, EngineOptions()), prompts, [], [], noise[:1])
    nhwc = our_image(BaseWorker(models, {}, EngineOptions(channels_last=True)), prompts, [], [], noise[:1])
    for network in models.modules:
        network.to(memory_format=torch.contiguous_format)
    assert float((ours - nhwc).abs().max()) <= LIMIT


def test_a_controlnet_with_scale_zero_changes_nothing(
    models: SdxlModels,
    controlnets: dict[str, ControlNetModel],
    prompts: Prompts,
    controls: list[ControlInput],
    noise: torch.Tensor,
) -> None:
    worker = BaseWorker(models, controlnets, EngineOptions())
    silent = ControlInput("net-0", controls[0].image, scale=0.0)
    assert torch.equal(
        our_image(worker, prompts, [silent], [], noise[:1]), our_image(worker, prompts, [], [], noise[:1])
    )


def test_prompts_are_encoded_as_the_stock_pipeline_encodes_them(models: SdxlModels) -> None:
    from engine.text import encode_prompt, random_prompt

    prompt = random_prompt(models.spec, 3)

    class Tokenizer:
        model_max_length = 77

        def __init__(self, ids: torch.Tensor) -> None:
            self.input_ids = ids

        def __call__(self, *_: object, **__: object) -> Tokenizer:
            return self

        def tokenize(self, _: str) -> list[str]:
            return []

    pipeline = StableDiffusionXLPipeline(
        models.vae, models.text_encoder, models.text_encoder_2, None, None, models.unet, models.scheduler()
    )
    pipeline.tokenizer, pipeline.tokenizer_2 = Tokenizer(prompt.ids), Tokenizer(prompt.ids_2)
    with torch.no_grad():
        context, _, pooled, _ = pipeline.encode_prompt("a prompt", do_classifier_free_guidance=False)
        ours = encode_prompt(models, prompt)
    assert torch.equal(ours.context, context)
    assert torch.equal(ours.pooled, pooled)
