"""What a ControlNet worker does, and does not do, for a request: one image embedding, no idle steps, one sum a step."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from engine import control_stack
from engine.links.tensor_line import HostTensorLine
from engine.serving.job import ControlUse, Job
from engine.workers.sdxl_controlnets import SdxlControlHost
from tests.engine.workers.rig import attached, paint, painter_of

N_STEPS = 4


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Image embeddings, steps asked for and bytes of residuals sent."""
    found: Counter[str] = Counter()
    embed, step, write = control_stack.embed_condition, SdxlControlHost.step, HostTensorLine.write

    def counted_embed(*arguments: Any) -> Any:
        found["embeddings"] += 1
        return embed(*arguments)

    def counted_step(host: SdxlControlHost, client: str, message: Any) -> None:
        found["steps"] += message.get("what") is None
        step(host, client, message)

    def counted_write(line: HostTensorLine, lane: str, at_bytes: int, tensor: Any) -> Any:
        found["residual bytes"] += tensor.numel() * tensor.itemsize if lane == "residuals" else 0
        return write(line, lane, at_bytes, tensor)

    monkeypatch.setattr(control_stack, "embed_condition", counted_embed)
    monkeypatch.setattr(SdxlControlHost, "step", counted_step)
    monkeypatch.setattr(HostTensorLine, "write", counted_write)
    return found


def job_of(*controls: ControlUse) -> Job:
    return Job("r", prompt="a fox", n_steps=N_STEPS, width_px=32, height_px=32, seed=3, controls=controls)


def test_what_is_constant_is_done_once_what_adds_nothing_never_and_sums_travel_once(counts: Counter[str]) -> None:
    painter = painter_of(options={"tensor_transport": "line"})
    with attached(painter, ["a", "b"]) as rig:

        def cost(*controls: ControlUse) -> tuple[int, int, int]:
            counts.clear()
            paint(painter, [job_of(*controls)], rig.pairs)
            return counts["embeddings"], counts["steps"], counts["residual bytes"]

        embeddings, steps, residual_bytes = cost(ControlUse("a", 0.7))
        assert (embeddings, steps) == (1, N_STEPS)
        # as many bytes as one ControlNet sends: they are summed where they are computed
        assert cost(ControlUse("a", 0.7), ControlUse("b", 0.9)) == (2, N_STEPS, residual_bytes)
        # active in the second half of the steps only
        assert cost(ControlUse("a", 0.7, 0.5, 1.0)) == (1, N_STEPS // 2, residual_bytes // 2)
        assert cost(ControlUse("a", 0.0), ControlUse("b", 0.9)) == (1, N_STEPS, residual_bytes)
        assert cost(ControlUse("a", 0.0)) == (0, 0, 0)
