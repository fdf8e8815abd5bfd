"""Asks a Prometheus server, bounded in time and size. What it answers is data from outside: every number is checked before use."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from planner.workload import Floats
from traces.problems import one_problem

ANSWER_BYTES_MAX: Final = 64 * 2**20
SAMPLES_MAX: Final = 5_000_000
SERIES_MAX: Final = 20_000
READ_BYTES: Final = 2**16
WHAT: Final = "a Prometheus server's HTTP API"


@dataclass(frozen=True, slots=True)
class Server:
    """Where and how to ask."""

    url: str
    timeout_s: float = 10.0
    """Of one whole answer, not only of the next byte."""
    token_file: Path | None = None
    """Bearer token for a server behind a proxy that asks for one."""


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """Samples of one time series as they were scraped."""

    labels: dict[str, str]
    at_s: Floats
    """Unix seconds, increasing."""
    value: Floats
    """Finite."""


def server_of(url: str, timeout_s: float, token_file: Path | None = None) -> Server:
    """Checks an address. Raises :class:`InputError` for anything but http(s) with a host and without credentials."""
    try:
        parts = urllib.parse.urlsplit(url)
        is_fine = parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.username
        is_fine = is_fine and not parts.query and not parts.fragment and (parts.port is None or parts.port > 0)
    except ValueError:
        is_fine = False
    if not is_fine:
        raise one_problem(
            "Prometheus address",
            f"got {url[:200]!r}",
            "http(s)://HOST[:PORT][/PATH] without user, query or fragment",
            "Correct it",
        )
    return Server(url.rstrip("/"), timeout_s, token_file)


def samples(server: Server, expression: str, at_s: float) -> list[Series]:
    """The raw samples of a range selector, as ``metric{…}[600s]``, up to ``at_s``.

    Raises:
        InputError: the server cannot be reached, is too slow, answers too much or something else than samples, or a sample is
            not a finite number (NaN stands for "no observation" in summaries; the engine exports none).
    """
    plain = _get(
        server, "/api/v1/query", {"query": expression, "time": repr(at_s), "timeout": f"{server.timeout_s:g}s"}
    )
    data = plain.get("data")
    if not isinstance(data, dict) or data.get("resultType") != "matrix" or not isinstance(data.get("result"), list):
        raise one_problem(server.url, "answered something else than a matrix of samples", WHAT, "Check the address")
    if len(data["result"]) > SERIES_MAX:
        raise one_problem(
            server.url,
            f"has {len(data['result'])} series for {expression[:80]}",
            f"at most {SERIES_MAX}",
            "Select with --match",
        )
    found: list[Series] = []
    n_samples = 0
    for item in data["result"]:
        series = _series(server, item)
        n_samples += len(series.at_s)
        if n_samples > SAMPLES_MAX:
            raise one_problem(server.url, "has too many samples", f"at most {SAMPLES_MAX}", "Ask for fewer minutes")
        found.append(series)
    return sorted(found, key=lambda series: sorted(series.labels.items()))


def _series(server: Server, item: Any) -> Series:
    try:
        labels = {str(name): str(value) for name, value in item["metric"].items()}
        at_s = np.array([float(pair[0]) for pair in item["values"]])
        value = np.array([float(pair[1]) for pair in item["values"]])
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError):
        raise one_problem(
            server.url, "answered a series that is not labels and samples", WHAT, "Check the address"
        ) from None
    name = labels.get("__name__", "a series")
    wrong = ~np.isfinite(value) | ~np.isfinite(at_s)
    if wrong.any():
        place = int(np.argmax(wrong))
        raise one_problem(
            f"{server.url} {name}", f"has the sample {value[place]} at {at_s[place]:.0f}", "finite numbers",
            "Find out which exporter writes it; nothing was taken from this answer",
        )  # fmt: skip
    if np.any(np.diff(at_s) <= 0):
        raise one_problem(
            f"{server.url} {name}",
            "has samples that are not in the order of time",
            "increasing times",
            "Check the server",
        )
    return Series(labels, at_s, value)


def _get(server: Server, path: str, query: dict[str, str]) -> dict[str, Any]:
    request = urllib.request.Request(  # noqa: S310 - the scheme was checked
        server.url + path,
        data=urllib.parse.urlencode(query).encode(),
        headers={"Accept": "application/json"},
        method="POST",
    )
    if server.token_file is not None:
        request.add_header("Authorization", f"Bearer {_token(server.token_file)}")
    until = time.monotonic() + server.timeout_s
    try:
        with _OPENER.open(request, timeout=server.timeout_s) as answer:
            body = _bounded(server, answer, until)
    except urllib.error.HTTPError as error:
        with error:
            said = error.read(2000).decode("utf-8", "replace")
        raise one_problem(
            server.url, f"answered HTTP {error.code}: {_reason(said)}", WHAT, "Check the address and the query"
        ) from None
    except TimeoutError:
        raise _slow(server) from None
    except (urllib.error.URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            raise _slow(server) from None
        raise one_problem(
            server.url, f"cannot be reached: {reason}", WHAT, "Check that it runs, and the address"
        ) from None
    try:
        plain = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise one_problem(server.url, f"answered {body[:60]!r}, which is not JSON", WHAT, "Check the address") from None
    if not isinstance(plain, dict) or plain.get("status") != "success":
        raise one_problem(server.url, f"answered {str(plain)[:200]}", WHAT, "Check the address")
    return plain


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A token must not follow a redirect to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER: Final = urllib.request.build_opener(_NoRedirect, urllib.request.ProxyHandler({}))


def _bounded(server: Server, answer: Any, until: float) -> bytes:
    parts: list[bytes] = []
    n_bytes = 0
    while part := answer.read1(READ_BYTES):
        parts.append(part)
        n_bytes += len(part)
        if n_bytes > ANSWER_BYTES_MAX:
            raise one_problem(
                server.url, f"answered more than {ANSWER_BYTES_MAX} bytes", "less", "Ask for fewer minutes"
            )
        if time.monotonic() > until:
            raise _slow(server)
    return b"".join(parts)


def _slow(server: Server) -> Exception:
    return one_problem(
        server.url,
        f"did not answer within {server.timeout_s:g} s",
        "an answer in time",
        "Ask for fewer minutes, or raise --timeout",
    )


def _reason(said: str) -> str:
    try:
        return str(json.loads(said)["error"])[:200]
    except (ValueError, KeyError, TypeError, RecursionError):
        return " ".join(said.split())[:100] or "nothing"


def _token(path: Path) -> str:
    try:
        text = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise one_problem("--token-file", f"cannot be read: {error}", "a readable file", "Check the path") from None
    if not text or any(character.isspace() for character in text):
        raise one_problem("--token-file", "does not hold one token", "one line without spaces", "Write it again")
    return text


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
