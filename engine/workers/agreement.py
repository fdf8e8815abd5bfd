"""What the two ranks of a CFG pair agree on before every step: whether to patch LoRAs in now, and whether to give up.

Both ranks hear from the front on channels of their own, so news reaches them at different steps; acting on it at once would
leave one of them waiting inside an exchange that the other never joins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.links.host_memory import HostMemoryLine
from engine.links.protocol import LineLostError
from engine.links.stream import StreamLine
from engine.links.tcp import TcpLine
from engine.workers.painter import JobError, PeerLostError

ABORT = "cfg_abort"


class _PartnerLine(StreamLine):
    """A line to the other rank: hearing that it has given up raises, also inside a painter's call that waits for it."""

    def hear(self, timeout_s: float) -> dict[str, Any]:
        """The next message.

        Raises:
            LineLostError: as for every line.
            JobError: the other rank found a job at fault; it fails here too.
            PeerLostError: the other rank gave the batch up for another reason.
        """
        message = self.hear_all(timeout_s)
        if message["type"] != ABORT:
            return message
        reason = str(message.get("reason"))
        if message.get("is_job_at_fault"):
            raise JobError(reason, str(message.get("request_id", "")))
        raise PeerLostError(f"the other rank gave up: {reason}")

    def hear_all(self, timeout_s: float) -> dict[str, Any]:
        """The next message, of whatever kind."""
        return super().hear(timeout_s)


class HostMemoryPartner(_PartnerLine, HostMemoryLine):
    """The other rank is on this host."""


class TcpPartner(_PartnerLine, TcpLine):
    """The other rank is on another host."""


Partner = HostMemoryPartner | TcpPartner


@dataclass(frozen=True, slots=True)
class Flags:
    """What one rank, or both together, know before a step."""

    has_loras: bool
    is_cancelled: bool


class Agreement:
    """One rank's side; without a partner every call returns what it was given."""

    def __init__(self, line: Partner | None, timeout_s: float) -> None:
        self._line = line
        self._timeout_s = timeout_s
        self._batch_id = -1

    def begin(self, batch_id: int) -> None:
        """Both ranks start on the same batch; what was left on the line by one given up is thrown away."""
        self._batch_id = batch_id
        if self._line is None:
            return
        self._tell({"type": "cfg_begin", "batch": batch_id})
        while True:
            try:
                message = self._line.hear_all(self._timeout_s)
            except LineLostError as error:
                raise PeerLostError(f"the other rank is gone: {error}") from None
            if message["type"] == "cfg_begin" and message["batch"] == batch_id:
                return

    def agree(self, i: int, mine: Flags) -> Flags:
        """Before step ``i``: LoRAs go in if both have them, and both give up if either should.

        Raises:
            JobError: the other rank found a job at fault.
            PeerLostError: the other rank has given this batch up, or is gone or late.
        """
        if self._line is None:
            return mine
        self._tell({
            "type": "cfg_flags", "batch": self._batch_id, "i": i, "has_loras": mine.has_loras, "is_cancelled": mine.is_cancelled
        })  # fmt: skip
        try:
            message = self._line.hear(self._timeout_s)
        except LineLostError as error:
            raise PeerLostError(f"the other rank is gone: {error}") from None
        if message["type"] != "cfg_flags" or message["i"] != i or message["batch"] != self._batch_id:
            raise PeerLostError(f"the other rank said {message['type']!r} before step {i}")
        return Flags(mine.has_loras and message["has_loras"], mine.is_cancelled or message["is_cancelled"])

    def abort(self, error: Exception) -> None:
        """Tells the other rank, which may be inside a call that waits for this one, that this batch is given up."""
        if self._line is not None:
            self._tell({
                "type": ABORT,
                "batch": self._batch_id,
                "reason": str(error)[:2000],
                "is_job_at_fault": isinstance(error, JobError),
                "request_id": getattr(error, "request_id", ""),
            })  # fmt: skip

    def _tell(self, message: dict[str, Any]) -> None:
        if self._line is None:
            return
        try:
            self._line.tell(message)
        except LineLostError as error:
            raise PeerLostError(f"the other rank is gone: {error}") from None
