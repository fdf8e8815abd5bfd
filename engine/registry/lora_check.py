"""What a LoRA file's keys mean, and whether they fit a network: decided from the header alone, before the body is read.

Understood are diffusers' three ways of writing a pair and kohya's ``lora_unet_…`` names (in the module names of diffusers or of
the original SDXL code). What patches anything but the target's layers, text encoders for example, is refused by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from engine.registry.safetensors_header import AddOnRefusedError, SafetensorsHeader, TensorSpan, refuse
from traces.problems import Problem

FILE_BYTES_MAX: Final = 2 * 2**30
RANK_MAX: Final = 256
TEXT_ENCODER_PREFIXES: Final = ("text_encoder.", "text_encoder_2.", "lora_te_", "lora_te1_", "lora_te2_")
# The three ways in which diffusers' own files spell the pair; the first is written today. kohya's files use the third.
PAIR_SUFFIXES: Final = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    (".lora_down.weight", ".lora_up.weight"),
)
KOHYA_PREFIX: Final = "lora_unet_"
METADATA_KEY: Final = "lora_adapter_metadata"
"""diffusers writes PEFT's settings here; alpha is one of them."""
_BLOCK: Final = re.compile(r"(down_blocks|mid_block|up_blocks)\.(?:(\d+)\.)?attentions\.(\d+)\.(.+)")


@dataclass(frozen=True, slots=True)
class PlannedPair:
    """One layer's pair, found in the header: ``W += scale · alpha / rank · up @ down``."""

    layer: str
    rank: int
    n_out: int
    n_in: int
    down: TensorSpan
    up: TensorSpan
    alpha: TensorSpan | None
    """A scalar of the body."""
    alpha_said: float | None
    """From the metadata. None, and no scalar: equal to the rank, a factor of one."""

    def factor(self, alpha: float | None) -> float:
        """``alpha / rank``, with the scalar's value if there is one."""
        known = alpha if alpha is not None else self.alpha_said
        return 1.0 if known is None else known / self.rank


def plan_lora(
    where: str, header: SafetensorsHeader, targets: Mapping[str, tuple[int, ...]], rank_max: int = RANK_MAX
) -> tuple[PlannedPair, ...]:
    """The pairs of a file, ordered by layer.

    Raises:
        AddOnRefusedError: with every reason the header gives.
    """
    pairs, problems = examine(where, header, targets, rank_max)
    if problems:
        raise AddOnRefusedError(problems)
    return pairs


def examine(
    where: str, header: SafetensorsHeader, targets: Mapping[str, tuple[int, ...]], rank_max: int
) -> tuple[tuple[PlannedPair, ...], list[Problem]]:
    """The pairs that are right, and what is wrong with the others."""
    problems: list[Problem] = []

    def note(what: str, allowed: str, repair: str = "Use another file") -> None:
        problems.append(Problem(where, what, allowed, repair))

    found: dict[str, dict[str, TensorSpan]] = {}
    is_kohya = any(span.name.startswith(KOHYA_PREFIX) for span in header.spans)
    kohya_layers = kohya_names(targets) if is_kohya else {}
    for span in header.spans:
        role, written = _role(span.name)
        layer = kohya_layers.get(written, written.removeprefix("unet."))
        if span.name.startswith(TEXT_ENCODER_PREFIXES) and layer not in targets:
            note(f"key {span.name!r} patches a text encoder", "keys of the UNet only", "Export the UNet's part alone")
            continue
        is_right = len(span.shape) == 2 if role in {"down", "up"} else role == "alpha" and span.n_elements == 1
        if not is_right:
            note(
                f"key {span.name!r} of shape {span.shape} is not understood",
                f"a matrix <layer>{PAIR_SUFFIXES[0][0]} or <layer>{PAIR_SUFFIXES[0][1]}, or a scalar <layer>.alpha",
                "Convert the file to diffusers' key names",
            )
            continue
        if role in found.setdefault(layer, {}):
            note(f"key {span.name!r} gives layer {layer!r} twice", "one pair a layer")
        found[layer][role] = span
    has_alphas = any("alpha" in spans for spans in found.values())
    alpha_said = _metadata_alpha(where, header.metadata, problems, has_alphas=has_alphas)
    pairs = []
    for layer in sorted(found):
        spans = found[layer]
        if layer not in targets:
            note(f"layer {layer!r} does not exist in the target", "a linear layer inside an attention block")
        elif "down" not in spans or "up" not in spans:
            note(f"layer {layer!r} is unpaired", "both the down and the up matrix")
        else:
            rank, (n_out, n_in) = spans["down"].shape[0], targets[layer]
            shapes = (spans["down"].shape, spans["up"].shape)
            if shapes != ((rank, n_in), (n_out, rank)):
                note(f"layer {layer!r} has shapes {shapes}", f"((rank, {n_in}), ({n_out}, rank))")
            elif rank > rank_max:
                note(f"layer {layer!r} has rank {rank}", f"at most {rank_max}")
            else:
                pair = PlannedPair(
                    layer, rank, n_out, n_in, spans["down"], spans["up"], spans.get("alpha"), alpha_said
                )  # fmt: skip
                pairs.append(pair)
    if not pairs and not problems:
        note("holds no LoRA pair", "at least one")
    return tuple(pairs), problems


