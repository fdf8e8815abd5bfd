"""The loader: from a store into the host tier, whole or not at all, whatever happens to it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from engine.catalogue import Catalogue, CatalogueEntry, catalogue_to_plain
from engine.registry import flat_lora
from engine.registry.flat_lora import map_flat_lora
from engine.registry.quarantine import Quarantine
from engine.registry.random_lora import write_random_lora
from engine.registry.store import FolderStore
from engine.workers.loader import Loader, make_fetcher, remove_stale_parts
from engine.workers.setup import RefusedError, WorkerSetup
from tests.engine.registry.files import file_of, lora_bytes, tensors_of, tiny
from tests.engine.registry.lying_server import head, honest, serving
from traces.problems import InputError


def put(folder: Path, data: bytes, name: str = "style.safetensors") -> tuple[str, dict[str, Any]]:
    """A file in a store, and its entry as a worker gets it."""
    (folder / name).write_bytes(data)
    lora_id = hashlib.sha256(data).hexdigest()
    return lora_id, {"id": lora_id, "kind": "lora", "architecture": "tiny", "file": name, "bytes": len(data)}


def loader_of(tmp_path: Path, store: str = "", **options: Any) -> Loader:
    (tmp_path / "store").mkdir(exist_ok=True)
    options = {"loader_quarantine": str(tmp_path / "quarantine"), **options}
    setup = WorkerSetup(
        "loader-0",
        "loader",
        "tiny",
        host_tier=str(tmp_path / "tier"),
        store=store or str(tmp_path / "store"),
        options=options,
    )
    return make_fetcher(setup, lambda phase: None)


def tier(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "tier").iterdir())


def test_a_lora_comes_from_a_folder_and_from_a_server_as_the_same_file(tmp_path: Path) -> None:
    loader = loader_of(tmp_path)
    lora_id, entry = put(tmp_path / "store", lora_bytes())
    from_folder = loader.fetch(lora_id, entry)
    assert map_flat_lora(from_folder).header.add_on_id == lora_id
    first = from_folder.read_bytes()
    from_folder.unlink()
    with serving(honest(lora_bytes())) as address:
        assert loader_of(tmp_path, address).fetch(lora_id, entry).read_bytes() == first


def test_the_catalogues_own_json_is_understood(tmp_path: Path) -> None:
    loader = loader_of(tmp_path)
    lora_id, entry = put(tmp_path / "store", lora_bytes())
    listed = CatalogueEntry(**{**entry, "name": "style", "version": "1", "tenants": ("ann",)})
    plain = json.loads(json.dumps(catalogue_to_plain(Catalogue(MappingProxyType({lora_id: listed})))))["entries"][0]
    assert map_flat_lora(loader.fetch(lora_id, plain)).header.rank == 4


def test_the_type_is_that_of_the_networks(tmp_path: Path) -> None:
    lora_id, entry = put(tmp_path, lora_bytes())
    for options, dtype in (
        ({}, "F32"),
        ({"loader_dtype": "BF16"}, "BF16"),
        ({"loader_dtype": "BF16", "dtype": "float32"}, "F32"),
    ):
        path = loader_of(tmp_path, str(tmp_path), **options).fetch(lora_id, entry)
        assert map_flat_lora(path).header.dtype == dtype
    with pytest.raises(InputError, match="option loader_dtype: got 'F64'"):
        loader_of(tmp_path, loader_dtype="F64")


def test_random_weights_are_keyed_by_id_and_seed(tmp_path: Path) -> None:
    loader = loader_of(tmp_path)
    seed = {"kind": "lora", "architecture": "tiny", "file": "seed:5"}
    by_id = [map_flat_lora(loader.fetch(name, {})) for name in ("a/b c", "other")]
    by_seed = [map_flat_lora(loader.fetch(name, {"id": name, **seed})) for name in ("x", "y")]
    assert [flat.header.add_on_id for flat in by_id] == ["a/b c", "other"]
    assert not np.array_equal(by_id[0].body, by_id[1].body)
    assert np.array_equal(by_seed[0].body, by_seed[1].body)


def test_a_random_file_is_the_same_bytes_every_time(tmp_path: Path) -> None:
    digests = {write_random_lora(tmp_path / f"{i}", tiny(), rank=2, seed=3) for i in range(2)}
    assert digests == {hashlib.sha256((tmp_path / "0").read_bytes()).hexdigest()}


def spoilt() -> bytes:
    tensors = tensors_of(lora_bytes())
    tensors[list(tensors)[-1]][-1, -1] = np.nan
    return file_of(tensors)


def test_a_file_at_fault_is_refused_for_good_and_kept_for_inspection(tmp_path: Path) -> None:
    loader = loader_of(tmp_path)
    lora_id, entry = put(tmp_path / "store", spoilt())
    with pytest.raises(RefusedError, match="holds NaN") as refused:
        loader.fetch(lora_id, entry)
    assert refused.value.is_final
    assert tier(tmp_path) == []
    record = Quarantine(tmp_path / "quarantine").find(lora_id)
    assert record is not None
    assert "holds NaN" in record.reason
    assert (tmp_path / "quarantine" / record.kept).read_bytes() == spoilt()
    (tmp_path / "store" / "style.safetensors").unlink()
    with pytest.raises(RefusedError, match=r"is in quarantine: .*holds NaN"):
        loader.fetch(lora_id, entry)


def test_a_repaired_file_is_fetched_after_its_release(tmp_path: Path) -> None:
    loader = loader_of(tmp_path)
    lora_id, entry = put(tmp_path / "store", lora_bytes())
    (tmp_path / "store" / "style.safetensors").write_bytes(lora_bytes(seed=1))
    with pytest.raises(RefusedError, match="as the catalogue says"):
        loader.fetch(lora_id, entry)
    put(tmp_path / "store", lora_bytes())
    quarantine = Quarantine(tmp_path / "quarantine")
    assert [record.add_on_id for record in quarantine.records()] == [lora_id]
    assert quarantine.release(lora_id)
    assert not quarantine.release(lora_id)
    assert map_flat_lora(loader.fetch(lora_id, entry)).header.add_on_id == lora_id


def test_the_quarantine_keeps_files_up_to_its_size_and_records_always(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "quarantine", folder_bytes_max=100)
    (tmp_path / "store").mkdir()
    lora_id, _ = put(tmp_path / "store", spoilt())
    record = quarantine.put(
        lora_id, "NaN", "style.safetensors", lambda: FolderStore(tmp_path / "store").open("style.safetensors")
    )
    assert record.kept == ""
    assert quarantine.find(lora_id) == record


@pytest.mark.parametrize(
    ("change", "reason", "is_final"),
    [
        ({"file": "none.safetensors"}, "cannot be opened", False),
        ({"file": "../x"}, "is no key of a store", True),
        ({"bytes": 5}, "5, as the catalogue says", True),
        ({"architecture": "flux"}, "is made for flux", True),
        ({"kind": "controlnet"}, "is the controlnet", True),
        ({"id": "other"}, "is the lora 'other'", True),
        ({"path": "/etc/passwd"}, "has the fields", True),
    ],
)
def test_an_entry_that_leads_nowhere_is_refused(
    tmp_path: Path, change: Mapping[str, Any], reason: str, is_final: bool
) -> None:
    loader = loader_of(tmp_path)
    lora_id, entry = put(tmp_path / "store", lora_bytes())
    with pytest.raises(RefusedError, match=reason) as refused:
        loader.fetch(lora_id, {**entry, **change})
    assert refused.value.is_final is is_final
    assert tier(tmp_path) == []


def test_a_full_host_tier_is_a_passing_matter_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = loader_of(tmp_path)
    lora_id, entry = put(tmp_path / "store", lora_bytes())

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(flat_lora.os, "pwrite", full)
    with pytest.raises(RefusedError, match=r"cannot take it: No space left on device\. Make room") as refused:
        loader.fetch(lora_id, entry)
    assert not refused.value.is_final
    assert tier(tmp_path) == []


def test_without_a_store_only_random_weights_can_be_had(tmp_path: Path) -> None:
    loader = Loader(tmp_path, "tiny", "F32")
    with pytest.raises(RefusedError, match="has no store"):
        loader.fetch("0" * 64, {"file": "style.safetensors"})


FETCH = """
import json, sys
from pathlib import Path
from engine.workers.loader import Loader, remove_stale_parts
from engine.registry.store import make_store
tier, store, lora_id, entry = sys.argv[1:]
Path(tier).mkdir(exist_ok=True)
Loader(Path(tier), "tiny", "F32", make_store(store)).fetch(lora_id, json.loads(entry))
assert "torch" not in sys.modules
"""


def started(tmp_path: Path, store: str, lora_id: str, entry: dict[str, Any]) -> subprocess.Popen[bytes]:
    """A process of its own that fetches one LoRA."""
    arguments = [str(tmp_path / "tier"), store, lora_id, json.dumps(entry)]
    return subprocess.Popen([sys.executable, "-c", FETCH, *arguments])


def wait_until(is_so: Any, limit_s: float = 10.0) -> None:
    end = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def test_a_loader_killed_in_the_middle_leaves_nothing_that_is_ever_used(tmp_path: Path) -> None:
    data = lora_bytes()
    lora_id, entry = put(tmp_path, data)

    def stall_near_the_end(connection: socket.socket, path: str) -> None:
        connection.sendall(head(len(data)) + data[:-10])
        connection.recv(1)

    with serving(stall_near_the_end) as address:
        process = started(tmp_path, address, lora_id, entry)
        wait_until(lambda: (tmp_path / "tier").is_dir() and tier(tmp_path))
        process.kill()
        process.wait(10)
    assert [name.rpartition(".")[2] for name in tier(tmp_path)] == ["part"]
    (tmp_path / "store").mkdir(exist_ok=True)
    put(tmp_path / "store", data)
    loader = loader_of(tmp_path)  # its start cleans up
    assert tier(tmp_path) == []
    assert map_flat_lora(loader.fetch(lora_id, entry)).header.add_on_id == lora_id


def test_the_part_of_a_loader_that_lives_is_left_alone(tmp_path: Path) -> None:
    process = subprocess.Popen(["sleep", "30"])
    try:
        mine, dead, living = (f"a.flat.{number}.part" for number in (os.getpid(), 2**22 + 1, process.pid))
        for name in (mine, dead, living, "whole.flat"):
            (tmp_path / name).write_bytes(b"")
        assert sorted(remove_stale_parts(tmp_path)) == sorted([mine, dead])
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([living, "whole.flat"])
    finally:
        process.kill()
        process.wait(10)


def test_loaders_side_by_side_fill_one_tier(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    wanted = [put(tmp_path / "store", lora_bytes(seed=i), f"{i}.safetensors") for i in range(3)]
    processes = [started(tmp_path, str(tmp_path / "store"), lora_id, entry) for lora_id, entry in [*wanted, wanted[0]]]
    for process in processes:
        assert process.wait(30) == 0
    assert len(tier(tmp_path)) == 3
    for lora_id, _ in wanted:
        assert any(map_flat_lora(tmp_path / "tier" / name).header.add_on_id == lora_id for name in tier(tmp_path))


def test_a_whole_file_of_a_loader_that_died_before_its_answer_is_taken_as_it_is(tmp_path: Path) -> None:
    loader = loader_of(tmp_path)
    lora_id, entry = put(tmp_path / "store", lora_bytes())
    path = loader.fetch(lora_id, entry)
    (tmp_path / "store" / "style.safetensors").unlink()
    assert loader_of(tmp_path).fetch(lora_id, entry) == path
