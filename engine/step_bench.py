"""The parts of a step, one by one, for measurements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from engine.control_stack import ControlJob, ControlSource, ControlStack, ShapeKey
from engine.options import ControlInput, PromptEmbeddings
from engine.program import VaeProgram
from engine.text import random_prompt

if TYPE_CHECKING:
    from engine.base import BaseWorker


class StepBench:
    """The parts that :meth:`BaseWorker.generate` runs, one by one, on random numbers. Nothing here synchronises or times.

    With remote ControlNets a step is an exchange: call :meth:`begin` with the number of steps that follow, then
    :meth:`step` exactly that often.
    """

    def __init__(
        self,
        worker: BaseWorker,
        key: ShapeKey,
        source: ControlSource | None,
        names: Sequence[str],
        vae: VaeProgram,
    ) -> None:
        self._worker = worker
        self._key = key
        self._source = source
        self._names = tuple(names)
        self._vae = vae
        self._program = worker.program(key)
        self._prompt = random_prompt(worker.models.spec, 1)
        self._negative = random_prompt(worker.models.spec, 2)
        self._is_remote = source is not None and not isinstance(source, ControlStack)
        self._remaining = 0
        self._fill()
        if source is not None and not self._is_remote:
            self.begin(1)

    def begin(self, n_steps: int) -> None:
        """Announces this many steps to the ControlNets, as a request of that length would."""
        if self._source is None:
            return
        if self._remaining:
            raise RuntimeError(f"StepBench.begin: {self._remaining} announced steps have not run")
        spec, options = self._worker.models.spec, self._worker.options
        image = torch.rand((1, 3, self._key.height, self._key.width), dtype=torch.float32)
        text = PromptEmbeddings(
            torch.randn_like(self._program.context),
            torch.randn((self._key.batch, spec.pooled_width), device=options.device, dtype=options.dtype),
        )
        timesteps = torch.full((n_steps,), 500.0, device=options.device)
        controls = [ControlInput(name, image, 0.8) for name in self._names]
        with torch.no_grad():
            self._source.begin(ControlJob(self._key, controls, n_steps, timesteps, text))
        self._remaining = n_steps if self._is_remote else 0
        self._n_steps = n_steps

    def step(self) -> None:
        """One whole step: scaled input, encoder, ControlNets, decoder, guidance, Euler."""
        with torch.no_grad():
            if not self._is_remote:
                self._step(0)
                return
            if not self._remaining:
                raise RuntimeError("StepBench.step with remote ControlNets needs begin(n_steps) first")
            self._step(self._n_steps - self._remaining)
            self._remaining -= 1

    def _step(self, i: int) -> None:
        from engine.base import run_step

        run_step(self._program, [] if self._source is None else [self._source], i)

    def encoder(self) -> None:
        """The base's first half."""
        self._program.encode()

    def decoder(self) -> None:
        """The base's second half with guidance and Euler step; with residuals if there are ControlNets."""
        if self._source is None:
            self._program.decode()
        else:
            self._program.prepare_joined()()

    def controlnet(self, place: int) -> None:
        """One ControlNet of this process."""
        if self._is_remote:
            raise RuntimeError("StepBench.controlnet: the ControlNets are remote; prepare a worker that holds them")
        self._worker.controlnet_part(self._key, self._names[place])()

    def vae(self, n_images: int) -> None:
        """Decodes this many images."""
        with torch.no_grad():
            self._vae.decode(self._program.latents[:1].expand(n_images, -1, -1, -1))

    def text(self) -> None:
        """Encodes a prompt and a negative prompt."""
        with torch.no_grad():
            self._worker.encode_prompt(self._prompt)
            self._worker.encode_prompt(self._negative)

    def _fill(self) -> None:
        program = self._program
        for buffer in (program.latents, program.latents_in, program.emb, program.context):
            buffer.normal_()
        program.project_text()
        # sigma 3, a step so small that thousands of repetitions keep the latents finite, guidance 5
        program.scalars.copy_(torch.tensor([10.0**0.5, 3.0, -1e-4, 5.0]))