def patched_parts(pairs: tuple[PlannedPair, ...]) -> tuple[str, ...]:
    """What a LoRA patches, without block numbers, sorted: ``attn1.to_q``, ``ff.net.2``, ``proj_in``."""
    return tuple(sorted({re.sub(r"^.*?\.attentions\.\d+\.(transformer_blocks\.\d+\.)?", "", p.layer) for p in pairs}))


def kohya_names(targets: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """kohya's names of the target's layers, in the spelling of diffusers' modules and of the original SDXL code."""
    names = {}
    for layer in targets:
        names[KOHYA_PREFIX + layer.replace(".", "_")] = layer
        match = _BLOCK.fullmatch(layer)
        if match is None:
            continue
        side, level, place, rest = match.groups()
        # Each level has 2 blocks and a downsampler, or 3 blocks; input block 0 is the first convolution.
        block = {
            "down_blocks": f"input_blocks_{1 + 3 * int(level or 0) + int(place)}",
            "mid_block": "middle_block",
            "up_blocks": f"output_blocks_{3 * int(level or 0) + int(place)}",
        }[side]
        names[f"{KOHYA_PREFIX}{block}_1_{rest.replace('.', '_')}"] = layer
    return names


def _role(name: str) -> tuple[str, str]:
    for down, up in PAIR_SUFFIXES:
        if name.endswith(down):
            return "down", name.removesuffix(down)
        if name.endswith(up):
            return "up", name.removesuffix(up)
    if name.endswith(".alpha"):
        return "alpha", name.removesuffix(".alpha")
    return "", name


def _metadata_alpha(
    where: str, metadata: Mapping[str, str], problems: list[Problem], *, has_alphas: bool
) -> float | None:
    """Alpha as diffusers' metadata gives it for the whole UNet; settings that change more than alpha are refused."""
    text = metadata.get(METADATA_KEY)
    if text is None:
        return None
    try:
        plain = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise refuse(where, f"has broken {METADATA_KEY}: {str(error)[:80]}", "JSON") from None
    settings = {
        key.removeprefix("unet."): value for key, value in (plain.items() if isinstance(plain, dict) else ())
    }  # fmt: skip
    for key in ("alpha_pattern", "use_rslora", "use_dora", "lora_bias"):
        if settings.get(key):
            problems.append(
                Problem(
                    where, f"says {key} = {str(settings[key])[:80]} in {METADATA_KEY}", f"no {key}", "Merge it first"
                )
            )
    alpha = settings.get("lora_alpha")
    if alpha is None:
        return None
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        problems.append(
            Problem(
                where, f"says lora_alpha = {str(alpha)[:80]} in {METADATA_KEY}", "a finite number", "Export it anew"
            )
        )
        return None
    if has_alphas:
        problems.append(
            Problem(where, f"gives alpha twice, as tensors and in {METADATA_KEY}", "one of them", "Remove one")
        )
    return float(alpha)
