"""What changes in the cluster between two plans, in replicas and dollars, and object by object; the way back is the same, turned round."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from planner.export.bill import bill_plain
from planner.export.names import one_line
from planner.export.objects import ENTRY
from planner.export.provenance import PREFIX
from planner.export.source import Source

SCHEMA_VERSION: Final = 1
ObjectName = tuple[str, str]
"""Kind and name."""
KEPT: Final = frozenset({"Namespace"})
"""Never deleted: other things may live there."""


@dataclass(frozen=True, slots=True)
class PoolChange:
    """One pool, before and after; zeros where it does not exist."""

    pool: str
    role: str
    gpu_kind: str
    n_replicas_before: int
    n_replicas_after: int
    n_gpus_before: int
    n_gpus_after: int
    cost_usd_per_month_before: float
    cost_usd_per_month_after: float

    @property
    def is_change(self) -> bool:
        """Whether anything differs."""
        return (self.n_replicas_before, self.n_gpus_before, self.cost_usd_per_month_before) != (
            self.n_replicas_after, self.n_gpus_after, self.cost_usd_per_month_after,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Change:
    """From one plan to another."""

    before: Source
    after: Source
    pools: tuple[PoolChange, ...]
    added: tuple[ObjectName, ...] = ()
    removed: tuple[ObjectName, ...] = ()
    altered: tuple[ObjectName, ...] = ()
    turned: tuple[ObjectName, ...] = ()
    """Services that clients call and that send to other pods afterwards."""
    lone: tuple[ObjectName, ...] = ()
    """Deployments whose only pod is replaced, with nothing else to serve its requests meanwhile."""


def change_between(
    before: Source, after: Source, objects: tuple[list[dict[str, Any]], list[dict[str, Any]]] | None = None
) -> Change:
    """Compares two plans.

    Args:
        objects: Kubernetes objects of both, exported for the same cluster; None leaves objects out.
    """
    rows = [
        {(row["pool"], row["role"], row["gpu_kind"]): row for row in bill_plain(s)["rows"]} for s in (before, after)
    ]
    pools = []
    for key in sorted(rows[0].keys() | rows[1].keys()):
        old, new = (side.get(key, {}) for side in rows)
        pools.append(
            PoolChange(
                *key, old.get("n_replicas", 0), new.get("n_replicas", 0), old.get("n_gpus", 0), new.get("n_gpus", 0),
                old.get("cost_usd_per_month", 0.0), new.get("cost_usd_per_month", 0.0),
            )
        )  # fmt: skip
    if objects is None:
        return Change(before, after, tuple(pools))
    held, wanted = (_by_name(side) for side in objects)
    altered = sorted(name for name in held.keys() & wanted.keys() if held[name] != wanted[name])
    return Change(
        before,
        after,
        tuple(pools),
        added=tuple(sorted(wanted.keys() - held.keys())),
        removed=tuple(sorted(held.keys() - wanted.keys())),
        altered=tuple(altered),
        turned=tuple(
            name for name in altered
            if name[0] == "Service" and held[name]["spec"].get("selector") != wanted[name]["spec"].get("selector")
        ),
        lone=tuple(name for name in altered if name[0] == "Deployment" and _is_lone(name, held, wanted)),
    )  # fmt: skip


def change_json(change: Change) -> str:
    """As a JSON file; fields in ``docs/export.md``."""
    return json.dumps(change_plain(change), indent=2, ensure_ascii=True, allow_nan=False) + "\n"


def change_plain(change: Change) -> dict[str, Any]:
    """As JSON values."""
    totals = {
        "n_gpus_before": change.before.allocation.n_gpus,
        "n_gpus_after": change.after.allocation.n_gpus,
        "cost_usd_per_month_before": change.before.cost_usd_per_month,
        "cost_usd_per_month_after": change.after.cost_usd_per_month,
        "change_usd_per_month": change.after.cost_usd_per_month - change.before.cost_usd_per_month,
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "provenance": change.after.provenance.to_plain(),
        "before": change.before.provenance.to_plain(),
        "total": totals,
        "pools": [
            {name: getattr(pool, name) for name in PoolChange.__dataclass_fields__} for pool in change.pools
        ],
        "objects": {
            part: ["/".join(name) for name in names]
            for part, names in (("added", change.added), ("removed", change.removed), ("altered", change.altered))
        },
    }  # fmt: skip


def change_text(change: Change) -> str:
    """In plain words, a line a pool; nothing of a plan's free texts can break a line."""
    before, after = change.before, change.after
    saved = after.cost_usd_per_month - before.cost_usd_per_month
    lines = [
        f"From plan {before.provenance.plan_id[:16]} to plan {after.provenance.plan_id[:16]}: "
        f"{before.allocation.n_gpus} to {after.allocation.n_gpus} GPUs, {_dollars(before.cost_usd_per_month)} to "
        f"{_dollars(after.cost_usd_per_month)} a month ({'+' if saved >= 0 else '-'}{_dollars(abs(saved))})."
    ]
    for source in (before, after):
        lines += [f"Plan {source.provenance.plan_id[:16]}: {one_line(text)}." for text in source.provenance.warnings]
    for pool in change.pools:
        name = f"{one_line(pool.pool)} ({pool.role}, {one_line(pool.gpu_kind)})"
        if not pool.is_change:
            lines.append(f"  {name}: {pool.n_replicas_after} replicas, as before")
            continue
        difference = pool.cost_usd_per_month_after - pool.cost_usd_per_month_before
        lines.append(
            f"  {name}: {pool.n_replicas_before} to {pool.n_replicas_after} replicas, {pool.n_gpus_before} to "
            f"{pool.n_gpus_after} GPUs, {'+' if difference >= 0 else '-'}{_dollars(abs(difference))} a month"
        )
    for sign, names in (("+", change.added), ("-", change.removed), ("~", change.altered)):
        lines += [f"  {sign} {kind}/{name}" for kind, name in names]
    return "\n".join(lines) + "\n"


