"""Admission of a ControlNet: a folder of a store in diffusers' layout, checked against an architecture without torch.

Checked are the settings, every tensor's name and shape, that every value is finite, and the sha256, in one bounded pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from engine.registry.checked_stream import CheckedStream, Piece
from engine.registry.network_check import CONFIG_NAME, check_config, check_kind, check_shapes, read_config
from engine.registry.safetensors_header import AddOnRefusedError, SafetensorsHeader, refuse
from engine.registry.shapes import Architecture
from engine.registry.store import Store

FILE_BYTES_MAX: Final = 8 * 2**30
WEIGHTS_NAME: Final = "diffusion_pytorch_model.safetensors"
NEEDED_SETTINGS: Final = ("block_out_channels", "cross_attention_dim", "transformer_layers_per_block")

Consume = Callable[[Piece, memoryview], None]


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
    keep: Callable[[SafetensorsHeader], Consume] = lambda header: _forget,
) -> ControlNetFacts:
    """Checks ``<key>/config.json`` and ``<key>/diffusion_pytorch_model.safetensors``, or one ``.safetensors`` file without settings.

    Args:
        store: where it lies.
        key: of the folder or file.
        architecture: what it must fit.
        expected_sha256: what its weights must hash to; None: not known.
        file_bytes_max: larger files are refused.
        progress: called at every chunk.
        keep: gets the header once it is found right, and gives what takes the values, as
            :meth:`engine.registry.checked_stream.CheckedStream.body` says. They may be used only if this function returns.

    Raises:
        AddOnRefusedError: it must not be used; with the reasons.
        StoreError: the store does not give the files.
    """
    is_file = key.endswith(".safetensors")
    where = key if is_file else f"{key}/{WEIGHTS_NAME}"
    problems = []
    if not is_file:
        settings, name = f"{key}/{CONFIG_NAME}", architecture.name
        config = read_config(store, settings)
        problems = check_config(settings, config, architecture.controlnet_config, NEEDED_SETTINGS, name)
        problems += check_kind(settings, config, "ControlNetModel")
    with store.open(where) as source:
        stream = CheckedStream(source, where, progress)
        header = stream.open(file_bytes_max=file_bytes_max, n_dims_max=4)
        shapes = {span.name: span.shape for span in header.spans}
        problems += check_shapes(where, shapes, architecture.controlnet, architecture.name)
        if problems:
            raise AddOnRefusedError(problems)
        problems = stream.body(header, keep(header))
        if problems:
            raise AddOnRefusedError(problems)
        digest = stream.sha256()
        if expected_sha256 is not None and digest != expected_sha256:
            raise refuse(where, f"has the sha256 {digest}", f"{expected_sha256}, as the catalogue says")
        return ControlNetFacts(digest, source.size_bytes, architecture.name)


def _forget(piece: Piece, raw: memoryview) -> None:
    """The values were only to be looked at."""
