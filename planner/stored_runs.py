"""One repetition of an allocation by the SimPy model, from the run store if it was simulated before."""

from __future__ import annotations

from pathlib import Path

from engine.allocation import Allocation, Topology
from planner.replication import Confirmation, load_inputs, repeat_allocation
from planner.run_store import RunStore, StoredRun, run_key
from planner.scenario import Scenario
from planner.traffic import build_traffic


def stored_run(
    kept: RunStore,
    scenario: Scenario,
    folder: Path,
    repetition: int,
    topology: Topology,
    allocation: Allocation,
    *,
    keep_logs: bool = False,
) -> tuple[StoredRun, bool]:
    """The run, and whether it was there already.

    Raises:
        InputError: the store cannot be written, or the allocation cannot be simulated.
    """
    inputs = load_inputs(scenario, folder)
    traffic = build_traffic(scenario, folder, repetition)
    key = run_key(scenario, inputs, traffic.digest, allocation, repetition)
    found = kept.find(key)
    if found is not None:
        return found, True
    run = repeat_allocation(scenario, inputs, traffic.workload, topology, allocation, repetition)
    return kept.add(key, scenario.name, allocation.n_gpus, run, keep_logs=keep_logs), False


def confirm_stored(
    store: Path | None,
    scenario: Scenario,
    folder: Path,
    repetition: int,
    allocations: tuple[tuple[Topology, Allocation], ...],
) -> tuple[Confirmation, ...]:
    """One repetition of every allocation given, on the same arrivals, profile draw and noise; without a store, simulated anew."""
    found = []
    if store is None:
        inputs = load_inputs(scenario, folder)
        workload = build_traffic(scenario, folder, repetition).workload
        for topology, allocation in allocations:
            run = repeat_allocation(scenario, inputs, workload, topology, allocation, repetition)
            found.append(Confirmation(run.metrics, run.in_slo_images_per_s))
        return tuple(found)
    with RunStore(store) as kept:
        for topology, allocation in allocations:
            stored, _ = stored_run(kept, scenario, folder, repetition, topology, allocation)
            found.append(Confirmation(stored.metrics, stored.in_slo_images_per_s))
    return tuple(found)
