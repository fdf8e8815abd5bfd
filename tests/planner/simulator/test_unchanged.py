"""With every mechanism off, the logs are what they were before there were any: to the byte, on shipped scenarios."""

from __future__ import annotations

import hashlib
import io

import pytest

from planner.candidates import shapes_of
from planner.replication import load_inputs, service_table
from planner.scenario import load_scenario
from planner.simulator import SimulationResult, simulate
from planner.traffic import build_traffic, busiest_stretch

# sha256 of the request and worker tables as CSV (shortest round-trip decimals), taken before the first mechanism was added
GOLDEN = {
    ("small", "diffusers", (3,)): "b6ccc681c1fac600332d7140e115a03a",
    ("small", "colocated", (2,)): "9a98d3ae36930d3902a0404d249365fc",
    ("small", "decoupled", (2, 2)): "d70925240fdca04527d4768200b1a051",
    ("provider_fast", "diffusers_tuned", (30,)): "f345be638486ce958fd27a82aa48b500",
    ("provider_fast", "decoupled", (22, 12)): "3117635aacc36b6bd6a72a53f512de2f",
}
N_REQUESTS = 2_000


def digest(result: SimulationResult) -> str:
    sha = hashlib.sha256()
    for table in (result.requests, result.workers):
        buffer = io.StringIO()
        table.to_csv(buffer, index=False)
        sha.update(buffer.getvalue().encode())
    return sha.hexdigest()[:32]


def simulated(name: str, topology: str, counts: tuple[int, ...]) -> SimulationResult:
    scenario, folder = load_scenario(f"sample:{name}")
    inputs = load_inputs(scenario, folder)
    workload = busiest_stretch(build_traffic(scenario, folder).workload, N_REQUESTS)
    service = service_table(scenario, inputs, workload, topology, draw=None, noise_seed=7)  # type: ignore[arg-type]
    shape = shapes_of(scenario, topology, workload, service, inputs.sizes, inputs.facts, inputs.gpu_kind)[0]  # type: ignore[arg-type]
    return simulate(workload, shape.allocation(counts), {"base": service}, inputs.sizes, inputs.facts)


@pytest.mark.parametrize(("name", "topology", "counts"), GOLDEN)
def test_logs_without_mechanisms_are_the_recorded_bytes(name: str, topology: str, counts: tuple[int, ...]) -> None:
    assert digest(simulated(name, topology, counts)) == GOLDEN[name, topology, counts]
