"""``diffplan engine replay``: a trace played against a real engine. Importing this module imports neither torch nor pandas."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.serving_cli import ModelName, devices_of, setting_of
from traces.problems import one_problem

if TYPE_CHECKING:
    from engine.allocation import Allocation
    from engine.catalogue import Catalogue
    from engine.serving.replay import ReplayPlan, ReplaySettings
    from engine.serving.settings import EngineSettings


def replay(
    trace: Annotated[str, typer.Option(help="Trace file (.parquet, .csv[.gz], .jsonl[.gz]) or sample:NAME.")],
    allocation: Annotated[Path, typer.Option(help="What to run.")],
    out: Annotated[Path, typer.Option(help="New folder for trace, request and worker tables, and summary.")],
    catalogue: Annotated[
        Path | None, typer.Option(help="Models and add-ons that the trace's ids are looked up in.")
    ] = None,
    synthesise: Annotated[
        bool, typer.Option("--synthesise-addons", help="What the catalogue does not have gets random weights.")
    ] = False,
    store: Annotated[
        str, typer.Option(help="Folder or http(s) address that the catalogue's files are fetched from.")
    ] = "",
    model: Annotated[
        ModelName, typer.Option(help="sdxl; tiny for a CPU; featherweight without torch.")
    ] = ModelName.TINY,
    devices: Annotated[str, typer.Option(help="Devices for replicas in order: cpu, or cuda:0,cuda:1.")] = "cpu",
    speed: Annotated[float, typer.Option(help="Trace seconds per second; 1 plays in real time.")] = 1.0,
    from_s: Annotated[float, typer.Option("--from", help="Trace time to begin at, in seconds.")] = 0.0,
    until_s: Annotated[float | None, typer.Option("--until", help="Trace time to end at, in seconds.")] = None,
    requests: Annotated[int | None, typer.Option(help="At most so many requests.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Every request uses this checkpoint.")] = None,
    steps: Annotated[int | None, typer.Option(help="Every request has so many steps.")] = None,
    size_px: Annotated[int | None, typer.Option(help="Every image is so wide and high.")] = None,
    images: Annotated[int | None, typer.Option(help="At most so many images a request.")] = None,
    deadline_s: Annotated[
        float | None, typer.Option("--deadline", help="Deadline of requests without one, in seconds.")
    ] = None,
    slo_s: Annotated[
        float | None, typer.Option("--slo", help="A request counts as in time within so many seconds.")
    ] = None,
    loaders: Annotated[int, typer.Option(min=1, max=64, help="Loader processes.")] = 1,
    option: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE: a setting of the workers, VALUE as JSON or a plain text.")
    ] = None,
    warm: Annotated[
        str,
        typer.Option(
            help="Shapes captured before a worker is ready, as 1024x1024:1; restarted workers capture them too."
        ),
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole summary as JSON.")] = False,
) -> None:
    """Play a trace against an engine in real or scaled time; the tables join with a simulation of the same trace."""
    from engine.allocation import read_allocation
    from engine.catalogue import Catalogue, read_catalogue
    from engine.frontdoor.builtin import SIZE_MULTIPLE_PX
    from engine.frontdoor.launch import made_folder
    from engine.serving.replay import ReplaySettings, plan_replay
    from engine.serving.replay_jobs import TraceChoice
    from engine.serving.settings import EngineSettings
    from engine.serving.warm_shapes import read_warm_shapes
    from traces.reader import read_trace

    choice = TraceChoice(
        speed=speed, from_s=from_s, until_s=until_s, n_requests_max=requests, base_model_id=base_model, width_px=size_px,
        height_px=size_px, n_steps=steps, n_images_max=images, deadline_s=deadline_s,
    )  # fmt: skip
    settings = ReplaySettings(choice=choice, synthesise_add_ons=synthesise, slo_latency_s=slo_s)
    known = read_catalogue(catalogue) if catalogue is not None else Catalogue()
    running = read_allocation(allocation)
    plan = plan_replay(read_trace(trace), known, settings)
    if out.is_dir() and any(out.iterdir()):
        raise one_problem(str(out), "is not empty", "a new folder", "Name another one with --out.")
    made_folder(out, "--out")
    engine_settings = EngineSettings(
        run_dir=out / "engine", model=model.value, devices=devices_of(devices), store=store, n_loaders=loaders,
        options=dict(setting_of(text) for text in option or []),
        warm=read_warm_shapes(warm, SIZE_MULTIPLE_PX[model.value]),
    )  # fmt: skip
    entries = {**known.entries, **plan.add_ons.synthetic.entries}
    summary = _run(
        plan, running, replace(known, entries=MappingProxyType(entries)), engine_settings, settings, out,
        lambda line: typer.echo(line, err=True),
    )  # fmt: skip
    typer.echo(json.dumps(summary, indent=2, sort_keys=True) if as_json else summary_text(summary, out))
    if summary["is_interrupted"]:
        raise typer.Exit(1)


def _run(
    plan: ReplayPlan,
    allocation: Allocation,
    catalogue: Catalogue,
    engine_settings: EngineSettings,
    settings: ReplaySettings,
    out: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The summary; what had ended is in it if SIGINT or SIGTERM ended the replay."""
    from engine.serving.engine import Engine
    from engine.serving.replay import replay as play

    async def run() -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        engine = Engine(allocation, engine_settings, catalogue)
        try:
            say(f"starting {allocation.n_gpus} devices, model {engine_settings.model} …")
            await engine.start()
            playing = asyncio.create_task(play(plan, engine, out, allocation.pools, settings, progress=say))
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, playing.cancel)
            with contextlib.suppress(asyncio.CancelledError):
                return await playing
            say("interrupted; what had ended is written")
            summary = out / "summary.json"
            return (
                dict(json.loads(summary.read_text(encoding="utf-8"))) if summary.exists() else {"is_interrupted": True}
            )
        finally:
            await engine.stop()

    return asyncio.run(run())


def summary_text(summary: dict[str, Any], out: Path) -> str:
    """A summary in a few lines; all of it is in ``summary.json``."""
    if "n_by_status" not in summary:
        return f"wrote {out}, interrupted before a request had ended"
    ended = ", ".join(f"{n} {status}" for status, n in summary["n_by_status"].items())
    lines = [
        f"wrote {out}: {summary['n_due']} of {summary['n_planned']} requests were due, {ended}, {summary['n_retried']} retried",
        f"offered {_rate(summary['offered_per_s'])}, served {_rate(summary['served_per_s'])}",
        f"{'latency':<22}{'requests':>10}{'p50 s':>10}{'p95 s':>10}{'p99 s':>10}",
    ]
    for name, row in summary["latency_s"].items():
        if row["n"]:
            lines.append(f"{name:<22}{row['n']:>10}{row['p50']:>10.3f}{row['p95']:>10.3f}{row['p99']:>10.3f}")
    lines.append("busy: " + ", ".join(f"{name} {ratio:.0%}" for name, ratio in summary["busy_ratio"].items()))
    return "\n".join(lines)


def _rate(per_s: float | None) -> str:
    return "none" if per_s is None else f"{per_s:.3g}/s"
