"""Synthesis of traffic like that of the two Katz services, whose request logs are not public.

Add-ons per request and popularity follow the published figures; instances repeat their own LoRAs, so that the unique
LoRAs per instance do too. When requests arrive is not published: that part is an assumption, stated in the provenance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from traces.frame import checked_frame
from traces.katz_figures import FIGURES, Service, ServiceFigures
from traces.problems import InputError, Problem
from traces.streams import stream
from traces.trace import Provenance, Trace

DAY_S: Final = 86_400.0
MAX_REQUESTS: Final = 5_000_000
_PERMUTED_AT_ONCE: Final = 20_000  # rows of the ControlNet draw held at a time: 20k × 94 × 8 bytes = 15 MB

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class RateShape:
    """How arrivals spread over time: a daily rhythm, and bursts on top of it.

    Clusters of requests begin as a Poisson process (given their number) with rate 1 + amplitude·cos(2π(h − peak)/24);
    a cluster is one request or a burst, whose size less one is geometric and whose members follow its begin after
    exponential times.
    """

    daily_amplitude: float = 0.6
    """0 for a level rate, below 1."""
    peak_hour: float = 15.0
    starts_at_hour: float = 0.0
    """Hour of day at the trace's start."""
    burst_share: float = 0.2
    """Share of clusters that are bursts."""
    mean_burst_size: float = 6.0
    """Requests of a burst on average, at least 2."""
    burst_spread_s: float = 20.0
    """Mean time from a burst's begin to one of its members."""

    def problems(self) -> list[Problem]:
        """What is out of range."""
        ranges = (
            ("daily_amplitude", self.daily_amplitude, 0.0, 0.99),
            ("peak_hour", self.peak_hour, 0.0, 24.0),
            ("starts_at_hour", self.starts_at_hour, 0.0, 24.0),
            ("burst_share", self.burst_share, 0.0, 1.0),
            ("mean_burst_size", self.mean_burst_size, 2.0, 1e6),
            ("burst_spread_s", self.burst_spread_s, 0.0, 1e6),
        )
        return [
            Problem(f"rate shape {name}", f"got {value:g}", f"{low:g}..{high:g}")
            for name, value, low, high in ranges
            if not low <= value <= high
        ]

    def in_words(self) -> str:
        """The assumption as a sentence."""
        return (
            f"Poisson clusters with a daily rhythm of ±{self.daily_amplitude:.0%} peaking at {self.peak_hour:g} h, starting at "
            f"{self.starts_at_hour:g} h; {self.burst_share:.0%} of the clusters are bursts of {self.mean_burst_size:g} requests "
            f"on average within about {self.burst_spread_s:g} s"
        )


POISSON: Final = RateShape(daily_amplitude=0.0, burst_share=0.0)


def synthesise(
    service: Service,
    n_requests: int,
    n_instances: int,
    duration_s: float,
    seed: int,
    rate_shape: RateShape | None = None,
) -> Trace:
    """A trace like service A or B, exactly ``n_requests`` long, with a column ``instance_id``.

    How many requests an instance serves follows the published spread; which request goes to which instance is random.
    Each LoRA use repeats a uniformly chosen earlier use of its instance with probability ``lora_reuse`` and is drawn
    from the published popularity otherwise: every single use still has exactly the published popularity (a Pólya urn),
    while instances see fewer different LoRAs. ControlNets are drawn without replacement with exactly the published
    shares. Not modelled, because not published: dependence between the numbers of ControlNets and LoRAs, drift of
    popularity over the days, and the fifth of the instances that serve only very few LoRAs.

    Raises:
        InputError: an argument is out of range.
    """
    shape = RateShape() if rate_shape is None else rate_shape
    _check_arguments(service, n_requests, n_instances, duration_s, seed, shape)
    figures = FIGURES[service]
    arrival = _arrivals(n_requests, duration_s, shape, seed)
    instances = _instances(figures, n_requests, n_instances, stream(seed, service, "instances"))
    controlnets = _controlnets(figures, n_requests, stream(seed, service, "controlnets"))
    loras = _loras(figures, instances, stream(seed, service, "loras"))
    frame = pd.DataFrame(
        {
            "request_id": [f"{service}{number:06d}" for number in range(n_requests)],
            "arrival_s": arrival,
            "base_model_id": "sdxl-base",
            "n_steps": 50,
            "width_px": 1024,
            "height_px": 1024,
            "n_images": 1,
            "guidance_scale": 7.5,
            "controlnet_ids": _named(controlnets, f"{service}-controlnet-", 2),
            "controlnet_scales": _repeated(1.0, controlnets),
            "control_start": _repeated(0.0, controlnets),
            "control_end": _repeated(1.0, controlnets),
            "lora_ids": _named(loras, f"{service}-lora-", 4),
            "lora_scales": _repeated(1.0, loras),
            "tenant_id": "",
            "priority": 0,
            "instance_id": [f"{service}-i{number:03d}" for number in instances.tolist()],
        }
    )
    provenance = Provenance(
        source=f"synthetic, after service {service} of Katz (USENIX ATC 2025; figures from github.com/modelscope/Katz)",
        licence="Apache-2.0",
        notes=(
            "published: add-ons per request, popularity of ControlNets and LoRAs, requests per instance, mean unique LoRAs "
            "per instance; SDXL, 50 steps, one image",
            f"assumed, arrivals: {shape.in_words()}",
            f"assumed, locality: a share of {figures.lora_reuse:g} of the LoRA uses repeats an earlier one of the same instance",
            "assumed: 1024×1024 px, guidance 7.5, all weights 1, numbers of ControlNets and LoRAs independent",
        ),
        seed=seed,
    )
    return checked_frame(frame, "synthesis", provenance, duration_s)


