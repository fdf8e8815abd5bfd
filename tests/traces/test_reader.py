"""Files in, traces out; malformed files are refused by name and place; what is written reads back the same."""

from __future__ import annotations

import errno
import gzip
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from traces.files import ReadLimits
from traces.frame import checked_frame
from traces.problems import InputError
from traces.reader import read_table, read_trace
from traces.records import REQUEST_RECORD_COLUMNS
from traces.trace import Provenance
from traces.writer import write_table, write_trace

GOOD_CSV = 'request_id,arrival_s,lora_ids,colour\na,0.5,"[""x"", ""y""]",red\nb,0.25,,\n'

MALFORMED: list[tuple[str, str, bytes, str]] = [
    ("an unknown kind of file", "t.xlsx", b"x", "t.xlsx: got a file name ending in '.xlsx'"),
    ("an empty file", "t.csv", b"", "is empty (0 bytes)"),
    ("a header alone", "t.csv", b"request_id,arrival_s\n", "t.csv: has no requests"),
    ("a blank header", "t.csv", b"\n1,2\n", "has no header"),
    ("a name twice", "t.csv", b"request_id,arrival_s,arrival_s\na,1,2\n", "has the column 'arrival_s' more than once"),
    (
        "a row too short",
        "t.csv",
        b"request_id,arrival_s\na,1\nb\n",
        "t.csv row 2 column 2: has 1 cells, the header has 2",
    ),
    ("a row too long", "t.csv", b"request_id,arrival_s\na,1,9\n", "t.csv row 1 column 3: has 3 cells"),
    ("an open quote", "t.csv", b'request_id,arrival_s\n"a,1\n', "t.csv: line 2 is not CSV"),
    ("not UTF-8", "t.csv", b"request_id,arrival_s\n\xe9,1\n", "t.csv line 2: byte 0xe9 is not UTF-8"),
    ("NaN in words", "t.csv", b"request_id,arrival_s\na,nan\n", "t.csv row 1 column arrival_s: got 'nan'"),
    ("no gzip", "t.csv.gz", b"request_id,arrival_s\na,1\n", "is not a whole gzip file"),
    ("half a gzip", "t.csv.gz", gzip.compress(GOOD_CSV.encode())[:-12], "is not a whole gzip file"),
    ("a broken line", "t.jsonl", b'{"request_id": "a", "arrival_s": 1}\n{"request_id"\n', "t.jsonl line 2 column"),
    ("a list for a line", "t.jsonl", b"[1]\n", "t.jsonl line 1 column (the whole line): got '[1]'"),
    ("a key twice", "t.jsonl", b'{"request_id": "a", "request_id": "b", "arrival_s": 1}\n', "a key is there twice"),
    (
        "a NaN arrival",
        "t.jsonl",
        b'{"request_id": "a", "arrival_s": NaN}\n',
        "t.jsonl line 1 column arrival_s: got nan",
    ),
    ("deep nesting", "t.jsonl", b"[" * 100_000 + b"\n", "t.jsonl line 1"),
    ("no Parquet", "t.parquet", b"PAR1 is not enough", "t.parquet: is not a readable Parquet file"),
]


@pytest.mark.parametrize(
    ("name", "content", "sentence"), [case[1:] for case in MALFORMED], ids=[c[0] for c in MALFORMED]
)
def test_a_malformed_file_is_refused(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_trace(tmp_path / name)
    assert sentence in str(caught.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_trace(tmp_path / "t.csv")
    (tmp_path / "d.csv").mkdir()
    with pytest.raises(InputError, match="is not a file"):
        read_trace(tmp_path / "d.csv")


def test_an_unknown_sample_is_refused_with_a_suggestion() -> None:
    with pytest.raises(InputError, match="Did you mean katz_a_hour"):
        read_trace("sample:katz_a_our")


@pytest.mark.parametrize(
    ("limits", "sentence"),
    [
        (ReadLimits(file_bytes=10), "at most 10 bytes"),
        (ReadLimits(decompressed_bytes=20), "too large once decompressed"),
        (ReadLimits(rows=1), "at most 1"),
    ],
)
def test_a_file_over_the_limits_is_refused(tmp_path: Path, limits: ReadLimits, sentence: str) -> None:
    path = tmp_path / "t.csv.gz"
    path.write_bytes(gzip.compress(GOOD_CSV.encode()))
    with pytest.raises(InputError, match=sentence):
        read_trace(path, limits)


def test_a_parquet_over_the_limits_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"request_id": ["a", "b"], "arrival_s": [0.0, 1.0]}), path)
    with pytest.raises(InputError, match="has 2 rows, needs at most 1 rows"):
        read_trace(path, ReadLimits(rows=1))
    with pytest.raises(InputError, match="once decompressed"):
        read_trace(path, ReadLimits(decompressed_bytes=8))


