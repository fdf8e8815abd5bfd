"""The ControlNets of one process: static buffers per shape, one part per ControlNet, residuals summed into one flat buffer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import ControlNetModel

from engine.controlnet import ResidualLayout, active_steps, add_scaled, embed_condition, residuals_of
from engine.graphs import Part, Recorder
from engine.models import ModelSpec
from engine.options import ControlInput, EngineOptions, PromptEmbeddings
from engine.unet import embed, time_ids


@dataclass(frozen=True, slots=True)
class ShapeKey:
    """What a captured graph is valid for."""

    n_images: int
    uses_cfg: bool
    height: int
    width: int

    @property
    def batch(self) -> int:
        """Forward batch."""
        return self.n_images * (2 if self.uses_cfg else 1)

    def latent_shape(self, spec: ModelSpec) -> tuple[int, int, int, int]:
        """``(n_images, 4, h, w)``."""
        return (self.n_images, 4, self.height // spec.vae_scale_factor, self.width // spec.vae_scale_factor)


@dataclass(frozen=True, slots=True)
class ControlJob:
    """What a request asks of ControlNets."""

    key: ShapeKey
    controls: Sequence[ControlInput]
    n_steps: int
    timesteps: torch.Tensor
    """``[n_steps]``, fp32."""
    text: PromptEmbeddings
    """One row per forward sample."""


class ControlSource(Protocol):
    """Whoever computes residuals: this process or another one."""

    @property
    def names(self) -> Sequence[str]:
        """The ControlNets it holds."""

    def prepare(self, key: ShapeKey, names: Sequence[str], latents_in: torch.Tensor) -> torch.Tensor:
        """Compiles and captures for a shape; returns the flat buffer in which sums of residuals will lie (zeros now)."""

    def begin(self, job: ControlJob) -> None:
        """Takes a request in. :meth:`prepare` has run for its key and names."""

    def start_step(self, step: int) -> None:
        """Scaled latents of this step are in ``latents_in``; what can run elsewhere may start."""

    def finish_step(self, step: int) -> None:
        """The flat buffer holds this step's residuals, in the order of the current stream."""


def active_names(controls: Sequence[ControlInput], n_steps: int) -> list[list[str]]:
    """Which ControlNets run at each step, in the request's order. One with scale 0 never does: its residuals would be zeros."""
    used = [(item.name, active_steps(item.start, item.end, n_steps)) for item in controls if item.scale != 0.0]
    return [[name for name, steps in used if steps[step]] for step in range(n_steps)]


class _Shape:
    """Static buffers and parts of one shape."""

    def __init__(self, spec: ModelSpec, key: ShapeKey, options: EngineOptions, latents_in: torch.Tensor) -> None:
        device, dtype = options.device, options.dtype
        self.latents_in = latents_in
        self.context = torch.zeros((key.batch, 77, spec.context_width), device=device, dtype=dtype)
        layout = ResidualLayout.of(spec, key.batch, key.height, key.width, is_channels_last=options.channels_last)
        self.flat = torch.zeros(layout.n_elements, device=device, dtype=dtype)
        self.sums = layout.views(self.flat)
        self.slots: dict[str, _Slot] = {}


@dataclass(slots=True)
class _Slot:
    """One ControlNet at one shape."""

    emb: torch.Tensor
    condition: torch.Tensor
    scale: torch.Tensor
    part: Part
    table: torch.Tensor | None = None


class ControlStack:
    """ControlNets in this process. A :class:`ControlSource`."""

    def __init__(
        self,
        spec: ModelSpec,
        nets: Mapping[str, ControlNetModel],
        options: EngineOptions,
        recorder: Recorder,
        forward: Any = residuals_of,
    ) -> None:
        """``forward`` is :func:`engine.controlnet.residuals_of` or its compiled form."""
        self._spec = spec
        self._nets = dict(nets)
        self._options = options
        self._recorder = recorder
        self._forward = forward
        self._shapes: dict[ShapeKey, _Shape] = {}
        self._now: tuple[_Shape, list[list[str]]] | None = None

    @property
    def names(self) -> Sequence[str]:
        """The ControlNets held."""
        return list(self._nets)

    def prepare(self, key: ShapeKey, names: Sequence[str], latents_in: torch.Tensor) -> torch.Tensor:
        """See :class:`ControlSource`."""
        if key not in self._shapes:
            self._shapes[key] = _Shape(self._spec, key, self._options, latents_in)
        shape = self._shapes[key]
        for name in names:
            if name not in shape.slots:
                shape.slots[name] = self._slot(shape, key, self._nets[name])
        return shape.flat

    def begin(self, job: ControlJob) -> None:
        """See :class:`ControlSource`."""
        shape = self._shapes[job.key]
        device, dtype = self._options.device, self._options.dtype
        shape.context.copy_(job.text.context)
        sizes = time_ids(job.key.height, job.key.width, job.key.batch, device, dtype)
        with torch.no_grad():
            for control in job.controls:
                if control.scale == 0.0:
                    continue
                net, slot = self._nets[control.name], shape.slots[control.name]
                slot.condition.copy_(embed_condition(net, control.image.to(device, dtype), job.key.batch))
                slot.table = embed(net, job.timesteps, job.text.pooled, sizes)
                slot.scale.fill_(control.scale)
        self._now = (shape, active_names(job.controls, job.n_steps))

    def start_step(self, step: int) -> None:
        """Nothing: one stream computes everything in turn."""

    def finish_step(self, step: int) -> None:
        """See :class:`ControlSource`."""
        if self._now is None:
            raise RuntimeError("ControlStack.finish_step before begin")
        shape, active = self._now
        shape.flat.zero_()
        for name in active[step]:
            slot = shape.slots[name]
            if slot.table is not None:
                slot.emb.copy_(slot.table[step])
            slot.part()

    def part(self, key: ShapeKey, name: str) -> Part:
        """The part of one ControlNet, for measurements."""
        return self._shapes[key].slots[name].part

    def fill_random(self, key: ShapeKey) -> None:
        """Puts finite random numbers into all inputs of a shape, for measurements and captures."""
        shape = self._shapes[key]
        shape.context.normal_()
        for slot in shape.slots.values():
            slot.emb.normal_()
            slot.condition.normal_()

    def _slot(self, shape: _Shape, key: ShapeKey, net: ControlNetModel) -> _Slot:
        device, dtype = self._options.device, self._options.dtype
        channels = self._spec.block_channels[0]
        _, _, h, w = key.latent_shape(self._spec)
        emb = torch.zeros((key.batch, channels * 4), device=device, dtype=dtype)
        memory = torch.channels_last if self._options.channels_last else torch.contiguous_format
        condition = torch.zeros((key.batch, channels, h, w), device=device, dtype=dtype).to(memory_format=memory)
        scale = torch.ones((), device=device, dtype=torch.float32)

        def run() -> None:
            sample = torch.cat([shape.latents_in] * 2) if key.uses_cfg else shape.latents_in
            sample = sample.to(memory_format=memory)
            add_scaled(shape.sums, self._forward(net, sample, emb, shape.context, condition), scale)

        return _Slot(emb, condition, scale, self._recorder.record(run))
