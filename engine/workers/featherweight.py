"""A model that weighs nothing: whole-number arithmetic in place of a network, so that faults can be injected by the thousand.

Everything else is the real engine. An image depends, bit by bit, on everything that a job says and on the step at which its
LoRAs were patched in; :func:`engine.workers.featherweight_arithmetic.reference_images` computes it with a plain loop. So an image made of another job's control, of half a
patch, of another rank's step or of a stale buffer is told apart. Sums are modulo 2**64: their order does not matter.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engine.allocation import ANY
from engine.links.protocol import LineLostError, PairOfBase
from engine.serving.job import ControlUse, Job
from engine.workers.featherweight_arithmetic import (
    SAMPLE_BYTES,
    Array,
    control_number,
    forward,
    is_used,
    lora_content,
    lora_number,
    next_latents,
    noise,
    number,
    png,
    prompt_numbers,
    residual,
    weight_of,
)
from engine.workers.painter import JobError, LoadedLora, PeerLostError
from engine.workers.setup import Progress, RefusedError, WorkerSetup
from engine.workers.told_faults import told_faults


@dataclass(slots=True)
class _Work:
    """The batch that is being painted."""

    jobs: Sequence[Job]
    x: Array
    halves: list[Array]
    """Prompt numbers [n, 1] of each half that this rank computes, conditional first."""
    local: list[tuple[ControlUse, Array]]
    remote: dict[str, PairOfBase]
    windows: dict[str, list[ControlUse]] = field(default_factory=dict)


class FeatherweightPainter:
    """See :class:`engine.workers.painter.Painter`. Options: ``step_s``, ``load_s``, ``faults_dir``."""

    def __init__(self, setup: WorkerSetup, progress: Progress, partner: Any) -> None:
        self._setup = setup
        self._partner = partner
        self._faults = told_faults(setup)
        self._faults.start()
        self._step_s = float(setup.options.get("step_s", 0.0))
        self._load_s = float(setup.options.get("load_s", 0.0))
        self._resident = [i for i in setup.base_model_ids if i != ANY] or ["default"]
        self._active = self._resident[0]
        self._shapes: list[str] = []
        for shape in setup.warm_shapes:
            progress("compile")
            time.sleep(float(setup.options.get("warm_s", 0.0)))
            self._shapes.append(str(shape))
        self._weight = weight_of(self._active, ())
        self._work: _Work | None = None
        self._batch = 0
        if partner is not None and setup.rank == 0:
            partner.make_buffers({"from_0": SAMPLE_BYTES, "from_1": SAMPLE_BYTES})
        progress("load")

    def open(self, pair: PairOfBase) -> None:
        """Nothing to set up."""

    def close(self, pair_id: str) -> None:
        """Nothing to free."""

    def activate(self, base_model_id: str) -> bool:
        """Loading takes ``load_s``."""
        is_switch = base_model_id not in self._resident
        if is_switch:
            time.sleep(self._load_s)
            self._resident.append(base_model_id)
        self._active = base_model_id
        self._weight = weight_of(base_model_id, ())
        return is_switch

    def begin(self, jobs: Sequence[Job], pairs: Mapping[str, PairOfBase]) -> int:
        """See :class:`engine.workers.painter.Painter`."""
        self._batch += 1
        first = jobs[0]
        samples = [(job, image) for job in jobs for image in range(job.n_images)]
        controls = [
            np.array([[control_number(job, job.controls[k], k)] for job, _ in samples], dtype=np.uint64)
            for k in range(len(first.controls))
        ]
        prompts = [np.array([[prompt_numbers(job)[half]] for job, _ in samples], dtype=np.uint64) for half in (0, 1)]
        if not first.uses_cfg:
            halves = prompts[:1]
        elif self._partner is None:
            halves = prompts
        else:
            # Rank 0 computes the unconditional half, rank 1 the conditional one.
            halves = [prompts[1 - self._setup.rank]]
        x = np.stack([noise(job, image) for job, image in samples])
        work = _Work(jobs, x, halves, [], {})
        messages: dict[str, list[dict[str, Any]]] = {}
        for use, image in zip(first.controls, controls, strict=True):
            pair = pairs.get(use.controlnet_id)
            if pair is None:
                work.local.append((use, image))
                continue
            work.remote[pair.pair_id] = pair
            work.windows.setdefault(pair.pair_id, []).append(use)
            messages.setdefault(pair.pair_id, []).append({
                "id": use.controlnet_id, "scale": use.scale, "images": [int(v) for v in image[:, 0]] * len(halves)
            })  # fmt: skip
        stacked = [int(v) for half in halves for v in half[:, 0]]
        for pair_id, pair in work.remote.items():
            n_bytes = len(stacked) * SAMPLE_BYTES
            with _losing(pair):
                pair.make_buffers({"latents": n_bytes, "residuals": n_bytes})
                pair.tell({"type": "begin", "batch": self._batch, "prompts": stacked, "controls": messages[pair_id]})
        if self._partner is not None and self._setup.rank == 0:
            self._partner.make_buffers({"from_0": x.size * 8, "from_1": x.size * 8})
        self._work = work
        return first.n_steps

    def step(self, i: int) -> None:
        """See :class:`engine.workers.painter.Painter`."""
        self._faults.step()
        work = self._now()
        n_steps, first = work.jobs[0].n_steps, work.jobs[0]
        asked = {}
        stacked = np.concatenate([work.x] * len(work.halves))
        for pair_id, pair in work.remote.items():
            used = [
                k for k, use in enumerate(work.windows[pair_id]) if is_used(use.start, use.end, use.scale, i, n_steps)
            ]
            if used:
                with _losing(pair):
                    pair.buffer("latents")[: stacked.size * 8] = stacked.view(np.uint8).ravel()
                    pair.push("latents", 0, stacked.size * 8)
                    pair.tell({"type": "step", "batch": self._batch, "i": i, "used": used})
                asked[pair_id] = pair
        if self._step_s:
            time.sleep(self._step_s)
        prompts = np.concatenate(work.halves)
        residuals = np.zeros_like(stacked)
        for use, image in work.local:
            if is_used(use.start, use.end, use.scale, i, n_steps):
                images = np.concatenate([image] * len(work.halves))
                residuals = residuals + residual(use.controlnet_id, images, stacked, prompts, use.scale)
        for pair in asked.values():
            residuals = residuals + self._hear_residuals(pair, i, stacked.shape)
        eps = forward(stacked, self._weight, prompts, residuals)
        n = len(work.x)
        if not first.uses_cfg:
            conditional, unconditional = eps, None
        elif self._partner is None:
            conditional, unconditional = eps[:n], eps[n:]
        else:
            conditional, unconditional = self._exchange(eps, i)
        work.x = next_latents(work.x, conditional, unconditional, first.guidance_scale)

    def _hear_residuals(self, pair: PairOfBase, i: int, shape: tuple[int, ...]) -> Array:
        with _losing(pair):
            message = pair.hear(self._setup.line_timeout_s)
            if message["type"] == "refused":
                raise JobError(str(message["reason"]))
            if message["type"] != "residuals" or (message["batch"], message["i"]) != (self._batch, i):
                raise LineLostError(f"{pair.peer} answered {message} to step {i} of batch {self._batch}")
            n_bytes = 8 * int(np.prod(shape))
            return pair.buffer("residuals")[:n_bytes].copy().view(np.uint64).reshape(shape)

    def _exchange(self, eps: Array, i: int) -> tuple[Array, Array]:
        """Both halves' predictions, from both ranks."""
        partner, rank = self._partner, self._setup.rank
        mine, theirs = f"from_{rank}", f"from_{1 - rank}"
        n_bytes = eps.size * 8
        try:
            if i == 0 and rank == 1:
                # The leader's buffers are mapped when its first message is heard.
                self._hear_prediction(i)
                other = partner.buffer(theirs)[:n_bytes].copy()
                self._tell_prediction(mine, eps, i)
            elif rank == 1:
                self._tell_prediction(mine, eps, i)
                self._hear_prediction(i)
                other = partner.buffer(theirs)[:n_bytes].copy()
            else:
                self._tell_prediction(mine, eps, i)
                self._hear_prediction(i)
                other = partner.buffer(theirs)[:n_bytes].copy()
        except LineLostError as error:
            raise PeerLostError(f"the other rank is gone: {error}") from None
        theirs_eps = other.view(np.uint64).reshape(eps.shape)
        return (theirs_eps, eps) if rank == 0 else (eps, theirs_eps)

    def _tell_prediction(self, name: str, eps: Array, i: int) -> None:
        self._partner.buffer(name)[: eps.size * 8] = eps.view(np.uint8).ravel()
        self._partner.push(name, 0, eps.size * 8)
        self._partner.tell({"type": "prediction", "batch": self._batch, "i": i})

    def _hear_prediction(self, i: int) -> None:
        message = self._partner.hear(self._setup.line_timeout_s)
        if message["type"] != "prediction" or message["i"] != i:
            raise LineLostError(f"the other rank said {message} at step {i}")

    def patch(self, loras: Sequence[tuple[LoadedLora, float]]) -> None:
        """See :class:`engine.workers.painter.Painter`."""
        contents = []
        for lora, scale in loras:
            try:
                content = Path(lora.path).read_bytes()
            except OSError as error:
                raise JobError(f"LoRA {lora.lora_id} cannot be read: {error.strerror}") from None
            if lora.lora_id.startswith("misfit"):
                raise JobError(f"LoRA {lora.lora_id} does not fit the model")
            contents.append((lora_number(content), scale))
        self._weight = weight_of(self._active, contents)

    def settle(self) -> None:
        """See :class:`engine.workers.painter.Painter`."""

    def finish(self, *, wants_images: bool) -> list[list[bytes]]:
        """See :class:`engine.workers.painter.Painter`."""
        work = self._now()
        files: list[list[bytes]] = []
        at = 0
        for job in work.jobs:
            rows = work.x[at : at + job.n_images]
            at += job.n_images
            is_wanted = wants_images and job.wants_images and self._setup.rank == 0
            files.append([png(row, job.width_px, job.height_px) for row in rows] if is_wanted else [])
        return files

    def restore(self) -> None:
        """See :class:`engine.workers.painter.Painter`."""
        self._weight = weight_of(self._active, ())
        self._work = None

    def memory(self) -> Mapping[str, int]:
        """It weighs nothing."""
        return {"device_bytes": 0, "device_bytes_peak": 0, "host_bytes": 0}

    def resident(self) -> Mapping[str, list[str]]:
        """See :class:`engine.workers.painter.Painter`."""
        return {
            "base_model_ids": list(self._resident),
            "controlnet_ids": [i for i in self._setup.controlnet_ids if i != ANY],
            "shapes": list(self._shapes),
        }

    def admit(self, kind: str, model_id: str, source: Mapping[str, Any]) -> None:
        """Every id is known."""

    def _now(self) -> _Work:
        if self._work is None:
            raise RuntimeError("no batch has begun")
        return self._work


