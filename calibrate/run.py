"""``calibrate run``: builds the stations, times them block by block within a budget, and keeps whatever was measured.

Compiling stations build at the same time and nothing is timed meanwhile; afterwards exactly one station works at any
moment. A task that fails is recorded and the next one runs; a station that dies costs only its own tasks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from calibrate import fingerprint
from calibrate.cache import pack_cache, unpack_cache
from calibrate.measurement import Failure, Features, RowLog, Session
from calibrate.points import Extent, Task, schedule, setups
from calibrate.rig import RigSetup, Timed
from calibrate.station import InlineStation, ProcessStation, Station, StationError
from traces.problems import InputError, Problem, one_problem

# A task that takes far longer than it did before hangs; a first-time task may still be capturing graphs.
TASK_TIMEOUT_S = 150.0
# Kept back for writing results and for ending processes.
RESERVE_S = 12.0
# Packing a few hundred MB of compile cache with xz on all cores.
PACK_S = 25.0
ERRORS_MAX = 6
# Capturing one more ControlNet of a compiled worker, most of it out of the compile cache.
PREPARE_MARGIN_S = 45.0


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


@dataclass
class _State:
    log: RowLog
    start_s: float
    deadline_s: float
    failures: list[Failure] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)

    def left_s(self) -> float:
        return self.deadline_s - time.perf_counter()

    def fail(self, part: str, error: str) -> None:
        at_s = time.perf_counter() - self.start_s
        self.failures.append(Failure(part, error, round(at_s, 1)))
        _say(f"{at_s:6.1f} s  {part}: {error}")

    def spent(self, part: str, seconds: float) -> None:
        self.parts[part] = round(self.parts.get(part, 0.0) + seconds, 3)


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def run_session(extent: Extent, options: RunOptions) -> Path:
    """Measures and returns the Parquet file.

    Raises:
        InputError: the device is not there, or not one station could be built.
    """
    start_s = time.perf_counter()
    # Nothing random about it: two sessions in one second on one machine would be one too many.
    started = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    name = f"{started:%Y%m%dT%H%M%SZ}-{extent.model}-{extent.device}{extent.n_gpus}-{os.getpid()}"
    hardware = _hardware(extent)
    log = RowLog(options.out, name)
    keep_s = RESERVE_S + (PACK_S if options.cache_out else 0.0)
    state = _State(log, start_s, start_s + options.budget_s - keep_s)
    before = fingerprint.clocks()

    def session() -> Session:
        software, host = fingerprint.software(), fingerprint.host()
        about = {
            **hardware,
            "driver": fingerprint.driver(),
            "engine": fingerprint.engine_version(),
            "engine_sources": fingerprint.engine_digest(),
        }
        clocks = {"clocks_before": before, "clocks_after": fingerprint.clocks()}
        return Session(
            session=name,
            model=extent.model,
            gpu_kind=fingerprint.gpu_kind(str(hardware["gpu"])),
            started=started.isoformat(),
            seed=extent.seed,
            fingerprint={**about, "software": software, "host": host, **clocks},
            facts=dict(sorted(state.facts.items())),
            parts=state.parts,
            failures=tuple(state.failures),
        )

    log.write_session(session())
    with contextlib.ExitStack() as stack:
        folder = options.scratch or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="calibrate-")))
        folder.mkdir(parents=True, exist_ok=True)
        cache = folder / "inductor"
        if options.cache_in:
            _say(f"compile cache: {unpack_cache(options.cache_in, cache)} files restored")
        blocks = schedule(extent, options.parts)
        if options.is_inline:
            blocks = [kept for block in blocks if (kept := [task for task in block if task.method != "start"])]
        stations = _build(extent, options, state, folder, cache, blocks)
        stack.callback(lambda: [station.close() for station in stations.values()])
        if not any(station.is_alive for station in stations.values()):
            raise InputError(
                [
                    Problem(f.part, f.error, "a stack that can be built", "Run with --scratch to keep its log.")
                    for f in state.failures
                ]
            )
        log.write_session(session())
        starter = _Starter(extent, folder, cache)
        _measure(blocks, stations, starter, extent, state, session)
        for station in stations.values():
            with contextlib.suppress(StationError):
                state.facts.update({f"{station.setup.name}.{k}": v for k, v in station.facts().items()})
        path = log.finish(session())
        if options.cache_out:
            try:
                written = pack_cache(cache, options.cache_out)
                _say(f"compile cache: {len(written)} pieces")
            except (InputError, OSError) as error:
                state.fail("cache", str(error))
    _say(f"{time.perf_counter() - start_s:6.1f} s  {len(log.rows)} rows, {len(state.failures)} failures: {path}")
    return path


def _hardware(extent: Extent) -> dict[str, object]:
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


def _start(setup: RigSetup, options: RunOptions, folder: Path, environment: dict[str, str]) -> Station:
    if options.is_inline:
        return InlineStation(setup)
    logs = folder / "logs"
    logs.mkdir(exist_ok=True)
    return ProcessStation(setup, logs / f"{setup.name}.log", environment)


def _build(
    extent: Extent, options: RunOptions, state: _State, folder: Path, cache: Path, blocks: list[list[Task]]
) -> dict[str, Station]:
    tasks = [task for block in blocks for task in block if task.method != "start"]
    wanted = {task.station for task in tasks} | {task.fallback for task in tasks}
    limit_s = time.perf_counter() + min(options.compile_s, max(1.0, state.left_s()))
    chosen = [
        dataclasses.replace(setup, prepare_until_s=limit_s - PREPARE_MARGIN_S)
        for setup in setups(extent, str(folder))
        if setup.name in wanted
    ]
    n_compiling = sum(setup.is_compiled for setup in chosen)
    environment = _environment(cache, n_compiling)
    stations = {setup.name: _start(setup, options, folder, environment) for setup in chosen}
    for name, station in stations.items():
        try:
            station.wait_ready(max(0.1, limit_s - time.perf_counter()))
            _say(f"{time.perf_counter() - state.start_s:6.1f} s  {name} is ready after {station.ready_s:.1f} s")
            state.parts[f"build:{name}"] = round(station.ready_s, 3)
        except StationError as error:
            state.fail(f"build:{name}", str(error))
    return stations


class _Starter:
    """Starts fresh workers and times them until they are ready."""

    def __init__(self, extent: Extent, folder: Path, cache: Path) -> None:
        self._setups = {setup.name: setup for setup in setups(extent, str(folder))}
        self._folder, self._cache = folder, cache

    def start(self, name: str, timeout_s: float) -> list[Timed]:
        """Raises :class:`StationError` if the worker fails or takes longer."""
        setup = self._setups[name]
        station = ProcessStation(setup, self._folder / f"{name}.log", _environment(self._cache, 1))
        try:
            station.wait_ready(timeout_s)
        finally:
            station.close()
        mode = "compiled" if setup.is_compiled else "graph" if setup.uses_graph else "eager"
        stack = "diffusers" if name == "start-stock" else "engine"
        return [Timed(f"{stack}.worker_start", mode, Features(), (station.ready_s,))]


def _station_of(task: Task, stations: Mapping[str, Station]) -> str:
    station = stations.get(task.station)
    return task.station if (station is not None and station.is_alive) or not task.fallback else task.fallback


def _measure(
    blocks: list[list[Task]],
    stations: Mapping[str, Station],
    starter: _Starter,
    extent: Extent,
    state: _State,
    session: Callable[[], Session],
) -> None:
    """Runs the blocks; what fits no more is left out and said once per part."""
    took: dict[tuple[str, str, Features], float] = {}
    left_out: dict[str, int] = {}
    rng = np.random.default_rng(np.random.SeedSequence([extent.seed, 1]))
    for block in blocks:
        start_s = time.perf_counter()
        for index in rng.permutation(len(block)):
            task = block[index]
            name = _station_of(task, stations)
            is_start = task.method == "start"
            station = stations.get(name)
            if not is_start and (station is None or not station.is_alive):
                continue
            if state.errors.get(name, 0) >= ERRORS_MAX:
                continue
            if took.get(task.key, task.cost_s) > state.left_s():
                left_out[task.part] = left_out.get(task.part, 0) + 1
                continue
            began_s = time.perf_counter()
            timeout_s = min(TASK_TIMEOUT_S, state.left_s() + RESERVE_S / 2)
            try:
                if station is None or is_start:
                    timed = starter.start(name, timeout_s)
                else:
                    timed = station.ask(task.method, task.features, task.n_repeats, timeout_s)
            except StationError as error:
                state.errors[name] = state.errors.get(name, 0) + 1
                state.fail(f"{task.part}: {name} {task.method} {_short(task.features)}".rstrip(), str(error))
                if station is not None and not station.is_alive:
                    state.fail(f"station {name}", "has ended; its other tasks are left out")
                # what failed once is tried once more in a later round, not in every one
                took[task.key] = 1e6 if task.key in took else time.perf_counter() - began_s
                continue
            took[task.key] = time.perf_counter() - began_s
            _record(task, timed, state)
        seconds = time.perf_counter() - start_s
        for part in sorted({task.part for task in block}):
            state.spent(part, seconds)
        state.log.write_session(session())
        _say(f"{time.perf_counter() - state.start_s:6.1f} s  {block[0].part}: {len(block)} tasks, {seconds:.1f} s")
    for part, count in sorted(left_out.items()):
        state.fail(part, f"{count} tasks were left out: the budget was spent")


def _record(task: Task, timed: list[Timed], state: _State) -> None:
    for item in timed:
        is_image = item.quantity.startswith("e2e.")
        stack = item.quantity.split(".")[1 if is_image else 0]
        quantity = f"e2e.{task.topology}" if is_image else item.quantity
        state.log.add(
            quantity, item.values_s, stack=stack, topology=task.topology, mode=item.mode, features=item.features
        )


def _short(features: Features) -> str:
    parts = {f.name: getattr(features, f.name) for f in dataclasses.fields(features)}
    return " ".join(f"{name}={value}" for name, value in parts.items() if value not in (0, ""))
