"""The catalogue: what a name means to whom, how it changes, and that two writers both take effect."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest

from engine.allocation import to_json
from engine.catalogue import Catalogue, CatalogueEntry, check_catalogue, read_catalogue
from engine.registry.changes import add, history, promote, retire, rollback, update_catalogue
from engine.registry.resolve import resolve, usable
from traces.problems import InputError


def sha(digit: str) -> str:
    return digit * 64


def version(number: int, **more: object) -> CatalogueEntry:
    values: dict[str, object] = {
        "id": sha(str(number)), "kind": "lora", "name": "style", "version": str(number), "file": f"style-{number}.safetensors"
    }  # fmt: skip
    return CatalogueEntry(**{**values, **more})  # type: ignore[arg-type]


def catalogue(*entries: CatalogueEntry, **current: str) -> Catalogue:
    return Catalogue(MappingProxyType({entry.id: entry for entry in entries}), MappingProxyType(current))


TWO = catalogue(version(1), version(2), style="2")


def test_a_plain_name_means_the_version_that_the_catalogue_states() -> None:
    assert resolve(TWO, "style", "", "lora").version == "2"
    assert resolve(TWO, "style@1", "", "lora").version == "1"
    assert resolve(TWO, sha("1"), "", "lora").version == "1"
    assert resolve(catalogue(version(1)), "style", "", "lora").version == "1"


@pytest.mark.parametrize(
    "text", ["other", "style@3", "style@", "@1", "", "../style", "a b", "x" * 500, sha("7"), "style@1@2"]
)
def test_what_is_not_listed_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="is not in the catalogue, or not for you, needs one of style"):
        resolve(TWO, text, "", "lora")


def test_a_name_of_another_kind_is_refused() -> None:
    with pytest.raises(InputError, match="ControlNet 'style': is not in the catalogue"):
        resolve(TWO, "style", "", "controlnet")


def test_another_tenants_entry_gets_the_same_words_as_none() -> None:
    listed = catalogue(version(1, tenants=("ann",)))
    assert resolve(listed, "style", "ann", "lora").version == "1"
    said = []
    for known in (listed, catalogue()):
        for text in ("style", "style@1", sha("1")):
            with pytest.raises(InputError) as refused:
                resolve(known, text, "bob", "lora")
            said.append(str(refused.value).replace(text, "…"))
    assert len(set(said)) == 1
    assert usable(listed, "bob") == []
    assert [entry.version for entry in usable(listed, "ann")] == ["1"]


def test_a_version_in_trial_is_used_only_by_those_who_name_it() -> None:
    listed = catalogue(version(1), version(2, stage="trial"))
    assert resolve(listed, "style", "", "lora").version == "1"
    assert resolve(listed, "style@2", "", "lora").version == "2"
    with pytest.raises(InputError, match=r"has no version in production for you.*style@2"):
        resolve(catalogue(version(2, stage="trial")), "style", "", "lora")


def test_a_retired_version_is_refused_with_what_to_use() -> None:
    listed = catalogue(version(1, stage="retired"), version(2))
    assert resolve(listed, "style", "", "lora").version == "2"
    for text in ("style@1", sha("1")):
        with pytest.raises(InputError, match=r"is retired, needs one of \['style@2'\]"):
            resolve(listed, text, "", "lora")
    assert [entry.version for entry in usable(listed)] == ["2"]


def test_a_stated_version_that_is_not_for_this_tenant_is_not_replaced_by_another() -> None:
    listed = catalogue(version(1), version(2, tenants=("ann",)), style="2")
    assert resolve(listed, "style", "ann", "lora").version == "2"
    with pytest.raises(InputError, match="has no version in production for you"):
        resolve(listed, "style", "bob", "lora")


def test_an_old_file_is_read_and_its_ids_are_its_names(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    entry = {"id": "canny", "kind": "controlnet", "architecture": "sdxl", "bytes": 5, "rank": None, "targets": [],
             "version": "", "owner": "", "tenants": []}  # fmt: skip
    path.write_text(json.dumps({"schema_version": 1, "entries": [entry, {"id": "a b", "kind": "lora"}]}))
    listed = read_catalogue(path)
    assert resolve(listed, "canny", "", "controlnet").bytes == 5
    assert listed.bytes_of("a b", 7) == 7


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "catalogue.json"
    path.write_text(to_json(TWO))
    assert read_catalogue(path) == TWO
    assert to_json(read_catalogue(path)) == path.read_text()


@pytest.mark.parametrize(
    ("listed", "reason"),
    [
        (catalogue(version(1), version(2)), "has 2 versions in production, needs a line in current"),
        (catalogue(version(1), version(2), style="3"), "says that 'style' is version '3'"),
        (catalogue(version(1), version(2, stage="trial"), style="2"), "says that 'style' is version '2'"),
        (catalogue(version(1), other="1"), "current: names 'other'"),
        (catalogue(version(1), version(2, version="1")), "is a second 'style@1'"),
        (
            catalogue(version(1), version(2, kind="controlnet", file="folder"), style="1"),
            "is used for controlnet and lora",
        ),
        (catalogue(version(1, file="../x")), "which has an empty, '.' or '..' part"),
        (catalogue(version(1, file="/x")), "which is not relative"),
        (catalogue(version(1, file="https://x/y")), "which is not relative"),
        (catalogue(version(1, file="seed:-1")), "needs seed:N"),
        (catalogue(version(1, file="seed:" + "9" * 30)), "needs seed:N"),
        (catalogue(version(1, id="short")), "needs the sha256 of its file"),
        (catalogue(version(1, name="a@b")), "needs a text like"),
        (catalogue(version(1, name="a\nb")), "needs a text like"),
        (catalogue(version(1), CatalogueEntry(sha("3"), "lora", name=sha("1"), file="x")), "which is an id"),
    ],
)
def test_a_catalogue_that_contradicts_itself_is_refused(tmp_path: Path, listed: Catalogue, reason: str) -> None:
    assert any(reason in str(problem) for problem in check_catalogue(listed))
    path = tmp_path / "catalogue.json"
    path.write_text(to_json(listed))
    with pytest.raises(InputError):
        read_catalogue(path)


def change(path: Path, *changes: object) -> Catalogue:
    for item in changes:
        listed = update_catalogue(path, item, who="ann", what="test", now_unix_s=1.0)  # type: ignore[arg-type]
    return listed


def test_a_version_goes_from_trial_to_production_and_back_to_an_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "catalogue.json"
    change(path, add(version(1)), add(version(2, stage="trial")))
    assert resolve(read_catalogue(path), "style", "", "lora").version == "1"
    change(path, promote("style", "2"))  # version 1 stays in production
    assert resolve(read_catalogue(path), "style", "", "lora").version == "2"
    change(path, rollback("style", "1"))
    assert resolve(read_catalogue(path), "style", "", "lora").version == "1"
    change(path, retire("style", "2"))
    with pytest.raises(InputError, match="is retired"):
        resolve(read_catalogue(path), "style@2", "", "lora")
    assert [line["current"] for line in history(path)] == [{}, {}, {"style": "2"}, {"style": "1"}, {}]
    assert {line["who"] for line in history(path)} == {"ann"}


def test_a_second_version_in_production_without_saying_which_is_meant_is_refused_and_changes_nothing(
    tmp_path: Path,
) -> None:
    path = tmp_path / "catalogue.json"
    change(path, add(version(1)))
    before = path.read_bytes()
    with pytest.raises(InputError, match="has 2 versions in production"):
        change(path, add(version(2)))
    assert path.read_bytes() == before
    assert len(history(path)) == 1


@pytest.mark.parametrize(
    ("refused", "reason"),
    [
        (add(version(3, id=sha("1"))), "has the id of style@1"),
        (promote("style", "9"), r"style@9: is not in the catalogue, needs one of \['1', '2', '3'\]"),
        (promote("other", "1"), "needs a name of the catalogue"),
        (promote("style", "3"), "is retired"),
        (rollback("style", "3"), "is in retired"),
        (retire("style", "2"), "is what the plain name means"),
    ],
)
def test_a_change_that_makes_no_sense_is_refused(tmp_path: Path, refused: object, reason: str) -> None:
    path = tmp_path / "catalogue.json"
    path.write_text(to_json(catalogue(version(1), version(2), version(3, stage="retired"), style="2")))
    with pytest.raises(InputError, match=reason):
        change(path, refused)


def test_the_last_version_may_be_retired_and_the_name_then_means_nothing(tmp_path: Path) -> None:
    path = tmp_path / "catalogue.json"
    listed = change(path, add(version(1)), promote("style", "1"), retire("style", "1"))
    assert dict(listed.current) == {}
    with pytest.raises(InputError, match="has no version in production"):
        resolve(listed, "style", "", "lora")


def test_doing_a_change_again_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "catalogue.json"
    change(path, add(version(1)))
    stamp = path.stat().st_mtime_ns, path.stat().st_ino
    change(path, add(version(1)))
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == stamp
    assert len(history(path)) == 1


ADD_TWENTY = """
import sys
from pathlib import Path
from engine.catalogue import CatalogueEntry
from engine.registry.changes import add, update_catalogue
path, writer = Path(sys.argv[1]), int(sys.argv[2])
for i in range(20):
    name = f"style-{writer}-{i}"
    entry = CatalogueEntry(f"{writer:02d}{i:02d}" * 16, "lora", name=name, version="1", file=f"{name}.safetensors")
    update_catalogue(path, add(entry), who=str(writer), what=f"add {name}")
"""


def test_two_writers_both_take_effect_and_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "catalogue.json"
    change(path, add(version(1)))
    writers = [subprocess.Popen([sys.executable, "-c", ADD_TWENTY, str(path), str(number)]) for number in (1, 2)]
    n_seen = []
    while any(writer.poll() is None for writer in writers):
        n_seen.append(len(read_catalogue(path).entries))
    assert [writer.wait(30) for writer in writers] == [0, 0]
    assert n_seen == sorted(n_seen)
    assert len(read_catalogue(path).entries) == 41
    assert len(history(path)) == 41
    assert [item.name for item in tmp_path.iterdir() if item.name.endswith(".part")] == []


def test_a_writer_waits_for_the_lock_only_so_long(tmp_path: Path) -> None:
    path = tmp_path / "catalogue.json"
    descriptor = os.open(tmp_path / "catalogue.json.lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(InputError, match=r"is being changed by another process for 0\.05 s"):
            update_catalogue(path, add(version(1)), who="ann", what="add", lock_timeout_s=0.05)
    finally:
        os.close(descriptor)
    assert not path.exists()


def test_a_seed_stands_for_random_weights() -> None:
    assert replace(version(1), file="seed:12").seed == 12
    assert version(1).seed is None