def test_parquet_tells_null_from_nan(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    steps = pa.array([30.0, None, float("nan")])
    pq.write_table(pa.table({"request_id": ["a", "b", "c"], "arrival_s": [0.0, 1.0, 2.0], "n_steps": steps}), path)
    with pytest.raises(InputError) as caught:
        read_trace(path)
    assert [str(problem.where) for problem in caught.value.problems] == ["t.parquet row 3 column n_steps"]


def test_damaged_parquet_is_refused_or_read_but_never_crashes(tmp_path: Path, make_trace) -> None:
    path = write_trace(make_trace(arrival_s=[0, 1, 2], lora_ids=[["xyz"], [], ["é"]]), tmp_path / "t.parquet")
    whole = path.read_bytes()
    n_refused = 0
    for place in range(0, len(whole), 13):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            read_trace(path)
        except InputError:
            n_refused += 1
    assert n_refused > len(whole) // 26  # most damage shows; what does not is padding and statistics


def test_foreign_provenance_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    table = pa.table({"request_id": ["a"], "arrival_s": [0.0]})
    pq.write_table(table.replace_schema_metadata({b"diffplan": b'{"table": "trace", "provenance": 3}'}), path)
    with pytest.raises(InputError, match="metadata 'diffplan': cannot be understood"):
        read_trace(path)


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "t.jsonl", "t.jsonl.gz", "t.parquet"])
def test_every_format_gives_the_same_trace(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    lines = '{"request_id": "a", "arrival_s": 0.5, "lora_ids": ["x", "y"], "colour": "red"}\n{"request_id": "b", "arrival_s": 0.25}\n'
    if name == "t.parquet":
        columns = {
            "request_id": ["a", "b"],
            "arrival_s": [0.5, 0.25],
            "lora_ids": [["x", "y"], None],
            "colour": ["red", None],
        }
        pq.write_table(pa.table(columns), path)
    else:
        text = (GOOD_CSV if "csv" in name else lines).encode()
        path.write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    trace = read_trace(path)
    assert [(r.request_id, r.arrival_s, r.lora_ids, r.lora_scales) for r in trace] == [
        ("b", 0.25, (), ()),
        ("a", 0.5, ("x", "y"), (1.0, 1.0)),
    ]
    assert trace.requests["colour"].tolist() == [None, "red"]
    assert trace.provenance.defaults["lora_scales=1"] == 1


names = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\x00"), min_size=1, max_size=8)
rows = st.fixed_dictionaries(
    {
        "arrival_s": st.floats(0, 1e9),
        "n_steps": st.integers(1, 1000),
        "guidance_scale": st.floats(0, 100),
        "controlnet_ids": st.lists(names, max_size=3).map(tuple),
        "lora_ids": st.lists(names, max_size=3).map(tuple),
        "tenant_id": st.one_of(st.just(""), names),
        "priority": st.integers(-100, 100),
        "deadline_s": st.one_of(st.none(), st.floats(0, 1e6)),
        "colour": st.one_of(st.none(), names),
    }
)


@given(st.lists(rows, min_size=1, max_size=8), st.floats(0, 1e9))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_reads_back_the_same(tmp_path: Path, requests: list[dict], extra_s: float) -> None:
    frame = pd.DataFrame({name: pd.Series([row[name] for row in requests], dtype=object) for name in requests[0]})
    frame["request_id"] = [f"r{row}" for row in range(len(frame))]
    last_s = max(row["arrival_s"] for row in requests)
    trace = checked_frame(frame, "t", Provenance("made", "none", {}, {"gone": 2}, ("é",), 3), last_s + extra_s)
    path = write_trace(trace, tmp_path / "t.parquet")
    again = read_trace(path)
    pd.testing.assert_frame_equal(again.requests, trace.requests, check_exact=True)
    assert again.provenance == trace.provenance
    assert again.duration_s == trace.duration_s
    first_bytes = path.read_bytes()
    assert write_trace(again, path).read_bytes() == first_bytes


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, make_trace) -> None:
    mixed = make_trace(arrival_s=[0, 1], oddity=["a", 3])
    with pytest.raises(InputError, match="column oddity: cannot be written"):
        write_trace(mixed, tmp_path / "t.parquet")
    with pytest.raises(InputError, match=r"ending in \.parquet"):
        write_trace(mixed, tmp_path / "t.csv")
    with pytest.raises(InputError, match="cannot be written"):
        write_trace(make_trace(arrival_s=[0]), tmp_path / "no" / "t.parquet")
    assert list(tmp_path.iterdir()) == []


def test_a_read_only_disk_is_refused_like_any_other_folder(
    tmp_path: Path, make_trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("traces.writer.pq.write_table", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)  # such a disk refuses this too, even for a file that is not there
    with pytest.raises(InputError, match="cannot be written: Read-only file system"):
        write_trace(make_trace(arrival_s=[0]), tmp_path / "t.parquet")


def test_a_log_reads_back_with_defaults_and_extra_columns(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {"request_id": ["a"], "arrival_s": [1.0], "status": ["done"], "end_s": [2.0], "my_column": [4]}
    )
    path = write_table(frame, REQUEST_RECORD_COLUMNS, tmp_path / "requests.parquet", {"seed": 1})
    again = read_table(path, REQUEST_RECORD_COLUMNS)
    assert again.loc[0, "n_steps"] == 50
    assert pd.isna(again.loc[0, "latency_s"])
    assert again.loc[0, "my_column"] == 4
    with pytest.raises(InputError, match=r"row 1 column end_s: got 'late'"):
        write_table(frame.assign(end_s="late"), REQUEST_RECORD_COLUMNS, path)
    with pytest.raises(InputError, match="it describes a 'log', not a trace"):
        read_trace(path)