def change_markdown(change: Change, namespace: str | None) -> str:
    """The change with the commands that carry it out; comments first, so that the file says where it comes from."""
    provenance = "".join(f"  {line}\n" for line in change.after.provenance.lines())
    text = f"# Change of the cluster\n\n```text\n{provenance}\n{change_text(change)}```\n"
    if namespace is None:
        return text
    removed = [f"{kind.lower()}/{name}" for kind, name in change.removed if kind not in KEPT]
    text += (
        "\n## Carry it out\n\nGPUs that both plans need are freed pod by pod; with none to spare, capacity is short while pods "
        "roll.\n"
    )
    for _, name in change.lone:
        text += (
            f"\n{name} has one pod: until its successor is ready, nothing serves its requests. With a spare node, set its "
            "strategy.rollingUpdate to maxSurge 1 and maxUnavailable 0 in your overlay first.\n"
        )
    apply = "kubectl apply --server-side -k kubernetes/overlays/cluster"
    if change.turned:
        names = ", ".join(name for _, name in change.turned)
        text += f"\nClients' Services that send to other pods than before change last: {names}.\n"
    text += f"\n```sh\n{apply}" + (f" -l '{ENTRY}!=true'" if change.turned else "") + "\n"
    rolled = sorted(name for kind, name in (*change.added, *change.altered) if kind == "Deployment")
    text += "".join(f"kubectl -n {namespace} rollout status deployment/{name}\n" for name in rolled)
    text += f"{apply}\n" if change.turned else ""
    text += f"kubectl -n {namespace} delete {' '.join(removed)}\n" if removed else ""
    return text + "```\n"


def _is_lone(
    name: ObjectName, held: Mapping[ObjectName, Mapping[str, Any]], wanted: Mapping[ObjectName, Mapping[str, Any]]
) -> bool:
    """Whether a Deployment's one pod is replaced while no other Deployment that stays serves the same requests."""

    def group(item: Mapping[str, Any]) -> object:
        labels = item["spec"]["selector"]["matchLabels"]
        return labels.get("app.kubernetes.io/name"), labels.get(f"{PREFIX}group")

    old, new = held[name]["spec"], wanted[name]["spec"]
    if old.get("replicas") != 1 or old["template"] == new["template"]:
        return False
    if new.get("strategy", {}).get("rollingUpdate", {}).get("maxSurge"):
        return False
    beside = [other for other in held if other[0] == "Deployment" and other != name]
    return not any(group(held[other]) == group(held[name]) for other in beside)


def _by_name(objects: Iterable[Mapping[str, Any]]) -> dict[ObjectName, Mapping[str, Any]]:
    """Objects without what only says which plan they come from."""
    found: dict[ObjectName, Mapping[str, Any]] = {}
    for item in objects:
        metadata = dict(item["metadata"])
        metadata["labels"] = {
            key: value for key, value in metadata.get("labels", {}).items()
            if key not in {f"{PREFIX}plan", f"{PREFIX}scenario"}
        }  # fmt: skip
        metadata["annotations"] = {
            key: value for key, value in metadata.get("annotations", {}).items() if not key.startswith(PREFIX)
        }  # fmt: skip
        found[(str(item["kind"]), str(metadata["name"]))] = {**item, "metadata": metadata}
    return found


def _dollars(value: float) -> str:
    return f"${value:,.0f}"
