"""The shapes that a file must have to fit an architecture, known without torch: one small JSON table per architecture.

``python -m engine.shape_tables`` writes the tables from the networks themselves. Rows stand for many layers:
``"down_blocks.2.attentions.{0-1}.proj_in": [1280, 1280]``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from traces.problems import one_problem

TABLES: Final = Path(__file__).parent / "architectures"
_RANGE: Final = re.compile(r"\{(\d+)-(\d+)\}")


@dataclass(frozen=True, slots=True)
class Architecture:
    """One family of networks."""

    name: str
    lora_targets: Mapping[str, tuple[int, ...]]
    """Linear layers that a LoRA may patch, by module name in the UNet: ``(out, in)``."""
    controlnet: Mapping[str, tuple[int, ...]]
    """Every tensor of a ControlNet's state dict."""
    controlnet_config: Mapping[str, object]
    """Every setting of a ControlNet; a ``config.json`` says the same or nothing."""
    checkpoint: Mapping[str, Mapping[str, tuple[int, ...]]]
    """Every tensor of a checkpoint, by part (``unet``, ``vae``, ``text_encoder``, ``text_encoder_2``)."""
    checkpoint_config: Mapping[str, Mapping[str, object]]
    """Settings of each part that decide its arithmetic."""


def architecture_names() -> tuple[str, ...]:
    """Architectures that have a table, sorted."""
    return tuple(sorted(path.stem for path in TABLES.glob("*.json")))


@cache
def architecture(name: str) -> Architecture:
    """The table of an architecture.

    Raises:
        InputError: there is none of this name.
    """
    if name not in architecture_names():
        raise one_problem(
            "architecture", f"got {name!r}", f"one of {', '.join(architecture_names())}", "Correct the catalogue."
        )
    plain = json.loads((TABLES / f"{name}.json").read_text(encoding="utf-8"))
    return Architecture(
        name,
        MappingProxyType(expand(plain["lora_targets"])),
        MappingProxyType(expand(plain["controlnet"])),
        MappingProxyType(plain["controlnet_config"]),
        _by_part(expand(plain["checkpoint"])),
        _by_part(plain["checkpoint_config"]),
    )


def _by_part(rows: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """``part.name`` to part to name."""
    parts: dict[str, dict[str, Any]] = {}
    for name, value in rows.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = value
    return MappingProxyType({part: MappingProxyType(names) for part, names in parts.items()})


def expand(rows: Mapping[str, list[int]]) -> dict[str, tuple[int, ...]]:
    """Name to shape for every name that the rows stand for."""
    return {name: tuple(shape) for pattern, shape in rows.items() for name in _names(pattern)}


def _names(pattern: str) -> Iterator[str]:
    texts = _RANGE.split(pattern)  # text, first, last, text, first, last, …, text
    ranges = [range(int(first), int(last) + 1) for first, last in zip(texts[1::3], texts[2::3], strict=True)]
    for numbers in product(*ranges):
        yield texts[0] + "".join(f"{number}{text}" for number, text in zip(numbers, texts[3::3], strict=True))


def compress(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[int]]:
    """The inverse of :func:`expand`: names that differ in one number only, and share a shape, become one row."""
    rows = {tuple(name.split(".")): tuple(shape) for name, shape in shapes.items()}
    for place in reversed(range(max(len(name) for name in rows))):
        groups: dict[tuple[tuple[str, ...], tuple[str, ...], tuple[int, ...]], list[int]] = {}
        for name, shape in rows.items():
            if place < len(name) and name[place].isdigit():
                groups.setdefault((name[:place], name[place + 1 :], shape), []).append(int(name[place]))
        for (before, after, shape), numbers in groups.items():
            for first, last in _runs(sorted(numbers)):
                if last > first:
                    for number in range(first, last + 1):
                        del rows[(*before, str(number), *after)]
                    rows[(*before, f"{{{first}-{last}}}", *after)] = shape
    return {".".join(name): list(shape) for name, shape in sorted(rows.items())}


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    first = last = numbers[0]
    for number in numbers[1:]:
        if number != last + 1:
            yield first, last
            first = number
        last = number
    yield first, last
