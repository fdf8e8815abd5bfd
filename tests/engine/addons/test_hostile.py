"""What people write cannot break the catalogue, the log or the terminal; ten thousand add-ons are no more trouble than ten."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.catalogue import NAME, Catalogue, CatalogueEntry, read_catalogue
from engine.registry.admission import Label
from engine.registry.audit_check import check_log, log_path
from engine.registry.changes import add, promote, update_catalogue
from engine.registry.labels import label_problems, look_alike, visible

CYRILLIC_INK = "іnk"  # its first letter is U+0456
BAD_NAMES = [
    "", " ", "a b", "a\nb", 'a"b', "a'b", "a`b", "a{b}", "$(id)", "${x}", "a@b", "../ink", "-ink", CYRILLIC_INK, "ink\u200b",
    "\u202eknI", "x" * 201, "{{ .Values }}", 'a"}) or vector(1)', "a\x00b", "\x1b[2J",
]  # fmt: skip


@pytest.mark.parametrize("name", [name for name in BAD_NAMES if "\x00" not in name], ids=ascii)
def test_a_name_that_is_none_is_refused_with_escapes_shown_and_nothing_written(
    addons: Callable, store: Path, catalogue: Path, name: str
) -> None:
    for words in (("--name", name, "--version", "1"), ("--name", "ink", "--version", name)):
        # --option=value: a name may begin with a dash
        words = (f"{words[0]}={words[1]}", f"{words[2]}={words[3]}")
        done = addons("add", "ink-1.safetensors", *words, "--store", store, "--architecture", "tiny")
        assert done.code == 2
        assert "needs a text like" in done.err
        assert done.err.isascii()
        assert all(char.isprintable() or char == "\n" for char in done.err)
    assert list(catalogue.parent.glob("catalogue.json*")) == []


@pytest.mark.parametrize(
    ("option", "text", "is_right"),
    [
        ("--owner", 'O\'Brien "Ann" & Söhne, $(id) {{x}} | rate(x[5m])', True),
        ("--source", "https://example.org/?a=b#c", True),
        ("--owner", "Ann\nBob", False),
        ("--owner", "\x1b[31mAnn", False),
        ("--licence", "MIT\u202e0.1-CCC", False),
        ("--source", "x" * 301, False),
        ("--tenant", "red team", True),
        ("--tenant", "r\u0435d", False),  # a Cyrillic letter
        ("--tenant", "", False),
        ("--tenant", "x" * 65, False),
    ],
)
def test_free_texts_may_hold_quotes_and_not_what_cannot_be_seen(
    enter: Callable, addons: Callable, catalogue: Path, option: str, text: str, is_right: bool
) -> None:
    done = enter(1, option, text)
    assert done.code == (0 if is_right else 2), done.err
    assert catalogue.exists() == is_right
    if is_right:
        assert text in json.dumps(json.loads(addons("show", "--json").out), ensure_ascii=False).replace('\\"', '"')
        assert addons("audit").code == 0
    else:
        assert f"{option}: got" in done.err


def test_a_name_that_looks_like_another_is_refused_unless_it_is_meant(
    enter: Callable, addons: Callable, store: Path
) -> None:
    enter(1)
    words = ("add", "ink-2.safetensors", "--version", "1", "--store", store, "--architecture", "tiny", "--name")
    for name in ("lnk", "Ink", "1nk"):
        done = addons(*words, name)
        assert done.code == 2
        assert f"got '{name}', which looks like 'ink'" in done.err
    assert addons(*words, "Ink", "--allow-similar").code == 0
    assert addons(*words, "inks").code == 2  # the same file a second time
    assert "has the id of Ink@1" in addons(*words, "inks").err


def test_names_that_differ_for_every_reader_do_not_look_alike() -> None:
    known = Catalogue(MappingProxyType({"a" * 64: CatalogueEntry("a" * 64, "lora", name="corner-10", file="x")}))
    assert look_alike(known, "comer_lo") == "corner-10"
    assert look_alike(known, "corner-11") is None
    assert look_alike(known, "corner-10") is None


@given(st.text(max_size=80))
def test_what_a_table_shows_never_moves_the_cursor_or_turns_the_line(text: str) -> None:
    assert all(char.isprintable() for char in visible(text))


def test_texts_of_a_catalogue_that_others_wrote_cannot_forge_lines_of_the_table(
    addons: Callable, catalogue: Path
) -> None:
    entry = CatalogueEntry(
        "ink-1", "base", name="ink", version="1", owner="x\nink@9  lora\x1b[2J", file="seed:1", tenants=("a\rb",)
    )
    update_catalogue(catalogue, add(entry), who="\u202e\n", what="add\n{}")
    shown = addons("show").out
    assert len(shown.splitlines()) == 3
    assert "\x1b" not in shown
    assert len(log_path(catalogue).read_bytes().splitlines()) == 1
    assert addons("audit").code == 0


texts = st.text(max_size=40)


@given(
    names=st.lists(st.from_regex(NAME, fullmatch=True), min_size=1, max_size=6, unique=True),
    owner=texts,
    who=texts,
    what=texts,
)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_texts_are_in_it_the_log_is_read_back_and_chains(
    catalogue: Path, names: list[str], owner: str, who: str, what: str
) -> None:
    owner = owner.encode("utf-8", "replace").decode("utf-8")  # no lone surrogates: a catalogue is UTF-8
    for path in (catalogue, log_path(catalogue)):
        path.unlink(missing_ok=True)
    for number, name in enumerate(names):
        entry = CatalogueEntry(f"{number}" * 64, "lora", name=name, version="1", owner=owner, stage="trial", file="x")
        update_catalogue(catalogue, add(entry), who=who, what=what)
        update_catalogue(catalogue, promote(name, "1"), who=who, what=what)
    listed = read_catalogue(catalogue)
    assert {entry.owner for entry in listed.entries.values()} == {owner}
    assert check_log(catalogue, listed).head.n_lines == 2 * len(names)
    assert log_path(catalogue).read_bytes().isascii()


def test_ten_thousand_add_ons_are_changed_shown_and_audited(enter: Callable, addons: Callable, catalogue: Path) -> None:
    targets = ("attn1.to_k", "attn1.to_out.0", "attn1.to_q", "attn1.to_v", "attn2.to_k", "attn2.to_q", "ff.net.0.proj")
    many = {
        f"{number:064x}": CatalogueEntry(
            f"{number:064x}", "lora", bytes=10**8, rank=64, targets=targets, version="1", owner="ann", name=f"style-{number}",
            licence="CC0-1.0", source="https://example.org/styles", file=f"loras/style-{number}.safetensors",
        )
        for number in range(10_000)
    }  # fmt: skip
    update_catalogue(catalogue, lambda _: Catalogue(MappingProxyType(many)), who="ann", what="import")
    assert enter(1).code == 0
    assert addons("promote", "ink@1").code == 0
    assert len(json.loads(addons("show", "--json").out)) == 10_001
    assert addons("audit").out.startswith("3 lines chain")


def test_a_catalogue_that_nobody_could_read_again_is_not_written(catalogue: Path) -> None:
    big = {
        f"{number:064x}": CatalogueEntry(f"{number:064x}", "lora", name=f"s{number}", source="x" * 10_000, file="x")
        for number in range(1700)  # 17 MB, and the reader takes 16 MiB
    }
    with pytest.raises(Exception, match=r"would have \d+ bytes, needs at most"):
        update_catalogue(catalogue, lambda _: Catalogue(MappingProxyType(big)), who="ann", what="import")
    assert not catalogue.exists()
    assert not log_path(catalogue).exists()


def test_every_problem_of_a_label_is_said_at_once() -> None:
    wrong = Label("a b", "", owner="\n", licence="\t", source="\x7f", tenants=("x", "x", ""))
    assert [problem.where for problem in label_problems(wrong)] == [
        "--name", "--version", "--owner", "--licence", "--source", "--tenant", "--tenant",
    ]  # fmt: skip
