"""What a plan decides beside the fleet: whether it should scale by itself, and where each add-on should live."""

from __future__ import annotations

from typing import Any, Literal

from planner.record_types import Estimate, Number, Record


class AutoscaledRow(Record):
    """One setting of the autoscaler, as simulated."""

    kind: str
    min_replicas: int
    max_replicas: int
    target: float
    """Requests waiting and running a replica that the autoscaler aims at."""
    cooldown_s: float
    """With ``min_replicas`` 0: idle time before the last replica goes."""
    n_repetitions: int
    mean_gpus: Estimate
    """Allocated on average, busy or not."""
    gpu_hours_per_month: Number
    cost_usd_per_month: Number
    slo_attainment_ratio: Estimate
    latency_p50_s: Estimate
    latency_p99_s: Estimate
    keeps_promise: bool
    """Whether the whole interval of the attainment (of one repetition, its value) is at or over the target."""


class AutoscalingRecord(Record):
    """The recommended fleet with a fixed size against the same fleet scaling its base pool."""

    verdict: Literal["autoscale", "fixed", "not simulated"]
    why: str
    fixed_gpu_hours_per_month: float
    fixed_cost_usd_per_month: float
    saving_usd_per_month: Number
    """Of the chosen setting against the fixed size; null without one."""
    start_s: float
    """Assumed: from the decision until a new replica's process is up, its GPU included."""
    chosen: AutoscaledRow | None
    tried: tuple[AutoscaledRow, ...]
    allocation: dict[str, Any] | None
    """The allocation of the chosen setting, for ``diffplan simulate --allocation`` and the engine."""
    held_ratio: tuple[float, ...] = ()
    """Of the chosen setting: share of the time in which at least 1, 2, … GPUs are held, mean over repetitions; its sum is the mean GPUs."""


class PurchasePrice(Record):
    """A GPU-hour by one purchase type."""

    purchase: Literal["on_demand", "reserved", "spot"]
    price_usd_per_gpu_hour: Number
    """Null: the scenario's table has none for the GPU kind."""
    source: str


class PurchaseRow(Record):
    """The recommended fleet, bought in one way."""

    is_scaled: bool
    """Scaling by itself, as ``autoscaling.chosen``, or of fixed size."""
    n_on_demand: int
    """At most; a fleet of fixed size holds them all the time."""
    n_reserved: int
    n_spot: int
    cost_usd_per_month: float
    difference_usd_per_month: float
    """Against the recommended fleet at the plan's price; below 0: cheaper."""
    is_simulated: bool
    """False: it would be interrupted in a way that was not simulated."""


class PurchasingRecord(Record):
    """How to buy the GPUs: the cheapest mix of purchase types, exact for the held GPUs as simulated."""

    sentence: str
    prices: tuple[PurchasePrice, ...]
    break_even_ratio: Number
    """A GPU held for a larger share of the time is cheaper reserved; null without both prices."""
    rows: tuple[PurchaseRow, ...]
    best: int | None
    """Place in ``rows`` of the cheapest that was simulated."""


Placement = Literal["in process", "own workers", "shared workers", "on demand", "kept in host memory"]


class PlacedRow(Record):
    """An add-on placed otherwise: the cheapest fleet with that placement that keeps the promise on the same requests."""

    placement: Placement
    pools: dict[str, int]
    n_gpus: int | None
    """Null: none was found within the limit."""
    cost_usd_per_month: Number
    difference_usd_per_month: Number
    """Against the recommended fleet on the same requests; above 0: dearer."""
    slo_attainment_ratio: Number
    latency_p50_s: Number
    latency_p99_s: Number
    with_it_p50_s: Number
    """Median latency of the requests that use the add-on."""


class AddOnRow(Record):
    """Where one add-on should live, and what it costs."""

    add_on_id: str
    kind: Literal["controlnet", "lora"]
    n_uses: int
    use_ratio: float
    """Of the requests."""
    gpu_hours_per_month: float
    """GPU time that its uses take, loads included."""
    cost_usd_per_month: float
    """Its part of the fleet's cost by that time; idle GPUs are in no add-on's part."""
    latency_added_s: float
    """Mean over its uses."""
    miss_ratio: Number
    """Uses for which it had to be fetched or loaded first; null where several add-ons of a request cannot be told apart."""
    placement: Placement
    why: str
    here: PlacedRow | None
    """The recommended fleet on the requests that the alternatives were simulated on; null where nothing was simulated."""
    alternatives: tuple[PlacedRow, ...]


class AddOnsRecord(Record):
    """The add-ons that cost most, placed one by one; the others together."""

    rows: tuple[AddOnRow, ...]
    n_others: int
    others_cost_usd_per_month: float
    n_controlnets_on_demand: int
    """Of all, also those without a row: loaded anew for more than half of their uses."""
    n_loras_on_demand: int
    simulated_on: str
    """Which requests the alternatives were simulated on, in words."""


class CheckpointFleetRow(Record):
    """A fleet in which one checkpoint runs everywhere, or in a base pool of its own: the fewest GPUs that keep the promise."""

    has_own_pool: bool
    topology: str
    """Of the pool that serves it."""
    pools: dict[str, int]
    n_gpus: int | None
    """Null: none was found within the limit."""
    cost_usd_per_month: Number
    difference_usd_per_month: Number
    """Against the recommended fleet on the same requests; above 0: dearer."""
    slo_attainment_ratio: Number
    latency_p50_s: Number
    latency_p99_s: Number
    with_it_p50_s: Number
    """Median latency of the requests for the checkpoint."""


class CheckpointRow(Record):
    """Where one checkpoint should run."""

    checkpoint_id: str
    use_ratio: float
    """Of the requests that the fleets were simulated on."""
    best: int | None
    """Place in ``fleets`` of the one with the fewest GPUs; 0 is the recommended one, which wins ties."""
    why: str
    fleets: tuple[CheckpointFleetRow, ...]


class CheckpointsRecord(Record):
    """Whether a checkpoint should have base replicas of its own, and of which topology, tried one by one."""

    sentence: str
    rows: tuple[CheckpointRow, ...]
    simulated_on: str


class SettingRow(Record):
    """One setting with another value, everything else as planned."""

    setting: str
    """As the scenario names it; empty for the scenario as it is."""
    value: str
    n_gpus: int | None
    """The smallest fleet near the recommended one that keeps the promise; null: none was found."""
    cost_usd_per_month: Number
    """Null also where the price table lacks the GPU kind."""
    difference_usd_per_month: Number
    """Against the scenario as it is on the same requests; above 0: dearer."""
    same_size_attainment_ratio: Number
    same_size_latency_at_target_s: Number
    """Latency that the promised share stays under, with as many replicas as recommended."""


class SettingsRecord(Record):
    """What other settings and GPU kinds would need, one changed at a time."""

    sentence: str
    rows: tuple[SettingRow, ...]
    """The scenario as it is first."""
    simulated_on: str
