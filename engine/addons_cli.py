"""``diffplan addons``: who may use which version of an add-on, since when, and who said so. Importing this module imports no torch."""

from __future__ import annotations

import dataclasses
import getpass
import json
import math
import os
import sys
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from engine.catalogue import SHA256, Catalogue, CatalogueEntry, read_catalogue
from engine.registry import changes
from engine.registry.admission import Label, admit
from engine.registry.admission import verify as verify_entry
from engine.registry.audit_check import check_log
from engine.registry.catalogue_table import is_current, table_row, table_text
from engine.registry.labels import label_problems, look_alike, shown, text_problems, visible
from engine.registry.resolve import usable
from engine.registry.safetensors_header import AddOnRefusedError
from engine.registry.signatures import read_private_key, read_trusted_keys, unsigned
from engine.registry.signatures import sign as sign_entry
from engine.registry.store import StoreError, make_store
from engine.registry.usage import cost_per_use, read_served
from traces.problems import InputError, Problem, one_problem

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Govern the add-ons that the engine may load.")


class FileKind(StrEnum):
    """Add-ons that can be admitted from a file."""

    LORA = "lora"
    CONTROLNET = "controlnet"
    BASE = "base"


class FirstStage(StrEnum):
    """Stages in which an add-on can begin."""

    TRIAL = "trial"
    PRODUCTION = "production"


CataloguePath = Annotated[
    Path, typer.Option("--catalogue", help="Catalogue file; docs/catalogue.md says what is in it.")
]
StorePlace = Annotated[str, typer.Option("--store", help="Folder or http(s) address of the catalogue's files.")]
TokenFile = Annotated[
    Path | None,
    typer.Option("--store-token-file", help="Bearer token of an https store, one line; not readable by everybody."),
]
Who = Annotated[str, typer.Option("--who", help="Who does it, for the log; the user of this session if left out.")]
Title = Annotated[str, typer.Argument(metavar="NAME@VERSION", help="A version of the catalogue.")]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON on stdout.")]
CATALOGUE = Path("catalogue.json")
PROBLEMS_SHOWN = 5


@app.callback()
def addons() -> None:
    """Govern the add-ons that the engine may load: versions, stages, tenants, their cost, and a log that shows tampering."""


@app.command()
def add(
    file: Annotated[
        str, typer.Argument(help="Key in the store: a LoRA's file, or the folder of a ControlNet or base model.")
    ],
    name: Annotated[str, typer.Option(help="What requests call it; versions share a name.")],
    version: Annotated[str, typer.Option(help="Which version of the name.")],
    store: StorePlace,
    kind: Annotated[FileKind, typer.Option(help="What it is.")] = FileKind.LORA,
    architecture: Annotated[str, typer.Option(help="Network that it fits: sdxl or tiny.")] = "sdxl",
    owner: Annotated[str, typer.Option(help="Who answers for it.")] = "",
    licence: Annotated[str, typer.Option(help="Under which it may be used, as an SPDX id.")] = "",
    source: Annotated[str, typer.Option(help="Where it came from: an address, a training run.")] = "",
    tenant: Annotated[list[str] | None, typer.Option(help="Who may use it; repeat it; everybody if left out.")] = None,
    stage: Annotated[FirstStage, typer.Option(help="trial: only by NAME@VERSION.")] = FirstStage.TRIAL,
    allow_similar: Annotated[
        bool, typer.Option("--allow-similar", help="Take a name that looks like another one.")
    ] = False,
    store_token_file: TokenFile = None,
    catalogue: CataloguePath = CATALOGUE,
    who: Who = "",
    as_json: AsJson = False,
) -> None:
    """Check a file of the store, every byte of it, and enter it into the catalogue under its sha256."""
    label = Label(name, version, owner, licence, source, tuple(tenant or ()), stage.value)
    actor = _who(who, *label_problems(label))
    _refuse_look_alike(_read(catalogue) if catalogue.exists() else Catalogue(), name, allow_similar)
    try:
        entry = admit(make_store(store, token_file=store_token_file), file, kind.value, architecture, label)
    except StoreError as error:
        raise _store_problem(file, error) from None
    except AddOnRefusedError as error:
        raise _shortened(file, error, architecture) from None

    def enter(now: Catalogue) -> Catalogue:
        _refuse_look_alike(now, name, allow_similar)  # another writer may have entered it since
        return changes.add(entry)(now)

    _change(catalogue, enter, actor, f"add {entry.title}")
    _say(entry, as_json, f"{entry.title} is in {entry.stage}: {entry.kind} for {entry.architecture}, sha256 {entry.id}")


