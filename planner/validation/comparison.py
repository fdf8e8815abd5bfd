"""One replay against its simulation, and against a second replay where there is one: everything that the report says of it."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from planner.simulator import SimulationResult
from planner.statistics import Metrics, summarise
from planner.validation.bounds import Band, Check, band_of, busy_checks, is_past_saturation, latency_checks, load_of
from planner.validation.engine_run import EngineRun
from planner.validation.gaps import (
    Gap,
    Pairing,
    StageGap,
    carrier,
    latency_gaps,
    pair,
    service_gaps,
    stage_gaps,
    stage_quantiles,
    tail_of,
    wait_gaps,
)
from planner.validation.simulated import Simulated

CLASS_REQUESTS_MIN: Final = 20
QUEUE: Final = "queue_wait_s"


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """One replay, measured and simulated; ``floor`` fields compare it with the second replay and are None without one."""

    run: EngineRun
    against: str | None
    """Name of the second replay."""
    load: float
    band: Band
    pairing: Pairing
    again: Pairing | None
    latency: Mapping[str, Gap]
    floor: Mapping[str, Gap] | None
    wait: Mapping[str, Gap]
    wait_floor: Mapping[str, Gap] | None
    service: Mapping[str, Gap]
    """Take-up to end: what is left of the latency without the queue."""
    classes: Mapping[str, Mapping[str, Gap]]
    """``plain``, ``controlnet``, ``lora``, ``controlnet_and_lora``, and by images and topology, where there are enough requests."""
    class_sizes: Mapping[str, int]
    stages: tuple[StageGap, ...]
    stages_floor: tuple[StageGap, ...] | None
    tail_stages: tuple[StageGap, ...]
    stage_quantiles: Mapping[str, Mapping[str, tuple[float, float]]]
    measured: Metrics
    simulated: Metrics
    """Of the first repetition: counts and hits do not depend on service noise but through queues."""
    busy: Mapping[str, tuple[float, float]]
    """Pool to measured and simulated share of the time in which it loaded or worked."""
    is_saturated: tuple[bool, bool]
    """Measured and simulated."""
    checks: tuple[Check, ...]
    grades: Mapping[str, str]
    n_repetitions: int

    @property
    def carrier(self) -> str:
        """Stage that carries the gap of the mean."""
        return carrier(self.stages)

    @property
    def service_carrier(self) -> str:
        """Likewise without the queue, whose waits follow from all the others."""
        return carrier([stage for stage in self.stages if stage.stage != QUEUE])

    @property
    def tail_carrier(self) -> str:
        """Stage that carries the gap of the slowest tenth."""
        return carrier(self.tail_stages)

    @property
    def is_verdict_shared(self) -> bool:
        """Whether engine and simulator agree on saturation."""
        return self.is_saturated[0] == self.is_saturated[1]

    @property
    def holds(self) -> bool:
        """Whether every bound is kept."""
        return self.is_verdict_shared and all(check.holds for check in self.checks)


def compare(run: EngineRun, simulated: Simulated, again: EngineRun | None, seed: int) -> Comparison:
    """Puts a replay beside its simulation."""
    seed = zlib.crc32(f"{seed} {run.name}".encode())
    pairing = pair(run.log.requests, [log.requests for log in simulated.logs])
    second = None if again is None else pair(run.log.requests, [again.log.requests])
    n_replicas = sum(pool.n_replicas for pool in run.allocation.pools_of("base"))
    load = load_of(run.log, n_replicas)
    band = band_of(load)
    latency = latency_gaps(pairing, seed)
    floor = None if second is None else latency_gaps(second, seed)
    measured_busy = _occupied(run.log)
    repeated = [_occupied(log) for log in simulated.logs]
    simulated_busy = {pool: float(np.mean([each.get(pool, 0.0) for each in repeated])) for pool in measured_busy}
    again_busy = None if again is None else _occupied(again.log)
    votes = [is_past_saturation(log, n_replicas) for log in simulated.logs]
    groups = _classes(pairing)
    return Comparison(
        run=run,
        against=None if again is None else again.name,
        load=load,
        band=band,
        pairing=pairing,
        again=second,
        latency=latency,
        floor=floor,
        wait=wait_gaps(pairing, seed),
        wait_floor=None if second is None else wait_gaps(second, seed),
        service=service_gaps(pairing, seed),
        classes={name: latency_gaps(group, seed) for name, group in groups.items()},
        class_sizes={name: len(group) for name, group in groups.items()},
        stages=stage_gaps(pairing, seed),
        stages_floor=None if second is None else stage_gaps(second, seed),
        tail_stages=stage_gaps(tail_of(pairing), seed),
        stage_quantiles=stage_quantiles(pairing),
        measured=summarise(run.log, float("inf")),
        simulated=summarise(simulated.logs[0], float("inf")),
        busy={pool: (measured_busy[pool], simulated_busy[pool]) for pool in measured_busy},
        is_saturated=(is_past_saturation(run.log, n_replicas), 2 * sum(votes) > len(votes)),
        checks=(*latency_checks(band, latency, floor), *busy_checks(band, measured_busy, simulated_busy, again_busy)),
        grades={law: str(grade) for law, grade in simulated.grades.items()},
        n_repetitions=len(simulated.logs),
    )


def _occupied(log: SimulationResult) -> dict[str, float]:
    """Pool to the share of the offered window in which its workers worked or loaded.

    Together, because an engine counts waiting for a LoRA as work and a simulation as loading.
    """
    metrics = summarise(log, float("inf"))
    return {pool: metrics.busy_ratio[pool] + metrics.loading_ratio.get(pool, 0.0) for pool in metrics.busy_ratio}


def _classes(pairing: Pairing) -> dict[str, Pairing]:
    frame = pairing.measured
    has_nets = frame["n_controlnets"].to_numpy(np.int64) > 0
    has_loras = frame["n_loras"].to_numpy(np.int64) > 0
    rows = {
        "plain": ~has_nets & ~has_loras,
        "controlnet": has_nets & ~has_loras,
        "lora": ~has_nets & has_loras,
        "controlnet_and_lora": has_nets & has_loras,
    }
    images = frame["n_images"].to_numpy(np.int64)
    if len(np.unique(images)) > 1:
        rows |= {f"{n} images": images == n for n in np.unique(images)}
    topology = frame["topology"].to_numpy(dtype=object)
    if len(set(topology)) > 1:
        rows |= {f"topology {name}": topology == name for name in sorted(set(topology))}
    return {name: pairing.where(kept) for name, kept in rows.items() if int(kept.sum()) >= CLASS_REQUESTS_MIN}
