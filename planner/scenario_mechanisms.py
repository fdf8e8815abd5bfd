"""The part of a scenario that switches mechanisms on: how the service orders, batches and caches; what the world does to it.

Everything is off by default. Autoscaling, shared GPUs and links belong to an allocation file, pool by pool.
"""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, model_validator

from engine.allocation import CachePolicy, Policies, QueueOrder, TenantShare
from planner.simulator.world import Failures, LoraStore, Reclaims, Retries, World

DAY_S: Final = 86_400.0
YEAR_S: Final = 366 * DAY_S
_OFF: Final = Policies()
_RETRIES: Final = Retries()
Names = Annotated[tuple[str, ...], Field(max_length=64, description="Names of pools; empty: all.")]


class Table(BaseModel):
    """A strict, frozen table of a scenario."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class TenantTable(Table):
    """What one tenant may have."""

    tenant_id: Annotated[str, Field(max_length=200)]
    weight: Annotated[float, Field(gt=0, le=1e6, description="Part of the service under 'weighted_tenants'.")] = 1.0
    running_max: Annotated[
        int | None, Field(ge=1, le=1_000_000, description="Requests at once; null: as for all tenants.")
    ] = None
    waiting_max: Annotated[int | None, Field(ge=0, le=1_000_000, description="Likewise waiting.")] = None


class OrderTable(Table):
    """Queue order, tenants, batches, caches: settings of the shared policies beyond the static model."""

    queue_order: Annotated[QueueOrder, Field(description="Which waiting request is next.")] = _OFF.queue_order
    tenants: Annotated[tuple[TenantTable, ...], Field(max_length=10_000, description="Tenants with own limits.")] = ()
    tenant_running_max: Annotated[
        int | None, Field(ge=1, le=1_000_000, description="Requests of one tenant at once; null: no limit.")
    ] = None
    tenant_waiting_max: Annotated[
        int | None, Field(ge=0, le=1_000_000, description="Requests of one tenant that may wait; null: no limit.")
    ] = None
    switch_overtake_max: Annotated[
        int, Field(ge=0, le=1_000_000, description="Requests that may pass one whose checkpoint is not on the device.")
    ] = _OFF.switch_overtake_max
    forward_batch_max: Annotated[
        int | None, Field(ge=1, le=1024, description="Samples of a forward that alike requests share; null: alone.")
    ] = None
    batch_window_s: Annotated[float, Field(ge=0, le=3600, description="Seconds that a request waits for company.")] = (
        _OFF.batch_window_s
    )
    deadline_s: Annotated[
        float | None, Field(gt=0, le=DAY_S, description="Deadline of requests that name none; null: none.")
    ] = None
    admission_slack_ratio: Annotated[
        float | None,
        Field(
            gt=0, le=10, description="Reject if the estimated latency exceeds this share of the deadline; null: never."
        ),
    ] = None
    retry_max: Annotated[int, Field(ge=0, le=100, description="Further attempts after a worker was lost.")] = (
        _OFF.retry_max
    )
    lora_cache_policy: Annotated[CachePolicy, Field(description="Which LoRA leaves host memory.")] = (
        _OFF.lora_cache_policy
    )
    lora_cache_ttl_s: Annotated[
        float | None, Field(gt=0, le=YEAR_S, description="With 'ttl': seconds unused after which one is dropped.")
    ] = None
    replicas_per_host: Annotated[
        int, Field(ge=1, le=64, description="Base replicas of a pool that share a host's LoRA tier.")
    ] = _OFF.replicas_per_host

    @model_validator(mode="after")
    def _agrees(self) -> OrderTable:
        names = [share.tenant_id for share in self.tenants]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"tenants names {', '.join(twice)} twice|Name each once")
        if (self.lora_cache_policy == "ttl") != (self.lora_cache_ttl_s is not None):
            raise ValueError(
                f"lora_cache_ttl_s is {self.lora_cache_ttl_s} with lora_cache_policy {self.lora_cache_policy}"
                "|Set it with 'ttl', and only then"
            )
        if self.batch_window_s > 0 and self.forward_batch_max is None:
            raise ValueError("batch_window_s is set without forward_batch_max|Say how many samples a batch may have")
        return self

    def settings(self) -> dict[str, object]:
        """Field to value, as :class:`engine.allocation.Policies` takes them."""
        plain = {name: getattr(self, name) for name in type(self).model_fields}
        return {**plain, "tenants": tuple(TenantShare(**share.model_dump()) for share in self.tenants)}


class RetriesTable(Table):
    """Rejected clients ask again."""

    n_max: Annotated[int, Field(ge=1, le=100, description="Further attempts.")] = _RETRIES.n_max
    backoff_s: Annotated[float, Field(gt=0, le=DAY_S)] = _RETRIES.backoff_s
    backoff_factor: Annotated[float, Field(ge=1, le=100)] = _RETRIES.backoff_factor
    backoff_max_s: Annotated[float, Field(gt=0, le=DAY_S)] = _RETRIES.backoff_max_s
    jitter_ratio: Annotated[float, Field(ge=0, le=1)] = _RETRIES.jitter_ratio

    @model_validator(mode="after")
    def _grows(self) -> RetriesTable:
        if self.backoff_max_s < self.backoff_s:
            raise ValueError(f"backoff_max_s is {self.backoff_max_s:g}, below backoff_s, {self.backoff_s:g}|Raise it")
        return self


class FailuresTable(Table):
    """Workers fail and are repaired."""

    mtbf_s: Annotated[float, Field(gt=0, le=100 * YEAR_S, description="Mean up time.")]
    mttr_s: Annotated[float, Field(ge=0, le=YEAR_S, description="Mean time to repair.")]
    start_s: Annotated[float, Field(ge=0, le=DAY_S, description="Start after a repair.")] = 60.0
    pools: Names = ()


class ReclaimsTable(Table):
    """Spot capacity is taken back and given again."""

    mean_s: Annotated[float, Field(gt=0, le=100 * YEAR_S, description="Mean time a worker keeps its GPUs.")]
    notice_s: Annotated[float, Field(ge=0, le=DAY_S, description="From the notice to the end.")] = 120.0
    return_s: Annotated[float, Field(ge=0, le=YEAR_S, description="Mean time until a replacement.")] = 600.0
    start_s: Annotated[float, Field(ge=0, le=DAY_S, description="Its start.")] = 60.0
    pools: Names = ()


class LoraStoreTable(Table):
    """The remote store's bandwidth."""

    bandwidth_gib_per_s: Annotated[float, Field(gt=0, le=100_000, description="Shared by all fetches.")]


