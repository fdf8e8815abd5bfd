"""From the options of ``diffplan engine serve`` to a running server: reads files, makes engines, runs until stopped."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import sys
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final, TextIO

from engine.allocation import Allocation, read_allocation
from engine.catalogue import Catalogue
from engine.frontdoor.admin import Reload, unknown_models
from engine.frontdoor.builtin import DEFAULTS, builtin_allocation, builtin_catalogue, limits_of
from engine.frontdoor.catalogue_access import CatalogueAccess
from engine.frontdoor.catalogue_file import CatalogueFile
from engine.frontdoor.request_log import JsonLog
from engine.frontdoor.server import Server, ServerOptions
from engine.frontdoor.service import FrontConfig
from engine.frontdoor.split import Split, Variant, split_from_plain
from engine.frontdoor.tenants import Tenant, read_tenants
from engine.json_records import read_json
from engine.serving.engine import Engine
from engine.serving.line_file import LineFileSettings
from engine.serving.record_log import RecordLog, recording
from engine.serving.settings import Bounds, EngineSettings, Model
from engine.serving.warm_shapes import WarmShape
from traces.problems import InputError, Problem, one_problem

MAIN: Final = "main"
KEPT: Final = LineFileSettings(n_files_max=16)
"""A service that runs for months keeps its last GiB of records."""


@dataclass(frozen=True, slots=True)
class LaunchOptions:
    """What the command line says."""

    model: Model = "tiny"
    allocations: Mapping[str, Path] = field(default_factory=dict)
    """By engine name; without ``main`` the built-in one runs."""
    devices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By engine name; ``cpu`` where there are none."""
    catalogue: Path | None = None
    store: str = ""
    tenants: Path | None = None
    split: Path | None = None
    run_dir: Path = Path("engine-run")
    log: Path | None = None
    """Request log; None: stdout."""
    n_loaders: int = 1
    worker_options: Mapping[str, Any] = field(default_factory=dict)
    warm: tuple[WarmShape, ...] = ()
    join_address: str = ""
    join_token: str = ""
    server: ServerOptions = field(default_factory=ServerOptions)
    bounds: Bounds = field(default_factory=Bounds)


