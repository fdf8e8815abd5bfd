"""What a painter promises beside the picture: patches at any step, batches, switches, refusals, and no trace of anything."""

from __future__ import annotations

import io
import os
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from engine.models import ModelSpec, build_controlnet, build_models
from engine.options import ImageRequest
from engine.pixels import to_file
from engine.registry.random_lora import seed_of
from engine.schedule import Schedule, euler_step, guide, scaled_input
from engine.serving.job import ControlUse, Job, LoraUse
from engine.text import batch_for_guidance
from engine.unet import decode, embed, encode, time_ids
from engine.workers.loader import Loader
from engine.workers.model_options import ModelOptions
from engine.workers.painter import JobError, LoadedLora, PeerLostError
from engine.workers.sdxl_painter import SdxlPainter
from tests.engine.workers.rig import attached, cfg_pair, line_pair, paint, paint_both, painter_of, serve
from traces.problems import InputError

SIZE_PX = 32
N_STEPS = 3


def job_of(**changes: Any) -> Job:
    values = {
        "request_id": "r",
        "prompt": "a fox",
        "n_steps": N_STEPS,
        "width_px": SIZE_PX,
        "height_px": SIZE_PX,
        "seed": 3,
    }
    return Job(**{**values, **changes})


@pytest.fixture(scope="module")
def painter() -> SdxlPainter:
    return painter_of(options={"n_checkpoints_max": 2, "n_controlnets_max": 2})


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[LoadedLora, float]]:
    loader = Loader(tmp_path_factory.mktemp("tier"), "tiny", "F32")
    return [(LoadedLora(name, str(loader.fetch(name, {}))), scale) for name, scale in (("l1", 0.8), ("l2", -0.5))]


def weights_of(painter: SdxlPainter) -> dict[str, torch.Tensor]:
    unet = painter._checkpoints.worker("default").models.unet
    return {name: weight.detach().clone() for name, weight in unet.named_parameters()}


@torch.no_grad()
def plain_loop(
    painter: SdxlPainter, job: Job, loras: Sequence[tuple[LoadedLora, float]], patch_step: int
) -> torch.Tensor:
    """Denoising in so many words, on a copy of the weights that is switched before ``patch_step``."""
    models = build_models(ModelSpec.tiny(), seed=seed_of(job.base_model_id))
    worker = painter._checkpoints.worker("default")
    request: ImageRequest = painter._request([job], worker)
    text = batch_for_guidance(request.prompt, request.negative, job.n_images, uses_cfg=True)  # type: ignore[arg-type]
    schedule = Schedule.of(models.scheduler(), job.n_steps, job.guidance_scale, "cpu")
    table = embed(
        models.unet, schedule.timesteps, text.pooled, time_ids(SIZE_PX, SIZE_PX, 2 * job.n_images, "cpu", torch.float32)
    )
    assert request.latents is not None
    latents = request.latents * schedule.initial_sigma
    for i in range(job.n_steps):
        if i == patch_step:
            for name, weight in models.unet.named_parameters():
                delta = torch.zeros_like(weight)
                for loaded, scale in loras:
                    lora = painter._loras.get(loaded)
                    for layer in lora.layers:
                        if f"{layer.name}.weight" == name:
                            delta += scale * layer.factor * layer.up(lora.flat) @ layer.down(lora.flat)
                weight += delta
        scalars = schedule.scalars[i]
        sample = torch.cat([scaled_input(latents, scalars)] * 2)
        prediction = decode(models.unet, *encode(models.unet, sample, table[i], text.context), table[i], text.context)
        latents = euler_step(latents, guide(prediction, scalars), scalars)
    return latents


