"""What faults cost: worker processes of a real engine are killed, stopped, stuck and asked to go while they draw images.

    python benchmarks/faults.py                                   # featherweight workers: every fault 20 times
    python benchmarks/faults.py --overload-s 60                   # and a minute of ten times the load that can be served
    python benchmarks/faults.py --model tiny --times 2
    python benchmarks/faults.py --model sdxl --devices cuda:0,cuda:0,cuda:0,cuda:0 --times 2 --limit-s 450  # one GPU is shared

One row a fault: how often it was injected, jobs submitted, lost (no end), doubled (two ends), wrong (done, with another image than
without faults on the same topology, bit by bit), retried, failed with a reason, and seconds from the fault until every worker was ready and attached again.
With GPUs also the memory of each device before the first fault, after every recovery, and when the engine has stopped.
Every fault once, then every fault again, and a row is written after each injection: ``--limit-s`` begins nothing new after so long.
The last row has what starting, attaching and draining took in all of this, and the memory of every worker.
Rows are added to ``benchmarks/results/faults.json``; those of the same model, devices and fault are replaced.
``python docs/make_engine_evidence_page.py`` makes tables of them.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fault_rows import MACHINE, RESULTS, Row, about, device_used_bytes, worker_times

from engine.allocation import Allocation, Policies, Pool
from engine.serving.engine import Engine
from engine.serving.job import ControlUse, Job, LoraUse, Outcome
from engine.serving.settings import Bounds, EngineSettings

JOBS_PER_FAULT: Final = 6
WAIT_S: Final = {"featherweight": 600.0, "tiny": 600.0, "sdxl": 180.0}
"""The longest wait for a recovery, or for jobs; a GPU that is lent for minutes must not stand still for ten."""
SIZES: Final = {"featherweight": 16, "tiny": 64, "sdxl": 1024}
STEPS: Final = {"featherweight": 12, "tiny": 4, "sdxl": 20}
BOUNDS: Final = {
    "featherweight": Bounds(
        heartbeat_s=0.1, silence_s=1.5, step_s=2.5, line_s=2.0, backoff_first_s=0.05, healthy_s=0.2
    ),
    "tiny": Bounds(heartbeat_s=0.5, silence_s=8.0, step_s=60.0, line_s=20.0, healthy_s=0.2),
    "sdxl": Bounds(heartbeat_s=0.5, silence_s=15.0, healthy_s=0.2),
}


@dataclass(frozen=True, slots=True)
class Fault:
    """A way to hurt a worker."""

    name: str
    worker_id: str
    rank: int = 0
    number: signal.Signals | None = None
    """None: its work path is made to stand still while its heart beats (featherweight workers only)."""


FAULTS: Final = (
    Fault("kill_base", "base-0", 0, signal.SIGKILL),
    Fault("kill_cfg_rank_0", "pair-0", 0, signal.SIGKILL),
    Fault("kill_cfg_rank_1", "pair-0", 1, signal.SIGKILL),
    Fault("kill_controlnet_worker", "cn-0", 0, signal.SIGKILL),
    Fault("kill_loader", "loaders-0", 0, signal.SIGKILL),
    Fault("stop_base", "base-0", 0, signal.SIGSTOP),
    Fault("stop_cfg_rank_1", "pair-0", 1, signal.SIGSTOP),
    Fault("stop_controlnet_worker", "cn-0", 0, signal.SIGSTOP),
    Fault("stuck_base", "base-0"),
    Fault("stuck_controlnet_worker", "cn-0"),
    Fault("term_base", "base-0", 0, signal.SIGTERM),
    Fault("term_controlnet_worker", "cn-0", 0, signal.SIGTERM),
)


class Bench:
    """One engine that is hurt again and again."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.model: str = options.model
        self.wait_s = WAIT_S[options.model]
        self.devices: tuple[str, ...] = tuple(options.devices.split(","))
        self.faults_dir = folder / "faults"
        self.faults_dir.mkdir()
        self.expected: dict[tuple[str, str], tuple[bytes, ...]] = {}
        extra = {"step_s": 0.005, "fetch_s": 0.02, "faults_dir": str(self.faults_dir)}
        self.engine = Engine(
            Allocation(
                pools=(
                    Pool("base", "base", 1, "any", 1, "decoupled"),
                    Pool("pair", "base", 1, "any", 2, "decoupled_cfg2"),
                    Pool("cn", "controlnet", 1, "any"),
                ),
                policies=Policies(lora_patch_by_step=0),
            ),
            EngineSettings(
                run_dir=folder / "run",
                model=options.model,
                devices=self.devices,
                options=extra if options.model == "featherweight" else {},
                bounds=BOUNDS[options.model],
                environment={} if "cuda" in options.devices else {"OMP_NUM_THREADS": "1"},
            ),
        )

    def jobs(self, tag: str, loras: str = "lora") -> list[Job]:
        """The same work each time; only the names differ, and the LoRAs if they must be fetched anew."""
        size_px = SIZES[self.model]
        return [
            Job(
                f"{tag}/{k}",
                prompt=f"prompt {k}",
                seed=k,
                n_steps=STEPS[self.model],
                width_px=size_px,
                height_px=size_px,
                controls=tuple(ControlUse(f"controlnet-{c}") for c in range(k % 3)),
                loras=tuple(LoraUse(f"{loras}-{c}", 0.5) for c in range(k % 2)),
            )
            for k in range(JOBS_PER_FAULT)
        ]

    async def start(self) -> None:
        """Starts, and draws every image once on each topology without any fault."""
        await self.engine.start()
        await self.recovered()
        self.expected = await self._undisturbed("lora")

    async def _undisturbed(self, loras: str) -> dict[tuple[str, str], tuple[bytes, ...]]:
        """Images by number of the job and topology: one of batch two and two of batch one differ in their last bits."""
        found: dict[tuple[str, str], tuple[bytes, ...]] = {}
        for job in self.jobs("undisturbed", loras):
            for _ in range(10):
                # Two at once go to two replicas.
                both = [dataclasses.replace(job, request_id=f"{copy}/{job.request_id}") for copy in (1, 2)]
                for outcome in await asyncio.gather(*(self.engine.submit(one) for one in both)):
                    if outcome.status != "done" or outcome.result is None:
                        sys.exit(f"without any fault: {outcome}")
                    found[_number(job), outcome.topology] = outcome.result.images
                if {(_number(job), topology) for topology in ("decoupled", "decoupled_cfg2")} <= set(found):
                    break
            else:
                sys.exit(f"{job.request_id} was never drawn on both topologies")
        return found

    async def recovered(self) -> None:
        """Waits until every worker is ready and attached."""
        until = time.monotonic() + self.wait_s
        replicas = self.engine.replicas.values()
        while not (all(r.is_ready for r in replicas) and self.engine.pairs.is_settled()):
            if time.monotonic() > until:
                sys.exit(
                    f"not recovered within {self.wait_s:g} s: {[(r.worker_id, r.reason) for r in replicas if not r.is_ready]}"
                )
            await asyncio.sleep(0.005)

    async def inject(self, fault: Fault, row: Row) -> None:
        """Hurts one worker in the middle of work and waits for every job and every worker."""
        tag = f"{fault.name}-{row.n_injected}"
        is_loader = self.engine.replicas[fault.worker_id].spec.role == "loader"
        jobs = self.jobs(tag, loras=tag if is_loader else "lora")
        n_doubled_before = self.engine.orders.n_unexpected_ends
        running = [asyncio.create_task(self.engine.submit(job)) for job in jobs]
        await self._mid_work(fault)
        began_s = time.monotonic()
        ready_before = self._count(fault.worker_id, "ready")
        await self._hurt(fault)
        outcomes: list[Outcome | BaseException] = await asyncio.wait_for(
            asyncio.gather(*running, return_exceptions=True), self.wait_s
        )
        await self._until(lambda: self._count(fault.worker_id, "ready") > ready_before)
        await self.recovered()
        row.recovery_s.append(time.monotonic() - began_s)
        # Without a moment of health the next fault would count as the same trouble going on, and be waited for ever longer.
        await asyncio.sleep(1.5 * BOUNDS[self.model].healthy_s)
        row.n_injected += 1
        row.n_jobs += len(jobs)
        row.n_doubled += self.engine.orders.n_unexpected_ends - n_doubled_before
        # LoRAs that a loader was to fetch were never used before: their images are drawn now, without a fault.
        expected = await self._undisturbed(tag) if is_loader else self.expected
        for job, outcome in zip(jobs, outcomes, strict=True):
            if not isinstance(outcome, Outcome):
                row.n_lost += 1
            elif outcome.status != "done" or outcome.result is None:
                row.n_failed_with_reason += bool(outcome.reason)
                row.reasons = sorted({*row.reasons, outcome.reason})
                row.n_lost += not outcome.reason
            else:
                row.n_retried += outcome.n_attempts > 1
                row.n_wrong += outcome.result.images != expected[_number(job), outcome.topology]

    async def _mid_work(self, fault: Fault) -> None:
        """Waits until the worker works on something of these jobs (a loader: half of what a featherweight fetch takes)."""
        replica = self.engine.replicas[fault.worker_id]
        if replica.spec.role == "loader":
            await asyncio.sleep(0.01)
            return
        if replica.spec.role == "base":
            await self._until(lambda: fault.worker_id in self.engine.orders.batches)
        else:
            await self._until(
                lambda: any(
                    fault.worker_id in of_rank.values()
                    for batch in self.engine.orders.batches.values()
                    for of_rank in batch.start.controlnet_workers
                )
            )
        await asyncio.sleep(0.02 if self.model == "featherweight" else 0.3)

    async def _hurt(self, fault: Fault) -> None:
        if fault.number is not None:
            self.engine.replicas[fault.worker_id].ranks[fault.rank].signal(fault.number)
            return
        stuck = self.faults_dir / f"{fault.worker_id}.stuck"
        kills_before = self._count(fault.worker_id, "kill")
        stuck.touch()
        await self._until(lambda: self._count(fault.worker_id, "kill") > kills_before)
        stuck.unlink()

    def _count(self, worker_id: str, kind: str) -> int:
        return sum(event.worker_id == worker_id and event.kind == kind for event in self.engine.events.recent)

    async def _until(self, is_so: Callable[[], bool]) -> None:
        until = time.monotonic() + self.wait_s
        while not is_so():
            if time.monotonic() > until:
                sys.exit(f"waited {self.wait_s:g} s in vain")
            await asyncio.sleep(0.002)


