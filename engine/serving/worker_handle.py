"""One worker process (one rank) as the front holds it: its channel, its pulse, and its end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import engine
from engine.serving.wire import WireClosedError, WireFormatError, pack, read_frame

LOG_BYTES_MAX: Final = 4 * 2**20
LAST_WORDS_BYTES: Final = 4096
PACKAGE_ROOT: Final = str(Path(engine.__file__).parent.parent)

OnMessage = Callable[["WorkerHandle", dict[str, Any], tuple[bytes, ...]], None]
OnEnd = Callable[["WorkerHandle", str], None]


class WorkerHandle:
    """Made by :func:`spawn` or :func:`adopt`. ``on_end`` is called exactly once, whatever the reason."""

    def __init__(self, worker_id: str, rank: int, pid: int, host: str) -> None:
        self.worker_id = worker_id
        self.rank = rank
        self.pid = pid
        self.host = host
        """Empty: this host."""
        self.is_ready = False
        self.counter = -1
        self.phase = "start"
        self.busy_s = 0.0
        self.is_asked_to_go = False
        self.memory: Mapping[str, int] = {}
        self.resident: Mapping[str, Sequence[str]] = {}
        self.files: dict[str, bool] = {}
        """Of another host: LoRAs that are copied to it; False while they are on their way."""
        now_s = asyncio.get_running_loop().time()
        self.heard_s = now_s
        self.progress_s = now_s
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._lines: socket.socket | None = None
        self._log: Path | None = None
        self._reading: asyncio.Task[None] | None = None

    def send(self, message: Mapping[str, Any], blobs: Sequence[bytes] = ()) -> None:
        """Sends; a worker that is gone is noticed by its end, not here."""
        if self._writer is None or self._writer.is_closing():
            return
        for part in pack(message, blobs):
            self._writer.write(part)

    def pass_line(self, pair_id: str, connection: socket.socket) -> bool:
        """Hands one end of a pair's socket over and closes it here; False if the worker cannot take it."""
        try:
            if self._lines is None:
                return False
            socket.send_fds(self._lines, [pair_id.encode()], [connection.fileno()])
        except OSError:
            return False  # gone, or a queue of lines it never took: the pair counts as lost, its end follows
        finally:
            connection.close()
        return True

    def local_address(self) -> str:
        """Address of this host as the worker's host reaches it."""
        if self._writer is None or not self.host:
            return ""
        return str(self._writer.get_extra_info("sockname")[0])

    def beat(self, message: Mapping[str, Any]) -> None:
        """Takes a heartbeat in."""
        now_s = asyncio.get_running_loop().time()
        self.heard_s = now_s
        if message["counter"] != self.counter or message["phase"] != self.phase:
            self.counter, self.phase, self.progress_s = message["counter"], message["phase"], now_s
        self.busy_s = message["busy_s"]
        self.is_asked_to_go = message.get("is_asked_to_go", False)

    def signal(self, number: signal.Signals) -> bool:
        """Sends a signal to the process, if it is of this host and has not been reaped; whether it was sent."""
        if self._process is None or self._process.returncode is not None:
            return False
        try:
            self._process.send_signal(number)
        except ProcessLookupError:
            return False
        return True

    def terminate(self) -> None:
        """Kills at once: a signal here, the end of the channel on another host."""
        self.signal(signal.SIGKILL)
        if self._process is None and self._writer is not None:
            self._writer.transport.abort()

    async def wait_gone(self, timeout_s: float) -> bool:
        """Waits for the process to be reaped (of another host: for the channel's end)."""
        waiting = self._process.wait() if self._process is not None else self._wait_channel()
        try:
            await asyncio.wait_for(waiting, timeout_s)
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Kills, reaps and frees everything of this process; bounded by the kernel's time to kill."""
        self.terminate()
        if self._process is not None:
            await self._process.wait()
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
        if self._writer is not None:
            self._writer.transport.abort()
        if self._lines is not None:
            self._lines.close()
            self._lines = None

    def last_words(self) -> str:
        """The end of what it wrote to its log: its last line that is not empty."""
        if self._log is None:
            return ""
        try:
            with self._log.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - LAST_WORDS_BYTES))
                lines = file.read().decode("utf-8", "replace").strip().splitlines()
        except OSError:
            return ""
        return lines[-1][:500] if lines else ""

    async def _wait_channel(self) -> None:
        if self._reading is not None:
            await asyncio.wait([self._reading])

    async def _read(self, reader: asyncio.StreamReader, on_message: OnMessage, on_end: OnEnd) -> None:
        reason = ""
        try:
            while True:
                message, blobs = await read_frame(reader)
                if message["type"] == "fault":
                    reason = str(message.get("reason", ""))
                    continue
                on_message(self, message, blobs)
        except WireClosedError:
            pass
        except WireFormatError as error:
            reason = f"it sent what is not a message: {error}"
        except (KeyError, TypeError, ValueError) as error:
            traceback.print_exc()
            reason = f"it sent a message that is not understood: {type(error).__name__} {error}"
        on_end(self, await self._how_it_ended(reason))

    async def _how_it_ended(self, reason: str) -> str:
        if self._process is None:
            return reason or "the connection to its host ended"
        try:
            code = await asyncio.wait_for(self._process.wait(), 2.0)
        except TimeoutError:
            return reason or "it closed its channel"
        if reason:
            return reason
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return f"exited with code {code}{': ' + self.last_words() if code and self.last_words() else ''}"


async def spawn(
    worker_id: str,
    rank: int,
    logs: Path,
    environment: Mapping[str, str],
    on_message: OnMessage,
    on_end: OnEnd,
) -> WorkerHandle:
    """Starts a worker process on this host. Raises OSError if the system cannot (processes, descriptors, memory)."""
    mine, its = socket.socketpair()
    my_lines, its_lines = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    log_path = logs / f"{worker_id}.{rank}.log"
    mode = "ab" if not log_path.exists() or log_path.stat().st_size < LOG_BYTES_MAX else "wb"
    try:
        with log_path.open(mode) as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "engine.workers.main",
                "--control-fd", str(its.fileno()), "--lines-fd", str(its_lines.fileno()),
                stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log,
                pass_fds=(its.fileno(), its_lines.fileno()), start_new_session=True,
                env={**os.environ, "PYTHONPATH": _python_path(), **environment},
            )  # fmt: skip
    except BaseException:
        mine.close()
        my_lines.close()
        raise
    finally:
        its.close()
        its_lines.close()
    my_lines.setblocking(False)
    handle = WorkerHandle(worker_id, rank, process.pid, "")
    handle._process, handle._lines, handle._log = process, my_lines, log_path
    reader, handle._writer = await asyncio.open_unix_connection(sock=mine)
    handle._reading = asyncio.create_task(handle._read(reader, on_message, on_end), name=f"read {worker_id}.{rank}")
    return handle


def adopt(
    worker_id: str,
    rank: int,
    joined: tuple[asyncio.StreamReader, asyncio.StreamWriter, Mapping[str, Any]],
    on_message: OnMessage,
    on_end: OnEnd,
) -> WorkerHandle:
    """Takes over the channel of a worker of another host that has joined."""
    reader, writer, hello = joined
    handle = WorkerHandle(worker_id, rank, int(hello["pid"]), str(hello["host"]))
    handle._writer = writer
    handle._reading = asyncio.create_task(handle._read(reader, on_message, on_end), name=f"read {worker_id}.{rank}")
    return handle


def _python_path() -> str:
    before = os.environ.get("PYTHONPATH", "")
    return PACKAGE_ROOT + (os.pathsep + before if before else "")
