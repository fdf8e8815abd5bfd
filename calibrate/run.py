"""``calibrate run``: builds the stations, times them within a budget, and keeps whatever was measured.

Stations build at the same time and nothing is timed meanwhile; afterwards exactly one station works at any moment. A session that
was cut short is resumed by another one, on the same kind of machine with the same sources, which does what is left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from calibrate import fingerprint
from calibrate.cache import pack_cache, unpack_cache
from calibrate.extent import Extent
from calibrate.measurement import Features, Measurements, RowLog, Session, holds_run, read_measurements
from calibrate.measuring import RESERVE_S, START_METHOD, Measuring, State, merged_counts, say
from calibrate.passes import passes
from calibrate.points import Task, schedule
from calibrate.rig import RigSetup, Timed
from calibrate.setups import setups
from calibrate.station import InlineStation, ProcessStation, Station, StationError
from calibrate.throttle import GpuWatch
from traces.problems import InputError, Problem, one_problem

PACK_S: Final = 25.0
"""Packing a few hundred MB of compile cache with xz on all cores."""
PREPARE_MARGIN_S: Final = 20.0
"""How long the last capture of a station may take."""
LATE_STATIONS: Final = frozenset({"serving", "clients"})
"""Built when they are first asked for: they bring processes of their own, which are to start on an idle machine."""
LATE_BUILD_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a session runs, apart from what it measures."""

    out: Path
    budget_s: float = 520.0
    compile_s: float = 230.0
    """How long the stations may take to build; those that are not ready by then are given up."""
    parts: tuple[str, ...] = ()
    cache_in: Path | None = None
    cache_out: Path | None = None
    is_inline: bool = False
    """Run the rigs in this process, one after the other."""
    scratch: Path | None = None
    resume: Path | None = None
    """Folder of a run whose session this one goes on with."""
    fills_budget: bool = False
    """After the schedule, measure on until the budget is spent, where laws are least certain."""
    passes: str = ""
    """Instead of the schedule: see :mod:`calibrate.passes`."""


def run_session(extent: Extent, options: RunOptions, blocks: list[list[Task]] | None = None) -> Path:
    """Measures and returns the Parquet file.

    Args:
        extent: how much.
        options: how.
        blocks: what and in which order; None: the schedule of the extent, of the parts that the options name.

    Raises:
        InputError: the device is not there, the folder holds another run, the run to resume is of another kind, the passes
            name what there is not, or not one station could be built.
    """
    start_s = time.perf_counter()
    # Nothing random about it: two sessions in one second on one machine would be one too many.
    started = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    name = f"{started:%Y%m%dT%H%M%SZ}-{extent.model}-{extent.device}{extent.n_gpus}-{os.getpid()}"
    hardware = hardware_of(extent)
    about = {
        **hardware,
        "driver": fingerprint.driver(),
        "engine": fingerprint.engine_version(),
        "engine_sources": fingerprint.engine_digest(),
    }
    gpu_kind = fingerprint.gpu_kind(str(hardware["gpu"]))
    previous = _previous(options, extent, gpu_kind, str(about["engine_sources"]))
    log = RowLog(options.out, name, previous)
    keep_s = RESERVE_S + (PACK_S if options.cache_out else 0.0)
    state = State(log, start_s, start_s + options.budget_s - keep_s, watch=GpuWatch() if extent.is_cuda else None)
    state.done_before = merged_counts([session.tasks for session in previous.sessions] if previous else [])
    before = fingerprint.clocks()

    def session() -> Session:
        software, host = fingerprint.software(), fingerprint.host()
        clocks = {"clocks_before": before, "clocks_after": fingerprint.clocks(), "gpu_watch": state.seen}
        return Session(
            session=name,
            model=extent.model,
            gpu_kind=gpu_kind,
            started=started.isoformat(),
            seed=extent.seed,
            fingerprint={**about, "software": software, "host": host, **clocks},
            facts=dict(sorted(state.facts.items())),
            parts=state.parts,
            failures=tuple(state.failures),
            tasks=dict(sorted(state.tasks.items())),
        )

    log.write_session(session())
    with contextlib.ExitStack() as stack:
        if state.watch is not None:
            stack.callback(state.watch.close)
        folder = (
            options.scratch.resolve()
            if options.scratch
            else Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="calibrate-")))
        )
        folder.mkdir(parents=True, exist_ok=True)
        cache = folder / "inductor"
        if options.cache_in:
            say(f"compile cache: {unpack_cache(options.cache_in, cache)} files restored")
        if blocks is None:
            blocks = passes(extent, options.passes) if options.passes else schedule(extent, options.parts)
        if options.is_inline:
            blocks = [kept for block in blocks if (kept := [task for task in block if task.method != START_METHOD])]
        stations = _Stations(extent, options, state, folder, cache)
        stack.callback(stations.close)
        stations.build(blocks)
        log.write_session(session())
        Measuring(stations, extent, state, session).run(blocks, fills_budget=options.fills_budget)
        for station_name, facts in stations.facts().items():
            state.facts.update({f"{station_name}.{key}": value for key, value in facts.items()})
        path = log.finish(session())
        if options.cache_out:
            try:
                written = pack_cache(cache, options.cache_out)
                say(f"compile cache: {len(written)} pieces")
            except (InputError, OSError) as error:
                state.fail("cache", str(error))
    say(f"{time.perf_counter() - start_s:6.1f} s  {len(log.rows)} rows, {len(state.failures)} failures: {path}")
    return path


