"""Many allocations of one scenario, each over its repetitions, into a run store: stop it, and the next call goes on."""

from __future__ import annotations

import math
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_args

import joblib

from engine.allocation import Allocation, Topology
from planner.candidates import shapes_of
from planner.replication import load_inputs, service_table
from planner.run_store import RunStore, StoredRun, StoreError
from planner.scenario import Scenario, ScenarioTopology
from planner.statistics import intervals
from planner.stored_runs import stored_run
from planner.traffic import build_traffic, stream_seed
from traces.problems import InputError, one_problem

BACKENDS: Final = ("loky", "threading", "ray", "dask")
POINTS_MAX: Final = 100_000


@dataclass(frozen=True, slots=True)
class Point:
    """One allocation of a sweep."""

    topology: Topology
    counts: tuple[int, ...]
    """Base replicas, then ControlNet workers if there are any."""
    allocation: Allocation


@dataclass(frozen=True, slots=True)
class PointResult:
    """A point's runs, in order of repetition; ``fault`` if one could not be simulated, which is never a missed promise."""

    point: Point
    runs: tuple[StoredRun, ...]
    n_reused: int
    fault: str = ""


def points_of(
    scenario: Scenario, folder: Path, topologies: Sequence[str], replicas: range, controlnet_replicas: range
) -> list[Point]:
    """Every topology with every number of replicas; ControlNet workers vary for ``decoupled`` only.

    Raises:
        InputError: an unknown topology, or too many points.
    """
    known = get_args(ScenarioTopology)
    unknown = sorted(set(topologies) - set(known))
    if unknown:
        raise one_problem("--topology", f"got {', '.join(unknown)}", f"one of {', '.join(known)}")
    inputs = load_inputs(scenario, folder)
    workload = build_traffic(scenario, folder).workload
    points = []
    for name in [item for item in known if item in topologies]:
        service = service_table(
            scenario,
            inputs,
            workload,
            name,
            draw=None,
            noise_seed=stream_seed(scenario.simulation.seed, "search noise"),
        )
        shape = shapes_of(scenario, name, workload, service, inputs.sizes, inputs.facts, inputs.gpu_kind)[0]
        others = controlnet_replicas if shape.controlnet_pools else range(1)
        for n in replicas:
            for m in others:
                counts = (n, m) if shape.controlnet_pools else (n,)
                points.append(Point(name, counts, shape.allocation(counts)))
                if len(points) > POINTS_MAX:
                    raise one_problem("sweep", f"has more than {POINTS_MAX} points", "fewer", "Narrow --replicas")
    return points


