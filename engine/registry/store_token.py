"""The bearer token that an HTTP store wants: read from a file at every fetch, so that it can be replaced while the engine runs.

The token is in no command line, no environment variable, no log and no error; only the file's path is.
"""

from __future__ import annotations

import ipaddress
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from traces.problems import Problem

TOKEN_BYTES_MAX: Final = 8192
_TOKEN: Final = re.compile(r"[A-Za-z0-9._~+/-]+=*")
"""``b64token`` of RFC 6750."""


class TokenFileError(Exception):
    """The file does not hold a token; the sentence says why and never what it holds."""


@dataclass(frozen=True, slots=True)
class StoreToken:
    """Where the token is."""

    file: Path

    def authorization(self) -> str:
        """The value of the header.

        Raises:
            TokenFileError: the file is missing, not a plain file, readable by everybody, too large, or no token.
        """
        try:
            descriptor = os.open(self.file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise TokenFileError(f"the store's token file cannot be opened: {error.strerror}") from None
        try:
            state = os.fstat(descriptor)
            if not stat.S_ISREG(state.st_mode):
                raise TokenFileError("the store's token file is not a plain file")
            if state.st_mode & stat.S_IROTH:
                raise TokenFileError(
                    f"the store's token file has mode {stat.S_IMODE(state.st_mode):04o}: everybody can read it. Make it 0600 or 0640"
                )
            raw = os.read(descriptor, TOKEN_BYTES_MAX + 1)
        finally:
            os.close(descriptor)
        text = raw.decode("ascii", "replace").strip()
        if len(raw) > TOKEN_BYTES_MAX or not _TOKEN.fullmatch(text):
            raise TokenFileError(
                f"the store's token file holds no bearer token of at most {TOKEN_BYTES_MAX} bytes on one line"
            )
        return f"Bearer {text}"


def token_problem(scheme: str, hostname: str | None, *, may_be_plain: bool) -> Problem | None:
    """Why a token must not be sent to this address: over http anybody on the way reads it."""
    if scheme == "https" or may_be_plain or _is_loopback(hostname or ""):
        return None
    return Problem(
        "store", "is an http address, and a token is to be sent to it", "https, or an address of this host",
        "Use https; where something else encrypts the way, as a service mesh does, say --option loader_token_over_http=true",
    )  # fmt: skip


def _is_loopback(hostname: str) -> bool:
    try:
        return ipaddress.ip_address(hostname).is_loopback
    except ValueError:
        return hostname == "localhost"