@pytest.mark.parametrize("patch_step", range(N_STEPS))
def test_a_patch_before_step_s_equals_a_plain_loop_that_switches_weights_at_s(
    painter: SdxlPainter, loras: Any, patch_step: int
) -> None:
    job = job_of(loras=(LoraUse("l1", 0.8), LoraUse("l2", -0.5)))
    before = weights_of(painter)
    ours = paint(painter, [job], loras=loras, patch_step=patch_step)
    expected = plain_loop(painter, job, loras, patch_step)
    # the same fp32 sums in another order (W + (d1 + d2) here, (W + d1) + d2 there): some 1e-7 a weight, amplified by three steps
    assert float((ours - expected).abs().max()) <= 1e-4
    unpatched = paint(painter, [job])
    assert float((ours - unpatched).abs().max()) >= 1e-2
    after = weights_of(painter)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_both_cfg_ranks_patch_before_the_same_step_and_restore(painter: SdxlPainter, loras: Any) -> None:
    ranks = cfg_pair()
    job = job_of(loras=(LoraUse("l1", 0.8),))
    before = [weights_of(rank) for rank in ranks]
    first, second = paint_both(ranks, [job], loras=loras[:1], patch_step=2)
    assert torch.equal(first, second)
    # halves of a batch are computed alone: matrix products of another size sum in another order
    assert float((first - paint(painter, [job], loras=loras[:1], patch_step=2)).abs().max()) <= 1e-3
    for rank, weights in zip(ranks, before, strict=True):
        after = weights_of(rank)
        assert all(torch.equal(after[name], weight) for name, weight in weights.items())


def test_remote_controlnets_give_the_same_bits_and_jobs_leave_nothing_behind(painter: SdxlPainter) -> None:
    uses = (ControlUse("a", 0.7), ControlUse("b", 0.9, 0.2, 0.8))
    jobs = [
        job_of(controls=uses),
        job_of(controls=uses[:1], n_images=2),
        job_of(controls=(ControlUse("b", 0.0),)),
        job_of(),
    ]
    with attached(painter, ["a", "b"]) as rig:
        for job in [*jobs, jobs[0]]:
            assert torch.equal(paint(painter, [job]), paint(painter, [job], rig.pairs))
        # given up after two steps, and in the middle of one
        painter.begin([jobs[0]], rig.pairs)
        painter.step(0)
        painter.step(1)
        painter.restore()
        painter.begin([jobs[0]], rig.pairs)
        painter._active()._running().sources[0].start_step(0)
        painter.restore()
        assert torch.equal(paint(painter, [jobs[1]]), paint(painter, [jobs[1]], rig.pairs))


@pytest.mark.parametrize("transport", ["gloo", "line"])
def test_every_transport_gives_the_same_bits(painter: SdxlPainter, transport: str) -> None:
    other = painter_of(options={"tensor_transport": transport})
    job = job_of(controls=(ControlUse("a", 0.7), ControlUse("b", 0.9)))
    expected = paint(painter, [job])
    with attached(other, ["a", "b"]) as rig:
        assert rig.pairs["a"].transport == {"line": "host_memory"}.get(transport, transport)
        assert torch.equal(paint(other, [job], rig.pairs), expected)
        # a refused job leaves nothing on the line
        unknown = job_of(controls=(ControlUse("a", 0.7), ControlUse("x" * 3, 0.5)))
        rig.hosts[0]._sources.admit("xxx", {"file": "seed:1"})
        rig.hosts[0]._sources._sources["xxx"] = {"file": "gone.safetensors"}
        with pytest.raises(JobError, match=r"gone\.safetensors"):
            paint(other, [unknown], {**rig.pairs, "xxx": rig.pairs["a"]})
        assert torch.equal(paint(other, [job], rig.pairs), expected)


def test_eight_bit_residuals_stay_within_their_stated_error(painter: SdxlPainter) -> None:
    rough = painter_of(options={"fp8_residuals": True})
    job = job_of(controls=(ControlUse("a", 0.7),), n_steps=1)
    exact, without = paint(painter, [job]), paint(painter, [job_of(n_steps=1)])
    with attached(rough, ["a"]) as rig:
        found = paint(rough, [job], rig.pairs)
    # every residual is off by at most 1/16 of itself; one step is close to linear in them
    moved = float((exact - without).norm())
    assert 0 < float((found - exact).norm()) <= moved / 16


