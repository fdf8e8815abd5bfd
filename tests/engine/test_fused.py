"""The fused blocks compute what diffusers' modules compute; on a CPU they run on the kernels' references."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import ControlNetModel

from engine.base import BaseWorker
from engine.fused_transformer import side_by_side
from engine.fused_unet import FusedNetwork, is_plain_network
from engine.fused_vae import decode_latents_fused, is_plain_vae
from engine.lora import pin_lora
from engine.models import ModelSpec, SdxlModels, build_controlnet, build_models, write_random_lora
from engine.options import ControlInput, EngineOptions, ImageRequest, PromptEmbeddings
from engine.parts import decode_latents

Prompts = tuple[PromptEmbeddings, PromptEmbeddings]
FUSED = EngineOptions(channels_last=True, fuses_on_cpu=True)
# fp32: some 60 layers whose sums are ordered differently, 6e-8 a rounding
LIMIT = 1e-4


def build() -> tuple[SdxlModels, dict[str, ControlNetModel]]:
    """Models of their own: fusing moves weights, which the session's models must not see."""
    nets = {f"net-{i}": build_controlnet(ModelSpec.tiny(), seed=i + 1) for i in range(2)}
    return build_models(ModelSpec.tiny(), seed=0), nets


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_images_are_those_of_the_plain_modules_with_controlnets_and_loras(
    models: SdxlModels,
    controlnets: dict[str, ControlNetModel],
    controls: list[ControlInput],
    prompts: Prompts,
    tmp_path: Path,
) -> None:
    write_random_lora(tmp_path / "a.safetensors", models.unet, 4, 1)
    loras = [(pin_lora(tmp_path / "a.safetensors", models.unet), 0.7)]
    fused_models, fused_nets = build()
    plain, fused = BaseWorker(models, controlnets, EngineOptions()), BaseWorker(fused_models, fused_nets, FUSED)
    assert is_plain_network(fused_models.unet)
    assert is_plain_network(fused_nets["net-0"])
    assert is_plain_vae(fused_models.vae)
    pristine = {name: value.clone() for name, value in fused_models.unet.state_dict().items()}
    for used, patched, guidance, n_images in (
        (controls, loras, 5.0, 1),
        ([], loras, 1.0, 2),
        (controls[:1], [], 5.0, 2),
    ):
        request = ImageRequest(prompts[0], prompts[1], n_images, 4, 64, 64, guidance, used, patched, seed=3)
        here, there = fused.generate(request), plain.generate(request)
        assert relative(here.latents, there.latents) <= LIMIT
        assert relative(here.images, there.images) <= LIMIT
    assert all(torch.equal(value, pristine[name]) for name, value in fused_models.unet.state_dict().items())


def test_weights_written_in_place_are_the_ones_that_run() -> None:
    sample, emb, context = torch.randn(2, 4, 16, 16), torch.randn(2, 128), torch.randn(2, 77, 64)
    first, second = build_models(ModelSpec.tiny(), seed=0).unet, build_models(ModelSpec.tiny(), seed=7).unet
    fused = FusedNetwork(first)
    with torch.no_grad():
        for mine, theirs in zip(first.parameters(), second.parameters(), strict=True):
            mine.copy_(theirs)
        text = fused.text(context)
        text.update()
        ours = fused.decode(*fused.encode(sample, emb, text), emb, text)
        exact = FusedNetwork(second)
        other = exact.text(context)
        other.update()
        theirs = exact.decode(*exact.encode(sample, emb, other), emb, other)
    assert torch.equal(ours, theirs)


def test_parameters_side_by_side_are_fused_once_and_stay_views() -> None:
    layers = [torch.nn.Linear(6, n) for n in (3, 4, 5)]
    before = [layer.weight.detach().clone() for layer in layers]
    fused = side_by_side([layer.weight for layer in layers])
    assert torch.equal(fused, torch.cat(before))
    again = side_by_side([layer.weight for layer in layers])
    assert again.data_ptr() == fused.data_ptr()
    assert again.shape == fused.shape
    with torch.no_grad():
        layers[1].weight.zero_()
    assert not fused[3:7].any()


def test_a_network_that_is_built_otherwise_runs_unfused() -> None:
    models, _ = build()
    models.unet.down_blocks[0].resnets[0].output_scale_factor = 2.0
    assert not is_plain_network(models.unet)
    models.vae.decoder.mid_block.attentions = torch.nn.ModuleList([])
    assert not is_plain_vae(models.vae)


def test_the_decoder_of_the_vae_adds_every_bias_once() -> None:
    vae = build()[0].vae
    with torch.no_grad():
        for upsampler in (u for block in vae.decoder.up_blocks for u in block.upsamplers or ()):
            upsampler.conv.bias.fill_(3.0)  # large enough that a bias lost or doubled shows
        latents = torch.randn(2, 4, 16, 16)
        assert relative(decode_latents_fused(vae, latents), decode_latents(vae, latents)) <= LIMIT
