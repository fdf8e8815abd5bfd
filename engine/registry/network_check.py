"""What a folder in diffusers' layout says of a network, compared with an architecture: its settings, its tensors' names and shapes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from engine.registry.safetensors_header import refuse
from engine.registry.store import Store, StoreError
from traces.problems import Problem

CONFIG_BYTES_MAX: Final = 2**20
CONFIG_NAME: Final = "config.json"
NAMES_SHOWN: Final = 5


def read_config(store: Store, where: str) -> dict[str, Any]:
    """A settings file of a store.

    Raises:
        AddOnRefusedError: it is too large, or not a JSON object.
        StoreError: the store does not give it.
    """
    with store.open(where) as source:
        if source.size_bytes > CONFIG_BYTES_MAX:
            raise refuse(where, f"has {source.size_bytes} bytes", f"at most {CONFIG_BYTES_MAX}")
        text = bytearray(source.size_bytes)
        at = 0
        while at < len(text):
            n_read = source.readinto(memoryview(text)[at:])
            if not n_read:
                raise StoreError(f"{where}: the store ended {len(text) - at} bytes early. Try again.")
            at += n_read
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise refuse(where, f"is not JSON: {str(error)[:80]}", "a JSON object") from None
    if not isinstance(config, dict):
        raise refuse(where, f"is a JSON {type(config).__name__}", "a JSON object")
    return config


def check_kind(where: str, config: Mapping[str, Any], wanted: str) -> list[Problem]:
    """Whether the settings are those of this class; files that do not say are taken for it."""
    kind = config.get("_class_name") or (config.get("architectures") or [wanted])[0]
    return (
        []
        if kind == wanted
        else [Problem(where, f"says that it is a {str(kind)[:80]!r}", f"a {wanted}", "Use another")]
    )


def check_config(
    where: str, config: Mapping[str, Any], wanted: Mapping[str, object], needed: Sequence[str], architecture: str
) -> list[Problem]:
    """Whether settings say what an architecture has.

    Args:
        where: names the file in messages.
        config: as read.
        wanted: setting to value. What the file does not say counts as the same, except for ``needed``.
        needed: settings that must be there.
        architecture: its name, for messages.
    """
    problems = [Problem(where, f"has no {key}", str(wanted[key]), "Use another") for key in needed if key not in config]
    for key, value in wanted.items():
        if key in config and not _is_same(config[key], value):
            allowed = f"{value}, as {architecture} has"
            problems.append(Problem(where, f"says {key} = {str(config[key])[:80]}", allowed, "Use another"))
    return problems


def check_shapes(
    where: str, shapes: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], architecture: str
) -> list[Problem]:
    """Whether a file has exactly these tensors."""
    problems = []
    for what, names in (
        ("lacks", sorted(set(wanted) - set(shapes))),
        ("has the unknown", sorted(set(shapes) - set(wanted))),
    ):
        if names:
            shown = ", ".join(repr(name[:200]) for name in names[:NAMES_SHOWN])
            more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
            problems.append(
                Problem(where, f"{what} {shown}{more}", f"the {len(wanted)} tensors of {architecture}", "Use another")
            )
    for name in sorted(set(wanted) & set(shapes)):
        if shapes[name] != wanted[name]:
            problems.append(Problem(where, f"{name!r} has shape {shapes[name]}", f"{wanted[name]}", "Use another"))
    return problems


def _is_same(value: Any, wanted: Any) -> bool:
    # Published files write null where diffusers' default is false.
    return value == wanted or (not value and not wanted and type(value) in {bool, type(None)})
