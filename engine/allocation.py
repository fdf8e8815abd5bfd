"""Which GPUs run what (Allocation): plain JSON that the engine starts and the simulator simulates. What exists is the Catalogue.

Torch-free and pydantic-free, because the planner and the GPU host both read it. Files are checked field by field; all
problems are reported together as :class:`traces.problems.InputError`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal, get_args

from engine.allocation_checks import check_allocation
from engine.catalogue import AddOnKind, Catalogue, CatalogueEntry, catalogue_to_plain, read_catalogue
from engine.json_records import RecordReader, read_json
from engine.policies.autoscale_settings import Autoscale, AutoscalerKind
from traces.problems import InputError

__all__ = [
    "ANY",
    "GIB",
    "TOPOLOGIES",
    "AddOnKind",
    "Allocation",
    "CachePolicy",
    "Catalogue",
    "CatalogueEntry",
    "Link",
    "LinkKind",
    "Policies",
    "Pool",
    "PoolRole",
    "QueueOrder",
    "TenantShare",
    "Topology",
    "allocation_from_plain",
    "check_allocation",
    "read_allocation",
    "read_catalogue",
    "to_json",
]

SCHEMA_VERSION: Final = 1
GIB: Final = 2**30

Topology = Literal["diffusers", "diffusers_tuned", "colocated", "decoupled", "decoupled_cfg2"]
TOPOLOGIES: Final[tuple[Topology, ...]] = get_args(Topology)
PoolRole = Literal["base", "controlnet"]
LinkKind = Literal["local", "nvlink", "pcie", "network"]
QueueOrder = Literal["fifo", "priority", "weighted_tenants"]
CachePolicy = Literal["lru", "lfu", "ttl"]
ANY: Final = "*"
"""In a list of ids: whatever the requests ask for, loaded on demand within the device's memory."""


