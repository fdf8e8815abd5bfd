"""What people write of an add-on, checked before it enters the catalogue, and shown so that it cannot lie to a terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from typing import Final

from engine.catalogue import NAME, Catalogue
from engine.registry.admission import Label
from traces.problems import Problem

TEXT_CHARACTERS_MAX: Final = 300
TENANTS_MAX: Final = 1000
# Pairs that fonts draw alike; letters beyond ASCII never reach a name.
_ALIKE: Final = (("rn", "m"), ("vv", "w"), ("cl", "d"))
_ALIKE_CHARACTERS: Final = str.maketrans(
    {"0": "o", "1": "l", "i": "l", "_": "-", ".": "-", "+": "-", ":": "-", "/": "-"}
)


def label_problems(label: Label) -> Iterator[Problem]:
    """Everything wrong with a label; nothing if all is right."""
    for field in ("name", "version"):
        text = getattr(label, field)
        if not NAME.fullmatch(text):
            yield Problem(f"--{field}", f"got {shown(text)}", f"a text like {NAME.pattern}", "Correct it.")
    for field in ("owner", "licence", "source"):
        yield from text_problems(f"--{field}", getattr(label, field))
    if len(label.tenants) > TENANTS_MAX:
        yield Problem("--tenant", f"got {len(label.tenants)} tenants", f"at most {TENANTS_MAX}", "Use none: everybody.")
    for tenant in label.tenants[:TENANTS_MAX]:
        if not (0 < len(tenant) <= 64 and tenant.isascii() and tenant.isprintable() and tenant == tenant.strip()):
            yield Problem(
                "--tenant", f"got {shown(tenant)}", "the id of a tenant: 1..64 visible ASCII characters", "Correct it."
            )
    if len(set(label.tenants)) != len(label.tenants):
        yield Problem("--tenant", f"names {shown(_repeated(label.tenants))} twice", "every tenant once", "Remove one.")


def text_problems(where: str, text: str) -> Iterator[Problem]:
    """Wrong with a free text: too long, or with characters that cannot be seen or turn the direction of writing."""
    if len(text) > TEXT_CHARACTERS_MAX or not text.isprintable():
        yield Problem(
            where, f"got {shown(text)}", f"at most {TEXT_CHARACTERS_MAX} characters, all of them visible, on one line",
            "Correct it.",
        )  # fmt: skip


def look_alike(catalogue: Catalogue, name: str) -> str | None:
    """Another name of the catalogue that a reader may take for this one (``style-1`` for ``style-l``); None if there is none."""
    wanted = _skeleton(name)
    for known in sorted({entry.name or entry.id for entry in catalogue.entries.values()}):
        if known != name and _skeleton(known) == wanted:
            return known
    return None


def shown(text: str, n_characters_max: int = 80) -> str:
    """A text in quotes; what is not ASCII and visible stands as an escape, so that look-alikes and terminal codes show."""
    return ascii(text if len(text) <= n_characters_max else text[:n_characters_max] + "…")


def visible(text: str, n_characters_max: int = 60) -> str:
    """A text for a table: letters of every script stay, what cannot be seen or moves the cursor becomes an escape."""
    cut = text if len(text) <= n_characters_max else text[: n_characters_max - 1] + "…"
    return "".join(
        char
        if char.isprintable() and not unicodedata.combining(char)
        else char.encode("unicode_escape").decode("ascii")
        for char in cut
    )


def _skeleton(name: str) -> str:
    text = name.casefold()
    for pair, one in _ALIKE:
        text = text.replace(pair, one)
    return text.translate(_ALIKE_CHARACTERS)


def _repeated(texts: tuple[str, ...]) -> str:
    seen: set[str] = set()
    for text in texts:
        if text in seen:
            return text
        seen.add(text)
    return ""
