"""Every topology paints the stock pipeline's picture, for 0–3 ControlNets, 0–2 LoRAs, with and without guidance."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLControlNetPipeline, StableDiffusionXLPipeline
from PIL import Image

from engine.models import ModelSpec, SdxlModels, build_controlnet, build_models
from engine.registry.random_lora import seed_of, write_random_lora
from engine.registry.shapes import architecture
from engine.serving.job import ControlUse, Job, LoraUse
from engine.text import encode_prompt
from engine.workers.loader import Loader
from engine.workers.painter import LoadedLora
from engine.workers.prompts import Prompts
from engine.workers.sdxl_painter import SdxlPainter
from tests.engine.workers.rig import Attached, attached, cfg_pair, paint, paint_both, painter_of

SIZE_PX = 32
N_STEPS = 2
# The engine's promise is 1e-4 on pixels of 0..1. The final latents have a standard deviation of about 6 and the decoder maps them to
# pixels, so 1e-4 relative to the largest latent is the same promise where it is sharper: before the clamp.
LIMIT = 1e-4
NAMES = ("a", "b", "c")
SCALES = (0.7, 0.9, 0.5)
WINDOWS = ((0.0, 1.0), (0.3, 1.0), (0.0, 0.7))
LORAS = (("l1", 0.8), ("l2", -0.5))


def picture(seed: int, size_px: int = SIZE_PX) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size_px, size_px, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


PICTURES = tuple(picture(seed) for seed in range(3))


def job_of(n_controls: int = 0, n_loras: int = 0, guidance: float = 5.0, **changes: Any) -> Job:
    values: dict[str, Any] = {
        "request_id": "r",
        "prompt": "a red fox in the snow",
        "negative_prompt": "blurred",
        "n_steps": N_STEPS,
        "width_px": SIZE_PX,
        "height_px": SIZE_PX,
        "guidance_scale": guidance,
        "seed": 3,
        "controls": tuple(
            ControlUse(name, scale, *window, image=place)
            for place, (name, scale, window) in enumerate(zip(NAMES, SCALES, WINDOWS, strict=True))
        )[:n_controls],
        "loras": tuple(LoraUse(*lora) for lora in LORAS[:n_loras]),
        "blobs": PICTURES[:n_controls],
    }
    return Job(**{**values, **changes})


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The safetensors files of the LoRAs, for the stock pipeline."""
    folder = tmp_path_factory.mktemp("files")
    for name, _ in LORAS:
        write_random_lora(folder / f"{name}.safetensors", architecture("tiny"), None, seed_of(name))
    return {name: folder / f"{name}.safetensors" for name, _ in LORAS}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[LoadedLora, float]]:
    """The same LoRAs as a loader process leaves them in the host tier."""
    loader = Loader(tmp_path_factory.mktemp("tier"), "tiny", "F32")
    return [(LoadedLora(name, str(loader.fetch(name, {}))), scale) for name, scale in LORAS]


class Stock:
    """The stock pipelines on the weights that the ids stand for."""

    def __init__(self, files: dict[str, Path]) -> None:
        spec = ModelSpec.tiny()
        self.models: SdxlModels = build_models(spec, seed=seed_of("default"))
        self.nets = {name: build_controlnet(spec, seed=seed_of(name)) for name in NAMES}
        self.files = files
        self._known: dict[tuple[int, int, float], torch.Tensor] = {}

    def latents(self, n_controls: int, n_loras: int, guidance: float) -> torch.Tensor:
        key = (n_controls, n_loras, guidance)
        if key not in self._known:
            self._known[key] = self._run(job_of(n_controls, n_loras, guidance))
        return self._known[key]

    @torch.no_grad()
    def _run(self, job: Job) -> torch.Tensor:
        models, prompts = self.models, Prompts(ModelSpec.tiny(), None)
        prompt, negative = (
            encode_prompt(models, prompts.ids(text)) for text in (job.prompt, job.negative_prompt or "")
        )
        parts = (models.vae, models.text_encoder, models.text_encoder_2, None, None, models.unet)
        more: dict[str, Any] = {}
        pipe: Any
        if job.controls:
            nets = [self.nets[use.controlnet_id] for use in job.controls]
            pipe = StableDiffusionXLControlNetPipeline(*parts, nets, models.scheduler(), add_watermarker=False)
            pictures = [np.asarray(Image.open(io.BytesIO(blob))) for blob in job.blobs]
            more = {
                "image": [torch.from_numpy(rows.copy()).permute(2, 0, 1)[None].float() / 255 for rows in pictures],
                "controlnet_conditioning_scale": [use.scale for use in job.controls],
                "control_guidance_start": [use.start for use in job.controls],
                "control_guidance_end": [use.end for use in job.controls],
            }
        else:
            pipe = StableDiffusionXLPipeline(*parts, models.scheduler(), add_watermarker=False)
        pipe.set_progress_bar_config(disable=True)
        noise = torch.randn(
            (1, 4, SIZE_PX // 2, SIZE_PX // 2), generator=torch.Generator().manual_seed(job.seed), dtype=torch.float32
        )
        try:
            for use in job.loras:
                file = self.files[use.lora_id]
                pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=use.lora_id)
            if job.loras:
                pipe.set_adapters([use.lora_id for use in job.loras], [use.scale for use in job.loras])
            return pipe(  # type: ignore[no-any-return]
                prompt_embeds=prompt.context,
                pooled_prompt_embeds=prompt.pooled,
                negative_prompt_embeds=negative.context,
                negative_pooled_prompt_embeds=negative.pooled,
                num_inference_steps=job.n_steps,
                guidance_scale=job.guidance_scale,
                width=SIZE_PX,
                height=SIZE_PX,
                latents=noise,
                output_type="latent",
                **more,
            ).images
        finally:
            if job.loras:
                pipe.unload_lora_weights()


