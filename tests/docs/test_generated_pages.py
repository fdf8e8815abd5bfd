"""Documentation that would silently go stale is checked against the code."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"


def maker(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["records", "decisions", "engine_evidence"])
def test_a_page_that_is_made_from_something_is_as_it_would_be_made_now(name: str) -> None:
    made = maker(f"make_{name}_page").page()
    assert (DOCS / f"{name}.md").read_text(encoding="utf-8") == made, f"run: python docs/make_{name}_page.py"


def test_the_decisions_of_gentd26_and_of_both_synthetic_services_are_shown_and_say_that_they_are_simulated() -> None:
    rows = {
        row["ids"]["scenario_name"]: row.get("decision")
        for row in json.loads(maker("make_decisions_page").ROWS.read_text("utf-8"))
    }
    for name in ("gentd26", "small", "provider", "provider_fast"):
        assert "not a measurement in production" in rows[name]["en"]
        assert "実測ではありません" in rows[name]["ja"]
