"""``diffplan dashboard``: starts the page's server, bound to this machine, with usage statistics off."""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from pathlib import Path
from typing import Annotated, Final

import typer

from dashboards.settings import VARIABLE, Settings
from traces.problems import one_problem

UPLOAD_MIB_MAX: Final = 64
"""The largest file the server takes in; each kind of file has a limit of its own below it."""


def dashboard(
    host: Annotated[str, typer.Option(help="Address to listen on; the page has no password.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8501,
    scenario: Annotated[
        list[Path] | None, typer.Option(help="A scenario file to offer beside the shipped ones; repeatable.")
    ] = None,
    profile: Annotated[
        list[Path] | None, typer.Option(help="A profile file to offer beside the shipped ones; repeatable.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, max=256, help="Processes a plan may use; plans run one at a time.")] = 2,
) -> None:
    """Opens the dashboard on this machine and serves it until interrupted."""
    settings = Settings(tuple(scenario or ()), tuple(profile or ()), jobs)
    settings.check()
    try:
        from streamlit.web import cli as streamlit_cli
    except ModuleNotFoundError as error:
        raise one_problem(
            "diffplan dashboard",
            f"the package {error.name!r} is not installed",
            "",
            "Install it with: pip install 'diffplan[dash]'",
        ) from None
    check_free(host, port)
    if not _is_loopback(host):
        typer.echo(f"Note: {host} can be reached from other machines, and the page has no password.", err=True)
    os.environ[VARIABLE] = settings.to_variable()
    sys.exit(
        streamlit_cli.main(args=server_arguments(host, port), prog_name="diffplan dashboard", standalone_mode=False)
    )


def server_arguments(host: str, port: int) -> list[str]:
    """Arguments of ``streamlit``; given as flags so that no configuration file of the machine loosens them."""
    flags = {
        "server.address": host,
        "server.port": str(port),
        "server.headless": "true",
        "server.enableXsrfProtection": "true",
        "server.enableCORS": "true",
        "server.enableStaticServing": "false",
        "server.maxUploadSize": str(UPLOAD_MIB_MAX),
        "server.fileWatcherType": "none",
        "server.runOnSave": "false",
        "browser.gatherUsageStats": "false",
        # what went wrong is for the terminal; the page says it in a sentence
        "client.showErrorDetails": "none",
        "client.showErrorLinks": "false",
        "client.toolbarMode": "viewer",
        "runner.magicEnabled": "false",
        "global.developmentMode": "false",
        # blue instead of Streamlit's red, which would make a busy pool look like an alarm
        "theme.light.primaryColor": "#0072B2",
        "theme.dark.primaryColor": "#56B4E9",
    }
    arguments = ["run", str(Path(__file__).with_name("entry") / "app.py")]
    arguments += [f"--{name}={value}" for name, value in flags.items()]
    if _is_loopback(host):  # a page elsewhere that points its own name at 127.0.0.1 (DNS rebinding) is turned away
        arguments += [f"--server.allowedHosts={name}" for name in dict.fromkeys(("localhost", "127.0.0.1", host))]
    return arguments


def check_free(host: str, port: int) -> None:
    """Raises :class:`InputError` if nothing can listen at this address."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise one_problem(
            f"--host {host} --port {port}", f"cannot be listened on: {error.strerror or error}", "an address of this machine and a free port",
            f"Stop what uses it, or choose another with --port {port % 65535 + 1}",
        ) from None  # fmt: skip


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
