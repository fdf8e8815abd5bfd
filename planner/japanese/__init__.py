"""The planner's sentences in Japanese: English pattern to Japanese pattern, in one module for each kind of sentence.

Plans keep English text only, so that any plan, an old one too, can be shown in Japanese. The English pattern is the key: a sentence
is found by its pattern, its numbers are carried over. ``tests/planner/test_japanese.py`` holds that every sentence of the planner
that a page or a report shows has its pattern here.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Final

from planner.japanese.patterns import Patterns


def _collected() -> dict[str, str]:
    found: dict[str, str] = {}
    for module in sorted(item.name for item in pkgutil.iter_modules(__path__)):
        if module == "patterns":
            continue
        sentences: dict[str, str] = importlib.import_module(f"{__name__}.{module}").SENTENCES
        twice = sorted(found.keys() & sentences.keys())
        if twice:
            raise ValueError(f"japanese.{module} repeats {twice}")
        found |= sentences
    return found


SENTENCES: Final[dict[str, str]] = _collected()
PATTERNS: Final = Patterns(SENTENCES)


def in_japanese(text: str) -> str:
    """The text with every sentence of ours in Japanese; names, commands and what is not ours stay as they are."""
    return PATTERNS.translate(text)
