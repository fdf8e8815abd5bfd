"""An exported pod on the real engine: it starts from the exported files, answers its probes, shows the metrics that our rules ask for, and drains."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from planner.export import metric_names
from planner.export.engine_command import LIVE_PATH, METRICS_PATH, READY_PATH
from planner.export.kubernetes_read import objects_in
from planner.export.run import export_texts
from tests.export.plans import CLUSTER, decoupled, source_of

START_S = 90.0
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("engine.frontdoor.launch") is None, reason="this checkout's engine does not serve"
)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """``diffplan engine serve`` with a pod's ConfigMaps as files; numpy workers in place of models, a loopback port."""
    folder = tmp_path_factory.mktemp("pod")
    objects = objects_in(dict(export_texts(source_of(decoupled(2, 1)), ("kubernetes",), CLUSTER).texts))
    data: dict[str, str] = {}
    for item in objects:
        data |= item.get("data", {}) if item["kind"] == "ConfigMap" else {}
    (folder / "allocation.json").write_text(data["allocation.json"], encoding="utf-8")
    (folder / "catalogue.json").write_text(data["part-000"], encoding="utf-8")
    said = folder / "said.txt"
    with said.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "planner", "engine", "serve", "--allocation", "allocation.json", "--catalogue", "catalogue.json",
             "--store", ".", "--model", "featherweight", "--devices", "cpu", "--listen", "127.0.0.1:0", "--run-dir", "run"],
            cwd=folder, stdout=subprocess.DEVNULL, stderr=stream,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + START_S
        address = None
        while address is None and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
            address = re.search(r"ready on (http://127\.0\.0\.1:\d+)", said.read_text(encoding="utf-8"))
        assert address is not None, said.read_text(encoding="utf-8")
        yield process, address[1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait(10)


def get(address: str, path: str) -> str:
    with urllib.request.urlopen(address + path, timeout=10) as answer:  # noqa: S310 - our own loopback address
        body: Any = answer.read()
    return str(body.decode())


def test_the_exported_probes_are_answered(engine: tuple[subprocess.Popen[bytes], str]) -> None:
    for path in (READY_PATH, LIVE_PATH):
        get(engine[1], path)  # raises for anything but 200


def test_every_metric_of_our_rules_is_there(engine: tuple[subprocess.Popen[bytes], str]) -> None:
    with contextlib.suppress(urllib.error.HTTPError):  # one refused request, so that request counters have a series
        request = urllib.request.Request(engine[1] + "/v1/images/generations", data=b"{}", method="POST")  # noqa: S310
        urllib.request.urlopen(request, timeout=10)  # noqa: S310
    exposed = get(engine[1], METRICS_PATH)
    families = set(re.findall(r"^# TYPE (\S+) ", exposed, flags=re.MULTILINE))
    assert set(metric_names.ENGINE_METRICS) <= families
    for name, labels in (
        (metric_names.WORKER_READY, ("pool", "role", "worker")), (metric_names.WORKER_BUSY_SECONDS, ("pool", "role", "worker")),
        (metric_names.REQUESTS, ("status",)), (f"{metric_names.REQUEST_SECONDS}_bucket", ("status", "le")),
    ):  # fmt: skip
        line = next(line for line in exposed.splitlines() if line.startswith(f"{name}{{"))
        assert all(f'{label}="' in line for label in labels), line


def test_a_stopped_pod_drains_and_ends_well(engine: tuple[subprocess.Popen[bytes], str]) -> None:
    engine[0].send_signal(signal.SIGTERM)
    assert engine[0].wait(30) == 0
