"""What a plan cannot know about money: strict YAML, every field with its unit, a default, and the default's source.

Value curves are off until someone switches them on; a figure for which no source is known has no default, and what needs it is
left out and said to be.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, model_validator

from engine.allocation import Topology
from planner.strict_yaml import read_strict

Ratio = Annotated[float, Field(ge=0, le=1)]
Usd = Annotated[float, Field(ge=0, le=1e9)]
Positive = Annotated[float, Field(gt=0, le=1e6)]
POINTS_MAX: Final = 100


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Today(_Group):
    """The fleet that a change is compared with."""

    topology: Topology | None = None
    """None: the first priced row of the plan's waterfall."""
    n_gpus: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """None: the fewest GPUs with which that topology keeps the promise."""


class Purchase(_Group):
    """How GPUs are paid for; what is neither reserved nor spot has the plan's price."""

    reserved_ratio: Ratio = 0.0
    reserved_price_usd_per_gpu_hour: Usd | None = None
    spot_ratio: Ratio = 0.0
    spot_price_usd_per_gpu_hour: Usd | None = None
    gpus_per_host: Annotated[int, Field(ge=1, le=64)] = 1
    """GPUs that can only be had together; those of a host that the plan leaves unused are paid for."""

    @model_validator(mode="after")
    def _whole(self) -> Purchase:
        if self.reserved_ratio + self.spot_ratio > 1:
            raise ValueError("reserved_ratio and spot_ratio together exceed 1")
        if self.reserved_ratio and self.reserved_price_usd_per_gpu_hour is None:
            raise ValueError("reserved_ratio needs reserved_price_usd_per_gpu_hour")
        if self.spot_ratio and self.spot_price_usd_per_gpu_hour is None:
            raise ValueError("spot_ratio needs spot_price_usd_per_gpu_hour")
        return self


class Ownership(_Group):
    """Buying the GPUs instead of renting them; left out until a price is given."""

    gpu_purchase_usd: Usd | None = None
    hosting_usd_per_gpu_month: Usd | None = None
    life_months: Annotated[int, Field(ge=1, le=240)] = 48
    resale_ratio: Ratio = 0.0

    @model_validator(mode="after")
    def _both(self) -> Ownership:
        if (self.gpu_purchase_usd is None) != (self.hosting_usd_per_gpu_month is None):
            raise ValueError("gpu_purchase_usd and hosting_usd_per_gpu_month are given together or not at all")
        return self


class AddOns(_Group):
    """Storing models, and fetching those that are not on the hosts."""

    storage_usd_per_gib_month: Usd = 0.0247
    egress_usd_per_gib: Usd = 0.0


class Operation(_Group):
    """Every pool that is scaled by itself is a service that somebody runs."""

    operating_hours_per_service_month: Usd = 8.0
    engineer_usd_per_hour: Usd = 100.0


class Migration(_Group):
    """One-time effort to reach a topology from stock Diffusers; from another one, the difference."""

    diffusers_tuned_hours: Usd = 40.0
    colocated_hours: Usd = 160.0
    decoupled_hours: Usd = 320.0
    double_running_months: Annotated[float, Field(ge=0, le=24)] = 0.5
    """The new fleet runs beside the old one for so long."""


class Horizon(_Group):
    """The span over which money is added up."""

    n_months: Annotated[int, Field(ge=1, le=240)] = 36
    discount_ratio_per_year: Annotated[float, Field(ge=0, le=2)] = 0.10
    traffic_growth_ratio_per_month: Annotated[float, Field(ge=-0.5, le=0.5)] = 0.0
    price_change_ratio_per_month: Annotated[float, Field(ge=-0.5, le=0.5)] = 0.0


def _check_curve(latency_s: tuple[float, ...], values: tuple[float, ...], name: str) -> None:
    if len(latency_s) != len(values):
        raise ValueError(f"latency_s has {len(latency_s)} points, {name} {len(values)}")
    if any(second <= first for first, second in pairwise(latency_s)):
        raise ValueError("latency_s must grow from point to point")


class Completion(_Group):
    """Share of images whose user waits for them, by latency; straight between the points, level outside."""

    is_on: bool = False
    latency_s: Annotated[tuple[float, ...], Field(min_length=2, max_length=POINTS_MAX)] = (1.0, 3.0, 5.0, 6.0, 10.0)
    completion_ratio: Annotated[tuple[Ratio, ...], Field(min_length=2, max_length=POINTS_MAX)] = (
        0.9, 0.868, 0.81, 0.794, 0.777,
    )  # fmt: skip
    value_usd_per_image: Usd | None = None

    @model_validator(mode="after")
    def _whole(self) -> Completion:
        _check_curve(self.latency_s, self.completion_ratio, "completion_ratio")
        if self.is_on and self.value_usd_per_image is None:
            raise ValueError("value_usd_per_image is needed once is_on is true")
        return self


class Churn(_Group):
    """Share of customers who leave a month, by the latency that 95 % of requests stay under. No curve is known: the default has no effect."""

    is_on: bool = False
    latency_s: Annotated[tuple[float, ...], Field(max_length=POINTS_MAX)] = (1.0, 10.0)
    churn_ratio_per_month: Annotated[tuple[Ratio, ...], Field(max_length=POINTS_MAX)] = (0.0, 0.0)
    n_customers: Annotated[int, Field(ge=0, le=10**9)] = 0
    value_usd_per_customer: Usd = 0.0
    """What a customer who leaves would still have paid."""

    @model_validator(mode="after")
    def _whole(self) -> Churn:
        _check_curve(self.latency_s, self.churn_ratio_per_month, "churn_ratio_per_month")
        if self.is_on and (len(self.latency_s) < 2 or not self.n_customers or not self.value_usd_per_customer):
            raise ValueError("churn needs two points, n_customers and value_usd_per_customer once is_on is true")
        return self


