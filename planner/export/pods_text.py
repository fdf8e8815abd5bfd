"""What simulating the exported pods has shown: sentences for people and for comments, and a JSON file for tools."""

from __future__ import annotations

import json
from typing import Any, Final

from planner.export.names import one_line
from planner.export.pods_figures import PodsCheck, PodsFigures
from planner.export.provenance import Provenance
from planner.export.source import Source

SCHEMA_VERSION: Final = 1
FILE_NAME: Final = "as-exported.json"
FRONTS: Final = {
    "random": "behind a Service that picks a pod by lot",
    "least_outstanding": "behind HAProxy, which picks the pod with the fewest open requests",
}


def check_lines(check: PodsCheck, source: Source) -> tuple[str, ...]:
    """Whole sentences, the verdict first."""
    seen = check.exported
    how = f"{seen.n_pods} engines with a queue each {FRONTS[check.front.balancing]}"
    if check.scaled_between is not None:
        how = (
            f"{check.scaled_between[0]} to {check.scaled_between[1]} engines of one replica with a queue each, scaled by KEDA, "
            f"{FRONTS[check.front.balancing]}"
        )
    lines = [
        f"Simulated as exported, {how if seen.n_pods > 1 else 'one engine with one queue, as planned'}: the cluster "
        f"{_verdict(check)} the promise. {_ratio(seen)} in time, {check.promised_ratio:.2%} promised within "
        f"{check.slo_latency_s:g} s; latency {_latency(seen)}."
        + (f" {seen.mean_gpus:.2f} GPUs on average." if check.scaled_between is not None else "")
    ]
    planned = _planned(check, source)
    if planned is not None and planned["slo_attainment_ratio"] is not None:
        quantiles = [planned[name] for name in ("latency_p50_s", "latency_p95_s", "latency_p99_s")]
        latency = " / ".join("?" if value is None else f"{value:.2f}" for value in quantiles)
        lines.append(
            f"The plan, with one queue for all: {planned['slo_attainment_ratio']:.2%} in time, latency {latency} s (50 / 95 / 99 %)."
        )
    if check.front.balancing != "random" and seen.n_pods > 1 and check.by_lot is not None:
        lines.append(f"The same engines {FRONTS['random']}: {_ratio(check.by_lot)} in time.")
    if check.grown_from is not None:
        lines.append(
            f"The plan's own {check.grown_from:g} GPUs would not keep it in this way: {seen.mean_gpus:g} were exported (--grow)."
        )
    if not check.is_kept:
        lines += _repair(check)
    if not check.is_whole:
        lines.append(
            f"Of each repetition the busiest {check.n_requests} requests in a row were simulated; the plan counts all of them."
        )
    return tuple(lines)


def _verdict(check: PodsCheck) -> str:
    if check.is_kept:
        return "keeps"
    return "does NOT SURELY keep" if check.exported.slo_attainment_ratio >= check.promised_ratio else "BREAKS"


def _repair(check: PodsCheck) -> list[str]:
    found = check.proposal
    if found is None:
        more = (
            "Twice as many replicas do"
            if check.scaled_between is None
            else "More replicas at least, up to its most, do"
        )
        lines = [f"{more} not keep it either in this way."]
    else:
        pools = ", ".join(
            f"{one_line(pool.name)} {pool.n_replicas if pool.autoscale is None else f'at least {pool.autoscale.min_replicas}'}"
            for pool in found.allocation.pools
        )
        lines = [
            f"{found.figures.mean_gpus:g} GPUs in place of {check.exported.mean_gpus:g} keep it ({pools}; {found.figures.n_pods} engines): "
            f"{_ratio(found.figures)} in time, latency {_latency(found.figures)}. --grow exports them."
        ]
    if check.front.balancing == "random":
        lines.append("Name a balancer in the cluster file first: it costs no GPU.")
    return lines


def unchecked_line(groups: dict[str, str], why: str) -> str:
    """For an export with several queues of which nothing is known."""
    which = "; ".join(f"diffplan-{group} has {engines}" for group, engines in groups.items())
    return (
        f"Several engines, each with a queue of its own, serve the same requests ({which}); the plan simulates one queue for all, so its "
        f"latencies and its promise are NOT shown to hold for this cluster. {why}"
    )


def check_json(check: PodsCheck, source: Source, provenance: Provenance) -> str:
    """As a JSON file; fields in ``docs/export.md``."""
    return json.dumps(check_plain(check, source, provenance), indent=2, ensure_ascii=True, allow_nan=False) + "\n"


def check_plain(check: PodsCheck, source: Source, provenance: Provenance) -> dict[str, Any]:
    """As JSON values."""
    found = check.proposal
    return {
        "schema_version": SCHEMA_VERSION,
        "provenance": provenance.to_plain(),
        "promise": {"latency_s": check.slo_latency_s, "attainment_ratio": check.promised_ratio},
        "is_kept": check.is_kept,
        "n_gpus_grown_from": check.grown_from,
        "balancing": check.front.balancing,
        "n_balancers": check.front.n_balancers,
        "n_repetitions": check.n_repetitions,
        "n_requests": check.n_requests,
        "is_whole_traffic": check.is_whole,
        "as_planned": _planned(check, source),
        "pods_between": None if check.scaled_between is None else list(check.scaled_between),
        "as_exported": _figures(check.exported),
        "behind_a_service": None if check.by_lot is None else _figures(check.by_lot),
        "proposal": None
        if found is None
        else {
            **_figures(found.figures),
            "pools": {pool.name: pool.n_replicas for pool in found.allocation.pools},
        },
    }


def _planned(check: PodsCheck, source: Source) -> dict[str, float | int | None] | None:
    """What the plan says of the fleet; None for one that it has not simulated as a whole, as a phase's."""
    if check.scaled_between is not None:
        variant = source.plan.autoscaling.chosen if source.plan.autoscaling is not None else None
        if variant is None:
            return None
        return {
            "n_gpus": None,
            "mean_gpus": variant.mean_gpus.mean,
            "slo_attainment_ratio": variant.slo_attainment_ratio.mean,
            "latency_p50_s": variant.latency_p50_s.mean,
            "latency_p95_s": None,
            "latency_p99_s": variant.latency_p99_s.mean,
        }
    row = source.row
    if row is None:
        return None
    names = ("slo_attainment_ratio", "latency_p50_s", "latency_p95_s", "latency_p99_s")
    return {"n_gpus": row.n_gpus, "mean_gpus": row.n_gpus, **{name: getattr(row, name).mean for name in names}}


def _figures(figures: PodsFigures) -> dict[str, float | int | None]:
    plain = {name: getattr(figures, name) for name in PodsFigures.__dataclass_fields__}
    return {name: None if value != value else value for name, value in plain.items()}


def _ratio(figures: PodsFigures) -> str:
    return f"{figures.slo_attainment_ratio:.2%} ({figures.low:.2%} to {figures.high:.2%})"


def _latency(figures: PodsFigures) -> str:
    return f"{figures.latency_p50_s:.2f} / {figures.latency_p95_s:.2f} / {figures.latency_p99_s:.2f} s (50 / 95 / 99 %)"
