"""One base rank of the SDXL family: jobs in, images out. The arithmetic is :class:`engine.base.BaseWorker`'s."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from engine.allocation import ANY
from engine.base import BaseWorker
from engine.control_stack import ControlSource
from engine.links.protocol import LineLostError, PairOfBase, PairOfControlNets
from engine.links.tensor_attach import open_as_base
from engine.models import ModelSpec
from engine.options import ControlInput, ImageRequest, PromptEmbeddings
from engine.parts import NetworkParts
from engine.pixels import to_rows
from engine.registry.random_lora import seed_of
from engine.serving.job import ControlUse, Job
from engine.serving.warm_shapes import WarmShape
from engine.workers.cfg_exchange import CfgExchange
from engine.workers.control_image import decode_control_image
from engine.workers.host_weights import host_layout
from engine.workers.lora_files import LoraFiles
from engine.workers.model_options import ModelOptions
from engine.workers.model_sources import DEFAULT_MODEL_ID, ModelSources
from engine.workers.model_tier import ModelTier
from engine.workers.pace import pace_on
from engine.workers.painter import JobError, LoadedLora
from engine.workers.prompts import ModelPrompts
from engine.workers.remote_controls import RemoteControls, peer_lost
from engine.workers.resident_checkpoints import ResidentCheckpoints
from engine.workers.resident_controlnets import ResidentControlNets
from engine.workers.sdxl_controlnets import device_memory
from engine.workers.setup import Progress, WorkerSetup
from traces.problems import InputError

WARM_GUIDANCE: Final = 5.0
"""Any scale above 1 runs the same graphs."""


def make_painter(setup: WorkerSetup, progress: Progress, partner: PairOfBase | PairOfControlNets | None) -> SdxlPainter:
    """Loads what the setup names.

    Raises:
        InputError: the options are wrong.
        JobError: a model cannot be loaded.
        PeerLostError: the other rank of a CFG pair is gone.
    """
    return SdxlPainter(setup, ModelOptions.from_plain(setup.options), progress, partner)


class SdxlPainter:
    """A :class:`engine.workers.painter.Painter`.

    With a partner it is one rank of a CFG pair: of guided jobs it computes the unconditional (rank 0) or conditional half; of
    others rank 0 computes everything and rank 1 nothing. Rank 0 alone decodes.
    """

    def __init__(
        self,
        setup: WorkerSetup,
        options: ModelOptions,
        progress: Progress,
        partner: PairOfBase | PairOfControlNets | None,
    ) -> None:
        self.spec = ModelSpec.named(setup.model)
        self.options = options.engine(setup.device)
        self._model_options = options
        self._timeout_s = setup.line_timeout_s
        self._progress = progress
        self._rank = setup.rank
        if self.options.is_cuda:
            torch.cuda.set_device(self.options.device)
        self._exchange: CfgExchange | None = None
        if partner is not None:
            self._exchange = CfgExchange(
                partner, setup.rank, setup.device, self.options.dtype, options.tensor_transport, setup.line_timeout_s
            )
        self._sources = ModelSources(
            self.spec,
            setup.sources,
            setup.store,
            options.weights,
            progress,
            layout=host_layout(self.options),
            checkpoints=ModelTier("checkpoint", options.host_checkpoint_gib),
            controlnets=ModelTier("controlnet", options.host_controlnet_gib),
        )
        parts = NetworkParts(self.options, ())
        self._nets = ResidentControlNets(self._sources, self.options, parts, options.n_controlnets_max, progress)
        half = setup.rank if partner is not None else None
        self._checkpoints = ResidentCheckpoints(
            self._sources, self.options, parts, self._nets, options.n_checkpoints_max, half, progress
        )
        self._prompts = ModelPrompts(self.spec, self._sources, Path(options.weights) if options.weights else None)
        self._loras = LoraFiles(self.options.dtype, options.lora_cache_max, is_cuda=self.options.is_cuda)
        self._remotes: dict[str, RemoteControls] = {}
        self._worker: BaseWorker | None = None
        self._jobs: Sequence[Job] = ()
        self._used: list[RemoteControls] = []
        self._local_misses = 0
        self._local_load_s = 0.0
        self._pace = pace_on(self.options.device)
        self.controlnet_ids = tuple(setup.controlnet_ids)
        wanted = [name for name in setup.base_model_ids if name != ANY] or [DEFAULT_MODEL_ID]
        for name in wanted[: options.n_checkpoints_max]:
            self._checkpoints.ensure(name)
        self._nets.ensure([name for name in setup.controlnet_ids if name != ANY])
        for shape in setup.warm_shapes:
            self._warm(shape, is_decoupled=setup.topology.startswith("decoupled"))

    @property
    def n_controlnet_misses(self) -> int:
        """ControlNets that had to be loaded for this batch, here or on the workers that were used."""
        return self._local_misses + sum(remote.n_misses for remote in self._used)

    @property
    def local_load_s(self) -> float:
        """Seconds that loading ControlNets into this process took for this batch."""
        return self._local_load_s

    @property
    def controlnet_load_s(self) -> float:
        """Seconds that took: the longest of all places, which load at the same time."""
        return max([self._local_load_s, *(remote.load_s for remote in self._used)])

    def open(self, pair: PairOfBase) -> None:
        """See :class:`engine.workers.painter.Painter`."""
        options = self._model_options
        try:
            line = open_as_base(
                pair, self.options.device, self.options.dtype, options.tensor_transport, self._timeout_s
            )
        except LineLostError as error:
            raise peer_lost(pair.pair_id, f"ControlNet worker {pair.peer}: {error}") from error
        remote = RemoteControls(pair, line, self.spec, self.options, self._timeout_s, self._progress)
        remote.uses_fp8 = options.fp8_residuals
        self._remotes[pair.pair_id] = remote

    def close(self, pair_id: str) -> None:
        """See :class:`engine.workers.painter.Painter`."""
        remote = self._remotes.pop(pair_id, None)
        if remote is not None:
            remote.close()

    def activate(self, base_model_id: str) -> bool:
        """See :class:`engine.workers.painter.Painter`."""
        self._worker = None
        self._prompts.use(base_model_id)
        is_loaded = self._checkpoints.ensure(base_model_id)
        self._worker = self._checkpoints.worker(base_model_id)
        self._worker.exchange = self._exchange
        return is_loaded

    def begin(self, jobs: Sequence[Job], pairs: Mapping[str, PairOfBase]) -> int:
        """See :class:`engine.workers.painter.Painter`."""
        worker = self._active()
        self._jobs = tuple(jobs)
        self._used = []
        self._local_misses, self._local_load_s = 0, 0.0
        first = jobs[0]
        if self._is_spectator(first):
            return first.n_steps
        wanted = [use.controlnet_id for use in first.controls if use.scale != 0.0]
        local = [name for name in wanted if name not in pairs]
        self._local_misses, self._local_load_s = self._nets.ensure(local)
        sources = self._sources_of(wanted, pairs)
        try:
            request = self._request(jobs, worker)
            self._progress("compile")
            worker.prepare_request(request, sources)
            self._progress("step")
            return worker.begin(request, sources)
        except InputError as error:
            raise JobError(str(error)) from error

    def step(self, i: int) -> None:
        """See :class:`engine.workers.painter.Painter`."""
        if not self._is_spectator(self._jobs[0]):
            self._pace.wait()
            self._active().step(i)
            self._pace.queued()

    def patch(self, loras: Sequence[tuple[LoadedLora, float]]) -> None:
        """See :class:`engine.workers.painter.Painter`."""
        worker = self._active()
        found = []
        for loaded, scale in loras:
            lora = self._loras.get(loaded)
            wrong = worker.patcher.misfit(lora)
            if wrong:
                raise JobError(f"LoRA {loaded.lora_id!r} does not fit {self.spec.name}: {wrong}")
            found.append((lora, scale))
        worker.patch(found)

    def settle(self) -> None:
        """See :class:`engine.workers.painter.Painter`."""
        if self._worker is not None:
            self._worker.synchronize()

    def finish(self, *, wants_images: bool) -> list[list[bytes]]:
        """See :class:`engine.workers.painter.Painter`."""
        empty: list[list[bytes]] = [[] for _ in self._jobs]
        if self._exchange is not None and self._rank != 0:
            return empty
        worker, first = self._active(), self._jobs[0]
        pixels = worker.decode(worker.latents(), first.height_px, first.width_px)
        if not wants_images:
            worker.synchronize()
            return empty
        rows = to_uint8(pixels)
        images, at = [], 0
        for job in self._jobs:
            images.append([to_rows(row) for row in rows[at : at + job.n_images]])
            at += job.n_images
        return images

    def latents(self) -> torch.Tensor:
        """The latents as the last step left them, ``[images of all jobs, 4, h, w]``; for measurements."""
        return self._active().latents()

    def restore(self) -> None:
        """See :class:`engine.workers.painter.Painter`."""
        self._jobs = ()
        self._pace.forget()
        if self._worker is not None:
            self._worker.restore()

    def memory(self) -> Mapping[str, int]:
        """See :class:`engine.workers.painter.Painter`."""
        return device_memory(self.options.device, lambda: self._checkpoints.bytes + self._nets.bytes)

    def resident(self) -> Mapping[str, list[str]]:
        """See :class:`engine.workers.painter.Painter`."""
        shapes = {str(shape): None for name in self._checkpoints.names for shape in self._shapes_of(name)}
        return {"base_model_ids": self._checkpoints.names, "controlnet_ids": self._nets.names, "shapes": list(shapes)}

    def admit(self, kind: str, model_id: str, source: Mapping[str, Any]) -> None:
        """See :class:`engine.workers.painter.Painter`."""
        if kind not in {"base", "controlnet"}:
            raise JobError(f"a base worker cannot admit a {kind}")
        self._sources.admit(model_id, source)

    def _warm(self, shape: WarmShape, *, is_decoupled: bool) -> None:
        """Compiles and captures what requests of a shape run, with ControlNets and without, on every resident checkpoint."""
        job = Job(
            "warm-up", prompt="", n_images=shape.n_images, n_steps=1, width_px=shape.width_px, height_px=shape.height_px,
            guidance_scale=WARM_GUIDANCE if shape.uses_cfg else 1.0, wants_images=False,
        )  # fmt: skip
        if self._is_spectator(job):
            return
        controls = tuple(ControlUse(name) for name in self._nets.names)
        for name in self._checkpoints.names:
            self.activate(name)
            worker = self._active()
            self._progress("compile")
            worker.prepare_request(self._request([job], worker))
            if controls:
                self._progress("compile")
                worker.prepare_request(self._request([dataclasses.replace(job, controls=controls)], worker))
            elif is_decoupled:
                self._progress("compile")
                worker.prepare_joined(self._request([job], worker))

    def _shapes_of(self, model_id: str) -> list[WarmShape]:
        """What is captured of a resident checkpoint. A rank of a pair captures a guided shape's half."""
        return [
            WarmShape(key.width, key.height, key.n_images, key.uses_cfg or is_half)
            for key, is_half in self._checkpoints.worker(model_id).prepared
        ]

    def _active(self) -> BaseWorker:
        if self._worker is None:
            raise RuntimeError("SdxlPainter: no checkpoint is active")
        return self._worker

    def _is_spectator(self, job: Job) -> bool:
        """Whether this rank has nothing to do for a job: an unguided one has no second half."""
        return self._exchange is not None and self._rank != 0 and not job.uses_cfg

    def _sources_of(self, wanted: Sequence[str], pairs: Mapping[str, PairOfBase]) -> list[ControlSource]:
        """The remote sources of a batch, each told which ControlNets it computes."""
        names: dict[str, list[str]] = {}
        for name in wanted:
            if name in pairs:
                names.setdefault(pairs[name].pair_id, []).append(name)
        for pair_id, held in names.items():
            if pair_id not in self._remotes:
                raise peer_lost(pair_id, f"the line {pair_id} is not open")
            self._remotes[pair_id].names = tuple(held)
        self._used = [self._remotes[pair_id] for pair_id in names]
        return list(self._used)

    def _request(self, jobs: Sequence[Job], worker: BaseWorker) -> ImageRequest:
        """One request out of compatible jobs: rows of text, noise and control images per image, job after job."""
        first = jobs[0]
        prompts = [self._text(job.prompt, job.n_images, worker) for job in jobs]
        negative = None
        if first.uses_cfg and any(job.negative_prompt is not None for job in jobs):
            negative = _stacked([self._negative(job, like, worker) for job, like in zip(jobs, prompts, strict=True)])
        shape = (4, first.height_px // self.spec.vae_scale_factor, first.width_px // self.spec.vae_scale_factor)
        noise = [
            torch.randn(
                (job.n_images, *shape), generator=torch.Generator("cpu").manual_seed(job.seed), dtype=torch.float32
            )
            for job in jobs
        ]
        return ImageRequest(
            prompt=_stacked(prompts),
            negative=negative,
            n_images=sum(job.n_images for job in jobs),
            n_steps=first.n_steps,
            width=first.width_px,
            height=first.height_px,
            guidance=first.guidance_scale,
            controls=[
                ControlInput(use.controlnet_id, self._control_rows(jobs, place), use.scale, use.start, use.end)
                for place, use in enumerate(first.controls)
                if use.scale != 0.0
            ],
            latents=torch.cat(noise),
        )

    def _text(self, text: str, n_images: int, worker: BaseWorker) -> PromptEmbeddings:
        # One text at a time: the same rows whatever else is in the batch.
        with torch.no_grad():
            one = worker.encode_prompt(self._prompts.ids(text))
        return PromptEmbeddings(one.context.repeat(n_images, 1, 1), one.pooled.repeat(n_images, 1))

    def _negative(self, job: Job, like: PromptEmbeddings, worker: BaseWorker) -> PromptEmbeddings:
        if job.negative_prompt is None:
            return PromptEmbeddings(torch.zeros_like(like.context), torch.zeros_like(like.pooled))
        return self._text(job.negative_prompt, job.n_images, worker)

    def _control_rows(self, jobs: Sequence[Job], place: int) -> torch.Tensor:
        """One control image an image of the batch, or one for all if there is a single job; float32 in 0..1 on the device."""
        rows = []
        for job in jobs:
            # Bytes travel and the device makes numbers of them: a quarter of the way, and none of the host's time.
            pixels = torch.from_numpy(self._control_pixels(job, job.controls[place], place)).to(self.options.device)
            image = pixels.permute(2, 0, 1)[None].to(torch.float32) / 255
            rows.append(image if len(jobs) == 1 else image.repeat(job.n_images, 1, 1, 1))
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def _control_pixels(self, job: Job, use: ControlUse, place: int) -> np.ndarray:
        """A control image as uint8 RGB ``[height, width, 3]``; of a job that came without one (a replay), noise from its seed."""
        if use.image is None:
            noise = np.random.default_rng(seed_of(f"control image {place} of {job.seed}"))
            n_bytes = 3 * job.height_px * job.width_px
            return np.frombuffer(bytearray(noise.bytes(n_bytes)), np.uint8).reshape(job.height_px, job.width_px, 3)
        if not 0 <= use.image < len(job.blobs):
            raise JobError(f"controls[{place}] names image {use.image} of {len(job.blobs)}", job.request_id)
        where = f"the image of controls[{place}] ({use.controlnet_id})"
        try:
            pixels = decode_control_image(
                job.blobs[use.image],
                job.width_px,
                job.height_px,
                self._model_options.control_image_pixels_max,
                where,
            )
        except JobError as error:
            raise JobError(str(error), job.request_id) from error
        return pixels.copy()


def to_uint8(pixels: torch.Tensor) -> np.ndarray:
    """``[n, 3, h, w]`` in 0..1 to uint8 RGB ``[n, h, w, 3]`` on the host."""
    return (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def _stacked(rows: Sequence[PromptEmbeddings]) -> PromptEmbeddings:
    return PromptEmbeddings(torch.cat([row.context for row in rows]), torch.cat([row.pooled for row in rows]))
