"""Fits the forms of latency laws: bounded least squares on relative errors, and the choice of a form by left-out points.

Relative, because a law spans 8 ms and 8 s and must be as right about one as about the other. Bounded, because a negative
fixed cost or a negative cost per sample is noise that an extrapolation would turn into nonsense.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares, nnls

from calibrate.profile import FORM_PARAMETERS, Form, Law, padding
from calibrate.surface import surface_ratio

Floats = npt.NDArray[np.float64]
X_RESOLUTION: Final = 1e-9
SIGNIFICANT_DIGITS: Final = 9
"""Parameters are rounded to these: far below any noise, and above what another order of summation would change."""
POINTS_BEYOND_PARAMETERS: Final = 2
"""A form competes only where that many more points than parameters are left after one is taken out."""
PADDED_SIZES_MIN: Final = 3
"""Padding competes only where that many sizes have some."""
STANDARD_ERRORS: Final = 1.0
"""A later candidate must be better at left-out sizes by more than this many standard errors of the paired differences."""


@dataclass(frozen=True, slots=True)
class FormChoice:
    """The form of a law, and why: mean absolute relative error of each candidate at points that it was not fitted to."""

    form: Form
    left_out_error_ratio: Mapping[Form, float]
    """Empty where there were too few points to leave one out."""
    left_out_s: tuple[float, ...] = ()
    """What the law says about each point when fitted to the others, with their surface; empty likewise."""


def form_for(x: Floats, *, has_floor: bool) -> Form:
    """The richest form that a few sizes can tell apart, where there are too few to leave one out.

    One size: a line through the origin (``affine``); two: a line; from three on, where execution can be bound by launches,
    a line with a floor under it.
    """
    if x.size == 0 or bool(np.all(x == 0)):
        return "constant"
    return "floor_affine" if has_floor and np.unique(x).size >= 3 else "affine"


def candidates(x: Floats, megapixels: Floats, *, has_floor: bool) -> tuple[Form, ...]:
    """Forms that these points can tell apart, the simplest first; empty: too few points, see :func:`form_for`."""
    n_sizes = _n_sizes(x, megapixels)
    found: list[Form] = ["affine"]
    if has_floor:
        found += ["floor_affine", "roofline"]
    if np.unique(megapixels).size >= 2:
        found += ["attention", *(("floor_attention", "roofline_attention") if has_floor else ())]
        if has_floor and all(np.count_nonzero(column) >= PADDED_SIZES_MIN for column in padding(x, megapixels)):
            found.append("tiles")
    kept = [form for form in found if n_sizes - 1 >= len(FORM_PARAMETERS[form]) + POINTS_BEYOND_PARAMETERS]
    return tuple(sorted(kept, key=lambda form: len(FORM_PARAMETERS[form])))


def _n_sizes(x: Floats, megapixels: Floats) -> int:
    return int(np.unique(np.stack([x, megapixels]), axis=1).shape[1]) if x.size else 0


def choose_form(x: Floats, megapixels: Floats, y: Floats, *, has_floor: bool, has_surface: bool = False) -> FormChoice:
    """The form with the smallest mean error at points left out one by one; a richer one must be clearly better.

    Args:
        x: product of the features, one per measured size.
        megapixels: of one image, one per measured size; ones where a law has no pixels.
        y: measured seconds, above 0.
        has_floor: whether execution can be bound by launches.
        has_surface: whether the law multiplies the form by :func:`calibrate.surface.surface_ratio`; the form is chosen without
            it, as it says nothing beyond the measured sizes.
    """
    compared = candidates(x, megapixels, has_floor=has_floor)
    if len(compared) < 2:
        form = form_for(x, has_floor=has_floor)
        can_tell = form != "constant" and _n_sizes(x, megapixels) > len(FORM_PARAMETERS[form])
        return FormChoice(form, {}, _left_out(form, x, megapixels, y, has_surface)[1] if can_tell else ())
    left_out = {form: _left_out(form, x, megapixels, y, has_surface) for form in compared}
    errors = {form: np.abs(np.array(left_out[form][0]) / y - 1) for form in compared}
    best = compared[0]
    for form in compared[1:]:
        gains = errors[best] - errors[form]
        if np.mean(gains) > STANDARD_ERRORS * np.std(gains, ddof=1) / np.sqrt(y.size):
            best = form
    return FormChoice(best, {form: float(np.mean(found)) for form, found in errors.items()}, left_out[best][1])


def _left_out(
    form: Form, x: Floats, megapixels: Floats, y: Floats, has_surface: bool
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What the form, and the form with the surface, say about each point when fitted to the others."""
    by_form, by_law = [], []
    sizes = np.stack([x / megapixels, megapixels], axis=-1)
    near = fit_form(form, x, y, megapixels)
    for index in range(y.size):
        others = np.arange(y.size) != index
        parameters = fit_form(form, x[others], y[others], megapixels[others], near=near)
        said = Law("", form, (), parameters, "measured", "-").seconds(x, megapixels=megapixels)
        ratio = 1.0
        if has_surface and bool(np.all(said > 0)):
            ratio = float(surface_ratio(sizes[others], y[others] / said[others], sizes[index]))
        by_form.append(float(said[index]))
        by_law.append(float(said[index]) * ratio)
    return tuple(by_form), tuple(by_law)


