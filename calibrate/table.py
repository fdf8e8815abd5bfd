"""A profile as a table: what each law says about one image at the measured size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from calibrate.profile import RESIDUAL_LEVELS, LatencyProfile, Law

MB = 1_000_000


def example_features(law: Law, profile: LatencyProfile) -> dict[str, float]:
    """The features a law is shown at: one image at about one megapixel, its usual bytes."""
    usual_bytes = {
        "lora": 186.0 * MB,
        "checkpoint": 6.9e9,
        "controlnet_load": 2.5e9,
        "controlnet_read": 2.5e9,
        "residual": 2 * profile.facts["residual_bytes_per_sample"].value
        if "residual_bytes_per_sample" in profile.facts
        else 107.5 * MB,
        "model_fetch": 6.9e9,
    }
    chosen = {}
    for feature in law.features:
        if feature == "forward_batch":
            value = 2.0
        elif feature == "n_bytes":
            value = next((size for key, size in usual_bytes.items() if key in law.name), 186.0 * MB)
        else:
            value = 1.0
        low, high = law.domain.get(feature, (value, value))
        chosen[feature] = min(max(value, low), high)
    return chosen


def law_rows(profile: LatencyProfile) -> list[dict[str, Any]]:
    """One dictionary per law: name, value and the features it was taken at, status, worst relative residual, source."""
    rows = []
    for name, law in sorted(profile.laws.items()):
        at = example_features(law, profile)
        value_s = float(profile.predictor(extrapolate=True).seconds(name, **at))
        spread = None
        if profile.n_draws:
            drawn = [float(profile.predictor(k, extrapolate=True).seconds(name, **at)) for k in range(profile.n_draws)]
            low, high = np.quantile(drawn, [0.05, 0.95])
            spread = [float(low), float(high)]
        ratios = dict(zip(RESIDUAL_LEVELS, law.residual_ratio_quantiles, strict=False))
        rows.append({
            "law": name,
            "at": at,
            "value_s": value_s,
            "interval_90_s": spread,
            "status": law.status,
            "residual_ratio_05_95": [ratios[0.05], ratios[0.95]] if ratios else None,
            "n_repetitions": law.n_repetitions,
            "source": law.source,
        })  # fmt: skip
    return rows


def seconds_text(value_s: float) -> str:
    """``1.45 s`` or ``28.6 ms``."""
    return f"{value_s:.3g} s" if value_s >= 1 else f"{value_s * 1e3:.3g} ms"


def print_profile(profile: LatencyProfile) -> None:
    """Prints laws, facts and notes."""
    console = Console(width=None if Console().is_terminal else 150)
    console.print(
        f"profile {profile.profile_id}: {profile.architecture} on {profile.gpu_kind}, measured {profile.created or '–'}, "
        f"{profile.n_draws} draws"
    )
    table = Table("law", "at", "value", "90 %", "status", "measured/fitted 5–95 %", "n", box=None)
    for row in law_rows(profile):
        at = " ".join(f"{name}={value:.4g}" for name, value in row["at"].items())
        interval, ratios = row["interval_90_s"], row["residual_ratio_05_95"]
        table.add_row(
            row["law"],
            at,
            seconds_text(row["value_s"]),
            f"{seconds_text(interval[0])}–{seconds_text(interval[1])}" if interval else "–",
            row["status"],
            f"{ratios[0]:.3f}–{ratios[1]:.3f}" if ratios else "–",
            str(row["n_repetitions"] or "–"),
        )
    console.print(table)
    for name, fact in sorted(profile.facts.items()):
        console.print(f"{name}: {fact.value:.6g} ({fact.status}: {fact.source})")
    for note in profile.notes:
        console.print(f"note: {note}")


def print_held_out(report: Mapping[str, Any]) -> None:
    """Prints how the laws do at sizes that were measured only to check them, and why each form was chosen."""
    console = Console(width=None if Console().is_terminal else 150)
    if report.get("summary"):
        table = Table("held-out sizes of", "n", "mean error", "bias", "worst", "inside 90 %", "binomial p", box=None)
        for group in report["summary"]:
            covered, p_value = group["coverage_ratio"], group["coverage_p_value"]
            table.add_row(
                str(group["name"]), str(group["n_points"]), f"{group['mape']:.2%}", f"{group['bias_ratio']:+.2%}",
                f"{group['worst_ratio']:+.1%}", "–" if covered is None else f"{covered:.0%}",
                "–" if p_value is None else f"{p_value:.2g}",
            )  # fmt: skip
        console.print(table)
    if report.get("forms"):
        table = Table("law", "form", "mean error at left-out sizes, of every form", box=None)
        for law, entry in report["forms"].items():
            errors = entry["left_out_error_ratio"]
            table.add_row(law, entry["form"], ", ".join(f"{form} {error:.1%}" for form, error in errors.items()))
        console.print(table)
