"""The difference of two profiles as tables for people, and as plain data for programs."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from calibrate.diff import ProfileDifference
from calibrate.profile import LatencyProfile
from calibrate.table import seconds_text


def plain_difference(difference: ProfileDifference) -> dict[str, Any]:
    """JSON-ready; ratios that are not finite are null."""

    def number(value: float) -> float | None:
        return value if abs(value) != float("inf") else None

    return {
        "laws": [
            {
                "law": law.law, "at": dict(law.at), "before_s": law.before_s, "after_s": law.after_s,
                "ratio": number(law.ratio), "ratio_interval_90": [number(law.ratio_low), number(law.ratio_high)],
                "verdict": law.verdict, "remarks": list(law.remarks),
            }
            for law in difference.laws
        ],
        "only_before": list(difference.only_before),
        "only_after": list(difference.only_after),
        "images": [
            {
                "topology": image.topology, "n_controlnets": image.n_controlnets,
                "before_s": image.before_s, "after_s": image.after_s,
            }
            for image in difference.images
        ],
        "fingerprint": {subject: [list(row) for row in rows] for subject, rows in difference.fingerprint.items()},
        "facts": [list(row) for row in difference.facts],
        "sentences": list(difference.sentences),
    }  # fmt: skip


def print_difference(before: LatencyProfile, after: LatencyProfile, difference: ProfileDifference) -> None:
    """Prints laws, images, fingerprints and what they explain."""
    console = Console(width=None if Console().is_terminal else 150)
    for word, profile in (("before", before), ("after", after)):
        console.print(f"{word}: {profile.profile_id}, {profile.gpu_kind}, measured {profile.created or '–'}")
    table = Table("law", "at", "before", "after", "ratio", "90 %", "", "remarks", box=None)
    for law in difference.laws:
        at = " ".join(f"{name}={value:.4g}" for name, value in law.at.items())
        table.add_row(
            law.law, at, seconds_text(law.before_s), seconds_text(law.after_s), f"{law.ratio:.3f}",
            f"{law.ratio_low:.3f}–{law.ratio_high:.3f}", "" if law.verdict == "same" else law.verdict,
            "; ".join(law.remarks),
        )  # fmt: skip
    console.print(table)
    for word, names in (("before", difference.only_before), ("after", difference.only_after)):
        if names:
            console.print(f"only {word}: {', '.join(names)}")
    for image in difference.images:
        nets = f"{image.n_controlnets} ControlNet{'' if image.n_controlnets == 1 else 's'}"
        change = image.after_s / image.before_s - 1
        console.print(
            f"50 steps, {image.topology}, {nets}: {image.before_s:.2f} s, then {image.after_s:.2f} s ({change:+.1%})"
        )
    for name, was, now in difference.facts:
        console.print(f"{name}: {was:.6g}, then {now:.6g}")
    for subject, rows in difference.fingerprint.items():
        for field, one, other in rows:
            console.print(f"{subject} {field}: {one or '–'}, then {other or '–'}", highlight=False)
    for sentence in difference.sentences:
        console.print(sentence)
