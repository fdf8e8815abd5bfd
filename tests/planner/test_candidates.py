"""What can work at all, before anything is simulated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType

import pytest

from engine.allocation import GIB, Catalogue, CatalogueEntry
from planner.candidates import misfit
from planner.scenario import load_scenario
from planner.service import Sizes, build_service
from planner.simulator import ProfileFacts
from tests.simulation_builders import constant_profile, workload_of

CATALOGUE = Catalogue(
    MappingProxyType(
        {
            "large": CatalogueEntry("large", "base", bytes=20 * GIB),
            "small": CatalogueEntry("small", "base", bytes=5 * GIB),
        }
    )
)
SIZES = Sizes(lora_bytes=GIB // 4, controlnet_bytes=4 * GIB, checkpoint_bytes=6 * GIB, catalogue=CATALOGUE)
WORKLOAD = workload_of(
    [0.0, 1.0],
    base_model_id=["large", "small"],
    controlnet_ids=[(), ("depth", "canny", "pose")],
    controlnet_scales=[(), (1.0, 1.0, 1.0)],
)


@pytest.mark.parametrize(
    ("device_gib", "fits"),
    [
        (20.5, True),  # 20 GiB with no ControlNet, 5 + 3 · 4 GiB with three: never both in one request
        (19.5, False),
    ],
)
def test_models_that_no_request_uses_together_need_not_fit_together(
    write_scenario: Callable[..., Path], tmp_path: Path, device_gib: float, fits: bool
) -> None:
    scenario, _ = load_scenario(str(write_scenario(tmp_path, latency_s=600)))
    service = build_service(WORKLOAD, "colocated", constant_profile(), SIZES)
    facts = ProfileFacts(device_memory_gib=device_gib, activation_gib_per_sample=0.0)
    problem = misfit("colocated", WORKLOAD, service, SIZES, facts, scenario)
    assert (problem is None) == fits
    if problem is not None:
        assert "20.0 GiB" in problem.why
