"""Simulated requests per second, as ratios to a textbook SimPy M/G/c (one process a request, one Resource) in the same run.

    python benchmarks/simulator_speed.py [--requests 100000] [--rounds 5] [--json FILE]

Every case runs on the SimPy model and on the compiled tier; rounds are interleaved, each row carries the median and the range.
Simulation only: the workload and the service table are built before, their seconds are given beside; the first compiled run, which
may compile, is not timed with the others but has a row of its own. Two long runs follow, each in a process of its own with its peak
memory: 10 million requests of one day, and 1 million requests with ControlNets and LoRAs.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numba
import numpy as np
import simpy

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from calibrate.profile_file import load_profile  # noqa: E402
from engine.allocation import Allocation  # noqa: E402
from planner.fast import prepare, simulate_fast  # noqa: E402
from planner.service import ServiceTable, Sizes, build_service  # noqa: E402
from planner.simulator import ProfileFacts, simulate  # noqa: E402
from planner.workload import Workload  # noqa: E402
from tests.simulation_builders import base_pool, controlnet_pool, workload_of  # noqa: E402

PROFILE = ROOT / "tests" / "data" / "provisional_profile.json"
TEXTBOOK = "textbook SimPy M/G/8, load 0.8"
DAY = "compiled: 10 million requests of one day, 400 replicas"
LONG_MIXED = "compiled: 1 million requests with ControlNets and LoRAs, decoupled"


def textbook(arrival_s: np.ndarray, service_s: np.ndarray, n_servers: int) -> None:
    """M/G/c as in SimPy's tutorial."""
    env = simpy.Environment()
    servers = simpy.Resource(env, n_servers)
    waits = []

    def customer(need_s: float) -> Generator[Any, Any, None]:
        came_s = env.now
        with servers.request() as turn:
            yield turn
            waits.append(env.now - came_s)
            yield env.timeout(need_s)

    def source() -> Generator[Any, Any, None]:
        for now_s, need_s in zip(arrival_s.tolist(), service_s.tolist(), strict=True):
            yield env.timeout(now_s - env.now)
            env.process(customer(need_s))

    env.process(source())
    env.run()


@dataclass(frozen=True)
class Case:
    """One thing to time, and what it is compared with."""

    work: Callable[[], object]
    prepared_s: float
    peer: str = TEXTBOOK


