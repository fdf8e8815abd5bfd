"""``diffplan calibrate`` (or ``python -m calibrate`` on a GPU host): measure, fit, show. Importing it imports no torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from traces.problems import InputError, Problem, one_problem

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Measure the engine and fit latency profiles.")
GIB = 2**30


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="Folder for measurements.parquet.")],
    model: Annotated[str, typer.Option(help="sdxl, or tiny for a try-out on a CPU.")] = "sdxl",
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    gpus: Annotated[int, typer.Option(min=1, max=2, help="With 2, remote ControlNets are measured too.")] = 1,
    budget_seconds: Annotated[float, typer.Option(min=5, help="Stop measuring in time to end by then.")] = 520.0,
    compile_seconds: Annotated[float, typer.Option(min=1, help="How long the stacks may take to build.")] = 230.0,
    compiled_batches: Annotated[
        str, typer.Option(help="Forward batches our engine is compiled for, such as 2,4,8; empty: none.")
    ] = "2,4,8",
    tuned_batches: Annotated[
        str, typer.Option(help="Forward batches tuned Diffusers is compiled for; empty: leave it out.")
    ] = "2,8",
    attention: Annotated[str, typer.Option(help="Attention our engine tries first: default or cudnn.")] = "default",
    parts: Annotated[str, typer.Option(help="Comma-separated parts to measure; empty: all.")] = "",
    rounds: Annotated[int, typer.Option(min=1, max=50, help="Interleaved rounds of steps and images.")] = 5,
    inductor_cache_in: Annotated[Path | None, typer.Option(help="Folder with a packed compile cache.")] = None,
    inductor_cache_out: Annotated[Path | None, typer.Option(help="Folder for the packed compile cache.")] = None,
    scratch: Annotated[Path | None, typer.Option(help="Folder for weights on local disk; default: temporary.")] = None,
    inline: Annotated[
        bool, typer.Option(help="Measure in this process, one stack after the other; for small models.")
    ] = False,
) -> None:
    """Measure one machine. What fails is recorded and the rest goes on; results are kept as they come."""
    from calibrate.points import PARTS, Extent, tiny_extent
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
    if problems:
        raise InputError(problems)
    if model == "tiny":
        on_gpu = device == "cuda"
        extent = tiny_extent(
            device=device,
            dtype="bfloat16" if on_gpu else "float32",
            n_gpus=gpus,
            compiled_batches=compiled if on_gpu else (),
            tuned_batches=tuned if on_gpu else tuned[:1],
            n_rounds=rounds,
            attention=attention,
        )
    else:
        extent = Extent(
            device=device, n_gpus=gpus, compiled_batches=compiled, tuned_batches=tuned, n_rounds=rounds, attention=attention,
            dtype="bfloat16" if device == "cuda" else "float32",
        )  # fmt: skip
    path = run_session(
        extent,
        RunOptions(
            out, budget_seconds, compile_seconds, chosen, inductor_cache_in, inductor_cache_out, inline, scratch
        ),
    )
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
) -> None:
    """Fit a latency profile to the measurements of one or more sessions."""
    from calibrate.fit import fit_profile
    from calibrate.measurement import merge, read_measurements
    from calibrate.output import write_fit
    from calibrate.profile_file import load_profile

    if out.suffix != ".json":
        raise one_problem("--out", f"got {str(out)!r}", "a file name that ends in .json")
    fitted = fit_profile(merge([read_measurements(path) for path in measurements]), n_draws=draws, seed=seed)
    for path in write_fit(fitted, out):
        sys.stderr.write(f"wrote {path}\n")
    sys.stdout.write(f"{load_profile(str(out)).profile_id}\n")


@app.command()
def show(
    profile: Annotated[str, typer.Argument(help="A shipped profile's name, or a file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Show a profile: every law at the forward batch of one image, whether it was measured, and how well it fits."""
    from calibrate.profile_file import load_profile
    from calibrate.table import law_rows, print_profile

    loaded = load_profile(profile)
    if as_json:
        sys.stdout.write(json.dumps(law_rows(loaded), indent=1) + "\n")
    else:
        print_profile(loaded)


def main() -> None:
    """Runs the commands without the planner's root command; the same exit codes."""
    try:
        app(standalone_mode=False)
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
