"""The scenario: one strict YAML file that says which traffic, promise, profile, prices and limits a plan is for.

Every field is declared once, here, with its range, default and meaning; ``scenario.resolved.yaml`` writes them all back.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from ruamel.yaml import YAML

from engine.allocation import LinkKind, Policies
from planner.scenario_mechanisms import OrderTable, WorldTable
from planner.scenario_mechanisms import Table as _Table
from planner.strict_yaml import read_strict
from traces.problems import one_problem

SAMPLE_PREFIX: Final = "sample:"
SHIPPED: Final = Path(__file__).parent / "scenarios"
ScenarioTopology = Literal["diffusers", "diffusers_tuned", "colocated", "decoupled"]
ShiftLaw = Literal["same_hours", "independent", "amplify"]


class Window(_Table):
    """A stretch of the (scaled) traffic."""

    start_h: Annotated[float, Field(ge=0, description="Hours after the trace's start.")]
    end_h: Annotated[float, Field(gt=0, description="Hours after the trace's start.")]

    @model_validator(mode="after")
    def _ends_after_it_starts(self) -> Window:
        if self.end_h <= self.start_h:
            raise ValueError(f"end_h is {self.end_h:g}, start_h is {self.start_h:g}|Make end_h the larger one")
        return self


class Busiest(_Table):
    """The stretch of this length with the most requests."""

    length_h: Annotated[float, Field(gt=0, le=24 * 366, description="Hours.")]


class Traffic(_Table):
    """Which requests arrive."""

    trace: Annotated[
        str, Field(min_length=1, max_length=4096, description="A trace file relative to this scenario, or sample:NAME.")
    ]
    scale_factor: Annotated[
        float,
        Field(gt=0, le=100_000, description="Traffic as a multiple of the trace's, by superposed time-shifted copies."),
    ] = 1.0
    shift_law: Annotated[ShiftLaw, Field(description="How the copies are shifted; decides how bursty the sum is.")] = (
        "same_hours"
    )
    window: Annotated[Window | None, Field(description="Keep only this stretch of the trace, after scaling.")] = None
    busiest: Annotated[Busiest | None, Field(description="Keep only the busiest stretch, after scaling.")] = None
    seed: Annotated[int, Field(ge=0, le=2**32 - 1, description="Seeds the shifts.")] = 0

    @model_validator(mode="after")
    def _one_stretch(self) -> Traffic:
        if self.window is not None and self.busiest is not None:
            raise ValueError("has both 'window' and 'busiest'|Keep one of the two")
        return self


class Slo(_Table):
    """The promise to users."""

    latency_s: Annotated[float, Field(gt=0, le=86_400, description="Seconds from arrival to image.")]
    attainment_ratio: Annotated[
        float, Field(gt=0, lt=1, description="Share of offered requests in time; rejected ones count against it.")
    ] = 0.99
    confidence: Annotated[
        float, Field(ge=0.5, le=0.999, description="Confidence of every interval and of the verdict.")
    ] = 0.95


class ProfileChoice(_Table):
    """Which measured latencies the plan rests on."""

    name: Annotated[
        str,
        Field(
            min_length=1,
            max_length=4096,
            description="A shipped profile, a file relative to this scenario, or 'PROFILE as GPU', carried over by datasheet.",
        ),
    ]
    extrapolate: Annotated[bool, Field(description="Predict outside the measured box, and say so in the result.")] = (
        False
    )


class _KindTable(_Table):
    """Some keys are left out of a dump while they are null: scenarios from before there were any keep their digest."""

    @model_serializer(mode="wrap")
    def _without_unset(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        plain: dict[str, Any] = dump(self)
        drop = self._left_out()
        return {name: value for name, value in plain.items() if value is not None or name not in drop}

    def _left_out(self) -> frozenset[str]:
        raise NotImplementedError


class OtherKind(_KindTable):
    """A GPU kind at hand beside the profile's own: plans look at it too, and pools of an allocation file may have it."""

    kind: Annotated[str, Field(min_length=1, max_length=100)]
    profile: Annotated[
        str,
        Field(
            min_length=1,
            max_length=4096,
            description="Its profile: a shipped one, a file relative to this scenario, or 'PROFILE as GPU', carried over.",
        ),
    ]
    price_usd_per_gpu_hour: Annotated[float | None, Field(gt=0, le=10_000, description="null: the price table's.")] = (
        None
    )
    gpus_max: Annotated[
        int | None, Field(ge=1, le=100_000, description="Most GPUs of this kind; null: search.gpus_max.")
    ] = None
    device_memory_gib: Annotated[float | None, Field(gt=0, le=4096, description="null: its profile's.")] = None

    def _left_out(self) -> frozenset[str]:
        return frozenset({"price_usd_per_gpu_hour", "gpus_max", "device_memory_gib"})


