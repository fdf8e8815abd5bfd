"""``calibrate check``: whether a profile still holds on this host, from a handful of points in two minutes.

Each point is a size that the law was fitted at. The verdict compares the median of a few repetitions with the law's prediction; the
interval is the one the profile states: how far its repetitions were from the law (5 to 95 %), widened by its bootstrap draws
and by :data:`TOLERANCE`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from calibrate import fingerprint
from calibrate.extent import Extent, Shape, tiny_extent
from calibrate.measurement import Features, Measurements, read_measurements
from calibrate.points import Task, fit_step_task
from calibrate.profile import RESIDUAL_LEVELS, LatencyProfile, Law, has_loads_in_two_parts
from calibrate.recipes import FROM_HOST_TIER, IN_ONE
from calibrate.run import RunOptions, hardware_of, run_session
from traces.problems import InputError, one_problem

TOLERANCE: Final = 0.03
"""Two hosts of one kind, and one host on two days, differ by so much without anything having changed (h200: 1 to 2 %)."""
NO_RESIDUALS: Final = 0.1
"""Half-width where a profile says nothing about repetitions (hand-written ones)."""
SIZES_MAX: Final = 3
LORA_RANK: Final = 64
MAP: Final = "engine.lora_map"
"""What a fetched LoRA still needs in the worker; laws of fetches may include it, and then say so in their source."""
Verdict = Literal["holds", "slower", "faster", "outside"]


@dataclass(frozen=True, slots=True)
class LawCheck:
    """One law at one size: what was measured here, what the profile says."""

    law: str
    features: Mapping[str, float]
    n_repetitions: int
    measured_s: float
    predicted_s: float
    low_s: float
    high_s: float
    verdict: Verdict
    """``outside``: the size is not in the box that the law was measured in; no verdict."""

    @property
    def ratio(self) -> float:
        """measured / predicted."""
        return self.measured_s / self.predicted_s


@dataclass(frozen=True, slots=True)
class CheckReport:
    """All of them, and what differs between this host and the one the profile was measured on."""

    checks: tuple[LawCheck, ...]
    changed: tuple[str, ...]
    failures: tuple[str, ...]
    path: Path
    """The measurements."""

    @property
    def has_drifted(self) -> bool:
        """Whether any law no longer holds."""
        return any(check.verdict in ("slower", "faster") for check in self.checks)

    def to_plain(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "has_drifted": self.has_drifted,
            "checks": [{**dataclasses.asdict(check), "ratio": check.ratio} for check in self.checks],
            "changed": list(self.changed),
            "failures": list(self.failures),
            "measurements": str(self.path),
        }


def check_profile(profile: LatencyProfile, device: str, options: RunOptions) -> CheckReport:
    """Measures and compares.

    Raises:
        InputError: the profile is of another model or GPU kind, or nothing could be measured.
    """
    extent = check_extent(profile, device)
    here = fingerprint.gpu_kind(str(hardware_of(extent)["gpu"]))
    if here != profile.gpu_kind:
        raise one_problem(
            f"profile {profile.profile_id}", f"was measured on {profile.gpu_kind}, this machine has {here}",
            "a profile of this GPU kind", "Measure one: calibrate run.",
        )  # fmt: skip
    path = run_session(extent, options, check_blocks(extent, has_host_tier=has_loads_in_two_parts(profile)))
    measured = read_measurements(path)
    session = measured.sessions[0]
    checks = verdicts(profile, measured)
    if not checks:
        raise InputError([*_as_problems(measured), one_problem("check", "measured nothing", "a law").problems[0]])
    failures = tuple(f"{failure.part}: {failure.error}" for failure in session.failures)
    return CheckReport(checks, _changed(profile, session.fingerprint), failures, path)


def check_extent(profile: LatencyProfile, device: str) -> Extent:
    """A session at up to three sizes of the profile's step law: that of one image, the largest cheap one, and the smallest.

    Raises:
        InputError: the profile's model is not one that can be built here.
    """
    if profile.architecture not in ("sdxl", "tiny"):
        raise one_problem(f"profile {profile.profile_id}", f"is of {profile.architecture!r}", "sdxl or tiny")
    shapes = _shapes(profile.laws.get("engine.unet_step"))
    common: dict[str, Any] = {
        "device": device, "dtype": "bfloat16" if device == "cuda" else "float32", "n_controlnets": 1, "n_sharing": 1,
        "held_out_shapes": (), "candidate_shapes": (), "cohosted_shapes": (), "tuned_batches": (), "burst": 8,
    }  # fmt: skip
    if shapes:
        common |= {
            "width_px": shapes[0][1],
            "height_px": shapes[0][2],
            "fit_shapes": shapes,
            "stock_shapes": shapes[:1],
        }
    extent = Extent(**common) if profile.architecture == "sdxl" else tiny_extent(**common)
    main = (1, extent.width_px, extent.height_px)
    return dataclasses.replace(extent, vae_shapes=(main,), held_out_vae_shapes=())


def _shapes(law: Law | None) -> tuple[Shape, ...]:
    """Square sizes that were measured: nearest to one guided image first."""
    if law is None:
        return ()
    found: list[Shape] = []
    for batch, megapixels in law.points:
        side = round(math.sqrt(megapixels * 2**20))
        if side * side == round(megapixels * 2**20) and side % 32 == 0:
            found.append((round(batch), side, side))
    main = [shape for shape in found if shape[0] == 2]
    if not main:
        return ()
    first = max(main, key=lambda shape: shape[1])
    cheap = [shape for shape in found if shape[0] * shape[1] * shape[2] <= 8 * 2**20]
    by_work = sorted(cheap, key=lambda shape: (shape[0] * shape[1] * shape[2], shape))
    return tuple(dict.fromkeys([first, *by_work[-1:], *by_work[:1]]))[:SIZES_MAX]


def check_blocks(extent: Extent, *, has_host_tier: bool = False) -> list[list[Task]]:
    """Two rounds of each point, so that a passing disturbance does not decide.

    Args:
        has_host_tier: the profile's loads are from the engine's host tier; else they are read, checked and copied in one.
    """
    pixels = Features(n_images=1, width_px=extent.width_px, height_px=extent.height_px)
    rank = LORA_RANK if extent.model == "sdxl" else extent.lora_ranks[len(extent.lora_ranks) // 2]
    tasks = [fit_step_task(extent, shape) for shape in extent.fit_shapes]
    tasks += [Task("steps", "stock", "unet_step", step.features, extent.burst) for step in tasks[:1]]
    tasks = [dataclasses.replace(t, features=dataclasses.replace(t.features, n_controlnets=0)) if t.station == "stock"
             else t for t in tasks]  # fmt: skip
    for station in ("engine", "stock"):
        tasks.append(Task("decode", station, "vae_decode", pixels, 5))
        tasks.append(Task("decode", station, "text_encode", Features(), 7))
    tasks.append(Task("loras", "engine", "lora", Features(variant=f"rank{rank}"), 4, cost_s=4))
    once = [
        Task(
            "loads",
            "engine",
            "load",
            Features(variant=f"controlnet{FROM_HOST_TIER if has_host_tier else IN_ONE}"),
            2,
            cost_s=6,
        )
    ]
    return [tasks, tasks, once]


def verdicts(profile: LatencyProfile, measured: Measurements) -> tuple[LawCheck, ...]:
    """One verdict for each law and size that was measured.

    Laws that the profile only assumes have none, nor those that it has from whole jobs on the serving path, which a check does not run.
    """
    maps: dict[int, list[float]] = {}
    for row in measured.rows:
        if row.quantity == MAP:
            maps.setdefault(row.features.n_bytes, []).append(row.value_s)
    values: dict[tuple[str, tuple[tuple[str, float], ...]], list[float]] = {}
    for row in measured.rows:
        law = profile.laws.get(row.quantity)
        if law is None or law.status != "measured" or row.features.n_controlnets or row.features.n_loras > 1:
            continue
        if "serving." in law.source and row.quantity not in law.source:
            continue
        value_s = row.value_s
        if MAP in law.source and row.quantity != MAP:
            if row.features.n_bytes not in maps:
                continue
            value_s += float(np.median(maps[row.features.n_bytes]))
        at = tuple((name, float(getattr(row.features, name))) for name in law.features)
        values.setdefault((row.quantity, at), []).append(value_s)
    return tuple(_verdict(profile, name, dict(at), found) for (name, at), found in sorted(values.items()))


def _verdict(profile: LatencyProfile, name: str, features: dict[str, float], values: list[float]) -> LawCheck:
    law = profile.laws[name]
    measured_s = float(np.median(values))
    predicted_s = float(profile.predictor(extrapolate=True).seconds(name, **features))
    low, high = _interval(profile, law, features, predicted_s)
    verdict: Verdict = "holds" if low <= measured_s / predicted_s <= high else "faster"
    if measured_s / predicted_s > high:
        verdict = "slower"
    if not all(a * (1 - 1e-9) <= features[key] <= b * (1 + 1e-9) for key, (a, b) in law.domain.items()):
        verdict = "outside"
    return LawCheck(
        name, features, len(values), measured_s, predicted_s, low * predicted_s, high * predicted_s, verdict
    )


def _interval(
    profile: LatencyProfile, law: Law, features: Mapping[str, float], predicted_s: float
) -> tuple[float, float]:
    """Lowest and highest measured / predicted at which the law still holds."""
    if law.residual_ratio_quantiles:
        quantiles = dict(zip(RESIDUAL_LEVELS, law.residual_ratio_quantiles, strict=True))
        low, high = min(quantiles[0.05], 1.0), max(quantiles[0.95], 1.0)
    else:
        low, high = 1 - NO_RESIDUALS, 1 + NO_RESIDUALS
    if profile.n_draws:
        drawn = [
            float(profile.predictor(k, extrapolate=True).seconds(law.name, **features)) / predicted_s
            for k in range(profile.n_draws)
        ]
        low, high = low * min(1.0, float(np.quantile(drawn, 0.05))), high * max(1.0, float(np.quantile(drawn, 0.95)))
    return low * (1 - TOLERANCE), high * (1 + TOLERANCE)


def _changed(profile: LatencyProfile, here: Mapping[str, Any]) -> tuple[str, ...]:
    """What differs from where the profile was measured, in words."""
    then = profile.fingerprint
    sessions = then.get("sessions")
    # a profile of several sessions keeps theirs in a list; the first stands for them
    first = sessions[0] if isinstance(sessions, list) and sessions and isinstance(sessions[0], Mapping) else then
    found = []
    for key in ("driver", "engine_sources", "software", "host"):
        if key in first and first[key] != here.get(key):
            found += _words(key, first[key], here.get(key))
    return tuple(found)


def _words(key: str, then: Any, now: Any) -> list[str]:
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        return [f"{key} {name}: {then.get(name)} then, {now.get(name)} here"
                for name in sorted({*then, *now}) if then.get(name) != now.get(name)]  # fmt: skip
    return [f"{key}: {then} then, {now} here"]


def _as_problems(measured: Measurements) -> list[Any]:
    failures = [failure for session in measured.sessions for failure in session.failures]
    return [
        one_problem(f"check {failure.part}", failure.error, "a point that runs").problems[0] for failure in failures
    ]
