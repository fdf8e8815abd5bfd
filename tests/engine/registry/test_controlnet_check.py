"""ControlNets: what diffusers saves is accepted, and whatever differs from the architecture is refused by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.models import ModelSpec, build_controlnet
from engine.registry.controlnet_check import CONFIG_NAME, WEIGHTS_NAME, check_controlnet
from engine.registry.safetensors_header import AddOnRefusedError
from engine.registry.shapes import architecture
from engine.registry.store import FolderStore, StoreError
from engine.workers.model_sources import ModelSources
from engine.workers.painter import JobError
from tests.engine.registry.files import tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    build_controlnet(ModelSpec.tiny(), seed=1).to(torch.float16).save_pretrained(folder / "canny")
    return folder / "canny"


@pytest.fixture
def store(saved: Path, tmp_path: Path) -> Path:
    (tmp_path / "canny").mkdir()
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        (tmp_path / "canny" / name).write_bytes((saved / name).read_bytes())
    return tmp_path


def test_what_diffusers_saves_is_accepted_and_known_by_its_sha256(store: Path) -> None:
    facts = check_controlnet(FolderStore(store), "canny", tiny())
    data = (store / "canny" / WEIGHTS_NAME).read_bytes()
    assert (facts.add_on_id, facts.file_bytes) == (hashlib.sha256(data).hexdigest(), len(data))


def test_a_replaced_file_is_refused(store: Path) -> None:
    with pytest.raises(AddOnRefusedError, match="as the catalogue says"):
        check_controlnet(FolderStore(store), "canny", tiny(), expected_sha256="0" * 64)


def test_a_controlnet_of_another_architecture_is_refused(store: Path) -> None:
    with pytest.raises(AddOnRefusedError, match="block_out_channels") as refused:
        check_controlnet(FolderStore(store), "canny", architecture("sdxl"))
    assert len(refused.value.problems) > 10


Tensors = dict[str, torch.Tensor]
NAME = "controlnet_mid_block.weight"


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda tensors: tensors.pop(NAME), f"lacks '{NAME}'"),
        (lambda tensors: tensors.update(extra=torch.ones(1)), "has the unknown 'extra'"),
        (lambda tensors: tensors.update({NAME: torch.ones(1, 2)}), "has shape \\(1, 2\\)"),
        (lambda tensors: tensors.update({NAME: tensors[NAME].double()}), "has dtype 'F64'"),
        (lambda tensors: tensors[NAME].view(-1)[-1].fill_(float("nan")), "holds NaN or infinity"),
    ],
)
def test_spoilt_weights_are_refused(store: Path, spoil: Callable[[Tensors], object], reason: str) -> None:
    tensors = load_file(store / "canny" / WEIGHTS_NAME)
    spoil(tensors)
    save_file(tensors, store / "canny" / WEIGHTS_NAME)
    with pytest.raises(AddOnRefusedError, match=reason):
        check_controlnet(FolderStore(store), "canny", tiny())


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda config: config.update(_class_name="UNet2DConditionModel"), "says that it is a 'UNet2DConditionModel'"),
        (lambda config: config.update(controlnet_conditioning_channel_order="bgr"), "channel_order = bgr"),
        (lambda config: config.update(global_pool_conditions=True), "global_pool_conditions = True"),
        (lambda config: config.pop("cross_attention_dim"), "has no cross_attention_dim"),
    ],
)
def test_other_settings_are_refused(store: Path, spoil: Callable[[dict[str, Any]], object], reason: str) -> None:
    path = store / "canny" / CONFIG_NAME
    config = json.loads(path.read_text())
    spoil(config)
    path.write_text(json.dumps(config))
    with pytest.raises(AddOnRefusedError, match=reason):
        check_controlnet(FolderStore(store), "canny", tiny())


@pytest.mark.parametrize(
    ("text", "reason"), [("{", "is not JSON"), ("[]", "is a JSON list"), (" " * 2**21, "has 2097152 bytes")]
)
def test_a_config_that_is_none_is_refused(store: Path, text: str, reason: str) -> None:
    (store / "canny" / CONFIG_NAME).write_text(text)
    with pytest.raises(AddOnRefusedError, match=reason):
        check_controlnet(FolderStore(store), "canny", tiny())


def test_a_missing_file_is_a_matter_of_the_store(store: Path) -> None:
    (store / "canny" / CONFIG_NAME).unlink()
    with pytest.raises(StoreError, match="cannot be opened"):
        check_controlnet(FolderStore(store), "canny", tiny())


def test_a_single_file_is_checked_by_its_shapes_alone(store: Path) -> None:
    (store / "canny" / CONFIG_NAME).unlink()
    assert check_controlnet(FolderStore(store), f"canny/{WEIGHTS_NAME}", tiny()).architecture == "tiny"


@pytest.mark.parametrize("is_known_by_sha256", [True, False])
def test_a_worker_loads_a_controlnet_only_if_it_is_what_was_admitted(store: Path, is_known_by_sha256: bool) -> None:
    weights = store / "canny" / WEIGHTS_NAME
    name = hashlib.sha256(weights.read_bytes()).hexdigest() if is_known_by_sha256 else "canny"
    sources = ModelSources(ModelSpec.tiny(), {name: {"file": "canny", "architecture": "tiny"}}, str(store))
    net = sources.controlnet(name, "cpu", torch.float32)
    assert torch.equal(net.state_dict()[NAME].half(), load_file(weights)[NAME])
    tensors = load_file(weights)
    tensors[NAME].view(-1)[0] = 1.0 if is_known_by_sha256 else float("nan")
    save_file(tensors, weights)
    with pytest.raises(JobError, match="as the catalogue says" if is_known_by_sha256 else "holds NaN"):
        sources.controlnet(name, "cpu", torch.float32)
