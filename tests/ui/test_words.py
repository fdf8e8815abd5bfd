"""The catalogue of sentences is complete in both languages, and says what the code asks it for."""

from __future__ import annotations

import ast
import re
import string
from pathlib import Path

import pytest

from dashboards.catalogue import CATALOGUE
from dashboards.frame import PAGES

ROOT = Path(__file__).resolve().parents[2] / "dashboards"
SAME_IN_BOTH = re.compile(r"[A-Za-z0-9 /.,:;%$×–()\[\]{}<>+*_-]{0,24}")
"""Names, units and symbols may be the same in both languages; a sentence may not."""
JAPANESE = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]")


def asked_keys() -> tuple[set[str], set[str]]:
    """Whole keys, and beginnings of keys, that the code passes to ``say``."""
    whole: set[str] = set()
    begins: set[str] = set()
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in CATALOGUE:
                whole.add(node.value)  # also keys that wait in a table for their turn
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "say":
                parts = {
                    id(part)
                    for leaf in ast.walk(node.args[0])
                    if isinstance(leaf, ast.JoinedStr)
                    for part in leaf.values
                }
                for leaf in ast.walk(node.args[0]):
                    if isinstance(leaf, ast.JoinedStr):
                        first = leaf.values[0]
                        begins.add(str(first.value) if isinstance(first, ast.Constant) else "")
                    elif id(leaf) in parts:
                        continue
                    elif (
                        isinstance(leaf, ast.Constant)
                        and isinstance(leaf.value, str)
                        and re.fullmatch(r"\w+(\.\w+)+", leaf.value)
                    ):
                        whole.add(leaf.value)
    return whole, begins


def fields(text: str) -> list[str]:
    return sorted(name for _, name, _, _ in string.Formatter().parse(text) if name is not None)


def faults_of(english: str, japanese: str) -> list[str]:
    """What is wrong with one text in two languages."""
    faults = []
    if not english.strip() or not japanese.strip():
        faults.append("is empty")
    if not set(fields(english)) >= set(fields(japanese)):
        faults.append("the Japanese text wants a value that the English one does not give")
    if JAPANESE.search(english):
        faults.append("the English text is Japanese")
    if not JAPANESE.search(japanese) and not SAME_IN_BOTH.fullmatch(japanese):
        faults.append("is not translated")
    return faults


def test_every_text_says_the_same_in_both_languages() -> None:
    assert not {key: faults for key, texts in CATALOGUE.items() if (faults := faults_of(*texts))}


@pytest.mark.parametrize(
    ("texts", "fault"),
    [(("Stop", " "), "is empty"), (("{n} GPUs", "{k}台"), "wants a value"), (("停止", "停止"), "is Japanese"), (("A sentence that nobody translated.",) * 2, "not translated")],
)  # fmt: skip
def test_a_fault_of_a_text_is_seen(texts: tuple[str, str], fault: str) -> None:
    assert any(fault in said for said in faults_of(*texts))


def test_every_text_that_is_asked_for_is_there() -> None:
    whole, begins = asked_keys()
    assert not sorted(whole - CATALOGUE.keys())
    assert not [start for start in begins if start and not any(key.startswith(start) for key in CATALOGUE)]


def test_no_text_is_left_over() -> None:
    whole, begins = asked_keys()
    # the frame asks for a page's own three by the page's name
    of_pages = {f"{name}.{part}" for name in PAGES for part in ("nav", "title", "lead")}
    starts = tuple(start for start in begins if "." in start)
    assert not sorted(key for key in CATALOGUE.keys() - whole - of_pages if not key.startswith(starts))


def test_every_page_has_a_name_a_title_and_a_lead() -> None:
    assert {f"{name}.{part}" for name in PAGES for part in ("nav", "title", "lead")} <= CATALOGUE.keys()
