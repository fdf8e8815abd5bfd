"""Simulates the fleets of a roadmap's phases: a part of the traffic on a fleet of its own, over a few repetitions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from engine.allocation import ANY, Allocation, Topology
from planner.candidates import screen_base_replicas, shapes_of
from planner.diagnose_changes import resized
from planner.evaluation import Bench
from planner.fast.metrics import columns_of
from planner.money.evidence import Evidence
from planner.plan_record import Estimate
from planner.replication import repetition_service, run_allocation, warmup_of
from planner.statistics import t_interval
from planner.traffic import build_traffic
from planner.workload import Bools, Floats, Ints, Workload

REPETITIONS: Final = 3
GROUP_GAIN_MIN: Final = 1 / 3
"""The first add-ons that together bring a third of the gain are carved out first."""
Choose = Callable[[Workload], Bools]


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """Requests of one repetition that count, in order of arrival; infinite latency where there was no image."""

    rows: Ints
    """Of the whole traffic."""
    latency_s: Floats


@dataclass(frozen=True, slots=True)
class Group:
    """Requests that are carved out together."""

    words: str
    names: tuple[str, ...]
    """ControlNets; empty for the requests with LoRAs."""
    request_ratio: float
    gain_ratio: float
    """Of the GPU time that the recommendation saves."""

    def mask(self, workload: Workload) -> Bools:
        """The group's requests."""
        if not self.names:
            return np.asarray(workload.n_loras > 0)
        codes = {code for code, name in enumerate(workload.controlnet_names) if name in self.names}
        found: Bools = np.array(
            [bool(used) and codes.issuperset(used) for used in workload.controlnets], dtype=np.bool_
        )
        return found


def everything(workload: Workload) -> Bools:
    """All requests."""
    return np.ones(len(workload), dtype=np.bool_)


class Fleets:
    """Benches of one topology and one part of the traffic, laid out once; asked with allocations of any size."""

    def __init__(
        self, evidence: Evidence, topology: Topology, choose: Choose, n_repetitions: int = REPETITIONS
    ) -> None:
        self._evidence, self._scenario = evidence, evidence.scenario
        self.topology = topology
        self._benches, self._rows, self._warmup_s = [], [], []
        for repetition in range(n_repetitions):
            whole = build_traffic(self._scenario, evidence.folder, repetition).workload
            mask = choose(whole)
            part = whole.subset(mask)
            service = repetition_service(self._scenario, evidence.inputs, part, topology, repetition)
            self._benches.append(Bench.of(self._scenario, evidence.inputs, part, service, repetition))
            self._rows.append(np.flatnonzero(mask))
            self._warmup_s.append(warmup_of(self._scenario, whole))

    @property
    def gpu_seconds(self) -> Floats:
        """GPU time of each request of the first repetition, ControlNet workers included."""
        service = self._benches[0].service
        seconds: Floats = service.alone_s + service.controlnet_work_s
        return seconds

    def start(self) -> Allocation:
        """The smallest allocation of the topology for this traffic."""
        bench, inputs = self._benches[0], self._evidence.inputs
        shape = shapes_of(
            self._scenario, self.topology, bench.workload, bench.service, inputs.sizes, inputs.facts, inputs.gpu_kind
        )[0]
        return shape.allocation((1,) * (1 + len(shape.controlnet_pools)))

    def run(self, allocation: Allocation) -> list[Seen]:
        """Every repetition on one allocation."""
        return [self._run(index, allocation) for index in range(len(self._benches))]

    def _run(self, index: int, allocation: Allocation) -> Seen:
        bench = self._benches[index]
        run = bench.run(allocation)
        if run is None:
            done = run_allocation(self._scenario, bench.inputs, bench.workload, allocation, bench.service, index)
            frame = done.result.requests
            arrival_s = frame["arrival_s"].to_numpy(dtype=np.float64)
            is_done = (frame["status"] == "done").to_numpy(dtype=np.bool_)
            latency_s = np.where(is_done, frame["latency_s"].to_numpy(dtype=np.float64, na_value=np.nan), np.inf)
        else:
            columns = columns_of(run)
            arrival_s = columns.arrival_s
            latency_s = np.where(columns.is_done, columns.latency_s, np.inf)
        counts = arrival_s >= self._warmup_s[index]
        return Seen(self._rows[index][: len(counts)][counts], latency_s[counts])

    def fewest(self, start: Allocation, gpus_max: int) -> Allocation | None:
        """The fewest GPUs that keep the promise in every repetition, divided as well as they can be; None if none do."""
        slo = self._scenario.slo
        table = self._benches[0].service
        if float((table.alone_s <= slo.latency_s).mean()) < slo.attainment_ratio:
            return None
        sized = resized(start)
        floor = len(start.pools)

        def best(n_gpus: int) -> Allocation | None:
            tried = sized(n_gpus) if n_gpus != start.n_gpus else (start,)
            ranked = sorted(tried, key=lambda item: -in_time(self._run(0, item), slo.latency_s))
            for allocation in ranked[:2]:
                if all(in_time(seen, slo.latency_s) >= slo.attainment_ratio for seen in self.run(allocation)):
                    return allocation
            return None

        low = floor
        guess = screen_base_replicas(self._benches[0].workload, table.alone_s, slo.latency_s, slo.attainment_ratio, low)
        good, bad = max(low, min(guess, gpus_max)), low - 1
        found = best(good)
        while found is None:
            bad = good
            if good >= gpus_max:
                return None
            good = min(gpus_max, max(good + 1, round(good * 1.3)))
            found = best(good)
        while good - bad > 1:
            middle = (good + bad) // 2
            smaller = best(middle)
            if smaller is None:
                bad = middle
            else:
                good, found = middle, smaller
        return found


