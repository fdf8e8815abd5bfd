"""Fits the forms of latency laws: bounded least squares on relative errors, exact and without starting values.

Relative, because a law spans 8 ms and 8 s and must be as right about one as about the other. Bounded, because a negative
fixed cost or a negative cost per sample is noise that an extrapolation would turn into nonsense.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from calibrate.profile import Form, Law

Floats = npt.NDArray[np.float64]
X_RESOLUTION: Final = 1e-9


def form_for(x: Floats, *, has_floor: bool) -> Form:
    """The richest form that the measured sizes can tell apart.

    One size: a line through the origin (``affine``); two: a line; from three on, where execution can be bound by launches,
    a line with a floor under it.
    """
    if x.size == 0 or bool(np.all(x == 0)):
        return "constant"
    return "floor_affine" if has_floor and np.unique(x).size >= 3 else "affine"


def fit_form(form: Form, x: Floats, y: Floats) -> dict[str, float]:
    """Parameters that minimise ``sum((form(x) / y - 1)**2)`` with every parameter at least 0.

    Args:
        form: which form.
        x: product of the features, one per measured size; ignored for ``constant``.
        y: measured seconds, above 0.

    Raises:
        ValueError: there is nothing to fit, or a y is not above 0.
    """
    if y.size == 0 or not bool(np.all(y > 0)):
        raise ValueError(f"fitting {form} needs measured seconds above 0, got {y.tolist()}")
    if form == "constant":
        return {"value_s": float(np.sum(1 / y) / np.sum(1 / y**2))}
    if form == "affine":
        fixed_s, per_unit_s = _line(x, y)
        return {"fixed_s": fixed_s, "per_unit_s": per_unit_s}
    return _floor_and_line(x, y)


def _line(x: Floats, y: Floats) -> tuple[float, float]:
    if np.ptp(x) <= X_RESOLUTION * np.max(np.abs(x)):
        # one size says nothing about a fixed cost
        return 0.0, fit_form("constant", x, y)["value_s"] / float(np.mean(x))
    scale = float(np.max(x))  # bytes next to ones would be badly conditioned
    solution, _ = nnls(np.column_stack([1 / y, x / scale / y]), np.ones_like(y))
    return float(solution[0]), float(solution[1] / scale)


def _floor_and_line(x: Floats, y: Floats) -> dict[str, float]:
    """Tries every split of the sizes into those on the floor and those on the line; sizes are few, so this is exact."""
    order = np.argsort(x, kind="stable")
    x, y = x[order], y[order]
    best: tuple[float, dict[str, float]] | None = None
    for n_floor in range(y.size):
        floor_s = fit_form("constant", x[:n_floor], y[:n_floor])["value_s"] if n_floor else 0.0
        fixed_s, per_unit_s = _line(x[n_floor:], y[n_floor:])
        fitted = np.maximum(fixed_s + per_unit_s * x, floor_s)
        cost = float(np.sum((fitted / y - 1) ** 2))
        # a later split must be clearly better, or rounding would decide
        if best is None or cost < best[0] * (1 - 1e-9) - 1e-18:
            best = (cost, {"floor_s": floor_s, "fixed_s": fixed_s, "per_unit_s": per_unit_s})
    assert best is not None  # noqa: S101 - y is not empty
    return best[1]


def evaluate(form: Form, parameters: dict[str, float], x: float) -> float:
    """Seconds of a form at one size."""
    law = Law("", form, (), parameters, "measured", "-")
    return float(law.seconds(np.float64(x)))
