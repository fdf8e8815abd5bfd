"""Checked LoRA files of the host tier as this process sees them: mapped once, registered with CUDA once, never copied."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from pathlib import Path
from typing import Final

import torch

from engine.lora import PinnedLayer, PinnedLora
from engine.registry.flat_lora import map_flat_lora
from engine.workers.painter import JobError, LoadedLora
from traces.problems import InputError

DTYPES: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class LoraFiles:
    """The files that stay mapped. One that the host tier drops is let go when the next LoRA is asked for."""

    def __init__(self, dtype: torch.dtype, n_max: int, *, is_cuda: bool) -> None:
        self._dtype = dtype
        self._n_max = n_max
        self._is_cuda = is_cuda
        self._held: OrderedDict[str, tuple[PinnedLora, int]] = OrderedDict()

    @property
    def bytes(self) -> int:
        """Bytes that are mapped."""
        return sum(lora.bytes for lora, _ in self._held.values())

    def get(self, loaded: LoadedLora) -> PinnedLora:
        """A LoRA, ready for one copy to the device.

        Raises:
            JobError: the file is gone, damaged, or made for another type of network.
        """
        key = loaded.path
        for other in [held for held in self._held if held != key and not Path(held).exists()]:
            self._let_go(other)  # dropped from the host tier: its memory is to be free
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key][0]
        try:
            # Writable, because CUDA registers (pins) only such mappings without copying; nobody writes.
            flat = map_flat_lora(Path(loaded.path), is_writable=True)
        except InputError as error:
            raise JobError(f"LoRA {loaded.lora_id!r}: {error}") from error
        dtype = DTYPES[flat.header.dtype]
        if dtype != self._dtype:
            raise JobError(
                f"LoRA {loaded.lora_id!r} lies in the host tier as {dtype}, this worker computes in {self._dtype}"
            )
        body = torch.from_numpy(flat.body)
        address = 0
        if self._is_cuda and int(torch.cuda.cudart().cudaHostRegister(body.data_ptr(), body.numel(), 0)) == 0:
            address = body.data_ptr()
        layers = tuple(
            PinnedLayer(**{field.name: getattr(layer, field.name) for field in dataclasses.fields(PinnedLayer)})
            for layer in flat.header.layers
        )
        lora = PinnedLora(flat.header.add_on_id, flat.header.rank, body.view(dtype), layers)
        self._held[key] = (lora, address)
        while len(self._held) > self._n_max:
            self._let_go(next(iter(self._held)))
        return lora

    def close(self) -> None:
        """Lets everything go; the device has finished with it."""
        for key in list(self._held):
            self._let_go(key)

    def _let_go(self, key: str) -> None:
        _, address = self._held.pop(key)
        if address:
            torch.cuda.synchronize()  # a copy from it may be under way
            torch.cuda.cudart().cudaHostUnregister(address)
