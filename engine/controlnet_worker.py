"""The process behind :class:`engine.remote.RemoteControlNets`: ``python -m engine.controlnet_worker --fd N --settings JSON``.

It serves one base over an inherited socket and ends when that ends.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import threading
from typing import Final

from engine.links.host_memory import HostMemoryLine
from engine.links.protocol import LineLostError
from engine.remote import options_from_plain
from engine.workers.model_options import ModelOptions
from engine.workers.painter import JobError
from engine.workers.sdxl_controlnets import SdxlControlHost
from engine.workers.setup import WorkerSetup

CLIENT: Final = "base"
IDLE_MAX_S: Final = 3600.0
"""A worker that no base talks to for this long ends itself."""
EXIT_TIMEOUT_S: Final = 15.0


def main(arguments: list[str] | None = None) -> None:
    """Builds the ControlNets, serves, and ends in bounded time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="inherited socket")
    parser.add_argument("--settings", required=True, help="JSON: spec, controlnets, options, timeout_s")
    parsed = parser.parse_args(arguments)
    settings = json.loads(parsed.settings)
    options = options_from_plain(settings["options"])
    line = HostMemoryLine(socket.socket(fileno=parsed.fd), CLIENT, CLIENT, settings["timeout_s"])
    setup = WorkerSetup(
        CLIENT,
        "controlnet",
        settings["spec"],
        options.device,
        controlnet_ids=tuple(settings["controlnets"]),
        sources={name: {"file": file.lstrip("/")} for name, file in settings["controlnets"].items()},
        store="/",
        line_timeout_s=settings["timeout_s"],
    )
    try:
        host = SdxlControlHost(setup, ModelOptions(), lambda phase: None, options)
        line.tell({"type": "ready"})
        host.open(CLIENT, line)
        serve(host, line)
    except (JobError, LineLostError) as error:
        sys.stderr.write(f"ControlNet worker ends: {error}\n")
    finally:
        # A device that hangs while it is torn down must not keep the process and its GPU.
        last_resort = threading.Timer(EXIT_TIMEOUT_S, os._exit, (1,))
        last_resort.daemon = True
        last_resort.start()


def serve(host: SdxlControlHost, line: HostMemoryLine) -> None:
    """Handles messages until the line ends, or for an hour without any."""
    try:
        while True:
            message = line.hear(IDLE_MAX_S)
            if message["type"] == "begin":
                host.begin(CLIENT, message)
            else:
                host.step(CLIENT, message)
    except LineLostError:
        host.close(CLIENT)


if __name__ == "__main__":
    main()