def sweep(
    scenario: Scenario,
    folder: Path,
    points: Sequence[Point],
    store: Path,
    *,
    jobs: int = 2,
    backend: str = "loky",
    address: str | None = None,
    keep_logs: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> list[PointResult]:
    """Simulates what the store does not have. The result depends on neither jobs, backend nor what was stored before.

    A fault in one point is kept in its result with its traceback; the others go on.

    Raises:
        InputError: the store or the backend cannot be used.
    """
    RunStore(store).close()  # said before hours of work, not after
    tasks = (joblib.delayed(_one)(scenario, folder, point, store, keep_logs) for point in points)
    results: list[PointResult] = []
    began = time.monotonic()
    with on_backend(backend, address):
        # Ray's joblib backend gives all results at the end
        return_as = "list" if backend == "ray" else "generator"
        pool = joblib.Parallel(n_jobs=jobs, return_as=return_as) if jobs != 1 or backend != "loky" else None
        done: Iterator[PointResult] = (f(*a, **k) for f, a, k in tasks) if pool is None else pool(tasks)
        for number, result in enumerate(done, start=1):
            results.append(result)
            left_s = (time.monotonic() - began) / number * (len(points) - number)
            again = f", {result.n_reused} of {len(result.runs)} runs stored before" if result.n_reused else ""
            progress(
                f"{number}/{len(points)} {result.point.topology} {'+'.join(map(str, result.point.counts))}{again}; about {left_s:.0f} s left"
            )
    return results


def check_backend(backend: str, address: str | None) -> None:
    """Raises :class:`InputError` for an unknown name, or an address where none is taken; connects to nothing."""
    if backend not in BACKENDS:
        raise one_problem("--backend", f"got {backend!r}", f"one of {', '.join(BACKENDS)}")
    if backend in ("loky", "threading") and address is not None:
        raise one_problem("--address", f"got {address!r} with --backend {backend}", "no address", "Name ray or dask")


@contextmanager
def on_backend(backend: str, address: str | None) -> Iterator[None]:
    """Runs joblib's work on this machine (loky, threading), or on a Ray or Dask cluster by its address; started here without one.

    Raises:
        InputError: as :func:`check_backend`; or the package is not installed, or the cluster does not answer.
    """
    check_backend(backend, address)
    client: Any = None
    try:
        if backend == "ray":
            import ray
            from ray.util.joblib import register_ray

            ray.init(address=address, ignore_reinit_error=True)
            register_ray()
        elif backend == "dask":
            from distributed import Client

            client = Client(address, timeout="30s") if address else Client(processes=True)
    except ImportError as error:
        raise one_problem(
            "--backend", f"{backend} is not installed ({error.name})", "an installed backend",
            f"pip install {'ray' if backend == 'ray' else 'distributed'}, or leave --backend out",
        ) from None  # fmt: skip
    except (OSError, ConnectionError, TimeoutError) as error:
        raise one_problem("--address", f"{address!r} does not answer: {error}", f"a {backend} cluster") from None
    try:
        with joblib.parallel_config(backend=backend):
            yield
    finally:
        if client is not None:
            client.close()


def _one(scenario: Scenario, folder: Path, point: Point, store: Path, keep_logs: bool) -> PointResult:
    runs: list[StoredRun] = []
    n_reused = 0
    with RunStore(store) as kept:
        for repetition in range(scenario.simulation.replications):
            try:
                found, was_there = stored_run(
                    kept, scenario, folder, repetition, point.topology, point.allocation, keep_logs=keep_logs
                )
            except StoreError:
                raise  # a full disk is no fault of this point
            except InputError as error:
                return PointResult(point, tuple(runs), n_reused, str(error))
            except Exception:  # our fault: it is told with its traceback, and never counted as a promise missed
                return PointResult(point, tuple(runs), n_reused, traceback.format_exc())
            n_reused += was_there
            runs.append(found)
    return PointResult(point, tuple(runs), n_reused)


def replay_command(scenario: str, store: Path, row: Mapping[str, Any]) -> str:
    """The command that simulates one point alone, in one process: runs that ended are read, the one that failed is run again.

    Args:
        scenario: as it was named, a file or ``sample:NAME``.
        row: one of :func:`rows_of`.
    """
    base, *others = (str(count) for count in row["counts"])
    command = ["diffplan", "sweep", scenario, "--store", str(store), "--topology", row["topology"], "--replicas", base]
    command += ["--controlnet-replicas", *others] if others else []
    return shlex.join([*command, "--jobs", "1"])


def rows_of(results: Sequence[PointResult], confidence: float) -> list[dict[str, Any]]:
    """JSON-ready rows: a point's figures as means with intervals, or its fault."""
    rows = []
    for result in results:
        row: dict[str, Any] = {
            "topology": result.point.topology, "counts": list(result.point.counts), "n_gpus": result.point.allocation.n_gpus,
            "n_runs": len(result.runs), "fault": result.fault,
        }  # fmt: skip
        figures = (
            intervals([run.metrics for run in result.runs], confidence) if result.runs and not result.fault else {}
        )
        for name in ("slo_attainment_ratio", "latency_p50_s", "latency_p95_s", "latency_p99_s"):
            found = figures.get(name)
            row[name] = found.to_plain() if found is not None else None
        rows.append(row)
    return rows


def parse_range(text: str, option: str) -> range:
    """``4``, ``1:20`` or ``2:40:2``, both ends included; raises :class:`InputError`."""
    parts = text.split(":")
    try:
        numbers = [int(part) for part in parts]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= 3 or min(numbers, default=0) < 1 or max(numbers) > sys.maxsize // 2:
        raise one_problem(option, f"got {text!r}", "N, FIRST:LAST or FIRST:LAST:STEP, whole numbers from 1")
    first, last, step = numbers[0], numbers[-1] if len(numbers) == 1 else numbers[1], (numbers[2:] or [1])[0]
    if last < first or math.ceil((last - first + 1) / step) > POINTS_MAX:
        raise one_problem(option, f"got {text!r}", f"FIRST no larger than LAST, at most {POINTS_MAX} numbers")
    return range(first, last + 1, step)
