"""How the front process runs its workers: model, devices, folders, and every bound on waiting."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

from engine.allocation import Policies
from engine.serving.warm_shapes import WarmShape

Model = Literal["featherweight", "tiny", "sdxl"]
NEVER_S: Final = float("inf")


@dataclass(frozen=True, slots=True)
class Bounds:
    """Every wait of the front for a worker, in seconds; the defaults suit SDXL on a GPU."""

    heartbeat_s: float = 1.0
    silence_s: float = 15.0
    """A worker whose heartbeat did not come for this long is killed (stopped, or its interpreter is stuck)."""
    hello_s: float = 60.0
    """Until the first heartbeat: the interpreter starts and imports."""
    load_s: float = 600.0
    """Work path without progress while it loads; also for a phase that is not named here."""
    compile_s: float = 1800.0
    step_s: float = 60.0
    """Work path without progress while it denoises or answers; a worker's own wait for its peers must be shorter."""
    decode_s: float = 120.0
    fetch_s: float = 120.0
    ready_s: float = 3600.0
    """From start to ready in all."""
    line_s: float = 30.0
    """A worker's longest wait for another worker."""
    lora_wait_s: float = 60.0
    """A base worker's longest wait for a LoRA."""
    stop_s: float = 10.0
    """From asking a worker to stop to killing it."""
    drain_s: float = 600.0
    """For a worker that is to go to finish what it has."""
    join_s: float = 600.0
    """For a worker of another host to join before its replica counts as failed."""
    backoff_first_s: float = 0.5
    backoff_max_s: float = 30.0
    healthy_s: float = 60.0
    """A worker that was ready for this long starts again with the first backoff."""
    reattach_s: float = 0.5
    """Between losing a pair line, both workers being alive, and attaching it anew."""

    def standstill_s(self, phase: str) -> float:
        """How long the work path may stand still in a phase (``WorkerSetup``'s progress)."""
        return {
            "idle": NEVER_S,
            "start": self.hello_s,
            "compile": self.compile_s,
            "step": self.step_s,
            "decode": self.decode_s,
            "fetch": self.fetch_s,
            "lora_wait": self.step_s,
        }.get(phase, self.load_s)


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What an allocation does not say: where and with what it runs."""

    run_dir: Path
    """Events and the workers' logs; made if absent."""
    model: Model = "tiny"
    devices: tuple[str, ...] = ("cpu",)
    """Given to replicas in order; a device that is named twice is shared. ``cpu`` alone serves any number. ``@N`` is a worker
    of another host that joins with ``RANK=N``."""
    store: str = ""
    """Folder or address that LoRAs are fetched from."""
    weights: str = ""
    """Folder of local weights, handed to the model side."""
    host_tier_parent: Path = Path("/dev/shm")  # noqa: S108 - a private folder is made in it
    n_loaders: int = 1
    warm: tuple[WarmShape, ...] = ()
    """A base or ControlNet worker is ready once it has captured these, for every model that it holds then."""
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Settings of the model side, by name."""
    bounds: Bounds = field(default_factory=Bounds)
    join_address: str = ""
    """``HOST:PORT`` on which workers of other hosts join; empty: none can."""
    join_token: str = ""
    """What they must show; at least 16 characters."""
    environment: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Added to the environment of worker processes."""


def with_host_budgets(settings: EngineSettings, policies: Policies) -> EngineSettings:
    """The same, with the host memory for models that the policies grant each worker, unless an option says another."""
    budgets = {
        "host_checkpoint_gib": policies.checkpoint_host_cache_gib,
        "host_controlnet_gib": policies.controlnet_host_cache_gib,
    }
    return dataclasses.replace(settings, options={**budgets, **settings.options})


def with_cpu_threads(settings: EngineSettings, n_workers: int) -> EngineSettings:
    """The same, but workers that compute on this host's CPU share its cores, unless OMP_NUM_THREADS says something already.

    Each would take all of them: two workers on two cores then spend ten times as long, most of it waiting for each other.
    """
    is_told = "OMP_NUM_THREADS" in os.environ or "OMP_NUM_THREADS" in settings.environment
    if is_told or settings.model == "featherweight" or set(settings.devices) != {"cpu"}:
        return settings
    n_threads = max(1, len(os.sched_getaffinity(0)) // max(1, n_workers))
    return dataclasses.replace(settings, environment={**settings.environment, "OMP_NUM_THREADS": str(n_threads)})
