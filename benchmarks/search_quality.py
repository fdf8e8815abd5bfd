"""Does the search find what exhaustive search finds? Seeded spaces of 500 to 2,000 allocations, each simulated in full.

    python benchmarks/search_quality.py [--spaces 40] [--requests 1500] [--json FILE]

A space is a service (random popularity of ControlNets and LoRAs, sizes, rate, promise, profile times) with every allocation of one
in-process pool and of base and ControlNet pools up to twice what the work asks for. Exhaustive search runs all of them on the
compiled tier; the search runs on the same requests with the same service times. Reported: how often the cheapest allocation
that meets the promise has the same cost, the largest excess cost, and the share of exhaustive's simulated requests that the search took.
Every space with several cheapest allocations counts them as equal: they cost the same.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from calibrate.profile_file import load_profile  # noqa: E402
from planner.candidates import Shape, fewest_base_replicas, misfit, shapes_of  # noqa: E402
from planner.evaluation import Bench, evaluate_counts  # noqa: E402
from planner.replication import Inputs, service_table  # noqa: E402
from planner.scenario import Scenario  # noqa: E402
from planner.search import CONTROLNET_LOADS, controlnet_counts, search  # noqa: E402
from planner.service import Sizes  # noqa: E402
from planner.simulator import ProfileFacts  # noqa: E402
from planner.topology_search import Task  # noqa: E402
from tests.simulation_builders import workload_of  # noqa: E402

PROFILE = ROOT / "tests" / "data" / "provisional_profile.json"
SPACE_MIN, SPACE_MAX = 500, 2_000


@dataclass(frozen=True, slots=True)
class Space:
    """One question and every allocation that may answer it."""

    benches: dict[str, Bench]
    options: tuple[tuple[Shape, tuple[range, ...]], ...]

    def __len__(self) -> int:
        return sum(math.prod(len(counts) for counts in ranges) for _, ranges in self.options)


def make_space(seed: int, n_requests: int) -> Space | None:
    """A random service; None if no number of GPUs keeps its promise, or the space has another size than asked for."""
    rng = np.random.default_rng([20251, seed])
    rate_per_s = float(rng.uniform(10.0, 36.0))
    profile = load_profile(str(PROFILE))
    arrival_s = _arrivals(rng, n_requests, rate_per_s)
    n_controlnets = int(rng.integers(2, 9))
    popular = 1.0 / np.arange(1, n_controlnets + 1) ** rng.uniform(0.3, 1.5)
    names = np.array([f"c{k}" for k in range(n_controlnets)])
    per_request = rng.choice([0, 1, 2], n_requests, p=rng.dirichlet([1.0, 3.0, 2.0]))
    workload = workload_of(
        arrival_s.tolist(),
        n_steps=[int(k) for k in rng.choice([20, 30], n_requests)],
        n_images=[int(k) for k in rng.choice([1, 2, 4], n_requests, p=rng.dirichlet([8.0, 1.0, 1.0]))],
        base_model_id=[f"m{k}" for k in rng.zipf(rng.uniform(1.6, 3.0), n_requests) % 6],
        controlnet_ids=[
            tuple(names[rng.choice(n_controlnets, k, replace=False, p=popular / popular.sum())].tolist()) for k in per_request
        ],
        lora_ids=[tuple(f"l{k}" for k in set((rng.zipf(1.5, int(m)) % 500).tolist())) for m in rng.integers(0, 3, n_requests)],
    )  # fmt: skip
    scenario = Scenario.model_validate({
        "name": f"space {seed}", "traffic": {"trace": "none"}, "profile": {"name": str(PROFILE), "extrapolate": True},
        "slo": {"latency_s": float(rng.uniform(6.0, 25.0)), "attainment_ratio": float(rng.choice([0.9, 0.95, 0.99]))},
        "simulation": {"warmup_s": 30.0},
    })  # fmt: skip
    inputs = Inputs(
        profile,
        Sizes.from_profile(profile, lora_bytes=178 * 2**20),
        ProfileFacts.from_profile(profile),
        profile.gpu_kind,
    )
    benches, options = {}, []
    for topology in ("colocated", "decoupled"):
        service = service_table(scenario, inputs, workload, topology, draw=None, noise_seed=seed)
        if misfit(topology, workload, service, inputs.sizes, inputs.facts, scenario) is not None:
            continue
        benches[topology] = Bench.of(scenario, inputs, workload, service)
        low = fewest_base_replicas(workload, service, scenario.slo.latency_s, scenario.slo.attainment_ratio)
        shape = shapes_of(scenario, topology, workload, service, inputs.sizes, inputs.facts, inputs.gpu_kind)[0]
        ranges = [range(low, math.ceil(2.2 * low) + 8)]
        ranges += [range(1, math.ceil(2.2 * load) + 5) for load in shape.controlnet_loads]
        options.append((shape, tuple(ranges)))
    space = Space(benches, tuple(options))
    return space if SPACE_MIN <= len(space) <= SPACE_MAX else None


def _arrivals(rng: np.random.Generator, n: int, rate_per_s: float) -> np.ndarray:
    """Poisson whose rate swings by up to half: some spaces are bursty."""
    swing = rng.uniform(0.0, 0.5)
    gaps = rng.exponential(1.0, n)
    phase = np.linspace(0, 4 * np.pi, n)
    return np.cumsum(gaps / (rate_per_s * (1 + swing * np.sin(phase))))


Found = dict[str, int | None]
"""Topology to the GPUs of its cheapest allocation that meets the promise; None if none does."""


def exhaustive(space: Space) -> tuple[Found, int]:
    """What every allocation's simulation says, and how many there were."""
    best: Found = {}
    n = 0
    for shape, ranges in space.options:
        bench = space.benches[shape.topology]
        target = bench.scenario.slo.attainment_ratio
        good = []
        for counts in product(*ranges):
            n += 1
            if evaluate_counts(bench, shape, counts).attainment_ratio >= target:
                good.append(sum(counts))
        best[shape.topology] = min(good, default=None)
    return best, n


