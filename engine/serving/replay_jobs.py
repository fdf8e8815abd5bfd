"""Turns the requests of a trace into jobs of an engine: which add-on of the catalogue stands for which of the trace."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Final

import numpy as np
import pandas as pd

from engine.catalogue import NAME, AddOnKind, Catalogue, CatalogueEntry
from engine.serving.job import ControlUse, Job, LoraUse
from traces.problems import InputError, Problem
from traces.records import Request
from traces.trace import Trace

SYNTHETIC_OWNER: Final = "replay"
KINDS: Final[tuple[tuple[AddOnKind, str], ...]] = (
    ("base", "base_model_id"),
    ("controlnet", "controlnet_ids"),
    ("lora", "lora_ids"),
)


@dataclass(frozen=True, slots=True)
class TraceChoice:
    """Which part of a trace is played, and what is changed about it."""

    speed: float = 1.0
    """Trace seconds per second: 2 halves every gap."""
    from_s: float = 0.0
    """Trace time at which the replay begins."""
    until_s: float | None = None
    """Requests that arrive at or after it are left out."""
    n_requests_max: int | None = None
    base_model_id: str | None = None
    """Every request uses this checkpoint."""
    width_px: int | None = None
    height_px: int | None = None
    n_steps: int | None = None
    n_images_max: int | None = None
    deadline_s: float | None = None
    """Deadline of requests that have none."""


@dataclass(frozen=True, slots=True)
class AddOnMap:
    """Ids of a trace to ids of the engine, by kind."""

    ids: Mapping[AddOnKind, Mapping[str, str]]
    synthetic: Catalogue = field(default_factory=Catalogue)
    """Entries with random weights that have to be admitted before the replay."""


def chosen_trace(trace: Trace, choice: TraceChoice) -> Trace:
    """The requests as they will be offered: ``arrival_s`` in seconds of the replay. Simulate this trace to compare.

    Raises:
        InputError: a setting is out of range, or no request is left.
    """
    _check_choice(choice)
    frame = trace.requests
    until_s = float("inf") if choice.until_s is None else choice.until_s
    arrival_s = frame["arrival_s"].to_numpy(np.float64)
    frame = frame[(arrival_s >= choice.from_s) & (arrival_s < until_s)]
    if choice.n_requests_max is not None:
        frame = frame.iloc[: choice.n_requests_max]
    if not len(frame):
        raise InputError(
            Problem(
                "trace", f"has no request from {choice.from_s:g} s on", "at least one", "Choose another part of it."
            )
        )
    frame = frame.reset_index(drop=True).copy()
    frame["arrival_s"] = (frame["arrival_s"].to_numpy(np.float64) - choice.from_s) / choice.speed
    for name in ("base_model_id", "width_px", "height_px", "n_steps"):
        value = getattr(choice, name)
        if value is not None:
            frame[name] = pd.Series([value] * len(frame), dtype=frame[name].dtype)
    if choice.n_images_max is not None:
        frame["n_images"] = frame["n_images"].clip(upper=choice.n_images_max)
    if choice.deadline_s is not None:
        frame["deadline_s"] = frame["deadline_s"].astype(np.float64).fillna(choice.deadline_s)
    played_s = min(trace.duration_s, until_s) - choice.from_s
    last_s = float(frame["arrival_s"].iloc[-1])
    is_cut = choice.n_requests_max is not None and len(frame) == choice.n_requests_max
    duration_s = last_s if is_cut else max(last_s, played_s / choice.speed)
    note = f"replayed from {choice.from_s:g} s at {choice.speed:g} times its speed, {len(frame)} requests"
    return Trace(frame, trace.provenance.with_note(note), duration_s)


def map_add_ons(trace: Trace, catalogue: Catalogue, *, synthesise: bool = False) -> AddOnMap:
    """Finds every checkpoint and add-on of a trace in a catalogue, by id or by name (its only or stated version).

    Args:
        synthesise: what is not there gets random weights drawn from its id, and is to be admitted.

    Raises:
        InputError: something is not there, with how many requests use it; everything that is missing together.
    """
    problems: list[Problem] = []
    synthetic: dict[str, CatalogueEntry] = {}
    ids: dict[AddOnKind, Mapping[str, str]] = {}
    for kind, column in KINDS:
        mapped: dict[str, str] = {}
        for name, n_uses in _uses(trace, column).items():
            known = _in_catalogue(catalogue, name, kind)
            if known is not None:
                mapped[name] = known
            elif synthesise:
                entry = synthetic_entry(name, kind)
                mapped[name] = entry.id
                synthetic[entry.id] = entry
            else:
                problems.append(
                    Problem(
                        f"trace {column} {name[:80]!r}", f"is not in the catalogue and used {n_uses} times", f"a {kind} of it",
                        "Add it, or let missing ones be synthesised with random weights.",
                    )
                )  # fmt: skip
        ids[kind] = MappingProxyType(mapped)
    if problems:
        raise InputError(problems)
    return AddOnMap(MappingProxyType(ids), Catalogue(MappingProxyType(synthetic)))


def synthetic_entry(name: str, kind: AddOnKind) -> CatalogueEntry:
    """An entry with random weights: under its own name where that is a legal id, else under a digest of it."""
    entry_id = name if NAME.fullmatch(name) else f"synthetic-{_digest(f'{kind} {name}')[:24]}"
    return CatalogueEntry(entry_id, kind, owner=SYNTHETIC_OWNER, file=f"seed:{int(_digest(name)[:12], 16)}")


def mapped_trace(trace: Trace, add_ons: AddOnMap) -> Trace:
    """The trace with the engine's ids in place of its own."""
    frame = trace.requests.copy()
    base, controlnet, lora = (add_ons.ids[kind] for kind, _ in KINDS)
    frame["base_model_id"] = pd.Series([base[name] for name in frame["base_model_id"]], dtype=object)
    for column, ids in (("controlnet_ids", controlnet), ("lora_ids", lora)):
        cells = np.empty(len(frame), dtype=object)
        for row, names in enumerate(frame[column]):
            cells[row] = tuple(ids[name] for name in names)
        frame[column] = pd.Series(cells, dtype=object)
    return replace(trace, requests=frame)


