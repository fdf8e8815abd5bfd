"""Sentences about a plan: the answer, what limits it, what comes next, and what the numbers leave out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from engine.allocation import Allocation
from planner.candidates import Counts
from planner.plan_record import Infeasible, TopologyRow, WaterfallRecord
from planner.replication import SHARING, Inputs, Run, lost_seconds, warmup_of
from planner.scenario import Scenario
from planner.search import QUEUE
from planner.topology_search import TopologySearch
from planner.traffic import Traffic, Variation

PART_WORDS: Final = {
    QUEUE: "waiting for a base replica",
    "switch_s": "switching checkpoints",
    "controlnet_load_s": "loading ControlNets",
    "lora_wait_s": "waiting for LoRAs",
    SHARING: "sharing ControlNet workers",
}
SMALL_LOAD_GPUS: Final = 0.5
"""Mean load under which one GPU idles more than it works and the plan says that the traffic is small."""


def usd(value: float | None) -> str:
    """``$71,540``."""
    return "–" if value is None else f"${value:,.0f}" if value >= 0 else f"−${-value:,.0f}"


def gpus_words(n_gpus: int | None) -> str:
    """``1 GPU``, ``34 GPUs``."""
    return "no GPU" if n_gpus is None else f"{n_gpus} GPU{'' if n_gpus == 1 else 's'}"


def pools_words(row: TopologyRow) -> str:
    """``24 base + 6 ControlNet``."""
    base = sum(pool.n_replicas for pool in row.pools if pool.role == "base")
    controlnet = sum(pool.n_replicas for pool in row.pools if pool.role == "controlnet")
    return f"{base} base + {controlnet} ControlNet" if controlnet else f"{base}"


def plan_sentence(
    scenario: Scenario,
    winner: TopologyRow | None,
    rows: Sequence[TopologyRow],
    waterfall: WaterfallRecord | None,
    infeasible: Infeasible | None,
) -> str:
    """The answer in plain words, with its reason."""
    slo = scenario.slo
    promise = f"{100 * slo.attainment_ratio:g} % of the requests within {slo.latency_s:g} s"
    if winner is None or winner.n_gpus is None:
        assert infeasible is not None  # noqa: S101  make_plan gives one whenever there is no winner
        return (
            f"No plan keeps the promise of {promise}: {infeasible.binds} binds ({infeasible.why}). "
            f"Nearest: {infeasible.nearest}."
        )
    gpus = gpus_words(winner.n_gpus)
    n_good = sum(row.verdict == "meets_slo" for row in rows)
    among = "the only topology that keeps" if n_good == 1 else f"the cheapest of {n_good} topologies that keep"
    cost = winner.cost_usd_per_1000_images.mean
    parts = [
        f"Use {gpus} as {winner.topology} ({pools_words(winner)}): {among} {promise}, at "
        f"{usd(winner.cost_usd_per_month)} a month, {f'${cost:,.2f}' if cost is not None else '–'} per 1000 images in time."
    ]
    load = winner.mean_load_gpus
    if load is not None and (winner.n_gpus == 1 or load < SMALL_LOAD_GPUS):
        spare = "bursts and the promise, not throughput, ask for the rest" if winner.n_gpus > 1 else "one is enough"
        parts.append(
            f"This traffic is about one GPU's worth or less: its work keeps {load:.2g} GPUs busy on average; {spare}."
        )
    if waterfall is not None and waterfall.baseline and waterfall.baseline != winner.topology:
        saved = waterfall.saving_usd_per_month
        gap = f"{usd(abs(saved))} a month ({abs(waterfall.saving_ratio):.0%}) {'less' if saved > 0 else 'more'} than"
        parts.append(f"That is {gap if saved else 'as much as'} {waterfall.baseline}.")
    sizes = {row.n_gpus for row in rows if row.verdict == "meets_slo"}
    if n_good > 1 and len(sizes) == 1:
        parts.append("Every topology that keeps the promise needs as many GPUs: they differ in latency, not in cost.")
    else:
        parts.append(_on_decoupling(winner, rows))
    return " ".join(part for part in parts if part)


def _on_decoupling(winner: TopologyRow, rows: Sequence[TopologyRow]) -> str:
    by_name = {row.topology: row for row in rows}
    decoupled, colocated = by_name.get("decoupled"), by_name.get("colocated")
    if decoupled is None or colocated is None:
        return ""
    if decoupled.verdict != "meets_slo":
        return "Decoupling the add-ons cannot keep the promise here." if winner is not decoupled else ""
    if colocated.verdict != "meets_slo":
        return "Without decoupling the add-ons this engine cannot keep the promise." if winner is decoupled else ""
    gap = (colocated.cost_usd_per_month or 0.0) - (decoupled.cost_usd_per_month or 0.0)
    if gap > 0:
        return f"Decoupling the add-ons saves {usd(gap)} a month against the same engine on one GPU each."
    if gap == 0:
        return "Decoupling the add-ons costs as much as the same engine without it."
    return f"Decoupling the add-ons does not pay here: it would cost {usd(-gap)} a month more than the same engine without it."


def runner_up_sentence(winner: TopologyRow | None, rows: Sequence[TopologyRow]) -> str:
    """The next best topology and its gap."""
    if winner is None:
        return ""
    others = [row for row in rows if row.verdict == "meets_slo" and row.topology != winner.topology]
    if not others:
        return ""
    second = min(others, key=lambda row: row.cost_usd_per_1000_images.mean or float("inf"))
    gap = (second.cost_usd_per_month or 0.0) - (winner.cost_usd_per_month or 0.0)
    return f"{second.topology} with {gpus_words(second.n_gpus)}, {usd(gap)} a month more" if gap >= 0 else (
        f"{second.topology} with {gpus_words(second.n_gpus)}: {usd(-gap)} a month less, but more per image in time"
    )  # fmt: skip


def limited_by(scenario: Scenario, allocation: Allocation, run: Run, found: TopologySearch, counts: Counts) -> str:
    """What keeps the allocation from being smaller: the next smaller one seen in the search, and where late requests lose time."""
    sentences = []
    shape_names = [pool.name for pool in allocation.pools]
    smaller = [
        seen
        for shape, seen in found.looked_at
        if len(seen.counts) == len(counts)
        and [pool.name for pool in shape.allocation(seen.counts).pools] == shape_names
        and seen.n_gpus < sum(counts)
        and seen.attainment_ratio < scenario.slo.attainment_ratio
    ]
    if smaller:
        nearest = max(smaller, key=lambda seen: (seen.n_gpus, seen.attainment_ratio, seen.counts))
        pools = ", ".join(f"{n} {name}" for name, n in zip(shape_names, nearest.counts, strict=True))
        apart = f" ({pools})" if len(shape_names) > 1 else ""
        sentences.append(
            f"With {gpus_words(nearest.n_gpus)}{apart} only {nearest.attainment_ratio:.2%} of the requests are in time "
            f"({scenario.slo.attainment_ratio:.2%} promised)."
        )
    busiest = max(run.metrics.busy_ratio.items(), key=lambda item: (item[1], item[0]))
    sentences.append(f"The busiest pool is {busiest[0]}, {busiest[1]:.0%} busy.")
    if found.peak_hour_load_gpus > 1.5 * found.mean_load_gpus:
        sentences.append(
            f"The busiest hour's work alone keeps {found.peak_hour_load_gpus:.2g} GPUs busy, the mean {found.mean_load_gpus:.2g}."
        )
    late = _late_parts(scenario, run)
    if late:
        sentences.append(late)
    return " ".join(sentences)


def _late_parts(scenario: Scenario, run: Run) -> str:
    frame = run.result.requests
    done = frame[frame["status"] == "done"]
    late = done[done["latency_s"] > scenario.slo.latency_s]
    n_rejected = int((frame["status"] == "rejected").sum())
    rejected = f" {n_rejected} requests were rejected." if n_rejected else ""
    if late.empty:
        return rejected.strip()
    lost = lost_seconds(frame, scenario.slo.latency_s)
    total_s = float(late["latency_s"].sum())
    column, seconds = max(lost.items(), key=lambda item: (item[1], item[0]))
    return f"Late requests lose most time {PART_WORDS[column]} ({seconds / total_s:.0%} of their latency).{rejected}"


def note_lines(scenario: Scenario, inputs: Inputs, traffic: Traffic, variation: Variation) -> tuple[str, ...]:
    """What the numbers leave out or take for granted."""
    notes = []
    repetitions = scenario.simulation.replications
    if variation == "shifted copies":
        notes.append(f"Intervals: {repetitions} repetitions, each with its own shifts of the traffic's copies.")
    elif variation == "resampled days":
        notes.append(f"Intervals: {repetitions} repetitions, each with the trace's days resampled (block bootstrap).")
    else:
        notes.append(
            f"Intervals: {repetitions} repetitions of the same arrivals. Day-to-day variation of the traffic is missing: the "
            "window is too short to resample days."
        )
    n_draws = inputs.profile.n_draws
    notes.append(
        f"Each repetition uses another of the profile's {n_draws} joint draws, and its own service noise."
        if n_draws
        else "The profile has no draws of its parameters: calibration error is missing from the intervals."
    )
    warmup_s = warmup_of(scenario, traffic.workload)
    if warmup_s > 0:
        notes.append(
            f"Requests of the first {warmup_s:g} s are simulated, not counted: queues and LoRA caches start empty."
        )
    notes.append(
        "Replicas start with the checkpoints and ControlNets that the allocation names; others are loaded on demand."
    )
    hours = traffic.after.duration_s / 3600
    notes.append(f"A month is priced as if all of it looked like these {hours:.3g} h.")
    if "decoupled" in scenario.topologies and traffic.workload.n_controlnets.any():
        # the size of the error: tests/theory/test_sharing.py
        notes.append(
            "Base replicas share ControlNet workers at max-min fair step rates, a first approximation: where requests differ in "
            "images or ControlNets it flatters decoupled latency by 1 to 4 % on average."
        )
    notes.append(
        "The fleets compared have a fixed size and no replica dies or restarts; whether the recommended one should scale by itself "
        "is looked at apart."
    )
    if scenario.prices.purchase == "spot" and scenario.world.reclaims is None:
        notes.append("Spot prices: interruptions are not simulated.")
    notes += [f"Profile: {note}" for note in inputs.profile.notes]
    return tuple(notes)
