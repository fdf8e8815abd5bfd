"""Admission of a ControlNet: a folder of a store in diffusers' layout, checked against an architecture without torch.

Checked are the settings, every tensor's name and shape, that every value is finite, and the sha256, in one bounded pass.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from engine.registry.checked_stream import CheckedStream
from engine.registry.safetensors_header import AddOnRefusedError, refuse
from engine.registry.shapes import Architecture
from engine.registry.store import Store, StoreError
from traces.problems import Problem

CONFIG_BYTES_MAX: Final = 2**20
FILE_BYTES_MAX: Final = 8 * 2**30
CONFIG_NAME: Final = "config.json"
WEIGHTS_NAME: Final = "diffusion_pytorch_model.safetensors"
NEEDED_SETTINGS: Final = ("block_out_channels", "cross_attention_dim", "transformer_layers_per_block")
NAMES_SHOWN: Final = 5


@dataclass(frozen=True, slots=True)
class ControlNetFacts:
    """What a folder that passed every check is."""

    add_on_id: str
    """sha256 of its weights file."""
    file_bytes: int
    architecture: str


def check_controlnet(
    store: Store,
    key: str,
    architecture: Architecture,
    *,
    expected_sha256: str | None = None,
    file_bytes_max: int = FILE_BYTES_MAX,
    progress: Callable[[], None] = lambda: None,
) -> ControlNetFacts:
    """Checks ``<key>/config.json`` and ``<key>/diffusion_pytorch_model.safetensors``, or one ``.safetensors`` file without settings.

    Raises:
        AddOnRefusedError: it must not be used; with the reasons.
        StoreError: the store does not give the files.
    """
    is_file = key.endswith(".safetensors")
    where = key if is_file else f"{key}/{WEIGHTS_NAME}"
    problems = [] if is_file else _check_config(store, f"{key}/{CONFIG_NAME}", architecture)
    with store.open(where) as source:
        stream = CheckedStream(source, where, progress)
        header = stream.open(file_bytes_max=file_bytes_max, n_dims_max=4)
        problems += _check_shapes(where, {span.name: span.shape for span in header.spans}, architecture)
        if problems:
            raise AddOnRefusedError(problems)
        problems = stream.body(header, lambda piece, raw: None)
        if problems:
            raise AddOnRefusedError(problems)
        digest = stream.sha256()
        if expected_sha256 is not None and digest != expected_sha256:
            raise refuse(where, f"has the sha256 {digest}", f"{expected_sha256}, as the catalogue says")
        return ControlNetFacts(digest, source.size_bytes, architecture.name)


def _check_config(store: Store, where: str, architecture: Architecture) -> list[Problem]:
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
    problems = []
    kind = config.get("_class_name", "ControlNetModel")
    if kind != "ControlNetModel":
        problems.append(Problem(where, f"says that it is a {str(kind)[:80]!r}", "a ControlNetModel", "Use another"))
    for key in NEEDED_SETTINGS:
        if key not in config:
            problems.append(Problem(where, f"has no {key}", str(architecture.controlnet_config[key]), "Use another"))
    for key, wanted in architecture.controlnet_config.items():
        if key in config and not _is_same(config[key], wanted):
            problems.append(
                Problem(
                    where,
                    f"says {key} = {str(config[key])[:80]}",
                    f"{wanted}, as {architecture.name} has",
                    "Use another",
                )
            )
    return problems


def _is_same(value: Any, wanted: Any) -> bool:
    # Published files write null where diffusers' default is false.
    return value == wanted or (not value and not wanted and type(value) in {bool, type(None)})


def _check_shapes(where: str, shapes: dict[str, tuple[int, ...]], architecture: Architecture) -> list[Problem]:
    wanted = architecture.controlnet
    problems = []
    for what, names in (
        ("lacks", sorted(set(wanted) - set(shapes))),
        ("has the unknown", sorted(set(shapes) - set(wanted))),
    ):
        if names:
            shown = ", ".join(repr(name[:200]) for name in names[:NAMES_SHOWN])
            more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
            problems.append(
                Problem(
                    where, f"{what} {shown}{more}", f"the {len(wanted)} tensors of {architecture.name}", "Use another"
                )
            )
    for name in sorted(set(wanted) & set(shapes)):
        if shapes[name] != wanted[name]:
            problems.append(Problem(where, f"{name!r} has shape {shapes[name]}", f"{wanted[name]}", "Use another"))
    return problems