def _number(job: Job) -> str:
    return job.request_id.rsplit("/", 1)[1]


async def overload(bench: Bench, seconds: float) -> dict[str, Any]:
    """Ten times what can be served, for a while: everything is answered, accepted jobs in time, memory stays flat."""
    engine = bench.engine
    await engine.apply(dataclasses.replace(engine.allocation, policies=Policies(lora_patch_by_step=0, queue_limit=20)))
    await bench.recovered()
    began_s, n_done = time.monotonic(), 0
    for job in bench.jobs("rate"):
        n_done += (await engine.submit(job)).status == "done"
    # Two base replicas; one job after the other keeps one of them busy.
    capacity_per_s = 2 * n_done / (time.monotonic() - began_s)
    period_s, deadline_s = 1 / (10 * capacity_per_s), 10.0
    counts: dict[str, int] = {}
    late, resident_bytes, waiting_max = 0, [], 0
    tasks: set[asyncio.Task[Outcome]] = set()

    def ended(task: asyncio.Task[Outcome]) -> None:
        nonlocal late
        tasks.discard(task)
        outcome = task.result()
        counts[outcome.status] = counts.get(outcome.status, 0) + 1
        late += outcome.status == "done" and outcome.end_s - outcome.arrival_s > deadline_s

    began_s, k = time.monotonic(), 0
    while time.monotonic() - began_s < seconds:
        while k * period_s <= time.monotonic() - began_s:
            job = bench.jobs(f"overload-{k // JOBS_PER_FAULT}")[k % JOBS_PER_FAULT]
            task = asyncio.create_task(engine.submit(dataclasses.replace(job, deadline_s=deadline_s)))
            tasks.add(task)
            task.add_done_callback(ended)
            k += 1
        await asyncio.sleep(0.002)
        waiting_max = max(waiting_max, engine.dispatcher.snapshot().n_waiting)
        if len(resident_bytes) < int(time.monotonic() - began_s) + 1:
            resident_bytes.append(_resident_bytes())
    if tasks:
        await asyncio.wait(tasks, timeout=bench.wait_s)
    return {
        "duration_s": seconds,
        "capacity_per_s": round(capacity_per_s, 1),
        "n_jobs": k,
        "n_ended": dict(sorted(counts.items())),
        "n_lost": k - sum(counts.values()),
        "n_accepted_late": late,
        "n_waiting_max": waiting_max,
        "front_resident_mib": [round(value / 2**20, 1) for value in resident_bytes],
    }


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