@dataclass(frozen=True, slots=True)
class Pool:
    """Replicas of one worker."""

    name: str
    role: PoolRole
    n_replicas: int
    gpu_kind: str
    n_gpus_per_replica: int = 1
    topology: Topology = "colocated"
    """Of a base pool; a ControlNet pool carries the topology of the bases it serves."""
    base_model_ids: tuple[str, ...] = (ANY,)
    """Checkpoints a base replica may hold."""
    controlnet_ids: tuple[str, ...] = (ANY,)
    """ControlNet pool: what each replica hosts. Base pool: which ControlNets run in process ((), none)."""
    autoscale: Autoscale | None = None
    """How the pool grows and shrinks; it starts with ``n_replicas``. None: it stays as it is."""
    workers_per_gpu: int = 1
    """Replicas that share one GPU, each with an equal part of its memory; 1..16."""
    speed_ratio: float | None = None
    """Speed of one such replica over that of a whole GPU, above 0, at most 1, measured or stated. None: 1/workers_per_gpu."""

    @property
    def n_gpus(self) -> int:
        """GPUs the whole pool occupies."""
        return -(-self.n_replicas // self.workers_per_gpu) * self.n_gpus_per_replica


@dataclass(frozen=True, slots=True)
class Link:
    """How a base pool reaches a ControlNet pool."""

    base_pool: str
    controlnet_pool: str
    kind: LinkKind = "nvlink"
    uplink: str = ""
    """Name of a shared line, such as a rack's, that these transfers go through besides; empty: none."""
    uplink_gib_per_s: float | None = None
    """Its capacity, the same wherever the line is named."""
    compression_ratio: float = 1.0
    """Residual bytes before over after compression, 1 or more; what compressing costs is not counted."""


@dataclass(frozen=True, slots=True)
class TenantShare:
    """What one tenant may have, beside or in place of what holds for all."""

    tenant_id: str
    weight: float = 1.0
    """Its part of the service under ``queue_order`` 'weighted_tenants', against the others' weights; above 0."""
    running_max: int | None = None
    """In place of ``tenant_running_max``."""
    waiting_max: int | None = None
    """In place of ``tenant_waiting_max``."""


@dataclass(frozen=True, slots=True)
class Policies:
    """Settings of the shared decision functions in ``engine/policies``."""

    queue_limit: int | None = None
    """Requests that may wait at a base pool; the next is rejected. None: unbounded."""
    lora_cache_gib: float = 64.0
    """Host memory for LoRAs, per base replica."""
    lora_patch_by_step: int = 10
    """Bounded asynchronous loading: denoising starts at once, the patch lands before this step at the latest. 0: synchronous."""
    controlnet_host_cache_gib: float = 256.0
    """Host memory for ControlNets that are not resident on the device, per replica."""
    checkpoint_host_cache_gib: float = 256.0
    """Host memory for checkpoints that are not resident on the device, per base replica."""
    lora_prefetch_depth: int = 0
    """Requests at the front of the queue whose LoRAs are fetched while they wait. 0: a fetch starts when a replica takes one up."""
    overtake_max: int = 0
    """Younger requests that may pass one whose LoRAs are still to be fetched; it starts all the same if nobody else can. 0: none."""
    switch_overtake_max: int = 0
    """Younger requests that may pass one that would make the idle replica load another checkpoint. 0: none."""
    forward_batch_max: int | None = None
    """Requests that agree in everything but prompt and seed share a forward up to this many samples (images, twice under
    guidance). None: each runs alone."""
    batch_window_s: float = 0.0
    """How long a request waits for others to share its batch, counted from its arrival. 0: only those that wait already."""
    deadline_s: float | None = None
    """Deadline of requests that name none, in seconds after arrival. None: none."""
    admission_slack_ratio: float | None = None
    """A request is rejected on arrival if its estimated latency exceeds this share of its deadline. None: no estimate is made."""
    tenant_running_max: int | None = None
    """Requests of one tenant that run at the same time; its others wait and are passed. None: unbounded."""
    tenant_waiting_max: int | None = None
    """Requests of one tenant that may wait; the next is rejected. None: unbounded."""
    retry_max: int = 1
    """Times a request is tried again after a worker was lost under it, if its deadline allows."""
    queue_order: QueueOrder = "fifo"
    """priority: larger first, then by arrival. weighted_tenants: likewise, but within a priority tenants share by weight."""
    tenants: tuple[TenantShare, ...] = ()
    """Tenants with limits or weights of their own; the others have weight 1."""
    lora_cache_policy: CachePolicy = "lru"
    """Which LoRA leaves the host tier: least recently used, least frequently used, or one unused for ``lora_cache_ttl_s``
    (and least recently used where bytes still lack)."""
    lora_cache_ttl_s: float | None = None
    """Only with 'ttl': seconds after its last use at which a LoRA is dropped."""
    replicas_per_host: int = 1
    """Base replicas of a pool that share one host, and with it one LoRA tier of as many times ``lora_cache_gib``."""


@dataclass(frozen=True, slots=True)
class Allocation:
    """Pools, how they are linked, and the policies. The engine starts exactly this; the simulator simulates exactly this."""

    pools: tuple[Pool, ...]
    links: tuple[Link, ...] = ()
    policies: Policies = field(default_factory=Policies)
    schema_version: int = SCHEMA_VERSION

    @property
    def n_gpus(self) -> int:
        """GPUs in all pools."""
        return sum(pool.n_gpus for pool in self.pools)

    def pools_of(self, role: PoolRole) -> tuple[Pool, ...]:
        """The pools with this role, in order."""
        return tuple(pool for pool in self.pools if pool.role == role)

    def link_kind(self, base_pool: str, controlnet_pool: str) -> LinkKind:
        """The link between two pools; NVLink where none is named."""
        for link in self.links:
            if link.base_pool == base_pool and link.controlnet_pool == controlnet_pool:
                return link.kind
        return "nvlink"


def to_json(record: Allocation | Catalogue) -> str:
    """JSON with sorted keys and a final newline; the same record always gives the same bytes."""
    plain = catalogue_to_plain(record) if isinstance(record, Catalogue) else dataclasses.asdict(record)
    return json.dumps(plain, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def read_allocation(path: Path) -> Allocation:
    """Reads an allocation file.

    Raises:
        InputError: the file is missing, too large, not JSON, or a field is unknown, missing, of the wrong type or out of range.
    """
    return allocation_from_plain(read_json(path), str(path))


def allocation_from_plain(plain: object, where: str) -> Allocation:
    """Builds an allocation from decoded JSON; raises :class:`InputError` with every problem found."""
    reader = RecordReader(where, _CHOICES, {"Autoscale": Autoscale, "TenantShare": TenantShare})
    top = reader.table(plain, {"schema_version", "pools", "links", "policies"}, "")
    reader.version(top)
    pools = [reader.record(Pool, item, f"pools[{i}]") for i, item in enumerate(reader.items(top.get("pools"), "pools"))]
    links = [
        reader.record(Link, item, f"links[{i}]") for i, item in enumerate(reader.items(top.get("links", []), "links"))
    ]
    policies = reader.record(Policies, top.get("policies", {}), "policies")
    reader.finish()
    allocation = Allocation(
        pools=tuple(pool for pool in pools if pool is not None),
        links=tuple(link for link in links if link is not None),
        policies=policies if policies is not None else Policies(),
    )
    problems = list(check_allocation(allocation, where))
    if problems:
        raise InputError(problems)
    return allocation


_CHOICES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType({
    "Topology": TOPOLOGIES,
    "PoolRole": get_args(PoolRole),
    "LinkKind": get_args(LinkKind),
    "QueueOrder": get_args(QueueOrder),
    "CachePolicy": get_args(CachePolicy),
    "AutoscalerKind": get_args(AutoscalerKind),
})  # fmt: skip
