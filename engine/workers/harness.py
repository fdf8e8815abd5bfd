"""The part that every worker process has: its channel to the front process, its heartbeat, and how it ends.

Three threads: the main thread does the work; one reads the control channel and ends the process at once when that channel
ends, so that no worker outlives its front; one tells the front every second how far the work path has come. The work path
itself advances the counter, so a process that is alive but stuck is told apart from one that works.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from engine.serving.wire import BlockingWire, Frame, WireClosedError, WireFormatError

EXIT_DRAINED: Final = 0
EXIT_FRONT_GONE: Final = 70
EXIT_FAULT: Final = 71
PR_SET_PDEATHSIG: Final = 1
PHASE_IDLE: Final = "idle"
Urgent = Callable[[dict[str, Any], tuple[bytes, ...]], bool]
"""Looks at a message on the reader's thread; True if it has dealt with it."""


class Harness:
    """Channel, heartbeat and state of one worker process; made by :mod:`engine.workers.main`."""

    def __init__(self, control: socket.socket, lines: socket.socket | None) -> None:
        self.wire = BlockingWire(control)
        self._lines = lines
        self._received_lines: dict[str, int] = {}
        self._inbox: queue.SimpleQueue[Frame] = queue.SimpleQueue()
        self._urgent: Urgent = lambda message, blobs: False
        self._wake_out, self._wake_in = os.pipe()
        os.set_blocking(self._wake_in, False)
        self._counter = 0
        self._phase = "start"
        self._is_ready = False
        self._busy_s = 0.0
        self._busy_since: float | None = None
        self._is_asked_to_go = False
        self._news = threading.Event()

    # the work path

    def progress(self, phase: str) -> None:
        """The work path has moved on and is in this phase now."""
        self._counter += 1
        self._phase = phase
        if self._busy_since is None and self._is_ready:
            self._busy_since = time.monotonic()

    def ready(self, resident: Mapping[str, Sequence[str]], memory: Mapping[str, int]) -> None:
        """Everything is loaded: tells the front, and counts busy time from now on."""
        self._is_ready = True
        self.send({
            "type": "ready", "resident": {name: list(ids) for name, ids in resident.items()}, "memory": dict(memory)
        })  # fmt: skip

    def idle(self) -> None:
        """The work path waits for something to do."""
        if self._busy_since is not None:
            self._busy_s += time.monotonic() - self._busy_since
            self._busy_since = None
        self._counter += 1
        self._phase = PHASE_IDLE

    @property
    def busy_s(self) -> float:
        """Seconds that the work path was busy, until now."""
        since = self._busy_since
        return self._busy_s + (time.monotonic() - since if since is not None else 0.0)

    def take(self, timeout_s: float | None = None) -> Frame | None:
        """The next message for the work path; None if none comes in time."""
        try:
            return self._inbox.get(timeout=timeout_s) if timeout_s != 0 else self._inbox.get_nowait()
        except queue.Empty:
            return None

    @property
    def wake_fileno(self) -> int:
        """Readable when :meth:`take` may have something, for a work path that waits on other descriptors too."""
        return self._wake_out

    def clear_wake(self) -> None:
        """Call before :meth:`take` after :attr:`wake_fileno` was readable."""
        while select.select([self._wake_out], [], [], 0)[0]:
            os.read(self._wake_out, 4096)

    def send(self, message: dict[str, Any], blobs: Sequence[bytes] = ()) -> None:
        """Sends to the front; if that is gone, so is this process."""
        try:
            self.wire.send(message, blobs)
        except WireClosedError:
            leave(EXIT_FRONT_GONE)

    def receive_line(self, pair_id: str, timeout_s: float) -> socket.socket:
        """The connected socket of a pair that the front passed to this process beside the control channel.

        Raises:
            TimeoutError: it did not come in time.
        """
        until = time.monotonic() + timeout_s
        while pair_id not in self._received_lines:
            left_s = until - time.monotonic()
            if self._lines is None or left_s <= 0 or not select.select([self._lines], [], [], left_s)[0]:
                raise TimeoutError(f"no line for the pair {pair_id} came within {timeout_s:g} s")
            name, descriptors, _, _ = socket.recv_fds(self._lines, 1024, 4)
            if not name:
                leave(EXIT_FRONT_GONE)
            for descriptor in descriptors:
                self._received_lines[name.decode()] = descriptor
        return socket.socket(fileno=self._received_lines.pop(pair_id))

    # life

    def listen(self, urgent: Urgent | None = None) -> None:
        """Starts reading the control channel; ``urgent`` sees each message first, on the reader's thread."""
        if urgent is not None:
            self._urgent = urgent
        threading.Thread(target=self._read, name="control", daemon=True).start()

    def beat(self, every_s: float) -> None:
        """Starts the heartbeat."""
        threading.Thread(target=self._beat, args=(every_s,), name="heartbeat", daemon=True).start()

    def drain_on_sigterm(self) -> None:
        """SIGTERM asks the front to drain this worker; SIGINT (Ctrl-C reaches every process) is the front's business."""
        signal.signal(signal.SIGTERM, self._on_sigterm)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wake(self) -> None:
        """Makes the work path look around."""
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_in, b"!")

    def _on_sigterm(self, signum: int, frame: object) -> None:
        # Only flags: the interrupted thread may hold the lock that sending needs. The heartbeat's thread tells the front, which
        # sends no more work and, when this worker has finished what it has, tells it to stop.
        self._is_asked_to_go = True
        self._news.set()

    def _read(self) -> None:
        try:
            while True:
                message, blobs = self.wire.receive()
                if not self._urgent(message, blobs):
                    self._inbox.put((message, blobs))
                    self.wake()
        except WireClosedError:
            leave(EXIT_FRONT_GONE)
        except WireFormatError as error:
            sys.stderr.write(f"the front sent what is not a message: {error}\n")
            leave(EXIT_FAULT)
        except Exception:
            traceback.print_exc()
            leave(EXIT_FAULT)

    def _beat(self, every_s: float) -> None:
        while True:
            self.send({
                "type": "heartbeat",
                "counter": self._counter,
                "phase": self._phase,
                "busy_s": self.busy_s,
                "is_asked_to_go": self._is_asked_to_go,
            })  # fmt: skip
            self._news.wait(every_s)
            self._news.clear()


def leave(code: int) -> None:
    """Ends the process now, without waiting for threads, devices or finalisers; the kernel frees everything."""
    with contextlib.suppress(Exception):
        sys.stderr.flush()
    os._exit(code)


def die_with_parent() -> None:
    """Has the kernel kill this process when the thread that started it ends, even while it is stopped. Linux only.

    The end of the control channel covers the rest: other systems, and a parent that was gone before this call.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
