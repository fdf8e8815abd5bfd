"""What ``diffplan addons show`` prints: a line an entry, for people or as JSON, and never more than a tenant may know."""

from __future__ import annotations

import dataclasses
from typing import Any

from engine.catalogue import Catalogue, CatalogueEntry, entry_to_plain
from engine.registry.labels import visible
from engine.registry.usage import UseCost


def table_row(
    catalogue: Catalogue,
    entry: CatalogueEntry,
    tenant: str | None,
    cost: UseCost | None,
    price: float | None,
    *,
    is_costed: bool,
) -> dict[str, Any]:
    """One entry as JSON values.

    Args:
        tenant: whose view it is; None: everybody's.
        is_costed: whether there are recorded uses at all, of this entry or others.
    """
    row: dict[str, Any] = {**entry_to_plain(entry), "is_current": is_current(catalogue, entry)}
    if tenant is not None:
        row["tenants"] = [tenant] if entry.tenants else []  # who else may use it is not for this tenant to know
    if is_costed:
        row["use"] = None if cost is None else dataclasses.asdict(cost)
        if cost is not None and price is not None:
            row["use"] = {**row["use"], "cost_usd": cost.cost_usd(price)}
    return row


def is_current(catalogue: Catalogue, entry: CatalogueEntry) -> bool:
    """Whether the plain name means this version."""
    stated = catalogue.current.get(entry.name or entry.id)
    return entry.stage == "production" and (stated is None or stated == entry.version)


def table_text(rows: list[dict[str, Any]], *, has_cost: bool) -> str:
    """Rows of :func:`table_row` for people: invisible characters as escapes, long texts cut."""
    head = ["add-on", "kind", "stage", "for", "owner", "licence", "MiB", "id"]
    head += ["uses", "wait s", "steps s", "GPU s", "±", "USD"] if has_cost else []
    lines = [head]
    for row in rows:
        title = f"{row['name'] or row['id']}{'@' + row['version'] if row['version'] else ''}"
        tenants = ",".join(row["tenants"][:3]) + (f" +{len(row['tenants']) - 3}" if len(row["tenants"]) > 3 else "")
        cells = [
            title + (" *" if row["is_current"] else ""), row["kind"], row["stage"], tenants or "all", row["owner"] or "–",
            row["licence"] or "–", f"{row['bytes'] / 2**20:.1f}" if row["bytes"] else "–", row["id"][:12],
        ]  # fmt: skip
        if has_cost:
            use = row["use"] or {"n_uses": 0}
            cells += [
                str(use["n_uses"]),
                *(
                    _figure(use.get(name))
                    for name in ("wait_s", "steps_s", "gpu_s", "gpu_s_standard_error", "cost_usd")
                ),
            ]
        lines.append([visible(cell, 40) for cell in cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
    return f"{text}\n* what the plain name means"


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
