"""What ``diffplan engine serve`` runs when it is given nothing: random weights, one base worker, one ControlNet worker."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from engine.allocation import Allocation, Policies, Pool
from engine.catalogue import Catalogue, CatalogueEntry
from engine.frontdoor.settings import Defaults, Limits

SIZE_MULTIPLE_PX: Final = {"sdxl": 32, "tiny": 8, "featherweight": 8}
"""Image sides must be a multiple of this, so that every level of the UNet halves exactly (``ModelSpec.size_multiple_px``)."""
DEFAULTS: Final = {
    "sdxl": Defaults(),
    "tiny": Defaults(width_px=64, height_px=64, n_steps=8),
    "featherweight": Defaults(width_px=64, height_px=64, n_steps=8),
}


POLICIES: Final = Policies(queue_limit=64, admission_slack_ratio=1.0)
"""What cannot be in time is refused at once, with 429, and not taken to end as a 504."""


def builtin_catalogue() -> Catalogue:
    """Random weights under the names of the examples: a base model, two ControlNets, a LoRA in two versions."""
    entries = (
        CatalogueEntry("default", "base", file="seed:0"),
        CatalogueEntry("canny", "controlnet", file="seed:1"),
        CatalogueEntry("depth", "controlnet", file="seed:2"),
        CatalogueEntry("ink-1", "lora", name="ink", version="1", file="seed:3"),
        CatalogueEntry("ink-2", "lora", name="ink", version="2", file="seed:4"),
    )
    return Catalogue(MappingProxyType({entry.id: entry for entry in entries}), MappingProxyType({"ink": "1"}))


def builtin_allocation(catalogue: Catalogue, gpu_kind: str) -> Allocation:
    """One decoupled base worker and one ControlNet worker that hosts what the catalogue has."""
    base_ids = tuple(entry.id for entry in catalogue.entries.values() if entry.kind == "base")
    controlnet_ids = tuple(entry.id for entry in catalogue.entries.values() if entry.kind == "controlnet")
    base = Pool("base", "base", 1, gpu_kind, topology="decoupled", base_model_ids=base_ids, controlnet_ids=())
    if not controlnet_ids:
        return Allocation((base,), policies=POLICIES)
    nets = Pool("controlnets", "controlnet", 1, gpu_kind, topology="decoupled", controlnet_ids=controlnet_ids)
    return Allocation((base, nets), policies=POLICIES)


def limits_of(model: str) -> Limits:
    """The bounds of requests for a model."""
    return Limits(size_multiple_px=SIZE_MULTIPLE_PX[model])