def _check_arguments(
    service: str, n_requests: int, n_instances: int, duration_s: float, seed: int, shape: RateShape
) -> None:
    problems = shape.problems()
    if service not in FIGURES:
        problems.append(Problem("service", f"got {service!r}", f"one of {', '.join(FIGURES)}"))
    if not 1 <= n_requests <= MAX_REQUESTS:
        problems.append(Problem("number of requests", f"got {n_requests}", f"1..{MAX_REQUESTS}"))
    if not 1 <= n_instances <= n_requests:
        problems.append(
            Problem("number of instances", f"got {n_instances}", f"1..{n_requests}, the number of requests")
        )
    if not (math.isfinite(duration_s) and duration_s > 0):
        problems.append(Problem("duration", f"got {duration_s:g} s", "a number of seconds above 0"))
    if seed < 0:
        problems.append(Problem("seed", f"got {seed}", "a whole number, at least 0"))
    if problems:
        raise InputError(problems)


def _arrivals(n: int, duration_s: float, shape: RateShape, seed: int) -> FloatArray:
    random = stream(seed, "arrivals")
    is_burst = random.random(n) < shape.burst_share
    extra = random.geometric(1.0 / (shape.mean_burst_size - 1.0), n)  # ≥ 1, mean: size − 1
    sizes = np.where(is_burst, 1 + extra, 1)
    n_clusters = int(np.searchsorted(np.cumsum(sizes), n)) + 1
    sizes = sizes[:n_clusters]
    sizes[-1] -= int(sizes.sum()) - n
    begins = _rhythmic_times(random.random(n_clusters), duration_s, shape)
    cluster = np.repeat(np.arange(n_clusters), sizes)
    is_member = np.concatenate([[False], cluster[1:] == cluster[:-1]])
    delays = np.where(is_member, random.exponential(shape.burst_spread_s, n), 0.0)
    # The window is a piece of a longer day: what runs past its end stands for what ran into its begin.
    return np.sort(np.mod(begins[cluster] + delays, duration_s))


