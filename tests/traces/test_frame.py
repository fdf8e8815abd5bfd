"""From cells to a trace: what is refused, in which words, and what is filled."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from traces.frame import checked_frame
from traces.problems import InputError
from traces.records import REQUEST_COLUMNS
from traces.trace import Provenance


def checked(**columns: Any) -> Any:
    frame = pd.DataFrame({name: pd.Series(values, dtype=object) for name, values in columns.items()})
    return checked_frame(frame, "t.csv", Provenance("test"))


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("a trace without arrivals", {"request_id": ["a"]}, "has no column arrival_s"),
    ("a trace without ids", {"arrival_s": [0.0]}, "has no column request_id"),
    ("no rows", {"request_id": [], "arrival_s": []}, "has no requests"),
    ("an empty id", {"request_id": ["a", None], "arrival_s": [0, 1]}, "row 2 column request_id: is empty"),
    ("an id that is text of nothing", {"request_id": [""], "arrival_s": [0]}, "row 1 column request_id: got ''"),
    ("an id that is a fraction", {"request_id": [1.5], "arrival_s": [0]}, "row 1 column request_id: got 1.5"),
    ("an id twice", {"request_id": ["a", "b", "a"], "arrival_s": [0, 1, 2]}, "row 3 column request_id: got 'a' again, first seen in row 1"),
    ("an arrival before the start", {"request_id": ["a"], "arrival_s": [-1]}, "row 1 column arrival_s: got -1, needs a finite number, at least 0"),
    ("an arrival that is no number", {"request_id": ["a"], "arrival_s": ["noon"]}, "row 1 column arrival_s: got 'noon'"),
    ("an infinite arrival", {"request_id": ["a"], "arrival_s": [math.inf]}, "column arrival_s: got inf"),
    ("an arrival that is NaN", {"request_id": ["a"], "arrival_s": [math.nan]}, "column arrival_s: got nan"),
    ("no arrival in a row", {"request_id": ["a"], "arrival_s": [None]}, "row 1 column arrival_s: is empty"),
    ("an arrival that is a truth value", {"request_id": ["a"], "arrival_s": [True]}, "column arrival_s: got True"),
    ("half a step", {"request_id": ["a"], "arrival_s": [0], "n_steps": [2.5]}, "n_steps: got 2.5, needs a whole number, 1..1000"),
    ("too many steps", {"request_id": ["a"], "arrival_s": [0], "n_steps": ["1001"]}, "n_steps: got '1001', needs a whole number, 1..1000"),
    ("digits with underscores", {"request_id": ["a"], "arrival_s": ["1_0"]}, "got '1_0'"),
    ("no image", {"request_id": ["a"], "arrival_s": [0], "n_images": [0]}, "n_images: got 0"),
    ("a list that is text", {"request_id": ["a"], "arrival_s": [0], "lora_ids": ["x"]}, "lora_ids: got 'x', needs a list of names"),
    ("a list with an empty name", {"request_id": ["a"], "arrival_s": [0], "lora_ids": [["x", ""]]}, "lora_ids: got ['x', '']"),
    ("a list of numbers as names", {"request_id": ["a"], "arrival_s": [0], "lora_ids": ["[1]"]}, "lora_ids: got '[1]'"),
    (
        "a weight too few",
        {"request_id": ["a"], "arrival_s": [0], "lora_ids": [["x", "y"]], "lora_scales": [[0.5]]},
        "row 1 column lora_scales: has 1 values for the 2 names in lora_ids",
    ),
    (
        "a weight that is no number",
        {"request_id": ["a"], "arrival_s": [0], "lora_ids": [["x"]], "lora_scales": [[math.nan]]},
        "column lora_scales: got [nan]",
    ),
    (
        "a control that ends before it starts",
        {"request_id": ["a"], "arrival_s": [0], "controlnet_ids": [["c"]], "control_start": [[0.9]], "control_end": [[0.1]]},
        "control_end: got 0.1, before its control_start 0.9",
    ),
    (
        "a control span beyond the steps",
        {"request_id": ["a"], "arrival_s": [0], "controlnet_ids": [["c"]], "control_end": [[1.5]]},
        "control_end: got [1.5], needs a list of finite numbers such as [1, 0.5], 0..1",
    ),
    ("a negative deadline", {"request_id": ["a"], "arrival_s": [0], "deadline_s": [-2]}, "deadline_s: got -2"),
]  # fmt: skip


@pytest.mark.parametrize(("columns", "sentence"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_a_wrong_cell_is_refused_with_its_place(columns: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        checked(**columns)
    assert sentence in str(caught.value)
    assert "t.csv" in str(caught.value)


def test_all_problems_are_reported_together() -> None:
    with pytest.raises(InputError) as caught:
        checked(request_id=["a", "b"], arrival_s=["x", 1], n_steps=[0, 5], lora_ids=["[", None])
    places = [problem.where for problem in caught.value.problems]
    assert places == ["t.csv row 1 column arrival_s", "t.csv row 1 column n_steps", "t.csv row 1 column lora_ids"]


def test_a_column_of_wrong_cells_is_summed_up() -> None:
    with pytest.raises(InputError) as caught:
        checked(request_id=[str(row) for row in range(1000)], arrival_s=["x"] * 1000)
    assert len(caught.value.problems) == 21
    assert str(caught.value.problems[-1]) == "t.csv column arrival_s: 980 more cells are wrong."


def test_a_column_twice_is_refused() -> None:
    frame = pd.DataFrame([["a", 0.0, 1.0]], columns=["request_id", "arrival_s", "arrival_s"])
    with pytest.raises(InputError, match="more than once: arrival_s"):
        checked_frame(frame, "t", Provenance("test"))


def test_a_window_that_ends_before_the_last_arrival_is_refused() -> None:
    frame = pd.DataFrame({"request_id": ["a"], "arrival_s": [5.0]})
    with pytest.raises(InputError, match="at least the last arrival, 5 s"):
        checked_frame(frame, "t", Provenance("test"), duration_s=4.0)


def test_defaults_are_filled_and_counted() -> None:
    trace = checked(
        request_id=["a", "b", "c"],
        arrival_s=[0, 1, 2],
        n_steps=[30, None, None],
        lora_ids=[["x", "y"], [], ["z"]],
        lora_scales=[None, None, [0.5]],
        controlnet_ids=[["c"], ["c", "d"], []],
        deadline_s=[None, 7, None],
    )
    first, second, third = trace
    assert (first.n_steps, second.n_steps) == (30, 50)
    assert first.lora_scales == (1.0, 1.0)
    assert third.lora_scales == (0.5,)
    assert (second.control_start, second.control_end) == ((0.0, 0.0), (1.0, 1.0))
    assert (first.deadline_s, second.deadline_s) == (None, 7.0)
    counted = trace.provenance.defaults
    assert counted["n_steps=50"] == 2
    assert counted["lora_scales=1"] == 1  # the request without a LoRA needs no weight
    assert counted["controlnet_scales=1"] == 2
    assert counted["width_px=1024"] == 3
    assert not any(name.startswith(("deadline_s", "lora_ids", "request_id")) for name in counted)


def test_rows_are_sorted_by_arrival_and_ties_keep_their_order() -> None:
    trace = checked(request_id=["a", "b", "c", "d"], arrival_s=[5, 1, 5, 1])
    assert trace.requests["request_id"].tolist() == ["b", "d", "a", "c"]
    assert trace.requests.index.tolist() == [0, 1, 2, 3]
    assert trace.duration_s == 5.0


def test_columns_have_their_declared_types_and_unknown_ones_are_kept() -> None:
    trace = checked(request_id=[7, "b"], arrival_s=["0", 1], colour=["red", None], n_images=[np.int32(2), 1.0])
    frame = trace.requests
    for column in REQUEST_COLUMNS:
        wanted = {"int": np.dtype("int64"), "float": np.dtype("float64")}.get(column.kind, np.dtype(object))
        assert frame[column.name].dtype == wanted, column.name
    assert frame["request_id"].tolist() == ["7", "b"]
    assert frame["n_images"].tolist() == [2, 1]
    assert frame["colour"].tolist() == ["red", None]
    assert frame["lora_ids"].map(type).eq(tuple).all()


def test_a_column_that_reads_like_a_misspelt_one_is_pointed_out() -> None:
    trace = checked(request_id=["a"], arrival_s=[0], n_step=[30])
    assert trace.provenance.notes == (
        "column 'n_step' is not one of ours and was kept unused; n_steps got its default",
    )


def test_text_of_any_storage_is_the_same() -> None:
    columns = {"request_id": ["a", "b"], "arrival_s": ["0", "1"], "lora_ids": ['["x"]', None], "colour": ["red", None]}
    traces = [
        checked_frame(pd.DataFrame(columns, dtype=dtype), "t", Provenance("test"))
        for dtype in (object, "str", "string")
    ]
    assert traces[0].requests["lora_ids"].tolist() == [("x",), ()]
    for trace in traces[1:]:
        pd.testing.assert_frame_equal(trace.requests, traces[0].requests, check_exact=True)
        assert trace.provenance == traces[0].provenance


def test_a_truth_value_is_no_weight_even_beside_an_equal_number() -> None:
    with pytest.raises(InputError, match=r"row 2 column lora_scales: got \[True\]"):
        checked(request_id=["a", "b"], arrival_s=[0, 1], lora_ids=[["x"], ["x"]], lora_scales=[[1.0], [True]])
