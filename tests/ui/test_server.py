"""The real server: where it listens, what it answers to, and what it says when it cannot start."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from streamlit import config
from streamlit.web.cli import main_run

from dashboards.cli import check_free, dashboard, server_arguments
from traces.problems import InputError

START_S = 60.0
"""Only reached if the server does not come up: it takes about two seconds."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    number = free_port()
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "planner", "dashboard", "--port", str(number)]
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
    try:
        deadline_s = time.monotonic() + START_S
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{number}/_stcore/health", timeout=5) as answer:
                    assert answer.read() == b"ok"
                break
            except urllib.error.URLError:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline_s, log.read_text()
                time.sleep(0.1)
        yield number
    finally:
        process.terminate()
        process.wait(timeout=30)


def listening_addresses(port: int) -> set[str]:
    """Local addresses in hexadecimal of sockets that listen on this port, from the kernel's own tables."""
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            address, _, number = local.partition(":")
            if state == "0A" and int(number, 16) == port:
                found.add(address)
    return found


@pytest.mark.skipif(
    not Path("/proc/net/tcp").exists(), reason="reads the kernel's table of sockets, which this system does not show"
)
def test_the_server_listens_on_loopback_only(port: int) -> None:
    assert listening_addresses(port) == {"0100007F"}  # 127.0.0.1, lowest byte first


def test_a_page_elsewhere_cannot_open_a_session(port: int) -> None:
    def shake_hands(host: str, origin: str) -> bytes:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as line:
            line.sendall(
                f"GET /_stcore/stream HTTP/1.1\r\nHost: {host}\r\nOrigin: {origin}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
            )
            return line.recv(64).split(b"\r\n")[0]

    own = f"127.0.0.1:{port}"
    assert b" 101 " in shake_hands(own, f"http://{own}")
    assert b" 101 " not in shake_hands(own, "http://evil.example")
    assert b" 101 " not in shake_hands(f"evil.example:{port}", f"http://evil.example:{port}")


def test_a_port_in_use_is_a_sentence(port: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "planner", "dashboard", "--port", str(port)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert f"--host 127.0.0.1 --port {port}: cannot be listened on" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_address_of_another_machine_is_a_sentence() -> None:
    with pytest.raises(InputError, match="cannot be listened on"):
        check_free("203.0.113.1", free_port())  # TEST-NET-3: nobody's address


def test_missing_files_are_named_together() -> None:
    with pytest.raises(InputError) as caught:
        dashboard(scenario=[Path("no.yaml")], profile=[Path("no.json")])
    assert "--scenario no.yaml: is not a file" in str(caught.value)
    assert "--profile no.json: is not a file" in str(caught.value)


def test_every_setting_of_the_server_exists_and_statistics_are_off() -> None:
    arguments = server_arguments("127.0.0.1", 8501)
    given = dict(argument.removeprefix("--").split("=", 1) for argument in arguments[2:])
    known = set(config.get_config_options())
    assert set(given) <= known
    assert given["browser.gatherUsageStats"] == "false"
    assert given["server.address"] == "127.0.0.1"
    assert given["server.enableXsrfProtection"] == "true"
    assert {f"--{name}" for name in given} <= {option for parameter in main_run.params for option in parameter.opts}