def test_two_clients_of_one_controlnet_worker_do_not_mix(painter: SdxlPainter) -> None:
    second = painter_of()
    jobs = [
        job_of(controls=(ControlUse("a", 0.7),)),
        job_of(controls=(ControlUse("a", 0.4, 0.0, 0.6),), seed=8, prompt="x"),
    ]
    expected = [paint(painter, [job]) for job in jobs]
    with attached(painter, ["a"]) as rig:
        base_end, host_end = line_pair("pair-second")
        thread = threading.Thread(target=serve, args=(rig.hosts[0], host_end), daemon=True)
        thread.start()
        second.open(base_end)
        try:
            for one, job, pairs in ((painter, jobs[0], rig.pairs), (second, jobs[1], {"a": base_end})):
                one.activate("default")
                one.begin([job], pairs)
            for i in range(N_STEPS):  # in turn, step by step
                painter.step(i)
                second.step(i)
            assert torch.equal(painter.latents(), expected[0])
            assert torch.equal(second.latents(), expected[1])
        finally:
            painter.restore()
            second.restore()
            second.close("pair-second")
            base_end.close()
            host_end.close()
            thread.join(10)


def test_jobs_of_a_batch_get_the_pictures_they_get_alone(painter: SdxlPainter, loras: Any) -> None:
    uses = (ControlUse("a", 0.7, image=0),)
    more = {"controls": uses, "loras": (LoraUse("l1", 0.8),)}
    jobs = [
        job_of(request_id="1", blobs=(png(1),), **more),
        job_of(request_id="2", blobs=(png(2),), prompt="another", negative_prompt="blur", seed=9, n_images=2, **more),
    ]
    together = paint(painter, jobs, loras=loras[:1])
    alone = torch.cat([paint(painter, [job], loras=loras[:1]) for job in jobs])
    # a larger batch sums matrix products in another order: 1e-6 of latents of about 20, amplified by three guided steps
    assert float((together - alone).abs().max()) <= 1e-3
    painter.activate("default")
    painter.begin(jobs, {})
    files = painter.finish(wants_images=True)
    painter.restore()
    assert [len(of_job) for of_job in files] == [1, 2]
    assert Image.open(io.BytesIO(to_file(files[1][0]))).size == (SIZE_PX, SIZE_PX)


def test_checkpoints_and_controlnets_take_each_others_place_and_come_back_the_same() -> None:
    painter = painter_of(options={"n_checkpoints_max": 1, "n_controlnets_max": 1})
    job, other = job_of(controls=(ControlUse("a"),)), job_of(base_model_id="other", controls=(ControlUse("b"),))
    assert not painter.activate("default")
    first, second = paint(painter, [job]), paint(painter, [other])
    size = f"{SIZE_PX}x{SIZE_PX}:1"
    assert painter.resident() == {"base_model_ids": ["other"], "controlnet_ids": ["b"], "shapes": [size]}
    assert not torch.equal(first, second)
    assert painter.activate("default")
    assert torch.equal(paint(painter, [job]), first)
    assert painter.n_controlnet_misses == 1
    assert torch.equal(paint(painter, [other]), second)
    with pytest.raises(JobError, match="at most 1"):
        paint(painter, [job_of(controls=(ControlUse("a"), ControlUse("b")))])


def test_a_checkpoint_that_is_not_there_fails_its_job_and_the_others_go_on(
    painter: SdxlPainter, tmp_path: Path
) -> None:
    found = paint(painter, [job_of()])
    with pytest.raises(JobError, match="no store"):
        painter.admit("base", "lost", {"file": "lost"})
    painter.admit("base", "lost", {"file": "seed:4"})
    assert paint(painter, [job_of(base_model_id="lost")]).shape == found.shape
    assert torch.equal(paint(painter, [job_of()]), found)
    with pytest.raises(JobError, match="cannot admit a lora"):
        painter.admit("lora", "x", {})


