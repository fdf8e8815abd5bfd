"""``diffplan engine serve`` and the commands that talk to a serving engine. Importing this module imports neither torch nor aiohttp."""

from __future__ import annotations

import json
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from engine.serving.warm_shapes import read_warm_shapes
from traces.problems import InputError, one_problem

RUN_DIR = Path("engine-run")


class ModelName(StrEnum):
    """What workers compute with."""

    FEATHERWEIGHT = "featherweight"
    TINY = "tiny"
    SDXL = "sdxl"


AdminSocket = Annotated[
    Path | None, typer.Option("--admin", help="Admin socket of the engine; admin.sock in the run folder if left out.")
]
RunDir = Annotated[Path, typer.Option("--run-dir", help="Folder of the engine's events, logs and admin socket.")]


def serve(
    allocation: Annotated[
        Path | None, typer.Option(help="What to run; one base and one ControlNet worker if left out.")
    ] = None,
    catalogue: Annotated[
        Path | None, typer.Option(help="Models and add-ons; a few with random weights if left out.")
    ] = None,
    store: Annotated[
        str, typer.Option(help="Folder or http(s) address that the catalogue's files are fetched from.")
    ] = "",
    model: Annotated[
        ModelName, typer.Option(help="sdxl; tiny for a CPU; featherweight without torch.")
    ] = ModelName.TINY,
    devices: Annotated[
        list[str] | None,
        typer.Option(help="Devices for replicas in order: cpu, or cuda:0,cuda:1. For another engine: NAME=cuda:2."),
    ] = None,
    also: Annotated[
        list[str] | None, typer.Option(help="NAME=FILE: another allocation, beside the first, for a traffic split.")
    ] = None,
    split: Annotated[Path | None, typer.Option(help="Shares of the traffic, see docs/engine.md.")] = None,
    listen: Annotated[str, typer.Option(help="HOST:PORT; port 0 takes a free one.")] = "127.0.0.1:8188",
    tenants: Annotated[
        Path | None, typer.Option(help="Token file (mode 0600); without it nobody needs a token.")
    ] = None,
    is_open: Annotated[bool, typer.Option("--open", help="Listen beyond this machine without tokens.")] = False,
    run_dir: RunDir = RUN_DIR,
    admin: AdminSocket = None,
    log: Annotated[Path | None, typer.Option(help="Request log (JSON lines); stdout if left out.")] = None,
    loaders: Annotated[int, typer.Option(min=1, max=64, help="Loader processes.")] = 1,
    option: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE: a setting of the workers, VALUE as JSON or a plain text.")
    ] = None,
    warm: Annotated[
        str, typer.Option(help="Shapes captured before a worker is ready, as 1024x1024:1,1024x1024:2 (W x H : images).")
    ] = "",
    drain_seconds: Annotated[
        float, typer.Option(min=0, max=3600, help="How long SIGTERM waits for admitted requests.")
    ] = 120.0,
    join: Annotated[str, typer.Option(help="HOST:PORT on which workers of other hosts join.")] = "",
    join_token_file: Annotated[Path | None, typer.Option(help="File with the token that they show.")] = None,
) -> None:
    """Serve images over HTTP until SIGTERM; docs/engine.md says how to call it."""
    try:
        from engine.frontdoor.builtin import SIZE_MULTIPLE_PX
        from engine.frontdoor.launch import MAIN, LaunchOptions, launch
        from engine.frontdoor.server import ServerOptions
    except ModuleNotFoundError as error:
        raise _missing(error) from None

    host, port = parse_address(listen)
    options = LaunchOptions(
        model=model.value,
        allocations={**({MAIN: allocation} if allocation is not None else {}), **_engines(also or [], MAIN)},
        devices=_devices(devices or [], MAIN),
        catalogue=catalogue,
        store=store,
        tenants=tenants,
        split=split,
        run_dir=run_dir,
        log=log,
        n_loaders=loaders,
        worker_options=dict(setting_of(text) for text in option or []),
        warm=read_warm_shapes(warm, SIZE_MULTIPLE_PX[model.value]),
        join_address=join,
        join_token=_token(join_token_file) if join_token_file is not None else "",
        server=ServerOptions(host, port, admin or run_dir / "admin.sock", is_open, drain_seconds),
    )
    if not launch(options, lambda text: typer.echo(text, err=True)):
        typer.echo("stopped before every admitted request had ended", err=True)
        raise typer.Exit(1)


