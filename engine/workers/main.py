"""``python -m engine.workers.main``: one worker process. What it is to be comes over its control channel.

Started by the front process it inherits two sockets. On another host it is started by hand or by ``torchrun`` and joins:
``torchrun --nnodes 2 --nproc-per-node 4 … -m engine.workers.main --join :PORT --token-file FILE``. It reads ``RANK`` (the front's
device ``@RANK``), ``LOCAL_RANK`` (its GPU) and, where ``--join`` names no host, ``MASTER_ADDR``. ``MASTER_PORT`` belongs to torchrun's
own store, so the front listens on a port of its own.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import traceback
from pathlib import Path
from typing import Final

from engine.serving.wire import BlockingWire, WireClosedError, WireFormatError
from engine.workers.harness import EXIT_FAULT, EXIT_FRONT_GONE, Harness, die_with_parent, leave
from engine.workers.setup import WorkerSetup
from traces.problems import InputError, one_problem

PROTOCOL_VERSION: Final = 1
JOIN_TIMEOUT_S: Final = 60.0
UNUSED_PACKAGES: Final = ("peft", "scipy", "sklearn")
"""What diffusers and transformers import where it is installed, and workers never call: 1 s of the 6 s of processor time in which a
worker comes up, and 65 MB. torch, torch._dynamo and transformers are most of the rest, and needed."""


def main(arguments: list[str] | None = None) -> None:
    """Runs the worker until it is stopped; never returns."""
    parser = argparse.ArgumentParser(prog="python -m engine.workers.main", description=__doc__)
    parser.add_argument("--control-fd", type=int, help="inherited control channel (set by the front process)")
    parser.add_argument("--lines-fd", type=int, help="inherited channel for pair lines (set by the front process)")
    parser.add_argument(
        "--join", metavar="HOST:PORT", help="join the front process of another host; :PORT for the host in MASTER_ADDR"
    )
    parser.add_argument("--token-file", type=Path, help="file with the token that the front prints (mode 600)")
    parser.add_argument("--token", help="the token itself; visible to other users of this host, prefer --token-file")
    options = parser.parse_args(arguments)
    try:
        if options.join:
            harness = Harness(_join(options.join, _token(options)), None)
        elif options.control_fd is not None:
            die_with_parent()
            lines = socket.socket(fileno=options.lines_fd) if options.lines_fd is not None else None
            harness = Harness(socket.socket(fileno=options.control_fd), lines)
        else:
            raise one_problem(
                "engine.workers.main", "got neither --join nor --control-fd", "--join HOST:PORT", "Add it."
            )
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
    try:
        _run(harness)
    except (WireClosedError, WireFormatError) as error:
        sys.stderr.write(f"{error}\n")
        leave(EXIT_FRONT_GONE)
    except BaseException as error:
        traceback.print_exc()
        harness.send({"type": "fault", "reason": f"{type(error).__name__}: {error}"[:2000]})
        leave(EXIT_FAULT)


def _run(harness: Harness) -> None:
    harness.drain_on_sigterm()
    message, _ = harness.wire.receive()
    if message["type"] != "setup":
        raise WireFormatError(f"got {message['type']!r} before the setup")
    setup = WorkerSetup.from_plain(message["setup"])
    harness.progress("load")
    harness.beat(setup.heartbeat_s)
    if setup.model != "featherweight":
        for name in UNUSED_PACKAGES:
            sys.modules.setdefault(name, None)  # type: ignore[arg-type]
    if setup.role == "base":
        from engine.workers.base_process import BaseProcess

        BaseProcess(harness, setup).run()
    elif setup.role == "controlnet":
        from engine.workers.controlnet_process import ControlNetProcess

        ControlNetProcess(harness, setup).run()
    else:
        from engine.workers.loader_process import LoaderProcess

        LoaderProcess(harness, setup).run()
    leave(0)


def _token(options: argparse.Namespace) -> str:
    token = options.token
    if options.token_file is not None:
        try:
            token = options.token_file.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise one_problem(
                "--token-file", f"cannot be read: {error}", "a readable file", "Check the path."
            ) from None
    if not token:
        raise one_problem(
            "--join", "got no token", "--token-file FILE", "Copy the token that the front process printed."
        )
    return str(token)


def _join(address: str, token: str) -> socket.socket:
    """Connects to the front of another host and shows token and rank."""
    host, _, port = address.rpartition(":")
    try:
        host = host or os.environ.get("MASTER_ADDR", "")
        ranks = {name: int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK")}
        connection = socket.create_connection((host, int(port)), timeout=JOIN_TIMEOUT_S)
    except (OSError, ValueError) as error:
        raise one_problem(
            "--join", f"cannot join {address}: {error}", "HOST:PORT of a front process", "Check both."
        ) from None
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    BlockingWire(connection).send({
        "type": "join",
        "version": PROTOCOL_VERSION,
        "token": token,
        "rank": ranks["RANK"],
        "local_rank": ranks["LOCAL_RANK"],
        "host": connection.getsockname()[0],
        "pid": os.getpid(),
    })  # fmt: skip
    return connection


if __name__ == "__main__":
    main()
