"""What a simulation is given beside workload and allocation, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from calibrate.profile import LatencyProfile


@dataclass(frozen=True, slots=True)
class ProfileFacts:
    """Memory facts of the GPU kind and architecture."""

    device_memory_gib: float
    activation_gib_per_sample: float

    @classmethod
    def from_profile(cls, profile: LatencyProfile) -> ProfileFacts:
        """Reads the profile's facts; raises :class:`traces.problems.InputError` if it lacks one."""
        fact = profile.predictor().fact
        return cls(fact("device_memory_gib"), fact("activation_gib_per_sample"))


@dataclass(frozen=True, slots=True, eq=False)
class SimulationResult:
    """The logs of one run."""

    requests: pd.DataFrame
    """One row a request in order of arrival, columns ``traces.records.REQUEST_RECORD_COLUMNS``."""
    workers: pd.DataFrame
    """Spans of every worker, columns ``WORKER_INTERVAL_COLUMNS``; adjacent spans of one state are merged, and time
    between two spans is idle (a worker that never worked has one idle span)."""
    saturated: bool
    """Whether the queue kept growing: the allocation cannot carry this load, and its waits mean nothing."""
    n_events: int
    """SimPy events processed."""
    offered_until_s: float
    """End of the window in which requests were offered: the workload's, or the cut; at least the last arrival."""
    horizon_s: float
    """When the last request ended (at least ``offered_until_s``): replicas are allocated from 0 to here."""
