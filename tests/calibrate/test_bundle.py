"""The offline kit, and what comes back from it: believed only after every check."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from calibrate.bundle import EPOCH, MANIFEST, Kit, write_bundle, write_result, write_zip
from calibrate.ingest import ingest, read_members
from calibrate.measurement import (
    METADATA_KEY,
    Failure,
    Features,
    Measurement,
    Measurements,
    Session,
    write_measurements,
)
from traces.problems import InputError

FEATURES = Features(forward_batch=2, n_images=1, width_px=64, height_px=64)
SESSION = Session(
    "20261123T010203Z-tiny-cpu1-7", "tiny", "cpu", "2026-11-23T01:02:03+00:00", 5, {"driver": "\x1b[31mred"}, {"a.bytes": 3.0},
    {"steps": 1.5}, (Failure("steps", "it\x1b[2J broke", 1.0),), {"engine steps": 1},
)  # fmt: skip
ROWS = tuple(
    Measurement(SESSION.session, "engine.unet_step", "engine", "", "graph", FEATURES, i, i, 0.5 + i) for i in range(3)
)


@pytest.fixture
def result(tmp_path: Path) -> Path:
    """What a host sends back."""
    run = tmp_path / "run"
    write_measurements(Measurements(ROWS, (SESSION,)), run / "measurements.parquet")
    (tmp_path / "run.log").write_text("block 1 of 1")
    return write_result(run, tmp_path / "run.log")


def test_a_result_is_taken_in_row_by_row(result: Path, tmp_path: Path) -> None:
    taken = ingest(result, tmp_path / "in")
    assert taken.measurements.rows == ROWS
    assert taken.path == tmp_path / "in" / "measurements.parquet"
    with pytest.raises(InputError, match="holds a run already"):
        ingest(result, tmp_path / "in")


def test_what_a_terminal_would_obey_is_taken_out(result: Path, tmp_path: Path) -> None:
    (session,) = ingest(result, tmp_path / "in").measurements.sessions
    assert session.failures[0].error == "it [2J broke"
    assert session.fingerprint["driver"] == " [31mred"


def test_the_same_measurements_pack_to_the_same_bytes(result: Path) -> None:
    before = result.read_bytes()
    assert write_result(result.parent, result.parent.parent / "run.log").read_bytes() == before


Change = Callable[[dict[str, bytes]], None]


def _with(members: dict[str, bytes]) -> Change:
    return lambda files: files.update(members)


def _parquet(change: Callable[[pa.Table], pa.Table]) -> bytes:
    """The good file, changed."""
    with tempfile.TemporaryDirectory() as folder:
        write_measurements(Measurements(ROWS, (SESSION,)), Path(folder) / "m.parquet")
        table = change(pq.read_table(Path(folder) / "m.parquet"))
    stream = io.BytesIO()
    pq.write_table(table, stream)
    return stream.getvalue()


def _forged(tmp_path: Path, parquet: bytes) -> Path:
    """A result whose manifest agrees with whatever is in it: who can write the one can write the other."""
    run = tmp_path / "forged"
    run.mkdir()
    write_measurements(Measurements(ROWS, (SESSION,)), run / "measurements.parquet")
    (run / "measurements.parquet").write_bytes(parquet)
    return write_result(run)


def _session(**changes: object) -> bytes:
    session = dataclasses.asdict(SESSION) | changes
    plain = json.dumps({"schema_version": 1, "sessions": [session]}).encode()
    return _parquet(lambda t: t.replace_schema_metadata({METADATA_KEY: plain}))


def _column(name: str, values: list[object]) -> bytes:
    return _parquet(lambda t: t.set_column(t.column_names.index(name), name, pa.array(values)))


@pytest.mark.parametrize(
    ("parquet", "sentence"),
    [
        (lambda: b"no parquet at all", "is no sound Parquet file"),
        (lambda: _column("value_s", ["a", "b", "c"]), "column value_s: holds string"),
        (lambda: _column("value_s", [1.0, None, 2.0]), "column value_s: has 1 gaps"),
        (lambda: _column("value_s", [1.0, -1.0, 2.0]), "row 2 column value_s"),
        (lambda: _column("value_s", [1.0, float("nan"), 2.0]), "row 2 column value_s"),
        (lambda: _column("value_s", [1.0, 1e9, 2.0]), "row 2: says 1e"),
        (lambda: _column("n_bytes", [1, 2**62, 2]), "row 2: says"),
        (lambda: _column("n_bytes", [1, -2, 2]), "row 2: says"),
        (lambda: _column("quantity", ["engine.unet_step", "../../etc", "\x1b[2J"]), "has characters of no name"),
        (lambda: _column("session", ["x", "x", "x"]), "is not described in the metadata"),
        (lambda: _session(model=["tiny"]), "its model is of another type"),
        (lambda: _session(model="flux"), "is of model 'flux'"),
        (lambda: _session(gpu_kind="a b; rm"), "has characters of no name"),
        (lambda: _session(facts={"a": "many"}), "its facts a is of another type"),
        (lambda: _session(facts={"a": float("inf")}), "its facts a is of another type"),
        (lambda: _session(failures=[{"part": 1, "error": 2, "at_s": "x"}]), "its failures is of another type"),
        (lambda: _session(failures="none"), "cannot be decoded"),
        (lambda: _session(unknown=1), "cannot be decoded"),
        (lambda: _parquet(lambda t: t.replace_schema_metadata({METADATA_KEY: b"[" * 200_000})),
         "cannot be decoded"),
        (lambda: _parquet(lambda t: t.replace_schema_metadata({METADATA_KEY: b"[1]"})),
         "cannot be decoded"),
        (lambda: _parquet(lambda t: t.drop_columns(["mode"])), "column mode: is missing"),
    ],
)  # fmt: skip
def test_measurements_that_cannot_be_are_refused_in_a_sentence(
    tmp_path: Path, parquet: Callable[[], bytes], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence.replace("[", r"\[")):
        ingest(_forged(tmp_path, parquet()), tmp_path / "in")
    assert not (tmp_path / "in").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_with({"../evil": b"x"}), "is unknown"),
        (_with({"/etc/passwd": b"x"}), "is unknown"),
        (_with({"run.log": b"\0" * (3 * 2**20)}), "unpacks to more than 2097152 bytes"),
        (_with({MANIFEST: b"{"}), "cannot be decoded"),
        (_with({MANIFEST: b"[" * 60_000}), "cannot be decoded"),
        (_with({MANIFEST: b'{"format": 1, "kind": "bundle", "sha256": {}}'}), "is of a 'bundle'"),
        (_with({"measurements.parquet": b"PAR1"}), "is not what its manifest says"),
        (lambda files: files.pop("measurements.parquet"), "measurements.parquet: is missing"),
    ],
)
def test_archives_that_are_no_result_are_refused_in_a_sentence(
    result: Path, tmp_path: Path, change: Change, sentence: str
) -> None:
    with zipfile.ZipFile(result) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    change(files)
    write_zip(tmp_path / "changed.zip", files)
    with pytest.raises(InputError, match=sentence):
        ingest(tmp_path / "changed.zip", tmp_path / "in")


def test_a_member_that_is_there_twice_is_refused(result: Path) -> None:
    with zipfile.ZipFile(result, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(zipfile.ZipInfo("measurements.parquet", EPOCH), b"another")
    with pytest.raises(InputError, match="is there twice"):
        read_members(result)


@pytest.mark.parametrize("keep", [0, 10, 200, -30])
def test_a_file_that_was_cut_off_is_refused(result: Path, tmp_path: Path, keep: int) -> None:
    (tmp_path / "cut.zip").write_bytes(result.read_bytes()[:keep])
    with pytest.raises(InputError, match="is no sound zip file"):
        read_members(tmp_path / "cut.zip")


def test_a_kit_is_the_same_bytes_again_and_holds_no_planner(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "one-1.0-py3-none-any.whl").write_bytes(b"wheel")
    kit = Kit(budget_minutes=15)
    write_bundle(kit, tmp_path / "a.zip", tmp_path / "wheels")
    write_bundle(kit, tmp_path / "b.zip", tmp_path / "wheels")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        names = archive.namelist()
        design = json.loads(archive.read("design.json"))
    assert {name.split("/")[1] for name in names if name.startswith("code/")} == {
        "traces",
        "kernels",
        "engine",
        "calibrate",
    }
    assert "wheels/one-1.0-py3-none-any.whl" in names
    assert sum(task["is_held_out"] for task in design["tasks"]) > 10
    with pytest.raises(InputError, match="exists already"):
        write_bundle(kit, tmp_path / "a.zip", None)


def test_a_kit_measures_on_its_own_and_its_result_comes_back(tmp_path: Path) -> None:
    kit = Kit("tiny", "cpu", budget_minutes=10, tuned_batches="", passes="decode:engine")
    write_bundle(kit, tmp_path / "kit.zip", None)
    with zipfile.ZipFile(tmp_path / "kit.zip") as archive:
        archive.extractall(tmp_path / "kit")
    done = subprocess.run(
        ["sh", str(tmp_path / "kit" / "run.sh"), str(tmp_path / "results"), "--inline", "--no-fill"],
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)},
        capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    taken = ingest(tmp_path / "results" / "run" / "result.zip", tmp_path / "in")
    assert {row.quantity for row in taken.measurements.rows} >= {"engine.vae_decode", "engine.text_encode"}
    assert taken.measurements.sessions[0].failures == ()
