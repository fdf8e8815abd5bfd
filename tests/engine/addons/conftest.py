"""A store with two small LoRA files, and ``diffplan addons`` run on a catalogue beside it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from planner.cli import main
from tests.engine.registry.files import lora_bytes


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store with ``ink-1.safetensors`` and ``ink-2.safetensors``."""
    folder = tmp_path / "store"
    folder.mkdir()
    for number in (1, 2):
        (folder / f"ink-{number}.safetensors").write_bytes(lora_bytes(seed=number))
    return folder


@pytest.fixture
def catalogue(tmp_path: Path) -> Path:
    """Where the catalogue is to be; nothing is there yet."""
    return tmp_path / "catalogue.json"


@pytest.fixture
def addons(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], catalogue: Path
) -> Callable[..., Ended]:
    """``addons(command, *arguments)`` on the catalogue, with its exit code and what it said."""

    def run(command: str, *arguments: object) -> Ended:
        monkeypatch.setattr(
            sys, "argv", ["diffplan", "addons", command, *map(str, arguments), "--catalogue", str(catalogue)]
        )
        with pytest.raises(SystemExit) as stop:
            main()
        said = capsys.readouterr()
        code = stop.value.code
        return Ended(code if isinstance(code, int) else 0, said.out, said.err)

    return run


@pytest.fixture
def enter(addons: Callable[..., Ended], store: Path) -> Callable[..., Ended]:
    """Adds version 1 or 2 of ``ink``."""

    def run(number: int, *more: object) -> Ended:
        return addons(
            "add", f"ink-{number}.safetensors", "--name", "ink", "--version", number, "--store", store,
            "--architecture", "tiny", "--who", "ann", *more,
        )  # fmt: skip

    return run