class Gpu(_KindTable):
    """The GPUs to be rented."""

    kind: Annotated[str | None, Field(max_length=100, description="null: the profile's.")] = None
    device_memory_gib: Annotated[float | None, Field(gt=0, le=4096, description="null: the profile's.")] = None
    others: Annotated[
        tuple[OtherKind, ...],
        Field(max_length=16, description="Further kinds: a plan looks at each, and an allocation may use it."),
    ] = ()
    controlnet_kind: Annotated[
        str | None,
        Field(max_length=100, description="Kind of ControlNet workers (decoupled); null: a plan tries each."),
    ] = None

    def _left_out(self) -> frozenset[str]:
        return frozenset({"controlnet_kind"})

    @model_validator(mode="after")
    def _kinds_once(self) -> Gpu:
        kinds = [other.kind for other in self.others] + ([self.kind] if self.kind is not None else [])
        twice = sorted({kind for kind in kinds if kinds.count(kind) > 1})
        if twice:
            raise ValueError(f"names {', '.join(twice)} twice|Name each GPU kind once, gpu.kind included")
        return self


class Prices(_Table):
    """What a GPU costs."""

    table: Annotated[
        str, Field(min_length=1, max_length=4096, description="A shipped table, or a file relative to this scenario.")
    ] = "default"
    purchase: Annotated[Literal["on_demand", "reserved", "spot"], Field(description="Which price of the table.")] = (
        "on_demand"
    )
    price_usd_per_gpu_hour: Annotated[float | None, Field(gt=0, le=10_000, description="Overrides the table.")] = None
    hours_per_month: Annotated[float, Field(gt=0, le=744, description="Hours billed a month.")] = 730.0


class AddOns(_Table):
    """Sizes of checkpoints and add-ons that the trace does not know."""

    catalogue: Annotated[
        str | None, Field(max_length=4096, description="A catalogue file relative to this scenario.")
    ] = None
    lora_mib: Annotated[
        float, Field(gt=0, le=65_536, description="Size of a LoRA that the catalogue does not list.")
    ] = 178.0
    controlnet_gib: Annotated[
        float | None, Field(gt=0, le=1024, description="Likewise a ControlNet; null: the profile's.")
    ] = None
    checkpoint_gib: Annotated[
        float | None, Field(gt=0, le=1024, description="Likewise a checkpoint; null: the profile's.")
    ] = None


_DEFAULTS: Final = Policies()


class PolicyChoice(OrderTable):
    """Settings of the serving policies, the same for every topology."""

    queue_limit: Annotated[
        int | None, Field(ge=0, le=1_000_000, description="Waiting requests per base pool; null: no limit.")
    ] = _DEFAULTS.queue_limit
    lora_cache_gib: Annotated[float, Field(ge=0, le=65_536, description="Host memory for LoRAs, per base replica.")] = (
        _DEFAULTS.lora_cache_gib
    )
    lora_patch_by_step: Annotated[
        int,
        Field(
            ge=0,
            le=1000,
            description="A LoRA is patched in before this step at the latest (decoupled); 0: before the first.",
        ),
    ] = _DEFAULTS.lora_patch_by_step
    controlnet_host_cache_gib: Annotated[float, Field(ge=0, le=65_536)] = _DEFAULTS.controlnet_host_cache_gib
    checkpoint_host_cache_gib: Annotated[float, Field(ge=0, le=65_536)] = _DEFAULTS.checkpoint_host_cache_gib
    link: Annotated[LinkKind, Field(description="Between base and ControlNet workers.")] = "nvlink"

    def policies(self) -> Policies:
        """As an allocation carries them."""
        return Policies(**{name: value for name, value in self.settings().items() if name != "link"})  # type: ignore[arg-type]


