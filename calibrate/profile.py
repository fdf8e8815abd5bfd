"""The LatencyProfile: fitted latency laws of one architecture on one GPU kind, with their uncertainty and their limits.

A law turns features of a piece of work (``forward_batch``, ``megapixels``, ``n_bytes``, ``n_images``) into seconds. Each is
``measured`` or ``assumed`` (with its source), valid inside the box it was measured in, and comes with joint bootstrap draws of
its parameters so that calibration error can be carried through a plan. Torch-free: planner and GPU host both import this. Files of it: ``calibrate.profile_file``.

Law names are ``STACK.QUANTITY`` where STACK is ``diffusers`` (stock, eager), ``diffusers_tuned`` (compiled) or ``engine`` (ours);
see ``LAW_FEATURES`` for all of them and their features.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, Literal, get_args

import numpy as np
import numpy.typing as npt

from calibrate.surface import surface_ratio
from traces.problems import one_problem

Floats = npt.NDArray[np.float64]
Form = Literal[
    "constant", "affine", "floor_affine", "attention", "floor_attention", "roofline", "roofline_attention", "tiles"
]
Status = Literal["measured", "assumed"]
Grade = Literal["measured", "interpolated", "extrapolated", "assumed"]
GRADES: Final[tuple[Grade, ...]] = get_args(Grade)
"""From best to worst; a result is as good as the worst grade it rests on."""
STACKS: Final = ("diffusers", "diffusers_tuned", "engine")
FORM_PARAMETERS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType({
    "constant": ("value_s",),
    "affine": ("fixed_s", "per_unit_s"),
    "floor_affine": ("floor_s", "fixed_s", "per_unit_s"),
    "attention": ("fixed_s", "per_unit_s", "attention_s"),
    "floor_attention": ("floor_s", "fixed_s", "per_unit_s", "attention_s"),
    "roofline": ("floor_s", "fixed_s", "per_unit_s"),
    "roofline_attention": ("floor_s", "fixed_s", "per_unit_s", "attention_s"),
    "tiles": ("floor_s", "fixed_s", "per_unit_s", "attention_s", "row_padding_s", "sequence_padding_s"),
})  # fmt: skip

TILES_PER_MEGAPIXEL: Final = 8
"""1024 tokens a megapixel in the innermost blocks of SDXL (one for 32 x 32 pixels), in tiles of 128."""
_STEP = ("forward_batch", "megapixels")
LAW_FEATURES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType({
    # one denoising step of the UNet, scheduler included; megapixels = width·height/2**20 of one image
    **{f"{stack}.unet_step": _STEP for stack in STACKS},
    # what one more ControlNet in the same process adds to a step
    **{f"{stack}.controlnet_step": _STEP for stack in STACKS},
    # one step with at least one LoRA active but not fused (stock only: the others fuse or patch)
    "diffusers.unet_lora_step": _STEP,
    # the two parts of our step, split where the ControlNet residuals join
    "engine.encoder_step": _STEP,
    "engine.decoder_step": _STEP,
    # one step's residuals from a ControlNet worker to a base worker
    "engine.residual_transfer.nvlink": ("n_bytes",),
    "engine.residual_transfer.pcie": ("n_bytes",),
    "engine.residual_transfer.network": ("n_bytes",),
    # what a step with a remote ControlNet takes beyond max(encoder, ControlNet + transfer) + decoder
    "engine.remote_join": (),
    **{f"{stack}.text_encode": () for stack in STACKS},
    # the same of a request without guidance, which has one prompt instead of two
    "engine.text_encode_unguided": (),
    # beyond the text: starting noise, which grows with the pixels of all images of a request
    "engine.latent_input": ("n_images", "megapixels"),
    # one control image of a request, read and laid out on the device before its first step
    "engine.control_input": ("megapixels",),
    **{f"{stack}.vae_decode": ("n_images", "megapixels") for stack in STACKS},
    # everything else of a request: input handling, conversion to an image
    **{f"{stack}.request_overhead": () for stack in STACKS},
    # one LoRA, from host memory (engine, pinned) or its file (stock, page-cached) to ready; and taken off again
    **{f"{stack}.lora_attach": ("n_bytes",) for stack in STACKS},
    **{f"{stack}.lora_detach": ("n_bytes",) for stack in STACKS},
    # what a request with LoRAs waits beyond their attaching, once: looking them up, telling the worker
    "engine.lora_wait": (),
    # one LoRA into the host tier: from a local file in the page cache, from local disk, from a remote store
    "lora_fetch.local": ("n_bytes",),
    "lora_fetch.disk": ("n_bytes",),
    "lora_fetch.remote": ("n_bytes",),
    # a checkpoint, or a ControlNet, from host memory (page cache) onto the device; of our engine, where the profile has the next
    # two laws: from the host tier, checked and page-locked already, onto the device
    **{f"{stack}.checkpoint_load": ("n_bytes",) for stack in STACKS},
    **{f"{stack}.controlnet_load": ("n_bytes",) for stack in STACKS},
    # its files, in the page cache, into the host tier: read, checked, page-locked; a profile without these has it in the loads
    "engine.checkpoint_read": ("n_bytes",),
    "engine.controlnet_read": ("n_bytes",),
    # a checkpoint or ControlNet that no host tier holds yet, over the network
    "model_fetch.remote": ("n_bytes",),
    # process start to ready for the first request, compile artefacts kept
    **{f"{stack}.worker_start": () for stack in STACKS},
})  # fmt: skip

READ_LAWS: Final = ("engine.checkpoint_read", "engine.controlnet_read")
"""With them loads of our engine are in two parts: into the host tier, and from there onto the device; without, in one."""
FACTS: Final = (
    "device_memory_gib",
    "checkpoint_gib",
    "controlnet_gib",
    "activation_gib_per_sample",
    "residual_bytes_per_sample",
)


class OutOfDomainError(ValueError):
    """A prediction was asked for outside the box a law was measured in, and extrapolation was not allowed."""


@dataclass(frozen=True, slots=True)
class Law:
    """One latency law: ``seconds = form(x, m)`` with x the product of its features and m the megapixels of one image.

    ``constant``: value_s. ``affine``: fixed_s + per_unit_s·x. ``attention``: fixed_s + per_unit_s·x + attention_s·x·m, because
    self-attention grows with the square of the pixels and only in proportion to the batch. ``floor_…``: max(floor_s, that), the
    launch-bound floor of eager execution. ``roofline…``: sqrt(floor_s² + that²), for graphs whose many kernels leave their own
    floors at different sizes. ``tiles``: the same with row_padding_s·(⌈8x⌉/8 - x) + sequence_padding_s·(x/m)·(⌈8m⌉/8 - m) in the
    line: kernels work in tiles of 128 tokens, and SDXL's innermost blocks have 1024 tokens a megapixel, so that rows of a whole batch
    (matrix products) and of one image (attention) are filled up to multiples of an eighth. Every form is proportional to its parameters taken together: all of them are seconds.
    """

    name: str
    form: Form
    features: tuple[str, ...]
    parameters: Mapping[str, float]
    status: Status
    source: str
    """Which measurements, or where an assumption comes from."""
    domain: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Feature to the closed interval it was measured in."""
    points: tuple[tuple[float, ...], ...] = ()
    """The measured feature vectors: a prediction at one of them is ``measured``, inside the box ``interpolated``."""
    point_ratios: tuple[float, ...] = ()
    """measured / form at each of ``points``, of two features: a prediction at a measured size is what was measured, and between
    sizes goes by :func:`calibrate.surface.surface_ratio`; empty: 1."""
    n_repetitions: int = 0
    residual_ratio_quantiles: tuple[float, ...] = ()
    """measured / fitted at ``RESIDUAL_LEVELS``."""
    left_out_error_ratio: float = 0.0
    """Root mean square of predicted / measured - 1 at sizes left out of the fit one by one; 0: too few sizes to tell."""

    def seconds(
        self, x: Floats | float, parameters: Mapping[str, float] | None = None, *, megapixels: Floats | float = 1.0
    ) -> Floats:
        """Evaluates the form at x and the megapixels of one image (of one shape, or one number), never below zero."""
        p = self.parameters if parameters is None else parameters
        units = np.asarray(x, dtype=np.float64)
        if self.form == "constant":
            return np.full(units.shape, p["value_s"])
        line = p["fixed_s"] + p["per_unit_s"] * units
        if "attention_s" in p:
            line = line + p["attention_s"] * units * np.asarray(megapixels, dtype=np.float64)
        if "row_padding_s" in p:
            rows, sequences = padding(units, np.asarray(megapixels, dtype=np.float64))
            line = line + p["row_padding_s"] * rows + p["sequence_padding_s"] * sequences
        floor = max(p.get("floor_s", 0.0), 0.0)
        if self.form.startswith("roofline") or self.form == "tiles":
            return np.hypot(np.maximum(line, 0.0), floor)
        return np.maximum(line, floor)


