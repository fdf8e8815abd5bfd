"""The requests a scenario asks about, and independent repetitions of them for intervals.

How one repetition differs from the next is stated in every report: scaled traffic shifts its copies anew; a trace of several
days, as it is, gets its days resampled; anything else keeps its arrivals, and then day-to-day variation is missing.
"""

from __future__ import annotations

import functools
import hashlib
import json
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

import numpy as np
import pandas as pd

from planner.scenario import SAMPLE_PREFIX, Scenario, resolve
from planner.scenario import Traffic as TrafficSettings
from planner.workload import Workload, build_workload
from traces.character import rates
from traces.problems import InputError, Problem, one_problem
from traces.reader import read_trace
from traces.scaling import DAY_S, busiest_window, scale_traffic, window
from traces.trace import Trace

BOOTSTRAP_DAYS_MIN: Final = 4
"""Fewer days than this are too few to say how days differ."""
Variation = Literal["shifted copies", "resampled days", "none"]


@dataclass(frozen=True, slots=True)
class TrafficFigures:
    """Rate and burstiness of a stretch of traffic."""

    n_requests: int
    duration_s: float
    mean_per_s: float
    interarrival_cv: float | None
    peak_to_mean: float


@dataclass(frozen=True, slots=True, eq=False)
class Traffic:
    """The requests of one repetition."""

    workload: Workload
    source: str
    before: TrafficFigures
    """The trace as it was read."""
    after: TrafficFigures
    """After scaling and cutting."""
    notes: tuple[str, ...]
    digest: str
    """First 16 digits of the sha256 of the requests' numbers and names: identity of the traffic, however it was stored."""


def stream_seed(seed: int, name: str, index: int = 0) -> int:
    """A seed for one purpose of one repetition, independent of every other's and of Python's hash seed."""
    return int(np.random.SeedSequence([seed, zlib.crc32(name.encode()), index]).generate_state(1)[0])


def variation_of(scenario: Scenario, trace_duration_s: float) -> Variation:
    """How the repetitions of this scenario's arrivals differ."""
    return _variation(scenario.traffic, trace_duration_s)


def _variation(traffic: TrafficSettings, trace_duration_s: float) -> Variation:
    if traffic.scale_factor != 1:
        return "shifted copies"
    if traffic.window is None and traffic.busiest is None and trace_duration_s >= BOOTSTRAP_DAYS_MIN * DAY_S:
        return "resampled days"
    return "none"


def build_traffic(scenario: Scenario, folder: Path, repetition: int | None = None) -> Traffic:
    """The requests as the scenario states them (``None``), or those of one repetition.

    Raises:
        InputError: the trace cannot be read, scaled or cut as asked, or no request is left.
    """
    trace = source_trace(scenario, folder)
    variation = variation_of(scenario, trace.duration_s)
    key = None if variation == "none" else repetition
    # what else a scenario asks leaves its requests as they are: plans that vary it build them once
    return _build(scenario.traffic, scenario.simulation.seed, str(folder), key)


def source_trace(scenario: Scenario, folder: Path) -> Trace:
    """The trace that the scenario names, as it is on disk (read once a process)."""
    return _source(scenario.traffic, folder)


def _source(traffic: TrafficSettings, folder: Path) -> Trace:
    reference = traffic.trace
    return _read(reference if reference.startswith(SAMPLE_PREFIX) else str(resolve(reference, folder)))


@functools.lru_cache(maxsize=1)
def _read(reference: str) -> Trace:
    trace = read_trace(reference)
    if len(trace) < 2 or trace.duration_s <= 0:
        raise one_problem(
            reference, f"has {len(trace)} requests over {trace.duration_s:g} s", "two or more, at different times"
        )
    return trace


