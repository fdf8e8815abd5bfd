"""Shapes that workers compile and capture before they are ready, so that no request pays for it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from traces.problems import InputError, Problem

SHAPE: Final = re.compile(r"(\d{1,5})x(\d{1,5}):(\d{1,3})(:unguided)?")
SIZE_PX_MAX: Final = 8192
N_IMAGES_MAX: Final = 64
N_SHAPES_MAX: Final = 32
"""Each takes seconds and device memory on every worker."""


@dataclass(frozen=True, slots=True)
class WarmShape:
    """What a worker captures for: batches of other numbers of images are other shapes."""

    width_px: int
    height_px: int
    n_images: int
    uses_cfg: bool = True
    """Classifier-free guidance: two samples an image."""

    def __str__(self) -> str:
        return f"{self.width_px}x{self.height_px}:{self.n_images}{'' if self.uses_cfg else ':unguided'}"


def read_warm_shapes(text: str, size_multiple_px: int = 1) -> tuple[WarmShape, ...]:
    """``1024x1024:1,1024x1024:2,512x512:1:unguided``: width, height and images; none for an empty text.

    Args:
        text: as given.
        size_multiple_px: sides must be a multiple of it.

    Raises:
        InputError: with every problem found.
    """
    shapes: dict[WarmShape, None] = {}
    problems = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = SHAPE.fullmatch(part)
        if match is None:
            allowed = "WIDTHxHEIGHT:IMAGES or WIDTHxHEIGHT:IMAGES:unguided, with commas between"
            problems.append(Problem("--warm", f"got {part[:80]!r}", allowed, "Correct it."))
            continue
        width_px, height_px, n_images = (int(number) for number in match.groups()[:3])
        if any(not 0 < side <= SIZE_PX_MAX or side % size_multiple_px for side in (width_px, height_px)):
            allowed = f"sides that are multiples of {size_multiple_px} up to {SIZE_PX_MAX}"
            problems.append(Problem("--warm", f"got {part!r}", allowed, "Round them."))
        if not 1 <= n_images <= N_IMAGES_MAX:
            problems.append(
                Problem("--warm", f"got {n_images} images in {part!r}", f"1..{N_IMAGES_MAX}", "Correct it.")
            )
        shapes[WarmShape(width_px, height_px, n_images, not match[4])] = None
    if len(shapes) > N_SHAPES_MAX:
        problems.append(
            Problem("--warm", f"got {len(shapes)} shapes", f"at most {N_SHAPES_MAX}", "Name the usual ones.")
        )
    if problems:
        raise InputError(problems)
    return tuple(shapes)
