"""The base worker's contract beside equality: requests are checked, residuals lie where they should, failures leave no trace."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel

from engine.base import BaseWorker
from engine.controlnet import ResidualLayout, active_steps
from engine.lora import pin_lora
from engine.models import ModelSpec, SdxlModels, build_controlnet, build_models, write_random_lora
from engine.options import ControlInput, EngineOptions, ImageRequest, PromptEmbeddings
from engine.schedule import Schedule, euler_step, scaled_input
from engine.unet import encode
from traces.problems import InputError

Prompts = tuple[PromptEmbeddings, PromptEmbeddings]


def test_the_same_seed_builds_the_same_weights_and_another_seed_others(models: SdxlModels) -> None:
    again, other = build_models(ModelSpec.tiny(), seed=0), build_models(ModelSpec.tiny(), seed=1)
    for one, same, different in zip(models.modules, again.modules, other.modules, strict=True):
        for weight, twin, stranger in zip(one.parameters(), same.parameters(), different.parameters(), strict=True):
            assert torch.equal(weight, twin)
            assert not torch.equal(weight, stranger)


def test_building_models_leaves_the_callers_random_numbers_alone() -> None:
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    build_controlnet(ModelSpec.tiny(), seed=9)
    assert torch.equal(torch.rand(3), expected)


def test_no_zero_convolution_is_zero(controlnets: dict[str, ControlNetModel]) -> None:
    net = controlnets["net-0"]
    assert all(bool((conv.weight != 0).any()) for conv in (*net.controlnet_down_blocks, net.controlnet_mid_block))


def test_sdxl_has_its_published_sizes() -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel

    spec = ModelSpec.sdxl()
    with torch.device("meta"):
        unet = UNet2DConditionModel(**spec.unet_config())
        vae = AutoencoderKL(**spec.vae_config())
        net = ControlNetModel(**spec.controlnet_config())
    counts = [sum(weight.numel() for weight in module.parameters()) for module in (unet, vae, net)]
    assert counts == [2_567_463_684, 83_653_863, 1_251_014_160]
    # 107.5 MB of residuals a step at batch 2 in bf16
    layout = ResidualLayout.of(spec, 2, 1024, 1024, is_channels_last=False)
    assert layout.n_elements * 2 == pytest.approx(107.5e6, rel=0.01)


@pytest.mark.parametrize("is_channels_last", [False, True])
def test_the_residual_layout_tiles_its_buffer_with_the_unets_shapes(models: SdxlModels, is_channels_last: bool) -> None:
    layout = ResidualLayout.of(models.spec, 2, 64, 64, is_channels_last=is_channels_last)
    flat = torch.zeros(layout.n_elements)
    views = layout.views(flat)
    for view in views:
        view += 1
    assert bool((flat == 1).all())
    with torch.no_grad():
        hidden, skips = encode(
            models.unet, torch.zeros(2, 4, 32, 32), torch.zeros(2, 128), torch.zeros(2, 77, models.spec.context_width)
        )
    assert [tuple(view.shape) for view in views] == [tuple(tensor.shape) for tensor in (*skips, hidden)]
    if is_channels_last:
        assert all(view.is_contiguous(memory_format=torch.channels_last) for view in views)


@pytest.mark.parametrize("n_steps", [1, 4, 30])
def test_the_schedule_is_the_stock_schedulers_to_the_last_bit(models: SdxlModels, n_steps: int) -> None:
    stock = models.scheduler()
    stock.set_timesteps(n_steps)
    schedule = Schedule.of(models.scheduler(), n_steps, 5.0, "cpu")
    assert torch.equal(schedule.timesteps, stock.timesteps)
    generator = torch.Generator().manual_seed(0)
    ours = theirs = torch.randn((1, 4, 8, 8), generator=generator) * stock.init_noise_sigma
    for i, timestep in enumerate(stock.timesteps):
        prediction = torch.randn((1, 4, 8, 8), generator=generator)
        assert torch.equal(scaled_input(ours, schedule.scalars[i]), stock.scale_model_input(theirs, timestep))
        ours = euler_step(ours, prediction, schedule.scalars[i])
        theirs = stock.step(prediction, timestep, theirs, return_dict=False)[0]
        assert torch.equal(ours, theirs)


def test_a_controlnet_is_active_between_start_and_end() -> None:
    assert active_steps(0.0, 1.0, 3) == [True, True, True]
    assert active_steps(0.5, 1.0, 4) == [False, False, True, True]
    assert active_steps(0.0, 0.5, 4) == [True, True, False, False]
    assert active_steps(0.4, 0.6, 2) == [False, False]


def test_every_problem_of_a_request_is_named_at_once(
    models: SdxlModels, controlnets: dict[str, ControlNetModel], prompts: Prompts
) -> None:
    worker = BaseWorker(models, controlnets, EngineOptions())
    request = ImageRequest(
        prompts[0],
        n_images=0,
        width=63,
        height=64,
        controls=[ControlInput("nobody", torch.zeros(1, 3, 8, 8), start=0.9, end=0.1)],
        latents=torch.zeros(1, 4, 1, 1),
    )
    with pytest.raises(InputError) as refused:
        worker.generate(request)
    text = str(refused.value)
    for part in ("width: got 63", "n_images: got 0", "'nobody'", "start 0.9", "image has shape", "latents"):
        assert part in text


def test_a_request_that_fails_midway_leaves_pristine_weights(
    models: SdxlModels, prompts: Prompts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_random_lora(tmp_path / "lora.safetensors", models.unet, rank=4)
    lora = pin_lora(tmp_path / "lora.safetensors", models.unet)
    before = {name: weight.detach().clone() for name, weight in models.unet.named_parameters()}
    worker = BaseWorker(models, {}, EngineOptions())

    def fails(*_: object) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(worker, "step", fails)
    with pytest.raises(RuntimeError, match="the device is gone"):
        worker.generate(ImageRequest(prompts[0], n_steps=2, width=64, height=64, loras=[(lora, 1.0)]))
    assert all(torch.equal(weight, before[name]) for name, weight in models.unet.named_parameters())


def test_models_of_another_type_than_the_options_are_refused(models: SdxlModels) -> None:
    with pytest.raises(ValueError, match=r"the options say torch\.bfloat16"):
        BaseWorker(models, {}, EngineOptions(dtype=torch.bfloat16))


def test_bf16_images_are_finite_and_close_to_fp32(models: SdxlModels, prompts: Prompts) -> None:
    rough = build_models(ModelSpec.tiny(), dtype=torch.bfloat16, seed=0)
    request = ImageRequest(prompts[0], prompts[1], n_steps=3, width=32, height=32)
    image = BaseWorker(rough, {}, EngineOptions(dtype=torch.bfloat16)).generate(request).images.float()
    exact = BaseWorker(models, {}, EngineOptions()).generate(request).images
    # bf16 rounds at 4e-3; three guided steps (factor 5) and some 60 layers amplify it, a wrong layer would give 1
    assert float((image - exact).norm() / exact.norm()) <= 0.15


def test_the_parts_for_measurements_run_what_a_step_runs(
    models: SdxlModels, controlnets: dict[str, ControlNetModel]
) -> None:
    worker = BaseWorker(models, controlnets, EngineOptions())
    bench = worker.prepare(1, 64, 64, 2)
    for part in (
        bench.step,
        bench.encoder,
        bench.decoder,
        lambda: bench.controlnet(1),
        lambda: bench.vae(2),
        bench.text,
    ):
        part()
    assert bool(torch.isfinite(bench._program.latents).all())
    with pytest.raises(InputError, match="at most 2"):
        worker.prepare(1, 64, 64, 3)


def test_the_bench_command_prints_stages_and_writes_the_image(tmp_path: Path) -> None:
    image = tmp_path / "image.png"
    command = [sys.executable, "-m", "engine", "bench", "--steps", "2", "--repetitions", "1", "--json"]
    command += ["--controlnets", "1", "--loras", "1", "--lora-rank", "4", "--image", str(image)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result["stages"]) == {"text_s", "lora_s", "denoise_s", "decode_s", "lora_restore_s", "total_s"}
    assert all(row["median_s"] > 0 for row in result["stages"].values())
    assert image.read_bytes().startswith(b"\x89PNG")


def test_the_bench_command_refuses_a_device_that_is_not_there() -> None:
    command = [sys.executable, "-m", "engine", "bench", "--device", "cuda:77"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "got 'cuda:77'" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_engine_runs_without_the_planners_packages() -> None:
    code = (
        "import sys\n"
        "for name in ('pydantic', 'simpy', 'streamlit'): sys.modules[name] = None\n"
        "import engine.cli, engine.allocation\n"
        "assert 'torch' not in sys.modules\n"
        "import engine.base, engine.bench, engine.controlnet_worker\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
