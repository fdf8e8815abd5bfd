"""The log of a catalogue: whatever is changed in it, cut off it or done behind it shows, and a crash does not look like that for good."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.catalogue import CatalogueEntry, read_catalogue
from engine.registry.audit_check import check_log, log_path
from engine.registry.changes import add, promote, retire, rollback, update_catalogue
from traces.problems import InputError


@pytest.fixture
def governed(catalogue: Path) -> Path:
    """A catalogue with a log of six lines."""
    for number in (1, 2, 3):
        stage = "production" if number == 1 else "trial"
        entry = CatalogueEntry(
            str(number) * 64, "lora", name="ink", version=str(number), file=f"{number}.st", stage=stage
        )
        update_catalogue(catalogue, add(entry), who="ann", what=f"add ink@{number}", now_unix_s=float(number))
    for number, change in enumerate((promote("ink", "2"), rollback("ink", "1"), retire("ink", "2")), 4):
        update_catalogue(catalogue, change, who="bob", what="change", now_unix_s=float(number))
    return catalogue


def lines_of(catalogue: Path) -> list[bytes]:
    return log_path(catalogue).read_bytes().splitlines(keepends=True)


def refused(catalogue: Path, **more: str) -> str:
    with pytest.raises(InputError) as stop:
        check_log(catalogue, read_catalogue(catalogue), **more)
    return str(stop.value)


def test_an_untouched_log_chains_and_says_what_the_catalogue_holds(governed: Path, addons: Callable) -> None:
    done = addons("audit", "--json")
    assert done.code == 0
    report = json.loads(done.out)
    assert report["head"]["n_lines"] == 6
    assert (report["first_unix_s"], report["last_unix_s"]) == (1.0, 6.0)
    assert (report["void_lines"], report["restarts"]) == ([], [])


@pytest.mark.parametrize(
    ("tamper", "reason"),
    [
        (lambda lines: [*lines[:2], lines[2].replace(b'"ann"', b'"eve"'), *lines[3:]], "log.jsonl line 3: has the sha256"),
        (lambda lines: [lines[0].replace(b'"ann"', b'"eve"'), *lines[1:]], "log.jsonl line 1: has the sha256"),
        (lambda lines: [*lines[:5], lines[5].replace(b'"bob"', b'"eve"')], "log.jsonl line 6: has the sha256"),
        (lambda lines: [*lines[:2], *lines[3:]], "log.jsonl line 3: says that it is line 4: a line was taken out"),
        (lambda lines: lines[1:], "log.jsonl line 1: says that it is line 2"),
        (lambda lines: [*lines[:3], lines[2], *lines[3:]], "log.jsonl line 4: says that it is line 3"),
        (lambda lines: [lines[1], lines[0], *lines[2:]], "log.jsonl line 1: says that it is line 2"),
        (lambda lines: lines[:5], "log.jsonl line 6: is missing: the log was cut off"),
        (lambda lines: [*lines[:5], lines[5][:40]], "log.jsonl line 6: is cut off"),
        (lambda lines: [], "log.jsonl line 1: is missing"),
        (lambda lines: [*lines, lines[5]], "log.jsonl line 7: says that it is line 6"),
        (lambda lines: [*lines, b"{}\n"], "log.jsonl line 7: comes after line 6"),
        (lambda lines: [*lines[:3], b"[]\n", *lines[4:]], "log.jsonl line 4: is no JSON object"),
        (lambda lines: [*lines[:3], b"[" * 100_000 + b"\n", *lines[4:]], "log.jsonl line 4: is not JSON"),
    ],
)  # fmt: skip
def test_a_changed_log_ends_with_two_and_names_the_first_bad_line(
    governed: Path, addons: Callable, tamper: Callable[[list[bytes]], list[bytes]], reason: str
) -> None:
    log_path(governed).write_bytes(b"".join(tamper(lines_of(governed))))
    done = addons("audit")
    assert done.code == 2
    assert reason in done.err


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bit_of_the_log_can_be_turned_unseen(governed: Path, place: float, bit: int) -> None:
    right = log_path(governed).read_bytes()
    wrong = bytearray(right)
    wrong[int(place * len(right))] ^= 1 << bit
    try:
        log_path(governed).write_bytes(wrong)
        refused(governed)
    finally:
        log_path(governed).write_bytes(right)


def test_a_log_that_is_gone_is_missed(governed: Path, addons: Callable) -> None:
    log_path(governed).unlink()
    done = addons("audit")
    assert done.code == 2
    assert "log.jsonl: cannot be read" in done.err
    assert addons("promote", "ink@3").code == 2  # nobody begins a new log by just going on


def test_a_catalogue_edited_by_hand_is_found_and_changed_no_further_until_it_is_accepted(
    governed: Path, addons: Callable
) -> None:
    plain = json.loads(governed.read_text())
    plain["entries"][2]["licence"] = "MIT"
    governed.write_text(json.dumps(plain))
    done = addons("audit")
    assert done.code == 2
    assert f"entry {'3' * 64!r}: is not as in the log: licence" in done.err
    before = governed.read_bytes()
    stopped = addons("promote", "ink@3")
    assert stopped.code == 2
    assert "was changed without a line in its log" in stopped.err
    assert governed.read_bytes() == before
    accepted = addons("audit", "--accept", "licence corrected by hand", "--who", "ann")
    assert accepted.code == 0, accepted.err
    assert "7 lines chain" in accepted.out
    assert "line 7 starts anew: accept: licence corrected by hand" in accepted.out
    assert addons("promote", "ink@3").code == 0
    assert addons("audit").out.startswith("8 lines chain")


def test_a_head_that_was_edited_out_of_the_catalogue_is_missed(governed: Path, addons: Callable) -> None:
    plain = json.loads(governed.read_text())
    del plain["log"]
    governed.write_text(json.dumps(plain))
    for words in (("audit",), ("promote", "ink@3")):
        done = addons(*words)
        assert done.code == 2
        assert "does not say how far its log reaches" in done.err


def test_an_older_catalogue_put_back_is_found(governed: Path, addons: Callable, tmp_path: Path) -> None:
    shutil.copy(governed, tmp_path / "kept.json")
    addons("promote", "ink@3")
    addons("rollback", "ink@1")
    shutil.copy(tmp_path / "kept.json", governed)
    assert "line 7: comes after line 6, the last that the catalogue knows" in refused(governed)
    stopped = addons("retire", "ink@3")
    assert stopped.code == 2
    assert "is older than its log, which goes on after line 6" in stopped.err


def test_a_consistent_forgery_of_both_files_is_found_with_a_head_kept_elsewhere(
    governed: Path, addons: Callable
) -> None:
    kept = json.loads(addons("audit", "--json").out)["head"]["sha256"]
    assert addons("promote", "ink@3").code == 0
    assert addons("audit", "--head", kept).code == 0  # further lines do no harm
    governed.unlink()
    log_path(governed).unlink()
    forged = CatalogueEntry("4" * 64, "lora", name="ink", version="4", file="4.st")
    update_catalogue(governed, add(forged), who="eve", what="add")
    assert addons("audit").code == 0
    done = addons("audit", "--head", kept)
    assert done.code == 2
    assert "has no line with the sha256" in done.err


@pytest.mark.parametrize("n_bytes_left", [40, None], ids=["torn", "whole"])
def test_after_a_crash_between_log_and_catalogue_the_next_change_marks_the_line_as_void(
    governed: Path, addons: Callable, tmp_path: Path, n_bytes_left: int | None
) -> None:
    shutil.copy(governed, tmp_path / "kept.json")
    addons("promote", "ink@3")
    *lines, last = lines_of(governed)
    shutil.copy(tmp_path / "kept.json", governed)  # the rename did not happen
    log_path(governed).write_bytes(b"".join([*lines, last[:n_bytes_left]]))
    assert "A crash" in refused(governed)
    assert addons("retire", "ink@3").code == 0
    done = addons("audit")
    assert done.code == 0, done.err
    assert done.out.startswith("9 lines chain")
    assert "line 7 is void" in done.out
    assert [entry.stage for entry in read_catalogue(governed).versions("ink")] == ["production", "retired", "retired"]


def test_a_catalogue_without_a_log_gets_one_that_begins_with_all_that_was_there(
    catalogue: Path, enter: Callable, addons: Callable
) -> None:
    example = Path(__file__).resolve().parents[3] / "examples" / "engine" / "catalogue.json"
    shutil.copy(example, catalogue)
    assert "has no log" in addons("audit").err
    assert enter(1, "--allow-similar").code == 2  # the example has an ink@1
    assert addons("retire", "ink@2").code == 0
    done = addons("audit")
    assert done.out.splitlines()[:2] == [
        "2 lines chain and say what the catalogue holds",
        "line 1 starts anew: as found",
    ]


def test_a_change_that_changes_nothing_writes_no_line(governed: Path, addons: Callable) -> None:
    n_lines = len(lines_of(governed))
    assert addons("rollback", "ink@1").code == 0
    assert len(lines_of(governed)) == n_lines
    assert addons("audit").code == 0


def test_a_broken_log_must_be_moved_away_before_the_catalogue_is_accepted(governed: Path, addons: Callable) -> None:
    log = log_path(governed)
    log.write_bytes(log.read_bytes().replace(b'"ann"', b'"eve"', 1))
    done = addons("audit", "--accept", "never mind")
    assert done.code == 2
    assert "move it away" in done.err
    log.rename(log.with_name("evidence.jsonl"))
    assert addons("audit", "--accept", "log kept as evidence.jsonl").out.startswith("1 lines chain")
