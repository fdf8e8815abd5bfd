"""Shapes to capture before a worker is ready, as an operator writes them."""

from __future__ import annotations

import pytest

from engine.serving.warm_shapes import WarmShape, read_warm_shapes
from traces.problems import InputError


def test_shapes_are_read_once_each_in_their_order_and_written_as_they_were_read() -> None:
    text = "1024x512:2, 512x512:1:unguided,1024x512:2"
    shapes = read_warm_shapes(text, 32)
    assert shapes == (WarmShape(1024, 512, 2), WarmShape(512, 512, 1, uses_cfg=False))
    assert ",".join(map(str, shapes)) == "1024x512:2,512x512:1:unguided"
    assert read_warm_shapes("") == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1024:1", "got '1024:1', needs WIDTHxHEIGHT:IMAGES"),
        ("1024x1000:1", "multiples of 32"),
        ("0x1024:1", "multiples of 32"),
        ("1024x1024:0", "got 0 images"),
        ("1024x1024:65", "needs 1..64"),
        (",".join(f"{32 * n}x32:1" for n in range(1, 40)), "got 39 shapes, needs at most 32"),
    ],
)
def test_what_is_no_shape_is_named_with_what_is_allowed(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_warm_shapes(text, 32)


def test_all_mistakes_are_shown_together() -> None:
    with pytest.raises(InputError) as refused:
        read_warm_shapes("a,33x32:99", 32)
    assert len(refused.value.problems) == 3
