"""Simulated requests per second, as ratios to a textbook SimPy M/G/c (one process a request, one Resource) in the same run.

    python benchmarks/simulator_speed.py [--requests 100000] [--rounds 5] [--json FILE]

Rounds are interleaved; each row carries the median and the range. Simulation only: the workload and the service table are
built before, their seconds are given beside. Peak memory is the process' own.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import simpy

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from calibrate.profile_file import load_profile  # noqa: E402
from engine.allocation import Allocation  # noqa: E402
from planner.service import ServiceTable, Sizes, build_service  # noqa: E402
from planner.simulator import ProfileFacts, simulate  # noqa: E402
from planner.workload import Workload  # noqa: E402
from tests.simulation_builders import base_pool, controlnet_pool, workload_of  # noqa: E402

PROFILE = ROOT / "tests" / "data" / "provisional_profile.json"


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


def cases(n: int) -> dict[str, tuple[Callable[[], object], float]]:
    """Name to what is timed and the seconds its preparation took."""
    rng = np.random.default_rng(1)
    profile = load_profile(str(PROFILE))
    sizes = Sizes.from_profile(profile, lora_bytes=200 * 2**20)
    facts = ProfileFacts.from_profile(profile)
    arrival_s = np.cumsum(rng.exponential(1.0, n))
    service_s = rng.lognormal(0.0, 0.5, n)
    service_s *= 8 * 0.8 / service_s.mean()
    found: dict[str, tuple[Callable[[], object], float]] = {
        "textbook SimPy M/G/8, load 0.8": (lambda: textbook(arrival_s, service_s, 8), 0.0)
    }

    def ours(name: str, workload: Workload, pools: tuple[Any, ...], service: ServiceTable, began: float) -> None:
        allocation = Allocation(pools)
        prepared_s = time.perf_counter() - began
        found[name] = (lambda: simulate(workload, allocation, {"base": service}, sizes, facts), prepared_s)

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


def main() -> None:
    """Times every case, prints a table, writes rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "simulator_speed.json")
    options = parser.parse_args()
    todo = cases(options.requests)
    per_s: dict[str, list[float]] = {name: [] for name in todo}
    n_events: dict[str, int] = {}
    for _ in range(options.rounds):
        for name, (work, _prepared) in todo.items():
            began = time.perf_counter()
            outcome = work()
            per_s[name].append(options.requests / (time.perf_counter() - began))
            n_events[name] = getattr(outcome, "n_events", 0)
    peer = statistics.median(next(iter(per_s.values())))
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    rows = []
    for name, values in per_s.items():
        median = statistics.median(values)
        rows.append({
            "case": name, "n_requests": options.requests, "requests_per_s": round(median),
            "requests_per_s_low": round(min(values)), "requests_per_s_high": round(max(values)),
            "ratio_to_textbook": round(median / peer, 3), "n_events": n_events[name], "prepared_s": round(todo[name][1], 2),
        })  # fmt: skip
        sys.stdout.write(f"{median:>10,.0f} requests/s  {median / peer:6.2f}x  {name}\n")
    sys.stdout.write(f"peak memory of all cases together: {peak_gib:.2f} GiB\n")
    record = {
        "benchmark": "simulator_speed", "python": platform.python_version(), "simpy": simpy.__version__,
        "numpy": np.__version__, "machine": platform.machine(), "rounds": options.rounds, "peak_gib": round(peak_gib, 2),
        "rows": rows,
    }  # fmt: skip
    options.json.parent.mkdir(parents=True, exist_ok=True)
    beside = options.json.with_suffix(".tmp")
    beside.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    beside.replace(options.json)


if __name__ == "__main__":
    main()