def launch(options: LaunchOptions, say: Callable[[str], None]) -> bool:
    """Serves until it is stopped; True if every admitted request ended by itself.

    Raises:
        InputError: files, devices or addresses are wrong; with every problem found in the first of them.
    """
    file = CatalogueFile(options.catalogue) if options.catalogue is not None else None
    catalogue = file.now() if file is not None else builtin_catalogue()
    allocations = read_allocations(options, catalogue)
    tenants = read_tenants(options.tenants) if options.tenants is not None else None
    split = _split(options, allocations)
    made_folder(options.run_dir, "--run-dir")
    logging.basicConfig(
        stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    with ExitStack() as stack:
        log = _open_log(options.log, stack)
        return asyncio.run(_serve(options, catalogue, file, allocations, tenants, split, JsonLog(log), say))


def read_allocations(options: LaunchOptions, catalogue: Catalogue) -> dict[str, Allocation]:
    """The allocation of every engine, ``main`` first.

    Raises:
        InputError: a file is wrong, or names models that the catalogue does not have.
    """
    gpu_kind = "cpu" if set(_devices(options, MAIN)) == {"cpu"} else "gpu"
    allocations = {MAIN: builtin_allocation(catalogue, gpu_kind)} if MAIN not in options.allocations else {}
    problems: list[Problem] = []
    for name, path in options.allocations.items():
        try:
            allocations[name] = read_allocation(path)
            problems += unknown_models(allocations[name], catalogue, str(path))
        except InputError as error:
            problems += error.problems
    for name in options.devices:
        if name not in allocations:
            problems.append(
                Problem("--devices", f"names the engine {name!r}", f"one of {sorted(allocations)}", "Correct it.")
            )
    if problems:
        raise InputError(problems)
    return allocations


def engine_settings(options: LaunchOptions, name: str) -> EngineSettings:
    """The settings of one engine; those beside ``main`` have a run folder of their own, and no joining hosts."""
    is_main = name == MAIN
    return EngineSettings(
        run_dir=options.run_dir if is_main else options.run_dir / name,
        model=options.model,
        devices=_devices(options, name),
        store=options.store,
        n_loaders=options.n_loaders,
        warm=options.warm,
        options=options.worker_options,
        bounds=options.bounds,
        join_address=options.join_address if is_main else "",
        join_token=options.join_token if is_main else "",
    )


async def _serve(
    options: LaunchOptions,
    catalogue: Catalogue,
    file: CatalogueFile | None,
    allocations: Mapping[str, Allocation],
    tenants: tuple[Tenant, ...] | None,
    split: Split,
    log: JsonLog,
    say: Callable[[str], None],
) -> bool:
    engines = {
        name: Engine(allocation, engine_settings(options, name), catalogue) for name, allocation in allocations.items()
    }
    base_ids = [entry.name or entry.id for entry in catalogue.entries.values() if entry.kind == "base"]
    defaults = DEFAULTS[options.model]
    policy_s = allocations[MAIN].policies.deadline_s
    if policy_s is not None:
        defaults = dataclasses.replace(defaults, deadline_s=policy_s)
    config = FrontConfig(limits_of(options.model), defaults, default_model=base_ids[0] if base_ids else "default")

    def ready(host: str, port: int) -> None:
        workers = {name: [worker.worker_id for worker in engine.view().workers] for name, engine in engines.items()}
        say(
            f"ready on http://{host}:{port}: " + "; ".join(f"{name}: {', '.join(ids)}" for name, ids in workers.items())
        )
        say("try: " + curl_line(host, port, needs_token=tenants is not None))

    say(
        f"starting {', '.join(f'{name} ({a.n_gpus} devices)' for name, a in allocations.items())}, model {options.model} …"
    )
    server = Server(
        engines, CatalogueAccess(catalogue), log, config, options.server, tenants=tenants, split=split,
        reload=Reload(
            catalogue=file.reread if file is not None else None,
            live_catalogue=file.now if file is not None else None,
            tenants=None if options.tenants is None else partial(read_tenants, options.tenants),
        ),
        ready=ready,
    )  # fmt: skip
    async with AsyncExitStack() as stack:
        for name, engine in engines.items():
            folder = records_folder(engine_settings(options, name).run_dir)
            await stack.enter_async_context(
                recording(engine, RecordLog(folder, engine.clock, allocations[name].pools, settings=KEPT))
            )
        return await server.run()


def records_folder(run_dir: Path) -> Path:
    """A new folder for the request and worker records of one start: their times count from it, so starts are kept apart."""
    return made_folder(run_dir / "records" / f"{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}", "--run-dir")


def made_folder(path: Path, option: str) -> Path:
    """The folder, made if absent. Raises :class:`InputError` naming the option that asked for it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise one_problem(
            f"{option} {path}", f"cannot be made: {error.strerror}", "a writable folder", "Choose another."
        ) from None
    return path


def curl_line(host: str, port: int, *, needs_token: bool) -> str:
    """A command that makes an image and writes it to a file, for a shell with curl and Python."""
    shown = f"[{host}]" if ":" in host else host
    token = ' -H "Authorization: Bearer $TOKEN"' if needs_token else ""
    save = 'import base64,json,sys; open("image.png","wb").write(base64.b64decode(json.load(sys.stdin)["data"][0]["b64_json"]))'
    return (
        f"curl -sS http://{shown}:{port}/v1/images/generations{token} -H 'Content-Type: application/json' "
        f'-d \'{{"prompt": "a lighthouse at dusk", "seed": 1}}\' | python3 -c \'{save}\''
    )


def _devices(options: LaunchOptions, name: str) -> tuple[str, ...]:
    return options.devices.get(name, ("cpu",))


def _split(options: LaunchOptions, allocations: Mapping[str, Allocation]) -> Split:
    if options.split is None:
        if len(allocations) > 1:
            raise one_problem(
                "--also", f"starts {len(allocations)} engines, but no request would reach {sorted(set(allocations) - {MAIN})}",
                "--split FILE with their shares", "Add it; shares of 0 are allowed",
            )  # fmt: skip
        return Split((Variant(MAIN, 1.0),))
    return split_from_plain(read_json(options.split), allocations, str(options.split))


def _open_log(path: Path | None, stack: ExitStack) -> TextIO:
    if path is None:
        return sys.stdout
    try:
        return stack.enter_context(path.open("a", encoding="utf-8"))
    except OSError as error:
        raise one_problem(
            str(path), f"cannot be written: {error.strerror}", "a writable path", "Choose another."
        ) from None