async def measure(options: argparse.Namespace, keep: Callable[[dict[str, Any]], None]) -> None:
    """Runs every fault that was asked for, round after round; rows are kept after every injection."""
    until_s = time.monotonic() + options.limit_s
    with tempfile.TemporaryDirectory(prefix="diffplan-faults-") as name:
        bench = Bench(options, Path(name))
        common = {"model": options.model, "devices": list(bench.devices), **about(bench.devices)}
        before = device_used_bytes(bench.devices)
        served: list[int] = []
        try:
            await bench.start()
            served = device_used_bytes(bench.devices)
            at_rest = {"device_used_bytes_at_rest": served} if served else {}
            asked = [
                fault
                for fault in FAULTS
                if (not options.fault or fault.name in options.fault)
                and (fault.number is not None or options.model == "featherweight")
            ]
            rows = {fault.name: Row() for fault in asked}
            for fault in asked * options.times:
                if time.monotonic() > until_s:
                    print(f"left out, the time is up: {fault.name}", file=sys.stderr, flush=True)
                    continue
                row = rows[fault.name]
                await bench.inject(fault, row)
                if served:
                    row.device_used_bytes.append(device_used_bytes(bench.devices))
                keep({"fault": fault.name, **common, **row.to_plain(), **at_rest})
            if options.overload_s > 0:
                keep({"fault": "overload_10x", **common, **await overload(bench, options.overload_s)})
            keep({"fault": "worker_times", **common, **worker_times(bench.engine)})
        finally:
            await bench.engine.stop()
            if before:
                after = device_used_bytes(bench.devices)
                memory = {"before_bytes": before, "serving_bytes": served, "after_bytes": after}
                keep({"fault": "device_memory", **common, **memory})


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SIZES), default="featherweight")
    parser.add_argument("--devices", default="cpu", help="cpu, or four GPUs; one that is named twice is shared")
    parser.add_argument("--times", type=int, default=20, help="injections of each fault")
    parser.add_argument(
        "--fault", action="append", choices=[fault.name for fault in FAULTS], help="only this one; repeatable"
    )
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="no fault is injected after this")
    parser.add_argument("--overload-s", type=float, default=0.0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()

    def keep(row: dict[str, Any]) -> None:
        key = ("fault", "model", "devices")
        rows = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else []
        rows = [old for old in rows if any(old[name] != row[name] for name in key)]
        rows.append(row)
        beside = options.out.with_name(options.out.name + ".part")
        beside.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        beside.replace(options.out)
        shown = {name: value for name, value in row.items() if name not in MACHINE}
        print(json.dumps(shown, ensure_ascii=False), flush=True)

    asyncio.run(measure(options, keep))


if __name__ == "__main__":
    main()
