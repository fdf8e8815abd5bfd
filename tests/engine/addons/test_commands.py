"""``diffplan addons``: the life of a version, who sees it, and that a serving engine takes changes over."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from engine.catalogue import CatalogueEntry, read_catalogue
from engine.frontdoor.catalogue_file import CatalogueFile
from engine.models import ModelSpec, build_controlnet, build_models
from engine.registry.changes import history, update_catalogue
from engine.registry.checkpoint_check import PARTS
from engine.registry.resolve import resolve
from tests.engine.registry.files import lora_bytes

ROOT = Path(__file__).resolve().parents[3]


def test_a_file_enters_under_its_sha256_with_everything_said_of_it(
    enter: Callable, addons: Callable, catalogue: Path
) -> None:
    done = enter(
        1,
        "--owner",
        "Ann Müller",
        "--licence",
        "CC0-1.0",
        "--source",
        "https://example.org/ink",
        "--tenant",
        "red",
        "--json",
    )
    assert done.code == 0, done.err
    said = json.loads(done.out)
    assert said["id"] == hashlib.sha256(lora_bytes(seed=1)).hexdigest()
    entry = read_catalogue(catalogue).entries[said["id"]]
    assert (entry.title, entry.stage, entry.owner, entry.licence, entry.source, entry.tenants, entry.architecture) == (
        "ink@1", "trial", "Ann Müller", "CC0-1.0", "https://example.org/ink", ("red",), "tiny",
    )  # fmt: skip
    assert [(line["who"], line["what"]) for line in history(catalogue)] == [("ann", "add ink@1")]


def test_a_controlnets_folder_enters_too(addons: Callable, store: Path, catalogue: Path) -> None:
    build_controlnet(ModelSpec.tiny()).save_pretrained(store / "canny")
    words = (
        "canny",
        "--kind",
        "controlnet",
        "--name",
        "canny",
        "--version",
        1,
        "--store",
        store,
        "--architecture",
        "tiny",
    )
    assert addons("add", *words).code == 0
    assert addons("verify", "--store", store).out == "as admitted: 1\n"
    assert [entry.kind for entry in read_catalogue(catalogue).entries.values()] == ["controlnet"]


def test_a_checkpoints_folder_enters_and_a_replaced_part_is_found(
    addons: Callable, store: Path, catalogue: Path
) -> None:
    models = build_models(ModelSpec.tiny())
    for name in PARTS:
        getattr(models, name).save_pretrained(store / "photo" / name)
    models.scheduler().save_pretrained(store / "photo" / "scheduler")
    label = ("--kind", "base", "--name", "photo", "--version", 1, "--architecture", "tiny", "--who", "ann")
    assert addons("add", "photo", *label, "--store", store).code == 0
    (entry,) = read_catalogue(catalogue).entries.values()
    assert (entry.kind, len(entry.id), entry.stage) == ("base", 64, "trial")
    assert addons("verify", "--store", store).out == "as admitted: 1\n"
    (store / "photo" / "vae" / "config.json").unlink()
    done = addons("verify", "--store", store)
    assert done.code == 2
    assert "photo@1" in done.err


def test_entries_without_a_file_have_nothing_to_verify(addons: Callable, store: Path, catalogue: Path) -> None:
    drawn = CatalogueEntry("drawn", "base", "tiny", name="drawn", version="1", file="seed:4")
    sized = CatalogueEntry("sized", "lora", "tiny", name="sized", version="1", bytes=1000)
    update_catalogue(
        catalogue, lambda known: replace(known, entries={"drawn": drawn, "sized": sized}), who="ann", what="two"
    )
    done = addons("verify", "--store", store)
    assert done.code == 0
    assert done.out == "as admitted: 0\nnothing to verify, random weights and entries without a file: 2\n"


def test_a_serving_engine_means_by_a_name_what_the_commands_last_said(
    enter: Callable, addons: Callable, catalogue: Path
) -> None:
    enter(1, "--stage", "production")
    served = CatalogueFile(catalogue)  # what an engine looks at for every request
    enter(2)
    assert resolve(served.now(), "ink", "", "lora").version == "1"
    assert resolve(served.now(), "ink@2", "", "lora").stage == "trial"
    assert addons("promote", "ink@2").out == "ink now means ink@2\n"
    assert resolve(served.now(), "ink", "", "lora").version == "2"
    assert resolve(served.now(), "ink@1", "", "lora").version == "1"  # both serve, side by side
    assert addons("rollback", "ink@1").code == 0
    assert resolve(served.now(), "ink", "", "lora").version == "1"
    assert addons("retire", "ink@2").code == 0
    assert [entry.stage for entry in served.now().versions("ink")].count("retired") == 1
    assert addons("audit").code == 0


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("promote", "ink@9"), "ink@9: is not in the catalogue, needs one of ['1']"),
        (("promote", "ink"), "'ink': is no version, needs NAME@VERSION"),
        (("rollback", "ink@1"), "ink@1: is in trial, needs a version in production"),
        (("show", "style", "ink@3"), "'style': is not in the catalogue"),
        (("show", "--price", "nan"), "--price: got nan"),
        (("show", "--price", "3"), "got a price without --usage"),
        (("show", "--usage", "nowhere"), "nowhere: cannot be read"),
        (("verify", "--store", "nowhere"), "store: got 'nowhere'"),
        (("audit", "--head", "abc"), "--head: got 'abc'"),
        (("promote", "ink@1", "--who", "a\nb"), "--who: got 'a\\nb'"),
    ],
)
def test_a_command_that_makes_no_sense_ends_with_two_and_changes_nothing(
    enter: Callable, addons: Callable, catalogue: Path, words: tuple[str, ...], reason: str
) -> None:
    enter(1)
    before = catalogue.read_bytes()
    done = addons(*words)
    assert done.code == 2
    assert reason in done.err
    assert done.out == ""
    assert catalogue.read_bytes() == before


def test_a_file_that_is_gone_or_does_not_fit_is_refused_and_nothing_is_written(
    addons: Callable, store: Path, catalogue: Path
) -> None:
    gone = addons("add", "ink-9.safetensors", "--name", "ink", "--version", 1, "--store", store)
    assert gone.code == 2
    assert "the store does not give it: ink-9.safetensors: cannot be opened" in gone.err
    unfit = addons("add", "ink-1.safetensors", "--name", "ink", "--version", 1, "--store", store)  # sdxl
    assert unfit.code == 2
    assert len(unfit.err.splitlines()) == 6  # not a line for each of its layers
    assert (
        "more problems, needs an add-on for sdxl. If it is for another network, say so with --architecture" in unfit.err
    )
    assert not catalogue.exists()


def test_a_tenant_sees_what_it_may_use_and_not_who_else_may(enter: Callable, addons: Callable) -> None:
    enter(1, "--stage", "production")
    enter(2, "--tenant", "red", "--tenant", "blue")
    seen = {name: json.loads(addons("show", "--json", "--tenant", name).out) for name in ("red", "green")}
    assert [row["version"] for row in seen["green"]] == ["1"]
    assert [(row["version"], row["tenants"]) for row in seen["red"]] == [("1", []), ("2", ["red"])]
    unknown, foreign = (addons("show", name, "--tenant", "green") for name in ("ink@7", "ink@2"))
    assert unknown.code == foreign.code == 2
    assert unknown.err.replace("ink@7", "…") == foreign.err.replace("ink@2", "…")


def test_promoting_a_version_of_fewer_tenants_says_who_loses_the_name(enter: Callable, addons: Callable) -> None:
    enter(1, "--stage", "production")
    enter(2, "--tenant", "red")
    done = addons("promote", "ink@2")
    assert done.code == 0
    assert "only for red; no longer for everybody else, who must name ink@1" in done.err
    assert addons("rollback", "ink@1").err == ""


def test_verify_names_every_file_that_is_not_what_was_admitted(enter: Callable, addons: Callable, store: Path) -> None:
    enter(1)
    enter(2)
    assert addons("verify", "--store", store).out == "as admitted: 2\n"
    (store / "ink-1.safetensors").write_bytes(lora_bytes(seed=9))
    (store / "ink-2.safetensors").unlink()
    done = addons("verify", "--store", store)
    assert done.code == 2
    assert "ink@1: " in done.err
    assert "has the sha256" in done.err
    assert "the store does not give it: ink-2.safetensors: cannot be opened" in done.err
    addons("retire", "ink@1")
    addons("retire", "ink@2")
    assert addons("verify", "--store", store).code == 0
    assert addons("verify", "ink@2", "--store", store).code == 2


def test_the_commands_need_neither_torch_nor_the_planner(enter: Callable, catalogue: Path, store: Path) -> None:
    enter(1)
    code = (
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in {'torch', 'diffusers', 'safetensors', 'simpy', 'planner', 'calibrate'}:\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        f"sys.argv = ['addons', 'verify', '--catalogue', {str(catalogue)!r}, '--store', {str(store)!r}]\n"
        "from engine.addons_cli import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT, check=False
    )
    assert done.stdout == "as admitted: 1\n", done.stderr


def test_two_processes_that_add_at_once_both_take_effect_and_the_log_still_chains(
    addons: Callable, catalogue: Path, store: Path
) -> None:
    for number in range(6):
        (store / f"wash-{number}.safetensors").write_bytes(lora_bytes(seed=10 + number))
    writer = (
        "import sys\nfrom engine.addons_cli import app\n"
        "catalogue, store, first = sys.argv[1:]\n"
        "for i in range(int(first), int(first) + 3):\n"
        "    app(['add', f'wash-{i}.safetensors', '--name', f'wash{i}', '--version', '1', '--stage', 'production', '--store', store,"
        " '--architecture', 'tiny', '--who', f'writer {first}', '--catalogue', catalogue], standalone_mode=False)\n"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", writer, str(catalogue), str(store), first], cwd=ROOT, stdout=subprocess.DEVNULL
        )
        for first in ("0", "3")
    ]
    assert [process.wait(60) for process in running] == [0, 0]
    assert len(read_catalogue(catalogue).entries) == 6
    assert sorted(str(line["who"]) for line in history(catalogue)) == ["writer 0"] * 3 + ["writer 3"] * 3
    assert addons("audit").out.startswith("6 lines chain")
