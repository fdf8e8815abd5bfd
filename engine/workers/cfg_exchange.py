"""The two ranks of a guided request: each computes one half of the prediction and sees the other's before it takes the step.

Only the predicted noise is exchanged (4 x 128 x 128 numbers an image at 1024 px). Both ranks then guide and step on the same two
halves, so their latents stay equal bit by bit.
"""

from __future__ import annotations

from typing import Any, Final

import torch

from engine.links.protocol import LineLostError
from engine.links.tensor_attach import open_as_base, open_as_controlnets
from engine.links.tensor_line import TensorLine
from engine.workers.painter import PeerLostError

LANES: Final = ("half_0", "half_1")


class CfgExchange:
    """One rank's side. What it says within :meth:`swap` the other rank hears within its own call of the same step."""

    def __init__(
        self, partner: Any, rank: int, device: torch.device | str, dtype: torch.dtype, wanted: str, timeout_s: float
    ) -> None:
        """Agrees with the other rank, which does the same now, on how tensors travel.

        Args:
            partner: the line; rank 0 has the end that makes buffers.
            rank: 0 computes the unconditional, 1 the conditional half.
            device: of this rank.
            dtype: of the predictions.
            wanted: see :class:`engine.workers.model_options.ModelOptions`.
            timeout_s: longest wait for the other rank.

        Raises:
            PeerLostError: it is gone, late, or computes in another type.
        """
        self._partner = partner
        self._rank = rank
        self._timeout_s = timeout_s
        self._n_bytes = 0
        try:
            if rank == 0:
                self._line: TensorLine = open_as_base(partner, device, dtype, wanted, timeout_s)
            else:
                self._line = open_as_controlnets(
                    partner, partner.hear(timeout_s), device, dtype, timeout_s, serves_many=False
                )
        except LineLostError as error:
            raise PeerLostError(f"the other rank: {error}") from error

    @property
    def transport(self) -> str:
        """How predictions travel."""
        return self._line.transport

    def swap(self, step: int, own: torch.Tensor, other: torch.Tensor) -> None:
        """Sends ``own`` and receives into ``other``, in the order of the current stream.

        Raises:
            PeerLostError: the other rank is gone, late, or at another step.
        """
        try:
            self._grow(own.numel() * own.element_size())
            # Two places in turn: the other rank may still be reading the step before.
            at = (step % 2) * self._n_bytes
            written = self._line.write(LANES[self._rank], at, own)
            self._line.publish(written)
            self._partner.tell({"type": "half", "step": step})
            message = self._partner.hear(self._timeout_s)
            if message.get("type") != "half" or message.get("step") != step:
                raise LineLostError(f"it said {str(message)[:200]} in step {step}")
            self._line.read(LANES[1 - self._rank], at, other)
            self._line.settle()
        except LineLostError as error:
            raise PeerLostError(f"the other rank: {error}") from error

    def _grow(self, n_bytes: int) -> None:
        """Makes the lanes large enough. Both ranks run the same shape, so both come here at the same step."""
        if n_bytes <= self._n_bytes:
            return
        if self._rank == 0:
            lanes = self._line.make(dict.fromkeys(LANES, 2 * n_bytes))
            self._partner.tell({"type": "lanes", "lanes": lanes})
        else:
            message = self._partner.hear(self._timeout_s)
            if message.get("type") != "lanes":
                raise LineLostError(f"it said {str(message)[:200]} in place of its lanes")
            self._line.accept(message["lanes"])
        self._n_bytes = n_bytes
