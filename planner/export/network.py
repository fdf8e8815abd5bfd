"""Who may talk to whom: everything is closed but clients, scrapes, names, the store, and a balancer's own engines."""

from __future__ import annotations

from typing import Final

from planner.export.balancer import BALANCER_PORT, METRICS_PORT
from planner.export.cluster import Cluster
from planner.export.engine_command import PORT
from planner.export.objects import BALANCER, ENGINE, PART_OF, Object, metadata
from planner.export.provenance import PREFIX, Provenance

CLIENT_LABEL: Final = f"{PREFIX}client"


def network_policies(cluster: Cluster, provenance: Provenance, *, has_balancers: bool) -> list[Object]:
    """Base, ControlNet and loader processes of an engine talk inside its pod, so engines need nothing from each other."""
    engines = {"matchLabels": {**PART_OF, **ENGINE}}
    http = [{"protocol": "TCP", "port": PORT}]
    dns = {
        "to": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}}}],
        "ports": [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}],
    }
    store = [] if cluster.store.port is None else [{"ports": [{"protocol": "TCP", "port": cluster.store.port}]}]
    clients = {"namespaceSelector": {}, "podSelector": {"matchLabels": {CLIENT_LABEL: "true"}}}
    scraper = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": cluster.monitoring_namespace}},
    }
    balancers = {"podSelector": {"matchLabels": {**PART_OF, **BALANCER}}}
    both = ["Ingress", "Egress"]
    specs: dict[str, Object] = {
        "diffplan-deny-all": {"podSelector": {"matchLabels": PART_OF}, "policyTypes": both},
        "diffplan-engine": {
            "podSelector": engines,
            "policyTypes": both,
            "ingress": [
                {"from": [clients, *([balancers] if has_balancers else [])], "ports": http},
                {"from": [scraper], "ports": http},
            ],
            "egress": [dns, *store],
        },
    }
    if has_balancers:
        specs["diffplan-balancer"] = {
            "podSelector": {"matchLabels": {**PART_OF, **BALANCER}},
            "policyTypes": both,
            "ingress": [
                {"from": [clients], "ports": [{"protocol": "TCP", "port": BALANCER_PORT}]},
                {"from": [scraper], "ports": [{"protocol": "TCP", "port": METRICS_PORT}]},
            ],
            "egress": [dns, {"to": [{"podSelector": engines}], "ports": http}],
        }
    return [
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": metadata(name, cluster, provenance),
            "spec": spec,
        }
        for name, spec in specs.items()
    ]
