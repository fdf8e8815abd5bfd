"""Any text as a name that Kubernetes, Prometheus or Terraform accepts: unchanged where it fits, else a slug with a digest of the whole.

Ids come from users: quotes, newlines, look-alikes and megabytes. Two different texts get different names (up to a 32-bit
digest; the checks of each target refuse a name that occurs twice), and no text can leave the place it is written to.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Final

DIGEST_LENGTH: Final = 8
_DNS_LABEL: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?")
_LABEL_VALUE: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")
_LOOKS_DIGESTED: Final = re.compile(r".*-[0-9a-f]{8}", re.DOTALL)


def dns_label(text: str, length_max: int = 63) -> str:
    """A DNS-1123 label of at most ``length_max`` (10 or more) characters."""
    return _fitted(text, _DNS_LABEL, r"[^a-z0-9]+", length_max, text.lower())


def label_value(text: str, length_max: int = 63) -> str:
    """A Kubernetes label value of at most ``length_max`` (10 or more) characters."""
    return _fitted(text, _LABEL_VALUE, r"[^A-Za-z0-9._-]+", length_max, text)


def digest(text: str, length: int = DIGEST_LENGTH) -> str:
    """The first hexadecimal digits of the text's SHA-256."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:length]


def one_line(text: str) -> str:
    """The text on one line of printable characters: line breaks, controls, direction marks and other invisibles as escapes."""
    return "".join(
        character if character.isprintable() else json.dumps(character)[1:-1] if ord(character) != 0x7F else "\\u007f"
        for character in text
    )


def _fitted(text: str, allowed: re.Pattern[str], outside: str, length_max: int, candidate: str) -> str:
    # a text that already ends like a digest gets one too, so that no name can be made to equal another's slug
    if len(text) <= length_max and allowed.fullmatch(text) and not _LOOKS_DIGESTED.fullmatch(text):
        return text
    slug = re.sub(outside, "-", candidate, flags=re.ASCII)[: length_max - DIGEST_LENGTH - 1].strip("-._")
    return f"{slug}-{digest(text)}" if slug else f"x-{digest(text)}"