def searched(space: Space) -> tuple[Found, int]:
    """The same by the search that plans use."""
    best: Found = {}
    n = 0
    for shape, _ in space.options:
        bench = space.benches[shape.topology]
        slo = bench.scenario.slo
        low = fewest_base_replicas(bench.workload, bench.service, slo.latency_s, slo.attainment_ratio)
        task = Task(bench, low)
        evaluator = task.evaluator(shape)
        start = task.informed_screen(evaluator, controlnet_counts(shape, CONTROLNET_LOADS[0]))
        found = search(shape, evaluator, start, low)
        n += len(evaluator.seen)
        best[shape.topology] = found.best.n_gpus if found.best is not None else None
    return best, n


def cheapest(found: Found) -> int | None:
    """GPUs of the cheapest topology."""
    return min((n_gpus for n_gpus in found.values() if n_gpus is not None), default=None)


def main() -> None:
    """Runs the spaces, prints a row each, writes them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--spaces", type=int, default=40)
    parser.add_argument("--requests", type=int, default=1_500)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "search_quality.json")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    seed = 0
    while len(rows) < options.spaces:
        space = make_space(seed, options.requests)
        seed += 1
        if space is None:
            continue
        began = time.perf_counter()
        best, n_all = exhaustive(space)
        all_s = time.perf_counter() - began
        optimum = cheapest(best)
        if optimum is None:
            continue
        began = time.perf_counter()
        found, n_seen = searched(space)
        got = cheapest(found)
        rows.append({
            "seed": seed - 1, "allocations": len(space), "optimum_gpus": optimum, "found_gpus": got,
            "excess_ratio": None if got is None else round(got / optimum - 1, 4), "by_topology": best, "found_by_topology": found,
            "simulated": n_seen, "simulated_ratio": round(n_seen / n_all, 4),
            "search_s": round(time.perf_counter() - began, 2), "exhaustive_s": round(all_s, 2),
        })  # fmt: skip
        row = rows[-1]
        sys.stdout.write(
            f"space {row['seed']:3d}: {row['allocations']:5d} allocations, optimum {optimum:3d} GPUs, found {got}; "
            f"by topology {best}, found {found}; "
            f"{row['simulated_ratio']:.1%} of the simulated requests\n"
        )
        sys.stdout.flush()
    equal = sum(row["found_gpus"] == row["optimum_gpus"] for row in rows) / len(rows)
    worst = max(math.inf if row["excess_ratio"] is None else row["excess_ratio"] for row in rows)
    pairs = [(row["by_topology"][name], row["found_by_topology"][name]) for row in rows for name in row["by_topology"]]
    equal_each = sum(a == b for a, b in pairs) / len(pairs)
    share = sum(row["simulated"] for row in rows) / sum(row["allocations"] for row in rows)
    sys.stdout.write(
        f"optimum found in {equal:.1%} (of each topology's own optima {equal_each:.1%}); worst excess {worst:.1%}; {share:.1%} of the exhaustive simulated requests, "
        f"at most {max(row['simulated_ratio'] for row in rows):.1%} in one space\n"
    )
    record = {
        "benchmark": "search_quality", "python": platform.python_version(), "numpy": np.__version__,
        "requests_per_space": options.requests, "spaces_passed_over": seed - len(rows), "equal_ratio": round(equal, 4), "equal_by_topology_ratio": round(equal_each, 4),
        "worst_excess_ratio": None if math.isinf(worst) else worst, "simulated_ratio": round(share, 4), "rows": rows,
    }  # fmt: skip
    options.json.parent.mkdir(parents=True, exist_ok=True)
    beside = options.json.with_suffix(".tmp")
    beside.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    beside.replace(options.json)


if __name__ == "__main__":
    main()
