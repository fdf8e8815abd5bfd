"""With every mechanism off, the logs are what they were before there were any: to the byte, on shipped scenarios."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import pytest

from planner.candidates import shapes_of
from planner.replication import load_inputs, service_table
from planner.scenario import load_scenario
from planner.simulator import SimulationResult, simulate
from planner.traffic import build_traffic, busiest_stretch

# sha256 of the request and worker tables as CSV (shortest round-trip decimals), of a profile that never changes. The simulator
# before the first mechanism wrote the same bytes on the same service times (those of our engine have changed since: several LoRAs
# are put on the weights together) and with the same rates of shared workers (since then clients of unequal pace wait in passing).
GOLDEN = {
    ("small", "diffusers", (3,)): "5dfb781c8a65467611962659ce13a28a",
    ("small", "colocated", (2,)): "e4e1d650ed2b7d50c8061a106717fdb5",
    ("small", "decoupled", (2, 2)): "90cc233bb75fa3e785eff718fd9dea00",
    ("provider_fast", "diffusers_tuned", (30,)): "a66bcbd1bf1e28fedbeb7a7787597c9c",
    ("provider_fast", "decoupled", (22, 12)): "678182bce755e3209a498018210446ea",
}
PROFILE = Path(__file__).parents[2] / "data" / "provisional_profile.json"
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
    profile = scenario.profile.model_copy(update={"name": str(PROFILE), "extrapolate": True})
    scenario = scenario.model_copy(update={"profile": profile})
    inputs = load_inputs(scenario, folder)
    workload = busiest_stretch(build_traffic(scenario, folder).workload, N_REQUESTS)
    service = service_table(scenario, inputs, workload, topology, draw=None, noise_seed=7)  # type: ignore[arg-type]
    shape = shapes_of(scenario, topology, workload, service, inputs.sizes, inputs.facts, inputs.gpu_kind)[0]  # type: ignore[arg-type]
    return simulate(workload, shape.allocation(counts), {"base": service}, inputs.sizes, inputs.facts)


@pytest.mark.parametrize(("name", "topology", "counts"), GOLDEN)
def test_logs_without_mechanisms_are_the_recorded_bytes(name: str, topology: str, counts: tuple[int, ...]) -> None:
    assert digest(simulated(name, topology, counts)) == GOLDEN[name, topology, counts]
