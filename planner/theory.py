"""Runs the real simulator on systems with exact answers and says whether the answers lie inside the t-intervals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd

from calibrate.profile import LatencyProfile
from calibrate.profile_file import load_profile
from engine.allocation import GIB, Allocation, Policies, Pool
from planner import theory_exact as exact
from planner.scenario import resolve
from planner.service import STACK_OF, ServiceTable, Sizes, build_service
from planner.simulator import ProfileFacts, SimulationResult, simulate
from planner.statistics import Interval, t_interval
from planner.theory_system import System
from planner.workload import Floats, Workload, build_workload
from traces.problems import one_problem
from traces.records import REQUEST_COLUMNS
from traces.trace import Provenance, Trace

CHECKPOINT: Final = "m"
LORA_BYTES: Final = GIB // 4
SIZES: Final = Sizes(lora_bytes=LORA_BYTES, controlnet_bytes=2 * GIB, checkpoint_bytes=6 * GIB)
FACTS: Final = ProfileFacts(device_memory_gib=80.0, activation_gib_per_sample=0.5)
UNCOUNTED_SHARE: Final = 0.1


@dataclass(frozen=True, slots=True)
class Row:
    """One exact figure beside its simulation."""

    system: str
    quantity: str
    exact: float
    simulated: Interval

    @property
    def is_inside(self) -> bool:
        """Whether the exact figure lies inside the interval."""
        return self.simulated.low <= self.exact <= self.simulated.high


def check_system(system: System, folder: Path) -> tuple[Row, ...]:
    """Simulates a system's replications and compares; reproducible by its seed.

    Args:
        folder: where a profile's relative path starts.

    Raises:
        InputError: the profile cannot be used, or its load is too high.
    """
    profile = load_profile(str(resolve(system.service.profile, folder))) if system.service.profile else None
    expected = _exact(system, profile)
    found: dict[str, list[float]] = {name: [] for name in expected}
    for child in np.random.SeedSequence(system.seed).spawn(system.replications):
        values = RUNS[system.system](system, profile, np.random.default_rng(child))
        for name in expected:
            found[name].append(values[name])
    return tuple(
        Row(system.name, name, value, t_interval(found[name], system.level)) for name, value in expected.items()
    )


def _exact(system: System, profile: LatencyProfile | None) -> dict[str, float]:
    rate, n = system.arrivals_per_s, system.n_servers
    mean_s, second = _moments(system, profile)
    if system.system not in ("mmck", "erlang_a") and rate * mean_s >= 0.98 * n:
        raise one_problem(
            f"system {system.name}", f"has a load of {rate * mean_s / n:.3g} of its servers", "less than 0.98"
        )
    match system.system:
        case "mmc":
            return {
                "mean wait (s)": exact.mmc_wait_s(rate, mean_s, n),
                "share that waits": exact.erlang_c(rate * mean_s, n),
            }
        case "mmck":
            rejected, wait_s = exact.mmck(rate, mean_s, n, system.waiting_places or 0)
            return {"share rejected": rejected, "mean wait of the accepted (s)": wait_s}
        case "mg1":
            return {"mean wait (s)": exact.mg1_wait_s(rate, mean_s, second)}
        case "mdc":
            return {"mean wait (s)": exact.mdc_wait_s(rate, mean_s, n)}
        case "priority":
            waits = exact.cobham_waits_s(rate, system.class_shares or (), mean_s, second)
            return {f"mean wait of class {k} (s)": wait_s for k, wait_s in enumerate(waits, 1)}
        case "erlang_a":
            gave_up, queue_s = exact.erlang_a(rate, mean_s, n, system.patience_s or 0.0)
            return {"share that gives up": gave_up, "mean time in queue (s)": queue_s}
        case "fork_join":
            return {"mean response (s)": exact.fork_join_response_s(rate, mean_s)}
        case "lru":
            weights = np.asarray(system.popularity)
            return {"hit ratio": exact.lru_hit_ratio(weights / weights.sum(), system.places or 1)}


def _moments(system: System, profile: LatencyProfile | None) -> tuple[float, float]:
    """Mean and second moment of the service time."""
    service = system.service
    if profile is not None:
        alone_s = float(
            build_service(_workload(system, [0.0]), service.topology, profile_without_noise(profile), SIZES).alone_s[0]
        )
        first, second = exact.noise_moments(
            profile.noise_ratio_quantiles.get(STACK_OF[service.topology], ()) or (1.0,) * 7
        )
        return alone_s * first, alone_s**2 * second
    mean_s = service.mean_s or 0.0
    return mean_s, mean_s**2 * {"exponential": 2.0, "constant": 1.0, "uniform": 4.0 / 3.0}[service.law]


def profile_without_noise(profile: LatencyProfile) -> LatencyProfile:
    """The same laws, every request alike."""
    return replace(profile, noise_ratio_quantiles={})


# -- one replication of each system ------------------------------------------------------------------------------------------


def _queue(system: System, profile: LatencyProfile | None, rng: np.random.Generator) -> dict[str, float]:
    """M/M/c, M/M/c/K, M/G/1, M/D/c: identical replicas, first come, first served."""
    arrival_s = _arrivals(system, rng)
    workload = _workload(system, arrival_s, seed=int(rng.integers(2**31)))
    service = _service(system, profile, workload, rng)
    policies = Policies(queue_limit=system.waiting_places)
    frame = _counted(_run(workload, service, system.n_servers, policies))
    waits = frame["queue_wait_s"].to_numpy(dtype=np.float64, na_value=np.nan)
    done = (frame["status"] == "done").to_numpy()
    wait_s = float(waits[done].mean())
    return {
        "mean wait (s)": wait_s, "share that waits": float((waits[done] > 0).mean()),
        "share rejected": float((frame["status"] == "rejected").mean()), "mean wait of the accepted (s)": wait_s,
    }  # fmt: skip


def _priority(system: System, profile: LatencyProfile | None, rng: np.random.Generator) -> dict[str, float]:
    shares = system.class_shares or ()
    rank = rng.choice(len(shares), system.n_requests, p=shares)
    workload = _workload(system, _arrivals(system, rng), priority=(len(shares) - 1 - rank).tolist())
    service = _service(system, profile, workload, rng)
    frame = _counted(_run(workload, service, 1, Policies(queue_order="priority")))
    mine = rank[len(rank) - len(frame) :]
    waits = frame["queue_wait_s"].to_numpy(dtype=np.float64)
    return {f"mean wait of class {k + 1} (s)": float(waits[mine == k].mean()) for k in range(len(shares))}


def _erlang_a(system: System, profile: LatencyProfile | None, rng: np.random.Generator) -> dict[str, float]:
    patience_s = rng.exponential(system.patience_s or 0.0, system.n_requests)
    workload = _workload(system, _arrivals(system, rng), deadline_s=patience_s.tolist())
    frame = _counted(_run(workload, _service(system, profile, workload, rng), system.n_servers))
    gave_up = (frame["status"] == "expired").to_numpy()
    waits = frame["queue_wait_s"].to_numpy(dtype=np.float64, na_value=np.nan)
    queue_s = np.where(gave_up, (frame["end_s"] - frame["arrival_s"]).to_numpy(dtype=np.float64), waits)
    return {"share that gives up": float(gave_up.mean()), "mean time in queue (s)": float(queue_s.mean())}


def _fork_join(system: System, profile: LatencyProfile | None, rng: np.random.Generator) -> dict[str, float]:
    """Each arrival is two requests, for checkpoints that two pools of one replica each hold; the later end counts."""
    arrival_s = np.repeat(_arrivals(system, rng), 2)
    halves = ["left", "right"] * system.n_requests
    workload = _workload(system, arrival_s, base_model_id=halves)
    service = _service(system, profile, workload, rng)
    pools = tuple(Pool(name, "base", 1, "theory", base_model_ids=(name,)) for name in ("left", "right"))
    result = simulate(workload, Allocation(pools), {pool.name: service for pool in pools}, SIZES, FACTS)
    end_s = result.requests["end_s"].to_numpy(dtype=np.float64).reshape(-1, 2).max(axis=1)
    response_s = end_s - arrival_s[::2]
    return {"mean response (s)": float(response_s[int(UNCOUNTED_SHARE * len(response_s)) :].mean())}


def _lru(system: System, profile: LatencyProfile | None, rng: np.random.Generator) -> dict[str, float]:
    weights = np.asarray(system.popularity)
    names = [(f"lora-{k}",) for k in rng.choice(len(weights), system.n_requests, p=weights / weights.sum())]
    workload = _workload(system, _arrivals(system, rng), lora_ids=names)
    service = _service(system, profile, workload, rng)
    policies = Policies(lora_cache_gib=(system.places or 1) * LORA_BYTES / GIB)
    frame = _counted(_run(workload, service, 1, policies))
    return {"hit ratio": 1.0 - float(frame["n_lora_misses"].to_numpy(dtype=np.float64).mean())}


Replication = Callable[[System, LatencyProfile | None, np.random.Generator], dict[str, float]]
RUNS: Final[dict[str, Replication]] = {
    "mmc": _queue, "mmck": _queue, "mg1": _queue, "mdc": _queue, "priority": _priority, "erlang_a": _erlang_a,
    "fork_join": _fork_join, "lru": _lru,
}  # fmt: skip


def _arrivals(system: System, rng: np.random.Generator) -> Floats:
    return np.asarray(np.cumsum(rng.exponential(1.0 / system.arrivals_per_s, system.n_requests)), dtype=np.float64)


def _workload(system: System, arrival_s: Any, seed: int = 0, **columns: Any) -> Workload:
    """Requests that differ in nothing but what is given; ids carry the seed, because service noise is keyed by them."""
    n = len(arrival_s)
    frame = pd.DataFrame(index=range(n))
    given = {"request_id": [f"{seed}-{i}" for i in range(n)], "arrival_s": arrival_s, "base_model_id": CHECKPOINT,
             "n_steps": system.service.n_steps, **columns}  # fmt: skip
    for column in REQUEST_COLUMNS:
        value = given.get(column.name, np.nan if column.is_nullable else column.default)
        frame[column.name] = [value] * n if isinstance(value, tuple) else value
    last_s = float(arrival_s[-1])
    return build_workload(Trace(frame, Provenance("theory"), max(last_s, 1e-9)))


def _service(
    system: System, profile: LatencyProfile | None, workload: Workload, rng: np.random.Generator
) -> ServiceTable:
    n = len(workload)
    if profile is not None:
        return build_service(workload, system.service.topology, profile, SIZES)
    mean_s = system.service.mean_s or 0.0
    if system.service.law == "exponential":
        seconds = rng.exponential(mean_s, n)
    elif system.service.law == "uniform":
        seconds = rng.uniform(0.0, 2.0 * mean_s, n)
    else:
        seconds = np.full(n, mean_s)
    return ServiceTable.from_service_s(workload, seconds)


def _run(
    workload: Workload, service: ServiceTable, n_servers: int, policies: Policies | None = None
) -> SimulationResult:
    pool = Pool("servers", "base", n_servers, "theory", topology=service.topology, base_model_ids=(CHECKPOINT,))
    allocation = Allocation((pool,), policies=policies or Policies())
    return simulate(workload, allocation, {"servers": service}, SIZES, FACTS)


def _counted(result: SimulationResult) -> pd.DataFrame:
    frame = result.requests
    return frame.iloc[int(UNCOUNTED_SHARE * len(frame)) :]
