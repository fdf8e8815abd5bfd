"""Stores that lie, stall, redirect or hide links: every wait ends, no byte too many is taken, and the reason is given."""

from __future__ import annotations

import hashlib
import os
import socket
import time
from pathlib import Path

import pytest

from engine.registry.lora_admission import Expected, check_lora
from engine.registry.safetensors_header import AddOnRefusedError
from engine.registry.store import FolderStore, HttpStore, StoreError, make_store
from tests.engine.registry.files import lora_bytes, tiny
from tests.engine.registry.lying_server import Answer, head, honest, serving
from traces.problems import InputError

DATA = lora_bytes()


def fetch(
    address: str, *, chunk_timeout_s: float = 5.0, total_timeout_s: float = 5.0, sha256: str | None = None
) -> str:
    store = make_store(address, chunk_timeout_s=chunk_timeout_s, total_timeout_s=total_timeout_s)
    with store.open("style one.safetensors") as source:
        return check_lora(source, "style", tiny(), expected=Expected(sha256)).add_on_id


def test_an_honest_server_gives_the_file_and_is_asked_for_the_quoted_key() -> None:
    asked = []

    def answer(connection: socket.socket, path: str) -> None:
        asked.append(path)
        connection.sendall(head(len(DATA)) + DATA)

    with serving(answer) as address:
        assert fetch(address) == hashlib.sha256(DATA).hexdigest()
    assert asked == ["/store/style%20one.safetensors"]


def stalls(after: int) -> Answer:
    def answer(connection: socket.socket, path: str) -> None:
        connection.sendall((head(len(DATA)) + DATA)[:after])
        connection.recv(1)  # until the other side goes

    return answer


def drips(after: int) -> Answer:
    def answer(connection: socket.socket, path: str) -> None:
        data = head(len(DATA)) + DATA
        connection.sendall(data[:after])
        for at in range(after, after + 1000):
            connection.sendall(data[at : at + 1])
            time.sleep(0.02)

    return answer


