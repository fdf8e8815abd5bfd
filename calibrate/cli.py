"""``diffplan calibrate`` (or ``python -m calibrate`` on a GPU host): measure, fit, show. Importing it imports no torch."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from calibrate import kit_commands, profile_commands
from traces.problems import InputError, Problem, one_problem

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Measure the engine and fit latency profiles.")
GIB = 2**30
SINCE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d(:\d\d)?")


@app.command()
def run(
    out: Annotated[Path | None, typer.Option(help="New folder for measurements.parquet.")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with this run; the result goes to --out, or to the same folder.")
    ] = None,
    model: Annotated[str, typer.Option(help="sdxl, or tiny for a try-out on a CPU.")] = "sdxl",
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    gpus: Annotated[
        int, typer.Option(min=1, max=4, help="From 2 on, ControlNets on a GPU of their own are measured too.")
    ] = 1,
    budget_minutes: Annotated[
        float | None,
        typer.Option(min=0.1, help="Measure for so long; what the design leaves goes where laws are least certain."),
    ] = None,
    budget_seconds: Annotated[
        float,
        typer.Option(min=5, help="The same in seconds, for hosts with a hard limit; --budget-minutes counts first."),
    ] = 900.0,
    compile_seconds: Annotated[float, typer.Option(min=1, help="How long the stacks may take to build.")] = 230.0,
    compiled_batches: Annotated[
        str, typer.Option(help="Forward batches our engine is also compiled for by Inductor, such as 2,4; empty: none.")
    ] = "",
    tuned_batches: Annotated[
        str, typer.Option(help="Forward batches tuned Diffusers is compiled for; empty: leave it out.")
    ] = "2",
    tuned_controlnets: Annotated[
        int, typer.Option(min=0, max=3, help="ControlNets that tuned Diffusers is compiled with.")
    ] = 3,
    attention: Annotated[str, typer.Option(help="Attention our engine tries first: default or cudnn.")] = "default",
    parts: Annotated[str, typer.Option(help="Comma-separated parts to measure; empty: all.")] = "",
    passes: Annotated[
        str, typer.Option(help="Instead of the standard order: groups of tasks, such as 'loads:engine,3*cells'.")
    ] = "",
    rounds: Annotated[int, typer.Option(min=1, max=50, help="Interleaved rounds of images.")] = 5,
    peer_rounds: Annotated[int, typer.Option(min=0, max=50, help="In so many of them the slow peers take part.")] = 3,
    sharing: Annotated[int, typer.Option(min=1, max=4, help="Workers of the serving path that share the GPU.")] = 2,
    fill: Annotated[
        bool, typer.Option(help="Spend what the design leaves of the budget where laws are least certain.")
    ] = True,
    inductor_cache_in: Annotated[Path | None, typer.Option(help="Folder with a packed compile cache.")] = None,
    inductor_cache_out: Annotated[Path | None, typer.Option(help="Folder for the packed compile cache.")] = None,
    scratch: Annotated[Path | None, typer.Option(help="Folder for weights on local disk; default: temporary.")] = None,
    inline: Annotated[
        bool, typer.Option(help="Measure in this process, one stack after the other; for small models.")
    ] = False,
) -> None:
    """Measure one machine. What fails is recorded and the rest goes on; results are kept as they come."""
    from calibrate.extent import extent_for
    from calibrate.points import PARTS
    from calibrate.rig import MODELS
    from calibrate.run import RunOptions, run_session

    problems = []
    if model not in MODELS:
        problems.append(Problem("--model", f"got {model!r}", f"one of {list(MODELS)}"))
    if device not in ("cuda", "cpu"):
        problems.append(Problem("--device", f"got {device!r}", "cuda or cpu"))
    if attention not in ("default", "cudnn"):
        problems.append(Problem("--attention", f"got {attention!r}", "default or cudnn"))
    chosen = tuple(part for part in parts.split(",") if part) or PARTS
    problems += [Problem("--parts", f"got {part!r}", f"some of {list(PARTS)}") for part in chosen if part not in PARTS]
    compiled = _batches("--compiled-batches", compiled_batches, problems)
    tuned = _batches("--tuned-batches", tuned_batches, problems)
    if tuned and 2 not in tuned:
        problems.append(Problem("--tuned-batches", f"got {tuned_batches!r}", "2 among them, the batch of one image"))
    if passes and parts:
        problems.append(Problem("--parts", f"got {parts!r} beside --passes", "one of the two"))
    if out is None and resume is None:
        problems.append(Problem("--out", "is missing", "a new folder", "Name one, or a run to go on with: --resume."))
    if problems:
        raise InputError(problems)
    extent = extent_for(
        model, device, n_gpus=gpus, n_rounds=rounds, n_peer_rounds=peer_rounds, attention=attention, n_sharing=sharing,
        compiled_batches=compiled, tuned_batches=tuned, n_tuned_controlnets=tuned_controlnets,
    )  # fmt: skip
    path = run_session(
        extent,
        RunOptions(
            out or resume or Path(), budget_seconds if budget_minutes is None else 60 * budget_minutes, compile_seconds,
            chosen, inductor_cache_in, inductor_cache_out, inline, scratch, resume, fills_budget=fill, passes=passes,
        ),
    )  # fmt: skip
    sys.stdout.write(f"{path}\n")


def _batches(option: str, text: str, problems: list[Problem]) -> tuple[int, ...]:
    try:
        found = tuple(sorted({int(item) for item in text.split(",") if item.strip()}))
    except ValueError:
        found = (0,)
    if any(batch < 2 or batch % 2 or batch > 64 for batch in found):
        problems.append(Problem(option, f"got {text!r}", "even whole numbers 2..64, separated by commas"))
    return found


@app.command()
def fit(
    measurements: Annotated[list[Path], typer.Argument(help="measurements.parquet files, or folders of runs.")],
    out: Annotated[Path, typer.Option(help="The profile to write; the raw data and the check go beside it.")],
    draws: Annotated[int, typer.Option(min=2, max=1000, help="Joint bootstrap draws.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap.")] = 2026,
    borrow: Annotated[
        Path | None,
        typer.Option(
            help="Older measurements of the same GPU: loads, links and other stacks, where these have none of it."
        ),
    ] = None,
    served_since: Annotated[
        str,
        typer.Option(
            help="UTC, such as 2026-11-24T00:40: jobs served by sessions that began before are of an older engine, and hardly used."
        ),
    ] = "",
    fill_from: Annotated[
        str,
        typer.Option(help="Profile of another GPU: what was not measured here is carried over from it, as assumed."),
    ] = "",
) -> None:
    """Fit a latency profile to the measurements of one or more sessions."""
    from calibrate.fill import filled_from
    from calibrate.fit import fit_profile
    from calibrate.measurement import merge, read_measurements
    from calibrate.output import write_fit
    from calibrate.profile_file import load_profile

    if out.suffix != ".json":
        raise one_problem("--out", f"got {str(out)!r}", "a file name that ends in .json")
    if served_since and not SINCE.fullmatch(served_since):
        raise one_problem("--served-since", f"got {served_since!r:.40}", "a date and time such as 2026-11-24T00:40")
    older = read_measurements(borrow) if borrow is not None else None
    fitted = fit_profile(
        merge([read_measurements(path) for path in measurements]),
        n_draws=draws,
        seed=seed,
        borrowed=older,
        served_since=served_since,
    )
    if fill_from:
        filled = filled_from(fitted.profile, load_profile(fill_from), seed=seed)
        fitted = dataclasses.replace(fitted, profile=filled)
    for path in write_fit(fitted, out):
        sys.stderr.write(f"wrote {path}\n")
    sys.stdout.write(f"{load_profile(str(out)).profile_id}\n")


@app.command()
def show(
    profile: Annotated[str, typer.Argument(help="A shipped profile's name, or a file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Show a profile: every law at the forward batch of one image, whether it was measured, and how well it fits."""
    from calibrate.heldout import read_report
    from calibrate.profile_file import load_profile, profile_path
    from calibrate.table import law_rows, print_held_out, print_profile

    loaded = load_profile(profile)
    if as_json:
        sys.stdout.write(json.dumps(law_rows(loaded), indent=1) + "\n")
    else:
        print_profile(loaded)
        print_held_out(read_report(profile_path(profile).with_suffix(".heldout.json"), loaded.raw_sha256))


profile_commands.register(app)
kit_commands.register(app)


def main() -> None:
    """Runs the commands without the planner's root command; the same exit codes."""
    try:
        code = app(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except Exception as error:
        show_error = getattr(error, "show", None)  # click's own errors: wrong options
        if show_error is None:
            raise
        show_error()
        sys.exit(2)
