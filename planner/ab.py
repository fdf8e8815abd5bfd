"""Judges a test on live traffic from the request records of its two sides: differences with intervals, guardrails, one verdict.

Intervals come from a circular block bootstrap (Politis and Romano 1992) of requests in order of arrival, blocks of about the
square root of n, each side by itself: neighbours that waited in one queue are drawn together.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import pandas as pd

from planner.traffic import stream_seed
from planner.workload import Floats
from traces.problems import InputError, Problem
from traces.reader import read_table
from traces.records import REQUEST_RECORD_COLUMNS

REQUESTS_MIN: Final = 100
N_RESAMPLES: Final = 1000
LEVEL: Final = 0.95
MIX_DISTANCE_MAX: Final = 0.1
"""Total variation distance between what the two sides were asked for; above it they did different work."""
FAILURE_MARGIN: Final = 0.001
IN_TIME_MARGIN: Final = 0.01
P99_MARGIN_RATIO: Final = 0.10
FAILURES_MIN: Final = 5
QUANTILES: Final = (0.5, 0.95, 0.99)
FIGURES: Final = ("mean latency", "p50 latency", "p95 latency", "p99 latency", "share without an image")
CHUNK_VALUES: Final = 2_000_000
"""Latencies resampled at once: 16 MB."""
Verdict = Literal["B is better", "B is worse", "no difference shown", "guardrail broken", "not comparable"]


@dataclass(frozen=True, slots=True)
class Difference:
    """One figure of both sides; B less A with its interval."""

    figure: str
    unit: str
    a: float
    b: float
    difference: float
    low: float
    high: float

    @property
    def words(self) -> tuple[str, str, str, str, str]:
        """Figure, A, B, difference, interval; shares in per cent and their differences in percentage points."""
        scale, unit, short = (1.0, " s", " s") if self.unit == "s" else (100.0, " %", " pp")
        a, b, difference, low, high = (
            scale * value for value in (self.a, self.b, self.difference, self.low, self.high)
        )
        return (
            self.figure,
            f"{a:.2f}{unit}",
            f"{b:.2f}{unit}",
            f"{difference:+.2f}{short}",
            f"{low:+.2f} to {high:+.2f}",
        )


@dataclass(frozen=True, slots=True)
class Guardrail:
    """Something that must not get worse, whatever else gets better."""

    name: str
    is_broken: bool
    why: str


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the test says."""

    verdict: Verdict
    sentence: str
    n_requests_a: int
    n_requests_b: int
    mix_distance: float
    differences: tuple[Difference, ...]
    guardrails: tuple[Guardrail, ...]

    def to_plain(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


@dataclass(frozen=True, slots=True, eq=False)
class _Side:
    latency_s: Floats
    """Infinite for a request without an image."""
    frame: pd.DataFrame


def judge(log_a: Path, log_b: Path, slo_latency_s: float | None = None, seed: int = 0) -> Judgement:
    """Compares B with A.

    Args:
        log_a: request records (Parquet), or the folder that holds ``requests.parquet``.
        log_b: likewise.
        slo_latency_s: also compares the share of requests in time.
        seed: of the bootstrap.

    Raises:
        InputError: a log cannot be read, or has too few requests to judge by.
    """
    a, b = _sides(log_a, log_b)
    distance = mix_distance(a.frame, b.frame)
    found = _differences(a, b, slo_latency_s, seed)
    by_name = {item.figure: item for item in found}
    guardrails = _guardrails(by_name, len(b.frame))
    verdict, sentence = _verdict(by_name, guardrails, distance)
    return Judgement(verdict, sentence, len(a.frame), len(b.frame), distance, tuple(found), guardrails)


def _sides(log_a: Path, log_b: Path) -> tuple[_Side, _Side]:
    sides: list[_Side] = []
    problems: list[Problem] = []
    for name, path in (("LOG_A", log_a), ("LOG_B", log_b)):
        file = path / "requests.parquet" if path.is_dir() else path
        try:
            frame = read_table(file, REQUEST_RECORD_COLUMNS)
        except InputError as error:
            problems += error.problems
            continue
        is_done = (frame["status"] == "done").to_numpy(dtype=np.bool_)
        latency_s = frame["latency_s"].to_numpy(dtype=np.float64, na_value=np.nan)
        if len(frame) < REQUESTS_MIN or is_done.sum() < REQUESTS_MIN:
            what = f"has {len(frame)} requests, {int(is_done.sum())} of them done"
            problems.append(Problem(f"{name} {path}", what, f"{REQUESTS_MIN} done or more", "Let the test run longer"))
            continue
        if not np.isfinite(latency_s[is_done]).all():
            problems.append(Problem(f"{name} {path}", "has a done request without latency_s", "seconds for each"))
            continue
        order = np.argsort(frame["arrival_s"].to_numpy(dtype=np.float64), kind="stable")
        sides.append(_Side(np.where(is_done, latency_s, np.inf)[order], frame))
    if problems:
        raise InputError(problems)
    return sides[0], sides[1]


def _figures(values: Floats, slo_latency_s: float | None) -> Floats:
    """Every figure of each row of latencies (rows × n); latencies of requests without an image are infinite."""
    ordered = np.sort(values, axis=1)
    is_done = np.isfinite(ordered)
    n_done = is_done.sum(axis=1)
    rows = [np.where(is_done, ordered, 0.0).sum(axis=1) / np.maximum(n_done, 1)]
    for level in QUANTILES:
        place = level * np.maximum(n_done - 1, 0)  # between neighbours, as numpy's default does
        low = np.floor(place).astype(np.int64)
        at_low = np.take_along_axis(ordered, low[:, None], axis=1)[:, 0]
        at_high = np.take_along_axis(ordered, np.minimum(low + 1, np.maximum(n_done - 1, 0))[:, None], axis=1)[:, 0]
        share = place - low
        rows.append(at_low * (1 - share) + at_high * share)
    rows = [np.where(n_done > 0, row, np.nan) for row in rows]
    rows.append(1.0 - n_done / values.shape[1])
    if slo_latency_s is not None:
        rows.append((values <= slo_latency_s).mean(axis=1))
    return np.stack(rows)


def _differences(a: _Side, b: _Side, slo_latency_s: float | None, seed: int) -> list[Difference]:
    names = [*FIGURES, *(["share in time"] if slo_latency_s is not None else [])]
    draws = np.zeros((len(names), N_RESAMPLES))
    for side, sign in ((a, -1.0), (b, 1.0)):
        rng = np.random.default_rng(stream_seed(seed, f"ab {sign:g}"))
        n = len(side.latency_s)
        size = max(1, math.isqrt(n))
        offsets = np.arange(size)
        per_chunk = max(1, CHUNK_VALUES // n)
        for first_draw in range(0, N_RESAMPLES, per_chunk):
            n_rows = min(per_chunk, N_RESAMPLES - first_draw)
            first = rng.integers(0, n, (n_rows, math.ceil(n / size)))
            places = ((first[:, :, None] + offsets) % n).reshape(n_rows, -1)[:, :n]
            draws[:, first_draw : first_draw + n_rows] += sign * _figures(side.latency_s[places], slo_latency_s)
    of_a, of_b = (_figures(side.latency_s[None, :], slo_latency_s)[:, 0] for side in (a, b))
    found = []
    for place, name in enumerate(names):
        low, high = np.nanquantile(draws[place], ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
        unit = "s" if name.endswith("latency") else "ratio"
        x, y = float(of_a[place]), float(of_b[place])
        found.append(Difference(name, unit, x, y, y - x, float(low), float(high)))
    return found


def mix_distance(a: pd.DataFrame, b: pd.DataFrame) -> float:
    """Half the summed differences of the shares of each kind of request (steps, images, ControlNets, LoRAs): 0 alike, 1 disjoint."""
    columns = ["n_steps", "n_images", "n_controlnets", "n_loras"]
    shares = [frame.groupby(columns, sort=True).size() / len(frame) for frame in (a, b)]
    return float(shares[0].sub(shares[1], fill_value=0.0).abs().sum() / 2)


def _guardrails(found: dict[str, Difference], n_b: int) -> tuple[Guardrail, ...]:
    lost = found["share without an image"]
    rails = [
        Guardrail(
            "requests without an image",
            # failures come in bursts, which no interval of one test understands: what was seen counts
            lost.difference > FAILURE_MARGIN and lost.b * n_b >= FAILURES_MIN - 0.5,
            f"{lost.a:.2%} → {lost.b:.2%}; broken if {FAILURES_MIN} or more, and more than {FAILURE_MARGIN:.1%} worse",
        )
    ]  # fmt: skip
    slowest = found["p99 latency"]
    rails.append(
        Guardrail(
            "p99 latency", slowest.low > P99_MARGIN_RATIO * slowest.a,
            f"{slowest.a:.2f} s → {slowest.b:.2f} s; broken if surely more than {P99_MARGIN_RATIO:.0%} slower",
        )
    )  # fmt: skip
    kept = found.get("share in time")
    if kept is not None:
        rails.append(
            Guardrail(
                "share in time", kept.high < -IN_TIME_MARGIN,
                f"{kept.a:.2%} → {kept.b:.2%}; broken if surely more than {IN_TIME_MARGIN:.0%} worse",
            )
        )  # fmt: skip
    return tuple(rails)


def _verdict(found: dict[str, Difference], guardrails: tuple[Guardrail, ...], distance: float) -> tuple[Verdict, str]:
    mean = found["mean latency"]
    shown = (
        f"{mean.difference:+.2f} s ({mean.low:+.2f} to {mean.high:+.2f}, {LEVEL:.0%} interval) against {mean.a:.2f} s"
    )
    if distance > MIX_DISTANCE_MAX:
        return "not comparable", (
            f"The two sides were asked for different work (distance {distance:.2f}, allowed {MIX_DISTANCE_MAX:g}): split requests at "
            "random, then compare again."
        )
    broken = [rail for rail in guardrails if rail.is_broken]
    if broken:
        return (
            "guardrail broken",
            f"Go back: {'; '.join(f'{rail.name} {rail.why}' for rail in broken)}. Mean latency {shown}.",
        )
    if mean.high < 0:
        return "B is better", f"B is faster: mean latency {shown}; no guardrail is broken.{_slower_tail(found)}"
    if mean.low > 0:
        return "B is worse", f"B is slower: mean latency {shown}."
    return "no difference shown", (
        f"Neither side is shown to be faster: mean latency {shown}. That is not proof that they are alike; the interval says how "
        "large a difference may still be."
    )


def _slower_tail(found: dict[str, Difference]) -> str:
    """What a faster mean hides: slow requests that were slower, and whether that may be chance."""
    tail = [item for item in (found["p95 latency"], found["p99 latency"]) if item.difference > 0]
    if not tail:
        return ""
    is_sure = any(item.low > 0 for item in tail)
    shown = "; ".join(f"{item.figure} {item.difference:+.2f} s ({item.low:+.2f} to {item.high:+.2f})" for item in tail)
    return f" But slow requests {'are' if is_sure else 'may be'} slower: {shown}."
