"""How long the dashboard computes for one move of a slider, and how soon its first page can be used.

    python benchmarks/dashboard.py [--rounds 9] [--scenario examples/gentd26.yaml]… [--no-browser]

Writes ``benchmarks/results/dashboard.json``. A move changes one slider and simulates five fleets once each: one of every topology that
competes, and the candidate. What the page remembers (the laid-out question, earlier answers) is used as the page uses it: the values of a
slider are all different, so no answer is remembered, and a move of the promise, the price or the GPUs finds the traffic laid out. The last
row starts the server anew for every round and opens the first page in a browser: from the request to the end of the script's run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from planner.scenario import load_scenario  # noqa: E402
from planner.what_if import Change, Terms, change, first_guess, lay_out, run  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "dashboard.json"
PRICE_USD = 3.5
TARGET_MS = 300.0
START_S = 60.0


def row(what: str, scenario: str, values_ms: list[float], **more: object) -> dict[str, object]:
    """Median and range of repeated times."""
    return {
        "what": what, "scenario": scenario, "median_ms": round(statistics.median(values_ms), 1), "min_ms": round(min(values_ms), 1),
        "max_ms": round(max(values_ms), 1), "rounds": len(values_ms), **more,
    }  # fmt: skip


def moves(name: str, rounds: int) -> list[dict[str, object]]:
    """The moves of one scenario's sliders."""
    scenario, folder = load_scenario(name)
    began = time.perf_counter()
    ground = lay_out(scenario, folder)
    laid_out_ms = 1000 * (time.perf_counter() - began)
    terms = Terms(scenario.slo.latency_s, scenario.slo.attainment_ratio, PRICE_USD)
    began = time.perf_counter()
    fleets = {topology: first_guess(ground, topology, terms) for topology in scenario.topologies}
    guessed_ms = 1000 * (time.perf_counter() - began)
    candidate = scenario.topologies[-1]

    def five(asked: Change, at: Terms, more: int = 0) -> None:
        changed = change(ground, asked)
        for topology, counts in fleets.items():
            run(ground, changed, topology, counts, at)
        counts = fleets[candidate]
        run(ground, changed, candidate, (counts[0] + 1 + more, *counts[1:]), at)

    n = len(change(ground, Change()).workload)
    cases: dict[str, Callable[[int], None]] = {
        "traffic": lambda k: five(Change(0.8 + 0.05 * k), terms),
        "promise": lambda k: five(Change(), replace(terms, latency_s=terms.latency_s * (0.9 + 0.02 * k))),
        "price": lambda k: five(Change(), replace(terms, price_usd_per_gpu_hour=PRICE_USD + 0.1 * k)),
        "GPUs of a pool": lambda k: five(Change(), terms, k),
    }
    if ground.has_controlnets:
        cases["ControlNet share"] = lambda k: five(Change(1.0, 0.3 + 0.07 * k), terms)
    times: dict[str, list[float]] = {what: [] for what in cases}
    for case in cases.values():
        case(0)
    for k in range(rounds):
        for what, case in cases.items():
            began = time.perf_counter()
            case(k)
            times[what].append(1000 * (time.perf_counter() - began))
    rows = [
        row(f"move of the slider: {what}", name, values, n_requests=n, n_fleets=len(fleets) + 1, target_ms=TARGET_MS, meets_target=statistics.median(values) <= TARGET_MS)
        for what, values in times.items()
    ]  # fmt: skip
    rows.append(row("lay the question out, once", name, [laid_out_ms], n_requests=n))
    rows.append(
        row("first guess of four fleets, once; compiles or loads compiled code", name, [guessed_ms], n_requests=n)
    )
    return rows


def first_page(rounds: int) -> dict[str, object]:
    """A server started anew, its first page opened by a browser."""
    from playwright.sync_api import sync_playwright

    times = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        for _ in range(rounds):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            command = [sys.executable, "-m", "planner", "dashboard", "--port", str(port)]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                deadline_s = time.monotonic() + START_S
                while True:
                    try:
                        with urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=5):
                            break
                    except urllib.error.URLError:
                        if process.poll() is not None or time.monotonic() > deadline_s:
                            sys.exit("the server does not start")
                        time.sleep(0.05)
                page = browser.new_page()
                began = time.perf_counter()
                page.goto(f"http://127.0.0.1:{port}/", wait_until="commit")
                page.wait_for_selector("h1")
                page.wait_for_function(
                    "() => document.querySelector('[data-testid=\"stApp\"]')?.dataset.testScriptState === 'notRunning'"
                )
                times.append(1000 * (time.perf_counter() - began))
                page.close()
            finally:
                process.terminate()
                process.wait(timeout=30)
        browser.close()
    return row("first page of a fresh server, from request to usable", "provider", times, target_ms=3000.0, meets_target=statistics.median(times) <= 3000)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--scenario", action="append", default=None)
    parser.add_argument("--no-browser", action="store_true")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    rows: list[dict[str, object]] = []
    for name in arguments.scenario or ["examples/gentd26.yaml", "sample:provider", "sample:small"]:
        rows += moves(name, arguments.rounds)
    if not arguments.no_browser:
        rows.append(first_page(max(3, arguments.rounds // 3)))
    machine = {
        "python": platform.python_version(),
        "cpu": platform.machine(),
        "cores": os.cpu_count(),
        "load_before": round(load, 1),
    }
    RESULTS.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    for item in rows:
        print(f"{item['scenario']}: {item['what']}: {item['median_ms']} ms ({item['min_ms']}–{item['max_ms']})")


if __name__ == "__main__":
    main()
