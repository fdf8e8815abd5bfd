"""YAML that means the same to every reader: YAML 1.1 and 1.2, Go and Python; any text that could be read as something else is quoted."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import yaml

_PLAIN: Final = re.compile(r"[A-Za-z_/](?:[A-Za-z0-9_./-]|:(?=[A-Za-z0-9_./-]))*")
_RESERVED: Final = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null", "nan", "inf"})
_BLOCK: Final = re.compile(r"[!-~](?:[ -~\n]*[!-~])?\n")
"""ASCII, no tab or control, no space at either end: a literal block keeps it byte for byte."""
_LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """Chooses each text's style, and writes no aliases: an object that occurs twice is written twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent(dumper: Any, text: str) -> Any:
    if _PLAIN.fullmatch(text) and text.lower() not in _RESERVED:
        style = None
    else:
        style = "|" if "\n" in text and _BLOCK.fullmatch(text) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent)


def to_yaml(documents: Sequence[Mapping[str, Any]], comment: str = "") -> str:
    """The documents in one file, ``comment`` (lines that begin with ``#``) first. Keys keep their order; non-ASCII is escaped."""
    text = yaml.dump_all(
        [_plain(document) for document in documents],
        Dumper=_Dumper,
        allow_unicode=False,
        default_flow_style=False,
        explicit_start=True,
        sort_keys=False,
        width=2**30,  # a folded line would put a user's text at a line's start
    )
    return comment + str(text)


def from_yaml(text: str) -> list[dict[str, Any]]:
    """Every document of a file that :func:`to_yaml` wrote.

    Raises:
        ValueError: it is not YAML, or a document is not a mapping.
    """
    try:
        documents = list(yaml.load_all(text, Loader=_LOADER))
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {error}") from None
    if not all(isinstance(document, dict) for document in documents):
        raise ValueError("a document is not a mapping")
    return documents


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value
