"""Limits of the front door: everything a stranger can make large is named here, with its bound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MIB: Final = 2**20


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one request and of all requests together; the defaults suit SDXL."""

    body_bytes_max: int = 32 * MIB
    bodies_bytes_max: int = 512 * MIB
    """Bodies and control images held at once by all requests; beyond it a request is answered 429 unread."""
    body_read_s: float = 30.0
    """A body that takes longer to arrive is answered 408."""
    answer_send_s: float = 60.0
    """A client that does not take its answer for so long is cut off."""
    connections_max: int = 2048
    header_read_s: float = 15.0
    """A new connection without a whole request head by then is closed."""
    keepalive_s: float = 30.0
    json_openings_max: int = 4096
    """``{`` and ``[`` bytes in a body, counted before parsing: bounds depth and number of values at once."""
    prompt_characters_max: int = 4000
    user_characters_max: int = 256
    n_images_max: int = 8
    n_steps_max: int = 200
    guidance_scale_max: float = 50.0
    side_px_min: int = 64
    side_px_max: int = 2048
    pixels_max: int = 8 * 1024 * 1024
    """Width × height × images."""
    size_multiple_px: int = 8
    n_controlnets_max: int = 4
    n_loras_max: int = 4
    control_image_bytes_max: int = 8 * MIB
    scale_max: float = 10.0
    """Largest absolute weight of an add-on."""
    deadline_s_max: float = 600.0
    settle_s: float = 5.0
    """How long after its deadline, or its cancellation, a job's outcome is waited for."""


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a request gets where it says nothing."""

    width_px: int = 1024
    height_px: int = 1024
    n_steps: int = 30
    guidance_scale: float = 5.0
    deadline_s: float = 120.0
