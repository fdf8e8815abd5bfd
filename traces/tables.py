"""Descriptions of traces as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from traces.character import AddOns, Description
from traces.trace import Trace


def print_provenance(trace: Trace, where: str, console: Console) -> None:
    """One line of facts, then where it comes from and what had to be assumed."""
    days = trace.duration_s / 86_400
    span = f"{days:.1f} days" if days >= 2 else f"{trace.duration_s / 3600:.2f} h"
    provenance = trace.provenance
    lines = [
        f"{where}: {len(trace)} requests in {span}",
        f"  source: {provenance.source}",
        f"  licence: {provenance.licence or 'not stated'}",
        *(f"  left out: {count} rows, {reason}" for reason, count in provenance.left_out.items()),
        *(f"  default: {name} in {count} rows" for name, count in provenance.defaults.items()),
        *(f"  note: {note}" for note in provenance.notes),
    ]
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def print_description(description: Description, where: str, console: Console | None = None) -> None:
    """All of a description, as a few small tables."""
    console = console or Console()
    console.print(_rates_table(description, where))
    console.print(_mix_table(description))
    kinds = {"ControlNets": description.controlnets, "LoRAs": description.loras, "checkpoints": description.checkpoints}
    used = {name: add_ons for name, add_ons in kinds.items() if add_ons.popularity.n_uses}
    console.print(_popularity_table(used))
    console.print(_loads_table(used, description))
    console.print(Text(f"Requests go to instances {description.instance_rule}."))
    lines = [
        f"source: {description.provenance['source']}",
        *(f"left out: {count} rows, {reason}" for reason, count in description.provenance["left_out"].items()),
        *(f"default: {name} in {count} rows" for name, count in description.provenance["defaults"].items()),
        *(f"note: {note}" for note in description.provenance["notes"]),
    ]
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def _rates_table(description: Description, where: str) -> Table:
    rates = description.rates
    slot = "hour" if rates.slot_s == 3600 else "minute"
    rows = [
        ("requests", f"{rates.n_requests}"),
        ("length", f"{rates.duration_s / 3600:.2f} h"),
        ("rate", f"{rates.mean_per_s:.4g} per s"),
        (f"per {slot}: mean / median / max", f"{rates.slot_mean:.1f} / {rates.slot_median:g} / {rates.slot_max}"),
        (f"busiest {slot} over the mean", f"{rates.peak_to_mean:.2f}"),
        ("inter-arrival CV (Poisson: 1)", _number(rates.interarrival_cv)),
        (f"index of dispersion per {slot} (Poisson: 1)", _number(rates.dispersion)),
        ("tenants", f"{description.n_tenants}"),
        ("checkpoint switches", _percent(description.checkpoint_switch_share) + " of consecutive requests"),
    ]
    table = Table("arrivals", "value", title=where)
    for row in rows:
        table.add_row(*row)
    return table


def _mix_table(description: Description) -> Table:
    table = Table("per request", "share of requests", title="What is asked for")
    rows: Sequence[tuple[str, Mapping[str, float] | Mapping[int, float]]] = (
        ("ControlNets", description.controlnets.per_request),
        ("LoRAs", description.loras.per_request),
        ("images", description.images_mix),
        ("steps", description.steps_mix),
        ("size", description.size_mix),
    )
    for name, shares in rows:
        table.add_row(name, " · ".join(f"{value}: {_percent(share)}" for value, share in shares.items()))
    return table


def _popularity_table(kinds: Mapping[str, AddOns]) -> Table:
    table = Table("popularity", "uses", "distinct", "share of uses of the most used k", title="Who is popular")
    for name, add_ons in kinds.items():
        popularity = add_ons.popularity
        shares = " · ".join(f"{top}: {_percent(share)}" for top, share in popularity.top_shares.items())
        table.add_row(name, f"{popularity.n_uses}", f"{popularity.n_distinct}", shares)
    return table


def _loads_table(kinds: Mapping[str, AddOns], description: Description) -> Table:
    sizes = sorted({size for add_ons in kinds.values() for size in add_ons.loads.cache_sizes})
    title = f"Loads per request with an LRU cache on each of {description.n_instances} instances"
    table = Table("places in the cache", *kinds, title=title)
    for size in sizes:
        cells = []
        for add_ons in kinds.values():
            loads = dict(zip(add_ons.loads.cache_sizes, add_ons.loads.loads_per_request, strict=True))
            cells.append(f"{loads[size]:.4f}" if size in loads else "")
        table.add_row(f"{size}", *cells)
    return table


def _number(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.2f}"


def _percent(share: float | None) -> str:
    return "not defined" if share is None else f"{100 * share:.1f} %"
