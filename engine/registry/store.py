"""Where add-on files come from: a local folder or an HTTP server, neither of which is believed.

A key is relative and comes from the catalogue, never from a request. Sizes are known and bounded before anything is read; every
wait is bounded; links and redirects are refused. Whether the bytes are the right ones, the sha256 decides (``checked_stream``).
"""

from __future__ import annotations

import errno
import http.client
import os
import socket
import stat
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from engine.catalogue import key_problem
from engine.registry.store_token import StoreToken, TokenFileError, token_problem
from traces.problems import InputError, one_problem

CHUNK_TIMEOUT_S: Final = 10.0
TOTAL_TIMEOUT_S: Final = 120.0


class StoreError(Exception):
    """The store did not give a file. Trying again may help, unless ``is_final``."""

    def __init__(self, sentence: str, *, is_final: bool = False) -> None:
        super().__init__(sentence)
        self.is_final = is_final


class Source(Protocol):
    """A file of a store that is being read."""

    @property
    def size_bytes(self) -> int:
        """How long the store says it is."""

    def readinto(self, view: memoryview, /) -> int:
        """Fills at most ``len(view)`` bytes and says how many; 0 only at the end. Raises :class:`StoreError`."""


class Store(Protocol):
    """Gives files by key."""

    def open(self, key: str) -> AbstractContextManager[Source]:
        """Opens a file for one pass.

        Raises:
            StoreError: it is not there, not a plain file, or the store does not answer in time.
        """


def make_store(
    place: str,
    *,
    chunk_timeout_s: float = CHUNK_TIMEOUT_S,
    total_timeout_s: float = TOTAL_TIMEOUT_S,
    token_file: Path | None = None,
    may_send_plainly: bool = False,
) -> FolderStore | HttpStore:
    """The store at an ``http://`` or ``https://`` address, or in a folder.

    Args:
        token_file: holds the bearer token that an HTTP store wants; None: it wants none.
        may_send_plainly: send the token over http to other hosts too.

    Raises:
        InputError: it is neither; or a token would be sent unencrypted, or is given for a folder.
    """
    parts = urllib.parse.urlsplit(place)
    if parts.scheme in {"http", "https"}:
        if not parts.hostname or parts.username or parts.query or parts.fragment:
            raise one_problem(
                "store", f"got {place!r}", "http(s)://host[:port]/path without user, query or fragment", "Correct it."
            )
        token = None if token_file is None else StoreToken(token_file)
        problem = token_problem(parts.scheme, parts.hostname, may_be_plain=may_send_plainly) if token else None
        if problem is not None:
            raise InputError([problem])
        return HttpStore(parts.scheme, parts.netloc, parts.path.rstrip("/"), chunk_timeout_s, total_timeout_s, token)
    if token_file is not None:
        raise one_problem(
            "store", f"got the folder {place!r} and a token file", "a token with an http(s) address", "Drop one."
        )
    folder = Path(place)
    if not folder.is_dir():
        raise one_problem("store", f"got {place!r}", "a folder that exists, or an http(s) address", "Check the path.")
    return FolderStore(folder)


@dataclass(frozen=True, slots=True)
class FolderStore:
    """Files below a folder. No link inside it is followed; the folder itself may be one."""

    folder: Path
    follows_links: bool = False
    """For a folder that the operator named: download caches are made of links."""

    @contextmanager
    def open(self, key: str) -> Iterator[Source]:
        """See :meth:`Store.open`."""
        _check_key(key)
        descriptor = self._descend(key)
        try:
            state = os.fstat(descriptor)
            if not stat.S_ISREG(state.st_mode):
                raise StoreError(f"{key}: is not a plain file. Put the file itself into the store.", is_final=True)
            yield _OpenFile(descriptor, state.st_size, key)
        finally:
            os.close(descriptor)

    def _descend(self, key: str) -> int:
        # Every part is opened relative to the one before without following links, so that no link can lead outside.
        *folders, name = key.split("/")
        flags = os.O_RDONLY | os.O_CLOEXEC | (0 if self.follows_links else os.O_NOFOLLOW)
        try:
            here = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            for part in folders:
                below = -1
                try:
                    below = os.open(part, flags | os.O_DIRECTORY, dir_fd=here)
                finally:
                    os.close(here)
                here = below
            try:
                return os.open(name, flags | os.O_NONBLOCK, dir_fd=here)  # a FIFO must not hold us up
            finally:
                os.close(here)
        except OSError as error:
            is_link = error.errno in {errno.ELOOP, errno.ENOTDIR} and self._has_link(key)
            if is_link:
                raise StoreError(
                    f"{key}: is, or lies behind, a symbolic link. Put the file itself there.", is_final=True
                ) from None
            raise StoreError(f"{key}: cannot be opened in the store: {error.strerror}. Check the store.") from None

    def _has_link(self, key: str) -> bool:
        parts = key.split("/")
        return any(self.folder.joinpath(*parts[: i + 1]).is_symlink() for i in range(len(parts)))