@app.command()
def show(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME[@VERSION]]…", help="Only these; all if left out.")
    ] = None,
    catalogue: CataloguePath = CATALOGUE,
    tenant: Annotated[str | None, typer.Option(help="What this tenant may use, and no more than it may know.")] = None,
    usage: Annotated[
        Path | None, typer.Option(help="A replay's folder, or a request log of `engine serve --log`: cost per use.")
    ] = None,
    price: Annotated[float | None, typer.Option(help="USD per GPU hour, for the cost per use in dollars.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show versions, stages, who may use them, and what a use was measured to cost."""
    if price is not None and not (math.isfinite(price) and price >= 0):
        raise one_problem("--price", f"got {price}", "USD per GPU hour, 0 or more", "Correct it.")
    if price is not None and usage is None:
        raise one_problem("--price", "got a price without --usage", "what was recorded", "Add --usage.")
    known = _read(catalogue)
    entries = _chosen(known, names or [], tenant)
    costs = cost_per_use(read_served(usage)) if usage is not None else {}
    unlisted = [cost.n_uses for add_on_id, cost in costs.items() if add_on_id not in known.entries]
    if unlisted and tenant is None:
        typer.echo(f"{len(unlisted)} add-ons with {sum(unlisted)} uses are not in the catalogue: left out", err=True)
    rows = [
        table_row(known, entry, tenant, costs.get(entry.id), price, is_costed=usage is not None) for entry in entries
    ]
    typer.echo(json.dumps(rows, indent=2, sort_keys=True) if as_json else table_text(rows, has_cost=usage is not None))


@app.command()
def promote(title: Title, catalogue: CataloguePath = CATALOGUE, who: Who = "", as_json: AsJson = False) -> None:
    """Put a version into production and make it what the plain name means; the one before stays in production."""
    name, version = _parts(title)
    before = _read(catalogue)
    after = _change(catalogue, changes.promote(name, version), _who(who), f"promote {title}")
    _warn_of_lost_tenants(before, after, name)
    _say(_entry(after, name, version), as_json, f"{name} now means {title}")


@app.command()
def rollback(title: Title, catalogue: CataloguePath = CATALOGUE, who: Who = "", as_json: AsJson = False) -> None:
    """Make the plain name mean another version that is in production already."""
    name, version = _parts(title)
    before = _read(catalogue)
    after = _change(catalogue, changes.rollback(name, version), _who(who), f"rollback {title}")
    _warn_of_lost_tenants(before, after, name)
    _say(_entry(after, name, version), as_json, f"{name} means {title} again")


@app.command()
def retire(title: Title, catalogue: CataloguePath = CATALOGUE, who: Who = "", as_json: AsJson = False) -> None:
    """Take a version out of use for good; what it was stays in the catalogue."""
    name, version = _parts(title)
    after = _change(catalogue, changes.retire(name, version), _who(who), f"retire {title}")
    _say(_entry(after, name, version), as_json, f"{title} is retired")


@app.command()
def verify(
    store: StorePlace,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME[@VERSION]]…", help="Only these; all if left out.")
    ] = None,
    trusted: Annotated[
        Path | None, typer.Option(help="Public keys in PEM: every add-on must be signed by one of them.")
    ] = None,
    store_token_file: TokenFile = None,
    catalogue: CataloguePath = CATALOGUE,
    as_json: AsJson = False,
) -> None:
    """Read every file again: is it still what was admitted? Retired versions are left out unless they are named."""
    known = _read(catalogue)
    entries = _chosen(known, names or [], None)
    if not names:
        n_all, entries = len(entries), [entry for entry in entries if entry.stage != "retired"]
        if n_all > len(entries):
            typer.echo(
                f"left out, because they are retired: {n_all - len(entries)} (name them to verify them)", err=True
            )
    place = make_store(store, token_file=store_token_file)
    keys = read_trusted_keys(trusted) if trusted is not None else ()
    problems: list[Problem] = []
    by_what: dict[str, list[str]] = {"verified": [], "shape_only": [], "nothing_to_verify": []}
    for entry in entries:
        try:
            wrong = verify_entry(place, entry)
        except StoreError as error:
            wrong = _store_problem(entry.title, error)
        if wrong is not None:
            problems += [dataclasses.replace(item, where=f"{entry.title}: {item.where}") for item in wrong.problems]
        elif _is_without_files(entry):
            by_what["nothing_to_verify"].append(entry.title)
        else:
            by_what["verified" if SHA256.fullmatch(entry.id) else "shape_only"].append(entry.title)
    if keys:
        problems += unsigned(
            catalogue, [entry for entry in entries if entry.kind != "base" or not _is_without_files(entry)], keys
        )
    if problems:
        raise InputError(problems)
    if as_json:
        typer.echo(json.dumps(by_what, indent=2, sort_keys=True))
        return
    typer.echo(f"as admitted{', and signed' if keys else ''}: {len(by_what['verified'])}")
    if by_what["shape_only"]:
        typer.echo(f"only shapes and values checked, because the id is no sha256: {len(by_what['shape_only'])}")
    if by_what["nothing_to_verify"]:
        typer.echo(f"nothing to verify, random weights and entries without a file: {len(by_what['nothing_to_verify'])}")


