"""The Kubernetes objects of a plan, in a Kustomize layout: what has to exist so that the plan's engines run, and no secret's value."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Final

from engine.allocation import ANY, Allocation
from engine.catalogue import Catalogue, CatalogueEntry, catalogue_to_plain
from planner.export.cells import Cell, cells_of
from planner.export.cluster import Cluster
from planner.export.engine_command import PORT
from planner.export.names import digest
from planner.export.pod import PodFiles, pod_template
from planner.export.provenance import PREFIX, Provenance
from planner.export.source import Source
from planner.export.yaml_text import to_yaml

Object = dict[str, Any]
CONFIG_MAP_BYTES_MAX: Final = 900_000
"""Kubernetes allows 1 MiB for a whole ConfigMap, its metadata included."""
PART_OF: Final = {"app.kubernetes.io/part-of": "diffplan"}
CLIENT_LABEL: Final = f"{PREFIX}client"
PODS_ANNOTATION: Final = f"{PREFIX}planned-pods"


def kubernetes_texts(source: Source, cluster: Cluster, catalogue: Catalogue | None) -> dict[str, str]:
    """File name (under ``kubernetes/``) to text.

    Raises:
        InputError: the allocation cannot be cut into pods of this cluster's nodes.
    """
    provenance = source.provenance
    cells = cells_of(source.allocation, cluster.gpus_per_node)
    known = catalogue if catalogue is not None else named_in(source.allocation)
    parts = _catalogue_maps(known, cluster, provenance)
    groups = sorted({cell.group for cell in cells})
    files: dict[str, list[Object]] = {
        "base/namespace.yaml": [_namespace(cluster, provenance)],
        "base/access.yaml": [_service_account(cluster, provenance), _priority_class(cluster, provenance)],
        "base/network.yaml": _network_policies(cluster, provenance),
        "base/catalogue.yaml": parts,
        "base/services.yaml": [_service(group, cluster, provenance) for group in groups],
        "base/disruption.yaml": [_disruption_budget(group, cluster, provenance) for group in groups],
    }
    for cell in cells:
        allocation = _allocation_map(cell, cluster, provenance)
        pods = PodFiles(allocation["metadata"]["name"], tuple(part["metadata"]["name"] for part in parts))
        files[f"base/engine-{cell.name}.yaml"] = [
            allocation,
            _deployment(cell, cluster, pods, catalogue, provenance, source),
        ]
    comment = provenance.comment() + split_remark(cells)
    texts = {name: to_yaml(objects, comment) for name, objects in sorted(files.items())}
    resources = [name.removeprefix("base/") for name in texts]
    texts["base/kustomization.yaml"] = to_yaml([_kustomization("diffplan-base", resources, provenance)], comment)
    texts["overlays/cluster/kustomization.yaml"] = to_yaml(
        [_kustomization("diffplan-cluster", ["../../base"], provenance)],
        comment
        + "# Patches of your own belong in a copy of this folder: exporting again refuses to replace changed files.\n",
    )
    return texts


def split_groups(cells: tuple[Cell, ...]) -> dict[str, str]:
    """Groups whose requests are spread over several queues, which the plan did not simulate, to how many engines that are."""
    found = {}
    for group in sorted({cell.group for cell in cells}):
        mine = [cell for cell in cells if cell.group == group]
        n_pods = sum(cell.n_pods for cell in mine)
        if any(cell.is_autoscaled for cell in mine):
            found[group] = "as many engines as replicas"
        elif n_pods > 1:
            found[group] = f"{n_pods} engines"
    return found


def split_remark(cells: tuple[Cell, ...]) -> str:
    """A comment for every file if requests are spread over several queues; else empty."""
    if not split_groups(cells):
        return ""
    return (
        "# NOTE: several engines with a queue each stand behind a Service; the plan simulates one queue for all replicas. Its\n"
        "# latencies and its promise are not shown to hold here: diffplan export --check-pods simulates what is exported.\n"
    )


def named_in(allocation: Allocation) -> Catalogue:
    """A catalogue of the checkpoints and ControlNets that the allocation names; LoRAs and sizes are not in a plan."""
    entries: dict[str, CatalogueEntry] = {}
    for pool in allocation.pools:
        for name in pool.base_model_ids:
            if name != ANY:
                entries.setdefault(name, CatalogueEntry(name, "base"))
        for name in pool.controlnet_ids:
            if name != ANY:
                entries.setdefault(name, CatalogueEntry(name, "controlnet"))
    return Catalogue(entries)


def _metadata(
    name: str, cluster: Cluster | None, provenance: Provenance, labels: Mapping[str, str] | None = None
) -> Object:
    plain: Object = {"name": name}
    if cluster is not None:
        plain["namespace"] = cluster.namespace
    plain["labels"] = {**PART_OF, **provenance.labels(), **(labels or {})}
    plain["annotations"] = provenance.annotations()
    return plain


def _namespace(cluster: Cluster, provenance: Provenance) -> Object:
    labels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "audit", "warn")}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": _metadata(cluster.namespace, None, provenance, labels)}


def _service_account(cluster: Cluster, provenance: Provenance) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": _metadata("diffplan-engine", cluster, provenance),
        "automountServiceAccountToken": False,
    }


def _priority_class(cluster: Cluster, provenance: Provenance) -> Object:
    return {
        "apiVersion": "scheduling.k8s.io/v1",
        "kind": "PriorityClass",
        "metadata": _metadata("diffplan-serving", None, provenance),
        "value": cluster.priority,
        "globalDefault": False,
        "preemptionPolicy": "PreemptLowerPriority",
        "description": "Engines that serve images to waiting users.",
    }


def _network_policies(cluster: Cluster, provenance: Provenance) -> list[Object]:
    """Base, ControlNet and loader processes of an engine talk inside its pod, so pods need nothing from each other."""
    everywhere = {"matchLabels": PART_OF}
    http = [{"protocol": "TCP", "port": PORT}]
    dns = {
        "to": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}}}],
        "ports": [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}],
    }
    store = [] if cluster.store.port is None else [{"ports": [{"protocol": "TCP", "port": cluster.store.port}]}]
    clients = {
        "from": [{"namespaceSelector": {}, "podSelector": {"matchLabels": {CLIENT_LABEL: "true"}}}],
        "ports": http,
    }
    scraper = {"matchLabels": {"kubernetes.io/metadata.name": cluster.monitoring_namespace}}
    scrape = {"from": [{"namespaceSelector": scraper}], "ports": http}
    specs = {
        "diffplan-deny-all": {"podSelector": everywhere, "policyTypes": ["Ingress", "Egress"]},
        "diffplan-engine": {
            "podSelector": everywhere,
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [clients, scrape],
            "egress": [dns, *store],
        },
    }
    return [
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": _metadata(name, cluster, provenance),
            "spec": spec,
        }
        for name, spec in specs.items()
    ]


def _group_labels(group: str) -> dict[str, str]:
    return {**PART_OF, "app.kubernetes.io/name": "diffplan-engine", f"{PREFIX}group": group}


def _service(group: str, cluster: Cluster, provenance: Provenance) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(f"diffplan-{group}", cluster, provenance, {f"{PREFIX}group": group}),
        "spec": {
            "type": "ClusterIP",
            "selector": _group_labels(group),
            "ports": [{"name": "http", "port": 80, "targetPort": "http", "protocol": "TCP"}],
        },
    }


def _disruption_budget(group: str, cluster: Cluster, provenance: Provenance) -> Object:
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": _metadata(f"diffplan-{group}", cluster, provenance, {f"{PREFIX}group": group}),
        "spec": {"maxUnavailable": 1, "selector": {"matchLabels": _group_labels(group)}},
    }


def _deployment(
    cell: Cell, cluster: Cluster, files: PodFiles, catalogue: Catalogue | None, provenance: Provenance, source: Source
) -> Object:
    labels = {**_group_labels(cell.group), f"{PREFIX}cell": cell.name}
    metadata = _metadata(f"diffplan-{cell.name}", cluster, provenance, labels)
    metadata["annotations"][PODS_ANNOTATION] = str(cell.n_pods)
    template = pod_template(cell, cluster, files, catalogue, labels, source.plan.slo_latency_s, provenance.purchase)
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata,
        "spec": {
            # an autoscaler owns the number of its pods: applying the file again must not set it back
            **({} if cell.is_autoscaled else {"replicas": cell.n_pods}),
            "revisionHistoryLimit": 5,
            "selector": {"matchLabels": labels},
            # the plan pays for no spare GPU to surge on
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}},
            "template": template,
        },
    }


def _allocation_map(cell: Cell, cluster: Cluster, provenance: Provenance) -> Object:
    text = json.dumps(dataclasses.asdict(cell.allocation), indent=1, sort_keys=True, ensure_ascii=True) + "\n"
    return _config_map(f"diffplan-{cell.name}-{digest(text)}", {"allocation.json": text}, cluster, provenance)


def _catalogue_maps(catalogue: Catalogue, cluster: Cluster, provenance: Provenance) -> list[Object]:
    """The catalogue in as many immutable parts as its size needs; lines stay whole, the parts in order are the file."""
    plain = catalogue_to_plain(catalogue)
    rows = ",\n".join(json.dumps(entry, sort_keys=True, ensure_ascii=True) for entry in plain.pop("entries"))
    text = json.dumps(plain, sort_keys=True, ensure_ascii=True)[:-1] + f', "entries": [\n{rows}\n]}}\n'
    whole = digest(text)
    chunks: list[list[str]] = [[]]
    size = 0
    for line in text.splitlines(keepends=True):
        if size + len(line) > CONFIG_MAP_BYTES_MAX and chunks[-1]:
            chunks.append([])
            size = 0
        chunks[-1].append(line)
        size += len(line)
    return [
        _config_map(f"diffplan-catalogue-{whole}-{n:03d}", {f"part-{n:03d}": "".join(chunk)}, cluster, provenance)
        for n, chunk in enumerate(chunks)
    ]


def _config_map(name: str, data: dict[str, str], cluster: Cluster, provenance: Provenance) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(name, cluster, provenance),
        "immutable": True,  # the name has the content's digest: a change is a new object, and rolls the pods
        "data": data,
    }


def _kustomization(name: str, resources: list[str], provenance: Provenance) -> Object:
    return {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "metadata": {"name": name, "annotations": provenance.annotations()},
        "resources": resources,
    }
