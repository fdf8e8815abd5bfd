"""Who may call, how often, and with what: bearer tokens from a file that holds only their hashes.

Tokens are 256 random bits, so a plain SHA-256 cannot be searched; passwords people think up must not be put here.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from engine.catalogue import CatalogueEntry
from engine.frontdoor.refusal import RequestRefusedError
from traces.problems import InputError, Problem, one_problem

FILE_BYTES_MAX: Final = 4 * 2**20
TENANTS_MAX: Final = 10_000
TOKEN_PREFIX: Final = "dp-"  # noqa: S105  (so that leaked tokens can be found by scanners)
HEX_DIGITS: Final = frozenset("0123456789abcdef")


@dataclass(frozen=True, slots=True)
class Tenant:
    """One caller and what it may do."""

    id: str
    token_sha256: tuple[str, ...] = ()
    """Lower-case hex; several so that tokens can be replaced without a gap."""
    rate_per_s: float | None = None
    """Requests per second over time. None: unlimited."""
    burst: int = 10
    """Requests that may come at once before the rate counts."""
    n_concurrent_max: int | None = None
    """Requests waiting or running at once. None: unlimited."""
    allowed: tuple[str, ...] = ("*",)
    """Names or ids of the catalogue; ``*`` for all that the catalogue itself grants."""
    priority_max: int = 0
    """Largest priority that a request of this tenant may state."""

    def may_use(self, entry: CatalogueEntry) -> bool:
        """Whether the tenant may use an entry, beside what the catalogue says."""
        return not {"*", entry.name or entry.id, entry.title, entry.id}.isdisjoint(self.allowed)


ANONYMOUS: Final = Tenant("")
"""Everybody, where no token file is given."""


class TenantDesk:
    """Tells callers apart and counts them. One event loop; time comes in as an argument."""

    def __init__(self, tenants: tuple[Tenant, ...] | None) -> None:
        """``None``: no tokens, everybody is :data:`ANONYMOUS`."""
        self._tenants = tenants
        self._tokens: dict[str, tuple[float, float]] = {}  # tenant id -> (requests left in the bucket, at which time)
        self._n_concurrent: dict[str, int] = {}

    @property
    def needs_token(self) -> bool:
        """Whether callers must present one."""
        return self._tenants is not None

    def replace(self, tenants: tuple[Tenant, ...]) -> None:
        """A new token file; counts go on."""
        self._tenants = tenants

    def identify(self, authorization: str | None) -> Tenant:
        """The tenant of an ``Authorization`` header. Every hash is compared, so the time tells nothing.

        Raises:
            RequestRefusedError: 401.
        """
        if self._tenants is None:
            return ANONYMOUS
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise RequestRefusedError(
                401, "missing_token", "The request has no token. Send Authorization: Bearer TOKEN."
            )
        digest = hash_token(token.strip())
        found = None
        for tenant in self._tenants:
            for known in tenant.token_sha256:
                if hmac.compare_digest(known, digest):
                    found = tenant
        if found is None:
            raise RequestRefusedError(401, "invalid_token", "The token is not known. Ask the operator for a new one.")
        return found

    @contextmanager
    def admitted(self, tenant: Tenant, now_s: float) -> Iterator[None]:
        """Counts a request against the tenant's limits until the block ends.

        Raises:
            RequestRefusedError: 429 with the time after which the next request would be let in.
        """
        n_now = self._n_concurrent.get(tenant.id, 0)
        if tenant.n_concurrent_max is not None and n_now >= tenant.n_concurrent_max:
            raise RequestRefusedError(
                429, "tenant_concurrency", f"got {n_now + 1} requests at once, needs at most {tenant.n_concurrent_max}. "
                "Wait for one to end.", retry_after_s=1.0,
            )  # fmt: skip
        if tenant.rate_per_s is not None:
            left, since_s = self._tokens.get(tenant.id, (float(tenant.burst), now_s))
            left = min(float(tenant.burst), left + max(0.0, now_s - since_s) * tenant.rate_per_s)
            if left < 1.0:
                self._tokens[tenant.id] = (left, now_s)
                raise RequestRefusedError(
                    429, "tenant_rate", f"got more than {tenant.rate_per_s:g} requests a second. Slow down.",
                    retry_after_s=(1.0 - left) / tenant.rate_per_s,
                )  # fmt: skip
            self._tokens[tenant.id] = (left - 1.0, now_s)
        self._n_concurrent[tenant.id] = n_now + 1
        try:
            yield
        finally:
            self._n_concurrent[tenant.id] -= 1


def hash_token(token: str) -> str:
    """SHA-256 in lower-case hex."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def new_token() -> str:
    """A token for a tenant: 256 random bits. Only its hash is to be stored."""
    return TOKEN_PREFIX + secrets.token_urlsafe(32)


