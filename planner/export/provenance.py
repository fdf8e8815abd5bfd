"""Where an exported file comes from: plan, profile, prices, command and warnings, in the form that each kind of file can carry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from planner.export.names import label_value, one_line

PREFIX: Final = "diffplan/"
"""Of our annotations and labels; a valid DNS subdomain of one label that nobody can own."""
ANNOTATION_CHARACTERS_MAX: Final = 2_000


@dataclass(frozen=True, slots=True)
class Provenance:
    """What every exported file says about itself."""

    plan_id: str
    """SHA-256 of the plan's canonical JSON, without its roadmap."""
    scenario_name: str
    profile_name: str
    profile_id: str
    price_table_id: str
    price_as_of: str
    """ISO date; empty if the scenario itself gave the price."""
    price_usd_per_gpu_hour: float
    purchase: str
    command: str
    """Makes the file again; ``plan.json`` and ``DIR`` stand for the paths, so that the files do not depend on them."""
    diffplan_version: str
    warnings: tuple[str, ...] = ()
    """Why this export needed ``--force``."""

    @property
    def price_date(self) -> str:
        """The price's date, or that the scenario gave the price without one."""
        return self.price_as_of or "given by the scenario"

    def lines(self) -> list[str]:
        """Plain lines without line breaks in them, warnings first."""
        return [
            *(f"WARNING: {one_line(text)}" for text in self.warnings),
            f"Made by: {one_line(self.command)}",
            f"Plan: {self.plan_id} (scenario {one_line(self.scenario_name)}, diffplan {one_line(self.diffplan_version)})",
            f"Profile: {one_line(self.profile_name)}, id {one_line(self.profile_id)}",
            f"Prices: {one_line(self.price_table_id)}, {self.price_date}, "
            f"{self.price_usd_per_gpu_hour:g} USD per GPU-hour ({one_line(self.purchase)})",
        ]

    def comment(self) -> str:
        """The lines as ``#`` comments, for YAML and HCL."""
        return "".join(f"# {line}\n" for line in self.lines())

    def to_plain(self) -> dict[str, Any]:
        """For JSON files."""
        return {
            "plan_id": self.plan_id,
            "scenario_name": self.scenario_name,
            "profile_name": self.profile_name,
            "profile_id": self.profile_id,
            "price_table_id": self.price_table_id,
            "price_date": self.price_date,
            "price_usd_per_gpu_hour": self.price_usd_per_gpu_hour,
            "purchase": self.purchase,
            "command": self.command,
            "diffplan_version": self.diffplan_version,
            "warnings": list(self.warnings),
        }

    def annotations(self) -> dict[str, str]:
        """For Kubernetes objects: values are any text, cut where a hostile one would fill the object."""
        plain = self.to_plain()
        plain["warnings"] = " ".join(self.warnings) or "none"
        return {
            f"{PREFIX}{key.replace('_', '-')}": one_line(str(value))[:ANNOTATION_CHARACTERS_MAX]
            for key, value in plain.items()
        }

    def labels(self) -> dict[str, str]:
        """For Kubernetes objects and alerts: short, and safe to select by."""
        return {f"{PREFIX}plan": self.plan_id[:16], f"{PREFIX}scenario": label_value(self.scenario_name)}
