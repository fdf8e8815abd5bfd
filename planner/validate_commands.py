"""``diffplan validate``. Streams as in ``planner.commands``; ends with 4 if a bound is broken."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from planner.commands import AsJson, _json, _say

OUT_OF_BOUNDS = 4


def validate(
    runs: Annotated[
        list[Path], typer.Argument(metavar="ENGINE_RUN…", help="Folders that 'diffplan engine replay' wrote.")
    ],
    profile: Annotated[str, typer.Option(help="Profile to simulate with: a shipped one's name, or a file.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for validation.html and validation.json.")],
    against: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="A second replay of a run's workload: the floor. Repeat for several runs."),
    ] = None,
    repetitions: Annotated[
        int, typer.Option(min=1, max=1000, help="Simulations of a run; they differ in service noise.")
    ] = 20,
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="Of noise and bootstrap.")] = 0,
    extrapolate: Annotated[
        bool, typer.Option("--extrapolate", help="Predict outside the profile's measured box, and say so.")
    ] = False,
    remote_store: Annotated[
        bool, typer.Option("--remote-store", help="The engine fetched LoRAs over a network, not from its own disk.")
    ] = False,
    lora_mib: Annotated[
        float, typer.Option(min=0.001, max=65536, help="Size of LoRAs that the run does not name.")
    ] = 186.0,
    device_memory_gib: Annotated[
        float | None, typer.Option(min=0.001, max=4096, help="In place of the profile's device memory.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Hold the simulator against replays of the engine: quantiles, stages, busy ratios, saturation. Exit code 4 out of bounds."""
    from planner.validation.ask import ValidationQuestion, write_validation
    from planner.validation.ask import validate as answer
    from planner.validation.report import failures, table_rows, verdict_sentence
    from planner.validation.simulated import SimulationSettings

    settings = SimulationSettings(repetitions, seed, extrapolate, not remote_store, lora_mib, device_memory_gib)
    done = answer(ValidationQuestion(tuple(runs), profile, tuple(against or ()), settings), _say)
    files = write_validation(done, out)
    if as_json:
        _json(done.plain)
    else:
        header = ("run", "topology", "load", "p50 gap (floor)", "p95", "p99", "verdict")
        rows = [header, *table_rows(done.comparisons)]
        widths = [max(len(row[k]) for row in rows) for k in range(len(header))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        names = ", ".join(path.name for path in files)
        said = [verdict_sentence(done.comparisons), *failures(done.comparisons)]
        sys.stdout.write("\n".join([*said, "", *lines, "", f"Files in {out}: {names}"]) + "\n")
    if not done.holds:
        raise typer.Exit(OUT_OF_BOUNDS)