@app.command()
def sign(
    title: Title,
    key: Annotated[Path, typer.Option(help="Private Ed25519 key in PEM, mode 0600.")],
    catalogue: CataloguePath = CATALOGUE,
) -> None:
    """Write a detached signature of a version beside the catalogue; `verify --trusted` asks for it."""
    entry = _entry(_read(catalogue), *_parts(title))
    typer.echo(sign_entry(catalogue, entry, read_private_key(key)))


@app.command()
def audit(
    catalogue: CataloguePath = CATALOGUE,
    head: Annotated[str, typer.Option(help="sha256 that an earlier audit printed: its line must still be there.")] = "",
    accept: Annotated[
        str, typer.Option(metavar="REASON", help="Write the catalogue as it is into the log, with the reason.")
    ] = "",
    who: Who = "",
    as_json: AsJson = False,
) -> None:
    """Check that nobody changed the log, cut it off, or edited the catalogue behind it; exit code 2 with the first bad line."""
    if head and not SHA256.fullmatch(head):
        raise one_problem("--head", f"got {shown(head)}", "64 digits of lower-case hex", "Copy it again.")
    if accept:
        changes.accept(catalogue, accept, who=_who(who, *text_problems("--accept", accept)))
    if not catalogue.exists():
        _read(catalogue)
    with changes.reading(catalogue):
        report = check_log(catalogue, read_catalogue(catalogue), expected_head=head)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(report), indent=2, sort_keys=True))
        return
    typer.echo(f"{report.head.n_lines} lines chain and say what the catalogue holds")
    for n, what in report.restarts:
        typer.echo(f"line {n} starts anew: {visible(what, 200)}")
    for n in report.void_lines:
        typer.echo(f"line {n} is void: it did not take effect")
    typer.echo(f"head {report.head.sha256}")


def _shortened(file: str, error: AddOnRefusedError, architecture: str) -> InputError:
    """The first problems only where a file fits nowhere: hundreds of lines would say the same."""
    if len(error.problems) <= PROBLEMS_SHOWN:
        return error
    n_more = len(error.problems) - PROBLEMS_SHOWN
    more = Problem(
        file, f"has {n_more} more problems", f"an add-on for {architecture}",
        "If it is for another network, say so with --architecture",
    )  # fmt: skip
    return InputError([*error.problems[:PROBLEMS_SHOWN], more])


