"""From a running engine back to a plan: what was sent, what records and a real Prometheus say of it, and the plan for what was seen.

    python benchmarks/round_trip.py [--requests 60] [--per-second 0.5]

Starts ``diffplan engine serve --model tiny`` on the CPU and Debian's ``prometheus`` beside it, sends requests at Poisson times through
the HTTP API, reads both back with ``diffplan observe``, plans for the observed trace with the shipped profile, and exports that plan.
Images are the tiny model's 64x64, far below what the profile was measured for: the plan extrapolates and says so. What is shown is that
nothing is lost on the way, not how many GPUs anybody needs. Writes ``benchmarks/results/round_trip.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
START_S = 120.0
ANSWER_S = 120.0
SCENARIO = """name: round_trip
traffic:
  trace: seen/trace.parquet
slo:
  latency_s: 12
  attainment_ratio: 0.95
profile:
  name: h200
  extrapolate: true
"""


def diffplan(folder: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "planner", *words], cwd=folder, capture_output=True, text=True, timeout=600, check=False
    )
    if done.returncode:
        raise SystemExit(f"diffplan {' '.join(words)}: exit code {done.returncode}\n{done.stderr}")
    return done.stdout


def wait_for(path: Path, text: str) -> str:
    until = time.monotonic() + START_S
    while text not in path.read_text(encoding="utf-8"):
        if time.monotonic() > until:
            raise SystemExit(f"{path.name} does not say {text!r}:\n{path.read_text(encoding='utf-8')[-2000:]}")
        time.sleep(0.2)
    return path.read_text(encoding="utf-8")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def send(address: str, n_requests: int, per_second: float) -> list[dict[str, Any]]:
    """Sends at Poisson times, waits for every answer; one row a request as its client saw it."""
    random = np.random.default_rng(8)
    at_s = np.cumsum(random.exponential(1 / per_second, n_requests))
    rows: list[dict[str, Any]] = [{} for _ in range(n_requests)]

    def one(k: int) -> None:
        n_images = 1 + k % 2
        loras = [{"id": "ink", "scale": 0.5}] if k % 3 == 0 else []
        body = {"prompt": "x", "n": n_images, "size": "64x64", "steps": 4, "seed": k, "loras": loras}
        request = urllib.request.Request(
            f"http://{address}/v1/images/generations",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        begun = time.monotonic()
        with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:  # noqa: S310 - loopback
            answer.read()
            rows[k] = {"n_images": n_images, "n_loras": len(loras), "latency_s": time.monotonic() - begun}

    threads = []
    begin = time.monotonic()
    for k in range(n_requests):
        time.sleep(max(0.0, begin + float(at_s[k]) - time.monotonic()))
        threads.append(threading.Thread(target=one, args=(k,)))
        threads[-1].start()
    for thread in threads:
        thread.join(ANSWER_S + 10)
    if not all(rows):
        raise SystemExit(f"{sum(not row for row in rows)} requests were not answered")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--per-second", type=float, default=0.5)
    arguments = parser.parse_args()
    server = shutil.which("prometheus")
    if server is None:
        raise SystemExit("needs Debian's package prometheus")
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)

        def start(file: str, *command: str) -> Path:
            said = stack.enter_context((folder / file).open("wb"))
            process = subprocess.Popen(command, cwd=folder, stdout=said, stderr=said)
            stack.callback(process.wait, 30)
            stack.callback(process.terminate)
            return folder / file

        engines = ROOT / "examples" / "engine"
        engine = start(
            "engine.txt", sys.executable, "-m", "planner", "engine", "serve", "--model", "tiny", "--devices", "cpu",
            "--allocation", str(engines / "allocation.json"), "--catalogue", str(engines / "catalogue.json"),
            "--listen", "127.0.0.1:0", "--log", "log.jsonl",
        )  # fmt: skip
        found = re.search(r"ready on http://(127\.0\.0\.1:\d+)", wait_for(engine, "ready on"))
        if found is None:
            raise SystemExit("the engine names no address")
        scrapes = {"job_name": "diffplan", "static_configs": [{"targets": [found[1]]}]}
        timing = {"scrape_interval": "2s", "scrape_timeout": "2s"}
        (folder / "prometheus.yml").write_text(json.dumps({"global": timing, "scrape_configs": [scrapes]}))
        url = f"http://127.0.0.1:{free_port()}"
        start(
            "prometheus.txt", server, "--config.file=prometheus.yml", "--storage.tsdb.path=data",
            f"--web.listen-address={url.removeprefix('http://')}",
        )  # fmt: skip
        time.sleep(8)  # a few scrapes before the first request
        sent = send(found[1], arguments.requests, arguments.per_second)
        time.sleep(6)  # and after the last
        diffplan(folder, "observe", "engine-run", "--log", "log.jsonl", "--out", "seen")
        minutes = 2.0 + arguments.requests / arguments.per_second / 30
        diffplan(folder, "observe", url, "--minutes", str(minutes), "--match", 'job="diffplan"', "--out", "counts")
        (folder / "scenario.yaml").write_text(SCENARIO)
        diffplan(folder, "plan", "scenario.yaml", "--out", "plan")
        cluster = str(ROOT / "examples" / "export" / "cluster.yaml")
        diffplan(folder, "export", "plan", "--to", "all", "--cluster", cluster, "--out", "files")
        rows = [
            counted(sent), of_records(folder / "seen"), of_counters(folder / "counts" / "summary.json"),
            of_plan(folder / "plan" / "plan.json"),
        ]  # fmt: skip
        n_files = len(json.loads((folder / "files" / "export.json").read_text())["files"])
    plain = {"benchmark": "round_trip", "model": "tiny", "rows": rows, "n_files_exported": n_files}
    target = ROOT / "benchmarks" / "results" / "round_trip.json"
    target.write_text(json.dumps(plain, indent=1) + "\n")
    print(target.read_text())


def counted(sent: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "what": "sent and answered", "n_requests": len(sent), "n_images": sum(row["n_images"] for row in sent),
        "n_lora_uses": sum(row["n_loras"] for row in sent),
        "mean_latency_s": round(float(np.mean([row["latency_s"] for row in sent])), 3),
    }  # fmt: skip


def of_records(folder: Path) -> dict[str, Any]:
    records = pd.read_parquet(folder / "requests.parquet")
    trace = pd.read_parquet(folder / "trace.parquet")
    return {
        "what": "diffplan observe, records and log", "n_requests": len(records), "n_images": int(trace["n_images"].sum()),
        "n_lora_uses": int(trace["lora_ids"].map(len).sum()),
        "mean_latency_s": round(float(records["latency_s"].mean()), 3),
        "stage_sum_s": {stage: round(float(records[f"{stage}_s"].sum()), 3) for stage in ("text", "denoise")},
    }  # fmt: skip


def of_counters(path: Path) -> dict[str, Any]:
    plain = json.loads(path.read_text())
    windows = plain["windows"]
    return {
        "what": "diffplan observe, Prometheus", "n_requests": round(sum(row["n_done"] for row in windows)),
        "n_images": round(sum(row["n_images"] for row in windows)), "n_lora_uses": round(sum(row["n_uses"]["lora"] for row in windows)),
        "stage_sum_s": {
            stage: round(sum(row["stage_sum_s"][stage] for row in windows), 3) for stage in ("text", "denoise")
        },
    }  # fmt: skip


def of_plan(path: Path) -> dict[str, Any]:
    plain = json.loads(path.read_text())
    return {"what": "diffplan plan of the observed trace", "verdict": plain["verdict"], "sentence": plain["sentence"]}


if __name__ == "__main__":
    main()
