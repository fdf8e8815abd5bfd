"""Measurement files: stable bytes, sessions inside, broken ones refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from calibrate.cache import STEM, pack_cache, unpack_cache
from calibrate.measurement import (
    Failure,
    Features,
    Measurement,
    Measurements,
    RowLog,
    Session,
    read_measurements,
    write_measurements,
)
from traces.problems import InputError

PIECE_BYTES = 100_000
SESSION = Session(
    "s", "tiny", "cpu", "2026-11-22T00:00:00+00:00", 0, {"gpu": "cpu"}, failures=(Failure("a", "b", 1.0),)
)


def _log(folder: Path) -> RowLog:
    log = RowLog(folder, "s")
    for value in (0.1, 0.2):
        log.add(
            "engine.unet_step", [value], stack="engine", topology="", mode="eager", features=Features(forward_batch=2)
        )
    log.write_session(SESSION)
    return log


def test_a_finished_run_reads_back_as_it_was_written(tmp_path: Path) -> None:
    log = _log(tmp_path)
    found = read_measurements(log.finish(SESSION))
    assert found.rows == tuple(log.rows)
    assert found.sessions == (SESSION,)
    assert [(row.repetition, row.order) for row in found.rows] == [(0, 0), (1, 1)]


def test_a_run_that_was_cut_short_keeps_its_rows(tmp_path: Path) -> None:
    log = _log(tmp_path)
    with (tmp_path / "measurements.jsonl").open("a") as stream:
        stream.write('{"quantity": "engine.u')  # killed while it wrote
    assert read_measurements(tmp_path).rows == tuple(log.rows)


def test_a_run_that_is_killed_again_and_again_loses_no_row(tmp_path: Path) -> None:
    kept: list[Measurement] = list(_log(tmp_path).rows)
    for name in ("second", "third"):
        before = read_measurements(tmp_path)
        assert list(before.rows) == kept
        log = RowLog(tmp_path, name, before)
        # killed before it had said anything of itself: what was there is there
        assert list(read_measurements(tmp_path).rows) == kept
        log.write_session(dataclasses.replace(SESSION, session=name))
        log.add("engine.vae_decode", [0.3], stack="engine", topology="", mode="eager", features=Features(n_images=1))
        kept += log.rows
    whole = read_measurements(log.finish(dataclasses.replace(SESSION, session="third")))
    assert list(whole.rows) == kept
    assert [session.session for session in whole.sessions] == ["s", "second", "third"]
    assert [path.name for path in tmp_path.iterdir()] == ["measurements.parquet"]


def test_the_same_measurements_give_the_same_file(tmp_path: Path) -> None:
    rows = Measurements(tuple(_log(tmp_path / "run").rows), (SESSION,))
    for name in ("a", "b"):
        write_measurements(rows, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_file_without_its_session_is_refused(tmp_path: Path) -> None:
    pd.DataFrame({"value_s": [1.0]}).to_parquet(tmp_path / "m.parquet")
    with pytest.raises(InputError) as caught:
        read_measurements(tmp_path / "m.parquet")
    assert "column quantity: is missing" in str(caught.value)
    assert "metadata" in str(caught.value)


@pytest.mark.parametrize("value_s", [0.0, -1.0, float("nan"), float("inf")])
def test_a_time_that_cannot_be_is_refused_with_its_row(tmp_path: Path, value_s: float) -> None:
    log = RowLog(tmp_path, "s")
    log.add("engine.unet_step", [0.1, value_s], stack="engine", topology="", mode="eager", features=Features())
    path = log.finish(SESSION)
    with pytest.raises(InputError, match="row 2 column value_s"):
        read_measurements(path)


def test_a_file_that_is_not_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.parquet").write_text("no")
    with pytest.raises(InputError, match="is not Parquet"):
        read_measurements(tmp_path / "m.parquet")


def test_an_absent_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_measurements(tmp_path / "m.parquet")


def test_a_compile_cache_travels_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calibrate.cache.PIECE_BYTES", PIECE_BYTES)
    cache = tmp_path / "cache"
    (cache / "fxgraph").mkdir(parents=True)
    noise = np.random.default_rng(0).bytes(PIECE_BYTES + 10_000)  # random bytes do not compress: two pieces
    (cache / "fxgraph" / "entry").write_bytes(noise)
    (cache / "triton" / "x").mkdir(parents=True)
    (cache / "triton" / "x" / "k.cubin").write_bytes(b"binary")
    (cache / "triton" / "x" / "k.ptx").write_bytes(b"passing")
    pieces = pack_cache(cache, tmp_path / "out")
    assert [path.name for path in pieces] == [f"{STEM}.0", f"{STEM}.1"]
    assert unpack_cache(tmp_path / "out", tmp_path / "restored") == 2
    assert (tmp_path / "restored" / "fxgraph" / "entry").read_bytes() == noise
    pieces[0].unlink()
    with pytest.raises(InputError, match="every piece from 0"):
        unpack_cache(tmp_path / "out", tmp_path / "again")


def test_a_compile_cache_that_is_too_large_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calibrate.cache.PIECE_BYTES", PIECE_BYTES)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "entry").write_bytes(np.random.default_rng(0).bytes(PIECE_BYTES + 10_000))
    with pytest.raises(InputError, match="packs to"):
        pack_cache(tmp_path / "cache", tmp_path / "out", pieces_max=1)
    assert not (tmp_path / "out").exists()
