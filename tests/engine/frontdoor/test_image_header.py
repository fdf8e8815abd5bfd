"""Control images are judged by their headers; nothing is decoded here."""

from __future__ import annotations

import io
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from engine.frontdoor.image_header import ImageHeader, NotAnImageError, read_header
from tests.engine.frontdoor.dispatcher_engine import png


def encoded(kind: str, width_px: int = 40, height_px: int = 24, mode: str = "RGB", **options: object) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, (width_px, height_px)).save(stream, kind, **options)  # type: ignore[arg-type]
    return stream.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (encoded("PNG"), "PNG"),
        (encoded("PNG", mode="RGBA"), "PNG"),
        (encoded("PNG", mode="P"), "PNG"),
        (encoded("PNG", mode="1"), "PNG"),
        (encoded("JPEG"), "JPEG"),
        (encoded("JPEG", progressive=True), "JPEG"),
        (encoded("WEBP"), "WEBP"),
        (encoded("WEBP", lossless=True), "WEBP"),
        (encoded("WEBP", mode="RGBA"), "WEBP"),
    ],
    ids=range(9),
)
def test_the_size_is_that_which_pillow_decodes_from_what_is_passed_on(content: bytes, kind: str) -> None:
    header = read_header(content)
    assert (header.format, header.width_px, header.height_px) == (kind, 40, 24)
    with Image.open(io.BytesIO(header.content)) as image:
        image.load()
        assert image.size == (40, 24)
        assert image.format == kind


def test_compressed_text_and_profiles_of_a_png_are_not_passed_on() -> None:
    bomb = chunk(b"zTXt", b"a\0\0" + zlib.compress(b"0" * 10_000_000)) + chunk(
        b"iCCP", b"a\0\0" + zlib.compress(b"0" * 10_000_000)
    )
    header = read_header(png(64, 64, extra=bomb))
    assert header.content == png(64, 64)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "needs PNG, JPEG or WebP"),
        (b"GIF89a" + bytes(100), "needs PNG, JPEG or WebP"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "needs PNG"),
        (png(64, 64)[:20], "cut off"),
        (png(64, 64)[:-4], "cut off"),
        (png(64, 64).replace(b"IDAT", b"IDAX"), "unknown chunk|damaged"),
        (png(64, 64)[:20] + b"\x01" + png(64, 64)[21:], "damaged"),
        (png(64, 64, extra=chunk(b"acTL", bytes(8))), "animated"),
        (png(64, 64, extra=chunk(b"ABCD", b"")), "unknown chunk"),
        (png(64, 64, extra=chunk(b"IHDR", bytes(13))), "not its first chunk"),
        (png(0, 64), "damaged header"),
        (b"\x89PNG\r\n\x1a\n" + b"\xff\xff\xff\xffIHDR", "cut off"),
        (b"\xff\xd8\xff\xe0\x00\x10" + bytes(40), "damaged segments"),
        (b"\xff\xd8\xff\xda\x00\x10" + bytes(14), "without a frame"),
        (encoded("WEBP")[:28], "cut off"),
        (b"RIFF\x10\x00\x00\x00WEBPABCD" + bytes(20), "unknown chunk"),
    ],
    ids=range(16),
)
def test_what_is_damaged_or_animated_is_refused_with_the_reason(content: bytes, words: str) -> None:
    with pytest.raises(NotAnImageError, match=words):
        read_header(content)


def test_an_animated_webp_is_refused() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    stream = io.BytesIO()
    frames[0].save(stream, "WEBP", save_all=True, append_images=frames[1:])
    with pytest.raises(NotAnImageError, match="animated"):
        read_header(stream.getvalue())


SAMPLES = [
    encoded("PNG"),
    encoded("JPEG"),
    encoded("WEBP"),
    encoded("WEBP", lossless=True),
    encoded("WEBP", mode="RGBA"),
]


@given(
    st.sampled_from(SAMPLES),
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=8),
    st.integers(0, 400),
)
def test_any_damage_ends_in_a_header_or_a_refusal(sample: bytes, changes: list[tuple[int, int]], n_kept: int) -> None:
    content = bytearray(sample)
    for place, value in changes:
        content[place % len(content)] = value
    try:
        header = read_header(bytes(content[:n_kept]))
    except NotAnImageError:
        return
    assert isinstance(header, ImageHeader)
    assert header.width_px > 0
    assert header.height_px > 0
