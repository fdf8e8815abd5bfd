"""HAProxy before the pods of one group: each request goes to the pod with the fewest open ones, which a Service cannot do.

Requests are not held back: they wait in the engines, whose metrics, limits and alerts therefore see all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from planner.export.cells import Cell
from planner.export.cluster import Balancer
from planner.export.engine_command import PORT, READY_PATH

BALANCER_PORT: Final = 8080
METRICS_PORT: Final = 8405
CALLS_PORT_NAME: Final = "calls"
"""Not ``http``, by which Prometheus knows the engines: a balancer would answer a scrape with some engine's metrics."""
METRICS_PATH: Final = "/metrics"
ALIVE_PATH: Final = "/alive"
CONFIG_KEY: Final = "haproxy.cfg"
CONFIG_FOLDER: Final = "/etc/diffplan/balancer"
USER_ID: Final = 99
"""Of the user ``haproxy`` in HAProxy's own images."""
WEIGHT_MAX: Final = 256
MEMORY: Final = "512Mi"
"""A few thousand open requests with buffers of 16 KiB each, and room."""
STOP_MARGIN_S: Final = 30
WAIT_RATIO: Final = 10
"""A client may wait this many times the promise for its image; the engine's own deadlines and limits end it sooner."""
WAIT_S_MIN: Final = 600


def headless_name(cell: Cell) -> str:
    """Service whose DNS name lists the ready pods of one cell; a DNS label."""
    return f"diffplan-{cell.name}-pods"


def wait_s(slo_latency_s: float) -> int:
    """How long a balancer waits for an engine's answer."""
    return max(WAIT_S_MIN, round(WAIT_RATIO * slo_latency_s))


def weights(cells: Sequence[Cell]) -> list[int]:
    """Base replicas of one pod of each cell, scaled down together if one has more than HAProxy's largest weight."""
    sizes = [sum(pool.n_replicas for pool in cell.allocation.pools_of("base")) for cell in cells]
    largest = max(sizes)
    return sizes if largest <= WEIGHT_MAX else [max(1, round(size * WEIGHT_MAX / largest)) for size in sizes]


def config_text(
    cells: Sequence[Cell], n_most: Sequence[int], namespace: str, slo_latency_s: float, balancer: Balancer
) -> str:
    """The configuration file for the cells of one group.

    Args:
        n_most: pods that each cell can have.
    """
    timeout_s = wait_s(slo_latency_s)
    servers = "".join(
        f"    server-template {cell.name}- {most} {headless_name(cell)}.{namespace}.svc.{balancer.cluster_domain}:{PORT} "
        f"check resolvers cluster init-addr none weight {weight}\n"
        for cell, most, weight in zip(cells, n_most, weights(cells), strict=True)
    )
    return f"""global
    log stdout format raw local0 notice
    hard-stop-after {timeout_s + STOP_MARGIN_S}s

defaults
    mode http
    log global
    option dontlog-normal
    option forwardfor
    option redispatch
    # a call is tried again only if it never reached an engine: an image is not made twice
    retries 2
    retry-on conn-failure
    timeout connect 5s
    timeout client {timeout_s}s
    timeout server {timeout_s}s
    timeout queue 10s
    timeout http-request 60s
    timeout check 5s

resolvers cluster
    parse-resolv-conf
    accepted_payload_size 8192
    resolve_retries 3
    timeout resolve 1s
    timeout retry 1s
    hold valid 2s
    hold obsolete 0s

frontend calls
    bind :{BALANCER_PORT}
    default_backend engines

frontend state
    bind :{METRICS_PORT}
    http-request use-service prometheus-exporter if {{ path {METRICS_PATH} }}
    http-request return status 200 if {{ path {ALIVE_PATH} }}
    http-request deny deny_status 404

backend engines
    balance leastconn
    option httpchk
    http-check send meth GET uri {READY_PATH}
    http-check expect status 200
    default-server inter 5s fall 2 rise 1
{servers}"""


def pod_spec(balancer: Balancer, config_map: str, slo_latency_s: float) -> dict[str, Any]:
    """The pod of one balancer; it needs no GPU and keeps nothing."""
    alive = {"httpGet": {"path": ALIVE_PATH, "port": "state"}, "timeoutSeconds": 5}
    return {
        "serviceAccountName": "diffplan-engine",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "priorityClassName": "diffplan-serving",
        # HAProxy's image stops on SIGUSR1: open requests are finished, new ones go to the other balancers
        "terminationGracePeriodSeconds": wait_s(slo_latency_s) + 2 * STOP_MARGIN_S,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [
            {
                "name": "haproxy",
                "image": balancer.image,
                "command": ["haproxy", "-W", "-db", "-f", f"{CONFIG_FOLDER}/{CONFIG_KEY}"],
                "ports": [
                    {"name": CALLS_PORT_NAME, "containerPort": BALANCER_PORT, "protocol": "TCP"},
                    {"name": "state", "containerPort": METRICS_PORT, "protocol": "TCP"},
                ],
                "resources": {"limits": {"memory": MEMORY}, "requests": {"memory": MEMORY}},
                "readinessProbe": {**alive, "periodSeconds": 5, "failureThreshold": 2},
                "livenessProbe": {**alive, "periodSeconds": 10, "failureThreshold": 3},
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                },
                "volumeMounts": [{"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True}],
            }
        ],
        "volumes": [{"name": "config", "configMap": {"name": config_map}}],
        # on nodes of their own if there are some: one node that goes takes one balancer with it
        "affinity": {
            "podAntiAffinity": {
                "preferredDuringSchedulingIgnoredDuringExecution": [
                    {
                        "weight": 100,
                        "podAffinityTerm": {
                            "labelSelector": {"matchLabels": {"app.kubernetes.io/name": "diffplan-balancer"}},
                            "topologyKey": "kubernetes.io/hostname",
                        },
                    }
                ]
            }
        },
    }
