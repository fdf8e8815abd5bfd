"""Any CSV by a map of its columns: times, lists, and the mistakes people make."""

from __future__ import annotations

from pathlib import Path

import pytest

from traces.importers.columns import ColumnOptions, import_columns, parse_mapping
from traces.problems import InputError

MAP = {"arrival_s": "TIME", "n_steps": "steps"}


@pytest.fixture
def csv(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "log.csv"
        path.write_text(text)
        return path

    return write


def arrivals(path: Path, **options) -> list[float]:
    return import_columns(path, {"arrival_s": "TIME"}, ColumnOptions(**options)).requests["arrival_s"].tolist()


def test_columns_are_renamed_kept_and_counted(csv) -> None:
    trace = import_columns(csv("TIME,steps,n_images,colour\n1.5,30,2,red\n0.5,,1,blue\n"), MAP)
    assert trace.requests["request_id"].tolist() == ["row-2", "row-1"]
    assert trace.requests["n_steps"].tolist() == [50, 30]
    assert trace.requests["n_images"].tolist() == [1, 2]
    assert trace.requests["colour"].tolist() == ["blue", "red"]
    assert "TIME" not in trace.requests.columns
    assert trace.provenance.defaults["request_id=row-N"] == 2
    assert trace.provenance.defaults["n_steps=50"] == 1
    assert trace.provenance.notes[0] == "columns mapped: arrival_s=TIME, n_steps=steps"


def test_one_source_may_feed_two_columns(csv) -> None:
    trace = import_columns(csv("TIME,side\n0,512\n"), {"arrival_s": "TIME", "width_px": "side", "height_px": "side"})
    assert trace.requests[["width_px", "height_px"]].to_numpy().tolist() == [[512, 512]]


@pytest.mark.parametrize(
    ("cells", "options", "seconds"),
    [
        (("10", "12.5"), {}, [10.0, 12.5]),
        (("2026-03-01 12:00:00", "2026-03-01 12:00:01.25"), {}, [0.0, 1.25]),
        (("2026-03-01T12:00:00Z", "2026-03-01T14:00:00+01:00"), {}, [0.0, 3600.0]),
        # The clocks of Berlin go from 2 to 3 o'clock on 2026-03-29.
        (("2026-03-29 01:59:59", "2026-03-29 03:00:00"), {"timezone": "Europe/Berlin"}, [0.0, 1.0]),
        (("1772366400", "1772366460.5"), {"time_format": "epoch_s"}, [0.0, 60.5]),
        (("1772366400000", "1772366460500"), {"time_format": "epoch_ms"}, [0.0, 60.5]),
        (("2026-03-02", "2026-03-01"), {}, [0.0, 86_400.0]),
    ],
)
def test_times_of_every_form_become_seconds(csv, cells, options, seconds) -> None:
    assert arrivals(csv("TIME\n" + "\n".join(cells) + "\n"), **options) == seconds


def test_lists_come_separated_or_as_json(csv) -> None:
    path = csv('TIME,l,s\n0,x; y,1;0.5\n1,"[""z""]",[2]\n2,,\n')
    mapping = {"arrival_s": "TIME", "lora_ids": "l", "lora_scales": "s"}
    trace = import_columns(path, mapping, ColumnOptions(list_separator=";"))
    assert trace.requests["lora_ids"].tolist() == [("x", "y"), ("z",), ()]
    assert trace.requests["lora_scales"].tolist() == [(1.0, 0.5), (2.0,), ()]
    with pytest.raises(InputError, match="row 1 column lora_ids: got 'x; y'"):
        import_columns(path, mapping)


@pytest.mark.parametrize(
    ("text", "mapping", "options", "sentence"),
    [
        ("TIME\n0\n", {"arrival_s": "TIMES"}, {}, "has no column 'TIMES', needs one of its columns: TIME"),
        ("TIME\n0\n", {"arival_s": "TIME"}, {}, "'arival_s' is not one of our columns"),
        ("TIME\n0\n", {"arival_s": "TIME"}, {}, "Did you mean arrival_s?"),
        ("TIME\n0\n", {"n_steps": "TIME"}, {}, "Add --map arrival_s=COLUMN"),
        ("TIME,arrival_s\n0,1\n", {"arrival_s": "TIME"}, {}, "has a column arrival_s of its own beside 'TIME'"),
        ("TIME\n1772366400\n", {"arrival_s": "TIME"}, {}, "Say --time epoch_s or --time epoch_ms"),
        ("TIME\nsoon\n2026-03-01\n", {"arrival_s": "TIME"}, {}, "log.csv row 1 column arrival_s: got 'soon'"),
        ("TIME\n2026-03-01\n2026-03-01T00:00Z\n", {"arrival_s": "TIME"}, {}, "with and without a time zone"),
        ("TIME\n5\nx\n", {"arrival_s": "TIME"}, {"time_format": "seconds"}, "row 2 column arrival_s: got 'x'"),
        ("TIME\n5\n-1\n", {"arrival_s": "TIME"}, {}, "row 2 column arrival_s: got '-1'"),
        ("TIME\n5\nnan\n6\n", {"arrival_s": "TIME"}, {}, "row 2 column arrival_s: got 'nan', needs a finite number"),
        ("TIME;steps\n0;30\n", {}, {}, "Separate its columns by commas, not by ';'"),
        ("TIME,l\n5,\n,x\n", {"arrival_s": "TIME"}, {"time_format": "epoch_s"}, "row 2 column arrival_s: is empty"),
        ("TIME\n5\n", {"arrival_s": "TIME"}, {"timezone": "Mars/Olympus"}, "time zone: got 'Mars/Olympus'"),
        ("TIME\n5\n", {"arrival_s": "TIME"}, {"time_format": "days"}, "time format: got 'days'"),
        ("TIME,l,s\n5,x,much\n", {"arrival_s": "TIME", "lora_ids": "l", "lora_scales": "s"}, {"list_separator": ";"}, "lora_scales: got ['much']"),
    ],
)  # fmt: skip
def test_a_mistake_is_refused_with_its_place(csv, text, mapping, options, sentence) -> None:
    with pytest.raises(InputError) as caught:
        import_columns(csv(text), mapping, ColumnOptions(**options))
    assert sentence in str(caught.value)


def test_a_map_is_parsed_or_refused() -> None:
    assert parse_mapping(["arrival_s=T S", "n_steps = steps"]) == {"arrival_s": "T S", "n_steps": "steps"}
    with pytest.raises(InputError) as caught:
        parse_mapping(["arrival_s", "=x", "n_steps=a", "n_steps=b"])
    assert len(caught.value.problems) == 3
