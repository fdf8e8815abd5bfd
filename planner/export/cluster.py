"""What an export must know of the cluster and cannot take from a plan: one small YAML file, read as strictly as a scenario."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Final, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, model_validator

from planner.strict_yaml import read_strict

DNS_LABEL: Final = r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"
_IMAGE: Final = r"^[a-z0-9]+([._/:-][A-Za-z0-9_]+)*(@sha256:[0-9a-f]{64})?$"
_LABEL_KEY: Final = re.compile(r"([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
DnsLabel = Annotated[str, Field(min_length=1, max_length=63, pattern=DNS_LABEL)]
LabelValue = Annotated[str, Field(min_length=1, max_length=63, pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$")]

WarmShape = Annotated[str, Field(max_length=40, pattern=r"^[1-9][0-9]{0,3}x[1-9][0-9]{0,3}:[1-9][0-9]?(:unguided)?$")]
"""As the engine's ``--warm`` takes it, which checks the rest (multiples, largest sides)."""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Store(_Table):
    """Where the engines fetch checkpoints and add-ons: an HTTP store or a volume of the cluster, one of the two."""

    url: Annotated[
        str | None, Field(max_length=2000, pattern=r"^https?://[!-~]+$", description="Address of an HTTP store.")
    ] = None
    volume_claim: Annotated[DnsLabel | None, Field(description="A PersistentVolumeClaim, mounted read-only.")] = None
    token_secret: Annotated[
        DnsLabel | None, Field(description="Secret whose key token is the bearer token that the HTTP store wants.")
    ] = None
    is_token_sent_plainly: Annotated[
        bool, Field(description="Send the token to an http address: only where a mesh encrypts the way.")
    ] = False

    @model_validator(mode="after")
    def _one_of_the_two(self) -> Store:
        if (self.url is None) == (self.volume_claim is None):
            raise ValueError("needs either 'url' or 'volume_claim'|Give one of the two")
        if self.token_secret is not None and self.url is None:
            raise ValueError("has a 'token_secret' and no 'url'|A volume wants no token: remove it")
        is_plain = self.url is not None and self.url.startswith("http:")
        if self.token_secret is not None and is_plain and not self.is_token_sent_plainly:
            raise ValueError(
                "would send its token unencrypted|Use an https url, or is_token_sent_plainly: true where a mesh encrypts the way"
            )
        return self

    @property
    def port(self) -> int | None:
        """TCP port of an HTTP store; None for a volume."""
        if self.url is None:
            return None
        parts = urlsplit(self.url)
        return parts.port or (443 if parts.scheme == "https" else 80)


class Balancer(_Table):
    """HAProxy before the engines of a plan that needs several nodes: each request goes to the one with the fewest open ones."""

    image: Annotated[
        str,
        Field(min_length=1, max_length=500, pattern=_IMAGE, description="HAProxy's own image, 2.6 or newer."),
    ]
    replicas: Annotated[
        int, Field(ge=1, le=20, description="Balancers; each counts only the requests that went through itself.")
    ] = 2
    cluster_domain: Annotated[
        str,
        Field(
            max_length=200,
            pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*$",
            description="The cluster's DNS domain.",
        ),
    ] = "cluster.local"


class Cluster(_Table):
    """The cluster that files are exported for."""

    image: Annotated[
        str,
        Field(min_length=1, max_length=500, pattern=_IMAGE, description="Image that holds diffplan with its engine."),
    ]
    store: Annotated[Store, Field(description="Where models come from.")]
    namespace: Annotated[DnsLabel, Field(description="Namespace of every object.")] = "diffplan"
    gpus_per_node: Annotated[
        int, Field(ge=1, le=1024, description="GPUs of one node that NVLink joins. A pod never spans nodes.")
    ] = 8
    memory_gib_per_gpu: Annotated[
        float | None,
        Field(gt=0, le=65_536, description="Host memory of a node per GPU; caps what pods ask for. null: no cap."),
    ] = None
    node_labels: Annotated[
        dict[str, dict[str, LabelValue]],
        Field(max_length=20, description="GPU kind to the labels of its nodes; none: diffplan/gpu-kind and purchase."),
    ] = {}
    catalogue: Annotated[
        str | None, Field(max_length=4096, description="Catalogue file of the engine, relative to this file.")
    ] = None
    token_secret: Annotated[
        DnsLabel, Field(description="Secret whose key tokens.json holds the tenants' token digests.")
    ] = "diffplan-tokens"  # noqa: S105 - the name of a Secret
    monitoring_namespace: Annotated[DnsLabel, Field(description="Namespace from which Prometheus scrapes.")] = (
        "monitoring"
    )
    prometheus_url: Annotated[
        str | None,
        Field(max_length=2000, pattern=r"^https?://[!-~]+$", description="Asked by KEDA; needed for autoscaling."),
    ] = None
    balancer: Annotated[
        Balancer | None,
        Field(description="HAProxy between engines of several nodes. null: a Service, which picks one by lot."),
    ] = None
    priority: Annotated[
        int, Field(ge=0, le=1_000_000_000, description="Of the pods against others of the cluster.")
    ] = 100_000
    warm: Annotated[
        tuple[WarmShape, ...],
        Field(
            max_length=32,
            description="Shapes captured before a pod is ready, as 1024x1024:1 (width x height : images).",
        ),
    ] = ()
    image_pull_policy: Annotated[
        Literal["IfNotPresent", "Always"], Field(description="Kubernetes' imagePullPolicy.")
    ] = "IfNotPresent"

    @model_validator(mode="after")
    def _label_keys_are_keys(self) -> Cluster:
        wrong = [name for labels in self.node_labels.values() for name in labels if not _LABEL_KEY.fullmatch(name)]
        if wrong:
            raise ValueError(f"node_labels has the key {wrong[0]!r:.80}|Use a Kubernetes label key")
        if any(not labels for labels in self.node_labels.values()):
            raise ValueError("node_labels names a GPU kind without labels|Give it one, or remove it")
        return self


def load_cluster(path: Path) -> tuple[Cluster, Path | None]:
    """Reads a cluster file; gives with it the catalogue's path, None if it names none.

    Raises:
        InputError: it cannot be read or breaks the declaration above; every problem is named with file and line.
    """
    cluster = read_strict(path, Cluster)
    if cluster.catalogue is None:
        return cluster, None
    catalogue = Path(cluster.catalogue).expanduser()
    return cluster, catalogue if catalogue.is_absolute() else path.parent / catalogue
