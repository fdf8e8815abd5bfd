"""Admission of a checkpoint: a folder of a store in diffusers' layout, checked against an architecture without torch.

Checked are the settings of every part and of the scheduler, every tensor's name and shape, that every value is finite, and one
sha256 over all parts, in one bounded pass. The parts are read at the same time where there are processors for it: hashing a file
takes one of them.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from engine.registry.checked_stream import CheckedStream, Consume, Piece
from engine.registry.network_check import CONFIG_NAME, check_config, check_kind, check_shapes, read_config
from engine.registry.safetensors_header import INTEGER_BYTES, AddOnRefusedError, SafetensorsHeader, refuse
from engine.registry.shapes import Architecture
from engine.registry.shapes import architecture as architecture_of
from engine.registry.store import Store, StoreError
from traces.problems import Problem

FILE_BYTES_MAX: Final = 16 * 2**30
"""Of one part; SDXL's UNet in float32 has 10.3 GB."""
SCHEDULER_NAME: Final = "scheduler/scheduler_config.json"
SCHEDULER: Final[Mapping[str, object]] = MappingProxyType({
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
})  # fmt: skip
"""What the engine denoises with; a checkpoint that was trained for something else gives noise."""
_UNET_SETTINGS: Final = (
    "act_fn", "addition_embed_type", "addition_time_embed_dim", "attention_head_dim", "block_out_channels",
    "class_embed_type", "conv_in_kernel", "conv_out_kernel", "cross_attention_dim", "down_block_types",
    "dual_cross_attention", "encoder_hid_dim", "encoder_hid_dim_type", "flip_sin_to_cos", "freq_shift", "in_channels",
    "layers_per_block", "mid_block_type", "norm_eps", "norm_num_groups", "only_cross_attention", "out_channels",
    "projection_class_embeddings_input_dim", "resnet_time_scale_shift", "time_cond_proj_dim", "time_embedding_type",
    "transformer_layers_per_block", "up_block_types", "upcast_attention", "use_linear_projection",
)  # fmt: skip
_VAE_SETTINGS: Final = (
    "act_fn", "block_out_channels", "down_block_types", "in_channels", "latent_channels", "layers_per_block",
    "norm_num_groups", "out_channels", "scaling_factor", "shift_factor", "up_block_types",
)  # fmt: skip
_TEXT_SETTINGS: Final = (
    "hidden_act", "hidden_size", "intermediate_size", "layer_norm_eps", "max_position_embeddings", "num_attention_heads",
    "num_hidden_layers", "vocab_size",
)  # fmt: skip
_OLD_VAE_NAMES: Final = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True, slots=True)
class Part:
    """One network of a checkpoint."""

    kind: str
    """Its class."""
    weights: str
    """Name of its file."""
    settings: tuple[str, ...]
    """Settings that decide its arithmetic. Not among them: sizes of training images, casts, ids of special tokens."""
    needed: tuple[str, ...]
    """Those that the file must state."""