def _previous(options: RunOptions, extent: Extent, gpu_kind: str, sources: str) -> Measurements | None:
    """What the run to resume has measured; None if none is resumed."""
    if options.resume is None:
        if holds_run(options.out):
            raise one_problem(
                f"--out {options.out}", "holds a run already", "a new folder",
                "Name another one, or go on with it: --resume.",
            )  # fmt: skip
        return None
    previous = read_measurements(options.resume)
    wanted = {"model": extent.model, "gpu_kind": gpu_kind, "engine_sources": sources}
    problems = []
    for session in previous.sessions:
        found = {"model": session.model, "gpu_kind": session.gpu_kind, **session.fingerprint}
        problems += [
            Problem(
                f"--resume {options.resume} session {session.session}", f"its {key} is {found.get(key)!r}",
                f"{value!r}, as here", "Start a new run; 'fit' takes several.",
            )
            for key, value in wanted.items()
            if found.get(key) != value
        ]  # fmt: skip
    if problems:
        raise InputError(problems)
    return previous


def hardware_of(extent: Extent) -> dict[str, object]:
    """Name and number of the GPUs that the extent asks for; raises :class:`InputError` where they are not there."""
    import torch

    if not extent.is_cuda:
        return {"gpu": "cpu", "n_gpus": 0}
    if not torch.cuda.is_available():
        raise one_problem(
            "--device", "got 'cuda', but torch sees no GPU here", "a GPU", "Use --device cpu --model tiny."
        )
    if torch.cuda.device_count() < extent.n_gpus:
        raise one_problem("--gpus", f"got {extent.n_gpus}", f"1..{torch.cuda.device_count()} on this machine")
    return {"gpu": torch.cuda.get_device_name(0), "n_gpus": extent.n_gpus}


def _environment(cache: Path, n_stations: int) -> dict[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
        "TORCHINDUCTOR_AUTOGRAD_CACHE": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": str(max(1, cores // max(1, n_stations))),
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }


class _Stations:
    """The stations of a session; see :class:`calibrate.measuring.Stacks`."""

    def __init__(self, extent: Extent, options: RunOptions, state: State, folder: Path, cache: Path) -> None:
        self._setups = {setup.name: setup for setup in setups(extent, str(folder))}
        self._options, self._state, self._folder, self._cache = options, state, folder, cache
        self._stations: dict[str, Station] = {}

    def build(self, blocks: list[list[Task]]) -> None:
        """Builds whatever the blocks need, side by side; those that are not ready in time are given up.

        Raises:
            InputError: none could be built.
        """
        state, options = self._state, self._options
        tasks = [task for block in blocks for task in block]
        wanted = {name for task in tasks if task.method != START_METHOD for name in (task.station, task.fallback)}
        limit_s = time.perf_counter() + min(options.compile_s, max(1.0, state.left_s()))
        asked = {
            (task.features.forward_batch, task.features.width_px, task.features.height_px)
            for task in tasks
            if task.method == "steps"
        }
        chosen = [
            dataclasses.replace(
                setup,
                prepare_until_s=limit_s - PREPARE_MARGIN_S,
                shapes=tuple(shape for shape in setup.shapes if shape[:3] in asked),
            )
            for setup in self._setups.values()
            if setup.name in wanted - LATE_STATIONS
        ]
        environment = _environment(self._cache, sum(setup.is_compiled for setup in chosen))
        self._stations = {setup.name: self._start(setup, environment) for setup in chosen}
        for name in self._stations:
            self._wait(name, max(0.1, limit_s - time.perf_counter()))
        if chosen and not any(station.is_alive for station in self._stations.values()):
            raise InputError(
                [
                    Problem(f.part, f.error, "a stack that can be built", "Run with --scratch to keep its log.")
                    for f in state.failures
                ]
            )

    def get(self, name: str) -> Station | None:
        """See :class:`calibrate.measuring.Stacks`."""
        if name in LATE_STATIONS and name not in self._stations and name in self._setups:
            self._stations[name] = self._start(self._setups[name], _environment(self._cache, 1))
            self._wait(name, min(LATE_BUILD_S, max(1.0, self._state.left_s())))
        return self._stations.get(name)

    def is_built(self, name: str) -> bool:
        """See :class:`calibrate.measuring.Stacks`."""
        return name in self._stations

    def start(self, name: str, timeout_s: float) -> list[Timed]:
        """See :class:`calibrate.measuring.Stacks`."""
        setup = self._setups[name]
        station = ProcessStation(setup, self._folder / f"{name}.log", _environment(self._cache, 1))
        try:
            station.wait_ready(timeout_s)
        finally:
            station.close()
        return [Timed("diffusers.worker_start", "eager", Features(), (station.ready_s,))]

    def facts(self) -> dict[str, dict[str, float]]:
        """What each station knows of memory."""
        found = {}
        for name, station in self._stations.items():
            with contextlib.suppress(StationError):
                found[name] = station.facts()
        return found

    def close(self) -> None:
        """Ends all of them."""
        for station in self._stations.values():
            station.close()

    def _start(self, setup: RigSetup, environment: dict[str, str]) -> Station:
        if self._options.is_inline:
            return InlineStation(setup)
        logs = self._folder / "logs"
        logs.mkdir(exist_ok=True)
        return ProcessStation(setup, logs / f"{setup.name}.log", environment)

    def _wait(self, name: str, timeout_s: float) -> None:
        state, station = self._state, self._stations[name]
        try:
            station.wait_ready(timeout_s)
        except StationError as error:
            state.fail(f"build:{name}", str(error))
            return
        say(f"{time.perf_counter() - state.start_s:6.1f} s  {name} is ready after {station.ready_s:.1f} s")
        state.parts[f"build:{name}"] = round(station.ready_s, 3)
