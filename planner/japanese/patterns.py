"""Finds which pattern a sentence was made from, and makes the same sentence from the pattern in the other language.

A pattern is a text with fields: ``{name}`` is anything within one part of a sentence, ``{name:text}`` anything at all, and ``int``, ``num``,
``usd``, ``pct``, ``gpus`` and ``est`` (a figure with its interval) are figures. ``[s]`` is a letter that may be missing. A field's
value is translated in turn, so that phrases are patterns too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Final

TEXT_MAX: Final = 4000
"""Letters beyond which a text is left alone: no sentence of ours is as long, and looking takes time."""
BREAKS: Final = re.compile(r"(?<=[.。]) (?=\S)")
ENGLISH: Final = re.compile(r"(?<![\w.-])[A-Za-z]?[a-z]{2,}(?:[ ,;:]+[a-z]{2,}){2,}(?![\w.-])")
"""Three words in a row: what is still English. Names and commands are shorter, or hold capitals, dots or digits."""
_FIELD: Final = re.compile(r"\{(\w+)(?::(\w+))?\}|\[(\w+)\]")
_NUMBER: Final = r"[-+−±]?(?:[\d,]*\.?\d+(?:e[-+]?\d+)?|inf|nan)"
_KINDS: Final = {
    "": r"(?:(?!\. |; ).)+?",
    "text": r".+?",
    "int": r"[-+−]?\d[\d,]*",
    "num": _NUMBER,
    "usd": r"(?:[-−]?\$[\d,]+(?:\.\d+)?|–)",
    "pct": rf"{_NUMBER} ?%",
    "gpus": r"(?:\d[\d,]* GPUs?|no GPU)",
    "est": rf"(?:{_NUMBER} ?[s%](?: \([\d.]+–[\d.]+\))?|–)",
    "name": r"[^\s,;()]+",
}


def _figures(text: str) -> str:
    """A figure as Japanese writes it."""
    found = re.fullmatch(r"(\d[\d,]*) GPUs?", text)
    if found:
        return f"GPU {found[1]}台"
    if text == "no GPU":
        return "GPUなし"
    text = re.sub(r"(?<=\d) %", "%", text)
    text = re.sub(r"(?<=\d) s(?= |$)", "秒", text)
    return re.sub(r" \(([\d.]+–[\d.]+)\)", r"（\1）", text)


def _split(text: str, mark: str) -> list[str]:
    """The text at each mark that is not in parentheses."""
    found, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0 and text.startswith(mark, place):
            found.append(text[start:place])
            start = place + len(mark)
    return [*found, text[start:]]


class Patterns:
    """Patterns of one language to those of another."""

    def __init__(self, sentences: Mapping[str, str]) -> None:
        made = [_Pattern(english, japanese) for english, japanese in sentences.items()]
        # the most words of its own first: a sentence is the most special pattern that fits it
        self._patterns = sorted(made, key=lambda one: (-one.n_letters, one.english))
        self._exact = {one.english: one.japanese for one in made if not one.kinds and "[" not in one.english}
        self.translate: Callable[[str], str] = lru_cache(maxsize=4096)(self._translate)

    def _translate(self, text: str) -> str:
        """Line by line; a bullet and the space around a line stay."""
        if len(text) > TEXT_MAX or not re.search(r"[A-Za-z]{2}", text):
            return text
        if "\n" in text:
            return "\n".join(self.translate(line) for line in text.split("\n"))
        bare = text.strip(" •")
        start = text.index(bare) if bare else 0
        return text[:start] + self._one(bare) + text[start + len(bare) :]

    def _one(self, text: str) -> str:
        whole = self._whole(text)
        if whole is not None and not is_english(whole):
            return whole
        parts = BREAKS.split(text)
        if len(parts) > 1:
            return self._joined(parts)
        for mark, joint in (("; ", "、"), (", ", "、")):
            pieces = _split(text.rstrip("."), mark)
            if len(pieces) > 1:
                found = [self._whole(piece) for piece in pieces]
                if all(one is not None for one in found):
                    return joint.join(str(one).rstrip("。") for one in found) + ("。" if text.endswith(".") else "")
        return whole if whole is not None else text

    def _joined(self, parts: list[str]) -> str:
        """Sentences one after the other; two that belong together are one pattern."""
        said: list[str] = []
        place = 0
        while place < len(parts):
            for end in range(len(parts), place, -1):
                found = self._whole(" ".join(parts[place:end]))
                if found is not None and (end == place + 1 or not is_english(found)):
                    break
            else:
                end, found = place + 1, parts[place]
            if found == " ".join(parts[place:end]) and said and not said[-1].endswith(" "):
                found = f" {found}"  # stays English: a space on both sides
            said.append(found)
            place = end
        return "".join(said)

    def _whole(self, text: str) -> str | None:
        """The text by one pattern; None if none fits."""
        if text in self._exact:
            return self._exact[text]
        first: str | None = None
        for tried in (text, text[:1].lower() + text[1:]):
            for pattern in self._patterns:
                found = pattern.match(tried)
                if found is None:
                    continue
                said = pattern.japanese.format(
                    **{name: self._value(name, kind, found) for name, kind in pattern.kinds.items()}
                )
                if not is_english(said):
                    return said
                first = first or said
            if text[:1] == text[:1].lower():
                break
        return first

    def _value(self, name: str, kind: str, found: re.Match[str]) -> str:
        value = found[name]
        is_text = kind in ("", "text") and re.search(r"[A-Za-z]{2}", value)
        return self.translate(value).rstrip("。") if is_text else _figures(value)


class _Pattern:
    """One sentence in two languages."""

    def __init__(self, english: str, japanese: str) -> None:
        self.english, self.japanese = english, japanese
        self.kinds: dict[str, str] = {}
        regex, bare, place = "", "", 0
        for field in _FIELD.finditer(english):
            literal = english[place : field.start()]
            regex += re.escape(literal)
            bare += literal
            place = field.end()
            if field[3] is not None:
                regex += f"(?:{re.escape(field[3])})?"
                continue
            self.kinds[field[1]] = field[2] or ""
            regex += f"(?P<{field[1]}>{_KINDS[field[2] or '']})"
        literal = english[place:]
        self._regex = re.compile(regex + re.escape(literal))
        self.n_letters = len(bare + literal)
        chunks = [chunk for chunk in _FIELD.split(english)[::4] if chunk]
        self._needs = max(chunks, key=len, default="")

    def match(self, text: str) -> re.Match[str] | None:
        """None if the text is not made from this pattern."""
        return self._regex.fullmatch(text) if self._needs in text else None


def is_english(text: str) -> bool:
    """Whether a text still says something in English."""
    return ENGLISH.search(text) is not None


def fields_of(pattern: str) -> set[str]:
    """Names of a pattern's fields."""
    return {field[1] for field in _FIELD.finditer(pattern) if field[1]}


def variants_of(pattern: str) -> list[str]:
    """The pattern with its fields emptied, with and without its letters that may be missing."""
    bare = re.sub(r"\{[^{}]*\}", "{}", pattern)
    with_letters, without = re.sub(r"\[(\w+)\]", r"\1", bare), re.sub(r"\[\w+\]", "", bare)
    return [with_letters] if with_letters == without else [with_letters, without]
