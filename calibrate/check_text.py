"""The report of ``calibrate check`` as a table for people."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from calibrate.check import CheckReport
from calibrate.profile import LatencyProfile
from calibrate.table import seconds_text

WORDS = {"holds": "holds", "slower": "DRIFTED: slower", "faster": "DRIFTED: faster", "outside": "outside the box"}


def print_report(profile: LatencyProfile, report: CheckReport) -> None:
    """One line a law and size, then what differs between the hosts, then the verdict."""
    console = Console()
    table = Table(box=None)
    for heading in ("law", "at", "measured here", "profile", "holds within", "ratio", "n", "verdict"):
        table.add_column(heading)
    for check in report.checks:
        at = " ".join(f"{name}={value:.3g}" for name, value in check.features.items())
        table.add_row(
            check.law, at, seconds_text(check.measured_s), seconds_text(check.predicted_s),
            f"{seconds_text(check.low_s)}–{seconds_text(check.high_s)}", f"{check.ratio:.3f}", str(check.n_repetitions),
            WORDS[check.verdict],
        )  # fmt: skip
    console.print(table)
    for line in report.changed:
        console.print(f"differs: {line}", markup=False)
    for line in report.failures:
        console.print(f"not measured: {line}", markup=False)
    drifted = sorted({check.law for check in report.checks if check.verdict in ("slower", "faster")})
    console.print(
        f"profile {profile.profile_id} does not hold here: {', '.join(drifted)}. Measure anew: calibrate run."
        if drifted
        else f"profile {profile.profile_id} holds on this host at every size that was checked.",
        markup=False,
    )