@functools.lru_cache(maxsize=2)
def _build(traffic: TrafficSettings, simulation_seed: int, folder: str, repetition: int | None) -> Traffic:
    trace = _source(traffic, Path(folder))
    cut = trace
    if repetition is not None and _variation(traffic, trace.duration_s) == "resampled days":
        cut = resample_days(trace, stream_seed(simulation_seed, "days", repetition))
    elif traffic.scale_factor != 1:
        seed = traffic.seed if repetition is None else stream_seed(traffic.seed, "shifts", repetition)
        cut = scale_traffic(trace, traffic.scale_factor, traffic.shift_law, seed)
    try:
        if traffic.window is not None:
            cut = window(cut, traffic.window.start_h * 3600, traffic.window.end_h * 3600)
        elif traffic.busiest is not None:
            cut = window(cut, *busiest_window(cut, traffic.busiest.length_h * 3600))
    except InputError as error:
        place = "traffic.window" if traffic.window is not None else "traffic.busiest"
        raise InputError([Problem(f"scenario {place}", str(problem)) for problem in error.problems]) from None
    if len(cut) < 2 or cut.requests["arrival_s"].iloc[-1] <= cut.requests["arrival_s"].iloc[0]:
        raise one_problem(
            "scenario traffic", f"keeps {len(cut)} requests", "two or more, at different times", "Widen the window"
        )
    workload = build_workload(cut)
    notes = tuple(cut.provenance.notes)
    return Traffic(workload, trace.provenance.source, _figures(trace), _figures(cut), notes, _digest(workload))


def resample_days(trace: Trace, seed: int) -> Trace:
    """A trace of as many days, each a day of this one drawn with replacement at its own time of day (block bootstrap).

    A last day that is cut short stays in its place, so that it never stands for a whole one.
    """
    arrival_s = trace.requests["arrival_s"].to_numpy(dtype=np.float64)
    n_whole = int(trace.duration_s // DAY_S)
    drawn = np.random.default_rng(seed).integers(0, n_whole, size=n_whole)
    bounds = np.searchsorted(arrival_s, np.arange(n_whole + 1) * DAY_S)
    pieces = []
    for slot, day in enumerate(drawn.tolist()):
        piece = trace.requests.iloc[bounds[day] : bounds[day + 1]].copy()
        piece["arrival_s"] = piece["arrival_s"] + (slot - day) * DAY_S
        piece["request_id"] = piece["request_id"] + f"@{slot}"
        pieces.append(piece)
    rest = trace.requests.iloc[bounds[n_whole] :].copy()
    rest["request_id"] = rest["request_id"] + f"@{n_whole}"
    requests = pd.concat([*pieces, rest], ignore_index=True)
    order = np.argsort(requests["arrival_s"].to_numpy(dtype=np.float64), kind="stable")
    requests = requests.iloc[order].reset_index(drop=True)
    return Trace(requests, trace.provenance.with_note(f"days resampled, seed {seed}"), trace.duration_s)


def busiest_stretch(workload: Workload, n_requests: int) -> Workload:
    """The ``n_requests`` consecutive requests that arrive in the shortest time, from 0; all of them if there are no more."""
    if n_requests >= len(workload):
        return workload
    arrival_s = workload.arrival_s
    first = int(np.argmin(arrival_s[n_requests - 1 :] - arrival_s[: len(arrival_s) - n_requests + 1]))
    mask = np.zeros(len(workload), dtype=np.bool_)
    mask[first : first + n_requests] = True
    part = workload.subset(mask)
    start_s = float(part.arrival_s[0])
    span_s = float(part.arrival_s[-1]) - start_s
    if span_s <= 0:
        return workload
    return replace(part, arrival_s=part.arrival_s - start_s, duration_s=span_s)


def _digest(workload: Workload) -> str:
    digest = hashlib.sha256()
    for column in (
        workload.arrival_s,
        workload.request_key,
        workload.n_steps,
        workload.forward_batch,
        workload.megapixels,
    ):
        digest.update(np.ascontiguousarray(column).tobytes())
    for codes, names in ((workload.controlnets, workload.controlnet_names), (workload.loras, workload.lora_names)):
        digest.update(json.dumps([codes, names], ensure_ascii=False).encode())
    digest.update(json.dumps([workload.checkpoint.tolist(), workload.checkpoint_names], ensure_ascii=False).encode())
    return digest.hexdigest()[:16]


def _figures(trace: Trace) -> TrafficFigures:
    found = rates(trace)
    return TrafficFigures(
        found.n_requests,
        float(found.duration_s),
        float(found.mean_per_s),
        found.interarrival_cv,
        float(found.peak_to_mean),
    )