class _losing:  # noqa: N801 - reads as a clause: with _losing(pair)
    """Names the pair that was lost."""

    def __init__(self, pair: PairOfBase) -> None:
        self._pair = pair

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, LineLostError):
            raise PeerLostError(str(error), self._pair.pair_id) from None


class FeatherweightFetcher:
    """Makes up the file of a LoRA. Options: ``fetch_s``. Ids that start with ``corrupt`` or ``missing`` are refused."""

    def __init__(self, setup: WorkerSetup, progress: Progress) -> None:
        self._folder = Path(setup.host_tier)
        self._fetch_s = float(setup.options.get("fetch_s", 0.0))
        self._faults = told_faults(setup)
        self._faults.start()

    def fetch(self, lora_id: str, source: Mapping[str, Any]) -> Path:
        """See :class:`engine.workers.setup.Fetcher`."""
        self._faults.step()
        time.sleep(self._fetch_s)
        if lora_id.startswith("corrupt"):
            raise RefusedError(f"LoRA {lora_id} is not what it claims to be", is_final=True)
        if lora_id.startswith("missing"):
            raise RefusedError(f"LoRA {lora_id} could not be reached", is_final=False)
        path = self._folder / f"{number(lora_id):016x}.flat"
        beside = path.with_suffix(".part")
        beside.write_bytes(lora_content(lora_id))
        beside.replace(path)
        return path
