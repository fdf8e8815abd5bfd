"""Files that visitors bring: good ones are planned with, bad ones get a sentence, and none of them chooses a path."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from streamlit.testing.v1 import AppTest

from dashboards import uploads
from traces.problems import InputError

Open = Callable[..., AppTest]
Words = Callable[[AppTest], str]
SCENARIO = """\
name: uploaded
traffic: {trace: "sample:katz_a_hour"}
slo: {latency_s: 15}
profile: {name: h200}
"""


class File:
    """An uploaded file as Streamlit hands it over."""

    def __init__(self, name: str, content: bytes, size: int | None = None) -> None:
        self.name, self._content, self.size = name, content, len(content) if size is None else size

    def getvalue(self) -> bytes:
        return self._content


def upload(app: AppTest, key: str, name: str, content: bytes) -> AppTest:
    app.file_uploader(key=key).set_value((name, content, "application/octet-stream"))
    return app.run()


def opened(page: Open, **address: str) -> AppTest:
    app = page(**address).run()
    app.selectbox(key="scenario").set_value("upload")
    return app.run()


def test_an_uploaded_scenario_fills_the_fields(page: Open, words: Words) -> None:
    app = opened(page, profile="provisional_profile.json")
    assert "Choose a scenario file" in words(app)
    upload(app, "scenario_file", "mine.yaml", SCENARIO.encode())
    assert not app.exception
    assert app.number_input(key="slo").value == 15.0
    assert "Press Plan" in words(app)
    assert "scenario" not in app.query_params


def test_uploaded_scenario_profile_and_trace_are_planned_together(
    page: Open, words: Words, provisional_profile_path: Path, trace_csv: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dashboards.settings.shipped_profiles", dict)
    app = page(profiles=()).run()
    app.selectbox(key="scenario").set_value("upload")
    app.run()
    text = SCENARIO.replace("sample:katz_a_hour", "/etc/passwd").replace(
        "latency_s: 15", "latency_s: 30, attainment_ratio: 0.9"
    )
    text += "topologies: [colocated]\nsimulation: {replications: 2, warmup_s: 0}\n"
    upload(app, "trace_file", "../../evil trace.csv", trace_csv)
    upload(app, "scenario_file", "mine.yaml", text.encode())
    upload(app, "profile_file", "p.json", provisional_profile_path.read_bytes())
    app.button(key="plan").click()
    app.run()
    assert not app.exception
    assert app.success, words(app)
    record = app.session_state["_last_plan"].record
    assert record.traffic.n_requests == 60
    # names that this code made, without the folder they are kept in
    assert record.traffic.trace.startswith("trace-")
    assert record.ids.profile_name.startswith("profile-")
    assert "evil" not in record.model_dump_json()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "is empty"),
        (b"name: [", "is not YAML"),
        (b"\xff\xfe\x00", "is not UTF-8"),
        (b"- a\n- b\n", "got seq"),
        (b"name: a\nname: b\n", "every key once"),
        (b"name: a\nbogus: 1\n", "bogus: is not a known field"),
        (b"name: !!python/object:os.system x\n", "mine.yaml"),
        (SCENARIO.replace("15", "fast").encode(), "slo.latency_s: got 'fast'"),
        (SCENARIO.replace("sample:katz_a_hour", "/etc/passwd").encode(), "names the file '/etc/passwd'"),
        ((SCENARIO + "prices: {table: /etc/passwd}\n").encode(), "prices.table"),
        ((SCENARIO + "add_ons: {catalogue: ../secret.json}\n").encode(), "add_ons.catalogue"),
        ((SCENARIO + "description: " + "x" * uploads.SCENARIO_BYTES_MAX).encode(), "at most 1,048,576 bytes"),
        (b"a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
         b"d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: [*d,*d,*d,*d,*d,*d,*d,*d,*d]\n", "too many"),
        (b"name: <script>alert(1)</script>\nslo: $x$\n", "got '$x$'"),
    ],
    ids=[
        "empty", "broken", "not-utf8", "list", "twice", "unknown", "tag", "type", "path", "table", "catalogue", "large", "bomb", "markup",
    ],
)  # fmt: skip
def test_a_bad_scenario_gets_a_sentence(page: Open, words: Words, text: bytes, said: str) -> None:
    app = opened(page, profile="provisional_profile.json")
    upload(app, "scenario_file", "mine.yaml", text)
    assert not app.exception
    assert "cannot be planned" in words(app)
    assert said in "\n".join(element.value for element in app.text)
    assert not app.metric


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "is not JSON"),
        (b"[]", "got list, needs a JSON object"),
        (b'{"schema_version": 99, "laws": {"x": {}}}', "x: is not a known law"),
        (b"NaN", "is not JSON"),
        (b"\xff", "is not JSON"),
    ],
)
def test_a_bad_profile_gets_a_sentence_under_its_own_name(page: Open, words: Words, content: bytes, said: str) -> None:
    app = page(profile="provisional_profile.json").run()
    app.selectbox(key="profile").set_value("upload")
    app.run()
    upload(app, "profile_file", "mine.json", content)
    assert not app.exception
    assert said in words(app)
    assert "mine.json" in words(app)
    assert "diffplan-dashboard-" not in words(app)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.csv", b"request_id,arrival_s\nr1,soon\n", "row 1"),
        ("t.csv", b"PAR1aaaaPAR1", "holds Parquet"),
        ("t.parquet", b"request_id,arrival_s\n", "does not hold Parquet"),
        ("t.parquet", b"PAR1aaaaPAR1", "is not a readable Parquet file"),
        ("t.jsonl", b"{]", "is not JSON"),
        ("t.csv", b"\xff\xff", "is not UTF-8"),
    ],
)
def test_a_bad_trace_gets_a_sentence_under_its_own_name(
    page: Open, words: Words, name: str, content: bytes, said: str
) -> None:
    app = page(profile="provisional_profile.json").run()
    upload(app, "trace_file", name, content)
    assert not app.exception
    assert said in words(app)
    assert name in words(app)
    assert "diffplan-dashboard-" not in words(app)


def test_a_file_that_is_too_large_is_not_even_read() -> None:
    class Unreadable(File):
        def getvalue(self) -> bytes:
            raise AssertionError("was read")

    with pytest.raises(InputError, match=r"has 67,108,865 bytes, needs at most 67,108,864 bytes"):
        uploads.keep_trace(Unreadable("t.csv", b"", size=uploads.TRACE_LIMITS.file_bytes + 1), Path())
    with pytest.raises(InputError, match="at most"):
        uploads.keep_profile(Unreadable("p.json", b"", size=uploads.PROFILE_BYTES_MAX + 1), Path())


def test_a_parquet_that_unpacks_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = io.BytesIO()
    pd.DataFrame({"request_id": ["r"] * 20_000, "arrival_s": [0.0] * 20_000}).to_parquet(packed)
    small = uploads.ReadLimits(file_bytes=2**20, decompressed_bytes=2**20, rows=10_000)
    monkeypatch.setattr(uploads, "TRACE_LIMITS", small)
    with pytest.raises(InputError, match="has 20000 rows, needs at most 10000 rows"):
        uploads.keep_trace(File("t.parquet", packed.getvalue()), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["../../x.csv", "..\\..\\x.csv", "/etc/cron.d/x.csv", "x\x00\n.csv"])
def test_the_name_of_an_upload_never_becomes_a_path(tmp_path: Path, trace_csv: bytes, name: str) -> None:
    folder = tmp_path / "session"
    folder.mkdir()
    kept = uploads.keep_trace(File(name, trace_csv), folder)
    assert [path.name for path in folder.iterdir()] == [kept]
    assert kept.startswith("trace-")
    assert uploads.shown_name(File(name, b"")) == "x.csv"


def test_a_bad_upload_does_not_undo_what_was_changed_before(page: Open) -> None:
    app = page(profile="provisional_profile.json").run()
    app.number_input(key="slo").set_value(7.0)
    app.number_input(key="price").set_value(1.5)
    app.run()
    upload(app, "trace_file", "t.csv", b"nonsense\n")
    assert app.error
    app.file_uploader(key="trace_file").set_value(None)
    app.run()
    assert not app.error
    assert (app.number_input(key="slo").value, app.number_input(key="price").value) == (7.0, 1.5)