def test_controlnets_come_from_the_store_as_folder_or_file_and_from_nowhere_else(
    painter: SdxlPainter, tmp_path: Path
) -> None:
    net = build_controlnet(ModelSpec.tiny(), seed=seed_of("a"))
    store = tmp_path / "store"
    net.save_pretrained(store / "folder")
    (tmp_path / "outside").mkdir()
    (store / "broken.safetensors").write_bytes(b"\0" * 100)
    files = {
        "x": "folder",
        "y": "folder/diffusion_pytorch_model.safetensors",
        "z": "../outside",
        "w": "broken.safetensors",
    }
    stored = painter_of(
        sources={name: {"file": file} for name, file in files.items()},
        store=str(store),
        options={"n_controlnets_max": 1},
    )
    expected = paint(painter, [job_of(controls=(ControlUse("a"),))])
    for name in ("x", "y", "x"):  # the first into free memory, the others into the place of the one before
        assert torch.equal(paint(stored, [job_of(controls=(ControlUse(name),))]), expected)
    for name, said in (("z", "not in the store"), ("w", "cannot be loaded")):
        with pytest.raises(JobError, match=said):
            paint(stored, [job_of(controls=(ControlUse(name),))])
        assert torch.equal(paint(stored, [job_of(controls=(ControlUse("y"),))]), expected)


def png(seed: int, size: tuple[int, int] = (SIZE_PX, SIZE_PX), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize(
    ("blob", "said"),
    [
        (b"", "no readable"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "no readable"),
        (png(1)[:200], "no readable"),
        (png(1, (16, 32)), "16x32 pixels, the request is for 32x32"),
        (png(1, (2000, 2000)), "2000x2000 pixels, at most 1000000"),
        (png(1, kind="GIF"), "no readable"),
        (png(1, kind="TIFF"), "no readable"),
    ],
)
def test_a_wrong_control_image_fails_only_its_job_with_a_sentence(blob: bytes, said: str) -> None:
    painter = painter_of(options={"control_image_pixels_max": 1_000_000})
    good, bad = job_of(request_id="good"), job_of(request_id="bad", controls=(ControlUse("a", image=0),), blobs=(blob,))
    painter.activate("default")
    with pytest.raises(JobError, match=said) as refused:
        painter.begin([bad], {})
    painter.restore()
    assert refused.value.request_id == "bad"
    paint(painter, [good])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_usual_control_images_are_read(painter: SdxlPainter, kind: str) -> None:
    job = job_of(n_steps=1, controls=(ControlUse("a", image=0),), blobs=(png(1, kind=kind),))
    assert bool(torch.isfinite(paint(painter, [job])).all())


def test_a_lora_that_does_not_fit_is_named(painter: SdxlPainter, tmp_path: Path) -> None:
    loader = Loader(tmp_path, "tiny", "BF16")
    wrong = LoadedLora("l1", str(loader.fetch("l1", {})))
    for loaded, said in ((wrong, "bfloat16"), (LoadedLora("l9", str(tmp_path / "none")), "'l9'")):
        with pytest.raises(JobError, match=said):
            paint(painter, [job_of(loras=(LoraUse(loaded.lora_id),))], loras=[(loaded, 1.0)])
    assert torch.equal(paint(painter, [job_of()]), paint(painter_of(), [job_of()]))


def test_a_controlnet_worker_that_goes_is_a_lost_peer_and_the_painter_goes_on(painter: SdxlPainter) -> None:
    job = job_of(controls=(ControlUse("a"),))
    with attached(painter, ["a"]) as rig:
        painter.activate("default")
        painter.begin([job], rig.pairs)
        painter.step(0)
        with socket.socket(fileno=os.dup(rig.pairs["a"].fileno())) as line:
            line.shutdown(socket.SHUT_RDWR)  # what a kill of the other process does to it
        with pytest.raises(PeerLostError, match="the line to controlnets has ended") as lost:
            painter.step(1)
        painter.restore()
        assert lost.value.pair_id == "pair-0"  # type: ignore[attr-defined]
    paint(painter, [job])


def test_wrong_options_are_named() -> None:
    with pytest.raises(InputError) as refused:
        ModelOptions.from_plain({"dtyp": "x", "n_checkpoints_max": 0, "fp8_residuals": 1, "loader_rank_max": 4})
    text = str(refused.value)
    assert all(part in text for part in ("options.dtyp", "n_checkpoints_max: got 0", "fp8_residuals: got 1"))
    assert "loader" not in text
    with pytest.raises(InputError, match="tensor_transport"):
        ModelOptions.from_plain({"tensor_transport": "pigeon"})
