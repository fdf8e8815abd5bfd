"""Hostile texts stay texts: as names, as YAML, as PromQL."""

from __future__ import annotations

import io
import re

import promql_parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from planner.export.metric_names import quoted
from planner.export.names import dns_label, label_value, one_line
from planner.export.yaml_text import from_yaml, to_yaml
from tests.export.plans import HOSTILE, names


@pytest.mark.parametrize("text", HOSTILE)
def test_any_text_becomes_a_dns_label_and_a_label_value(text: str) -> None:
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,28}[a-z0-9])?", dns_label(text, 30))
    assert re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?", label_value(text))


def test_different_texts_get_different_names_look_alikes_and_forged_digests_too() -> None:
    texts = [*HOSTILE, dns_label("ADMIN"), dns_label("Admin"), label_value("a b")]
    assert len({dns_label(text) for text in set(texts)}) == len(set(texts))
    assert len({label_value(text) for text in set(texts)}) == len(set(texts))


def test_a_name_that_fits_is_left_alone() -> None:
    assert dns_label("base-2") == "base-2"
    assert label_value("nvidia-h200") == "nvidia-h200"


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(names, names, max_size=4), st.lists(names, max_size=3))
def test_texts_read_back_the_same_under_yaml_1_1_and_1_2(table: dict[str, str], items: list[str]) -> None:
    document = {"table": table, "items": items, "number": 3, "flag": True}
    text = to_yaml([document], "# a comment\n")
    assert text.isascii()
    assert from_yaml(text) == [document]  # PyYAML reads YAML 1.1, as Kubernetes' Go library does for quoted texts
    assert list(YAML(typ="safe", pure=True).load_all(io.StringIO(text))) == [document]  # ruamel reads 1.2


@settings(max_examples=200, deadline=None)
@given(names)
def test_a_text_in_promql_is_one_label_value(text: str) -> None:
    parsed = promql_parser.parse(f"up{{a={quoted(text)}}}")
    assert isinstance(parsed, promql_parser.VectorSelector)
    assert [matcher.value for matcher in parsed.matchers.matchers] == [text]


@settings(max_examples=100, deadline=None)
@given(names)
def test_a_comment_stays_on_its_line(text: str) -> None:
    assert len(f"# {one_line(text)}".splitlines()) == 1
