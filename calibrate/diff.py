"""What changed from one profile to another: law by law, image by image, and which differences of hardware or software go with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from calibrate.compose import image_s
from calibrate.measurement import Features
from calibrate.profile import STACKS, LatencyProfile, Law
from calibrate.table import example_features

LEVELS: Final = (0.05, 0.95)
NEAR_RATIO: Final = 0.02
"""Closer than this counts as unchanged, whatever the interval: a calibration is not better than that."""
STEPS_OF_IMAGE: Final = 50
IMAGES: Final = (
    ("colocated", 0),
    ("colocated", 1),
    ("colocated", 3),
    ("diffusers", 0),
    ("diffusers", 1),
    ("diffusers_tuned", 0),
)
SUBJECTS: Final[Mapping[str, tuple[str, ...]]] = {
    "hardware": ("gpu", "driver", "host", "n_gpus"),
    "software": ("software",),
    "engine": ("engine_sources", "engine"),
    "origin": ("transferred_from",),
}
"""What a difference of the fingerprints is about, by their fields; clocks and times are left out."""


@dataclass(frozen=True, slots=True)
class LawDifference:
    """One law in both profiles, at features inside both boxes where there are such."""

    law: str
    at: Mapping[str, float]
    before_s: float
    after_s: float
    ratio_low: float
    """90 % interval of after / before over all pairs of draws."""
    ratio_high: float
    remarks: tuple[str, ...]

    @property
    def ratio(self) -> float:
        """after / before."""
        return self.after_s / self.before_s if self.before_s else float("inf") if self.after_s else 1.0

    @property
    def verdict(self) -> str:
        """``same``, ``faster`` or ``slower``: beyond 2 % and with an interval that leaves 1 out."""
        if abs(self.ratio - 1) <= NEAR_RATIO or self.ratio_low <= 1 <= self.ratio_high:
            return "same"
        return "slower" if self.ratio > 1 else "faster"


@dataclass(frozen=True, slots=True)
class ImageDifference:
    """One image of 50 steps, composed from the laws of each profile."""

    topology: str
    n_controlnets: int
    before_s: float
    after_s: float


@dataclass(frozen=True, slots=True)
class ProfileDifference:
    """Everything that sets two profiles apart."""

    laws: tuple[LawDifference, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]
    images: tuple[ImageDifference, ...]
    fingerprint: Mapping[str, tuple[tuple[str, str, str], ...]]
    """Subject to (field, before, after)."""
    facts: tuple[tuple[str, float, float], ...]
    sentences: tuple[str, ...]


def profile_difference(before: LatencyProfile, after: LatencyProfile) -> ProfileDifference:
    """Compares two profiles, of one GPU or of two."""
    both = sorted(set(before.laws) & set(after.laws))
    laws = tuple(_law_difference(before, after, name) for name in both)
    fingerprint = _fingerprint_differences(before, after)
    facts = tuple(
        (name, before.facts[name].value, after.facts[name].value)
        for name in sorted(set(before.facts) & set(after.facts))
        if before.facts[name].value != after.facts[name].value
    )
    return ProfileDifference(
        laws=laws,
        only_before=tuple(sorted(set(before.laws) - set(after.laws))),
        only_after=tuple(sorted(set(after.laws) - set(before.laws))),
        images=_images(before, after),
        fingerprint=fingerprint,
        facts=facts,
        sentences=tuple(_explained(before, after, laws, fingerprint)),
    )


def _law_difference(before: LatencyProfile, after: LatencyProfile, name: str) -> LawDifference:
    one, other = before.laws[name], after.laws[name]
    at = example_features(one, before)
    remarks = []
    for feature in one.features:
        low = max(law.domain.get(feature, (-np.inf, np.inf))[0] for law in (one, other))
        high = min(law.domain.get(feature, (-np.inf, np.inf))[1] for law in (one, other))
        if low > high:
            remarks.append(f"{feature}: measured in different boxes, the second is extrapolated")
        else:
            at[feature] = min(max(at[feature], low), high)
    if one.status != other.status:
        remarks.append(f"{one.status}, then {other.status}")
    if one.form != other.form:
        remarks.append(f"form {one.form}, then {other.form}")
    for feature in one.features:
        boxes = [law.domain.get(feature) for law in (one, other)]
        if None not in boxes and not np.allclose(boxes[0] or (), boxes[1] or (), rtol=1e-6):
            remarks.append(f"{feature} {_box(one, feature)}, then {_box(other, feature)}")
    values = [_seconds(profile, name, at) for profile in (before, after)]
    drawn = [_drawn(profile, name, at) for profile in (before, after)]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.divide.outer(drawn[1], drawn[0])
    ratios = ratios[np.isfinite(ratios)]
    low, high = (float(v) for v in np.quantile(ratios, LEVELS)) if ratios.size else (0.0, float("inf"))
    return LawDifference(name, at, values[0], values[1], low, high, tuple(remarks))


def _box(law: Law, feature: str) -> str:
    low, high = law.domain[feature]
    return f"{low:.4g}..{high:.4g}"


def _seconds(profile: LatencyProfile, law: str, at: Mapping[str, float], draw: int | None = None) -> float:
    return float(profile.predictor(draw, extrapolate=True).seconds(law, **at))


def _drawn(profile: LatencyProfile, law: str, at: Mapping[str, float]) -> np.ndarray:
    draws: list[int | None] = [*range(profile.n_draws)] or [None]
    return np.array([_seconds(profile, law, at, draw) for draw in draws])


def _images(before: LatencyProfile, after: LatencyProfile) -> tuple[ImageDifference, ...]:
    found = []
    for topology, n_controlnets in IMAGES:
        image = Features(2, 1, 1024, 1024, STEPS_OF_IMAGE, n_controlnets)
        values = []
        for profile in (before, after):
            predictor = profile.predictor(extrapolate=True)
            n_bytes = profile.facts["residual_bytes_per_sample"].value if profile.facts else 0.0

            def seconds(law: str, profile: LatencyProfile = profile, predictor: Any = predictor, **at: float) -> float:
                if law not in profile.laws:
                    raise KeyError(law)
                return float(predictor.seconds(law, **at))

            try:
                values.append(image_s(seconds, topology, image, n_bytes))
            except KeyError:
                break
        if len(values) == 2:
            found.append(ImageDifference(topology, n_controlnets, values[0], values[1]))
    return tuple(found)


def _flat(fingerprint: Mapping[str, Any]) -> dict[str, str]:
    """Field to its values over all sessions, those of nested tables by dotted names."""
    sessions = fingerprint.get("sessions") or [{}]
    found: dict[str, set[str]] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), inner)
        else:
            found.setdefault(prefix, set()).add(str(value))

    for session in (*sessions, {key: value for key, value in fingerprint.items() if key != "sessions"}):
        walk("", session)
    return {key: ", ".join(sorted(values)) for key, values in sorted(found.items())}


def _fingerprint_differences(
    before: LatencyProfile, after: LatencyProfile
) -> dict[str, tuple[tuple[str, str, str], ...]]:
    one, other = _flat(before.fingerprint), _flat(after.fingerprint)
    found = {}
    for subject, fields in SUBJECTS.items():
        keys = sorted(key for key in {*one, *other} if key.split(".")[0] in fields)
        # a profile that says nothing about its host does not differ in it
        known = keys if subject == "origin" else [key for key in keys if key in one and key in other]
        rows = tuple((key, one.get(key, ""), other.get(key, "")) for key in known if one.get(key) != other.get(key))
        if rows:
            found[subject] = rows
    return found


def _explained(
    before: LatencyProfile,
    after: LatencyProfile,
    laws: tuple[LawDifference, ...],
    fingerprint: Mapping[str, tuple[tuple[str, str, str], ...]],
) -> list[str]:
    """Which laws moved, and what can have moved them; stock Diffusers is the control: our engine's sources do not touch it."""
    found = []
    moved: dict[str, list[LawDifference]] = {}
    for stack in STACKS:
        mine = [law for law in laws if law.law.startswith(f"{stack}.") and _is_measured(before, after, law.law)]
        moved[stack] = [law for law in mine if law.verdict != "same"]
        if mine:
            ratios = np.exp(np.median(np.log([law.ratio for law in mine if 0 < law.ratio < np.inf] or [1.0])))
            found.append(
                f"{stack}: {len(moved[stack])} of {len(mine)} measured laws changed; median ratio {ratios:.3f}."
            )
    subjects = {
        "hardware": "hardware or host", "software": "versions of the software", "engine": "the engine's sources",
        "origin": "one of them was transferred, not measured",
    }  # fmt: skip
    differing = [subjects[subject] for subject in fingerprint]
    found.append(f"What differs: {'; '.join(differing)}." if differing else "The fingerprints say nothing differs.")
    if "engine" in fingerprint and moved["engine"] and not moved["diffusers"]:
        found.append("Stock Diffusers did not move, so the engine's sources explain the change of engine.* laws.")
    elif moved["engine"] and moved["diffusers"] and ("hardware" in fingerprint or "software" in fingerprint):
        found.append("Stock Diffusers moved too, so the engine's sources alone do not explain the change.")
    elif any(moved.values()) and not fingerprint:
        found.append("Nothing recorded explains the change: another machine of the kind, its clocks or its load.")
    return found


def _is_measured(before: LatencyProfile, after: LatencyProfile, law: str) -> bool:
    return before.laws[law].status == after.laws[law].status == "measured"