def _rhythmic_times(uniform: FloatArray, duration_s: float, shape: RateShape) -> FloatArray:
    """Inverse of the cumulative rate, tabulated every minute or finer."""
    n_points = min(max(int(duration_s // 60), 1000), 100_000) + 1
    times = np.linspace(0.0, duration_s, n_points)
    turns = 2 * math.pi / DAY_S
    phase = (shape.starts_at_hour - shape.peak_hour) * 3600.0
    cumulative = times + shape.daily_amplitude / turns * (
        np.sin(turns * (times + phase)) - math.sin(turns * phase)
    )  # integral of 1 + a·cos
    inverse: FloatArray = np.interp(uniform * cumulative[-1], cumulative, times)
    return inverse


def _instances(figures: ServiceFigures, n_requests: int, n_instances: int, random: np.random.Generator) -> IntArray:
    """Instance of each request; the sizes follow the published quantiles, at least one request each."""
    quantiles = figures.instance_request_quantiles
    middles = (np.arange(n_instances) + 0.5) / n_instances
    weights = np.interp(middles, np.linspace(0, 1, len(quantiles)), quantiles)
    ideal = weights / weights.sum() * (n_requests - n_instances)
    sizes = 1 + np.floor(ideal).astype(np.int64)
    short = n_requests - int(sizes.sum())
    sizes[np.argsort(np.floor(ideal) - ideal, kind="stable")[:short]] += 1  # largest remainders first
    return random.permutation(np.repeat(np.arange(n_instances, dtype=np.int64), sizes))


def shares_of_curve(curve: tuple[tuple[int, float], ...]) -> FloatArray:
    """Share of uses of each rank, from a curve of cumulative percents with straight lines in between. [distinct]"""
    tops, percents = np.array(curve, dtype=np.float64).T
    shares: FloatArray = np.diff(np.interp(np.arange(int(tops[-1]) + 1), tops, percents)) / percents[-1]
    return shares


def _numbers_per_request(percent: tuple[float, ...], n: int, random: np.random.Generator) -> IntArray:
    shares = np.array(percent) / sum(percent)
    return random.choice(len(percent), size=n, p=shares).astype(np.int64)


def _controlnets(figures: ServiceFigures, n: int, random: np.random.Generator) -> list[tuple[int, ...]]:
    """Distinct ControlNets of each request, by systematic sampling over a random order (Madow 1949).

    With k to choose, each is taken with probability exactly k × its share (no share exceeds 1/3), so the shares of all
    uses are the published ones; redrawing duplicates would flatten them.
    """
    shares = shares_of_curve(figures.controlnet_top_percent)
    numbers = _numbers_per_request(figures.controlnets_per_request_percent, n, random)
    chosen: list[tuple[int, ...]] = [()] * n
    for k in range(1, len(figures.controlnets_per_request_percent)):
        rows = np.flatnonzero(numbers == k)
        for begin in range(0, len(rows), _PERMUTED_AT_ONCE):
            part = rows[begin : begin + _PERMUTED_AT_ONCE]
            orders = random.permuted(np.tile(np.arange(len(shares)), (len(part), 1)), axis=1)
            cumulative = np.cumsum(k * shares[orders], axis=1)
            first = random.random(len(part))
            picks = [(cumulative <= (first + j)[:, None]).sum(axis=1).clip(max=len(shares) - 1) for j in range(k)]
            names = np.stack([orders[np.arange(len(part)), pick] for pick in picks], axis=1)
            for row, ranks in zip(part.tolist(), names.tolist(), strict=True):
                chosen[row] = tuple(ranks)
    return chosen


def _loras(figures: ServiceFigures, instances: IntArray, random: np.random.Generator) -> list[tuple[int, ...]]:
    """Distinct LoRAs of each request: a Pólya urn per instance over the published popularity."""
    shares = shares_of_curve(figures.lora_top_percent)
    numbers = _numbers_per_request(figures.loras_per_request_percent, len(instances), random)
    by_instance = np.argsort(instances, kind="stable")
    request = np.repeat(by_instance, numbers[by_instance])  # uses of an instance are contiguous, in order of time
    instance = instances[request]
    n_uses = len(request)
    begin = np.searchsorted(instance, instance, side="left")
    earlier = np.arange(n_uses) - begin
    fresh = np.searchsorted(np.cumsum(shares), random.random(n_uses)).clip(max=len(shares) - 1)
    is_copy = (random.random(n_uses) < figures.lora_reuse) & (earlier > 0)
    origin = np.where(is_copy, begin + (random.random(n_uses) * earlier).astype(np.int64), np.arange(n_uses))
    while True:  # follow copies of copies; each round halves the way
        further = origin[origin]
        if np.array_equal(further, origin):
            break
        origin = further
    uses = fresh[origin].tolist()
    _part_twins(uses, request.tolist(), instance.tolist())
    chosen: list[tuple[int, ...]] = [()] * len(instances)
    for row, rank in zip(request.tolist(), uses, strict=True):
        if rank not in chosen[row]:  # an instance that knows a single LoRA has nothing to exchange it for
            chosen[row] = (*chosen[row], rank)
    return chosen


def _part_twins(uses: list[int], request: list[int], instance: list[int]) -> None:
    """Where a request got the same LoRA twice, exchanges one with a nearby use of the instance; the counts stay."""
    n = len(uses)
    for place in range(1, n):
        if request[place] != request[place - 1] or uses[place] != uses[place - 1]:
            continue
        for step in range(1, n):
            others = [other for other in (place + step, place - 1 - step) if 0 <= other < n]
            others = [other for other in others if instance[other] == instance[place]]
            if not others:
                break
            found = next((o for o in others if _may_exchange(uses, request, place, o)), None)
            if found is not None:
                uses[place], uses[found] = uses[found], uses[place]
                break


def _may_exchange(uses: list[int], request: list[int], place: int, other: int) -> bool:
    if uses[other] == uses[place]:
        return False
    mates = [o for o in (other - 1, other + 1) if 0 <= o < len(uses) and request[o] == request[other]]
    return all(uses[mate] != uses[place] for mate in mates)


def _named(ranks: list[tuple[int, ...]], prefix: str, n_digits: int) -> pd.Series[Any]:
    """Names count from 1, the most popular first."""
    values = np.empty(len(ranks), dtype=object)
    for row, each in enumerate(ranks):
        values[row] = tuple(f"{prefix}{rank + 1:0{n_digits}d}" for rank in each)
    return pd.Series(values, dtype=object)


def _repeated(value: float, ranks: list[tuple[int, ...]]) -> pd.Series[Any]:
    values = np.empty(len(ranks), dtype=object)
    for row, each in enumerate(ranks):
        values[row] = (value,) * len(each)
    return pd.Series(values, dtype=object)
