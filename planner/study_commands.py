"""The commands that study a service rather than plan one: ``diagnose``, ``theory``. Streams and exit codes as in ``planner.commands``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from planner.commands import AsJson, Jobs, _console, _json, _say

DRIFT = 4
"""Exit code of results that do not agree with what they are held against."""


def diagnose(
    question: Annotated[
        str, typer.Argument(metavar="SCENARIO|TRACE", help="A scenario or a trace: files, or sample:NAME.")
    ],
    topology: Annotated[str | None, typer.Option(help="How it runs today; stock Diffusers by default …")] = None,
    replicas: Annotated[int | None, typer.Option(min=1, max=100_000, help="… on this many base replicas …")] = None,
    controlnet_replicas: Annotated[
        int, typer.Option(min=0, max=100_000, help="… and, for decoupled, this many ControlNet workers.")
    ] = 0,
    allocation: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Instead: the allocation that serves today.")
    ] = None,
    log: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Request records (Parquet) of what happened: time is then read from them."),
    ] = None,
    profile: Annotated[str, typer.Option(help="With a trace: shipped profile or file.")] = "h200",
    slo_seconds: Annotated[float, typer.Option(min=0.001, max=86_400, help="With a trace: the promised latency.")] = 60,
    slo_ratio: Annotated[
        float, typer.Option(min=0.001, max=0.9999, help="With a trace: share of requests in time.")
    ] = 0.95,
    jobs: Jobs = 2,
    as_json: AsJson = False,
) -> None:
    """Say where time and money of the present service go, and which single change would help most."""
    from planner.diagnose import diagnose as make
    from planner.diagnose_question import PresentFleet, TraceDefaults
    from planner.diagnose_text import print_diagnosis, to_plain

    found = make(
        question,
        PresentFleet(topology, replicas, controlnet_replicas, allocation),
        TraceDefaults(profile, slo_seconds, slo_ratio),
        log,
        jobs=jobs,
        progress=_say,
    )
    if as_json:
        _json(to_plain(found))
    else:
        print_diagnosis(found, _console())


def theory(
    systems: Annotated[
        list[Path] | None,
        typer.Argument(metavar="SYSTEM…", help="Files such as examples/theory/mmc.yaml; by default all of those."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Hold the simulator against queueing theory: exact and simulated figures, and whether they agree."""
    from planner.theory import Row, check_system
    from planner.theory_system import load_system, shipped_systems
    from planner.theory_text import print_rows, to_plain
    from traces.problems import InputError, Problem, one_problem

    paths = list(systems or shipped_systems())
    if not paths:
        raise one_problem("SYSTEM", "got none, and no checkout's examples/theory is here", "one or more files")
    loaded, problems = [], list[Problem]()
    for path in paths:
        try:
            loaded.append((load_system(path), path.parent))
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    rows: list[Row] = []
    for system, folder in loaded:
        _say(f"{system.name}: {system.replications} times {system.n_requests} requests")
        rows += check_system(system, folder)
    if as_json:
        _json(to_plain(rows))
    else:
        print_rows(rows, _console())
    if not all(row.is_inside for row in rows):
        raise typer.Exit(DRIFT)


def sweep(
    scenario: Annotated[str, typer.Argument(metavar="SCENARIO", help="A scenario file, or sample:NAME.")],
    store: Annotated[Path, typer.Option(metavar="DIR", help="The run store: what is in it is not simulated again.")],
    replicas: Annotated[str, typer.Option(metavar="N|A:B[:STEP]", help="Base replicas, ends included.")],
    topology: Annotated[
        list[str] | None, typer.Option(help="May be repeated; by default the scenario's topologies.")
    ] = None,
    controlnet_replicas: Annotated[
        str, typer.Option(metavar="N|A:B[:STEP]", help="ControlNet workers of decoupled fleets.")
    ] = "1",
    backend: Annotated[str, typer.Option(help="loky, threading, ray or dask (the latter two if installed).")] = "loky",
    address: Annotated[str | None, typer.Option(help="Of a Ray or Dask cluster.")] = None,
    keep_logs: Annotated[
        bool, typer.Option("--keep-logs", help="Keep every run's request and worker records.")
    ] = False,
    jobs: Jobs = 2,
    as_json: AsJson = False,
) -> None:
    """Simulate many allocations into a store; interrupt it at any time and run it again to go on."""
    from rich.table import Table

    from planner.scenario import load_scenario
    from planner.sweep import parse_range, points_of, replay_command, rows_of
    from planner.sweep import sweep as run

    asked, folder = load_scenario(scenario)
    points = points_of(
        asked, folder, topology or asked.topologies, parse_range(replicas, "--replicas"),
        parse_range(controlnet_replicas, "--controlnet-replicas"),
    )  # fmt: skip
    results = run(
        asked, folder.resolve(), points, store.resolve(), jobs=jobs, backend=backend, address=address, keep_logs=keep_logs, progress=_say
    )  # fmt: skip
    rows = rows_of(results, asked.slo.confidence)
    if as_json:
        _json(rows)
    else:
        table = Table(pad_edge=False)
        for name in ("topology", "replicas", "GPUs", "runs", "in time", "interval", "p95", "p99"):
            table.add_column(name, justify="left" if name == "topology" else "right")
        for row in rows:
            attained, p95, p99 = (row[name] for name in ("slo_attainment_ratio", "latency_p95_s", "latency_p99_s"))
            cells = ("fault", "", "", "")
            if attained is not None:
                between = "–" if attained["low"] is None else f"{attained['low']:.2%} … {min(1, attained['high']):.2%}"
                cells = (f"{attained['mean']:.2%}", between, f"{p95['mean']:.2f} s", f"{p99['mean']:.2f} s")
            table.add_row(
                row["topology"], "+".join(map(str, row["counts"])), str(row["n_gpus"]), str(row["n_runs"]), *cells
            )
        _console().print(table)
    faults = [row for row in rows if row["fault"]]
    for row in faults:
        name = f"{row['topology']} {'+'.join(map(str, row['counts']))}"
        _say(f"{name} could not be simulated:\n{row['fault']}\nTo replay it: {replay_command(scenario, store, row)}")
    if faults:
        raise typer.Exit(1)
