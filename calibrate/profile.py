"""The LatencyProfile: fitted latency laws of one architecture on one GPU kind, with their uncertainty and their limits.

A law turns features of a piece of work (``forward_batch``, ``megapixels``, ``n_bytes``, ``n_images``) into seconds. Each is
``measured`` or ``assumed`` (with its source), valid inside the box it was measured in, and comes with joint bootstrap draws of
its parameters so that calibration error can be carried through a plan. Torch-free: planner and GPU host both import this.

Law names are ``STACK.QUANTITY`` where STACK is ``diffusers`` (stock, eager), ``diffusers_tuned`` (compiled) or ``engine`` (ours);
see ``LAW_FEATURES`` for all of them and their features.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, get_args

import numpy as np
import numpy.typing as npt

from traces.problems import InputError, Problem, one_problem

SCHEMA_VERSION: Final = 1
FILE_BYTES_MAX: Final = 64 * 2**20
Floats = npt.NDArray[np.float64]
Form = Literal["constant", "affine", "floor_affine"]
Status = Literal["measured", "assumed"]
Grade = Literal["measured", "interpolated", "extrapolated", "assumed"]
GRADES: Final[tuple[Grade, ...]] = get_args(Grade)
"""From best to worst; a result is as good as the worst grade it rests on."""
STACKS: Final = ("diffusers", "diffusers_tuned", "engine")
FORM_PARAMETERS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType({
    "constant": ("value_s",),
    "affine": ("fixed_s", "per_unit_s"),
    "floor_affine": ("floor_s", "fixed_s", "per_unit_s"),
})  # fmt: skip

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
    **{f"{stack}.vae_decode": ("n_images", "megapixels") for stack in STACKS},
    # everything else of a request: input handling, conversion to an image
    **{f"{stack}.request_overhead": () for stack in STACKS},
    # one LoRA, from host memory (engine, pinned) or its file (stock, page-cached) to ready; and taken off again
    **{f"{stack}.lora_attach": ("n_bytes",) for stack in STACKS},
    **{f"{stack}.lora_detach": ("n_bytes",) for stack in STACKS},
    # one LoRA into the host tier: from local disk, from a remote store
    "lora_fetch.local": ("n_bytes",),
    "lora_fetch.remote": ("n_bytes",),
    # a checkpoint, or a ControlNet, from host memory (page cache) onto the device
    **{f"{stack}.checkpoint_load": ("n_bytes",) for stack in STACKS},
    **{f"{stack}.controlnet_load": ("n_bytes",) for stack in STACKS},
    # a checkpoint or ControlNet that no host tier holds yet
    "model_fetch.remote": ("n_bytes",),
    # process start to ready for the first request, compile artefacts kept
    **{f"{stack}.worker_start": () for stack in STACKS},
})  # fmt: skip

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
    """One latency law: ``seconds = form(x)`` with x the product of its features.

    ``constant``: value_s. ``affine``: fixed_s + per_unit_s·x. ``floor_affine``: max(floor_s, fixed_s + per_unit_s·x), the
    launch-bound floor of eager execution under the throughput line.
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
    n_repetitions: int = 0
    residual_ratio_quantiles: tuple[float, ...] = ()
    """measured / fitted at ``RESIDUAL_LEVELS``."""

    def seconds(self, x: Floats | float, parameters: Mapping[str, float] | None = None) -> Floats:
        """Evaluates the form at x (any shape), never below zero."""
        p = self.parameters if parameters is None else parameters
        units = np.asarray(x, dtype=np.float64)
        if self.form == "constant":
            return np.full(units.shape, p["value_s"])
        line = p["fixed_s"] + p["per_unit_s"] * units
        floor = p["floor_s"] if self.form == "floor_affine" else 0.0
        return np.maximum(line, max(floor, 0.0))


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
        return law.seconds(x, self._parameters(law))

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


