"""One tiny checkpoint for all engine tests, fp32 on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from diffusers import ControlNetModel

from engine.models import ModelSpec, SdxlModels, build_controlnet, build_models
from engine.options import ControlInput, PromptEmbeddings

SIZE_PX = 64


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """The tiny model gains nothing from more, and test workers share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def models() -> SdxlModels:
    return build_models(ModelSpec.tiny(), seed=0)


@pytest.fixture(scope="session")
def controlnets() -> dict[str, ControlNetModel]:
    return {f"net-{i}": build_controlnet(ModelSpec.tiny(), seed=i + 1) for i in range(2)}


@pytest.fixture(scope="session")
def prompts() -> tuple[PromptEmbeddings, PromptEmbeddings]:
    """A prompt and a negative prompt."""
    generator = torch.Generator().manual_seed(5)
    first, second = (
        PromptEmbeddings(torch.randn((1, 77, 64), generator=generator), torch.randn((1, 32), generator=generator))
        for _ in range(2)
    )
    return first, second


@pytest.fixture(scope="session")
def controls() -> list[ControlInput]:
    """Uses of both ControlNets; the second one only in the middle of the steps."""
    generator = torch.Generator().manual_seed(6)
    images = [torch.rand((1, 3, SIZE_PX, SIZE_PX), generator=generator) for _ in range(2)]
    return [ControlInput("net-0", images[0], 0.7), ControlInput("net-1", images[1], 0.9, start=0.2, end=0.8)]
