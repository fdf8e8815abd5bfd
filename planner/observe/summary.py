"""What a Prometheus server knows of an engine, by windows: counts and sums. It has no single request, so it gives no RequestRecord.

``summary.json`` is this table. All counts are of a window; latency is a histogram, so quantiles are known up to its buckets.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from planner.export import metric_names as names
from planner.observe.prometheus_http import Series, Server, samples
from planner.observe.series import Scrapes, gauge_at, gauge_mean, increases, scrapes_of, target_of, total
from planner.workload import Floats
from traces.problems import InputError, Problem, one_problem

SCHEMA_VERSION: Final = 1
FILE_BYTES_MAX: Final = 256 * 2**20
LEAD_S: Final = 300.0
"""Read before the first window, so that its counters have a value to start from."""
CHUNK_S: Final = 3600.0
ADD_ON_USES: Final = "diffplan_add_on_uses_total"
IMAGES: Final = "diffplan_images_total"
OPEN: Final = "diffplan_http_open_requests"
CLIENT_FAULT: Final = frozenset(
    [*(str(code) for code in range(400, 409)), *(f"41{digit}" for digit in range(10)), "422"]
)
"""As ``metric_names.CLIENT_FAULTS``: requests that were not ours to serve."""
Count = Annotated[float, Field(ge=0)]


class WindowRow(BaseModel):
    """One window. Of requests that ended in it, unless said otherwise."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    start_s: float
    """Unix seconds."""
    end_s: float
    is_covered: bool
    """False if scrapes are missing: the counts then belong to an unknown part of the window."""
    n_offered: float
    """Arrived in the window, and ours to serve: those that ended, and the change of those that are open."""
    n_answered: Count
    """Ours to serve, rejected ones included."""
    n_done: Count
    latency_le: tuple[Count, ...]
    """Done requests with a latency of at most each bucket's bound (``bounds_s``)."""
    latency_sum_s: Count
    stage_n: dict[str, Count]
    stage_sum_s: dict[str, Count]
    n_uses: dict[str, Count]
    """Kind (controlnet, lora) to its uses."""
    n_images: Count
    n_lora_hits: Count
    n_lora_misses: Count
    busy_ratio: dict[str, Count]
    """Pool to the busy share of its workers."""
    ready_replicas: dict[str, Count]
    """Pool to the mean number of workers that were ready."""
    queue_depth_mean: Count


