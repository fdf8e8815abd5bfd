"""How wrong a profile is at sizes that were measured only to check it: errors, bias and coverage, law by law.

Rows marked as held out take no part in fitting or in choosing forms. A held-out point is the median of its repetitions. Its 90 %
interval is the law's prediction times ``1 ± t · e``, with e the root mean square error at sizes that were left out of the fit one
by one and t Student's quantile for as many sizes; so it is stated before any held-out point is looked at.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from scipy.stats import binomtest, t

from calibrate.cells import Cells
from calibrate.measurement import Measurements
from calibrate.profile import LAW_FEATURES, LatencyProfile, Law
from calibrate.recipes import ModeChoice, Source, direct_recipes
from traces.problems import one_problem

LEVEL: Final = 0.9
COMPOSED: Final = "engine.step_with_controlnets"
"""Steps that are composed of two laws."""
REJECTED_BELOW: Final = 0.01
"""An exact two-sided binomial test of the coverage rejects the intervals below this p-value."""
TARGETS: Final = {"steps": 0.02, "other": 0.05}
BIAS_TARGET: Final = 0.005
SCHEMA_VERSION: Final = 1
FILE_BYTES_MAX: Final = 16 * 2**20


@dataclass(frozen=True, slots=True)
class HeldOutPoint:
    """One size that no law was fitted to."""

    law: str
    features: tuple[float, ...]
    n_repetitions: int
    measured_s: float
    predicted_s: float
    low_s: float
    high_s: float
    is_inside_box: bool

    @property
    def error_ratio(self) -> float:
        """predicted / measured - 1."""
        return self.predicted_s / self.measured_s - 1

    @property
    def is_covered(self) -> bool:
        """Whether the measurement lies in the law's interval."""
        return self.low_s <= self.measured_s <= self.high_s


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Errors of a group of held-out points."""

    name: str
    n_points: int
    mape: float
    """Mean absolute relative error."""
    bias_ratio: float
    """Mean relative error; above 0: predicted too slow."""
    worst_ratio: float
    coverage_ratio: float | None
    """Share of points inside their 90 % interval; None where the law has no interval."""
    coverage_p_value: float | None
    """Exact two-sided binomial test against 0.9; points of one law are not fully independent, so it is only a guide."""


def held_out_points(
    profile: LatencyProfile, measurements: Measurements, choice: ModeChoice
) -> tuple[HeldOutPoint, ...]:
    """Every held-out size of every measured law, inside the box and just outside it."""
    cells = Cells.of(measurements, held_out=True)
    medians = cells.medians()
    found = []
    for law_name, recipe in direct_recipes(cells, medians, choice).items():
        law = profile.laws.get(law_name)
        if law is None or law.status != "measured" or not law.features or not recipe.keeps_fixed:
            continue
        for source in recipe.sources:
            if source.vector in law.points:
                continue  # also served, where it is not held out
            found.append(_point(profile, law, cells, source, source.combine(medians)))
    found += _composed_steps(profile, measurements)
    return tuple(sorted(found, key=lambda point: (point.law, point.features)))


def _composed_steps(profile: LatencyProfile, measurements: Measurements) -> list[HeldOutPoint]:
    """Steps with ControlNets in the same process against the sum of their laws; no law is fitted to these rows at all."""
    predictor = profile.predictor(extrapolate=True)
    if not (predictor.has("engine.unet_step") and predictor.has("engine.controlnet_step")):
        return []
    found = []
    by_size: dict[tuple[float, ...], list[float]] = {}
    for held_out in (False, True):
        cells = Cells.of(measurements, held_out=held_out)
        for cell in cells.matching(COMPOSED, lambda f: not (f.link or f.n_loras or f.variant)):
            f = cell[2]
            at = (float(f.forward_batch), f.megapixels, float(f.n_controlnets))
            by_size.setdefault(at, []).extend(cells.pooled(cell).tolist())
    boxes = [profile.laws[law].domain for law in ("engine.unet_step", "engine.controlnet_step")]
    for size, values in sorted(by_size.items()):
        step = {"forward_batch": size[0], "megapixels": size[1]}
        predicted_s = float(predictor.seconds("engine.unet_step", **step))
        predicted_s += size[2] * float(predictor.seconds("engine.controlnet_step", **step))
        is_inside = all(_is_inside(step, box) for box in boxes)
        measured_s = float(np.median(values))
        found.append(HeldOutPoint(COMPOSED, size, len(values), measured_s, predicted_s, math.nan, math.nan, is_inside))
    return found


def _is_inside(features: Mapping[str, float], box: Mapping[str, tuple[float, float]]) -> bool:
    return all(low * (1 - 1e-9) <= features[name] <= high * (1 + 1e-9) for name, (low, high) in box.items())


def _point(profile: LatencyProfile, law: Law, cells: Cells, source: Source, measured_s: float) -> HeldOutPoint:
    features = dict(zip(law.features, source.vector, strict=True))
    predicted_s = float(profile.predictor(extrapolate=True).seconds(law.name, **features))
    half = _half_width_ratio(law)
    return HeldOutPoint(
        law=law.name,
        features=source.vector,
        n_repetitions=min(cells.pooled(cell).size for cell in source.cells),
        measured_s=measured_s,
        predicted_s=predicted_s,
        low_s=predicted_s * (1 - half) if half else math.nan,
        high_s=predicted_s * (1 + half) if half else math.nan,
        is_inside_box=_is_inside(features, law.domain),
    )


def _half_width_ratio(law: Law) -> float:
    n_sizes = len(set(law.points))
    return float(t.ppf((1 + LEVEL) / 2, n_sizes)) * law.left_out_error_ratio if n_sizes else 0.0


def accuracy(name: str, points: Iterable[HeldOutPoint]) -> Accuracy | None:
    """Errors of these points; None where there are none."""
    chosen = list(points)
    if not chosen:
        return None
    errors = np.array([point.error_ratio for point in chosen])
    with_interval = [point for point in chosen if not math.isnan(point.low_s)]
    n_covered = sum(point.is_covered for point in with_interval)
    coverage = n_covered / len(with_interval) if with_interval else None
    p_value = float(binomtest(n_covered, len(with_interval), LEVEL).pvalue) if with_interval else None
    worst = float(errors[np.argmax(np.abs(errors))])
    return Accuracy(
        name, len(chosen), float(np.mean(np.abs(errors))), float(np.mean(errors)), worst, coverage, p_value
    )  # fmt: skip


def is_step(law: str) -> bool:
    """Whether a law is one of denoising steps, which have the stricter target."""
    return law == COMPOSED or "forward_batch" in LAW_FEATURES.get(law, ())


def summaries(points: tuple[HeldOutPoint, ...]) -> list[Accuracy]:
    """All points inside the box, steps, the others, and every law."""
    inside = [point for point in points if point.is_inside_box]
    groups = [
        accuracy("all laws", inside),
        accuracy("steps", (p for p in inside if is_step(p.law))),
        accuracy("our engine's steps", (p for p in inside if is_step(p.law) and p.law.startswith("engine."))),
        accuracy("loads, transfers and the rest", (p for p in inside if not is_step(p.law))),
        *(accuracy(law, (p for p in inside if p.law == law)) for law in sorted({p.law for p in inside})),
    ]
    return [group for group in groups if group is not None]


def held_out_json(
    profile: LatencyProfile, raw_sha256: str, points: tuple[HeldOutPoint, ...], forms: dict[str, Any]
) -> str:
    """The report as canonical JSON: summary, why each form was chosen, every point."""
    plain = {
        "schema_version": SCHEMA_VERSION,
        "raw_sha256": raw_sha256,
        "gpu_kind": profile.gpu_kind,
        "targets": {"steps_mape": TARGETS["steps"], "other_mape": TARGETS["other"], "steps_bias": BIAS_TARGET},
        "forms": forms,
        "summary": [_rounded(_plain(group)) for group in summaries(points)],
        "points": [_rounded(_plain(point) | {"error_ratio": point.error_ratio}) for point in points],
    }
    return json.dumps(plain, indent=1, ensure_ascii=False) + "\n"


def read_report(path: Path, raw_sha256: str) -> dict[str, Any]:
    """``summary`` and ``forms`` of the report beside a profile; empty where there is none, or it is of other data.

    Raises:
        InputError: the file is not a report.
    """
    if not path.is_file() or not raw_sha256:
        return {}
    if path.stat().st_size > FILE_BYTES_MAX:
        raise one_problem(str(path), f"is {path.stat().st_size} bytes", f"at most {FILE_BYTES_MAX}")
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        if plain["raw_sha256"] != raw_sha256:
            return {}
        summary = [{name: group[name] for name in Accuracy.__slots__} for group in plain["summary"]]
        forms = {
            str(law): {"form": str(entry["form"]), "left_out_error_ratio": {
                str(form): float(error) for form, error in entry["left_out_error_ratio"].items()
            }}
            for law, entry in plain["forms"].items()
        }  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise one_problem(
            str(path),
            f"is not a held-out report: {error!r:.80}",
            "a file of 'calibrate fit'",
            "Fit again, or remove it.",
        ) from None
    return {"summary": summary, "forms": forms}


def _plain(record: Accuracy | HeldOutPoint) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__slots__}


def _rounded(plain: dict[str, Any]) -> dict[str, Any]:
    return {key: _six(value) for key, value in plain.items()}


def _six(value: Any) -> Any:
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.6g}")
    return [_six(item) for item in value] if isinstance(value, tuple) else value


def notes_on(points: tuple[HeldOutPoint, ...]) -> list[str]:
    """Sentences for the profile: how it does at held-out sizes, and at those outside its box."""
    found = []
    for group in summaries(points):
        if group.name not in ("steps", "our engine's steps", "loads, transfers and the rest"):
            continue
        said = (
            f"Held-out sizes, {group.name}: {group.n_points}, mean error {group.mape:.1%}, bias {group.bias_ratio:+.1%}"
        )
        if group.coverage_ratio is not None and group.coverage_p_value is not None:
            verdict = "rejected" if group.coverage_p_value < REJECTED_BELOW else "not rejected"
            said += (
                f", {group.coverage_ratio:.0%} inside their 90 % intervals (exact binomial test p = "
                f"{group.coverage_p_value:.2g}, {verdict} at 1 %)"
            )
        found.append(said + ".")
    outside = [point for point in points if not point.is_inside_box]
    beyond = accuracy("outside", outside)
    if beyond is not None:
        found.append(f"Held-out sizes outside the box: {beyond.n_points}, mean error {beyond.mape:.1%}.")
    return found
