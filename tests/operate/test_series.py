"""Samples of a Prometheus server become counts: resets, gaps and lies."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planner.observe.ask import ObserveQuestion, observe
from planner.observe.prometheus_http import Series, samples, server_of
from planner.observe.series import increases, scrapes_of
from traces.problems import InputError

TARGET = {"job": "diffplan", "instance": "a:1"}
Answer = Callable[[str], tuple[int, bytes]]


def series(values: list[float], at_s: list[float] | None = None) -> Series:
    times = at_s if at_s is not None else [10.0 * k for k in range(len(values))]
    return Series({"__name__": "n_total", **TARGET}, np.array(times), np.array(values))


def test_a_counter_that_restarts_counts_from_zero() -> None:
    counter = series([5, 8, 2, 3])
    found = increases(counter, np.array([0.0, 15.0, 30.0]), scrapes_of([counter]))
    assert found.n.tolist() == [3.0, 3.0]  # 8-5 in the first window; 2 after the restart and 1 more in the second
    assert found.n_resets == 1


def test_what_a_counter_had_before_it_was_first_seen_is_not_counted() -> None:
    counter = series([100, 101])
    assert increases(counter, np.array([-5.0, 15.0]), scrapes_of([counter])).n.tolist() == [1.0]


def test_a_series_that_appears_later_than_its_engine_began_at_zero() -> None:
    alive = series([0, 0, 0, 0])
    counter = series([4, 5], [20.0, 30.0])
    assert increases(counter, np.array([0.0, 40.0]), scrapes_of([alive])).n.tolist() == [5.0]


def test_a_window_with_missing_scrapes_is_not_covered() -> None:
    alive = series([0] * 7, [0, 10, 20, 30, 100, 110, 120])
    covered = scrapes_of([alive]).covered(np.array([0.0, 20.0, 40.0, 60.0, 100.0, 120.0]))
    assert covered.tolist() == [True, False, False, False, True]


def test_a_negative_counter_is_refused() -> None:
    counter = series([-1, 1])
    with pytest.raises(InputError, match="a counter, 0 or more"):
        increases(counter, np.array([0.0, 20.0]), scrapes_of([counter]))


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], str]]:
    """A server on the loopback that answers every query with what a test says."""
    running: list[http.server.ThreadingHTTPServer] = []

    def start(answer: Answer) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                status, data = answer(body)
                self.send_response(status)
                self.send_header("Location", "http://127.0.0.1:1/")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        running.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def matrix(values: Any) -> bytes:
    result = [{"metric": {"__name__": "diffplan_http_open_requests", **TARGET}, "values": values}]
    return json.dumps({"status": "success", "data": {"resultType": "matrix", "result": result}}).encode()


@pytest.mark.parametrize(
    ("status", "data", "said"),
    [
        (200, matrix([[1, "0"], [2, "NaN"]]), "finite numbers"),
        (200, matrix([[1, "0"], [2, "+Inf"]]), "finite numbers"),
        (200, matrix([[2, "0"], [1, "0"]]), "order of time"),
        (200, matrix([[1]]), "not labels and samples"),
        (200, matrix("xy"), "not labels and samples"),
        (200, b'{"status": "success", "data": {"resultType": "vector", "result": []}}', "matrix of samples"),
        (200, b'{"status": "success", "data": {"resultType": "matrix", "result": []}}', "has no scrapes"),
        (200, b"<html>" * 9, "not JSON"),
        (200, b"[" * 100_000, "not JSON"),
        (503, b'{"status": "error", "error": "TSDB not ready"}', "TSDB not ready"),
        (302, b"", "HTTP 302"),
        (500, b"\xff\xfe", "HTTP 500"),
    ],
)  # fmt: skip
def test_a_server_that_answers_nonsense_gets_a_sentence_and_nothing_is_written(
    serve: Callable[[Answer], str], tmp_path: Path, status: int, data: bytes, said: str
) -> None:
    url = serve(lambda _: (status, data))
    with pytest.raises(InputError, match=said):
        observe(ObserveQuestion(url, minutes=1, end_s=100.0), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_slow_server_gets_a_sentence(serve: Callable[[Answer], str]) -> None:
    def late(_: str) -> tuple[int, bytes]:
        time.sleep(1.0)
        return 200, matrix([[1, "0"]])

    with pytest.raises(InputError, match=r"did not answer within 0\.2 s"):
        samples(server_of(serve(late), 0.2), "up[1m]", 100.0)


def test_a_server_that_is_down_gets_a_sentence() -> None:
    with pytest.raises(InputError, match="cannot be reached"):
        samples(server_of("http://127.0.0.1:1", 1.0), "up[1m]", 100.0)


@pytest.mark.parametrize(
    "url",
    ["ftp://host", "http://", "http://user:secret@host", "http://host?x=1", "http://host:99999", "file:///etc/passwd"],
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="Prometheus address"):
        server_of(url, 1.0)
