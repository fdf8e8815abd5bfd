"""Admission of a LoRA: from a store's bytes to facts for the catalogue, or to a checked flat file in the host tier. Torch-free.

One pass over the file: header checks first, then every value is hashed, checked and, on its way into the host tier, converted.
Nothing under a final name exists before the last check has passed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from engine.registry.checked_stream import CheckedStream, Piece, scalar
from engine.registry.flat_lora import ITEM_BYTES, FlatWriter, layout, write_flat_lora
from engine.registry.float_bits import as_bits, convert, is_finite
from engine.registry.lora_check import FILE_BYTES_MAX, RANK_MAX, PlannedPair, patched_parts, plan_lora
from engine.registry.safetensors_header import AddOnRefusedError, refuse
from engine.registry.shapes import Architecture
from engine.registry.store import Source
from traces.problems import Problem

UNKNOWN_ID: Final = "0" * 64


@dataclass(frozen=True, slots=True)
class LoraFacts:
    """What a file that passed every check is."""

    add_on_id: str
    """sha256 of the file."""
    file_bytes: int
    architecture: str
    rank: int
    """The largest of all layers."""
    n_layers: int
    targets: tuple[str, ...]
    """Parts of the network it patches, without block numbers."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a file may be at most."""

    file_bytes: int = FILE_BYTES_MAX
    rank: int = RANK_MAX


@dataclass(frozen=True, slots=True)
class Expected:
    """What the catalogue says of the file; a file that is otherwise is refused."""

    sha256: str | None = None
    """None: the catalogue has no such file yet."""
    file_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class FlatPlace:
    """Where the flat file goes."""

    path: Path
    dtype: str
    """The network's: ``BF16``, ``F16`` or ``F32``."""
    add_on_id: str = ""
    """The id written into it, where that is not the sha256 (random weights)."""


def check_lora(
    source: Source,
    where: str,
    architecture: Architecture,
    *,
    expected: Expected | None = None,
    limits: Limits | None = None,
    flat: FlatPlace | None = None,
    progress: Callable[[], None] = lambda: None,
) -> LoraFacts:
    """Checks a whole file and, if ``flat`` is given, lays it out there.

    Args:
        source: the file, read once.
        where: names it in messages.
        architecture: of the network that it is to fit.
        expected: what the catalogue says of it.
        limits: on size and rank.
        flat: where to lay it out; None only checks.
        progress: called at every chunk.

    Raises:
        AddOnRefusedError: the file must not be used; with the reasons.
        StoreError: the store did not give what it promised.
        OSError: the host tier is full or missing.
    """
    expected, limits = expected or Expected(), limits or Limits()
    if expected.file_bytes is not None and source.size_bytes != expected.file_bytes:
        raise refuse(
            where, f"has {source.size_bytes} bytes", f"{expected.file_bytes}, as the catalogue says", _REPLACED
        )
    stream = CheckedStream(source, where, progress)
    header = stream.open(file_bytes_max=limits.file_bytes, n_dims_max=2)
    pairs = plan_lora(where, header, architecture.lora_targets, limits.rank)
    with contextlib.ExitStack() as stack:
        writer = None
        if flat is not None:
            first_guess = layout(
                flat.add_on_id or expected.sha256 or UNKNOWN_ID, architecture.name, flat.dtype,
                [(pair.layer, pair.rank, pair.n_out, pair.n_in, 1.0) for pair in pairs],
            )  # fmt: skip
            writer = stack.enter_context(write_flat_lora(flat.path, first_guess))
            places = {layer.name: (layer.down_at, layer.up_at) for layer in first_guess.layers}
        else:
            places = {}
        sink = _Sink(where, pairs, writer, flat.dtype if flat is not None else "", places)
        problems = stream.body(header, sink.take) + sink.sorted_problems()
        if problems:
            raise AddOnRefusedError(problems)
        digest = stream.sha256()
        if expected.sha256 is not None and digest != expected.sha256:
            raise refuse(where, f"has the sha256 {digest}", f"{expected.sha256}, as the catalogue says", _REPLACED)
        if writer is not None and flat is not None:
            writer.finish(sink.factors(), flat.add_on_id or digest)
    rank = max(pair.rank for pair in pairs)
    return LoraFacts(digest, source.size_bytes, architecture.name, rank, len(pairs), patched_parts(pairs))


_REPLACED: Final = "Put the right file into the store, or admit this one as a new version"


@dataclass(slots=True)
class _Sink:
    """Puts checked pieces where they belong; called from several threads, each element once."""

    where: str
    pairs: tuple[PlannedPair, ...]
    writer: FlatWriter | None
    dtype: str
    places: dict[str, tuple[int, int]]
    _matrices: dict[str, int] = field(default_factory=dict)
    """Tensor name to index of its first element in the body."""
    _alphas: dict[str, float] = field(default_factory=dict)
    _problems: dict[str, Problem] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for pair in self.pairs:
            if pair.layer in self.places:
                down_at, up_at = self.places[pair.layer]
                self._matrices[pair.down.name] = down_at
                self._matrices[pair.up.name] = up_at

    def take(self, piece: Piece, raw: memoryview) -> None:
        span = piece.span
        if span.n_elements == 1 and span.name.endswith(".alpha"):
            self._alphas[span.name] = scalar(raw, span.dtype)
        elif self.writer is not None:
            values = convert(as_bits(raw, span.dtype), span.dtype, self.dtype)
            is_narrower = self.dtype != span.dtype and (self.dtype == "F16" or span.dtype == "F32")
            if is_narrower and not is_finite(values, self.dtype):
                what = f"tensor {span.name!r} holds values too large for {self.dtype}"
                self._problems[span.name] = Problem(self.where, what, "values that the network's type can hold")
                return
            self.writer.put((self._matrices[span.name] + piece.first) * ITEM_BYTES[self.dtype], values)

    def sorted_problems(self) -> list[Problem]:
        return [self._problems[name] for name in sorted(self._problems)]

    def factors(self) -> dict[str, float]:
        return {pair.layer: pair.factor(self._alphas[pair.alpha.name] if pair.alpha else None) for pair in self.pairs}
