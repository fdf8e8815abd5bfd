"""A real Prometheus scrapes a real engine (numpy workers); what is read back from both agrees with what was sent."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("aiohttp", reason="the serving engine needs aiohttp")

from planner.observe.ask import ObserveQuestion, observe, observed_summary
from planner.observe.prometheus_http import samples, server_of
from planner.observe.run_folder import read_observed
from traces.problems import InputError
from traces.reader import read_trace

PROMETHEUS = shutil.which("prometheus")
pytestmark = pytest.mark.skipif(PROMETHEUS is None, reason="Debian's package prometheus is not installed")
START_S = 60.0
N_REQUESTS = 24
SCRAPE_S = 0.5


@dataclass(frozen=True, slots=True)
class Rig:
    """An engine and the Prometheus that scrapes it; everything was sent and scraped."""

    folder: Path
    prometheus: str
    process: subprocess.Popen[bytes]


def wait_until(is_so: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + START_S
    while not is_so():
        assert time.monotonic() < until, what
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    folder = tmp_path_factory.mktemp("rig")
    with contextlib.ExitStack() as stack:

        def start(name: str, *command: str) -> subprocess.Popen[bytes]:
            said = stack.enter_context((folder / f"{name}.txt").open("wb"))
            process = subprocess.Popen(command, cwd=folder, stdout=said, stderr=said)
            stack.callback(process.wait, 20)
            stack.callback(process.kill)
            return process

        start(
            "engine", sys.executable, "-m", "planner", "engine", "serve", "--model", "featherweight", "--devices", "cpu",
            "--listen", "127.0.0.1:0", "--log", "log.jsonl",
        )  # fmt: skip
        said = folder / "engine.txt"
        wait_until(lambda: "ready on" in said.read_text(encoding="utf-8"), "the engine did not start")
        address = re.search(r"ready on http://(127\.0\.0\.1:\d+)", said.read_text(encoding="utf-8"))
        assert address is not None
        target = {"job_name": "diffplan", "static_configs": [{"targets": [address[1]]}]}
        timing = {"scrape_interval": f"{SCRAPE_S * 1000:g}ms", "scrape_timeout": f"{SCRAPE_S * 1000:g}ms"}
        (folder / "prometheus.yml").write_text(
            json.dumps({"global": timing, "scrape_configs": [target]})
        )  # JSON is YAML
        url = f"http://127.0.0.1:{free_port()}"
        process = start(
            "prometheus", str(PROMETHEUS), "--config.file=prometheus.yml", "--storage.tsdb.path=data", "--log.level=warn",
            f"--web.listen-address={url.removeprefix('http://')}",
        )  # fmt: skip
        server = server_of(url, 10.0)

        def last(metric: str) -> tuple[int, float]:
            try:
                found = samples(server, f"{metric}[60s]", time.time())
            except InputError:
                return 0, 0.0
            return sum(len(each.at_s) for each in found), sum(float(each.value[-1]) for each in found)

        wait_until(lambda: last("diffplan_http_open_requests")[0] >= 2, "Prometheus did not scrape the engine")
        for k in range(N_REQUESTS):
            loras = [{"id": "ink", "scale": 0.5}] if k % 2 else []
            body = json.dumps({"prompt": "x", "n": 1 + k % 3, "size": "64x64", "steps": 4, "seed": k, "loras": loras})
            request = urllib.request.Request(
                f"http://{address[1]}/v1/images/generations", body.encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
                assert answer.status == 200
        wait_until(lambda: last("diffplan_images_total")[1] == 2 * N_REQUESTS, "Prometheus did not scrape the end")
        yield Rig(folder, url, process)


def test_counters_say_what_was_sent(rig: Rig) -> None:
    summary = observed_summary(ObserveQuestion(rig.prometheus, minutes=2.0, window_s=5.0, match='job="diffplan"'))
    rows = summary.windows
    assert sum(row.n_done for row in rows) == N_REQUESTS
    assert sum(row.n_offered for row in rows) == N_REQUESTS
    assert sum(row.n_images for row in rows) == 2 * N_REQUESTS  # 1, 2, 3, 1, 2, 3, …
    assert sum(row.n_uses["lora"] for row in rows) == N_REQUESTS / 2
    assert (summary.n_targets, summary.n_counter_resets) == (1, 0)
    assert summary.scrape_interval_s == pytest.approx(SCRAPE_S, rel=0.5)  # Prometheus is on time; its host may be busy


def test_records_and_counters_of_the_same_engine_agree(rig: Rig) -> None:
    observed = read_observed(rig.folder / "engine-run")
    rows = observed_summary(ObserveQuestion(rig.prometheus, minutes=2.0, window_s=5.0)).windows
    assert len(observed.requests) == sum(row.n_done for row in rows) == N_REQUESTS
    # text and denoising are the worker's own clock in both; decoding in records also holds what no stage counted
    for stage in ("text", "denoise"):
        total_s = sum(row.stage_sum_s[stage] for row in rows)
        assert total_s == pytest.approx(float(observed.requests[f"{stage}_s"].sum()), rel=1e-6)


def test_the_log_gives_a_trace_of_what_was_sent(rig: Rig, tmp_path: Path) -> None:
    observe(ObserveQuestion(str(rig.folder / "engine-run"), rig.folder / "log.jsonl"), tmp_path)
    requests = list(read_trace(tmp_path / "trace.parquet"))
    assert [request.n_images for request in requests] == [1 + k % 3 for k in range(N_REQUESTS)]
    assert sum(len(request.lora_ids) for request in requests) == N_REQUESTS / 2
    assert {request.width_px for request in requests} == {64}


def test_a_selection_that_matches_nothing_and_one_that_is_no_selection_get_sentences(rig: Rig, tmp_path: Path) -> None:
    for match, said in (('job="other"', "has no scrapes"), ('job="', "HTTP 400")):
        with pytest.raises(InputError, match=said):
            observe(ObserveQuestion(rig.prometheus, minutes=1.0, match=match), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_prometheus_that_goes_down_gets_a_sentence(rig: Rig, tmp_path: Path) -> None:
    rig.process.kill()
    rig.process.wait(20)
    with pytest.raises(InputError, match="cannot be reached"):
        observe(ObserveQuestion(rig.prometheus, minutes=1.0), tmp_path / "out")
    assert not (tmp_path / "out").exists()
