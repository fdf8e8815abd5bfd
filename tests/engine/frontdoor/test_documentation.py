"""docs/engine.md says what the code does: its fields, codes, metrics, commands, options and examples."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import typer
from prometheus_client.parser import text_string_to_metric_families

from engine.allocation import read_allocation
from engine.catalogue import read_catalogue
from engine.cli import app
from engine.frontdoor.admin import unknown_models
from engine.frontdoor.image_call import FIELDS
from engine.frontdoor.metrics import FrontMetrics
from engine.frontdoor.outcome_answer import STATUS_OF_CODE
from engine.frontdoor.split import split_from_plain
from engine.serving.job import OutcomeCode
from tests.engine.frontdoor.conftest import OpenDoor, run

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = ROOT / "examples" / "engine"
PAGE = (ROOT / "docs" / "engine.md").read_text(encoding="utf-8")
SOURCE = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "engine" / "frontdoor").glob("*.py")))


def named(pattern: str) -> set[str]:
    """What stands in backticks in the first cell of table rows, by pattern."""
    cells = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `")]
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell) if re.fullmatch(pattern, name)}


def test_every_field_of_a_request_is_on_the_page() -> None:
    assert named(r"[a-z_]+") - named(r"diffplan_\w+") == FIELDS


def test_every_metric_is_on_the_page_and_no_other(open_door: OpenDoor) -> None:
    async def test() -> None:
        async with open_door() as door:
            await door.ask()
            text = door.service.metrics.exposition(0, 0).decode()
        families = list(text_string_to_metric_families(text))
        found = {f.name + ("_total" if f.type == "counter" else "") for f in families if f.name.startswith("diffplan_")}
        created = {name for name in found if name.endswith("_created")}  # what the client library adds to every counter
        assert named(r"diffplan_\w+") == found - created

    run(test())


def test_every_code_is_on_the_page() -> None:
    shown = set(
        re.findall(r"`(\w+)`", PAGE[PAGE.index("| status | `code`") : PAGE.index("A request whose worker dies")])
    )
    raised = set(re.findall(r'RequestRefusedError\(\s*(?:refusal\.)?\d+, "(\w+)"', SOURCE))
    assert len(raised) > 15
    assert raised | set(STATUS_OF_CODE) <= shown


def test_every_outcome_of_the_engine_has_a_status() -> None:
    from typing import get_args

    assert set(STATUS_OF_CODE) == set(get_args(OutcomeCode)) - {""}


def test_every_command_has_help_and_is_on_the_page_or_in_the_readme() -> None:
    text = PAGE + (ROOT / "README.md").read_text(encoding="utf-8")
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert {
        "serve",
        "apply",
        "status",
        "split",
        "drain",
        "reload",
        "records",
        "token",
        "replay",
        "drift",
        "bench",
    } <= set(commands)
    for name, command in commands.items():
        assert command.help, name
        assert f"diffplan engine {name}" in text, name


def test_every_option_of_serve_that_the_page_names_exists() -> None:
    command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    known = {option for parameter in command.params for option in parameter.opts}
    table = PAGE[PAGE.index("| option |") : PAGE.index("SIGTERM (or Ctrl-C)")]
    shown = set(re.findall(r"`(--[a-z-]+)", table))
    assert shown <= known
    assert known - shown <= {"--help", "--admin", "--loaders", "--open"}


@pytest.mark.parametrize("name", ["allocation.json", "two_bases.json"])
def test_the_example_allocations_fit_the_example_catalogue(name: str) -> None:
    catalogue = read_catalogue(EXAMPLES / "catalogue.json")
    assert unknown_models(read_allocation(EXAMPLES / name), catalogue) == []


def test_the_example_split_and_the_one_on_the_page_are_splits() -> None:
    split = split_from_plain(json.loads((EXAMPLES / "split.json").read_text(encoding="utf-8")), {"main": None})
    shown = re.search(r'\{"salt".*?\]\}', PAGE, flags=re.DOTALL)
    assert shown is not None
    assert split_from_plain(json.loads(shown[0]), {"main": None}) == split


def test_metrics_can_be_scraped_before_an_engine_runs() -> None:
    assert FrontMetrics(dict, dict).exposition(0, 0)
