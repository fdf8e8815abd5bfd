"""A model that weighs nothing: whole-number arithmetic in place of a network, so that faults can be injected by the thousand.

Everything else is the real engine. An image depends, bit by bit, on everything that a job says and on the step at which its
LoRAs were patched in; :func:`reference_images` computes it with a plain loop. So an image made of another job's control, of half a
patch, of another rank's step or of a stale buffer is told apart. Sums are modulo 2**64: their order does not matter.
"""

from __future__ import annotations

import hashlib
import struct
import time
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np

from engine.allocation import ANY
from engine.links.protocol import LineLostError, PairOfBase, PairOfControlNets
from engine.serving.job import ControlUse, Job
from engine.workers.painter import JobError, LoadedLora, PeerLostError
from engine.workers.setup import Progress, RefusedError, WorkerSetup

N_VALUES: Final = 64
"""Numbers of one image's latents."""
SAMPLE_BYTES: Final = 8 * N_VALUES
IMAGE_STARTS: Final = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF")
MASK: Final = 2**64 - 1
LORA_MAGIC: Final = b"featherweight lora\n"
POLL_S: Final = 0.005

Array = np.ndarray


@lru_cache(maxsize=4096)
def number(text: str) -> int:
    """64 bits drawn from a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _numbers(text: str) -> Array:
    values = np.arange(1, N_VALUES + 1, dtype=np.uint64) * np.uint64(number(text) | 1)
    return values ^ (values >> np.uint64(31))


def _noise(job: Job, image: int) -> Array:
    return _numbers(f"noise {job.seed} {image} {job.width_px}x{job.height_px}")


def _thousandths(value: float) -> np.uint64:
    return np.uint64(round(value * 1000) & MASK)


def _weight(base_model_id: str, loras: Sequence[tuple[int, float]]) -> np.uint64:
    weight = number(f"base {base_model_id}")
    for content, scale in loras:
        weight += content * round(scale * 1000)
    return np.uint64((weight & MASK) | 1)


def _forward(x: Array, weight: np.uint64, prompt: Array, residuals: Array) -> Array:
    """The "network": ``x`` and ``residuals`` [n, 64], ``prompt`` [n, 1]; one prediction a sample."""
    return (x ^ (x >> np.uint64(29))) * weight + prompt + residuals


def _residual(controlnet_id: str, image: Array, x: Array, prompt: Array, scale: float) -> Array:
    """What a ControlNet adds: ``image`` and ``prompt`` [n, 1], ``x`` [n, 64]."""
    return ((x + image) * np.uint64(number(f"controlnet {controlnet_id}") | 1) ^ prompt) * _thousandths(scale)


def _next(x: Array, conditional: Array, unconditional: Array | None, guidance: float) -> Array:
    if unconditional is None:
        return x * np.uint64(3) + conditional
    return x * np.uint64(3) + unconditional + (conditional - unconditional) * _thousandths(guidance)


def is_used(start: float, end: float, scale: float, i: int, n_steps: int) -> bool:
    """Whether a ControlNet takes part in step ``i`` (Diffusers' rule for start and end)."""
    return scale != 0.0 and not (i / n_steps < start or (i + 1) / n_steps > end)


def _control_image(job: Job, use: ControlUse, index: int) -> int:
    if use.image is None:
        return number(f"control {job.seed} {index}")
    data = job.blobs[use.image]
    if not data.startswith(IMAGE_STARTS):
        raise JobError(f"the image of ControlNet {use.controlnet_id} is no PNG, JPEG or WebP", job.request_id)
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def _prompts(job: Job) -> tuple[int, int]:
    return number(f"prompt {job.prompt}"), number(f"negative {job.negative_prompt or ''}")


def lora_content(lora_id: str) -> bytes:
    """The file of a featherweight LoRA."""
    return LORA_MAGIC + lora_id.encode() + b"\n" + number(f"lora {lora_id}").to_bytes(8, "big")


def _lora_number(content: bytes) -> int:
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big")


def reference_images(job: Job, patch_step: int | None) -> list[bytes]:
    """The images that the job must give, whatever happened on the way: PNG files.

    Args:
        patch_step: before which step its LoRAs were patched in (``WorkerResult.lora_patch_step``).
    """
    plain = _weight(job.base_model_id, ())
    patched = _weight(job.base_model_id, [(_lora_number(lora_content(u.lora_id)), u.scale) for u in job.loras])
    column = np.zeros((1, 1), dtype=np.uint64)
    conditional, negative = (column + np.uint64(value) for value in _prompts(job))
    files = []
    for image in range(job.n_images):
        x = _noise(job, image)[None]
        for i in range(job.n_steps):
            weight = patched if patch_step is not None and i >= patch_step else plain
            halves = []
            for prompt in (conditional, negative)[: 2 if job.uses_cfg else 1]:
                residuals = np.zeros_like(x)
                for index, use in enumerate(job.controls):
                    if is_used(use.start, use.end, use.scale, i, job.n_steps):
                        control = column + np.uint64(_control_image(job, use, index))
                        residuals = residuals + _residual(use.controlnet_id, control, x, prompt, use.scale)
                halves.append(_forward(x, weight, prompt, residuals))
            x = _next(x, halves[0], halves[1] if job.uses_cfg else None, job.guidance_scale)
        files.append(png(x[0], job.width_px, job.height_px))
    return files


def png(values: Array, width_px: int, height_px: int) -> bytes:
    """An RGB image that repeats the 512 bytes of ``values``."""
    row = np.zeros((height_px, 1 + 3 * width_px), dtype=np.uint8)
    row[:, 1:] = np.resize(values.astype(">u8").view(np.uint8), (height_px, 3 * width_px))
    header = struct.pack(">IIBBBBB", width_px, height_px, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(row.tobytes(), 1)), (b"IEND", b""))
    body = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