class PricePerImage(_Group):
    """What users pay for an image, by the latency that 95 % of requests stay under. No curve is known: the default has no effect."""

    is_on: bool = False
    latency_s: Annotated[tuple[float, ...], Field(max_length=POINTS_MAX)] = (1.0, 10.0)
    price_usd_per_image: Annotated[tuple[Usd, ...], Field(max_length=POINTS_MAX)] = (0.0, 0.0)

    @model_validator(mode="after")
    def _whole(self) -> PricePerImage:
        _check_curve(self.latency_s, self.price_usd_per_image, "price_usd_per_image")
        if self.is_on and len(self.latency_s) < 2:
            raise ValueError("price needs two points once is_on is true")
        return self


class Value(_Group):
    """What lower latency earns; nothing, until it is switched on."""

    completion: Completion = Completion()
    churn: Churn = Churn()
    price: PricePerImage = PricePerImage()
    penalty_usd_per_late_image: Usd = 0.0


Range = Annotated[tuple[Positive, Positive], Field(description="lowest and highest factor; 1 lies between them")]


class Uncertainty(_Group):
    """Factors on the inputs that are least sure: lowest and highest, 1 being the most likely (triangular)."""

    traffic_ratio: Range = (0.7, 1.3)
    gpu_price_ratio: Range = (0.8, 1.2)
    operation_ratio: Range = (0.5, 2.0)
    migration_ratio: Range = (0.5, 2.0)
    unchecked_load_ratio: Range = (0.9, 1.1)
    """GPU time of a topology whose laws were not checked on held-out images."""
    n_draws: Annotated[int, Field(ge=100, le=1_000_000)] = 10_000

    @model_validator(mode="after")
    def _around_one(self) -> Uncertainty:
        for name in ("traffic_ratio", "gpu_price_ratio", "operation_ratio", "migration_ratio", "unchecked_load_ratio"):
            low, high = getattr(self, name)
            if not low <= 1 <= high:
                raise ValueError(f"{name} is {low:g}..{high:g}, and 1 must lie between")
        return self


class Assumptions(_Group):
    """Everything that is assumed about money."""

    today: Today = Today()
    purchase: Purchase = Purchase()
    ownership: Ownership = Ownership()
    add_ons: AddOns = AddOns()
    operation: Operation = Operation()
    migration: Migration = Migration()
    horizon: Horizon = Horizon()
    value: Value = Value()
    uncertainty: Uncertainty = Uncertainty()


NO_SOURCE: Final = "this project's guess; no published figure is known: replace it"
OFF: Final = "neutral: off unless given"
NO_CURVE: Final = "no source known: no effect until you enter your own curve"
NO_CHURN_CURVE: Final = (
    "no source known: no effect until you enter your own curve (Brutlag 2009, Google web search: 0.2 to 0.6 % fewer searches a user at "
    "0.1 to 0.4 s more; of use, not of customers who leave)"
)
SOURCES: Final[Mapping[str, str]] = {
    "add_ons.storage_usd_per_gib_month": "object storage at the list price of 0.023 USD per GB and month (S3 Standard, us-east-1)",
    "add_ons.egress_usd_per_gib": "reads inside one region are free at the large clouds; set it where the store is elsewhere",
    "operation.engineer_usd_per_hour": "mean US wage of software developers in 2024, 144,570 USD a year (BLS OEWS), over 2080 hours and the "
    "70 % of an employer's cost that wages are (BLS ECEC), rounded",
    "horizon.n_months": "three years, the usual life of a reservation",
    "ownership.life_months": NO_SOURCE,
    "value.completion.latency_s": "Google/SOASTA 2017, bounce of mobile pages: +32 % at 3 s, +90 % at 5 s, +106 % at 6 s, +123 % at 10 s "
    "against 1 s; of web pages, not of images",
    "value.completion.completion_ratio": "the same, on an assumed bounce of 10 % at 1 s",
    "value.churn.latency_s": NO_CHURN_CURVE,
    "value.churn.churn_ratio_per_month": NO_CHURN_CURVE,
    "value.price.latency_s": NO_CURVE,
    "value.price.price_usd_per_image": NO_CURVE,
}  # fmt: skip
_NEUTRAL: Final = ("today", "purchase", "ownership", "value", "horizon.traffic", "horizon.price")


def read_assumptions(path: Path | None) -> Assumptions:
    """The assumptions of a file, or the defaults; raises :class:`InputError` with file, line and field of every problem."""
    return Assumptions() if path is None else read_strict(path, Assumptions)


def stated(assumptions: Assumptions) -> list[dict[str, Any]]:
    """Every field with its value, whether it was given, and the source of its default."""
    rows: list[dict[str, Any]] = []

    def walk(group: BaseModel, place: str) -> None:
        for name in type(group).model_fields:
            value, here = getattr(group, name), f"{place}{name}"
            if isinstance(value, BaseModel):
                walk(value, f"{here}.")
                continue
            is_given = name in group.model_fields_set
            source = SOURCES.get(here, OFF if here.startswith(_NEUTRAL) else NO_SOURCE)
            value = list(value) if isinstance(value, tuple) else value
            rows.append(
                {"field": here, "value": value, "is_given": is_given, "source": "given" if is_given else source}
            )

    walk(assumptions, "")
    return rows
