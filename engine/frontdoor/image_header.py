"""Control images are looked at before anything decodes them: format, size in pixels, one frame, no payload beside the pixels.

Of a PNG only the chunks that carry pixels are passed on, so that compressed text or profiles (the usual decompression bombs)
never reach a decoder; its pixel data can expand to no more than the size that is checked here.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Final

PNG: Final = b"\x89PNG\r\n\x1a\n"
PNG_KEPT: Final = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
PNG_DEPTHS: Final = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
"""Colour type to the bit depths it allows (PNG specification, table 11.1)."""
JPEG_FRAMES: Final = frozenset({0xC0, 0xC1, 0xC2})
"""Baseline, extended and progressive Huffman: what decoders read."""
SEGMENTS_MAX: Final = 10_000


class NotAnImageError(Exception):
    """What is wrong with the bytes, as the end of the sentence "The image …"."""


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """A control image that may be handed to a worker."""

    format: str
    width_px: int
    height_px: int
    content: bytes
    """The image without what is not needed to decode it."""


def read_header(content: bytes) -> ImageHeader:
    """Finds format and size without decoding.

    Raises:
        NotAnImageError: not a PNG, JPEG or WebP; cut off; animated; damaged.
    """
    try:
        if content.startswith(PNG):
            return _png(content)
        if content.startswith(b"\xff\xd8\xff"):
            return _jpeg(content)
        if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
            return _webp(content)
    except (struct.error, IndexError):
        raise NotAnImageError("is cut off before its size") from None
    raise NotAnImageError(f"starts with {content[:8].hex()}, needs PNG, JPEG or WebP. Convert it")


def _png(content: bytes) -> ImageHeader:
    kept = [PNG]
    place = len(PNG)
    size = (0, 0)
    n_chunks = 0
    while True:
        (length,) = struct.unpack_from(">I", content, place)
        kind = content[place + 4 : place + 8]
        end = place + 12 + length
        n_chunks += 1
        if end > len(content) or n_chunks > SEGMENTS_MAX:
            raise NotAnImageError("is a PNG that is cut off")
        if (kind == b"IHDR") != (n_chunks == 1):
            raise NotAnImageError("is a PNG whose header is not its first chunk")
        if kind == b"IHDR":
            width, height, depth, colour = struct.unpack_from(">IIBB", content, place + 8)
            if length != 13 or depth not in PNG_DEPTHS.get(colour, ()) or not width or not height:
                raise NotAnImageError("is a PNG with a damaged header")
            size = (width, height)
        if kind == b"acTL":
            raise NotAnImageError("is animated, needs one frame. Save one frame")
        if kind in PNG_KEPT:
            checksum = zlib.crc32(content[place + 4 : end - 4])
            if checksum != struct.unpack_from(">I", content, end - 4)[0]:
                raise NotAnImageError(f"is a PNG whose {kind.decode()} chunk is damaged")
            kept.append(content[place:end])
        elif not kind[0] & 0x20:  # an upper-case first letter: decoders must understand it
            raise NotAnImageError(f"is a PNG with the unknown chunk {kind!r}")
        if kind == b"IEND":
            return ImageHeader("PNG", *size, b"".join(kept))
        place = end


def _jpeg(content: bytes) -> ImageHeader:
    place = 2
    for _ in range(SEGMENTS_MAX):
        if content[place] != 0xFF:
            raise NotAnImageError("is a JPEG with damaged segments")
        marker = content[place + 1]
        if marker == 0xFF:  # a fill byte
            place += 1
            continue
        (length,) = struct.unpack_from(">H", content, place + 2)
        if marker in JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", content, place + 5)
            if not width or not height:
                raise NotAnImageError("is a JPEG without a size")
            return ImageHeader("JPEG", width, height, content)
        if marker in {0xD8, 0xD9, 0xDA} or length < 2:
            break
        place += 2 + length
    raise NotAnImageError("is a JPEG without a frame that can be read")


def _webp(content: bytes) -> ImageHeader:
    (riff_bytes,) = struct.unpack_from("<I", content, 4)
    if riff_bytes + 8 > len(content):
        raise NotAnImageError("is a WebP that is cut off")
    kind = content[12:16]
    if kind == b"VP8X":
        if content[20] & 0x02:
            raise NotAnImageError("is animated, needs one frame. Save one frame")
        width = int.from_bytes(content[24:27], "little") + 1
        height = int.from_bytes(content[27:30], "little") + 1
        if len(content) < 30:
            raise NotAnImageError("is a WebP that is cut off")
    elif kind == b"VP8 ":
        if content[23:26] != b"\x9d\x01\x2a":
            raise NotAnImageError("is a WebP with a damaged header")
        width, height = (value & 0x3FFF for value in struct.unpack_from("<HH", content, 26))
    elif kind == b"VP8L":
        if content[20] != 0x2F:
            raise NotAnImageError("is a WebP with a damaged header")
        (bits,) = struct.unpack_from("<I", content, 21)
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        raise NotAnImageError(f"is a WebP with the unknown chunk {kind!r}")
    if not width or not height:
        raise NotAnImageError("is a WebP without a size")
    return ImageHeader("WEBP", width, height, content)
