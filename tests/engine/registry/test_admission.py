"""From a file to a catalogue entry, and whether the store still holds what was admitted."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from engine.models import ModelSpec, build_controlnet
from engine.registry.admission import Label, admit, verify
from engine.registry.changes import add, promote, update_catalogue
from engine.registry.resolve import resolve
from engine.registry.safetensors_header import AddOnRefusedError
from engine.registry.store import FolderStore, StoreError
from tests.engine.registry.files import lora_bytes
from traces.problems import InputError


def test_an_admitted_file_can_be_asked_for_by_name_once_it_is_in_production(tmp_path: Path) -> None:
    (tmp_path / "style.safetensors").write_bytes(lora_bytes())
    label = Label("style", "1", owner="ann", licence="CC0-1.0", source="https://example.org/style", tenants=("red",))
    entry = admit(FolderStore(tmp_path), "style.safetensors", "lora", "tiny", label)
    assert (entry.id, entry.bytes) == (hashlib.sha256(lora_bytes()).hexdigest(), len(lora_bytes()))
    assert (entry.rank, entry.owner, entry.stage) == (4, "ann", "trial")
    assert "attn1.to_q" in entry.targets
    path = tmp_path / "catalogue.json"
    listed = update_catalogue(path, add(entry), who="ann", what="add")
    with pytest.raises(InputError, match="has no version in production"):
        resolve(listed, "style", "red", "lora")
    listed = update_catalogue(path, promote("style", "1"), who="ann", what="promote")
    assert resolve(listed, "style", "red", "lora").id == entry.id


def test_a_controlnets_folder_is_admitted_too(tmp_path: Path) -> None:
    build_controlnet(ModelSpec.tiny()).save_pretrained(tmp_path / "nets" / "canny")
    store = FolderStore(tmp_path)
    entry = admit(store, "nets/canny", "controlnet", "tiny", Label("canny", "1"))
    assert entry.file == "nets/canny"
    assert len(entry.id) == 64
    assert verify(store, entry) is None


def test_what_does_not_fit_is_not_admitted(tmp_path: Path) -> None:
    (tmp_path / "style.safetensors").write_bytes(lora_bytes())
    store = FolderStore(tmp_path)
    with pytest.raises(AddOnRefusedError, match=r"has shapes|does not exist"):
        admit(store, "style.safetensors", "lora", "sdxl", Label("style", "1"))
    with pytest.raises(InputError, match="needs one of sdxl, tiny"):
        admit(store, "style.safetensors", "lora", "flux", Label("style", "1"))
    with pytest.raises(StoreError, match="cannot be opened"):
        admit(store, "style.safetensors", "base", "tiny", Label("style", "1"))


def test_a_file_that_was_replaced_or_is_gone_is_found(tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    path.write_bytes(lora_bytes())
    store = FolderStore(tmp_path)
    entry = admit(store, path.name, "lora", "tiny", Label("style", "1"))
    assert verify(store, entry) is None
    path.write_bytes(lora_bytes(seed=1))
    assert "has the sha256" in str(verify(store, entry))
    path.write_bytes(lora_bytes()[:-1])
    assert "as the catalogue says" in str(verify(store, entry))
    path.unlink()
    with pytest.raises(StoreError, match="cannot be opened"):
        verify(store, entry)
