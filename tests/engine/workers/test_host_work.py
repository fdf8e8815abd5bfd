"""What the host does for a request beside launching kernels: nothing that grows with the number of layers of a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from engine.serving.job import Job
from tests.engine.workers.rig import painter_of


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the models whose modules or parameters somebody walks through."""
    names: list[str] = []

    def watch(method: str) -> None:
        real = getattr(nn.Module, method)

        def watched(self: nn.Module, *args: Any, **kwargs: Any) -> Iterator[Any]:
            if len(list(self.children())) > 3:  # a whole network, not a layer of one
                names.append(f"{type(self).__name__}.{method}")
            return real(self, *args, **kwargs)

        monkeypatch.setattr(nn.Module, method, watched)

    for method in ("named_modules", "named_parameters"):
        watch(method)
    return names


@torch.no_grad()
def test_a_request_walks_through_no_model(walked: list[str]) -> None:
    painter = painter_of()
    job = Job("r", prompt="a fox", negative_prompt="grey", n_steps=2, width_px=32, height_px=32)
    painter.activate("default")
    painter.begin([job], {})  # the first one builds what the shape needs
    painter.restore()
    for text in painter._checkpoints.worker("default")._texts.values():
        text._encode = lambda: None  # a captured graph on a GPU: no Python of the encoders runs
    del walked[:]
    painter.activate("default")
    painter.begin([job], {})
    painter.step(0)
    painter.step(1)
    painter.finish(wants_images=True)
    painter.restore()
    painter.resident()
    assert [name for name in walked if not name.startswith("AutoencoderKL")] == []