@pytest.fixture(scope="module")
def stock(files: dict[str, Path]) -> Stock:
    return Stock(files)


@pytest.fixture(scope="module")
def colocated() -> SdxlPainter:
    return painter_of()


@pytest.fixture(scope="module")
def decoupled() -> Iterator[Attached]:
    """One worker hosts two ControlNets, another the third."""
    with attached(painter_of(topology="decoupled"), NAMES[:2], NAMES[2:]) as rig:
        yield rig


@pytest.fixture(scope="module")
def ranks() -> Iterator[tuple[Sequence[SdxlPainter], list[dict[str, Any]]]]:
    """Both ranks of a pair, each attached to a ControlNet worker of its own."""
    pair = cfg_pair()
    with attached(pair[0], NAMES) as first, attached(pair[1], NAMES) as second:
        yield pair, [first.pairs, second.pairs]


def distance(ours: torch.Tensor, stock: torch.Tensor) -> float:
    return float((ours - stock).abs().max() / stock.abs().max())


CELLS = list(itertools.product(range(4), range(3)))


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize(("n_controls", "n_loras"), CELLS)
def test_colocated_is_the_stock_picture(
    stock: Stock, colocated: SdxlPainter, loaded: Any, n_controls: int, n_loras: int, guidance: float
) -> None:
    ours = paint(colocated, [job_of(n_controls, n_loras, guidance)], loras=loaded[:n_loras])
    theirs = stock.latents(n_controls, n_loras, guidance)
    assert distance(ours, theirs) <= LIMIT
    for fewer in ((n_controls - 1, n_loras), (n_controls, n_loras - 1)):
        if min(fewer) >= 0:
            # an add-on that changed nothing would prove nothing
            assert distance(stock.latents(*fewer, guidance), theirs) >= 50 * LIMIT


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize(("n_controls", "n_loras"), CELLS)
def test_decoupled_is_the_stock_picture(
    stock: Stock, decoupled: Attached, loaded: Any, n_controls: int, n_loras: int, guidance: float
) -> None:
    job = job_of(n_controls, n_loras, guidance)
    ours = paint(decoupled.painter, [job], decoupled.pairs, loaded[:n_loras])
    assert distance(ours, stock.latents(n_controls, n_loras, guidance)) <= LIMIT


@pytest.mark.parametrize(("n_controls", "n_loras"), CELLS)
def test_two_cfg_ranks_paint_the_stock_picture_and_agree_bit_by_bit(
    stock: Stock, ranks: Any, loaded: Any, n_controls: int, n_loras: int
) -> None:
    pair, pairs = ranks
    job = job_of(n_controls, n_loras)
    first, second = paint_both(pair, [job], pairs=pairs, loras=loaded[:n_loras])
    assert torch.equal(first, second)
    assert distance(first, stock.latents(n_controls, n_loras, 5.0)) <= LIMIT


def test_without_guidance_the_first_cfg_rank_works_alone(stock: Stock, ranks: Any, loaded: Any) -> None:
    pair, pairs = ranks
    job = job_of(1, 1, 1.0)
    assert distance(paint(pair[0], [job], pairs[0], loaded[:1]), stock.latents(1, 1, 1.0)) <= LIMIT
    pair[1].activate("default")
    assert pair[1].begin([job], pairs[1]) == N_STEPS
    for i in range(N_STEPS):
        pair[1].step(i)
    assert pair[1].finish(wants_images=True) == [[]]
    pair[1].restore()