@dataclass(slots=True)
class _Faults:
    """Faults that a test asks for by making files in a folder; without the folder there are none."""

    folder: Path | None
    worker_id: str

    def start(self) -> None:
        """``WORKER.crash``: dies instead of getting ready. ``WORKER.never_ready``: hangs instead."""
        if self._has("crash"):
            raise RuntimeError("told to crash")
        while self._has("never_ready"):
            time.sleep(POLL_S)

    def step(self) -> None:
        """``WORKER.stuck``: the work path stands still, the heartbeat does not."""
        while self._has("stuck"):
            time.sleep(POLL_S)

    def _has(self, fault: str) -> bool:
        return self.folder is not None and (self.folder / f"{self.worker_id}.{fault}").exists()


def _faults(setup: WorkerSetup) -> _Faults:
    folder = setup.options.get("faults_dir")
    return _Faults(Path(folder) if folder else None, setup.worker_id)


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
        self._faults = _faults(setup)
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
        self._weight = _weight(self._active, ())
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
        self._weight = _weight(base_model_id, ())
        return is_switch

    def begin(self, jobs: Sequence[Job], pairs: Mapping[str, PairOfBase]) -> int:
        """See :class:`engine.workers.painter.Painter`."""
        self._batch += 1
        first = jobs[0]
        samples = [(job, image) for job in jobs for image in range(job.n_images)]
        controls = [
            np.array([[_control_image(job, job.controls[k], k)] for job, _ in samples], dtype=np.uint64)
            for k in range(len(first.controls))
        ]
        prompts = [np.array([[_prompts(job)[half]] for job, _ in samples], dtype=np.uint64) for half in (0, 1)]
        if not first.uses_cfg:
            halves = prompts[:1]
        elif self._partner is None:
            halves = prompts
        else:
            # Rank 0 computes the unconditional half, rank 1 the conditional one.
            halves = [prompts[1 - self._setup.rank]]
        x = np.stack([_noise(job, image) for job, image in samples])
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
                residuals = residuals + _residual(use.controlnet_id, images, stacked, prompts, use.scale)
        for pair in asked.values():
            residuals = residuals + self._hear_residuals(pair, i, stacked.shape)
        eps = _forward(stacked, self._weight, prompts, residuals)
        n = len(work.x)
        if not first.uses_cfg:
            conditional, unconditional = eps, None
        elif self._partner is None:
            conditional, unconditional = eps[:n], eps[n:]
        else:
            conditional, unconditional = self._exchange(eps, i)
        work.x = _next(work.x, conditional, unconditional, first.guidance_scale)

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
            contents.append((_lora_number(content), scale))
        self._weight = _weight(self._active, contents)

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
        self._weight = _weight(self._active, ())
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


