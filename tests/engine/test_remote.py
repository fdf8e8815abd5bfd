"""ControlNets in a second process: the same bits as in one process, and every end is bounded."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from diffusers import ControlNetModel

from engine.base import BaseWorker
from engine.models import ModelSpec, SdxlModels
from engine.options import ControlInput, EngineOptions, ImageRequest, PromptEmbeddings
from engine.remote import LinkError, RemoteControlNets
from engine.workers.painter import PeerLostError
from traces.problems import InputError

SIZE_PX = 32
Prompts = tuple[PromptEmbeddings, PromptEmbeddings]


@pytest.fixture
def controls(controls: list[ControlInput]) -> list[ControlInput]:
    """Those of the session, smaller: what is tested here is not the arithmetic."""
    return [dataclasses.replace(control, image=control.image[..., :SIZE_PX, :SIZE_PX]) for control in controls]


@pytest.fixture
def remote() -> Iterator[RemoteControlNets]:
    """A worker with the seeds of the session's ControlNets; nothing waits longer than its limit."""
    client = RemoteControlNets.start(
        ModelSpec.tiny(), {"net-0": 1, "net-1": 2}, EngineOptions(), exchange_timeout_s=30, connect_timeout_s=120
    )
    yield client
    client.close()


def request_with(controls: list[ControlInput], prompts: Prompts, n_images: int = 1) -> ImageRequest:
    return ImageRequest(prompts[0], prompts[1], n_images, 4, SIZE_PX, SIZE_PX, 5.0, controls, seed=3)


def test_remote_controlnets_give_the_same_bits_as_local_ones(
    models: SdxlModels,
    controlnets: dict[str, ControlNetModel],
    prompts: Prompts,
    controls: list[ControlInput],
    remote: RemoteControlNets,
) -> None:
    local = BaseWorker(models, controlnets, EngineOptions())
    decoupled = BaseWorker(models, {}, EngineOptions(), remote)
    late = ControlInput("net-1", controls[1].image, 0.5, start=0.5)
    for used, n_images in ((controls[:1], 1), (controls, 2), ([late], 1), (list(reversed(controls)), 1)):
        here = local.generate(request_with(used, prompts, n_images))
        there = decoupled.generate(request_with(used, prompts, n_images))
        assert torch.equal(here.latents, there.latents)
        assert torch.equal(here.images, there.images)

    with pytest.raises(InputError, match="names 'net-9'"):
        decoupled.generate(request_with([ControlInput("net-9", controls[0].image)], prompts))

    # measurements take the same path
    bench = decoupled.prepare(1, SIZE_PX, SIZE_PX, 2)
    with pytest.raises(RuntimeError, match="begin"):
        bench.step()
    bench.begin(2)
    bench.step()
    bench.step()
    remote.exchange(1000)

    remote.close()
    assert remote._process.returncode == 0


def test_a_killed_worker_is_an_error_and_not_a_hang(
    models: SdxlModels, prompts: Prompts, controls: list[ControlInput], remote: RemoteControlNets
) -> None:
    worker = BaseWorker(models, {}, EngineOptions(), remote)
    worker.generate(request_with(controls[:1], prompts))
    remote._process.kill()
    remote._process.wait(10)
    with pytest.raises(PeerLostError, match="worker on cpu"):
        worker.generate(request_with(controls[:1], prompts))


def test_a_worker_that_cannot_start_is_reported() -> None:
    with pytest.raises(LinkError, match="did not come up"):
        RemoteControlNets.start(
            ModelSpec.tiny(), {"net": 1}, EngineOptions(), worker_device="cuda:99", connect_timeout_s=20
        )