_TEXT_NEEDED: Final = ("hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act")
PARTS: Final[Mapping[str, Part]] = MappingProxyType({
    "unet": Part(
        "UNet2DConditionModel", "diffusion_pytorch_model.safetensors", _UNET_SETTINGS,
        ("block_out_channels", "cross_attention_dim", "transformer_layers_per_block"),
    ),
    "vae": Part(
        "AutoencoderKL", "diffusion_pytorch_model.safetensors", _VAE_SETTINGS, ("block_out_channels", "scaling_factor")
    ),
    "text_encoder": Part("CLIPTextModel", "model.safetensors", _TEXT_SETTINGS, _TEXT_NEEDED),
    "text_encoder_2": Part(
        "CLIPTextModelWithProjection", "model.safetensors", (*_TEXT_SETTINGS, "projection_dim"), _TEXT_NEEDED
    ),
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class CheckpointFacts:
    """What a folder that passed every check is."""

    checkpoint_id: str
    """sha256 of the lines ``part sha256-of-its-file``, in the order of :data:`PARTS`."""
    file_bytes: int
    architecture: str


def plain_name(part: str, name: str) -> str:
    """A tensor's name however old the software was that wrote the file."""
    if part.startswith("text_encoder"):
        return name.removeprefix("text_model.")
    head, at, tail = name.partition("mid_block.attentions.0.")
    old, dot, rest = tail.partition(".")
    if part == "vae" and at and old in _OLD_VAE_NAMES:
        return f"{head}{at}{_OLD_VAE_NAMES[old]}{dot}{rest}"
    return name


def check_checkpoint(
    store: Store,
    key: str,
    architecture: Architecture,
    *,
    expected_sha256: str | None = None,
    file_bytes_max: int = FILE_BYTES_MAX,
    progress: Callable[[], None] = lambda: None,
    keep: Callable[[str, SafetensorsHeader], Consume] = lambda part, header: _forget,
) -> CheckpointFacts:
    """Checks ``<key>/unet/``, ``vae/``, ``text_encoder/``, ``text_encoder_2/`` and, where it is there, ``scheduler/``.

    Headers and settings of all parts come first: of a checkpoint of another family no body is read.

    Args:
        store: where it lies.
        key: of the folder.
        architecture: what it must be.
        expected_sha256: over its parts; None: not known.
        file_bytes_max: larger files are refused.
        progress: called at every chunk, from several threads.
        keep: gets a part's name and header once they are found right, and gives what takes the values (names of tensors as in
            the file, see :func:`plain_name`), both from several threads. They may be used only if this function returns.

    Raises:
        AddOnRefusedError: it must not be used; with the reasons.
        StoreError: the store does not give the files.
    """
    check_checkpoint_layout(store, key, architecture.name, file_bytes_max=file_bytes_max)
    given_up = threading.Event()

    def moved_on() -> None:
        if given_up.is_set():
            raise _GivenUpError
        progress()

    def check(part: str) -> tuple[str, int]:
        where = _weights_of(key, part)
        try:
            with store.open(where) as source:
                stream = CheckedStream(source, where, moved_on)
                header = stream.open(file_bytes_max=file_bytes_max, n_dims_max=4, allows_integers=True)
                # Once more: between the two passes the file may have been replaced.
                problems = [*_check_tensors(key, part, header, architecture)] or stream.body(header, keep(part, header))
                if problems:
                    raise AddOnRefusedError(problems)
                return stream.sha256(), source.size_bytes
        except BaseException:
            given_up.set()
            raise

    found = _of_all_parts(check)
    digest = hashlib.sha256("".join(f"{part} {sha256}\n" for part, (sha256, _) in found.items()).encode()).hexdigest()
    if expected_sha256 is not None and digest != expected_sha256:
        raise refuse(key, f"has the sha256 {digest} over its parts", f"{expected_sha256}, as the catalogue says")
    return CheckpointFacts(digest, sum(n_bytes for _, n_bytes in found.values()), architecture.name)


class _GivenUpError(Exception):
    """Another part is wrong, so this one need not be read to its end."""


def _of_all_parts(check: Callable[[str], tuple[str, int]]) -> dict[str, tuple[str, int]]:
    """What a check says of every part; raises what the first part that is at fault raised, when nothing reads any more."""
    n_processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    n_at_once = min(len(PARTS), n_processors)
    with ThreadPoolExecutor(n_at_once, thread_name_prefix="part") as readers:
        futures: dict[str, Future[tuple[str, int]]] = {part: readers.submit(check, part) for part in PARTS}
    wrong = [error for future in futures.values() if (error := future.exception()) is not None]
    for error in wrong:
        if not isinstance(error, _GivenUpError):
            raise error
    return {part: future.result() for part, future in futures.items()}


def _forget(piece: Piece, raw: memoryview) -> None:
    """The values were only to be looked at."""


def check_checkpoint_layout(
    store: Store, key: str, architecture_name: str, *, file_bytes_max: int = FILE_BYTES_MAX
) -> None:
    """Everything that settings and headers say; no value is read.

    Raises:
        AddOnRefusedError: it must not be used; with the reasons.
        StoreError: the store does not give the files.
        InputError: there is no such architecture.
    """
    architecture = architecture_of(architecture_name)
    problems = [*_check_scheduler(store, key), *_check_settings(store, key, architecture)]
    for part in PARTS:
        with store.open(_weights_of(key, part)) as source:
            stream = CheckedStream(source, _weights_of(key, part))
            header = stream.open(file_bytes_max=file_bytes_max, n_dims_max=4, allows_integers=True)
            problems += _check_tensors(key, part, header, architecture)
    if problems:
        raise AddOnRefusedError(problems)


def _weights_of(key: str, part: str) -> str:
    return f"{key}/{part}/{PARTS[part].weights}"


def _check_settings(store: Store, key: str, architecture: Architecture) -> list[Problem]:
    problems = []
    for name, part in PARTS.items():
        where = f"{key}/{name}/{CONFIG_NAME}"
        config = read_config(store, where)
        problems += check_kind(where, config, part.kind)
        problems += check_config(where, config, architecture.checkpoint_config[name], part.needed, architecture.name)
    return problems


def _check_scheduler(store: Store, key: str) -> list[Problem]:
    where = f"{key}/{SCHEDULER_NAME}"
    try:
        config: dict[str, Any] = read_config(store, where)
    except StoreError:
        return []
    return check_config(where, config, SCHEDULER, (), "the engine's sampler")


def _check_tensors(key: str, part: str, header: SafetensorsHeader, architecture: Architecture) -> list[Problem]:
    where, shapes = _weights_of(key, part), {}
    problems = []
    for span in header.spans:
        name = plain_name(part, span.name)
        if span.dtype in INTEGER_BYTES:
            if name != "embeddings.position_ids":  # their own numbers, which no network reads any more
                problems.append(Problem(where, f"{span.name!r} holds whole numbers", "weights", "Use another"))
            continue
        if name in shapes:
            problems.append(Problem(where, f"holds {name!r} under two names", "each tensor once", "Use another"))
        shape = span.shape
        wanted = architecture.checkpoint[part].get(name, ())
        # Old files keep the autoencoder's attention as 1x1 convolutions.
        shapes[name] = shape[:2] if part == "vae" and len(wanted) == 2 and shape[2:] == (1, 1) else shape
    return problems + check_shapes(where, shapes, architecture.checkpoint[part], architecture.name)
