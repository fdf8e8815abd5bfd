"""The catalogue file may change while a server runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from engine.allocation import to_json
from engine.catalogue import CatalogueEntry
from engine.frontdoor.builtin import builtin_catalogue
from engine.frontdoor.catalogue_file import CatalogueFile
from traces.problems import InputError


def test_a_change_is_seen_a_broken_one_is_not_taken_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "catalogue.json"
    path.write_text(to_json(builtin_catalogue()))
    file = CatalogueFile(path)
    first = file.now()
    assert file.now() is first
    path.write_text("{")
    assert [file.now(), file.now()] == [first, first]
    assert len(caplog.records) == 1
    with pytest.raises(InputError, match="is not JSON"):
        file.reread()
    entry = CatalogueEntry("chalk", "lora", file="seed:7")
    path.write_text(to_json(replace(first, entries={**first.entries, entry.id: entry})))
    assert "chalk" in file.now().entries
    path.unlink()
    assert "chalk" in file.now().entries


def test_a_missing_or_broken_file_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        CatalogueFile(tmp_path / "none.json")