def apply(
    allocation: Annotated[Path, typer.Argument(help="Allocation to move to; workers that are in both keep running.")],
    run_dir: RunDir = RUN_DIR,
    admin: AdminSocket = None,
    engine: Annotated[str, typer.Option(help="Which engine, where a traffic split runs several.")] = "main",
) -> None:
    """Move a serving engine to another allocation without disturbing what stays."""
    from engine.allocation import read_allocation, to_json

    plain = json.loads(to_json(read_allocation(allocation)))
    done = _call(run_dir, admin, "POST", "/admin/apply", {"engine": engine, "allocation": plain})
    typer.echo(json.dumps(done, indent=2, sort_keys=True))


def status(
    run_dir: RunDir = RUN_DIR,
    admin: AdminSocket = None,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
) -> None:
    """Show what a serving engine does."""
    plain = _call(run_dir, admin, "GET", "/admin/status")
    typer.echo(json.dumps(plain, indent=2, sort_keys=True) if as_json else _status_table(plain))


def split(
    file: Annotated[Path | None, typer.Argument(help="New shares; shows those in force if left out.")] = None,
    run_dir: RunDir = RUN_DIR,
    admin: AdminSocket = None,
) -> None:
    """Show or change the traffic split of a serving engine."""
    from engine.json_records import read_json

    if file is None:
        done = _call(run_dir, admin, "GET", "/admin/split")
    else:
        done = _call(run_dir, admin, "PUT", "/admin/split", read_json(file))
    typer.echo(json.dumps(done, indent=2, sort_keys=True))


def drain(
    run_dir: RunDir = RUN_DIR,
    admin: AdminSocket = None,
    timeout_seconds: Annotated[
        float, typer.Option(min=0.1, max=3600, help="How long admitted requests may take.")
    ] = 120.0,
) -> None:
    """Have a serving engine admit nothing more, finish what it has, and end."""
    typer.echo(json.dumps(_call(run_dir, admin, "POST", "/admin/drain", {"timeout_s": timeout_seconds})))


def reload(run_dir: RunDir = RUN_DIR, admin: AdminSocket = None) -> None:
    """Have a serving engine read its catalogue and token file again: new add-ons are admitted while it serves."""
    typer.echo(json.dumps(_call(run_dir, admin, "POST", "/admin/reload"), indent=2, sort_keys=True))


def records(
    out: Annotated[Path, typer.Option(help="Folder for requests.parquet and workers.parquet.")],
    run_dir: RunDir = RUN_DIR,
    start: Annotated[str, typer.Option(help="Which start of the engine, by its folder; the latest if left out.")] = "",
) -> None:
    """Write what a serving engine has recorded, also while it runs, as the tables that a simulation writes."""
    from engine.frontdoor.launch import made_folder
    from engine.serving.record_tables import read_record_log, write_record_tables

    starts = sorted(path.name for path in (run_dir / "records").glob("*Z"))
    if not starts:
        raise one_problem(str(run_dir), "holds no records", "the run folder of an engine", "Name it with --run-dir.")
    if start and start not in starts:
        raise one_problem("--start", f"got {start!r}", f"one of {', '.join(starts[-10:])}", "Correct it.")
    folder = run_dir / "records" / (start or starts[-1])
    tables = read_record_log(folder)
    for path in write_record_tables(tables, made_folder(out, "--out")):
        typer.echo(path)
    typer.echo(
        f"{len(tables.requests)} requests, {len(tables.workers)} spans, {tables.n_torn_lines} torn lines", err=True
    )


