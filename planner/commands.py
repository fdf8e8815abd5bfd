"""The commands ``plan``, ``simulate`` and ``compare``. Results on stdout, progress on stderr; exit codes as in ``planner.cli``."""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:  # pydantic takes a while to import; --help does without it
    from engine.allocation import Allocation
    from planner.scenario import Scenario

INFEASIBLE = 3
Jobs = Annotated[int, typer.Option(min=1, max=256, help="Processes. The result does not depend on it.")]
AsJson = Annotated[bool, typer.Option("--json", help="Put the result on stdout as JSON.")]
Seed = Annotated[int | None, typer.Option(min=0, max=2**32 - 1, help="Replaces simulation.seed of the scenario.")]
ScenarioName = Annotated[
    str, typer.Argument(metavar="SCENARIO", help="A scenario file, or sample:NAME for a shipped one.")
]


def plan(
    scenario: ScenarioName,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the plan's files; made if it is not there.")],
    jobs: Jobs = 2,
    backend: Annotated[str, typer.Option(help="loky, threading, ray or dask (the latter two if installed).")] = "loky",
    address: Annotated[str | None, typer.Option(help="Of a Ray or Dask cluster.")] = None,
    seed: Seed = None,
    store: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A run store: an interrupted plan goes on, one asked again is read."),
    ] = None,
    also_kind: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND=PROFILE[@USD]",
            help="A further GPU kind with its profile ('h200 as l40s' carries one over) and price; may be repeated.",
        ),
    ] = None,
    train_until: Annotated[
        float | None,
        typer.Option(metavar="HOURS", help="Backtest: plan on the trace up to here, score the plan on the rest."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Recommend an allocation for a scenario: which GPUs should run what, what it costs, and why."""
    from planner.files import make_folder
    from planner.kind_option import with_other_kinds
    from planner.plan_files import write_plan
    from planner.plan_record import to_json
    from planner.plan_run import make_plan, with_seed
    from planner.prices import age_warning
    from planner.scenario import load_scenario
    from planner.sweep import check_backend, on_backend
    from planner.terminal import print_plan

    asked, folder = load_scenario(scenario)
    if seed is not None:
        asked = with_seed(asked, seed)
    if also_kind:
        asked = with_other_kinds(asked, also_kind)
    check_backend(backend, address)
    make_folder(out)
    if train_until is not None:
        with on_backend(backend, address):
            _backtest(asked, folder, train_until, out, jobs, backend, store, as_json)
        return
    with on_backend(backend, address):
        result = make_plan(asked, folder, jobs=jobs, backend=backend, progress=_say, store=store)
    warning = age_warning(result.price, datetime.datetime.now(datetime.UTC).date())
    if warning:
        _say(warning)
    files = write_plan(result, asked, folder, out)
    if as_json:
        sys.stdout.write(to_json(result.record))
    else:
        print_plan(result.record, files, _console())
    if result.record.verdict == "infeasible":
        raise typer.Exit(INFEASIBLE)


def simulate(
    scenario: ScenarioName,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the run's files; made if it is not there.")],
    allocation: Annotated[
        Path | None, typer.Option(metavar="FILE", help="An allocation, such as a plan's allocation.json.")
    ] = None,
    topology: Annotated[str | None, typer.Option(help="Instead of a file: a topology …")] = None,
    replicas: Annotated[int | None, typer.Option(min=1, max=100_000, help="… with this many base replicas …")] = None,
    controlnet_replicas: Annotated[
        int, typer.Option(min=0, max=100_000, help="… and, for decoupled, this many ControlNet workers.")
    ] = 0,
    chrome_trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Also write the run as a Chrome trace (.json, .json.gz) for ui.perfetto.dev."
        ),
    ] = None,
    uncertainty: Annotated[
        int | None,
        typer.Option(min=2, max=200, metavar="N", help="Also N repetitions: how uncertain the figures are, and why."),
    ] = None,
    jobs: Jobs = 2,
    seed: Seed = None,
    as_json: AsJson = False,
) -> None:
    """Simulate one allocation under a scenario's traffic and write its request and worker records."""
    from planner.plan_run import with_seed
    from planner.scenario import load_scenario
    from planner.simulate_run import chosen_allocation, print_simulation, simulate_once, write_simulation

    asked, folder = load_scenario(scenario)
    if seed is not None:
        asked = with_seed(asked, seed)
    chosen = chosen_allocation(asked, folder, allocation, topology, replicas, controlnet_replicas)
    done = simulate_once(asked, folder, chosen)
    files = write_simulation(done, out)
    if chrome_trace is not None:
        from planner.timeline import write_chrome_trace

        _say(f"Chrome trace: {write_chrome_trace(done.run.result, chrome_trace)}")
    spread = None
    if uncertainty is not None:
        from planner.uncertainty import print_uncertainty, to_plain
        from planner.uncertainty import uncertainty as measure

        _check_one_topology(chosen)
        _say(f"{uncertainty} repetitions with everything varied, and as many for each source alone")
        spread = measure(asked, folder, chosen, uncertainty, jobs=jobs)
    if as_json:
        _json(done.to_plain() | ({"uncertainty": to_plain(spread)} if spread is not None else {}))
    else:
        print_simulation(done, files, _console())
        if spread is not None:
            print_uncertainty(spread, _console())


def compare(
    plans: Annotated[list[Path], typer.Argument(metavar="PLAN…", help="plan.json files, or the folders they are in.")],
    paired: Annotated[
        bool, typer.Option("--paired", help="Simulate all of them again on the same arrivals, draws and noise.")
    ] = False,
    repetitions: Annotated[int, typer.Option(min=2, max=200, help="With --paired: pairs.")] = 10,
    store: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="With --paired: a run store; what is in it is not simulated again."),
    ] = None,
    jobs: Jobs = 2,
    as_json: AsJson = False,
) -> None:
    """Put plans side by side, or with --paired against each other on the same arrivals."""
    if paired:
        from planner.paired import compare_paired, print_paired
        from planner.paired import to_plain as paired_to_plain

        pairs = compare_paired(plans, repetitions, store=store, jobs=jobs, progress=_say)
        if as_json:
            _json(paired_to_plain(pairs))
        else:
            print_paired(pairs, _console())
        return
    from planner.plan_record import read_plan
    from planner.terminal import comparison_rows, print_comparison
    from traces.problems import InputError, Problem

    found, problems = [], list[Problem]()
    for path in plans:
        try:
            found.append((str(path), read_plan(path)))
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    if as_json:
        rows = dict(comparison_rows([record for _, record in found]))
        _json({"plans": [name for name, _ in found], "rows": rows})
    else:
        print_comparison(found, _console())


