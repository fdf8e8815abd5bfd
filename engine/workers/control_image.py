"""Control images as clients send them: decoded only if they are small PNG, JPEG or WebP files of exactly the right size."""

from __future__ import annotations

import io
import warnings
from typing import Final

import numpy as np
from PIL import Image, UnidentifiedImageError

from engine.workers.painter import JobError

FORMATS: Final = ("PNG", "JPEG", "WEBP")
FILE_BYTES_MAX: Final = 64 * 2**20


def decode_control_image(data: bytes, width_px: int, height_px: int, pixels_max: int, where: str) -> np.ndarray:
    """An encoded image as uint8 RGB, ``[height, width, 3]``.

    Args:
        data: the file. Its size in pixels is read from its header and checked before anything is decoded.
        width_px: what it must have.
        height_px: likewise.
        pixels_max: refused above.
        where: names the image in errors.

    Raises:
        JobError: another format, another size, too large, truncated, or animated.
    """
    if len(data) > FILE_BYTES_MAX:
        raise JobError(f"{where} has {len(data)} bytes, at most {FILE_BYTES_MAX} are allowed")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                size = image.size
                if size[0] * size[1] > pixels_max:
                    raise JobError(f"{where} is {size[0]}x{size[1]} pixels, at most {pixels_max} in all are allowed")
                if size != (width_px, height_px):
                    raise JobError(
                        f"{where} is {size[0]}x{size[1]} pixels, the request is for {width_px}x{height_px}. Resize it."
                    )
                if getattr(image, "n_frames", 1) != 1:
                    raise JobError(f"{where} is animated, a single picture is needed")
                return np.asarray(image.convert("RGB"))
    except (
        UnidentifiedImageError, Image.DecompressionBombWarning, Image.DecompressionBombError, OSError, ValueError, SyntaxError
    ) as error:  # fmt: skip
        raise JobError(f"{where} is no readable PNG, JPEG or WebP image: {str(error)[:200]}") from None