class WorldTable(Table):
    """What the service does not decide."""

    retries: Annotated[RetriesTable | None, Field(description="null: a rejected client gives up.")] = None
    failures: Annotated[FailuresTable | None, Field(description="null: nothing fails.")] = None
    reclaims: Annotated[ReclaimsTable | None, Field(description="null: capacity is never taken back.")] = None
    lora_store: Annotated[LoraStoreTable | None, Field(description="null: every fetch as fast as alone.")] = None
    # left out of files where it is off, so that scenarios from before it was there keep their digests
    is_store_local: Annotated[
        bool,
        Field(description="The store is a folder on each host's own disk: no fetch.", exclude_if=lambda on: not on),
    ] = False

    @model_validator(mode="after")
    def _one_store(self) -> WorldTable:
        if self.is_store_local and self.lora_store is not None:
            raise ValueError("has both is_store_local and lora_store, a remote one|Leave one of them out")
        return self

    def world(self, seed: int) -> World:
        """As the simulator takes it."""
        return World(
            retries=Retries(**self.retries.model_dump()) if self.retries else None,
            failures=Failures(**self.failures.model_dump()) if self.failures else None,
            reclaims=Reclaims(**self.reclaims.model_dump()) if self.reclaims else None,
            lora_store=LoraStore(**self.lora_store.model_dump()) if self.lora_store else None,
            seed=seed,
        )
