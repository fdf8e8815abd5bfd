"""The ControlNets of one process: static buffers per shape, parts per ControlNet and stage, residuals summed into one flat buffer.

Several jobs may be open at once (one a client): each keeps its own inputs, which are copied into the static buffers that the
captured graphs read when another job ran there before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol

import torch
from diffusers import ControlNetModel

from engine.controlnet import ResidualLayout, active_steps, add_scaled, embed_condition
from engine.graphs import Part
from engine.models import ModelSpec
from engine.options import ControlInput, EngineOptions, PromptEmbeddings
from engine.parts import NetworkParts
from engine.unet import embed, time_ids


@dataclass(frozen=True, slots=True)
class ShapeKey:
    """What a captured graph is valid for. A rank that runs one CFG half has ``uses_cfg`` False: its forward is as large."""

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
    """Whoever computes residuals: this process or another one. The calls of one step come in the order below."""

    @property
    def names(self) -> Sequence[str]:
        """The ControlNets it holds."""

    def prepare(self, key: ShapeKey, names: Sequence[str], latents_in: torch.Tensor, flat: torch.Tensor) -> None:
        """Compiles and captures for a shape. Steps will read ``latents_in`` and leave sums of residuals in ``flat``."""

    def begin(self, job: ControlJob) -> None:
        """Takes a request in. :meth:`prepare` has run for its key and names."""

    def start_step(self, step: int) -> None:
        """Scaled latents of this step are in ``latents_in``; what can run elsewhere may start."""

    def encoder_queued(self) -> None:
        """The base's encoder is in the device's queue: now the host may wait for small things."""

    def finish_step(self, step: int, *, adds: bool) -> bool:
        """Leaves this step's residuals in the flat buffer, in the order of the current stream.

        Args:
            step: as in :meth:`start_step`.
            adds: add to what is there; otherwise what is there is garbage.

        Returns:
            False if no ControlNet is active at this step: then the flat buffer is as it was.
        """

    def abandon(self) -> None:
        """Forgets the request, if there is one, also in the middle of a step. Never raises."""


def active_names(controls: Sequence[ControlInput], n_steps: int) -> list[list[str]]:
    """Which ControlNets run at each step, in the request's order. One with scale 0 never does: its residuals would be zeros."""
    used = [(item.name, active_steps(item.start, item.end, n_steps)) for item in controls if item.scale != 0.0]
    return [[name for name, steps in used if steps[step]] for step in range(n_steps)]


@dataclass(frozen=True, slots=True, eq=False)
class OpenJob:
    """A request's inputs on the device, made once."""

    key: ShapeKey
    context: torch.Tensor
    conditions: Mapping[str, torch.Tensor]
    """The embedded control image of each ControlNet, constant over the steps."""
    tables: Mapping[str, torch.Tensor]
    """Step embeddings, ``[n_steps, batch, D]``."""
    scales: Mapping[str, float]
    active: Sequence[Sequence[str]]
    """ControlNets of each step."""


@dataclass(slots=True)
class _Slot:
    """One ControlNet at one shape."""

    emb: torch.Tensor
    condition: torch.Tensor
    scale: torch.Tensor
    text: Any
    project_text: Part
    """Brings ``text`` up to date with the shape's context."""
    stages: list[Part] = field(default_factory=list)
    hidden: list[torch.Tensor] = field(default_factory=list)
    """What each stage hands to the next; static once captured."""
    loaded: OpenJob | None = None

    def run(self) -> None:
        for stage in self.stages:
            stage()


class _Shape:
    """Static buffers and parts of one shape."""

    def __init__(
        self, spec: ModelSpec, key: ShapeKey, options: EngineOptions, latents_in: torch.Tensor, flat: torch.Tensor
    ) -> None:
        self.latents_in = latents_in
        self.context = torch.zeros((key.batch, 77, spec.context_width), device=options.device, dtype=options.dtype)
        self.layout = ResidualLayout.of(spec, key.batch, key.height, key.width, is_channels_last=options.channels_last)
        self.flat = flat
        self.sums = self.layout.views(flat)
        self.slots: dict[str, _Slot] = {}
        self.loaded: OpenJob | None = None


