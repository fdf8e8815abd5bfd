"""The add-ons of a plan, one row each: what it costs in the recommended fleet, where it lives there, and whether that is right."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final, Literal

import numpy as np

from engine.allocation import Allocation
from planner.addon_placement import CONTROLNETS_MAX, words_of_stretch
from planner.attribution import NS_PER_S, attribute, by_add_on
from planner.candidates import Shape
from planner.decision_record import AddOnRow, AddOnsRecord, PlacedRow, Placement
from planner.diagnose_question import weights_of
from planner.explain import gpus_words, usd
from planner.prices import Price
from planner.replication import Inputs, Run
from planner.scenario import Scenario
from planner.service import ServiceTable
from planner.workload import Floats, Ints, Workload

LORAS_MAX: Final = 5
MISS_RATIO_MAX: Final = 0.5
"""An add-on that is loaded anew for more of its uses than this lives on demand, whatever the caches are for."""
HOUR_S: Final = 3600.0


def add_ons_record(
    scenario: Scenario,
    inputs: Inputs,
    workload: Workload,
    service: ServiceTable,
    shape: Shape,
    allocation: Allocation,
    run: Run,
    price: Price,
    placed: Mapping[str, tuple[PlacedRow, ...]],
) -> AddOnsRecord | None:
    """Rows of the add-ons that take most GPU time, ControlNets first; None if the traffic has none.

    Args:
        workload: the requests of ``run``, with their ``service`` times.
        placed: ControlNet to its recommended placement and the others, as simulated.
    """
    if not workload.has_add_ons.any():
        return None
    requests = run.result.requests
    weights = weights_of(scenario, inputs, workload, service, None)
    window_s = max(run.result.horizon_s, workload.duration_s)
    table = by_add_on(attribute(workload, requests, weights, allocation.n_gpus * window_s), 0)
    table = table[table["kind"].isin(["controlnet", "lora"]) & (table["n_uses"] > 0)]
    months = scenario.prices.hours_per_month * HOUR_S / workload.duration_s
    missed = {
        "controlnet": _miss_ratios(workload.controlnets, requests["n_controlnet_misses"].to_numpy(np.float64), len(workload.controlnet_names)),
        "lora": _miss_ratios(workload.loras, requests["n_lora_misses"].to_numpy(np.float64), len(workload.lora_names)),
    }  # fmt: skip
    codes = {
        "controlnet": {name: code for code, name in enumerate(workload.controlnet_names)},
        "lora": {name: code for code, name in enumerate(workload.lora_names)},
    }
    rows: list[AddOnRow] = []
    left_usd, n_left = 0.0, 0
    shown = {"controlnet": CONTROLNETS_MAX, "lora": LORAS_MAX}
    for kind, name, n_requests, n_uses, latency_ns, gpu_ns in zip(
        *(table[column].tolist() for column in ("kind", "id", "n_requests", "n_uses", "latency_ns", "gpu_ns")),
        strict=True,
    ):
        hours = gpu_ns / NS_PER_S / HOUR_S * months
        cost_usd = hours * price.price_usd_per_gpu_hour
        if shown[kind] == 0:
            left_usd, n_left = left_usd + cost_usd, n_left + 1
            continue
        shown[kind] -= 1
        miss_ratio = float(missed[kind][codes[kind][name]])
        choices = placed.get(name, ()) if kind == "controlnet" else ()
        placement, why = _placed(kind, name, shape, miss_ratio, choices)
        rows.append(AddOnRow(
            add_on_id=name, kind=kind, n_uses=n_uses, use_ratio=n_requests / len(workload), gpu_hours_per_month=hours,
            cost_usd_per_month=cost_usd, latency_added_s=latency_ns / NS_PER_S / n_uses,
            miss_ratio=None if math.isnan(miss_ratio) else miss_ratio, placement=placement, why=why,
            here=choices[0] if choices else None, alternatives=choices[1:],
        ))  # fmt: skip
    return AddOnsRecord(
        rows=tuple(rows),
        n_others=n_left,
        n_controlnets_on_demand=int((missed["controlnet"] > MISS_RATIO_MAX).sum()),
        n_loras_on_demand=int((missed["lora"] > MISS_RATIO_MAX).sum()),
        others_cost_usd_per_month=left_usd,
        simulated_on=words_of_stretch(len(workload)) if placed else "",
    )


def _miss_ratios(uses: Sequence[tuple[int, ...]], misses: Floats, n: int) -> Floats:
    """Of each code: its loads over its uses, from the requests that use it alone; NaN if none does."""
    alone = np.fromiter((len(codes) == 1 for codes in uses), dtype=np.bool_, count=len(uses))
    rows = np.flatnonzero(alone & ~np.isnan(misses))
    codes: Ints = np.fromiter((uses[row][0] for row in rows.tolist()), dtype=np.int64, count=len(rows))
    n_uses = np.bincount(codes, minlength=n).astype(np.float64)
    loaded = np.bincount(codes, weights=np.minimum(misses[rows], 1.0), minlength=n)
    ratios: Floats = np.divide(loaded, n_uses, out=np.full(n, np.nan), where=n_uses > 0)
    return ratios


def _placed(
    kind: Literal["controlnet", "lora"], name: str, shape: Shape, miss_ratio: float, choices: Sequence[PlacedRow]
) -> tuple[Placement, str]:
    loaded = f"it is loaded anew for {miss_ratio:.0%} of its uses" if not math.isnan(miss_ratio) else ""
    is_rare = miss_ratio > MISS_RATIO_MAX
    if kind == "lora":
        if is_rare:
            return "on demand", f"Fetched when it is asked for: {loaded}, too rarely used to stay in host memory."
        return "kept in host memory", f"It stays in the host memory of base replicas{': ' + loaded if loaded else ''}."
    if choices:
        return choices[0].placement, _comparison(choices)
    here: Placement = "in process"
    if shape.controlnet_pools:
        here = "own workers" if any(hosted == (name,) for _, hosted in shape.controlnet_pools) else "shared workers"
    if is_rare:
        return "on demand", f"Used too rarely to stay loaded: {loaded}."
    if shape.topology not in ("colocated", "decoupled"):
        return here, f"{shape.topology} runs every ControlNet in process; the topologies are compared as a whole."
    return here, "Not tried elsewhere: others take more of the GPUs' time."


def _comparison(choices: Sequence[PlacedRow]) -> str:
    here, others = choices[0], choices[1:]
    if here.n_gpus is None:
        return "On these requests no size of the recommended placement was found."
    words = {
        "in process": "in the base process",
        "own workers": "on workers of its own",
        "shared workers": "on shared workers",
    }
    parts = []
    for one in others:
        what = words[one.placement]
        if one.n_gpus is None:
            parts.append(f"{what} no size was found that keeps the promise")
            continue
        gap, latency_s = one.n_gpus - here.n_gpus, (one.with_it_p50_s or 0.0) - (here.with_it_p50_s or 0.0)
        cost = (
            "as many GPUs"
            if gap == 0
            else f"{gpus_words(abs(gap))} {'more' if gap > 0 else 'less'} ({usd(abs(one.difference_usd_per_month or 0.0))} a month)"
        )
        faster = f"its requests {abs(latency_s):.2f} s {'slower' if latency_s > 0 else 'faster'} in the median"
        parts.append(f"{what} it would take {cost}, {faster}")
    best = min((one.n_gpus for one in others if one.n_gpus is not None), default=here.n_gpus)
    end = "" if best >= here.n_gpus else " That is worth a plan of its own: these sizes are one run each, not repeated."
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}, against {gpus_words(here.n_gpus)} as recommended.{end}"