@pytest.mark.parametrize(
    ("answer", "reason", "is_final"),
    [
        (lambda c, p: c.sendall(head(len(DATA)) + DATA[:-100]), "ended 100 bytes early", False),
        (lambda c, p: c.sendall(head(len(DATA)) + DATA[:20]), "bytes early", False),
        (lambda c, p: None, "does not answer", False),
        (lambda c, p: c.sendall(b"nonsense\r\n\r\n"), "does not answer", False),
        (lambda c, p: c.sendall(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n"), "does not answer", False),
        (lambda c, p: c.sendall(b"HTTP/1.1 200 OK\r\nContent-Le"), "gives the length", False),
        (lambda c, p: c.sendall(head(0, "302 Found", "Location: http://127.0.0.1:1/other")), "redirects", True),
        (lambda c, p: c.sendall(head(0, "404 Not Found")), "status 404", False),
        (lambda c, p: c.sendall(head(0, "503 Busy")), "status 503", False),
        (lambda c, p: c.sendall(head(10, "206 Partial Content")), "status 206", False),
        (lambda c, p: c.sendall(head(None) + DATA), "gives the length", False),
        (lambda c, p: c.sendall(head("-5") + DATA), "gives the length", False),
        (lambda c, p: c.sendall(head(len(DATA), "200 OK", "Content-Length: 5") + DATA), "gives the length", False),
        (lambda c, p: c.sendall(head(None, "200 OK", "Transfer-Encoding: chunked") + b"5\r\nhello\r\n0\r\n\r\n"), "chunked", True),
        (lambda c, p: c.sendall(head(len(DATA), "200 OK", "Content-Encoding: gzip") + DATA), "encoded", True),
    ],
)  # fmt: skip
def test_a_server_that_lies_is_refused_with_the_reason(answer: Answer, reason: str, is_final: bool) -> None:
    with serving(answer) as address, pytest.raises(StoreError, match=reason) as refused:
        fetch(address)
    assert refused.value.is_final is is_final


@pytest.mark.parametrize("after", [0, 10, 2000])
def test_a_server_that_stalls_is_given_up(after: int) -> None:
    with serving(stalls(after)) as address, pytest.raises(StoreError, match=r"does not answer|broke off"):
        fetch(address, chunk_timeout_s=0.1)


@pytest.mark.parametrize("after", [0, 2000])
def test_a_server_that_drips_is_given_up_after_the_whole_time(after: int) -> None:
    with serving(drips(after)) as address, pytest.raises(StoreError, match=r"took longer|does not answer"):
        fetch(address, chunk_timeout_s=5.0, total_timeout_s=0.3)


def test_a_server_that_nobody_runs_is_a_passing_matter() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(StoreError, match="does not answer") as refused:
        fetch(f"http://127.0.0.1:{port}")
    assert not refused.value.is_final


def test_a_server_that_sends_another_file_is_found_out_by_the_sha256() -> None:
    with serving(honest(lora_bytes(seed=1))) as address, pytest.raises(AddOnRefusedError, match="has the sha256"):
        fetch(address, sha256=hashlib.sha256(DATA).hexdigest())


def test_a_server_that_sends_more_than_it_stated_is_read_no_further() -> None:
    with serving(lambda c, p: c.sendall(head(len(DATA)) + DATA + b"x" * 1000)) as address:
        assert fetch(address, sha256=hashlib.sha256(DATA).hexdigest())


def test_a_server_that_states_too_much_is_refused_before_the_body() -> None:
    with (
        serving(lambda c, p: (c.sendall(head(2**40)), c.recv(1))) as address,
        pytest.raises(AddOnRefusedError, match="oversized: 1099511627776 bytes"),
    ):
        fetch(address)


@pytest.mark.parametrize(
    "key",
    ["", "/etc/passwd", "../secret", "a/../../secret", "a//b", "./a", "a/", "a\\b", "a\x00b", "http://x/y", "C:/x"],
)
def test_a_key_that_is_no_plain_relative_path_is_refused_by_every_store(tmp_path: Path, key: str) -> None:
    for store in (FolderStore(tmp_path), HttpStore("http", "127.0.0.1:9", "")):
        with pytest.raises(StoreError, match="is no key of a store") as refused, store.open(key):
            pass
        assert refused.value.is_final


def test_a_folder_gives_plain_files_in_it_and_below(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "style.safetensors").write_bytes(DATA)
    with FolderStore(tmp_path).open("a/b/style.safetensors") as source:
        assert source.size_bytes == len(DATA)
        assert check_lora(source, "style", tiny()).rank == 4


def test_a_folder_follows_no_link(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "x.safetensors").write_bytes(DATA)
    store = tmp_path / "store"
    store.mkdir()
    (store / "file.safetensors").symlink_to(secret / "x.safetensors")
    (store / "folder").symlink_to(secret)
    for key in ("file.safetensors", "folder/x.safetensors"):
        with pytest.raises(StoreError, match="symbolic link") as refused, FolderStore(store).open(key):
            pass
        assert refused.value.is_final


def test_a_folder_gives_neither_folders_nor_pipes_nor_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for key in ("folder", "pipe"):
        with pytest.raises(StoreError, match="not a plain file"), FolderStore(tmp_path).open(key):
            pass
    for key in ("none", "folder/none", "none/none", "pipe/none"):
        with pytest.raises(StoreError, match="cannot be opened") as refused, FolderStore(tmp_path).open(key):
            pass
        assert not refused.value.is_final


def test_descriptors_stay_flat(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(DATA)
    (tmp_path / "a" / "link").symlink_to("x")
    store = FolderStore(tmp_path)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for key in ("a/x", "a/link", "a/none", "none/x", "a/x/y") * 5:
        try:
            with store.open(key) as source:
                check_lora(source, "style", tiny())
        except StoreError:
            pass
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("place", ["/no/such/folder", "http://", "http://user@host/x", "https://host/x?y=1"])
def test_a_place_that_is_no_store_is_refused(place: str) -> None:
    with pytest.raises(InputError, match="store: got"):
        make_store(place)
