"""Images leave a worker as raw rows and the front door as PNG."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from engine.pixels import to_file, to_rows


def test_rows_become_a_png_of_the_same_pixels() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    for view in (pixels, pixels[:, ::-1]):  # the second one is not contiguous
        file = to_file(to_rows(view))
        with Image.open(io.BytesIO(file)) as image:
            assert (image.format, image.size) == ("PNG", (40, 24))
            assert np.array_equal(np.asarray(image), view)


def test_what_is_a_file_already_passes_through() -> None:
    assert to_file(b"\x89PNG and so on") == b"\x89PNG and so on"


def test_rows_that_are_cut_off_are_refused() -> None:
    with pytest.raises(ValueError, match="an image of 8x4 came with 95 bytes, needs 96"):
        to_file(to_rows(np.zeros((4, 8, 3), np.uint8))[:-1])