def job_of(request: Request) -> Job:
    """One request of a mapped trace as a job, with a negative prompt if it is guided. Control images are drawn from its seed, which is drawn from its id."""
    return Job(
        request_id=request.request_id,
        base_model_id=request.base_model_id,
        prompt=f"request {request.request_id}",
        negative_prompt=f"not request {request.request_id}" if request.guidance_scale > 1.0 else None,
        n_images=request.n_images,
        n_steps=request.n_steps,
        width_px=request.width_px,
        height_px=request.height_px,
        guidance_scale=request.guidance_scale,
        controls=tuple(
            ControlUse(name, scale, start, end)
            for name, scale, start, end in zip(
                request.controlnet_ids,
                request.controlnet_scales,
                request.control_start,
                request.control_end,
                strict=True,
            )
        ),
        loras=tuple(LoraUse(name, scale) for name, scale in zip(request.lora_ids, request.lora_scales, strict=True)),
        seed=int(_digest(request.request_id)[:8], 16),
        tenant_id=request.tenant_id,
        priority=request.priority,
        deadline_s=request.deadline_s,
        wants_images=False,
    )


def warm_up_jobs(jobs: Sequence[Job], n_shapes_max: int, n_copies: int) -> list[list[Job]]:
    """Rounds of jobs that make every replica compile for the commonest shapes: without LoRAs, at most two steps, no deadline.

    A shape is what a worker compiles for: checkpoint, size, images, guidance and ControlNets.
    """

    def shape(job: Job) -> tuple[object, ...]:
        names = tuple(use.controlnet_id for use in job.controls)
        return (job.base_model_id, job.width_px, job.height_px, job.n_images, job.uses_cfg, names)

    first: dict[tuple[object, ...], Job] = {}
    counts: Counter[tuple[object, ...]] = Counter()
    for job in jobs:
        first.setdefault(shape(job), job)
        counts[shape(job)] += 1
    rounds = []
    for number, (key, _) in enumerate(counts.most_common(n_shapes_max)):
        job = first[key]
        controls = tuple(replace(use, start=0.0, end=1.0) for use in job.controls)
        warm = replace(job, loras=(), controls=controls, n_steps=min(2, job.n_steps), deadline_s=None, priority=0)
        rounds.append([replace(warm, request_id=f"warm-up-{number}-{copy}") for copy in range(n_copies)])
    return rounds


def _uses(trace: Trace, column: str) -> Counter[str]:
    if column == "base_model_id":
        return Counter(trace.requests[column].tolist())
    return Counter(name for names in trace.requests[column] for name in names)


def _in_catalogue(catalogue: Catalogue, name: str, kind: AddOnKind) -> str | None:
    entry = catalogue.entries.get(name)
    if entry is not None:
        return entry.id if entry.kind == kind else None
    in_production = [item for item in catalogue.versions(name) if item.kind == kind and item.stage == "production"]
    stated = catalogue.current.get(name)
    meant = in_production if stated is None else [item for item in in_production if item.version == stated]
    return meant[0].id if len(meant) == 1 else None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _check_choice(choice: TraceChoice) -> None:
    problems = []
    for name, value, low in (
        ("speed", choice.speed, 0.0),
        ("until_s", choice.until_s, choice.from_s),
        ("n_requests_max", choice.n_requests_max, 0),
        ("n_images_max", choice.n_images_max, 0),
        ("n_steps", choice.n_steps, 0),
        ("width_px", choice.width_px, 0),
        ("height_px", choice.height_px, 0),
        ("deadline_s", choice.deadline_s, 0.0),
    ):
        if value is not None and not low < value < float("inf"):
            problems.append(Problem(f"replay {name}", f"got {value:g}", f"more than {low:g}", "Correct it."))
    if not 0.0 <= choice.from_s < float("inf"):
        problems.append(Problem("replay from_s", f"got {choice.from_s:g}", "0 or more", "Correct it."))
    if problems:
        raise InputError(problems)
