"""Documentation that would silently go stale is checked against the code."""

from __future__ import annotations

import importlib.util
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_page_of_recorded_tables_matches_their_declarations() -> None:
    spec = importlib.util.spec_from_file_location("make_records_page", DOCS / "make_records_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (DOCS / "records.md").read_text(encoding="utf-8") == module.page(), "run: python docs/make_records_page.py"
