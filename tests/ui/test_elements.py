"""Tables that are taken away, addresses that are passed on, and fleets that they carry."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable

import pandas as pd
import pytest
from streamlit.testing.v1 import AppTest

from dashboards import fleets
from dashboards.elements import csv_of, worst_grade
from dashboards.pages.what_if import spread_over
from planner.scenario import load_scenario
from planner.what_if import Ground, lay_out

Open = Callable[..., AppTest]


@pytest.fixture(scope="module")
def ground() -> Ground:
    return lay_out(*load_scenario("sample:small"))


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_no_cell_of_a_csv_is_a_formula(start: str) -> None:
    frame = pd.DataFrame({f"{start}name": [f"{start}cmd|' /C calc'!A0", "plain"], "n": [-1.5, 2.0]})
    rows = list(csv.reader(io.StringIO(csv_of(frame).decode("utf-8-sig"), newline="")))
    assert [row[0] for row in rows] == [f"'{start}name", f"'{start}cmd|' /C calc'!A0", "plain"]
    assert [row[1] for row in rows] == ["n", "-1.5", "2.0"]  # a number below zero stays a number


def test_a_csv_has_the_index_of_a_table_that_has_names() -> None:
    frame = pd.DataFrame({"a": ["1"]}, index=pd.Index(["=row"], name="figure"))
    assert csv_of(frame).decode("utf-8-sig") == "figure,a\r\n'=row,1\r\n"


def test_numbers_are_as_good_as_the_worst_law_behind_them() -> None:
    assert worst_grade(["measured", "assumed", "interpolated"]) == "assumed"
    assert worst_grade(["interpolated", "measured"]) == "interpolated"
    assert worst_grade([]) == "assumed"


def test_fleets_come_back_from_an_address(ground: Ground) -> None:
    found = {"diffusers": (12,), "diffusers_tuned": (7,), "colocated": (5,), "decoupled": (3, 2)}
    assert fleets.from_text(fleets.to_text(found), ground) == found


@pytest.mark.parametrize(
    "text",
    ["", "diffusers:1", "diffusers:1,diffusers_tuned:1,colocated:1,decoupled:1+1,decoupled:1+1", "diffusers:0,diffusers_tuned:1,colocated:1,decoupled:1+1",
     "diffusers:1+1,diffusers_tuned:1,colocated:1,decoupled:1+1", "diffusers:99999,diffusers_tuned:1,colocated:1,decoupled:1+1",
     "diffusers:²,diffusers_tuned:1,colocated:1,decoupled:1+1", "diffusers:1e3,diffusers_tuned:1,colocated:1,decoupled:1+1", "<b>:1"],
)  # fmt: skip
def test_fleets_of_an_address_that_mean_nothing_are_not_used(ground: Ground, text: str) -> None:
    assert fleets.from_text(text, ground) is None


@pytest.mark.parametrize(("own", "total", "wanted"), [((4, 2), 3, (2, 1)), ((4, 2), 6, (4, 2)), ((1, 1, 1), 2, (1, 1, 1)), ((5, 3, 2), 20, (10, 6, 4))])  # fmt: skip
def test_more_replicas_keep_the_proportion_of_the_pools(
    own: tuple[int, ...], total: int, wanted: tuple[int, ...]
) -> None:
    assert spread_over(own, total) == wanted