def read_tenants(path: Path) -> tuple[Tenant, ...]:
    """Reads a token file: ``{"schema_version": 1, "tenants": [{"id": …, "token_sha256": […], …}]}``.

    Raises:
        InputError: missing, not ours, open to others (anything but mode 0600 or 0400), too large, or with bad fields.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(handle, "rb") as stream:
            status = os.fstat(stream.fileno())  # of the file that is read, not of one swapped in between
            _check_file(path, status)
            content = stream.read(FILE_BYTES_MAX + 1)
        plain = json.loads(content.decode("utf-8"))
    except OSError as error:
        raise one_problem(str(path), f"cannot be read: {error.strerror}", "a token file", "Check the path.") from None
    except RecursionError:
        raise one_problem(str(path), "is nested too deeply", "a token file", "Repair it.") from None
    except ValueError as error:
        raise one_problem(str(path), f"is not JSON: {error}", "JSON in UTF-8", "Repair it.") from None
    return _tenants_from_plain(plain, str(path))


def _check_file(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise one_problem(str(path), "is not a plain file", "a token file", "Check the path.")
    if status.st_mode & 0o077:
        mode = f"{stat.S_IMODE(status.st_mode):04o}"
        raise one_problem(str(path), f"has mode {mode}: others can reach it", "0600", f"Run: chmod 600 {path}")
    if status.st_uid not in (os.geteuid(), 0):
        raise one_problem(str(path), f"belongs to user {status.st_uid}", f"{os.geteuid()} or root", "Change its owner.")
    if status.st_size > FILE_BYTES_MAX:
        raise one_problem(str(path), f"has {status.st_size} bytes", f"at most {FILE_BYTES_MAX}", "Check the path.")


def _tenants_from_plain(plain: object, where: str) -> tuple[Tenant, ...]:
    if not isinstance(plain, dict) or plain.get("schema_version") != 1 or not isinstance(plain.get("tenants"), list):
        raise one_problem(where, "is not a token file", '{"schema_version": 1, "tenants": […]}', "See docs/engine.md.")
    problems: list[Problem] = []
    tenants: list[Tenant] = []
    names = {field.name for field in fields(Tenant)}
    owners: dict[str, str] = {}
    for index, item in enumerate(plain["tenants"][: TENANTS_MAX + 1]):
        place = f"{where} tenants[{index}]"
        table: Mapping[str, Any] = item if isinstance(item, dict) else {}
        wrong = [f"{name} is not a known field" for name in sorted(set(table) - names)]
        wrong += [what for name, what in _FIELD_RULES.items() if not _holds(name, table)]
        for digest in table.get("token_sha256", []) if not wrong else []:
            if digest in owners:
                wrong.append(f"one of its tokens is that of {owners[digest]!r} too")
            owners[digest] = table["id"]
        if any(tenant.id == table.get("id") for tenant in tenants):
            wrong.append(f"id {table.get('id')!r} appears twice")
        problems += [Problem(place, what, repair="Repair it.") for what in wrong]
        if not wrong:
            values: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value for name, value in table.items()
            }
            tenants.append(Tenant(**values))
    if not tenants and not problems:
        problems.append(Problem(f"{where} tenants", "is empty", "at least one", "Add one with: diffplan engine token"))
    if len(plain["tenants"]) > TENANTS_MAX:
        problems.append(Problem(f"{where} tenants", "are too many", f"at most {TENANTS_MAX}", "Remove some."))
    if problems:
        raise InputError(problems)
    return tuple(tenants)


_FIELD_RULES: Final = {
    "id": "id needs a text of 1..64 printable characters",
    "token_sha256": "token_sha256 needs a list of at least one SHA-256 in lower-case hex",
    "rate_per_s": "rate_per_s needs a number above 0, or null",
    "burst": "burst needs a whole number, 1 or more",
    "n_concurrent_max": "n_concurrent_max needs a whole number, 1 or more, or null",
    "allowed": "allowed needs a list of texts",
    "priority_max": "priority_max needs a whole number, -100..100",
}


def _holds(name: str, table: Mapping[str, Any]) -> bool:
    if name not in table:
        return name not in ("id", "token_sha256")
    value = table[name]
    if name == "id":
        return isinstance(value, str) and 0 < len(value) <= 64 and value.isprintable()
    if name == "token_sha256":
        return isinstance(value, list) and bool(value) and all(_is_digest(item) for item in value)
    if name == "allowed":
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if value is None:
        return name in ("rate_per_s", "n_concurrent_max")
    if isinstance(value, bool):
        return False
    if name == "rate_per_s":
        return isinstance(value, int | float) and 0 < value < float("inf")
    return isinstance(value, int) and (-100 <= value <= 100 if name == "priority_max" else value >= 1)


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= HEX_DIGITS
