"""The pages on diagnosis, studies and theory show commands and options that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from planner.cli import root
from planner.explain import usd
from planner.scenario import load_scenario
from planner.simulate_run import chosen_allocation, simulate_once

DOCS = Path(__file__).resolve().parents[2] / "docs"


def commands(page: str) -> list[list[str]]:
    """Words of every indented or console line that runs diffplan, without its comment."""
    text = (DOCS / page).read_text(encoding="utf-8")
    lines = re.findall(r"^(?:    |\$ )(diffplan .*)$", text, flags=re.MULTILINE)
    return [shlex.split(line, comments=True)[1:] for line in lines]


@pytest.mark.parametrize("page", ["diagnose.md", "studies.md", "theory.md"])
def test_every_option_shown_exists(page: str) -> None:
    shown = commands(page)
    assert shown
    for words in shown:
        command: click.Command | None = root
        context = click.Context(root)
        rest = list(words)
        while rest and hasattr(command, "get_command"):
            command = command.get_command(context, rest.pop(0))  # type: ignore[union-attr]
            assert command is not None, words
        known = {name for item in command.params for name in item.opts}  # type: ignore[union-attr]
        assert {word for word in rest if word.startswith("--")} <= known, words


def test_options_named_in_the_text_of_the_diagnosis_exist() -> None:
    text = (DOCS / "diagnose.md").read_text(encoding="utf-8")
    command = root.get_command(click.Context(root), "diagnose")  # type: ignore[attr-defined]
    known = {name for item in command.params for name in item.opts}
    assert set(re.findall(r"`(--[a-z-]+)", text)) <= known


def test_the_first_figures_of_the_diagnosis_shown_are_those_of_the_simulator() -> None:
    scenario, folder = load_scenario("sample:small")
    done = simulate_once(scenario, folder, chosen_allocation(scenario, folder, None, "diffusers", 15, 0))
    metrics, cost_usd = done.run.metrics, done.cost.cost_usd_per_month
    line = (
        f"15 GPUs as diffusers for {usd(cost_usd)} a month: p95 {metrics.latency_p95_s:.2f} s, "
        f"{metrics.slo_attainment_ratio:.2%} within 25 s"
    )
    assert line in (DOCS / "diagnose.md").read_text(encoding="utf-8")
