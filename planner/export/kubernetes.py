"""The Kubernetes objects of a plan, in a Kustomize layout: what has to exist so that the plan's engines run, and no secret's value."""

from __future__ import annotations

import dataclasses
import json
from typing import Final

from engine.allocation import ANY, Allocation
from engine.catalogue import Catalogue, CatalogueEntry, catalogue_to_plain
from planner.export.balancer import CALLS_PORT_NAME, CONFIG_KEY, config_text, headless_name
from planner.export.balancer import pod_spec as balancer_pod_spec
from planner.export.cells import Cell, cells_of
from planner.export.cluster import Balancer, Cluster
from planner.export.engine_command import PORT
from planner.export.names import digest, one_line
from planner.export.network import network_policies
from planner.export.objects import BALANCER, ENTRY, Object, config_map, disruption_budget, group_labels, metadata
from planner.export.pod import PodFiles, pod_template
from planner.export.provenance import PREFIX, Provenance
from planner.export.source import Source
from planner.export.yaml_text import to_yaml

CONFIG_MAP_BYTES_MAX: Final = 900_000
"""Kubernetes allows 1 MiB for a whole ConfigMap, its metadata included."""
PODS_ANNOTATION: Final = f"{PREFIX}planned-pods"


def kubernetes_texts(
    source: Source, cluster: Cluster, catalogue: Catalogue | None, remarks: tuple[str, ...] = ()
) -> dict[str, str]:
    """File name (under ``kubernetes/``) to text.

    Args:
        remarks: lines that every file's comment ends with.

    Raises:
        InputError: the allocation cannot be cut into pods of this cluster's nodes.
    """
    provenance = source.provenance
    cells = cells_of(source.allocation, cluster.gpus_per_node)
    known = catalogue if catalogue is not None else named_in(source.allocation)
    parts = _catalogue_maps(known, cluster, provenance)
    groups = sorted({cell.group for cell in cells})
    split = split_groups(cells)
    balanced = set(split) if cluster.balancer is not None else set()
    files: dict[str, list[Object]] = {
        "base/namespace.yaml": [_namespace(cluster, provenance)],
        "base/access.yaml": [_service_account(cluster, provenance), _priority_class(cluster, provenance)],
        "base/network.yaml": network_policies(cluster, provenance, has_balancers=bool(balanced)),
        "base/catalogue.yaml": parts,
        "base/services.yaml": [_service(group, cluster, provenance, is_balanced=group in balanced) for group in groups],
        "base/disruption.yaml": [
            disruption_budget(f"diffplan-{group}", group_labels(group), cluster, provenance) for group in groups
        ],
    }
    if cluster.balancer is not None:
        for group in sorted(balanced):
            mine = tuple(cell for cell in cells if cell.group == group)
            files[f"base/balancer-{group}.yaml"] = _balancer_objects(group, mine, cluster, cluster.balancer, source)
    for cell in cells:
        allocation = _allocation_map(cell, cluster, provenance)
        pods = PodFiles(allocation["metadata"]["name"], tuple(part["metadata"]["name"] for part in parts))
        files[f"base/engine-{cell.name}.yaml"] = [
            allocation,
            _deployment(cell, cluster, pods, catalogue, provenance, source),
        ]
    comment = provenance.comment() + "".join(f"# {one_line(line)}\n" for line in remarks)
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


def _namespace(cluster: Cluster, provenance: Provenance) -> Object:
    labels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "audit", "warn")}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": metadata(cluster.namespace, None, provenance, labels)}


def _service_account(cluster: Cluster, provenance: Provenance) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": metadata("diffplan-engine", cluster, provenance),
        "automountServiceAccountToken": False,
    }


def _priority_class(cluster: Cluster, provenance: Provenance) -> Object:
    return {
        "apiVersion": "scheduling.k8s.io/v1",
        "kind": "PriorityClass",
        "metadata": metadata("diffplan-serving", None, provenance),
        "value": cluster.priority,
        "globalDefault": False,
        "preemptionPolicy": "PreemptLowerPriority",
        "description": "Engines that serve images to waiting users.",
    }


def _service(group: str, cluster: Cluster, provenance: Provenance, *, is_balanced: bool) -> Object:
    """What clients call: the group's balancers, or its engines themselves."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(f"diffplan-{group}", cluster, provenance, {f"{PREFIX}group": group, ENTRY: "true"}),
        "spec": {
            "type": "ClusterIP",
            "selector": group_labels(group, BALANCER) if is_balanced else group_labels(group),
            "ports": [
                {
                    "name": "http",
                    "port": 80,
                    "targetPort": CALLS_PORT_NAME if is_balanced else "http",
                    "protocol": "TCP",
                }
            ],
        },
    }


def _balancer_objects(
    group: str, cells: tuple[Cell, ...], cluster: Cluster, balancer: Balancer, source: Source
) -> list[Object]:
    """A group's balancers, and a Service without an address for each of its cells, whose DNS name lists its ready pods."""
    provenance, slo_latency_s = source.provenance, source.plan.slo_latency_s
    scaled = {pool.name: pool.autoscale for pool in source.allocation.pools}
    n_most = []
    for cell in cells:
        settings = scaled[cell.allocation.pools[0].name] if cell.is_autoscaled else None
        n_most.append(cell.n_pods if settings is None else max(cell.n_pods, settings.max_replicas))
    text = config_text(cells, n_most, cluster.namespace, slo_latency_s, balancer)
    name = f"diffplan-balancer-{group}"
    files = config_map(f"{name}-{digest(text)}", {CONFIG_KEY: text}, cluster, provenance)
    labels = group_labels(group, BALANCER)
    deployment: Object = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata(name, cluster, provenance, labels),
        "spec": {
            "replicas": balancer.replicas,
            "revisionHistoryLimit": 5,
            "selector": {"matchLabels": labels},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "template": {
                "metadata": {"labels": labels},
                "spec": balancer_pod_spec(balancer, files["metadata"]["name"], slo_latency_s),
            },
        },
    }
    headless: list[Object] = [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata(headless_name(cell), cluster, provenance, {f"{PREFIX}group": group}),
            "spec": {
                "clusterIP": "None",
                "selector": {**group_labels(group), f"{PREFIX}cell": cell.name},
                "ports": [{"name": "http", "port": PORT, "targetPort": "http", "protocol": "TCP"}],
            },
        }
        for cell in cells
    ]
    return [files, deployment, disruption_budget(name, labels, cluster, provenance), *headless]


def _deployment(
    cell: Cell, cluster: Cluster, files: PodFiles, catalogue: Catalogue | None, provenance: Provenance, source: Source
) -> Object:
    labels = {**group_labels(cell.group), f"{PREFIX}cell": cell.name}
    held = metadata(f"diffplan-{cell.name}", cluster, provenance, labels)
    held["annotations"][PODS_ANNOTATION] = str(cell.n_pods)
    template = pod_template(cell, cluster, files, catalogue, labels, source.plan.slo_latency_s, provenance.purchase)
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": held,
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
    return config_map(f"diffplan-{cell.name}-{digest(text)}", {"allocation.json": text}, cluster, provenance)


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
        config_map(f"diffplan-catalogue-{whole}-{n:03d}", {f"part-{n:03d}": "".join(chunk)}, cluster, provenance)
        for n, chunk in enumerate(chunks)
    ]


def _kustomization(name: str, resources: list[str], provenance: Provenance) -> Object:
    return {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "metadata": {"name": name, "annotations": provenance.annotations()},
        "resources": resources,
    }
