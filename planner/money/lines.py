"""The cost of a fleet in full: GPUs by purchase type, GPUs of a host that nobody uses, storage, egress, and running its services."""

from __future__ import annotations

import math
from dataclasses import dataclass

from planner.money.assumptions import Assumptions
from planner.plan_record import Ids


@dataclass(frozen=True, slots=True)
class ModelTraffic:
    """What add-ons and checkpoints take beside GPUs."""

    stored_gib: float
    fetched_gib_per_month: float
    """An upper bound: every load that the records count, as if each came from the store."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """What is priced."""

    topology: str
    n_gpus: float
    n_services: int
    """Pools that are scaled by themselves."""


@dataclass(frozen=True, slots=True)
class CostLines:
    """USD a month."""

    gpu_usd: float
    unused_host_gpu_usd: float
    storage_usd: float
    egress_usd: float
    operation_usd: float

    @property
    def total_usd(self) -> float:
        """The sum of the lines."""
        return self.gpu_usd + self.unused_host_gpu_usd + self.storage_usd + self.egress_usd + self.operation_usd


def price_usd_per_gpu_hour(ids: Ids, assumptions: Assumptions) -> float:
    """The mean over purchase types."""
    bought = assumptions.purchase
    rest = 1.0 - bought.reserved_ratio - bought.spot_ratio
    reserved = bought.reserved_ratio * (bought.reserved_price_usd_per_gpu_hour or 0.0)
    spot = bought.spot_ratio * (bought.spot_price_usd_per_gpu_hour or 0.0)
    return rest * ids.price_usd_per_gpu_hour + reserved + spot


def cost_lines(fleet: Fleet, ids: Ids, assumptions: Assumptions, models: ModelTraffic | None) -> CostLines:
    """Prices a fleet for a month. ``models`` None: storage and egress are not known and count as 0."""
    per_gpu = price_usd_per_gpu_hour(ids, assumptions) * ids.hours_per_month
    per_host = assumptions.purchase.gpus_per_host
    unused = math.ceil(fleet.n_gpus / per_host - 1e-9) * per_host - fleet.n_gpus if per_host > 1 else 0.0
    operation, add_ons = assumptions.operation, assumptions.add_ons
    return CostLines(
        gpu_usd=fleet.n_gpus * per_gpu,
        unused_host_gpu_usd=unused * per_gpu,
        storage_usd=models.stored_gib * add_ons.storage_usd_per_gib_month if models else 0.0,
        egress_usd=models.fetched_gib_per_month * add_ons.egress_usd_per_gib if models else 0.0,
        operation_usd=fleet.n_services * operation.operating_hours_per_service_month * operation.engineer_usd_per_hour,
    )


def migration_usd(start: str, target: str, assumptions: Assumptions) -> float:
    """Effort from one topology to another; going back to a simpler one is taken to cost nothing."""
    effort = assumptions.migration
    hours = {
        "diffusers": 0.0,
        "diffusers_tuned": effort.diffusers_tuned_hours,
        "colocated": effort.colocated_hours,
        "decoupled": effort.decoupled_hours,
        "decoupled_cfg2": effort.decoupled_hours,
    }
    return max(0.0, hours[target] - hours[start]) * assumptions.operation.engineer_usd_per_hour