def token(tenant: Annotated[str, typer.Argument(help="Name of the tenant.")]) -> None:
    """Draw a token for a tenant: prints the token, and the entry for the token file, which holds only its hash."""
    from engine.frontdoor.tenants import hash_token, new_token

    secret = new_token()
    typer.echo(secret)
    entry = {"id": tenant, "token_sha256": [hash_token(secret)]}
    typer.echo('the line above is shown only now; in the token file, under "tenants":\n' + json.dumps(entry), err=True)


def parse_address(text: str) -> tuple[str, int]:
    """``HOST:PORT`` or ``[IPV6]:PORT``. Raises :class:`InputError`."""
    host, _, port = text.rpartition(":")
    if not host or not port.isascii() or not port.isdecimal() or int(port) > 65535:
        raise one_problem("--listen", f"got {text!r}", "HOST:PORT, as 127.0.0.1:8188", "Correct it.")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _engines(texts: list[str], main: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or not path or not name.isidentifier() or name == main or name in found:
            raise one_problem(
                "--also", f"got {text!r}", f"NAME=FILE with a new name that is not {main!r}", "Correct it."
            )
        found[name] = Path(path)
    return found


def _devices(texts: list[str], main: str) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for text in texts:
        name, _, names = text.rpartition("=")
        name = name or main
        if name in found:
            raise one_problem(
                "--devices", f"got {text!r}", "devices of each engine once", "Join the lists with commas."
            )
        found[name] = devices_of(names)
    return found


def devices_of(text: str) -> tuple[str, ...]:
    """``cpu``, ``cuda:0,cuda:1`` or, for workers of other hosts, ``@0``. Raises :class:`InputError`."""
    listed = tuple(part.strip() for part in text.split(","))
    if not all(re.fullmatch(r"cpu|cuda(:\d{1,3})?|@\d{1,5}", part) for part in listed):
        raise one_problem("--devices", f"got {text!r}", "cpu, cuda:N or @RANK, with commas between", "Correct it.")
    return listed


def setting_of(text: str) -> tuple[str, Any]:
    """``NAME=VALUE``. Raises :class:`InputError`."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise one_problem("--option", f"got {text!r}", "NAME=VALUE", "Correct it.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _token(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise one_problem(
            "--join-token-file", f"cannot be read: {error}", "a readable file", "Check the path."
        ) from None


def _call(run_dir: Path, admin: Path | None, method: str, path: str, body: Any = None) -> dict[str, Any]:
    try:
        from engine.frontdoor.admin_client import call
    except ModuleNotFoundError as error:
        raise _missing(error) from None
    return call(admin or run_dir / "admin.sock", method, path, body)


def _missing(error: ModuleNotFoundError) -> InputError:
    what = f"needs the package {error.name!r}, which is not installed"
    return one_problem("the serving engine", what, repair="Install it with: pip install 'diffplan[engine]'")


def _status_table(plain: dict[str, Any]) -> str:
    lines = []
    for name, engine in sorted(plain["engines"].items()):
        state = plain["draining"] or engine["status"]
        now = engine["dispatch"]
        lines.append(f"{name}: {state}, {now['n_running']} running, {now['n_waiting']} waiting, ended {now['n_ended']}")
        lines.append(f"  {'worker':<20}{'role':<12}{'state':<12}{'busy s':>10}{'restarts':>10}  processes")
        for worker in engine["workers"]:
            pids = ", ".join(map(str, worker["pids"]))
            lines.append(
                f"  {worker['worker_id']:<20}{worker['role']:<12}{worker['state']:<12}{worker['busy_s']:>10.1f}"
                f"{worker['n_restarts']:>10}  {pids}"
            )
        reasons = [*engine["reasons"], *(reason for pool in engine["pools"].values() for reason in pool["reasons"])]
        lines += [f"  ! {reason}" for reason in reasons]
    shares = ", ".join(f"{v['name']} {v['share']:.2%} to {v['engine']}" for v in plain["split"]["variants"])
    return "\n".join([*lines, f"split: {shares}"])
