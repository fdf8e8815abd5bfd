"""Takes out of a trace what names people, models and days, and keeps what a plan depends on: who repeats whom, and when."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from traces.problems import one_problem
from traces.records import REQUEST_COLUMNS
from traces.trace import Provenance, Trace

KEY_BYTES_MIN: Final = 16
NAME_DIGITS: Final = 12
"""Hex digits of a pseudonym: 48 bits, so that a million names collide with a chance of 0.2 %; a collision is refused."""
NAMED: Final = (("tenant_id", "tenant"), ("base_model_id", "checkpoint"))
LISTED: Final = (("controlnet_ids", "controlnet"), ("lora_ids", "lora"))


@dataclass(frozen=True, slots=True)
class Anonymity:
    """How much goes."""

    key: bytes | None = None
    """Of the pseudonyms: the same key gives the same names in several traces. None: a random one, thrown away."""
    time_step_s: float = 0.0
    """Arrivals are rounded down to this grid; 0: as they are, from the first one."""
    keeps_tenants: bool = True
    """False: every request has the empty tenant."""


def anonymise(trace: Trace, how: Anonymity) -> Trace:
    """A trace with pseudonyms for tenants, checkpoints and add-ons, numbered requests, and no column beyond the declared ones.

    Rates, popularity and reuse stay, so plans stay (rounded arrivals apart); whoever knows how busy a tenant was at an hour can still
    recognise it. Provenance is dropped but for what was defaulted or left out.

    Raises:
        InputError: the key is too short, or two names got one pseudonym.
        ValueError: the step is negative or not finite.
    """
    if how.key is not None and len(how.key) < KEY_BYTES_MIN:
        raise one_problem("--key-file", f"has {len(how.key)} bytes", f"{KEY_BYTES_MIN} or more, random")
    if not (np.isfinite(how.time_step_s) and how.time_step_s >= 0):
        raise ValueError(f"time_step_s is {how.time_step_s}, needs a finite number, 0 or more")
    key = how.key if how.key is not None else secrets.token_bytes(32)
    frame = trace.requests[[column.name for column in REQUEST_COLUMNS]].copy()
    for column, kind in NAMED:
        names = _pseudonyms(frame[column].unique().tolist(), kind, key)
        frame[column] = frame[column].map(names)
    if not how.keeps_tenants:
        frame["tenant_id"] = ""
    for column, kind in LISTED:
        distinct = sorted({name for names in frame[column] for name in names})
        names = _pseudonyms(distinct, kind, key)
        frame[column] = [tuple(names[name] for name in cell) for cell in frame[column]]
    arrival_s = frame["arrival_s"].to_numpy(dtype=np.float64)
    start_s = float(arrival_s[0]) if len(arrival_s) else 0.0
    shifted_s = arrival_s - start_s
    if how.time_step_s > 0:
        shifted_s = np.floor(shifted_s / how.time_step_s) * how.time_step_s
    frame["arrival_s"] = shifted_s
    width = max(1, len(str(max(0, len(frame) - 1))))
    frame["request_id"] = [f"r{row:0{width}d}" for row in range(len(frame))]
    notes: tuple[str, ...] = (
        "anonymised: pseudonyms, numbered requests, arrivals from the first one, further columns dropped",
    )
    if how.time_step_s > 0:
        notes = (*notes, f"arrivals rounded down to {how.time_step_s:g} s")
    provenance = Provenance(
        source="anonymised trace", defaults=trace.provenance.defaults, left_out=trace.provenance.left_out, notes=notes
    )
    return replace(trace, requests=frame, provenance=provenance, duration_s=trace.duration_s - start_s)


def _pseudonyms(names: Sequence[str], kind: str, key: bytes) -> dict[str, str]:
    """Name to pseudonym; the empty name and the default stay, because they name nobody."""
    found = {name: name if name in ("", "default") else f"{kind}-{_digest(name, kind, key)}" for name in names}
    if len(set(found.values())) != len(found):
        raise one_problem(f"{kind} names", "two got one pseudonym", "distinct ones", "Take another key")
    return found


def _digest(name: str, kind: str, key: bytes) -> str:
    return hmac.new(key, f"{kind}\x1f{name}".encode(), hashlib.sha256).hexdigest()[:NAME_DIGITS]