def in_time(seen: Seen, latency_s: float) -> float:
    """Share of the requests that have their image in time; 1 if there is none."""
    return float((seen.latency_s <= latency_s).mean()) if len(seen.latency_s) else 1.0


def together(first: Sequence[Seen], second: Sequence[Seen]) -> list[Seen]:
    """The requests of two fleets, in order of arrival again."""
    merged = []
    for one, other in zip(first, second, strict=True):
        rows = np.concatenate([one.rows, other.rows])
        order = np.argsort(rows, kind="stable")
        merged.append(Seen(rows[order], np.concatenate([one.latency_s, other.latency_s])[order]))
    return merged


def only(seen: Sequence[Seen], masks: Sequence[Bools]) -> list[Seen]:
    """Those requests that a mask over the whole traffic keeps."""
    return [
        Seen(one.rows[mask[one.rows]], one.latency_s[mask[one.rows]]) for one, mask in zip(seen, masks, strict=True)
    ]


def estimates(seen: Sequence[Seen], latency_s: float, level: float) -> tuple[Estimate, Estimate, Estimate]:
    """p50, p95 and the share in time over the repetitions; a quantile that is not an image is null."""

    def at(quantile: float) -> Estimate:
        values = [float(np.quantile(one.latency_s, quantile, method="inverted_cdf")) for one in seen]
        return Estimate.of(t_interval(values, level)) if np.isfinite(values).all() else Estimate.of(None)

    return at(0.5), at(0.95), Estimate.of(t_interval([in_time(one, latency_s) for one in seen], level))


def choose_group(workload: Workload, gain_s: Floats) -> Group | None:
    """The add-ons whose requests gain most GPU time; None if no add-on gains anything, or all requests would go at once."""
    total = float(gain_s.sum())
    if total <= 0:
        return None
    if not workload.n_controlnets.any():
        has_loras = workload.n_loras > 0
        gained = float(gain_s[has_loras].sum())
        if gained <= 0 or has_loras.all():
            return None
        return Group("the requests with LoRAs", (), float(has_loras.mean()), gained / total)
    by_code = np.zeros(len(workload.controlnet_names))
    for row, codes in enumerate(workload.controlnets):
        for code in codes:
            by_code[code] += gain_s[row] / len(codes)
    names: list[str] = []
    for code in sorted(range(len(by_code)), key=lambda code: (-by_code[code], workload.controlnet_names[code])):
        names.append(workload.controlnet_names[code])
        group = Group("", tuple(names), 0.0, 0.0)
        mask = group.mask(workload)
        gained = float(gain_s[mask].sum())
        if gained >= GROUP_GAIN_MIN * total:
            if mask.all():
                return None
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            return replace(
                group,
                words=f"the requests whose ControlNets are all among {shown}",
                request_ratio=float(mask.mean()),
                gain_ratio=gained / total,
            )
    return None


def hosting_only(allocation: Allocation, names: Sequence[str]) -> Allocation:
    """The allocation with only these ControlNets, and ``*`` where it was; a pool that would host nothing keeps what it hosts."""
    pools = []
    for pool in allocation.pools:
        kept = tuple(name for name in pool.controlnet_ids if name in names or name == ANY)
        pools.append(replace(pool, controlnet_ids=kept or pool.controlnet_ids))
    return replace(allocation, pools=tuple(pools))
