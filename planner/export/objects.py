"""Parts that every exported Kubernetes object shares: metadata that says where it comes from, labels, ConfigMaps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from planner.export.cluster import Cluster
from planner.export.provenance import PREFIX, Provenance

Object = dict[str, Any]
PART_OF: Final = {"app.kubernetes.io/part-of": "diffplan"}
ENGINE: Final = {"app.kubernetes.io/name": "diffplan-engine"}
BALANCER: Final = {"app.kubernetes.io/name": "diffplan-balancer"}

ENTRY: Final = f"{PREFIX}entry"
"""Label of the Services that clients call: they change last, when what they send to is there."""


def metadata(
    name: str, cluster: Cluster | None, provenance: Provenance, labels: Mapping[str, str] | None = None
) -> Object:
    """Name, labels and annotations; ``cluster`` None for objects that belong to no namespace."""
    plain: Object = {"name": name}
    if cluster is not None:
        plain["namespace"] = cluster.namespace
    plain["labels"] = {**PART_OF, **provenance.labels(), **(labels or {})}
    plain["annotations"] = provenance.annotations()
    return plain


def group_labels(group: str, of: Mapping[str, str] = ENGINE) -> dict[str, str]:
    """Labels of a group's engine pods, or of its balancers."""
    return {**PART_OF, **of, f"{PREFIX}group": group}


def config_map(name: str, data: dict[str, str], cluster: Cluster, provenance: Provenance) -> Object:
    """Immutable: the name has the content's digest, so a change is a new object, and rolls the pods."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(name, cluster, provenance),
        "immutable": True,
        "data": data,
    }


def disruption_budget(name: str, labels: dict[str, str], cluster: Cluster, provenance: Provenance) -> Object:
    """At most one pod of those with the labels is taken away at a time."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": metadata(name, cluster, provenance, {f"{PREFIX}group": labels[f"{PREFIX}group"]}),
        "spec": {"maxUnavailable": 1, "selector": {"matchLabels": labels}},
    }
