"""A strict reader of safetensors headers: what a file says it holds is believed only if it is exact.

The format: 8 bytes little-endian length, that many bytes of JSON, then the tensors without gaps. safetensors' own reader accepts
duplicate tensor names; here every oddity is refused before a byte of the body is read.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from traces.problems import InputError, Problem

HEADER_BYTES_MAX: Final = 8 * 2**20
LENGTH_BYTES: Final = 8
NAME_CHARACTERS_MAX: Final = 1024
DTYPE_BYTES: Final[Mapping[str, int]] = {"F32": 4, "F16": 2, "BF16": 2}
INTEGER_BYTES: Final[Mapping[str, int]] = {"I64": 8}
"""Only where a reader asks for them: published text encoders carry the numbers of their positions."""
ITEM_BYTES: Final[Mapping[str, int]] = {**DTYPE_BYTES, **INTEGER_BYTES}


class AddOnRefusedError(InputError):
    """An add-on file that must not be used. Carries every reason found."""


@dataclass(frozen=True, slots=True)
class TensorSpan:
    """One tensor of a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    """First byte, counted from the start of the body."""
    stop: int

    @property
    def n_elements(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """What a file holds. The spans tile the body exactly."""

    spans: tuple[TensorSpan, ...]
    """In the order of the body."""
    metadata: Mapping[str, str]
    body_at: int
    """Where in the file the body begins."""
    body_bytes: int


def refuse(where: str, what: str, allowed: str, repair: str = "Use another file") -> AddOnRefusedError:
    """The error for one reason, ready to be raised."""
    return AddOnRefusedError(Problem(where, what, allowed, repair))


def header_bytes(where: str, start: bytes, file_bytes: int) -> int:
    """Length of the JSON, from the file's first nine bytes.

    Raises:
        AddOnRefusedError: the file is too short, a pickle or zip archive, or the length cannot be.
    """
    if file_bytes < LENGTH_BYTES or len(start) < LENGTH_BYTES:
        raise refuse(where, f"is truncated: {file_bytes} bytes", "a safetensors file")
    if start[8:9] != b"{" and (start[:1] == b"\x80" or start[:2] == b"PK"):
        raise refuse(where, "is a pickle or a zip archive, which can run code", "a safetensors file", "Convert it")
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    if length > HEADER_BYTES_MAX:
        raise refuse(where, f"says that its header has {length} bytes", f"a header of at most {HEADER_BYTES_MAX} bytes")
    if LENGTH_BYTES + length > file_bytes:
        raise refuse(
            where, f"is truncated inside its header: {file_bytes} bytes", f"{LENGTH_BYTES + length} bytes or more"
        )
    return length


def parse_header(
    where: str, text: bytes, file_bytes: int, *, n_dims_max: int, allows_integers: bool = False
) -> SafetensorsHeader:
    """Reads the JSON and checks that its tensors tile the file.

    Args:
        where: names the file in messages.
        text: the JSON, as long as :func:`header_bytes` says.
        file_bytes: size of the whole file.
        n_dims_max: tensors of more dimensions are refused.
        allows_integers: tensors of :data:`INTEGER_BYTES` may be among them.

    Raises:
        AddOnRefusedError: with the first reason.
    """
    try:
        table = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise refuse(
            where, f"has a broken header: {str(error)[:200]}", "a JSON object without duplicate keys"
        ) from None
    if not isinstance(table, dict):
        raise refuse(where, f"has a header of type {type(table).__name__}", "a JSON object")
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise refuse(where, f"has the metadata {str(metadata)[:80]!r}", "a JSON object of texts")
    spans = sorted(
        (
            _span(where, name, entry, n_dims_max, ITEM_BYTES if allows_integers else DTYPE_BYTES)
            for name, entry in table.items()
        ),
        key=lambda span: (span.start, span.stop, span.name),
    )
    body_at = LENGTH_BYTES + len(text)
    expected = 0
    for span in spans:
        if span.start != expected or span.stop - span.start != span.n_elements * ITEM_BYTES[span.dtype]:
            raise refuse(
                where, f"tensor {_short(span.name)} lies at {span.start}..{span.stop}",
                f"{span.shape} of {span.dtype} from {expected} on",
            )  # fmt: skip
        if body_at + span.stop > file_bytes:
            raise refuse(
                where,
                f"is truncated: {file_bytes} bytes",
                f"{body_at + span.stop} bytes for tensor {_short(span.name)}",
            )
        if span.stop == span.start:
            raise refuse(where, f"tensor {_short(span.name)} is empty", "at least one element")
        expected = span.stop
    if body_at + expected != file_bytes:
        raise refuse(where, f"has {file_bytes - body_at - expected} bytes that no tensor owns", "none")
    if not spans:
        raise refuse(where, "holds no tensor", "weights")
    return SafetensorsHeader(tuple(spans), metadata, body_at, expected)


def _span(where: str, name: str, entry: Any, n_dims_max: int, dtypes: Mapping[str, int]) -> TensorSpan:
    if len(name) > NAME_CHARACTERS_MAX:
        raise refuse(where, f"has a tensor name of {len(name)} characters", f"at most {NAME_CHARACTERS_MAX}")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise refuse(where, f"tensor {_short(name)} is described by {str(entry)[:80]}", "dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in dtypes:
        raise refuse(where, f"tensor {_short(name)} has dtype {str(dtype)[:20]!r}", f"one of {sorted(dtypes)}")
    if not _is_naturals(shape) or len(shape) > n_dims_max or not _is_naturals(offsets) or len(offsets) != 2:
        raise refuse(
            where, f"tensor {_short(name)} has shape {shape}, offsets {offsets}"[:200],
            f"at most {n_dims_max} dimensions, two offsets, whole numbers from 0 on",
        )  # fmt: skip
    if offsets[0] > offsets[1]:
        raise refuse(where, f"tensor {_short(name)} has offsets {offsets}", "the first at most the second")
    return TensorSpan(name, dtype, tuple(shape), offsets[0], offsets[1])


def _short(name: str) -> str:
    return repr(name if len(name) <= 200 else f"{name[:200]}…")


def _is_naturals(values: Any) -> bool:
    # type() and not isinstance(): true and 1.0 are no counts
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**48 for value in values)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"duplicate key {next(key for key in counts if counts[key] > 1)[:200]!r}")
    return table


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number JSON knows")
