"""Floating-point numbers as bits: finite or not, and from one type to another, in numpy (which has no bf16) at memory speed.

Values are uint16 or uint32 arrays that hold the bits. Work goes block by block, so that intermediate results stay in the
processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Final

import numpy as np

BLOCK_ELEMENTS: Final = 65536
BITS: Final[Mapping[str, type[np.unsignedinteger]]] = {"F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}
_EXPONENT: Final[Mapping[str, int]] = {"F32": 0x7F80_0000, "F16": 0x7C00, "BF16": 0x7F80}
"""All ones in the exponent: infinity or NaN."""


def as_bits(raw: memoryview | bytes | bytearray, dtype: str) -> np.ndarray:
    """The bytes as an array of bits; they need not be aligned."""
    return np.frombuffer(raw, dtype=BITS[dtype])


def is_finite(bits: np.ndarray, dtype: str) -> bool:
    """Whether no element is NaN or infinite."""
    magnitude = bits.dtype.type(np.iinfo(bits.dtype).max >> 1)
    return all(
        int((bits[at : at + BLOCK_ELEMENTS] & magnitude).max()) < _EXPONENT[dtype]
        for at in range(0, bits.size, BLOCK_ELEMENTS)
    )


def to_floats(bits: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values; exact."""
    if dtype == "F32":
        return bits.view(np.float32)
    if dtype == "F16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def convert(bits: np.ndarray, dtype: str, wanted: str) -> np.ndarray:
    """Finite values in another type, rounded to nearest even as torch does; too large ones become infinite."""
    if dtype == wanted:
        return bits
    out = np.empty(bits.size, BITS[wanted])
    one = _CONVERTERS[dtype, wanted]
    for at in range(0, bits.size, BLOCK_ELEMENTS):
        one(bits[at : at + BLOCK_ELEMENTS], out[at : at + BLOCK_ELEMENTS])
    return out


def _f16_to_bf16(bits: np.ndarray, out: np.ndarray) -> None:
    # 65,536 values only: a table is three times as fast as arithmetic. Every index is in it; "clip" spares the check.
    np.take(_bf16_of_f16(), bits, out=out, mode="clip")


@cache
def _bf16_of_f16() -> np.ndarray:
    table = np.empty(65536, np.uint16)
    with np.errstate(invalid="ignore"):  # the table has the NaNs' entries too; nobody reads them
        _f32_to_bf16(np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32).view(np.uint32), table)
    return table


def _f32_to_bf16(bits: np.ndarray, out: np.ndarray) -> None:
    rounding = bits >> np.uint32(16)
    rounding &= np.uint32(1)
    rounding += np.uint32(0x7FFF)
    rounding += bits
    rounding >>= np.uint32(16)
    np.copyto(out, rounding, casting="unsafe")


def _f32_to_f16(bits: np.ndarray, out: np.ndarray) -> None:
    with np.errstate(over="ignore"):
        out[:] = bits.view(np.float32).astype(np.float16).view(np.uint16)


def _bf16_to_f16(bits: np.ndarray, out: np.ndarray) -> None:
    _f32_to_f16(bits.astype(np.uint32) << np.uint32(16), out)


def _f16_to_f32(bits: np.ndarray, out: np.ndarray) -> None:
    np.copyto(out.view(np.float32), bits.view(np.float16))


def _bf16_to_f32(bits: np.ndarray, out: np.ndarray) -> None:
    np.left_shift(bits, np.uint32(16), out=out, dtype=np.uint32)


_CONVERTERS: Final[Mapping[tuple[str, str], Callable[[np.ndarray, np.ndarray], None]]] = {
    ("F16", "BF16"): _f16_to_bf16,
    ("F32", "BF16"): _f32_to_bf16,
    ("F32", "F16"): _f32_to_f16,
    ("BF16", "F16"): _bf16_to_f16,
    ("F16", "F32"): _f16_to_f32,
    ("BF16", "F32"): _bf16_to_f32,
}