@dataclass(slots=True)
class _OpenFile:
    descriptor: int
    size_bytes: int
    key: str

    def readinto(self, view: memoryview, /) -> int:
        try:
            return os.readv(self.descriptor, [view])
        except OSError as error:
            raise StoreError(f"{self.key}: reading failed: {error.strerror}. Try again.") from None


@dataclass(frozen=True, slots=True)
class HttpStore:
    """Files below an address. Proxies of the environment are not used."""

    scheme: str
    host: str
    path: str
    chunk_timeout_s: float = CHUNK_TIMEOUT_S
    """Longest silence of the server."""
    total_timeout_s: float = TOTAL_TIMEOUT_S
    """Longest time for one file, from connecting to the last byte."""
    token: StoreToken | None = None
    """Redirects are refused, so it reaches no other host."""

    @contextmanager
    def open(self, key: str) -> Iterator[Source]:
        """See :meth:`Store.open`."""
        _check_key(key)
        headers = {"Accept-Encoding": "identity", "Connection": "close"}
        if self.token is not None:
            try:
                headers["Authorization"] = self.token.authorization()
            except TokenFileError as error:
                raise StoreError(f"{key}: {error}.") from None  # not final: the file may be on its way
        kind = http.client.HTTPSConnection if self.scheme == "https" else http.client.HTTPConnection
        connection = kind(self.host, timeout=min(self.chunk_timeout_s, self.total_timeout_s))
        deadline = time.monotonic() + self.total_timeout_s
        watchdog = threading.Timer(self.total_timeout_s, _cut, (connection,))
        watchdog.daemon = True
        watchdog.start()  # http.client bounds single reads only: a server may drip its headers for hours
        try:
            try:
                connection.request("GET", f"{self.path}/{urllib.parse.quote(key)}", headers=headers)
                response = connection.getresponse()
            except (OSError, http.client.HTTPException) as error:
                raise StoreError(
                    f"{key}: the store does not answer: {error or type(error).__name__}. Try again."
                ) from None
            if time.monotonic() >= deadline:
                raise StoreError(f"{key}: took longer than {self.total_timeout_s:g} s. Try again.")
            yield _OpenResponse(response, _length(key, response), key, deadline, self.total_timeout_s)
        finally:
            watchdog.cancel()
            connection.close()


@dataclass(slots=True)
class _OpenResponse:
    response: http.client.HTTPResponse
    size_bytes: int
    key: str
    deadline: float
    total_timeout_s: float
    n_read: int = 0

    def readinto(self, view: memoryview, /) -> int:
        data = b""
        try:
            if time.monotonic() < self.deadline:
                # read1() returns what has arrived; readinto() would wait for the whole view, drip by drip.
                data = self.response.read1(len(view))
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise StoreError(
                f"{self.key}: the transfer broke off: {error or type(error).__name__}. Try again."
            ) from None
        if not data and self.n_read < self.size_bytes and time.monotonic() >= self.deadline:
            raise StoreError(f"{self.key}: took longer than {self.total_timeout_s:g} s. Try again.")
        view[: len(data)] = data
        self.n_read += len(data)
        return len(data)


def _length(key: str, response: http.client.HTTPResponse) -> int:
    status = response.status
    if 300 <= status < 400:
        raise StoreError(
            f"{key}: the store redirects (status {status}), which is refused. Name the final address.", is_final=True
        )
    if status in {401, 403}:
        raise StoreError(f"{key}: the store answers with status {status}. Check the token and what it may read.")
    if status != 200:
        raise StoreError(f"{key}: the store answers with status {status}. Check the store.")
    coding = response.headers.get("Content-Encoding", "identity")
    if coding != "identity" or response.headers.get("Transfer-Encoding"):
        raise StoreError(
            f"{key}: the store sends it encoded or chunked. Have it send plain files with a length.", is_final=True
        )
    lengths = set(response.headers.get_all("Content-Length", []))
    text = next(iter(lengths), "")
    if len(lengths) != 1 or not (text.isascii() and text.isdigit() and len(text) <= 18):
        # not final: http.client takes a connection that ends inside the headers for their end
        raise StoreError(f"{key}: the store gives the length {sorted(lengths)}. Have it send one Content-Length.")
    return int(text)


def _cut(connection: http.client.HTTPConnection) -> None:
    if connection.sock is not None:
        try:
            connection.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it has ended by itself


def _check_key(key: str) -> None:
    problem = "which is empty" if not key else key_problem(key)
    if problem:
        raise StoreError(
            f"the catalogue's file {key[:200]!r}, {problem}, is no key of a store. Correct the catalogue.",
            is_final=True,
        )
