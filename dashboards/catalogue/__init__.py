"""Every sentence of the page in English and Japanese: key to (English, Japanese). One module a page, so that a page is read in one place."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Final


def _collected() -> dict[str, tuple[str, str]]:
    found: dict[str, tuple[str, str]] = {}
    for module in pkgutil.iter_modules(__path__):
        words: dict[str, tuple[str, str]] = importlib.import_module(f"{__name__}.{module.name}").WORDS
        twice = sorted(found.keys() & words.keys())
        if twice:
            raise ValueError(f"catalogue.{module.name} repeats {', '.join(twice)}")
        found |= words
    return found


CATALOGUE: Final[dict[str, tuple[str, str]]] = _collected()
