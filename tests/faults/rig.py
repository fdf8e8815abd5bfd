"""What the fault tests share: allocations, seeded jobs, faults on real worker processes, and the check of every outcome."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.allocation import Allocation, Policies, Pool
from engine.serving.dispatcher import DispatchLimits
from engine.serving.engine import Engine
from engine.serving.job import ControlUse, Job, LoraUse, Outcome
from engine.serving.settings import Bounds, EngineSettings
from engine.workers.featherweight_arithmetic import reference_images

BOUNDS = Bounds(
    heartbeat_s=0.1,
    silence_s=1.5,
    hello_s=30.0,
    load_s=20.0,
    step_s=2.5,
    decode_s=2.5,
    fetch_s=2.5,
    ready_s=30.0,
    line_s=2.0,
    lora_wait_s=8.0,
    stop_s=3.0,
    drain_s=10.0,
    join_s=20.0,
    backoff_first_s=0.02,
    backoff_max_s=0.3,
    healthy_s=0.5,
    reattach_s=0.02,
)
TEST_S = 60.0
"""Nothing in these tests takes longer, or the test fails."""


def run(test: Callable[[], Coroutine[Any, Any, None]], limit_s: float = TEST_S) -> None:
    """Runs an asynchronous test within a time limit."""
    asyncio.run(asyncio.wait_for(test(), limit_s))


def allocation(
    *,
    colocated: int = 0,
    decoupled: int = 0,
    pairs: int = 0,
    controlnets: int = 0,
    policies: Policies | None = None,
    controlnet_ids: Sequence[str] = ("*",),
) -> Allocation:
    """Pools with so many replicas; those with none are left out."""
    pools = []
    if colocated:
        pools.append(Pool("solo", "base", colocated, "cpu", 1, "colocated"))
    if decoupled:
        pools.append(Pool("base", "base", decoupled, "cpu", 1, "decoupled"))
    if pairs:
        pools.append(Pool("pair", "base", pairs, "cpu", 2, "decoupled_cfg2"))
    if controlnets:
        pools.append(Pool("cn", "controlnet", controlnets, "cpu", controlnet_ids=tuple(controlnet_ids)))
    return Allocation(pools=tuple(pools), policies=policies or Policies(lora_patch_by_step=3))


@contextlib.asynccontextmanager
async def engine(
    folder: Path,
    plan: Allocation,
    *,
    options: Mapping[str, Any] | None = None,
    bounds: Bounds = BOUNDS,
    limits: DispatchLimits | None = None,
    **settings: Any,
) -> AsyncIterator[Engine]:
    """An engine of featherweight workers that may be told to misbehave through files in ``folder/faults``."""
    faults = folder / "faults"
    faults.mkdir(parents=True, exist_ok=True)
    made = Engine(
        plan,
        EngineSettings(
            run_dir=folder / "run",
            model="featherweight",
            options={"step_s": 0.002, "faults_dir": str(faults), **(options or {})},
            bounds=bounds,
            **settings,
        ),
        limits=limits or DispatchLimits(request_limit_s=40.0),
    )
    try:
        await made.start()
        yield made
    finally:
        await made.stop()


def job(name: str, seed: int = 0, **changes: Any) -> Job:
    """A small job."""
    return replace(Job(request_id=name, prompt=name, n_steps=6, width_px=16, height_px=16, seed=seed), **changes)


def drawn_job(name: str, rng: np.random.Generator, *, has_controls: bool = True) -> Job:
    """A job with random add-ons, guidance, batch and steps."""
    controls = tuple(
        ControlUse(f"c{rng.integers(4)}", float(rng.uniform(0.2, 1.5)), 0.0, float(rng.choice([0.6, 1.0])))
        for _ in range(int(rng.integers(3)) if has_controls else 0)
    )
    loras = tuple(LoraUse(f"l{k}", float(rng.uniform(0.2, 1.0))) for k in rng.permutation(6)[: rng.integers(3)])
    return job(
        name,
        int(rng.integers(2**31)),
        n_images=int(rng.integers(1, 3)),
        n_steps=int(rng.integers(3, 9)),
        guidance_scale=float(rng.choice([1.0, 5.0])),
        controls=controls,
        loras=loras,
    )


def check_done(asked: Job, outcome: Outcome) -> None:
    """The job was done and its images are those of the fault-free function, bit by bit."""
    assert outcome.status == "done", outcome
    assert outcome.result is not None
    step = outcome.result.lora_patch_step
    assert (step is None) == (not asked.loras), outcome
    assert list(outcome.result.images) == reference_images(asked, step), (
        f"{asked} on {outcome.worker_id}, patched before {step}"
    )


def check_books(made: Engine) -> None:
    """Nothing lost, nothing doubled: every submitted job has ended once and nothing runs."""
    snapshot = made.dispatcher.snapshot()
    assert made.orders.n_unexpected_ends == 0
    assert not made.orders.waiters
    assert sum(snapshot.n_ended.values()) == snapshot.n_submitted
    assert snapshot.n_waiting == 0


async def until(is_so: Callable[[], bool], what: str, limit_s: float = 20.0) -> None:
    """Waits for something; fails with its name if it does not come."""
    for _ in range(int(limit_s / 0.01)):
        if is_so():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"after {limit_s} s: {what}")


def send_signal(made: Engine, worker_id: str, number: signal.Signals, rank: int = 0) -> int:
    """Signals one process of a replica, a child of this test, if it still runs; returns its id."""
    handle = made.replicas[worker_id].ranks[rank]
    handle.signal(number)
    return handle.pid


async def all_ready(made: Engine) -> None:
    """Waits until every replica is ready and attached."""
    await until(
        lambda: all(replica.is_ready for replica in made.replicas.values()) and made.pairs.is_settled(), "all are ready"
    )


@dataclass
class Tally:
    """What became of the jobs of fault schedules."""

    statuses: dict[str, int] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)

    def count(self, outcome: Outcome) -> None:
        """Adds an outcome."""
        self.statuses[outcome.status] = self.statuses.get(outcome.status, 0) + 1
