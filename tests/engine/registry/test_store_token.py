"""The token of an HTTP store: sent to it, to nobody else, replaceable while running, and in no message."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine.registry.store import HttpStore, StoreError, make_store
from traces.problems import InputError

DATA = b"weights"
TOKEN = "s3cret-._~+/AB=="  # noqa: S105 - of a test


@contextmanager
def store(wanted: list[str], seen: list[str | None]) -> Iterator[str]:
    """Gives a file to those who say the wanted token; remembers what was said."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            said = self.headers.get("Authorization")
            seen.append(said)
            is_known = said == f"Bearer {wanted[0]}"
            self.send_response(200 if is_known else 401)
            self.send_header("Content-Length", str(len(DATA) if is_known else 0))
            self.end_headers()
            self.wfile.write(DATA if is_known else b"")

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/store"
    finally:
        server.shutdown()
        thread.join(5)
        server.server_close()


def fetch(place: HttpStore | object) -> bytes:
    assert isinstance(place, HttpStore)
    with place.open("ink.safetensors") as source:
        buffer = bytearray(source.size_bytes)
        n = source.readinto(memoryview(buffer))
    return bytes(buffer[:n])


def token_file(folder: Path, text: str = TOKEN + "\n", mode: int = 0o600) -> Path:
    path = folder / "token"
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)
    return path


def test_the_store_is_told_the_token_and_a_new_one_without_a_restart(tmp_path: Path) -> None:
    wanted, seen = [TOKEN], []
    path = token_file(tmp_path)
    with store(wanted, seen) as address:
        place = make_store(address, token_file=path)
        assert fetch(place) == DATA
        wanted[0] = "another"
        with pytest.raises(StoreError, match=r"status 401\. Check the token") as refused:
            fetch(place)
        assert not refused.value.is_final  # the secret may be on its way
        assert TOKEN not in str(refused.value)
        token_file(tmp_path, "another")
        assert fetch(place) == DATA
    assert seen == [f"Bearer {TOKEN}", f"Bearer {TOKEN}", "Bearer another"]


def test_without_a_token_file_none_is_said() -> None:
    seen: list[str | None] = []
    with store([TOKEN], seen) as address, pytest.raises(StoreError):
        fetch(make_store(address))
    assert seen == [None]


@pytest.mark.parametrize(
    ("text", "mode", "sentence"),
    [
        ("", 0o600, "holds no bearer token"),
        ("two words", 0o600, "holds no bearer token"),
        ("one\r\nX-Evil: 1", 0o600, "holds no bearer token"),
        ("x" * 9000, 0o600, "holds no bearer token"),
        ("tök", 0o600, "holds no bearer token"),
        (TOKEN, 0o644, "mode 0644: everybody can read it"),
    ],
)
def test_a_file_that_holds_no_private_token_gets_a_sentence_and_nothing_is_asked(
    tmp_path: Path, text: str, mode: int, sentence: str
) -> None:
    seen: list[str | None] = []
    with store([TOKEN], seen) as address, pytest.raises(StoreError, match=sentence) as refused:
        fetch(make_store(address, token_file=token_file(tmp_path, text, mode)))
    assert seen == []
    assert not text.strip() or text not in str(refused.value)


def test_a_missing_file_and_a_folder_get_a_sentence(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(StoreError, match="token file"):
            fetch(make_store("http://127.0.0.1:9", token_file=path))


@pytest.mark.parametrize("address", ["http://store.example.com", "http://10.0.0.7:80", "http://localhost.example.com"])
def test_a_token_is_not_sent_over_http_to_other_hosts_unless_somebody_says_so(tmp_path: Path, address: str) -> None:
    path = token_file(tmp_path)
    with pytest.raises(InputError, match="is an http address, and a token"):
        make_store(address, token_file=path)
    make_store(address, token_file=path, may_send_plainly=True)
    make_store(address.replace("http:", "https:"), token_file=path)


def test_a_folder_wants_no_token(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a token with an http"):
        make_store(str(tmp_path), token_file=token_file(tmp_path))