def cases(n: int) -> dict[str, Case]:
    """Name to case; the SimPy model and the compiled tier in turn."""
    rng = np.random.default_rng(1)
    profile = load_profile(str(PROFILE))
    sizes = Sizes.from_profile(profile, lora_bytes=200 * 2**20)
    facts = ProfileFacts.from_profile(profile)
    arrival_s = np.cumsum(rng.exponential(1.0, n))
    service_s = rng.lognormal(0.0, 0.5, n)
    service_s *= 8 * 0.8 / service_s.mean()
    found = {TEXTBOOK: Case(lambda: textbook(arrival_s, service_s, 8), 0.0)}

    def ours(name: str, workload: Workload, pools: tuple[Any, ...], service: ServiceTable, began: float) -> None:
        allocation = Allocation(pools)
        prepared_s = time.perf_counter() - began
        services = {"base": service}
        found[name] = Case(lambda: simulate(workload, allocation, services, sizes, facts), prepared_s)
        began = time.perf_counter()
        flat = prepare(workload, [service])
        flat_s = prepared_s + time.perf_counter() - began
        work = lambda: simulate_fast(flat, allocation, services, sizes, facts)  # noqa: E731
        found[f"compiled: {name}"] = Case(work, flat_s, name)

    began = time.perf_counter()
    plain = workload_of(arrival_s)
    ours("ours, the same M/G/8", plain, (base_pool(8),), ServiceTable.from_service_s(plain, service_s), began)

    loras = [tuple(f"l{k}" for k in rng.zipf(1.4, 2) % 2000) for _ in range(n)]
    popular = 1.0 / np.arange(1, 11)
    controlnets = [
        tuple(f"c{k}" for k in rng.choice(10, count, replace=False, p=popular / popular.sum()))
        for count in rng.choice([0, 1, 2], n, p=[0.2, 0.4, 0.4])
    ]
    checkpoints = [f"m{k}" for k in rng.zipf(1.5, n) % 40]
    images = rng.choice([1, 2, 4], n, p=[0.7, 0.2, 0.1]).tolist()
    dense_s = (arrival_s / 14.0).tolist()
    began = time.perf_counter()
    mixed = workload_of(dense_s, n_steps=30, base_model_id=checkpoints, controlnet_ids=controlnets, lora_ids=loras)
    table = build_service(mixed, "colocated", profile, sizes)
    ours("colocated, 40 base replicas: checkpoints, ControlNets, LoRAs", mixed, (base_pool(40),), table, began)
    for name, size in (("one image each", 1), ("1, 2 or 4 images", images)):
        began = time.perf_counter()
        shared = workload_of(dense_s, n_steps=30, n_images=size, controlnet_ids=controlnets, lora_ids=loras)
        table = build_service(shared, "decoupled", profile, sizes)
        n_base = 24 if size == 1 else 40
        pools = (base_pool(n_base, "decoupled"), controlnet_pool(n_base // 3))
        ours(f"decoupled, {n_base} bases share {n_base // 3} ControlNet workers, {name}", shared, pools, table, began)
    return found


def long_run(name: str) -> dict[str, Any]:
    """One of the two long runs, in this process: seconds of simulating and of everything, peak memory."""
    began = time.perf_counter()
    rng = np.random.default_rng(2)
    profile = load_profile(str(PROFILE))
    sizes, facts = Sizes.from_profile(profile, lora_bytes=200 * 2**20), ProfileFacts.from_profile(profile)
    if name == DAY:
        n = 10_000_000
        hour = np.arange(24)
        per_hour = 1.0 + 0.6 * np.sin((hour - 9) / 24 * 2 * np.pi)  # a daily rhythm
        arrival_s = np.sort((rng.choice(24, n, p=per_hour / per_hour.sum()) + rng.random(n)) * 3600.0)
        service_s = rng.lognormal(0.0, 0.3, n)
        service_s *= 2.0 / service_s.mean()
        workload = replace(
            workload_of([0.0], base_model_id="m"), request_ids=("",) * n, request_key=np.zeros(n, dtype=np.uint64),
            arrival_s=arrival_s, checkpoint=np.zeros(n, dtype=np.int64), controlnets=((),) * n, control_steps=((),) * n,
            loras=((),) * n, n_steps=np.ones(n, dtype=np.int64), n_images=np.ones(n, dtype=np.int64),
            forward_batch=np.full(n, 2), megapixels=np.ones(n), deadline_s=np.full(n, np.nan), tenant=np.zeros(n, dtype=np.int64),
            duration_s=86_400.0,
        )  # fmt: skip
        service = ServiceTable.from_service_s(workload, service_s)
        pools: tuple[Any, ...] = (base_pool(400),)
    else:
        n = 1_000_000
        tail = [tuple(f"l{k}" for k in pair) for pair in (rng.zipf(1.4, (n, 2)) % 2000).tolist()]
        pick = rng.integers(0, 3, n)
        sets = np.array([(), ("c0",), ("c1", "c2")], dtype=object)
        workload = workload_of(
            np.cumsum(rng.exponential(1 / 7.0, n)), n_steps=30, controlnet_ids=list(sets[pick]), lora_ids=tail
        )
        service = build_service(workload, "decoupled", profile, sizes)
        pools = (base_pool(30, "decoupled"), controlnet_pool(10))
    built_s = time.perf_counter() - began
    began = time.perf_counter()
    run = simulate_fast(prepare(workload, [service]), Allocation(pools), {"base": service}, sizes, facts)
    simulated_s = time.perf_counter() - began
    return {
        "case": name, "n_requests": n, "simulated_s": round(simulated_s, 2), "built_s": round(built_s, 2),
        "requests_per_s": round(n / simulated_s), "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "n_events": run.n_events, "n_replicas": pools[0].n_replicas,
    }  # fmt: skip


def main() -> None:
    """Times every case, prints a table, writes rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "simulator_speed.json")
    parser.add_argument("--long-run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.long_run:
        sys.stdout.write(json.dumps(long_run(options.long_run)))
        return
    todo = cases(options.requests)
    began = time.perf_counter()
    next(case for name, case in todo.items() if name.startswith("compiled")).work()
    compiled_s = time.perf_counter() - began
    for case in todo.values():
        if case.peer != TEXTBOOK:
            case.work()
    per_s: dict[str, list[float]] = {name: [] for name in todo}
    n_events: dict[str, int] = {}
    for _ in range(options.rounds):
        for name, case in todo.items():
            began = time.perf_counter()
            outcome = case.work()
            per_s[name].append(options.requests / (time.perf_counter() - began))
            n_events[name] = getattr(outcome, "n_events", 0)
    medians = {name: statistics.median(values) for name, values in per_s.items()}
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    rows = []
    for name, values in per_s.items():
        # the ratio of one round's two runs, then the median: a disturbance of a shared machine hits both
        peer = todo[name].peer
        ratio = statistics.median(ours / theirs for ours, theirs in zip(values, per_s[peer], strict=True))
        rows.append({
            "case": name, "n_requests": options.requests, "requests_per_s": round(medians[name]),
            "requests_per_s_low": round(min(values)), "requests_per_s_high": round(max(values)),
            "ratio_to_textbook": round(medians[name] / medians[TEXTBOOK], 3), "peer": peer, "ratio_to_peer": round(ratio, 2),
            "n_events": n_events[name], "prepared_s": round(todo[name].prepared_s, 2),
        })  # fmt: skip
        sys.stdout.write(
            f"{medians[name]:>12,.0f} requests/s  {ratio:7.2f}x {'SimPy model' if peer != TEXTBOOK else 'textbook'}  {name}\n"
        )
    sys.stdout.write(f"peak memory of all cases together: {peak_gib:.2f} GiB; first compiled call {compiled_s:.1f} s\n")
    long_rows = []
    for name in (DAY, LONG_MIXED):
        command = [sys.executable, __file__, "--long-run", name]
        long_rows.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
        row = long_rows[-1]
        sys.stdout.write(
            f"{row['requests_per_s']:>12,.0f} requests/s  {row['simulated_s']:.1f} s, peak {row['peak_gib']:.2f} GiB  {name}\n"
        )
    record = {
        "benchmark": "simulator_speed", "python": platform.python_version(), "simpy": simpy.__version__,
        "numpy": np.__version__, "numba": numba.__version__, "machine": platform.machine(), "rounds": options.rounds,
        "peak_gib": round(peak_gib, 2), "first_compiled_call_s": round(compiled_s, 1), "rows": rows, "long_runs": long_rows,
    }  # fmt: skip
    options.json.parent.mkdir(parents=True, exist_ok=True)
    beside = options.json.with_suffix(".tmp")
    beside.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    beside.replace(options.json)


if __name__ == "__main__":
    main()