def is_of_sizes(features: tuple[str, ...]) -> bool:
    """Whether a law is of a batch and the pixels of an image, so that what its form misses can be a surface over both."""
    return len(features) == 2 and features[1] == "megapixels"


def padding(x: Floats, megapixels: Floats) -> tuple[Floats, Floats]:
    """What tiles of 128 tokens add to x: to the rows of a whole batch, and to those of each image; in units of x."""
    tiles = TILES_PER_MEGAPIXEL
    rows = np.ceil(tiles * x * (1 - 1e-9)) / tiles - x
    one = np.ceil(tiles * megapixels * (1 - 1e-9)) / tiles - megapixels
    return np.maximum(rows, 0.0), np.maximum(one, 0.0) * x / megapixels


RESIDUAL_LEVELS: Final = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


@dataclass(frozen=True, slots=True)
class Fact:
    """A number about memory or sizes that the planner needs beside the laws; units are in its name."""

    value: float
    status: Status
    source: str


@dataclass(frozen=True, slots=True)
class LatencyProfile:
    """Laws and facts of one architecture on one GPU kind."""

    architecture: str
    gpu_kind: str
    laws: Mapping[str, Law]
    facts: Mapping[str, Fact]
    noise_ratio_quantiles: Mapping[str, tuple[float, ...]]
    """Stack to (request service / its median) at ``RESIDUAL_LEVELS``: what one request differs from the next."""
    draws: Mapping[str, tuple[float, ...]]
    """``law:parameter`` to its joint bootstrap draws; entry k of every list belongs to the same draw."""
    fingerprint: Mapping[str, Any]
    """Hardware and software it was measured on."""
    raw_sha256: str
    """Digest of the raw measurements it was fitted to; empty for a hand-written profile."""
    created: str = ""
    notes: tuple[str, ...] = ()

    @property
    def n_draws(self) -> int:
        """Number of joint draws; 0 if the profile has none."""
        return min((len(values) for values in self.draws.values()), default=0)

    @property
    def profile_id(self) -> str:
        """First 12 digits of the sha256 of the canonical JSON."""
        from calibrate.profile_file import to_json  # here, because that module builds these types

        return hashlib.sha256(to_json(self).encode()).hexdigest()[:12]

    def predictor(self, draw: int | None = None, *, extrapolate: bool = False) -> Predictor:
        """A view that predicts with the fitted parameters, or with those of one joint draw.

        Raises:
            IndexError: there is no such draw.
        """
        if draw is not None and not 0 <= draw < self.n_draws:
            raise IndexError(f"draw is {draw}, this profile has {self.n_draws}; pass 0..{self.n_draws - 1} or None")
        return Predictor(self, draw, extrapolate)