@dataclass(slots=True)
class _Client:
    pair: PairOfControlNets
    batch: int = -1
    prompts: Array = field(default_factory=lambda: np.zeros((0, 1), dtype=np.uint64))
    controls: list[tuple[str, float, Array]] = field(default_factory=list)


class FeatherweightControlHost:
    """See :class:`engine.workers.painter.ControlHost`. Options: ``service_s``, ``controlnet_load_s``, ``faults_dir``."""

    def __init__(self, setup: WorkerSetup, progress: Progress) -> None:
        self._faults = _faults(setup)
        self._faults.start()
        self._service_s = float(setup.options.get("service_s", 0.0))
        self._load_s = float(setup.options.get("controlnet_load_s", 0.0))
        self._awaited: dict[str, float] = {}
        """Client to when what its job needs is loaded."""
        self._clients: dict[str, _Client] = {}
        self._may_host = set(setup.controlnet_ids)
        self._resident = {i for i in setup.controlnet_ids if i != ANY}
        self._progress = progress
        progress("load")

    def open(self, client: str, pair: PairOfControlNets) -> None:
        """See :class:`engine.workers.painter.ControlHost`."""
        self._clients[client] = _Client(pair)

    def close(self, client: str) -> None:
        """See :class:`engine.workers.painter.ControlHost`."""
        self._clients.pop(client, None)
        self._awaited.pop(client, None)

    def begin(self, client: str, message: Mapping[str, Any]) -> None:
        """See :class:`engine.workers.painter.ControlHost`."""
        state = self._clients[client]
        state.batch = message["batch"]
        state.prompts = np.array(message["prompts"], dtype=np.uint64).reshape(-1, 1)
        state.controls = []
        for control in message["controls"]:
            if ANY not in self._may_host and control["id"] not in self._may_host:
                raise JobError(f"ControlNet {control['id']} is not hosted here")
            if control["id"] not in self._resident and self._load_s:
                self._awaited[client] = time.monotonic() + self._load_s
            self._resident.add(control["id"])
            images = np.array(control["images"], dtype=np.uint64).reshape(-1, 1)
            state.controls.append((control["id"], control["scale"], images))

    def awaited(self) -> Collection[str]:
        """See :class:`engine.workers.painter.ControlHost`."""
        return self._awaited.keys()

    def advance(self) -> bool:
        """See :class:`engine.workers.painter.ControlHost`."""
        self._progress("load")
        now_s = time.monotonic()
        loaded = [client for client, at_s in self._awaited.items() if at_s <= now_s]
        for client in loaded:
            del self._awaited[client]
        return bool(loaded)

    def step(self, client: str, message: Mapping[str, Any]) -> None:
        """See :class:`engine.workers.painter.ControlHost`."""
        self._faults.step()
        state = self._clients[client]
        if self._service_s:
            time.sleep(self._service_s)
        n_bytes = len(state.prompts) * SAMPLE_BYTES
        x = state.pair.buffer("latents")[:n_bytes].copy().view(np.uint64).reshape(-1, N_VALUES)
        total = np.zeros_like(x)
        for k in message["used"]:
            controlnet_id, scale, images = state.controls[k]
            total = total + _residual(controlnet_id, images, x, state.prompts, scale)
        state.pair.buffer("residuals")[:n_bytes] = total.view(np.uint8).ravel()
        state.pair.push("residuals", 0, n_bytes)
        state.pair.tell({"type": "residuals", "batch": message["batch"], "i": message["i"]})

    def admit(self, controlnet_id: str, source: Mapping[str, Any]) -> None:
        """See :class:`engine.workers.painter.ControlHost`."""
        self._may_host.add(controlnet_id)

    def memory(self) -> Mapping[str, int]:
        """It weighs nothing."""
        return {"device_bytes": 0, "device_bytes_peak": 0, "host_bytes": 0}

    def resident(self) -> list[str]:
        """See :class:`engine.workers.painter.ControlHost`."""
        return sorted(self._resident)


class FeatherweightFetcher:
    """Makes up the file of a LoRA. Options: ``fetch_s``. Ids that start with ``corrupt`` or ``missing`` are refused."""

    def __init__(self, setup: WorkerSetup, progress: Progress) -> None:
        self._folder = Path(setup.host_tier)
        self._fetch_s = float(setup.options.get("fetch_s", 0.0))
        self._faults = _faults(setup)
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