class SearchLimits(_Table):
    """Where the search may look."""

    gpus_max: Annotated[int, Field(ge=1, le=100_000, description="Most GPUs a plan may use.")] = 1024
    headroom_ratio: Annotated[
        float, Field(ge=0, le=10, description="Spare replicas of every pool beyond the smallest found in the search.")
    ] = 0.0
    requests_max: Annotated[
        int,
        Field(
            ge=100,
            le=10_000_000,
            description="Requests of the busiest stretch that the search simulates; the confirmation uses all.",
        ),
    ] = 8_000
    dedicated_controlnets_max: Annotated[
        int, Field(ge=0, le=64, description="Popular ControlNets that get workers of their own.")
    ] = 8


class SimulationSettings(_Table):
    """How the confirmation is simulated."""

    replications: Annotated[int, Field(ge=2, le=200, description="Runs over profile draws and arrival seeds.")] = 5
    warmup_s: Annotated[
        float, Field(ge=0, le=86_400, description="Arrivals before this are simulated but not counted.")
    ] = 300.0
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0


class Scenario(_Table):
    """One planning question."""

    name: Annotated[str, Field(min_length=1, max_length=100)]
    description: Annotated[str, Field(max_length=4000)] = ""
    traffic: Traffic
    slo: Slo
    profile: ProfileChoice
    gpu: Gpu = Gpu()
    prices: Prices = Prices()
    add_ons: AddOns = AddOns()
    topologies: Annotated[
        tuple[ScenarioTopology, ...], Field(min_length=1, max_length=4, description="Which compete.")
    ] = (
        "diffusers",
        "diffusers_tuned",
        "colocated",
        "decoupled",
    )
    policies: PolicyChoice = PolicyChoice()
    world: Annotated[WorldTable, Field(description="Failures, reclaims, retries, the store: all off by default.")] = (
        WorldTable()
    )
    search: SearchLimits = SearchLimits()
    simulation: SimulationSettings = SimulationSettings()

    @model_validator(mode="after")
    def _topologies_once(self) -> Scenario:
        twice = sorted({name for name in self.topologies if self.topologies.count(name) > 1})
        if twice:
            raise ValueError(f"topologies names {', '.join(twice)} twice|Name each once")
        return self


def load_scenario(name_or_path: str) -> tuple[Scenario, Path]:
    """Reads a scenario and gives it with the folder that its relative paths start from.

    ``sample:NAME`` is a shipped scenario.

    Raises:
        InputError: no such scenario, or it breaks the declaration above; every problem is named with file and line.
    """
    if name_or_path.startswith(SAMPLE_PREFIX):
        name = name_or_path.removeprefix(SAMPLE_PREFIX)
        shipped = shipped_scenarios()
        if name not in shipped:
            raise one_problem(
                name_or_path, "is not a shipped scenario", f"one of {', '.join(SAMPLE_PREFIX + key for key in shipped)}",
                "Check the name, or give a file.",
            )  # fmt: skip
        path = shipped[name]
    else:
        path = Path(name_or_path)
    return read_strict(path, Scenario), path.parent


def shipped_scenarios() -> dict[str, Path]:
    """Name to file of the scenarios that travel with the package."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def resolve(reference: str, folder: Path) -> Path:
    """A path of the scenario, from the scenario's folder unless it is absolute."""
    path = Path(reference).expanduser()
    return path if path.is_absolute() else folder / path


def to_yaml(scenario: Scenario) -> str:
    """The scenario with every default stated; reading it gives an equal scenario."""
    stream = io.StringIO()
    writer = YAML(typ="safe", pure=True)
    writer.default_flow_style = False
    writer.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    writer.width = 120
    writer.dump(scenario.model_dump(mode="json"), stream)
    return stream.getvalue()


def scenario_sha256(scenario: Scenario) -> str:
    """Identity of the question: digest of every field, defaults included."""
    return hashlib.sha256(scenario.model_dump_json().encode()).hexdigest()
