"""The GenTD26 importer: on a made-up folder of the same shape everywhere, on the real one where it is at hand."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import pandas as pd
import pytest

from traces.character import describe
from traces.importers import gentd26
from traces.importers.gentd26 import import_gentd26
from traces.problems import InputError

TIMED = """gmt_create,predict_type,predict_status,exec_time_seconds,groupId,prompt_length,negative_prompt_length,num_images_per_prompt,num_inference_steps,checkpoint_model_version_id,num_lora
2024-11-15 16:57:50,TXT_2_IMG,SUCCEED,32.0,G0,63.0,26.0,1.0,30.0,M0,0
2024-11-15 16:57:50,TXT_2_IMG,FAILED,4.0,G1,10.0,,4.0,40.0,M1,2
2024-11-15 17:00:00,IMG_2_IMG,PENDING,0.0,G1,,,,,,0
2024-11-16 16:57:50,TXT_2_IMG,SUCCEED,21.0,G0,54.0,26.0,8.0,30.0,M0,1
"""
LORAS = """[{'modelVersionId': 'x', 'scale': 0.8}, {'modelVersionId': 'y', 'scale': 1}]"""
DETAIL = f"""predict_type,exec_time_seconds,style_type,prompt_length,negative_prompt_length,num_images_per_prompt,num_inference_steps,checkpoint_model_version_id,lora_args
t,9.0,,1.0,1.0,1.0,30.0,zz,[]
t,32.0,,63.0,26.0,1.0,30.0,aa,[]
t,4.0,,10.0,,4.0,40.0,bb,"{LORAS}"
i,0.0,,,,,,,[]
t,21.0,,54.0,26.0,8.0,30.0,aa,"[{{'modelVersionId': 'x', 'scale': 1.0}}]"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The published layout in small: one row of the detail table belongs to no timed request."""
    monkeypatch.setattr(gentd26, "FIRST_DETAIL_ROW", 1)
    (tmp_path / "lora_request_trace.csv").write_text(TIMED)
    (tmp_path / "data_trace_processed.csv.gz").write_bytes(gzip.compress(DETAIL.encode()))
    return tmp_path


def test_requests_are_joined_counted_and_kept_as_demand(folder: Path) -> None:
    trace = import_gentd26(folder)
    assert [
        (r.arrival_s, r.base_model_id, r.n_steps, r.n_images, r.lora_ids, r.lora_scales, r.tenant_id) for r in trace
    ] == [
        (0.0, "M0", 30, 1, (), (), "G0"),
        (0.0, "M1", 40, 4, ("x", "y"), (0.8, 1.0), "G1"),
        (86_400.0, "M0", 30, 8, ("x",), (1.0,), "G0"),
    ]
    assert trace.requests["exec_time_seconds"].tolist() == [32.0, 4.0, 21.0]
    assert trace.requests["predict_status"].tolist() == ["SUCCEED", "FAILED", "SUCCEED"]
    assert trace.provenance.left_out == {"PENDING: the log names no checkpoint, steps and images": 1}
    assert trace.provenance.defaults["width_px=1024"] == 3
    assert "kept as demand although they did not succeed: 1 FAILED" in trace.provenance.notes


def test_requests_that_did_not_succeed_can_be_left_out(folder: Path) -> None:
    trace = import_gentd26(folder, succeeded_only=True)
    assert trace.requests["request_id"].tolist() == ["gentd26-00000", "gentd26-00003"]
    assert sum(trace.provenance.left_out.values()) == 2
    assert trace.provenance.left_out["FAILED: did not succeed"] == 1


def test_the_published_archive_is_read_as_it_is(folder: Path) -> None:
    (folder / "data_trace_processed.csv.gz").unlink()
    with tarfile.open(folder / "data_trace_processed.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("data_trace_processed.csv")
        member.size = len(DETAIL.encode())
        archive.addfile(member, io.BytesIO(DETAIL.encode()))
    assert len(import_gentd26(folder)) == 3


@pytest.mark.parametrize(
    ("file", "old", "new", "sentence"),
    [
        (
            "timed",
            "32.0,G0",
            "33.0,G0",
            "row 1 column exec_time_seconds: got 33, but data_trace_processed.csv.gz row 2 has 32",
        ),
        ("timed", "M1,2", "M1,1", "row 2 column num_lora: got 1, but data_trace_processed.csv.gz lists 2 LoRAs"),
        ("timed", "M1,2", "M0,2", "checkpoint M0 goes with aa, bb"),
        ("timed", "M1,2", ",2", "names a checkpoint in rows where"),
        ("timed", "2024-11-16 16:57:50", "tomorrow", "row 4 column gmt_create: got 'tomorrow'"),
        (
            "timed",
            "2024-11-16 16:57:50",
            "2024-11-14 16:57:50",
            "row 4 column gmt_create: got '2024-11-14 16:57:50', before",
        ),
        ("timed", "63.0", "long", "row 1 column prompt_length: got 'long', needs a number or nothing"),
        ("timed", "groupId", "group", "has no column groupId"),
        ("detail", "t,21.0", "t,x", "data_trace_processed.csv.gz row 5 column exec_time_seconds: got 'x'"),
        ("detail", LORAS, "__import__('os').getpid()", "row 3 column lora_args: got"),
        ("detail", "i,0.0,,,,,,,[]\n", "", "has 3 rows from row 2 on, needs 4, as many as"),
    ],
)
def test_tables_that_do_not_agree_are_refused(folder: Path, file: str, old: str, new: str, sentence: str) -> None:
    text = {"timed": TIMED, "detail": DETAIL}[file]
    assert old in text
    changed = text.replace(old, new, 1)
    if file == "timed":
        (folder / "lora_request_trace.csv").write_text(changed)
    else:
        (folder / "data_trace_processed.csv.gz").write_bytes(gzip.compress(changed.encode()))
    with pytest.raises(InputError) as caught:
        import_gentd26(folder)
    assert sentence in str(caught.value)


def test_a_folder_without_the_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"lora_request_trace\.csv: there is no such file"):
        import_gentd26(tmp_path)
    (tmp_path / "lora_request_trace.csv").write_text(TIMED)
    with pytest.raises(InputError, match="has none of data_trace_processed"):
        import_gentd26(tmp_path)


@pytest.mark.real_traces
def test_the_real_log_has_its_published_character(real_gentd26: Path) -> None:
    trace = import_gentd26(real_gentd26)
    assert len(trace) + sum(trace.provenance.left_out.values()) == 26_823
    assert trace.provenance.left_out == {"PENDING: the log names no checkpoint, steps and images": 25}
    assert "kept as demand although they did not succeed: 398 FAILED, 5 PENDING, 3 PROCESSING" in trace.provenance.notes
    assert len(import_gentd26(real_gentd26, succeeded_only=True)) == 26_823 - 398 - 30 - 3

    found = describe(trace)
    assert (found.loras.popularity.n_uses, found.loras.popularity.n_distinct) == (4858, 389)
    assert round(found.loras.popularity.top_shares[10], 2) == 0.29
    assert round(found.loras.popularity.top_shares[100], 2) == 0.77
    assert found.checkpoints.popularity.n_distinct == 86
    assert round(found.checkpoints.popularity.top_shares[1], 2) == 0.31
    assert round(found.checkpoints.popularity.top_shares[10], 2) == 0.87
    assert round(found.checkpoint_switch_share or 0, 2) == 0.75
    assert round(found.rates.interarrival_cv or 0) == 12
    assert found.rates.slot_median == 9
    assert {images: round(found.images_mix[images], 2) for images in ("1", "4", "8", "2")} == {
        "1": 0.58,
        "4": 0.19,
        "8": 0.15,
        "2": 0.08,
    }
    assert round(found.steps_mix["30"], 2) == 0.91
    assert {number: round(share, 2) for number, share in found.loras.per_request.items() if number < 3} == {
        0: 0.83,
        1: 0.16,
        2: 0.01,
    }
    assert round(float(pd.Series(trace.requests["predict_type"]).eq("TXT_2_IMG").mean()), 2) == 0.91


@pytest.mark.real_traces
def test_loads_of_the_real_log_equal_a_simulated_cache(real_gentd26: Path) -> None:
    trace = import_gentd26(real_gentd26)
    curve = describe(trace, 4).checkpoints.loads
    for size, loads in zip(curve.cache_sizes, curve.loads_per_request, strict=True):
        caches: list[list[str]] = [[], [], [], []]
        n_loads = 0
        for row, model in enumerate(trace.requests["base_model_id"]):
            cache = caches[row % 4]
            if model in cache:
                cache.remove(model)
            else:
                n_loads += 1
                del cache[: max(len(cache) - size + 1, 0)]
            cache.append(model)
        assert loads == n_loads / len(trace)