class Predictor:
    """Predicts seconds from a profile and remembers, for every law it used, the worst grade of any prediction."""

    def __init__(self, profile: LatencyProfile, draw: int | None, extrapolate: bool) -> None:
        self.profile = profile
        self.used: dict[str, Grade] = {}
        self._draw = draw
        self._extrapolate = extrapolate

    def seconds(self, law_name: str, **features: Floats | float) -> Floats:
        """Seconds by one law, broadcast over the features.

        Raises:
            InputError: the profile has no such law.
            OutOfDomainError: a feature lies outside the measured box and extrapolation was not allowed.
            TypeError: features that are not the law's.
        """
        law = self.profile.laws.get(law_name)
        if law is None:
            raise one_problem(
                f"profile {self.profile.gpu_kind}",
                f"has no law {law_name!r}",
                f"one of {sorted(self.profile.laws)}",
                "Calibrate it, or add it to the profile as assumed, with its source.",
            )
        if set(features) != set(law.features):
            raise TypeError(f"{law_name} takes {law.features}, got {sorted(features)}")
        arrays = {name: np.asarray(value, dtype=np.float64) for name, value in features.items()}
        self._grade(law, arrays)
        x: Floats = np.asarray(1.0)
        for name in law.features:
            x = x * arrays[name]
        seconds = law.seconds(x, self._parameters(law), megapixels=arrays.get("megapixels", 1.0))
        if not law.point_ratios:
            return seconds
        asked = np.stack(np.broadcast_arrays(*(arrays[name] for name in law.features)), axis=-1)
        return seconds * surface_ratio(law.points, law.point_ratios, asked)

    def has(self, law_name: str) -> bool:
        """Whether the profile has this law."""
        return law_name in self.profile.laws

    def fact(self, name: str) -> float:
        """Value of a fact; raises :class:`InputError` if the profile lacks it."""
        fact = self.profile.facts.get(name)
        if fact is None:
            raise one_problem(
                f"profile {self.profile.gpu_kind}", f"has no fact {name!r}", f"one of {sorted(self.profile.facts)}"
            )
        return fact.value

    def _parameters(self, law: Law) -> Mapping[str, float]:
        if self._draw is None:
            return law.parameters
        draws = self.profile.draws
        keys = {name: f"{law.name}:{name}" for name in law.parameters}
        return {name: draws[key][self._draw] if key in draws else law.parameters[name] for name, key in keys.items()}

    def _grade(self, law: Law, arrays: Mapping[str, Floats]) -> None:
        grade: Grade = "assumed" if law.status == "assumed" else "measured"
        for name in law.features:
            low, high = law.domain.get(name, (-math.inf, math.inf))
            values = arrays[name]
            outside = (values < low * (1 - 1e-9)) | (values > high * (1 + 1e-9))
            if outside.any():
                if not self._extrapolate:
                    seen = float(values[outside].flat[0])
                    raise OutOfDomainError(
                        f"{law.name}: {name} is {seen:g}, the profile was measured for {low:g}..{high:g}. Calibrate that range, "
                        "or allow extrapolation (scenario: profile.extrapolate: true), which is then said in every result."
                    )
                grade = _worse(grade, "extrapolated")
        if grade == "measured" and law.features and not _all_at_points(law, arrays):
            grade = "interpolated"
        self.used[law.name] = _worse(self.used.get(law.name, "measured"), grade)


def _all_at_points(law: Law, arrays: Mapping[str, Floats]) -> bool:
    asked = np.stack(np.broadcast_arrays(*(arrays[name] for name in law.features)), axis=-1).reshape(
        -1, len(law.features)
    )
    known = np.asarray(law.points, dtype=np.float64).reshape(-1, len(law.features))
    if not len(known):
        return False
    unique = np.unique(asked, axis=0)
    return bool(np.isclose(unique[:, None, :], known[None, :, :], rtol=1e-6).all(axis=2).any(axis=1).all())


def _worse(a: Grade, b: Grade) -> Grade:
    return GRADES[max(GRADES.index(a), GRADES.index(b))]


def has_loads_in_two_parts(profile: LatencyProfile) -> bool:
    """Whether loads of our engine are from its host tier, with reading and checking in laws of their own."""
    return any(name in profile.laws for name in READ_LAWS)
