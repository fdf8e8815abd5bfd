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
from collections.abc import Coroutine
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

CHECKPOINT: Final = "checkpoint"
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
        self._n_jobs = 0
        self._warm: set[tuple[Features, int]] = set()
        self._pending: list[Timed] = []
        self._files_s: list[float] = []
        self._loras = [lora_file(setup, image_lora_rank(setup), i) for i in range(N_LORAS)]
        self._lora_ids = [hashlib.sha256(path.read_bytes()).hexdigest() for path in self._loras]

    def run(self, method: str, features: Features, n_repeats: int) -> list[Timed]:
        """See :class:`calibrate.rig.Rig`: ``jobs`` or ``shared_jobs``, whose ``variant`` is ``sharedN``."""
        n = int(features.variant.removeprefix("shared")) if method == "shared_jobs" else 1
        if features.n_loras:
            features = dataclasses.replace(features, n_bytes=self._loras[0].stat().st_size)
        self._pending += self._started(n)  # kept until they can be handed over: a job may fail before that
        self._pending += self._warmed(features, n)
        self._files_s.clear()
        jobs = [job for _ in range(n_repeats) for job in self._do(self._together(features, n), JOB_TIMEOUT_S)]
        found, self._pending = self._pending, []
        if self._files_s:
            found.append(Timed("serving.png_encode", self.mode, features, tuple(self._files_s)))
        return found + self._rows("serving.", features, jobs)

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

    def _started(self, n_replicas: int) -> list[Timed]:
        """Brings the engine to so many replicas; a replica's start is timed where it is the only one that starts."""
        if n_replicas <= self._n_replicas:
            return []
        start_s = time.perf_counter()
        if self._engine is None:
            self._engine = self._do(self._made(n_replicas), START_TIMEOUT_S)
        else:
            self._do(self._engine.apply(_allocation(self.setup, n_replicas)), START_TIMEOUT_S)
        took_s, n_started = time.perf_counter() - start_s, n_replicas - self._n_replicas
        self._n_replicas = n_replicas
        return [Timed("engine.worker_start", self.mode, Features(), (took_s,))] if n_started == 1 else []

    async def _made(self, n_replicas: int) -> Engine:
        has_graph = self.setup.uses_graph
        settings = EngineSettings(
            run_dir=Path(tempfile.mkdtemp(prefix="serving-", dir=self._scratch)),
            model="tiny" if self.setup.model == "tiny" else "sdxl",
            devices=(self.setup.device,) * max(1, self.setup.n_sharing),
            store=str(self._scratch),
            host_tier_parent=host_tier_parent(self.setup),
            options={"use_cuda_graph": has_graph} if self.setup.device.startswith("cuda") else {},
        )
        made = Engine(_allocation(self.setup, n_replicas), settings, self._catalogue())
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
        entries.append(CatalogueEntry(CHECKPOINT, "base", self.setup.model, file=pipeline_folder(self.setup).name))
        return Catalogue({entry.id: entry for entry in entries})

    def _warmed(self, features: Features, n: int) -> list[Timed]:
        """Until every replica has run the shape: captures are no part of a job, but the first one's time is kept."""
        shape = dataclasses.replace(features, variant="")
        if (shape, n) in self._warm:
            return []
        first = self._do(self._together(features, n), START_TIMEOUT_S)
        if n > 1:  # which of them captured is not known: once more
            self._do(self._together(features, n), START_TIMEOUT_S)
        self._warm |= {(shape, count) for count in range(1, n + 1)}
        return self._rows("serving.first_", features, first) if n == 1 else []

    async def _together(self, features: Features, n: int) -> list[tuple[float, Outcome]]:
        """``n`` jobs at once; seconds of each until its outcome."""
        return list(await asyncio.gather(*(self._one(features) for _ in range(n))))

    async def _one(self, features: Features) -> tuple[float, Outcome]:
        if self._engine is None:
            raise RuntimeError("ServingRig: no engine")
        self._n_jobs += 1
        job = Job(
            request_id=f"calibration-{self._n_jobs}",
            base_model_id=CHECKPOINT,
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


def _allocation(setup: RigSetup, n_replicas: int) -> Allocation:
    pool = Pool(
        "base", "base", n_replicas, "any", topology="colocated", base_model_ids=(CHECKPOINT,), controlnet_ids=(ANY,)
    )
    return Allocation(pools=(pool,), policies=Policies(lora_patch_by_step=0))


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
