"""The page on mechanisms names every switch, and only those that exist."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from engine.allocation import Policies
from engine.policies.autoscale_settings import Autoscale
from planner.simulator.mechanisms import SWITCHES
from planner.simulator.world import World

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "simulator.md").read_text(encoding="utf-8")


def names(cls: type) -> set[str]:
    return {item.name for item in dataclasses.fields(cls)}


def test_every_mechanism_has_a_row_and_every_row_a_mechanism() -> None:
    table = PAGE[: PAGE.index("## Autoscaling")]
    assert re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE) == list(SWITCHES)


def test_every_autoscaler_setting_is_explained() -> None:
    table = PAGE[PAGE.index("## Autoscaling") :]
    assert {name for name in names(Autoscale) if f"`{name}`" not in table} == set()


def test_every_switch_that_is_named_exists() -> None:
    named = set(re.findall(r"`policies\.(\w+)", PAGE))
    assert named
    assert named <= names(Policies)
    assert set(re.findall(r"`world\.(\w+)", PAGE)) == names(World) - {"seed"}


def test_defaults_on_the_page_are_those_of_the_code() -> None:
    settings = Autoscale(1)
    for name, shown in (
        ("max_replicas", "–, 1"), ("start_s", "60, 0, 0"), ("tolerance_ratio", "0.1, 0, 300"), ("up_replicas", "4, 1, 15"),
        ("down_replicas", "0, 1, 15"), ("polling_s", "30, 300, 0"), ("look_back_s", "30, 30, 600, as the other, 1, 1"),
        ("target_utilisation_ratio", "0.7, 60, 0.1, 2, 1000, 2, 0, 30"),
    ):  # fmt: skip
        row = next(line for line in PAGE[PAGE.index("## Autoscaling") :].splitlines() if line.startswith(f"| `{name}`"))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[1] == shown
        fields = re.findall(r"`(\w+)`", cells[0])
        values = [getattr(settings, field) for field in fields]
        for value, text in zip(values, shown.split(", "), strict=True):
            assert text in ("–", "as the other") or float(text) == value, (fields, text, value)
