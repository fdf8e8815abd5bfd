"""What a trace is like: rates and burstiness, add-ons, popularity, and how many loads a cache of a given size would see."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from traces.problems import one_problem
from traces.stack_distance import LoadCurve, load_curve
from traces.trace import Trace
from traces.writer import plain_provenance

HOUR_S: Final = 3_600.0
DAY_S: Final = 86_400.0
TOPS: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)
MIX_SHOWN: Final = 8

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Rates:
    """How arrivals spread over time."""

    n_requests: int
    duration_s: float
    mean_per_s: float
    slot_s: float
    """Length of the slots counted below: an hour, or a minute for a trace shorter than six hours."""
    slot_mean: float
    slot_median: float
    slot_max: int
    peak_to_mean: float
    """Requests of the busiest slot over the mean slot."""
    interarrival_cv: float | None
    """Standard deviation over mean of the gaps between arrivals; 1 for a Poisson stream. None below three requests."""
    dispersion: float | None
    """Index of dispersion, variance over mean of the counts per slot; 1 for a Poisson stream. None for a single slot."""
    slot_counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Day:
    """One day of the trace, counted from its start."""

    day: int
    n_requests: int
    busiest_slot: int
    interarrival_cv: float | None


@dataclass(frozen=True, slots=True)
class Popularity:
    """How uses concentrate on few things."""

    n_uses: int
    n_distinct: int
    top_shares: Mapping[int, float]
    """k to the share of all uses that go to the k most used ones."""


@dataclass(frozen=True, slots=True)
class AddOns:
    """One kind of add-on."""

    per_request: Mapping[int, float]
    """Number of add-ons to the share of requests with that many."""
    mean_per_request: float
    popularity: Popularity
    loads: LoadCurve


@dataclass(frozen=True, slots=True)
class Description:
    """The character of a trace. Shares are 0..1; loads are per request."""

    rates: Rates
    days: tuple[Day, ...]
    n_instances: int
    instance_rule: str
    controlnets: AddOns
    loras: AddOns
    checkpoints: AddOns
    checkpoint_switch_share: float | None
    """Share of consecutive requests (of the whole trace) that ask for another checkpoint. None below two requests."""
    images_mix: Mapping[str, float]
    steps_mix: Mapping[str, float]
    size_mix: Mapping[str, float]
    n_tenants: int
    provenance: Mapping[str, Any]

    def to_plain(self) -> dict[str, Any]:
        """Plain values for JSON; the keys of mappings become text."""
        plain = _plain(asdict(self))
        assert isinstance(plain, dict)  # noqa: S101 - a dataclass always gives a dict; this tells mypy
        return plain


def describe(trace: Trace, n_instances: int | None = None) -> Description:
    """Characterises a trace.

    Requests go to instances by the column ``instance_id`` where there is one (names in order of first arrival; taken
    modulo ``n_instances`` if that is given and smaller), otherwise in turn, in order of arrival.

    Args:
        trace: at least one request, in a window longer than 0.
        n_instances: serving instances; if None, as many as the trace names, or one.

    Raises:
        InputError: there is nothing to describe, or ``n_instances`` is below 1.
    """
    instances, n_instances, rule = spread(trace, n_instances)
    requests = trace.requests
    models = _codes(requests["base_model_id"])
    return Description(
        rates=rates(trace),
        days=_days(trace),
        n_instances=n_instances,
        instance_rule=rule,
        controlnets=_add_ons(requests["controlnet_ids"], instances, n_instances),
        loras=_add_ons(requests["lora_ids"], instances, n_instances),
        checkpoints=_of_uses(models, np.ones(len(trace), dtype=np.int64), instances, n_instances),
        checkpoint_switch_share=float(np.mean(models[1:] != models[:-1])) if len(trace) > 1 else None,
        images_mix=_mix(requests["n_images"].astype(str)),
        steps_mix=_mix(requests["n_steps"].astype(str)),
        size_mix=_mix(requests["width_px"].astype(str) + "×" + requests["height_px"].astype(str)),
        n_tenants=int(requests["tenant_id"].nunique()),
        provenance=plain_provenance(trace),
    )


def rates(trace: Trace) -> Rates:
    """Rates and burstiness alone; cheap enough to compare a trace before and after scaling.

    Raises:
        InputError: the trace has no request or its window has no length.
    """
    if len(trace) == 0 or not trace.duration_s > 0:
        what = f"has {len(trace)} requests in {trace.duration_s:g} s"
        raise one_problem("trace", what, "at least one request in a window longer than 0", "Give a longer trace")
    arrival = trace.requests["arrival_s"].to_numpy(dtype=np.float64)
    slot_s = HOUR_S if trace.duration_s >= 6 * HOUR_S else 60.0
    counts = _slot_counts(arrival, trace.duration_s, slot_s)
    mean = float(counts.mean())
    return Rates(
        n_requests=len(trace),
        duration_s=trace.duration_s,
        mean_per_s=trace.rate_per_s,
        slot_s=slot_s,
        slot_mean=mean,
        slot_median=float(np.median(counts)),
        slot_max=int(counts.max()),
        peak_to_mean=float(counts.max() / mean),
        interarrival_cv=_interarrival_cv(arrival),
        dispersion=float(counts.var(ddof=1) / mean) if len(counts) > 1 else None,
        slot_counts=tuple(counts.tolist()),
    )


def spread(trace: Trace, n_instances: int | None = None) -> tuple[IntArray, int, str]:
    """Instance of each request (0..n-1), their number, and the rule in words. See :func:`describe`."""
    if n_instances is not None and n_instances < 1:
        raise one_problem("number of instances", f"got {n_instances}", "a whole number, at least 1")
    if "instance_id" in trace.requests.columns:
        codes = _codes(trace.requests["instance_id"])
        named = int(codes.max()) + 1 if len(codes) else 0
        if n_instances is None or n_instances >= named:
            return codes, named, "by the trace's instance_id"
        return codes % n_instances, n_instances, f"the trace's {named} instances folded onto {n_instances}"
    n_instances = n_instances or 1
    return np.arange(len(trace), dtype=np.int64) % n_instances, n_instances, "in turn, in order of arrival"


def _slot_counts(arrival: npt.NDArray[np.float64], duration_s: float, slot_s: float) -> IntArray:
    n_slots = max(int(np.ceil(duration_s / slot_s)), 1)
    slots = np.minimum((arrival // slot_s).astype(np.int64), n_slots - 1)  # an arrival at the very end
    return np.bincount(slots, minlength=n_slots).astype(np.int64)


def _interarrival_cv(arrival: npt.NDArray[np.float64]) -> float | None:
    gaps = np.diff(arrival)
    if len(gaps) < 2 or not gaps.any():
        return None
    return float(gaps.std(ddof=1) / gaps.mean())


def _days(trace: Trace) -> tuple[Day, ...]:
    arrival = trace.requests["arrival_s"].to_numpy(dtype=np.float64)
    n_days = max(int(np.ceil(trace.duration_s / DAY_S)), 1)
    edges = np.searchsorted(arrival, np.arange(n_days + 1) * DAY_S, side="left")
    edges[-1] = len(arrival)
    slot_s = HOUR_S if trace.duration_s >= 6 * HOUR_S else 60.0
    days = []
    for day in range(n_days):
        part = arrival[edges[day] : edges[day + 1]] - day * DAY_S
        counts = _slot_counts(part, min(DAY_S, trace.duration_s - day * DAY_S), slot_s)
        days.append(Day(day, len(part), int(counts.max()), _interarrival_cv(part)))
    return tuple(days)


def _codes(names: pd.Series[Any]) -> IntArray:
    """Numbers 0.. in order of first appearance; a missing name is one of its own."""
    codes, _ = pd.factorize(names.to_numpy(dtype=object), use_na_sentinel=False)
    return codes.astype(np.int64)


def _add_ons(lists: pd.Series[Any], instances: IntArray, n_instances: int) -> AddOns:
    lengths = np.fromiter((len(names) for names in lists), dtype=np.int64, count=len(lists))
    flat = np.empty(int(lengths.sum()), dtype=object)
    place = 0
    for names in lists:
        for name in names:
            flat[place] = name
            place += 1
    codes = _codes(pd.Series(flat, dtype=object)) if len(flat) else np.zeros(0, dtype=np.int64)
    return _of_uses(codes, lengths, instances, n_instances)


def _of_uses(codes: IntArray, lengths: IntArray, instances: IntArray, n_instances: int) -> AddOns:
    n = len(lengths)
    counts = np.bincount(lengths)
    uses = np.sort(np.bincount(codes))[::-1] if len(codes) else np.zeros(0, dtype=np.int64)
    share = np.cumsum(uses) / max(int(uses.sum()), 1)
    tops = [top for top in TOPS if top < len(uses)]
    top_shares = {top: float(share[top - 1]) for top in ([*tops, len(uses)] if len(uses) else [])}
    return AddOns(
        per_request={number: int(count) / n for number, count in enumerate(counts.tolist()) if count},
        mean_per_request=float(lengths.mean()),
        popularity=Popularity(len(codes), len(uses), top_shares),
        loads=load_curve(codes, np.repeat(instances, lengths), n, n_instances),
    )


def _mix(values: pd.Series[Any]) -> dict[str, float]:
    """The most common values with their shares, ties by name; what is left is "other"."""
    counts = sorted(values.value_counts().items(), key=lambda item: (-item[1], str(item[0])))
    mix = {str(value): count / len(values) for value, count in counts[:MIX_SHOWN]}
    rest = sum(count for _, count in counts[MIX_SHOWN:])
    return {**mix, "other": rest / len(values)} if rest else mix


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value
