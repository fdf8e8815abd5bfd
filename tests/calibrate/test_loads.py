"""Loads of the engine's workers under the clock: what is called a read reads, and what is called a copy does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from calibrate.extent import tiny_extent
from calibrate.loads import ServingLoads
from calibrate.passes import passes
from calibrate.rig import RigSetup
from calibrate.storage import save_controlnet, save_pipeline, weight_files
from engine.models import ModelSpec, build_controlnet, build_models
from engine.options import EngineOptions
from engine.workers.model_sources import ModelSources

SPEC = ModelSpec.tiny()


@pytest.fixture(params=["checkpoint", "controlnet"])
def loads(request: pytest.FixtureRequest, tmp_path: Path) -> ServingLoads:
    """Of a stored model; its place on the device holds another one."""
    setup = RigSetup("x", "engine", "tiny", "cpu", scratch=str(tmp_path))
    if request.param == "checkpoint":
        folder = save_pipeline(setup, build_models(SPEC, seed=1))
        return ServingLoads("checkpoint", folder, SPEC, EngineOptions("cpu"), build_models(SPEC, seed=2))
    folder = save_controlnet(setup, build_controlnet(SPEC, seed=1))
    return ServingLoads("controlnet", folder, SPEC, EngineOptions("cpu"), build_controlnet(SPEC, seed=2))


def test_a_read_reads_each_time_and_a_copy_never(loads: ServingLoads, monkeypatch: pytest.MonkeyPatch) -> None:
    origins: list[str] = []
    for name in ("read_checkpoint", "read_controlnet"):
        real = getattr(ModelSources, name)

        def noted(self: ModelSources, model_id: str, real: object = real) -> object:
            found = real(self, model_id)  # type: ignore[operator]
            origins.append(found.origin)
            return found

        monkeypatch.setattr(ModelSources, name, noted)
    assert len(loads.reads(3)) == 3
    assert origins == ["store"] * 3
    assert len(loads.copies(2)) == 2
    assert origins[3:] == ["host"] * 4
    assert len(loads.both(2)) == 2
    assert origins[7:] == ["store"] * 2


def test_a_copy_leaves_the_stored_weights_in_the_place_of_the_others(loads: ServingLoads) -> None:
    loads.copies(1)
    target = loads._target
    found = (target.unet if hasattr(target, "unet") else target).conv_in.weight
    stored = build_models(SPEC, seed=1).unet if hasattr(target, "unet") else build_controlnet(SPEC, seed=1)
    assert torch.equal(found, stored.conv_in.weight)
    files = weight_files(loads._sources.place_of("stored"))  # type: ignore[arg-type]
    assert loads.features("host").n_bytes == sum(path.stat().st_size for path in files)
    loads.close()
    assert loads._tier.ids == []


def test_a_session_of_loads_holds_both_halves_five_times() -> None:
    (block,) = passes(tiny_extent(n_controlnets=1), "loads:engine")
    assert {(task.features.variant, task.n_repeats) for task in block} == {
        ("checkpoint_host", 5), ("checkpoint_serving", 1), ("controlnet_host", 5), ("controlnet_serving", 1)
    }  # fmt: skip