class ControlStack:
    """ControlNets in this process. A :class:`ControlSource`, and with :meth:`open` and :meth:`run` one for several clients."""

    def __init__(
        self,
        spec: ModelSpec,
        nets: Mapping[str, ControlNetModel],
        options: EngineOptions,
        parts: NetworkParts,
    ) -> None:
        """``parts`` has admitted the ControlNets."""
        self._spec = spec
        self._nets = dict(nets)
        self._options = options
        self._parts = parts
        self._shapes: dict[ShapeKey, _Shape] = {}
        self._now: OpenJob | None = None

    @property
    def names(self) -> Sequence[str]:
        """The ControlNets held."""
        return list(self._nets)

    def net(self, name: str) -> ControlNetModel:
        """A ControlNet that is held."""
        return self._nets[name]

    def add(self, name: str, net: ControlNetModel) -> None:
        """Holds one more; the others and open jobs are not disturbed."""
        self._nets[name] = net

    def rename(self, old: str, new: str) -> ControlNetModel:
        """The net that was ``old`` is ``new`` from now on; the caller writes its weights in place, so that its graphs stay valid."""
        self._nets[new] = self._nets.pop(old)
        for shape in self._shapes.values():
            if old in shape.slots:
                shape.slots[new] = shape.slots.pop(old)
                shape.slots[new].loaded = None
        return self._nets[new]

    def drop(self, name: str) -> None:
        """Forgets a net and what was captured of it."""
        del self._nets[name]
        for shape in self._shapes.values():
            shape.slots.pop(name, None)

    def prepare(self, key: ShapeKey, names: Sequence[str], latents_in: torch.Tensor, flat: torch.Tensor) -> None:
        """See :class:`ControlSource`."""
        for _ in self.preparing(key, names, latents_in, flat):
            pass

    def preparing(
        self, key: ShapeKey, names: Sequence[str], latents_in: torch.Tensor, flat: torch.Tensor
    ) -> Iterator[None]:
        """:meth:`prepare` in pieces, one a stage of a ControlNet; other open jobs may run between them.

        A ControlNet that is renamed or dropped meanwhile is left out.
        """
        if key not in self._shapes:
            self._shapes[key] = _Shape(self._spec, key, self._options, latents_in, flat)
        shape = self._shapes[key]
        for name in names:
            net = self._nets.get(name)
            if net is None or name in shape.slots:
                continue
            slot = self._slot(shape, key, net)
            for part in self._stages(shape, key, net, slot):
                slot.stages.append(part)
                yield
            if self._nets.get(name) is net:
                shape.slots[name] = slot
            shape.loaded = None

    def is_prepared(self, key: ShapeKey, names: Sequence[str]) -> bool:
        """Whether :meth:`prepare` would have nothing to do."""
        return key in self._shapes and all(name in self._shapes[key].slots for name in names)

    def begin(self, job: ControlJob) -> None:
        """See :class:`ControlSource`."""
        self._now = self.open(job)

    def start_step(self, step: int) -> None:
        """Nothing: one stream computes everything in turn."""

    def encoder_queued(self) -> None:
        """Nothing to wait for."""

    def finish_step(self, step: int, *, adds: bool) -> bool:
        """See :class:`ControlSource`."""
        if self._now is None:
            raise RuntimeError("ControlStack.finish_step before begin")
        return self.run(self._now, step, adds=adds)

    def abandon(self) -> None:
        """See :class:`ControlSource`."""
        self._now = None

    def open(self, job: ControlJob) -> OpenJob:
        """Embeds a request's control images and steps. Nothing static is written, so other open jobs go on."""
        device, dtype, key = self._options.device, self._options.dtype, job.key
        sizes = time_ids(key.height, key.width, key.batch, device, dtype)
        conditions, tables, scales = {}, {}, {}
        with torch.no_grad():
            for control in job.controls:
                if control.scale == 0.0:
                    continue
                net = self._nets[control.name]
                conditions[control.name] = embed_condition(net, control.image.to(device, dtype), key.batch)
                tables[control.name] = embed(net, job.timesteps, job.text.pooled, sizes)
                scales[control.name] = control.scale
        context = job.text.context.clone()
        return OpenJob(key, context, conditions, tables, scales, active_names(job.controls, job.n_steps))

    def run(
        self, job: OpenJob, step: int, *, adds: bool = False, after_stage: Callable[[int, int], None] | None = None
    ) -> bool:
        """Runs one step of an open job into the shape's flat buffer.

        Args:
            job: from :meth:`open`.
            step: which one.
            adds: add to what the buffer holds; otherwise it is zeroed first.
            after_stage: called with the bounds (elements) of the part of the buffer that is complete, in stream order, as
                soon as the last active ControlNet has been asked for it.

        Returns:
            False, and nothing is written, if no ControlNet is active.
        """
        names = job.active[step]
        if not names:
            return False
        shape = self._shapes[job.key]
        if shape.loaded is not job:
            shape.context.copy_(job.context)
            shape.loaded = job
        if not adds:
            shape.flat.zero_()
        for name in names:
            slot = shape.slots[name]
            if slot.loaded is not job:
                slot.project_text()
                slot.condition.copy_(job.conditions[name])
                slot.scale.fill_(job.scales[name])
                slot.loaded = job
            slot.emb.copy_(job.tables[name][step])
            first = 0
            for stage, last in zip(slot.stages, shape.layout.stage_ends, strict=True):
                stage()
                if after_stage is not None and name == names[-1]:
                    after_stage(first, last)
                first = last
        return True

    def forget(self, job: OpenJob) -> None:
        """Lets a job's tensors go."""
        for shape in self._shapes.values():
            if shape.loaded is job:
                shape.loaded = None
            for slot in shape.slots.values():
                if slot.loaded is job:
                    slot.loaded = None

    def part(self, key: ShapeKey, name: str) -> Part:
        """All stages of one ControlNet, for measurements."""
        return self._shapes[key].slots[name].run

    def flat(self, key: ShapeKey) -> torch.Tensor:
        """The buffer of sums of a prepared shape."""
        return self._shapes[key].flat

    def latents_in(self, key: ShapeKey) -> torch.Tensor:
        """The input of a prepared shape."""
        return self._shapes[key].latents_in

    def fill_random(self, key: ShapeKey) -> None:
        """Puts finite random numbers into all inputs of a shape, for measurements and captures."""
        shape = self._shapes[key]
        shape.context.normal_()
        shape.loaded = None
        for slot in shape.slots.values():
            slot.emb.normal_()
            slot.condition.normal_()
            slot.loaded = None

    def _slot(self, shape: _Shape, key: ShapeKey, net: ControlNetModel) -> _Slot:
        device, dtype = self._options.device, self._options.dtype
        channels = self._spec.block_channels[0]
        _, _, h, w = key.latent_shape(self._spec)
        memory = torch.channels_last if self._options.channels_last else torch.contiguous_format
        text, project_text = self._parts.text(net, shape.context)
        return _Slot(
            emb=torch.zeros((key.batch, channels * 4), device=device, dtype=dtype),
            condition=torch.zeros((key.batch, channels, h, w), device=device, dtype=dtype).to(memory_format=memory),
            scale=torch.ones((), device=device, dtype=torch.float32),
            text=text,
            project_text=project_text,
        )

    def _stages(self, shape: _Shape, key: ShapeKey, net: ControlNetModel, slot: _Slot) -> Iterator[Part]:
        """Captures one stage after the other."""
        memory = torch.channels_last if self._options.channels_last else torch.contiguous_format
        ends = list(accumulate(shape.layout.stage_counts))
        slot.hidden = [torch.empty(0)] * len(ends)

        def stage(place: int) -> Callable[[], Any]:
            sums = shape.sums[ends[place - 1] if place else 0 : ends[place]]

            def run() -> torch.Tensor:
                if place == 0:
                    before = torch.cat([shape.latents_in] * 2) if key.uses_cfg else shape.latents_in
                    before = before.to(memory_format=memory)
                else:
                    before = slot.hidden[place - 1]
                hidden, residuals = self._parts.residual_stage(net, place, before, slot.emb, slot.text, slot.condition)
                add_scaled(sums, residuals, slot.scale)
                slot.hidden[place] = hidden
                return hidden

            return run

        for place in range(len(ends)):
            part = self._parts.recorder.record(stage(place))
            with torch.no_grad():
                part()  # so that the next stage is captured on finite numbers
            yield part
