"""A station hosts one rig, in a process of its own (one crash, one lost station) or in this one (tests, tiny models).

The protocol is one JSON object a line: requests on the child's stdin, answers on its stdout; everything a library prints
goes to the log. ``python -m calibrate.station SETUP_JSON`` is the child.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, Protocol

from calibrate.measurement import Features
from calibrate.rig import Rig, RigSetup, Timed, build_rig


class StationError(Exception):
    """A rig could not do what it was asked to; the message is the last line of what went wrong."""


class Station(Protocol):
    """Where tasks are sent."""

    setup: RigSetup
    is_alive: bool
    ready_s: float
    """Seconds from the start of the station until its rig was built."""

    def wait_ready(self, timeout_s: float) -> None:
        """Returns once the rig is built; raises :class:`StationError` if it fails or takes longer."""
        ...

    def ask(self, method: str, features: Features, n_repeats: int, timeout_s: float) -> list[Timed]:
        """Times one thing; raises :class:`StationError`."""
        ...

    def facts(self) -> dict[str, float]:
        """Memory facts of the rig."""
        ...

    def close(self) -> None:
        """Ends the station; never raises."""
        ...


class InlineStation:
    """Hosts the rig in this process and builds it when it is waited for."""

    def __init__(self, setup: RigSetup) -> None:
        self.setup = setup
        self.is_alive = True
        self.ready_s = 0.0
        self._rig: Rig | None = None

    def wait_ready(self, timeout_s: float) -> None:
        if self._rig is not None:
            return
        start_s = time.perf_counter()
        try:
            self._rig = build_rig(self.setup)
        except Exception as error:
            self.is_alive = False
            raise StationError(_last_line(error)) from error
        self.ready_s = time.perf_counter() - start_s

    def ask(self, method: str, features: Features, n_repeats: int, timeout_s: float) -> list[Timed]:
        self.wait_ready(timeout_s)
        assert self._rig is not None  # noqa: S101 - wait_ready returned
        try:
            return self._rig.run(method, features, n_repeats)
        except Exception as error:
            raise StationError(_last_line(error)) from error

    def facts(self) -> dict[str, float]:
        return {} if self._rig is None else self._rig.facts()

    def close(self) -> None:
        if self._rig is not None:
            self._rig.close()
        self._rig = None
        self.is_alive = False


class ProcessStation:
    """Hosts the rig in a child process with its own process group."""

    def __init__(self, setup: RigSetup, log: Path, environment: dict[str, str]) -> None:
        self.setup = setup
        self.is_alive = True
        self.ready_s = 0.0
        self._log = log
        self._start_s = time.perf_counter()
        with log.open("ab") as stream:
            self._child = subprocess.Popen(  # noqa: S603 - our own module
                [sys.executable, "-m", "calibrate.station", json.dumps(setup.to_plain())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                env={**os.environ, **environment},
                cwd=Path(__file__).resolve().parent.parent,
                start_new_session=True,
            )
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._is_ready = False
        threading.Thread(target=self._listen, name=f"station-{setup.name}", daemon=True).start()

    def _listen(self) -> None:
        assert self._child.stdout is not None  # noqa: S101 - opened with a pipe
        for line in self._child.stdout:
            with contextlib.suppress(ValueError):
                self._answers.put(json.loads(line))
        self._answers.put(None)

    def _receive(self, timeout_s: float) -> dict[str, Any]:
        try:
            answer = self._answers.get(timeout=max(0.01, timeout_s))
        except queue.Empty:
            self._kill()
            raise StationError(f"no answer within {timeout_s:.0f} s, ended") from None
        if answer is None:
            code = self._child.wait(timeout=10)
            self._kill()
            raise StationError(f"ended with code {code}: {self._log_tail()}")
        if "error" in answer:
            raise StationError(answer["error"])
        return answer

    def wait_ready(self, timeout_s: float) -> None:
        if self._is_ready:
            return
        try:
            answer = self._receive(timeout_s)
        except StationError:
            self._kill()
            raise
        # The child says when it was ready: the parent may have been busy waiting for another station.
        self.ready_s = max(0.0, answer["ready_at_s"] - self._start_s)
        self._is_ready = True

    def ask(self, method: str, features: Features, n_repeats: int, timeout_s: float) -> list[Timed]:
        if not self.is_alive:
            raise StationError("the station has ended")
        self._send({"method": method, "features": dataclasses.asdict(features), "n_repeats": n_repeats})
        answer = self._receive(timeout_s)
        return [
            Timed(item["quantity"], item["mode"], Features(**item["features"]), tuple(item["values_s"]))
            for item in answer["timed"]
        ]

    def facts(self) -> dict[str, float]:
        if not (self.is_alive and self._is_ready):
            return {}
        self._send({"method": "facts"})
        return dict(self._receive(60)["facts"])

    def _send(self, message: dict[str, Any]) -> None:
        assert self._child.stdin is not None  # noqa: S101 - opened with a pipe
        try:
            self._child.stdin.write(json.dumps(message).encode() + b"\n")
            self._child.stdin.flush()
        except OSError:
            self._kill()
            raise StationError(f"ended: {self._log_tail()}") from None

    def close(self) -> None:
        if self.is_alive and self._is_ready:
            with contextlib.suppress(StationError, subprocess.TimeoutExpired):
                self._send({"method": "close"})
                # One run's process group did not tear down cleanly on a GPU host: the exit is bounded.
                self._child.wait(timeout=8)
        self._kill()

    def _kill(self) -> None:
        self.is_alive = False
        with contextlib.suppress(OSError):
            os.killpg(self._child.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(timeout=10)

    def _log_tail(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return " | ".join(lines[-3:])[-600:]


def _last_line(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}".strip()
    return text if len(text) <= 600 else text[:400] + " … " + text[-200:]


def serve(setup: RigSetup) -> None:
    """Runs in the child: builds the rig, answers until told to close or until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    try:
        rig = build_rig(setup)
    except Exception as error:
        traceback.print_exc()
        answer({"error": _last_line(error)})
        return
    # perf_counter is the machine's monotonic clock on Linux, so parent and child share it.
    answer({"ready_at_s": time.perf_counter()})
    for line in sys.stdin:
        message = json.loads(line)
        if message["method"] == "close":
            break
        try:
            if message["method"] == "facts":
                answer({"facts": rig.facts()})
                continue
            timed = rig.run(message["method"], Features(**message["features"]), message["n_repeats"])
            answer({"timed": [dataclasses.asdict(item) for item in timed]})
        except Exception as error:
            traceback.print_exc()
            answer({"error": _last_line(error)})
    rig.close()


if __name__ == "__main__":
    serve(RigSetup.from_plain(json.loads(sys.argv[1])))
    sys.stderr.flush()
    os._exit(0)  # a process group that does not tear down must not keep the station alive
