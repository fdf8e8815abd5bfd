"""What one use of an add-on costs: from records of an engine, never guessed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from engine.registry.usage import ServedRequest, cost_per_use, read_served
from traces.problems import InputError
from traces.records import REQUEST_RECORD_COLUMNS, WORKER_INTERVAL_COLUMNS
from traces.writer import write_table

LIKE = ("default", 1, 30)


def served(
    denoise_s: float, nets: str = "", loras: str = "", load_s: float = 0.0, wait_s: float = 0.0, n_gpus: int = 1
) -> ServedRequest:
    return ServedRequest(tuple(nets.split()), tuple(loras.split()), LIKE, load_s, wait_s, denoise_s, n_gpus)


PLAIN = [served(2.0), served(2.0), served(2.1)]  # median 2.0


def test_a_use_costs_its_waiting_and_the_steps_beyond_those_of_plain_requests() -> None:
    costs = cost_per_use([*PLAIN, served(2.5, "canny", load_s=0.4), served(2.7, "canny")])
    assert costs["canny"].n_uses == 2
    assert costs["canny"].wait_s == pytest.approx(0.2)  # (0.4 + 0) / 2
    assert costs["canny"].steps_s == pytest.approx(0.6)  # (0.5 + 0.7) / 2
    assert costs["canny"].gpu_s == pytest.approx(0.8)
    assert costs["canny"].gpu_s_standard_error == pytest.approx(0.1)  # of 0.9 and 0.7: half their distance
    assert costs["canny"].cost_usd(3.6) == pytest.approx(0.0008)  # 3.6 USD an hour is 0.001 USD a second


def test_add_ons_of_one_request_share_what_it_cost_and_a_lora_beside_controlnets_no_steps() -> None:
    costs = cost_per_use([*PLAIN, served(3.0, "canny depth", "ink", load_s=0.2, wait_s=0.5)])
    assert {name: cost.steps_s for name, cost in costs.items()} == {"canny": 0.5, "depth": 0.5, "ink": 0.0}
    assert {name: cost.wait_s for name, cost in costs.items()} == {"canny": 0.1, "depth": 0.1, "ink": 0.5}
    # nothing is counted twice or lost
    assert sum(cost.gpu_s or 0.0 for cost in costs.values()) == pytest.approx(1.0 + 0.2 + 0.5)


def test_two_gpus_cost_twice() -> None:
    costs = cost_per_use([*PLAIN, served(2.5, "canny", n_gpus=2)])
    assert costs["canny"].gpu_s == pytest.approx(1.0)


def test_without_enough_plain_requests_of_the_same_shape_the_cost_is_not_known() -> None:
    cost = cost_per_use([*PLAIN[:2], served(2.5, loras="ink", wait_s=0.3)])["ink"]
    assert (cost.wait_s, cost.steps_s, cost.n_compared, cost.gpu_s, cost.cost_usd(3.6)) == (0.3, None, 0, None, None)


def replay_folder(folder: Path) -> Path:
    folder.mkdir()
    ink = "1" * 64
    rows = [("p1", [], 2.0), ("p2", [], 2.0), ("p3", [], 2.0), ("u1", [ink], 2.2), ("lost", [ink], 0.0)]
    asked = pd.DataFrame(
        {
            "request_id": [row[0] for row in rows],
            "arrival_s": [float(i) for i in range(5)],
            "lora_ids": [row[1] for row in rows],
        }
    )
    asked.to_parquet(folder / "trace.parquet")
    records = pd.DataFrame(
        {
            "request_id": [row[0] for row in rows], "arrival_s": [float(i) for i in range(5)],
            "status": ["done"] * 4 + ["failed"], "worker_id": "base-0", "end_s": [9.0] * 5,
            "lora_wait_s": [0.0, 0.0, 0.0, 0.1, 0.0], "denoise_s": [row[2] for row in rows],
        }
    )  # fmt: skip
    write_table(records, REQUEST_RECORD_COLUMNS, folder / "requests.parquet")
    worker = {
        "worker_id": "base-0",
        "pool": "base",
        "role": "base",
        "n_gpus": 2,
        "state": "idle",
        "start_s": 0.0,
        "end_s": 9.0,
    }
    write_table(pd.DataFrame([worker]), WORKER_INTERVAL_COLUMNS, folder / "workers.parquet")
    return folder


def test_a_replays_folder_is_read_and_what_was_not_done_does_not_count(tmp_path: Path) -> None:
    cost = cost_per_use(read_served(replay_folder(tmp_path / "replayed")))["1" * 64]
    assert cost.n_uses == 1
    assert cost.gpu_s == pytest.approx((0.1 + 0.2) * 2)


def test_tables_of_two_replays_are_refused(tmp_path: Path) -> None:
    folder = replay_folder(tmp_path / "replayed")
    pd.DataFrame({"request_id": ["other"], "arrival_s": [0.0]}).to_parquet(folder / "trace.parquet")
    with pytest.raises(InputError, match=r"has 4 requests that trace\.parquet lacks"):
        read_served(folder)


def log_line(add_on: str = "", denoise_s: float = 2.0, **more: object) -> str:
    job = {
        "base_model_id": "default", "n_images": 1, "n_steps": 8, "width_px": 64, "height_px": 64, "guidance_scale": 5.0,
        "controlnet_ids": [], "lora_ids": [add_on] if add_on else [],
    }  # fmt: skip
    stages = {"controlnet_load_s": 0.0, "lora_wait_s": 0.1 if add_on else 0.0, "denoise_s": denoise_s}
    return json.dumps({"http_status": 200, "engine": "main", "job": job, "stages": stages, **more})


def test_show_takes_a_request_log_and_gives_dollars(enter: Callable, addons: Callable, tmp_path: Path) -> None:
    ink = json.loads(enter(1, "--json").out)["id"]
    log = tmp_path / "requests.jsonl"
    refusal = json.dumps({"http_status": 404, "code": "not_found"})
    torn = log_line(ink, 99.0)[:-5]
    log.write_text("\n".join([*[log_line()] * 3, log_line(ink, 2.3), refusal, torn]))
    row = json.loads(addons("show", "--usage", log, "--price", 3.6, "--json").out)[0]
    assert row["use"]["n_uses"] == 1
    assert row["use"]["cost_usd"] == pytest.approx(0.0004)  # 0.1 s of waiting and 0.3 s of steps at 0.001 USD a second
    assert (
        addons("show", "--usage", log, "--price", 3.6)
        .out.splitlines()[1]
        .endswith("1     0.1     0.3      0.4    –  0.0004")
    )


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("not json", "line 2: is no line of a request log"),
        ("[" * 100_000, "line 2: is no line of a request log"),
        ('{"a": 1}', "line 2: is no line of a request log"),
        (log_line(denoise_s=math.nan), "line 2: has denoise_s nan"),
        (log_line(denoise_s=-1.0), "line 2: has denoise_s -1.0"),
        (log_line("a\nb"), "line 2: has lora_ids"),
        (log_line(job=[]), "line 2: has stages but no job"),
        ("x" * (2**20 + 5), "line 2: is no line of a request log"),
    ],
    ids=lambda value: value[:20],
)
def test_a_log_that_lies_is_refused_by_line(tmp_path: Path, line: str, reason: str) -> None:
    log = tmp_path / "requests.jsonl"
    log.write_text(f"{log_line()}\n{line}\n")
    with pytest.raises(InputError, match=reason):
        read_served(log)