def to_json(profile: LatencyProfile) -> str:
    """Canonical JSON, one law a line: sorted, final newline; the same profile always gives the same bytes."""
    laws = {
        name: {
            "form": law.form,
            "features": list(law.features),
            "parameters": {key: float(value) for key, value in sorted(law.parameters.items())},
            "status": law.status,
            "source": law.source,
            "domain": {key: [float(bound) for bound in law.domain[key]] for key in sorted(law.domain)},
            "points": [[float(value) for value in point] for point in law.points],
            "n_repetitions": law.n_repetitions,
            "residual_ratio_quantiles": list(law.residual_ratio_quantiles),
        }
        for name, law in sorted(profile.laws.items())
    }
    top: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "architecture": profile.architecture,
        "gpu_kind": profile.gpu_kind,
        "created": profile.created,
        "fingerprint": dict(sorted(profile.fingerprint.items())),
        "raw_sha256": profile.raw_sha256,
        "notes": list(profile.notes),
    }
    nested: dict[str, dict[str, Any]] = {
        "facts": {
            k: {"value": float(f.value), "status": f.status, "source": f.source}
            for k, f in sorted(profile.facts.items())
        },
        "laws": laws,
        "noise_ratio_quantiles": {
            key: [float(value) for value in values] for key, values in sorted(profile.noise_ratio_quantiles.items())
        },
        "draws": {key: list(values) for key, values in sorted(profile.draws.items())},
    }
    lines = [f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in top.items()]
    for key, table in nested.items():
        rows = ",\n".join(
            f"    {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in table.items()
        )
        lines.append(f"  {json.dumps(key)}: {{\n{rows}\n  }}" if rows else f"  {json.dumps(key)}: {{}}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def shipped_profiles() -> dict[str, Path]:
    """Name to file of the measured profiles that travel with the package."""
    folder = resources.files("calibrate") / "profiles"
    return {
        Path(str(item)).stem: Path(str(item))
        for item in sorted(folder.iterdir() if folder.is_dir() else (), key=str)
        if str(item).endswith(".json")
    }


def load_profile(name_or_path: str) -> LatencyProfile:
    """Reads a shipped profile by name, or any profile by path.

    Raises:
        InputError: no such profile, or the file is not a profile; every problem is named.
    """
    path = shipped_profiles().get(name_or_path, Path(name_or_path))
    where = str(path) if name_or_path not in shipped_profiles() else f"profile {name_or_path}"
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise one_problem(where, f"is {path.stat().st_size} bytes", f"at most {FILE_BYTES_MAX}")
        plain = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except OSError as error:
        raise one_problem(
            where,
            f"cannot be read: {error.strerror}",
            f"a profile file or one of the shipped {sorted(shipped_profiles())}",
            "Check the name.",
        ) from None
    except (UnicodeDecodeError, ValueError) as error:
        raise one_problem(where, f"is not JSON: {error}", "a profile written by 'diffplan calibrate fit'") from None
    return profile_from_plain(plain, where)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number JSON knows")


def profile_from_plain(plain: object, where: str) -> LatencyProfile:
    """Builds a profile from decoded JSON; raises :class:`InputError` with every problem found."""
    problems: list[Problem] = []

    def table(value: object, place: str) -> dict[str, Any]:
        if isinstance(value, dict):
            return value
        problems.append(Problem(f"{where} {place}".rstrip(), f"got {type(value).__name__}", "a JSON object"))
        return {}

    def number(value: object, place: str, low: float = -math.inf) -> float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if is_number and value >= low:  # type: ignore[operator]
            return float(value)  # type: ignore[arg-type]
        problems.append(
            Problem(
                f"{where} {place}", f"got {value!r}", f"a finite number{f', {low:g} or more' if low > -1e300 else ''}"
            )
        )
        return math.nan

    def numbers(value: object, place: str) -> tuple[float, ...]:
        if isinstance(value, list):
            return tuple(number(item, place) for item in value)
        problems.append(Problem(f"{where} {place}", f"got {type(value).__name__}", "a list of numbers"))
        return ()

    top = table(plain, "")
    known = {
        "schema_version", "architecture", "gpu_kind", "created", "fingerprint", "raw_sha256", "notes", "facts", "laws",
        "noise_ratio_quantiles", "draws",
    }  # fmt: skip
    if top and top.get("schema_version") != SCHEMA_VERSION:
        problems.append(Problem(f"{where} schema_version", f"got {top.get('schema_version')!r}", str(SCHEMA_VERSION)))
    problems += [
        Problem(f"{where} {key}", "is not a known field", f"one of {sorted(known)}") for key in sorted(set(top) - known)
    ]
    for key in ("architecture", "gpu_kind"):
        if not isinstance(top.get(key), str) or not top.get(key):
            problems.append(Problem(f"{where} {key}", f"got {top.get(key)!r}", "a text that is not empty"))
    laws = {}
    for name, item in table(top.get("laws"), "laws").items():
        place = f"laws.{name}"
        entry = table(item, place)
        form, features, status = entry.get("form"), entry.get("features"), entry.get("status")
        if name not in LAW_FEATURES:
            problems.append(
                Problem(f"{where} {place}", "is not a known law", f"one of {sorted(LAW_FEATURES)}", "Rename it.")
            )
            continue
        if form not in FORM_PARAMETERS:
            problems.append(Problem(f"{where} {place}.form", f"got {form!r}", f"one of {sorted(FORM_PARAMETERS)}"))
            continue
        if not isinstance(features, list) or tuple(features) not in {LAW_FEATURES[name], ()}:
            problems.append(Problem(f"{where} {place}.features", f"got {features!r}", f"{list(LAW_FEATURES[name])}"))
            continue
        if status not in get_args(Status):
            problems.append(Problem(f"{where} {place}.status", f"got {status!r}", "measured or assumed"))
        if not isinstance(entry.get("source"), str) or not entry.get("source"):
            problems.append(
                Problem(f"{where} {place}.source", "is missing", "a text", "Say which measurements, or whose figure.")
            )
        given = table(entry.get("parameters"), f"{place}.parameters")
        if set(given) != set(FORM_PARAMETERS[form]):
            problems.append(
                Problem(f"{where} {place}.parameters", f"got {sorted(given)}", f"{list(FORM_PARAMETERS[form])}")
            )
            continue
        domain = {}
        for feature, box in table(entry.get("domain", {}), f"{place}.domain").items():
            bounds = numbers(box, f"{place}.domain.{feature}")
            if feature not in LAW_FEATURES[name] or len(bounds) != 2 or bounds[0] > bounds[1]:
                problems.append(
                    Problem(f"{where} {place}.domain.{feature}", f"got {box!r}", "a feature of the law and [low, high]")
                )
            else:
                domain[feature] = (bounds[0], bounds[1])
        laws[name] = Law(
            name=name,
            form=form,
            features=LAW_FEATURES[name],
            parameters={key: number(given[key], f"{place}.parameters.{key}") for key in FORM_PARAMETERS[form]},
            status=status,  # type: ignore[arg-type]
            source=str(entry.get("source")),
            domain=domain,
            points=tuple(numbers(point, f"{place}.points") for point in entry.get("points", [])),
            n_repetitions=int(entry.get("n_repetitions", 0)),
            residual_ratio_quantiles=numbers(
                entry.get("residual_ratio_quantiles", []), f"{place}.residual_ratio_quantiles"
            ),
        )
    facts = {}
    for name, item in table(top.get("facts"), "facts").items():
        entry = table(item, f"facts.{name}")
        if name not in FACTS:
            problems.append(Problem(f"{where} facts.{name}", "is not a known fact", f"one of {list(FACTS)}"))
        facts[name] = Fact(
            number(entry.get("value"), f"facts.{name}.value", 0.0),
            entry.get("status", "assumed"),
            str(entry.get("source", "")),
        )
    noise = {}
    for stack, item in table(top.get("noise_ratio_quantiles", {}), "noise_ratio_quantiles").items():
        noise[stack] = numbers(item, f"noise_ratio_quantiles.{stack}")
        if len(noise[stack]) not in {0, len(RESIDUAL_LEVELS)} or any(value <= 0 for value in noise[stack]):
            problems.append(
                Problem(
                    f"{where} noise_ratio_quantiles.{stack}", f"got {item!r}", f"{len(RESIDUAL_LEVELS)} positive ratios"
                )
            )
    draws = {key: numbers(item, f"draws.{key}") for key, item in table(top.get("draws", {}), "draws").items()}
    if len({len(values) for values in draws.values()}) > 1:
        problems.append(Problem(f"{where} draws", "have different lengths", "joint draws: every list equally long"))
    if problems:
        raise InputError(problems)
    return LatencyProfile(
        architecture=top["architecture"],
        gpu_kind=top["gpu_kind"],
        laws=laws,
        facts=facts,
        noise_ratio_quantiles=noise,
        draws=draws,
        fingerprint=table(top.get("fingerprint", {}), "fingerprint"),
        raw_sha256=str(top.get("raw_sha256", "")),
        created=str(top.get("created", "")),
        notes=tuple(str(note) for note in top.get("notes", [])),
    )
