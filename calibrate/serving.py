"""The serving path under the clock: jobs through the real engine's processes, from submission to outcome.

What a step's parts cannot show is here: the front, the wire between processes, text from tokens, PNG files, a worker's start from
a checkpoint on disk, the first job of a shape, and several workers that share one GPU.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import hashlib
import tempfile
import threading
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, Final

from calibrate.clock import DeviceClock
from calibrate.measurement import Features
from calibrate.rig import RigSetup, Timed
from calibrate.stock import GUIDANCE_SCALE, dtype_of
from calibrate.storage import (
    controlnet_folder,
    host_tier_parent,
    image_lora_rank,
    lora_file,
    pipeline_folder,
    save_controlnet,
    save_pipeline,
)
from engine.allocation import ANY, Allocation, Policies, Pool
from engine.catalogue import Catalogue, CatalogueEntry
from engine.models import ModelSpec, build_controlnet, build_models
from engine.pixels import to_file
from engine.serving.engine import Engine
from engine.serving.job import ControlUse, Job, LoraUse, Outcome
from engine.serving.settings import EngineSettings

CHECKPOINTS: Final = ("checkpoint", "checkpoint_again")
START_TIMEOUT_S: Final = 240.0
JOB_TIMEOUT_S: Final = 120.0
N_LORAS: Final = 2


class ServingRig:
    """An engine with one base replica, or with as many as are asked to share its GPU."""

    def __init__(self, setup: RigSetup) -> None:
        """Only writes models to disk; workers start when the first job is asked for."""
        self.setup = setup
        self.mode = "graph" if setup.uses_graph else "eager"
        self._scratch = Path(setup.scratch)
        _save_models(setup)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="serving", daemon=True)
        self._thread.start()
        self._engine: Engine | None = None
        self._n_replicas = 0
        self._allocated: Allocation | None = None
        self._n_jobs = 0
        self._warm: set[tuple[tuple[Features, ...], int]] = set()
        self._pending: list[Timed] = []
        self._files_s: list[float] = []
        self._loras = [lora_file(setup, image_lora_rank(setup), i) for i in range(N_LORAS)]
        self._lora_ids = [hashlib.sha256(path.read_bytes()).hexdigest() for path in self._loras]

    def run(self, method: str, features: Features, n_repeats: int) -> list[Timed]:
        """See :class:`calibrate.rig.Rig`.

        ``jobs``: one after the other; ``shared_jobs``: as many at once as ``variant`` says (``shared2``); ``switch_jobs``: each on
        the other checkpoint than the one before; ``drain``: a second replica comes, and goes again.
        """
        if method == "drain":
            return self._drained(n_repeats)
        n = int(features.variant.removeprefix("shared")) if method == "shared_jobs" else 1
        if features.n_loras:
            features = dataclasses.replace(features, n_bytes=self._loras[0].stat().st_size)
        is_switch = method == "switch_jobs"
        self._pending += self._started(n, CHECKPOINTS if is_switch else CHECKPOINTS[:1])
        self._pending += self._warmed([features] * n)  # kept until they can be handed over: a job may fail before that
        if is_switch:
            self._do(self._together([features], CHECKPOINTS[1]), JOB_TIMEOUT_S)  # its first load reads the files
        self._files_s.clear()
        jobs = []
        for turn in range(n_repeats):
            jobs += self._do(self._together([features] * n, CHECKPOINTS[turn % 2 if is_switch else 0]), JOB_TIMEOUT_S)
        found, self._pending = self._pending, []
        if self._files_s:
            found.append(Timed("serving.png_encode", self.mode, features, tuple(self._files_s)))
        return found + self._rows("serving.", features, jobs)

    def _drained(self, n_repeats: int) -> list[Timed]:
        """A second replica from its start until it is ready, beside one that serves; and from then until it is gone."""
        found = self._started(1)
        goes = []
        for _ in range(n_repeats):
            found += [dataclasses.replace(timed, quantity="engine.worker_attach") for timed in self._started(2)]
            start_s = time.perf_counter()
            self._do(self._allocate(1, CHECKPOINTS[:1]), START_TIMEOUT_S)
            goes.append(time.perf_counter() - start_s)
        self._warm = {kept for kept in self._warm if kept[1] == 1}
        return [*found, Timed("engine.worker_drain", self.mode, Features(), tuple(goes))]

    def _rows(self, prefix: str, features: Features, jobs: list[tuple[float, Outcome]]) -> list[Timed]:
        """Latency, stages, and what is in none of them; a stage that no job had gives no row."""
        rows: dict[str, list[float]] = {}
        for latency_s, outcome in jobs:
            stages = {name.removesuffix("_s"): value for name, value in dataclasses.asdict(_stages(outcome)).items()}
            for name, value in {"latency": latency_s, "overhead": latency_s - sum(stages.values()), **stages}.items():
                rows.setdefault(name, []).append(value)
        return [
            Timed(prefix + name, self.mode, features, tuple(values))
            for name, values in rows.items()
            if all(value > 0 for value in values)
        ]

    def _started(self, n_replicas: int, checkpoints: tuple[str, ...] = CHECKPOINTS[:1]) -> list[Timed]:
        """Brings the engine to so many replicas; a replica's start is timed where it is the only one that starts."""
        n_more = n_replicas - self._n_replicas
        if n_more <= 0 and self._allocated == self._allocation(max(n_replicas, self._n_replicas), checkpoints):
            return []
        start_s = time.perf_counter()
        self._do(self._allocate(max(n_replicas, self._n_replicas), checkpoints), START_TIMEOUT_S)
        took_s = time.perf_counter() - start_s
        return [Timed("engine.worker_start", self.mode, Features(), (took_s,))] if n_more == 1 else []

    async def _allocate(self, n_replicas: int, checkpoints: tuple[str, ...]) -> None:
        wanted = self._allocation(n_replicas, checkpoints)
        if self._engine is None:
            self._engine = await self._made(wanted)
        else:
            await self._engine.apply(wanted)
        self._allocated, self._n_replicas = wanted, n_replicas

    def _allocation(self, n_replicas: int, checkpoints: tuple[str, ...]) -> Allocation:
        pool = Pool(
            "base", "base", n_replicas, "any", topology="colocated", base_model_ids=checkpoints, controlnet_ids=(ANY,)
        )
        return Allocation(pools=(pool,), policies=Policies(lora_patch_by_step=0))

    def _devices(self) -> tuple[str, ...]:
        return (self.setup.device,) * max(2, self.setup.n_sharing)

    async def _made(self, allocation: Allocation) -> Engine:
        has_graph, is_cuda = self.setup.uses_graph, self.setup.device.startswith("cuda")
        settings = EngineSettings(
            run_dir=Path(tempfile.mkdtemp(prefix="serving-", dir=self._scratch)),
            model="tiny" if self.setup.model == "tiny" else "sdxl",
            devices=self._devices(),
            store=str(self._scratch),
            host_tier_parent=host_tier_parent(self.setup),
            # one checkpoint on the device: a switch is then always a load
            options={"n_checkpoints_max": 1, **({"use_cuda_graph": has_graph} if is_cuda else {})},
        )
        made = Engine(allocation, settings, self._catalogue())
        await made.start()
        return made

    def _catalogue(self) -> Catalogue:
        entries = [
            CatalogueEntry(lora_id, "lora", self.setup.model, path.stat().st_size, file=f"loras/{path.name}")
            for lora_id, path in zip(self._lora_ids, self._loras, strict=True)
        ]
        entries += [
            CatalogueEntry(f"controlnet{i}", "controlnet", self.setup.model, file=controlnet_folder(self.setup).name)
            for i in range(self.setup.n_controlnets)
        ]
        # two names of the same files: what is loaded on a switch is as large
        entries += [
            CatalogueEntry(name, "base", self.setup.model, file=pipeline_folder(self.setup).name)
            for name in CHECKPOINTS
        ]
        return Catalogue({entry.id: entry for entry in entries})

    def _warmed(self, clients: Sequence[Features]) -> list[Timed]:
        """Until every replica has run the shapes: captures are no part of a job, but a lone first one's time is kept."""
        shapes = tuple(dataclasses.replace(features, variant="") for features in clients)
        n = len(clients)
        if (shapes, n) in self._warm:
            return []
        first = self._do(self._together(clients), START_TIMEOUT_S)
        if n > 1:  # which of them captured is not known: once more
            self._do(self._together(clients), START_TIMEOUT_S)
        self._warm |= {(shapes[:count], count) for count in range(1, n + 1)}
        return self._rows("serving.first_", clients[0], first) if n == 1 else []

    async def _together(
        self, clients: Sequence[Features], checkpoint: str = CHECKPOINTS[0]
    ) -> list[tuple[float, Outcome]]:
        """A job of each client, all at once; seconds of each until its outcome."""
        return list(await asyncio.gather(*(self._one(features, checkpoint) for features in clients)))

    async def _one(self, features: Features, checkpoint: str) -> tuple[float, Outcome]:
        if self._engine is None:
            raise RuntimeError("ServingRig: no engine")
        self._n_jobs += 1
        job = Job(
            request_id=f"calibration-{self._n_jobs}",
            base_model_id=checkpoint,
            prompt="a lighthouse on a cliff in the evening, oil on canvas",
            negative_prompt="blurred, text, frame",
            n_images=features.n_images,
            n_steps=features.n_steps,
            width_px=features.width_px,
            height_px=features.height_px,
            guidance_scale=GUIDANCE_SCALE if features.forward_batch > features.n_images else 1.0,
            controls=tuple(ControlUse(f"controlnet{i}", 0.7) for i in range(features.n_controlnets)),
            loras=tuple(LoraUse(lora_id) for lora_id in self._lora_ids[: features.n_loras]),
            seed=self.setup.seed + self._n_jobs,
            wants_images=features.variant == "png",
        )
        start_s = time.perf_counter()
        outcome = await self._engine.submit(job)
        took_s = time.perf_counter() - start_s
        if outcome.result is not None and outcome.result.images:
            # as the front door answers a client; not in the latency, which ends with the outcome
            begun_s = time.perf_counter()
            for rows in outcome.result.images:
                to_file(rows)
            self._files_s.append(time.perf_counter() - begun_s)
        if outcome.status != "done":
            raise RuntimeError(f"the engine answered {outcome.status}: {outcome.reason}")
        return took_s, outcome

    def _do(self, work: Coroutine[Any, Any, Any], timeout_s: float) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)

    def facts(self) -> dict[str, float]:
        """Device memory of one worker at its peak, where the engine says it."""
        if self._engine is None:
            return {}
        peaks = [float(worker.memory_bytes.get("device_bytes_peak", 0)) for worker in self._engine.view().workers]
        return {"worker_device_bytes_peak": max(peaks)} if peaks and max(peaks) > 0 else {}

    def close(self) -> None:
        """Ends the engine's processes."""
        if self._engine is not None:
            with contextlib.suppress(TimeoutError):
                self._do(self._engine.stop(), 30.0)
            self._engine = None
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        if not self._thread.is_alive():
            self._loop.close()


def _stages(outcome: Outcome) -> Any:
    if outcome.result is None:
        raise RuntimeError(f"{outcome.request_id} is done and has no result")
    return outcome.result.stages


def _save_models(setup: RigSetup) -> None:
    """Writes the checkpoint and one ControlNet to the scratch folder, which serves as the engine's store."""
    spec, dtype = ModelSpec.named(setup.model), dtype_of(setup.dtype)
    if setup.n_controlnets and not controlnet_folder(setup).exists():
        save_controlnet(setup, build_controlnet(spec, setup.device, dtype, setup.seed + 1))
    if not pipeline_folder(setup).exists():
        save_pipeline(setup, build_models(spec, setup.device, dtype, setup.seed))
    gc.collect()
    DeviceClock(setup.device).free()