def export(
    plan: Annotated[
        Path | None, typer.Argument(metavar="PLAN", help="A plan.json, or the folder it is in; not with --diff.")
    ] = None,
    to: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TARGET", help="kubernetes, autoscaling, prometheus, terraform, json, csv or all; may be repeated."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for the files; replaced if an export wrote it.")
    ] = None,
    cluster: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Image, store and nodes of the cluster (YAML).")
    ] = None,
    diff: Annotated[
        tuple[Path, Path] | None, typer.Option(metavar="OLD NEW", help="Show what changes between two plans.")
    ] = None,
    rollback: Annotated[bool, typer.Option("--rollback", help="With --diff: from NEW back to OLD.")] = False,
    phase: Annotated[int | None, typer.Option(min=1, help="Export one step of the plan's roadmap.")] = None,
    profile: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The profile that holds now; another one makes the plan stale.")
    ] = None,
    check_pods: Annotated[
        bool | None,
        typer.Option(
            "--check-pods/--no-check-pods",
            help="Simulate the pods as exported; if left out, where one queue of the plan becomes several.",
        ),
    ] = None,
    grow: Annotated[
        bool,
        typer.Option(
            "--grow",
            help="Where the promise breaks with a queue on each node, export the smallest fleet that keeps it.",
        ),
    ] = False,
    autoscaled: Annotated[
        bool, typer.Option("--autoscaled", help="Export the plan's variant that scales by itself, as simulated.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Export an infeasible or stale plan, and say so in every file.")
    ] = (False),
    as_json: AsJson = False,
) -> None:
    """Write a plan as files for a cluster, for monitoring and for finance; every file is checked before any is written."""
    from planner.export.ask import ExportQuestion, answer

    question = ExportQuestion(
        plan, tuple(to or ()), out, cluster, diff, rollback, phase, profile, force, check_pods, grow, autoscaled
    )
    answered = answer(question, datetime.datetime.now(datetime.UTC).date(), _say)
    if as_json:
        _json(answered.to_plain())
    else:
        sys.stdout.write(answered.text)


def _backtest(
    asked: Scenario,
    folder: Path,
    train_until_h: float,
    out: Path,
    jobs: int,
    backend: str,
    store: Path | None,
    as_json: bool,
) -> None:
    from planner.backtest import backtest, print_backtest, to_plain, write_backtest

    done = backtest(asked, folder, train_until_h, jobs=jobs, backend=backend, progress=_say, store=store)
    files = write_backtest(done, folder, out)
    if as_json:
        _json(to_plain(done))
    else:
        print_backtest(done, files, _console())
    if done.past.allocation is None:
        raise typer.Exit(INFEASIBLE)


def _check_one_topology(allocation: Allocation) -> None:
    from traces.problems import one_problem

    topologies = sorted({pool.topology for pool in allocation.pools_of("base")})
    kinds = sorted({pool.gpu_kind for pool in allocation.pools})
    if len(topologies) != 1 or len(kinds) != 1:
        raise one_problem(
            "--uncertainty",
            f"the allocation has {', '.join(topologies)} on {', '.join(kinds)}",
            "one topology and GPU kind",
        )


def _console() -> Console:
    # a pipe has no width: wide enough for the table, so that nothing is folded in a file
    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=140)


def _json(plain: Any) -> None:
    sys.stdout.write(json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