class Summary(BaseModel):
    """All windows of one look at a server."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    schema_version: Literal[1] = 1
    source: str
    match: str
    window_s: Annotated[float, Field(gt=0)]
    scrape_interval_s: Annotated[float, Field(gt=0)]
    n_targets: int
    n_counter_resets: int
    """Counters that fell: restarts of the engine, one for each of its series."""
    bounds_s: tuple[float, ...]
    windows: tuple[WindowRow, ...]

    def quantile_s(self, share: float) -> float | None:
        """Latency quantile over all covered windows, linear within its bucket; None if nothing was done or it is past the last bound."""
        counts: Floats = np.zeros(len(self.bounds_s))
        for row in self.windows:
            if row.is_covered:
                counts = counts + np.array(row.latency_le)
        n_done = sum(row.n_done for row in self.windows if row.is_covered)
        place = int(np.searchsorted(counts, share * n_done))
        if n_done == 0 or place >= len(self.bounds_s):
            return None
        below, from_s = (counts[place - 1], self.bounds_s[place - 1]) if place else (0.0, 0.0)
        inside = counts[place] - below
        return float(from_s + (self.bounds_s[place] - from_s) * ((share * n_done - below) / inside if inside else 1.0))


@dataclass(frozen=True, slots=True)
class Stretch:
    """Which windows to read."""

    end_s: float
    """Unix seconds."""
    n_windows: int
    window_s: float

    @property
    def edges_s(self) -> Floats:
        """Of the windows."""
        edges: Floats = self.end_s - self.window_s * np.arange(self.n_windows, -1, -1, dtype=np.float64)
        return edges


def read_summary_of_server(server: Server, stretch: Stretch, match: str = "") -> Summary:
    """Asks a server for the engine's metrics.

    Args:
        match: label matchers, as ``job="diffplan",namespace="prod"``; the engine's metrics of every target if empty.

    Raises:
        InputError: see :func:`samples`; also if nothing was scraped in the stretch, or a histogram contradicts itself.
    """
    asked = _Asked(server, stretch, match)
    alive = asked.series(OPEN)
    try:
        scrapes = scrapes_of(alive)
    except ValueError:
        raise one_problem(
            server.url, f"has no scrapes of {OPEN}{{{match}}} in the {stretch.n_windows * stretch.window_s / 60:g} minutes asked for",
            "an engine that it scrapes", "Check --match, and that the engine's /metrics is a target that is up",
        ) from None  # fmt: skip
    return _summarise(asked, alive, scrapes)


class _Asked:
    """One metric after the other, in pieces that a server answers quickly; the pieces are joined."""

    def __init__(self, server: Server, stretch: Stretch, match: str) -> None:
        self.server, self.stretch, self.match = server, stretch, match

    def series(self, metric: str) -> list[Series]:
        begin_s, end_s = float(self.stretch.edges_s[0]) - LEAD_S, self.stretch.end_s
        pieces: dict[tuple[tuple[str, str], ...], list[Series]] = {}
        n_chunks = max(1, math.ceil((end_s - begin_s) / CHUNK_S))
        length_ms = math.ceil(1000 * (end_s - begin_s) / n_chunks)
        for k in range(n_chunks):
            at_s = end_s - (n_chunks - 1 - k) * length_ms / 1000
            for each in samples(self.server, f"{metric}{{{self.match}}}[{length_ms}ms]", at_s):
                pieces.setdefault(tuple(sorted(each.labels.items())), []).append(each)
        return [_joined(each) for _, each in sorted(pieces.items())]


def _joined(pieces: list[Series]) -> Series:
    at_s = np.concatenate([piece.at_s for piece in pieces])
    value = np.concatenate([piece.value for piece in pieces])
    at_s, first = np.unique(at_s, return_index=True)  # a sample on the border of two pieces is in both
    return Series(pieces[0].labels, at_s, value[first])


def _summarise(asked: _Asked, alive: list[Series], scrapes: Scrapes) -> Summary:
    edges_s = asked.stretch.edges_s
    n = len(edges_s) - 1
    n_resets = 0

    def risen(metric: str, **labels: str) -> Floats:
        return sum_of([s for s in asked_for(metric) if all(s.labels.get(k) == v for k, v in labels.items())])

    def sum_of(series: list[Series]) -> Floats:
        nonlocal n_resets
        found = [increases(each, edges_s, scrapes) for each in series]
        n_resets += sum(each.n_resets for each in found)
        return total(found, n)

    kept: dict[str, list[Series]] = {}

    def asked_for(metric: str) -> list[Series]:
        if metric not in kept:
            kept[metric] = asked.series(metric)
        return kept[metric]

    answered = sum_of([s for s in asked_for(names.REQUESTS) if s.labels.get("status") not in CLIENT_FAULT])
    stale_s = 5 * scrapes.interval_s
    n_open = total_gauge(alive, edges_s, stale_s)
    bounds, latency_le = _histogram(
        asked, [s for s in asked_for(f"{names.REQUEST_SECONDS}_bucket") if s.labels.get("status") == "done"], sum_of, n
    )
    done = risen(f"{names.REQUEST_SECONDS}_count", status="done")
    stages = ("queue_wait", *names.SERVICE_STAGES)
    stage_n = {each: risen(f"{names.STAGE_SECONDS}_count", stage=each, status="done") for each in stages}
    stage_sum_s = {each: risen(f"{names.STAGE_SECONDS}_sum", stage=each, status="done") for each in stages}
    uses = {kind: risen(ADD_ON_USES, kind=kind) for kind in ("controlnet", "lora")}
    latency_sum_s, n_images = risen(f"{names.REQUEST_SECONDS}_sum", status="done"), risen(IMAGES)
    hits, misses = risen(names.LORA_HITS), risen(names.LORA_MISSES)
    ready, busy = _pools(asked_for(names.WORKER_READY), asked_for(names.WORKER_BUSY_SECONDS), sum_of, edges_s)
    depth = _mean_of_sums(asked_for(names.QUEUE_DEPTH), edges_s)
    covered = scrapes.covered(edges_s)
    rows = tuple(
        WindowRow(
            start_s=float(edges_s[i]), end_s=float(edges_s[i + 1]), is_covered=bool(covered[i]),
            n_offered=float(answered[i] + n_open[i + 1] - n_open[i]), n_answered=float(answered[i]), n_done=float(done[i]),
            latency_le=tuple(latency_le[:, i].tolist()), latency_sum_s=float(latency_sum_s[i]),
            stage_n={k: float(v[i]) for k, v in stage_n.items()}, stage_sum_s={k: float(v[i]) for k, v in stage_sum_s.items()},
            n_uses={k: float(v[i]) for k, v in uses.items()}, n_images=float(n_images[i]), n_lora_hits=float(hits[i]),
            n_lora_misses=float(misses[i]), busy_ratio={k: float(v[i]) for k, v in busy.items()},
            ready_replicas={k: float(v[i]) for k, v in ready.items()}, queue_depth_mean=float(depth[i]),
        )
        for i in range(n)
    )  # fmt: skip
    return Summary(
        source=asked.server.url, match=asked.match, window_s=asked.stretch.window_s, scrape_interval_s=scrapes.interval_s,
        n_targets=len({target_of(each) for each in alive}), n_counter_resets=n_resets, bounds_s=bounds, windows=rows,
    )  # fmt: skip


def total_gauge(series: list[Series], edges_s: Floats, stale_s: float) -> Floats:
    """Sum of a gauge over its series at each edge."""
    result: Floats = np.zeros(len(edges_s))
    for each in series:
        result = result + gauge_at(each, edges_s, stale_s)
    return result


def _histogram(asked: _Asked, series: list[Series], sum_of: Any, n: int) -> tuple[tuple[float, ...], Floats]:
    by_bound: dict[float, list[Series]] = {}
    for each in series:
        try:
            bound = float(each.labels["le"])
        except (KeyError, ValueError):
            raise one_problem(
                asked.server.url, f"has a bucket with le={each.labels.get('le')!r}", "a number", "Check the exporter"
            ) from None
        if math.isfinite(bound):
            by_bound.setdefault(bound, []).append(each)
    bounds = tuple(sorted(by_bound))
    counts = np.array([sum_of(by_bound[bound]) for bound in bounds]).reshape(len(bounds), n)
    if np.any(np.diff(counts, axis=0) < -0.5):
        raise one_problem(
            f"{asked.server.url} {names.REQUEST_SECONDS}_bucket", "counts fewer requests in a larger bucket than in a smaller one",
            "cumulative buckets", "Check for two engines that write the same series",
        )  # fmt: skip
    return bounds, np.maximum.accumulate(counts, axis=0) if bounds else counts


def _pools(
    ready: list[Series], busy: list[Series], sum_of: Any, edges_s: Floats
) -> tuple[dict[str, Floats], dict[str, Floats]]:
    pools = sorted({each.labels.get("pool", "") for each in ready})
    window_s = np.diff(edges_s)
    n_ready = {pool: _mean_of_sums([s for s in ready if s.labels.get("pool", "") == pool], edges_s) for pool in pools}
    worked = {pool: sum_of([s for s in busy if s.labels.get("pool", "") == pool]) for pool in pools}
    ratio = {pool: worked[pool] / np.maximum(n_ready[pool] * window_s, 1e-9) * (n_ready[pool] > 0) for pool in pools}
    return n_ready, ratio


def _mean_of_sums(series: list[Series], edges_s: Floats) -> Floats:
    """Mean over a window of a gauge's sum over series; a series that is absent counts as 0."""
    sums: Floats = np.zeros(len(edges_s) - 1)
    most: Floats = np.zeros(len(edges_s) - 1)
    for each in series:
        held, n = gauge_mean(each, edges_s)
        sums, most = sums + held, np.maximum(most, n)
    mean: Floats = sums / np.maximum(most, 1.0)
    return mean


def to_json(summary: Summary) -> str:
    """Canonical JSON with a final newline."""
    return json.dumps(summary.model_dump(mode="json"), indent=1, ensure_ascii=True, allow_nan=False) + "\n"


def read_summary(path: Path) -> Summary:
    """Reads ``summary.json``; raises :class:`InputError` with every problem found."""
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise one_problem(str(path), f"is {path.stat().st_size} bytes", f"at most {FILE_BYTES_MAX}")
        return Summary.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise one_problem(
            str(path), f"cannot be read: {error}", "a summary.json of 'diffplan observe'", "Check the path"
        ) from None
    except ValidationError as error:
        raise InputError(
            Problem(f"{path} {'.'.join(map(str, item['loc']))}", item["msg"], "a summary.json of 'diffplan observe'")
            for item in error.errors(include_url=False)
        ) from None
