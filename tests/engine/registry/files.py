"""Small add-on files, right and wrong, as bytes; and a source that gives them."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from engine.registry.lora_admission import LoraFacts, check_lora
from engine.registry.random_lora import RandomLora
from engine.registry.shapes import Architecture, architecture

Header = dict[str, Any]


@dataclass
class Bytes:
    """A source that gives these bytes, a few at a time, whatever size it states."""

    data: bytes
    stated_bytes: int | None = None
    at_once: int = 100_000
    at: int = field(default=0, init=False)

    @property
    def size_bytes(self) -> int:
        return len(self.data) if self.stated_bytes is None else self.stated_bytes

    def readinto(self, view: memoryview, /) -> int:
        part = self.data[self.at : self.at + min(len(view), self.at_once)]
        view[: len(part)] = part
        self.at += len(part)
        return len(part)


def tiny() -> Architecture:
    return architecture("tiny")


@cache
def lora_bytes(rank: int = 4, seed: int = 0) -> bytes:
    """A right file with diffusers' key names, fp16."""
    source = RandomLora(tiny(), rank, seed)
    data = bytearray(source.size_bytes)
    at = 0
    while n := source.readinto(memoryview(data)[at:]):
        at += n
    return bytes(data)


def check(data: bytes) -> LoraFacts:
    return check_lora(Bytes(data), "file", tiny())


def parts(data: bytes) -> tuple[Header, bytes]:
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_text(text: bytes, body: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text + body


def joined(header: Header, body: bytes) -> bytes:
    return with_text(json.dumps(header).encode(), body)


def file_of(tensors: dict[str, np.ndarray], dtypes: dict[str, str] | None = None, **metadata: str) -> bytes:
    """A safetensors file; uint16 arrays are BF16 unless ``dtypes`` says otherwise."""
    names = {"float32": "F32", "float16": "F16", "uint16": "BF16", "int32": "I32"}
    header: Header = {"__metadata__": metadata} if metadata else {}
    body = b""
    for name, values in tensors.items():
        raw = np.ascontiguousarray(values).tobytes()
        dtype = (dtypes or {}).get(name, names[str(values.dtype)])
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    return joined(header, body)


def tensors_of(data: bytes) -> dict[str, np.ndarray]:
    """The tensors of an fp16 or fp32 file."""
    header, body = parts(data)
    kinds = {"F32": np.float32, "F16": np.float16}
    return {
        name: np.frombuffer(body[slice(*entry["data_offsets"])], kinds[entry["dtype"]]).reshape(entry["shape"]).copy()
        for name, entry in header.items()
        if name != "__metadata__"
    }