def fit_form(
    form: Form,
    x: Floats,
    y: Floats,
    megapixels: Floats | None = None,
    weights: Floats | None = None,
    near: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Parameters that minimise ``sum(weights * (form / y - 1)**2)`` with every parameter at least 0.

    Args:
        form: which form.
        x: product of the features, one per measured size; ignored for ``constant``.
        y: measured seconds, above 0.
        megapixels: of one image, one per measured size; ones if left out.
        weights: one per measured size, above 0; ones if left out.
        near: parameters of this form to start a search from, where one is needed.

    Raises:
        ValueError: there is nothing to fit, or a y is not above 0.
    """
    if y.size == 0 or not bool(np.all(y > 0)):
        raise ValueError(f"fitting {form} needs measured seconds above 0, got {y.tolist()}")
    # what a second of error counts at each size
    per_s = (np.ones_like(y) if weights is None else np.sqrt(weights)) / y
    if form == "constant":
        return _rounded({"value_s": _mean(y, per_s)})
    terms = _terms(form, x, np.ones_like(x) if megapixels is None else megapixels)
    if form.startswith("floor"):
        return _rounded(_hard_floor(terms, y, per_s))
    if form.startswith("roofline") or form == "tiles":
        return _rounded(_soft_floor(terms, y, per_s, near))
    return _rounded(_linear(terms, y, per_s))


def _rounded(parameters: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.{SIGNIFICANT_DIGITS}g}") for name, value in parameters.items()}


def _mean(y: Floats, per_s: Floats) -> float:
    return float(np.sum(per_s**2 * y) / np.sum(per_s**2))


def _terms(form: Form, x: Floats, megapixels: Floats) -> dict[str, Floats]:
    """What each parameter but the floor is multiplied by."""
    terms = {"fixed_s": np.ones_like(x), "per_unit_s": x}
    if "attention_s" in FORM_PARAMETERS[form]:
        terms["attention_s"] = x * megapixels
    if "row_padding_s" in FORM_PARAMETERS[form]:
        terms["row_padding_s"], terms["sequence_padding_s"] = padding(x, megapixels)
    return terms


def _linear(terms: Mapping[str, Floats], y: Floats, per_s: Floats) -> dict[str, float]:
    x = terms["per_unit_s"]
    if np.ptp(x) <= X_RESOLUTION * np.max(np.abs(x)):
        # one size says nothing about a fixed cost
        return {**dict.fromkeys(terms, 0.0), "per_unit_s": _mean(y, per_s) / float(np.mean(x))}
    # bytes next to ones would be badly conditioned
    scales = {name: float(np.max(column)) or 1.0 for name, column in terms.items()}
    solution, _ = nnls(np.column_stack([terms[name] / scales[name] * per_s for name in terms]), y * per_s)
    return {name: float(value / scales[name]) for name, value in zip(terms, solution, strict=True)}


def _line(terms: Mapping[str, Floats], parameters: Mapping[str, float]) -> Floats:
    total = np.zeros_like(terms["fixed_s"])
    for name, column in terms.items():
        total = total + parameters[name] * column
    return total


def _hard_floor(terms: Mapping[str, Floats], y: Floats, per_s: Floats) -> dict[str, float]:
    """Tries every split, by work, into sizes on the floor and sizes on the line; sizes are few, so this is exact."""
    order = np.lexsort((terms.get("attention_s", terms["per_unit_s"]), terms["per_unit_s"]))
    terms, y, per_s = {name: column[order] for name, column in terms.items()}, y[order], per_s[order]
    best: tuple[float, dict[str, float]] | None = None
    for n_floor in range(y.size):
        floor_s = _mean(y[:n_floor], per_s[:n_floor]) if n_floor else 0.0
        line = _linear({name: column[n_floor:] for name, column in terms.items()}, y[n_floor:], per_s[n_floor:])
        cost = float(np.sum(((np.maximum(_line(terms, line), floor_s) - y) * per_s) ** 2))
        # a later split must be clearly better, or rounding would decide
        if best is None or cost < best[0] * (1 - 1e-9) - 1e-18:
            best = (cost, {"floor_s": floor_s, **line})
    assert best is not None  # noqa: S101 - y is not empty
    return best[1]


def _soft_floor(
    terms: Mapping[str, Floats], y: Floats, per_s: Floats, near: Mapping[str, float] | None
) -> dict[str, float]:
    """``sqrt(floor² + line²)`` by bounded trust-region least squares, from ``near`` or the better of two starts."""
    names = ["floor_s", *terms]
    scales = np.array(
        [float(np.min(y)), *(float(np.mean(y) / (np.mean(column) or 1.0)) for column in terms.values())]
    )  # a column of zeros: no size has that term
    columns = np.column_stack(list(terms.values())) * scales[1:]

    def residuals(scaled: Floats) -> Floats:
        return np.asarray((np.hypot(scaled[0] * scales[0], columns @ scaled[1:]) - y) * per_s)

    def jacobian(scaled: Floats) -> Floats:
        floor_s, line = scaled[0] * scales[0], columns @ scaled[1:]
        total = np.maximum(np.hypot(floor_s, line), 1e-300)
        return np.column_stack([floor_s * scales[0] / total, columns * (line / total)[:, None]]) * per_s[:, None]

    plain = _linear(terms, y, per_s)
    starts = [near] if near is not None else [{"floor_s": share * scales[0], **plain} for share in (0.3, 0.9)]
    best: tuple[float, Floats] | None = None
    for given in starts:
        start = np.array([given[name] for name in names]) / scales
        found = least_squares(
            residuals, np.maximum(start, 1e-3), jac=jacobian, bounds=(0.0, np.inf), xtol=1e-11, ftol=1e-11, gtol=1e-11
        )
        if best is None or found.cost < best[0] * (1 - 1e-6):
            best = (float(found.cost), np.asarray(found.x))
    assert best is not None  # noqa: S101 - there is a start
    # what the search left beside its bound counts as on it
    values = np.where(best[1] < 1e-7, 0.0, best[1]) * scales
    return dict(zip(names, (float(value) for value in values), strict=True))


def evaluate(form: Form, parameters: Mapping[str, float], x: float, megapixels: float = 1.0) -> float:
    """Seconds of a form at one size."""
    law = Law("", form, (), parameters, "measured", "-")
    return float(law.seconds(np.float64(x), megapixels=megapixels))