def _is_without_files(entry: CatalogueEntry) -> bool:
    return not entry.file or entry.seed is not None


def _change(path: Path, change: changes.Change, who: str, what: str) -> Catalogue:
    if not path.parent.is_dir():
        raise one_problem(str(path), "lies in a folder that does not exist", "a catalogue", "Check --catalogue.")
    return changes.update_catalogue(path, change, who=who, what=what)


def _read(path: Path) -> Catalogue:
    return read_catalogue(path)


def _who(text: str, *problems: Problem) -> str:
    found = [*problems, *text_problems("--who", text)]
    if found:
        raise InputError(found)
    if text:
        return text
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user that has no name
        return f"user {os.getuid()}"


def _parts(title: str) -> tuple[str, str]:
    name, at, version = title.partition("@")
    if not at or not name or not version:
        raise one_problem(f"{shown(title)}", "is no version", "NAME@VERSION", "Name both.")
    return name, version


def _entry(catalogue: Catalogue, name: str, version: str) -> CatalogueEntry:
    for entry in catalogue.versions(name):
        if entry.version == version:
            return entry
    versions = sorted(entry.version for entry in catalogue.versions(name))
    allowed = f"one of {versions[:20]}" if versions else "a name of the catalogue"
    raise one_problem(f"{shown(f'{name}@{version}')}", "is not in the catalogue", allowed, "Correct it.")


def _chosen(catalogue: Catalogue, names: Iterable[str], tenant: str | None) -> list[CatalogueEntry]:
    everything = list(catalogue.entries.values()) if tenant is None else usable(catalogue, tenant)
    if not names:
        return sorted(everything, key=lambda entry: (entry.kind, entry.name or entry.id, entry.version))
    chosen: list[CatalogueEntry] = []
    problems: list[Problem] = []
    for text in names:
        name, at, version = text.partition("@")
        found = [
            entry
            for entry in everything
            if ((entry.name or entry.id) == name and (not at or entry.version == version)) or entry.id == text
        ]
        if not found:
            whose = "" if tenant is None else ", or not for this tenant"
            problems.append(
                Problem(shown(text), f"is not in the catalogue{whose}", "a name, NAME@VERSION or an id", "Correct it.")
            )
        chosen += [entry for entry in found if entry not in chosen]
    if problems:
        raise InputError(problems)
    return sorted(chosen, key=lambda entry: (entry.kind, entry.name or entry.id, entry.version))


def _refuse_look_alike(catalogue: Catalogue, name: str, is_allowed: bool) -> None:
    other = None if is_allowed or catalogue.versions(name) else look_alike(catalogue, name)
    if other is not None:
        raise one_problem(
            "--name", f"got {shown(name)}, which looks like {shown(other)}", "a name that nobody mistakes",
            "Rename it, or say --allow-similar.",
        )  # fmt: skip


def _warn_of_lost_tenants(before: Catalogue, after: Catalogue, name: str) -> None:
    """Says on stderr who could use the plain name before and cannot now."""
    meant = {
        when: next((entry for entry in now.versions(name) if is_current(now, entry)), None)
        for when, now in (("before", before), ("after", after))
    }
    was, now = meant["before"], meant["after"]
    if was is None or now is None or not now.tenants or (was.tenants and set(was.tenants) <= set(now.tenants)):
        return
    lost = ", ".join(sorted(set(was.tenants) - set(now.tenants))[:10]) or "everybody else"
    typer.echo(
        f"Plain {name!r} is now only for {', '.join(now.tenants[:10])}; no longer for {lost}, who must name {was.title}.",
        err=True,
    )


def _say(entry: CatalogueEntry, as_json: bool, sentence: str) -> None:
    typer.echo(json.dumps(dataclasses.asdict(entry), indent=2, sort_keys=True) if as_json else sentence)


def _store_problem(where: str, error: StoreError) -> InputError:
    return one_problem(shown(where), f"the store does not give it: {error}")


def main() -> None:
    """``python -m engine.addons_cli``, for hosts without the planner's packages."""
    try:
        app(prog_name="python -m engine.addons_cli")
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
