"""ControlNets of our engine away from its base: one alone, and as a process on a second GPU with steps that join the two."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from calibrate.clock import DeviceClock
from calibrate.measurement import Features
from calibrate.ours import EngineRig, options_of
from calibrate.rig import RigSetup, Timed
from engine.base import BaseWorker
from engine.control_stack import ControlStack, ShapeKey
from engine.controlnet import ResidualLayout
from engine.models import ModelSpec, build_controlnet
from engine.parts import NetworkParts
from engine.remote import RemoteControlNets


class ControlNetRig:
    """One ControlNet as a ControlNet worker runs it, for forward batches whose whole step would compile too long."""

    def __init__(self, setup: RigSetup) -> None:
        self.clock = DeviceClock(setup.device)
        self.setup = setup
        options = options_of(setup)
        self.mode = "compiled" if options.compile else "graph" if options.uses_graphs else "eager"
        spec = ModelSpec.named(setup.model)
        net = build_controlnet(spec, setup.device, options.dtype, setup.seed + 1)
        parts = NetworkParts(options, (net,))
        self._stack = ControlStack(spec, {"controlnet0": net}, options, parts)
        self._keys = {}
        for batch in setup.forward_batches:
            key = ShapeKey(batch // 2, True, setup.height_px, setup.width_px)
            latents = torch.randn(key.latent_shape(spec), device=setup.device, dtype=options.dtype)
            with torch.no_grad():
                layout = ResidualLayout.of(
                    spec, key.batch, key.height, key.width, is_channels_last=options.channels_last
                )
                flat = torch.zeros(layout.n_elements, device=setup.device, dtype=options.dtype)
                self._stack.prepare(key, ["controlnet0"], latents, flat)
                self._stack.fill_random(key)
            self._keys[batch] = key

    def run(self, method: str, features: Features, n_repeats: int) -> list[Timed]:
        """Only ``steps``: the ControlNet's part of one."""
        if method != "steps":
            raise ValueError(f"a ControlNet station times only 'steps', asked for {method!r}")
        part = self._stack.part(self._keys[features.forward_batch], "controlnet0")
        plain = dataclasses.replace(features, n_controlnets=0)
        with torch.no_grad():
            return [Timed("engine.controlnet_step", self.mode, plain, tuple(self.clock.burst(part, n_repeats)))]

    def facts(self) -> dict[str, float]:
        """None of its own."""
        return {}

    def close(self) -> None:
        """Nothing that outlives the process."""


class RemoteRig(EngineRig):
    """A base worker on the first GPU whose ControlNets run in a process on the second one (on a CPU: both there)."""

    def _build_controlnets(self) -> dict[str, Any]:
        return {}

    def _build_worker(self) -> BaseWorker:
        worker_device = "cuda:1" if self.options.is_cuda else "cpu"
        self.remote = RemoteControlNets.start(
            self.spec,
            {name: self.setup.seed + 1 + i for i, name in enumerate(self.names)},
            self.options,
            worker_device=worker_device,
        )
        return BaseWorker(self.models, {}, self.options, self.remote)

    def _time_remote_step(self, features: Features, n_repeats: int) -> list[Timed]:
        """Whole steps whose residuals come from the other process, back to back as in a request."""
        bench = self._bench(features, features.n_controlnets)
        n_warm = 4
        bench.begin(n_warm + n_repeats)
        return [self._timed("remote_step", features, self.clock.burst(bench.step, n_repeats, n_warm))]

    def _time_transfer(self, features: Features, n_repeats: int) -> list[Timed]:
        """A buffer from the ControlNet worker to here, asked for by a message whose way is in the time."""
        n_elements = max(1, features.n_bytes // self.options.dtype.itemsize)
        for _ in range(2):
            self.remote.exchange(n_elements)
        values = [self.clock.wall(lambda: self.remote.exchange(n_elements)) for _ in range(n_repeats)]
        return [self._timed("residual_exchange", features, values)]

    def close(self) -> None:
        """Ends the ControlNet worker and frees the models."""
        self.remote.close()
        super().close()
