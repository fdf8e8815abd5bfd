"""Commands around a measuring host: ``calibrate check``, ``bundle``, ``pack``, ``ingest`` and ``images``. Importing it imports no torch."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from traces.problems import InputError, Problem

DRIFT_EXIT_CODE = 4


def check(
    profile: Annotated[str, typer.Argument(help="A shipped profile's name, or a file.")],
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    budget_seconds: Annotated[float, typer.Option(min=5, help="Stop measuring in time to end by then.")] = 120.0,
    out: Annotated[Path | None, typer.Option(help="New folder that keeps the measurements; default: none.")] = None,
    inline: Annotated[bool, typer.Option(help="Measure in this process; for small models.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Measure a handful of points and say whether a profile still holds on this host. Exit code 4: it does not."""
    from calibrate.check import check_profile
    from calibrate.check_text import print_report
    from calibrate.profile_file import load_profile
    from calibrate.run import RunOptions

    if device not in ("cuda", "cpu"):
        raise InputError(Problem("--device", f"got {device!r}", "cuda or cpu"))
    loaded = load_profile(profile)
    with tempfile.TemporaryDirectory(prefix="calibrate-check-") as folder:
        options = RunOptions(out or Path(folder) / "run", budget_seconds, budget_seconds / 2, is_inline=inline)
        report = check_profile(loaded, device, options)
    if as_json:
        plain = report.to_plain()
        plain["measurements"] = str(report.path) if out else ""
        sys.stdout.write(json.dumps(plain, indent=1, ensure_ascii=False) + "\n")
    else:
        print_report(loaded, report)
    if report.has_drifted:
        raise typer.Exit(DRIFT_EXIT_CODE)


def bundle(
    out: Annotated[Path, typer.Argument(help="The .zip to write.")],
    wheels: Annotated[
        Path | None, typer.Option(help="Folder of .whl files that the host lacks; torch is expected there.")
    ] = None,
    model: Annotated[str, typer.Option(help="sdxl, or tiny for a try-out.")] = "sdxl",
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    gpus: Annotated[
        int, typer.Option(min=1, max=4, help="From 2 on, ControlNets on a GPU of their own are measured too.")
    ] = 1,
    budget_minutes: Annotated[float, typer.Option(min=0.5, help="How long the host may measure.")] = 15.0,
    tuned_batches: Annotated[
        str, typer.Option(help="Forward batches tuned Diffusers is compiled for; empty: none.")
    ] = "2",
    parts: Annotated[str, typer.Option(help="Comma-separated parts to measure; empty: all.")] = "",
    passes: Annotated[str, typer.Option(help="Instead of parts: groups of tasks in this order, as of 'run'.")] = "",
) -> None:
    """Write an offline kit for a GPU host without network: code, wheels, design, one script."""
    from calibrate.bundle import Kit, write_bundle
    from calibrate.points import PARTS
    from calibrate.rig import MODELS

    chosen = tuple(part for part in parts.split(",") if part) or PARTS
    problems = [Problem("--parts", f"got {part!r}", f"some of {list(PARTS)}") for part in chosen if part not in PARTS]
    for option, value, allowed in (("--model", model, MODELS), ("--device", device, ("cuda", "cpu"))):
        if value not in allowed:
            problems.append(Problem(option, f"got {value!r}", f"one of {list(allowed)}"))
    if not all(item.strip().isdigit() for item in tuned_batches.split(",") if item):
        problems.append(Problem("--tuned-batches", f"got {tuned_batches!r}", "even whole numbers, separated by commas"))
    if passes and parts:
        problems.append(Problem("--parts", f"got {parts!r} beside --passes", "one of the two"))
    if problems:
        raise InputError(problems)
    kit = Kit(model, device, gpus, budget_minutes, tuned_batches=tuned_batches, parts=chosen, passes=passes)
    counts = write_bundle(kit, out, wheels)
    sys.stderr.write("".join(f"{count} {name}\n" for name, count in counts.items()))
    sys.stdout.write(f"{out}\n")


def pack(
    run: Annotated[Path, typer.Argument(help="Folder of a run, finished or cut short.")],
    log: Annotated[Path | None, typer.Option(help="Its log; the last MiB goes along.")] = None,
) -> None:
    """Pack a run for the way back from an offline host: RUN/result.zip."""
    from calibrate.bundle import write_result

    sys.stdout.write(f"{write_result(run, log)}\n")


def ingest(
    result: Annotated[Path, typer.Argument(help="The result.zip that came back.")],
    out: Annotated[Path, typer.Option(help="New folder for measurements.parquet.")],
) -> None:
    """Check a result of an offline kit, believing nothing, and write its measurements anew."""
    from calibrate.ingest import ingest as take_in

    taken = take_in(result, out)
    for session in taken.measurements.sessions:
        n_rows = sum(row.session == session.session for row in taken.measurements.rows)
        n_flagged = sum(row.session == session.session and bool(row.flags) for row in taken.measurements.rows)
        sys.stderr.write(
            f"{session.session}: {session.model} on {session.gpu_kind}, {n_rows} rows, {n_flagged} of them flagged, "
            f"{len(session.failures)} failures\n"
        )
    sys.stdout.write(f"{taken.path}\n")


def images(
    runs: Annotated[list[Path], typer.Argument(help="measurements.parquet files, or folders of runs.")],
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Show images per GPU-minute of every stack, side by side, as measured."""
    from calibrate.image_rates import image_rates, plain_rates, print_rates
    from calibrate.measurement import merge, read_measurements

    rates = image_rates(merge([read_measurements(path) for path in runs]))
    if not rates:
        raise InputError(Problem(str(runs[0]), "holds no whole images", "a run with the part 'images'"))
    if as_json:
        sys.stdout.write(json.dumps(plain_rates(rates), indent=1) + "\n")
    else:
        print_rates(rates)


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    for command in (check, bundle, pack, ingest, images):
        app.command()(command)
