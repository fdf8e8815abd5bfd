"""Checkpoints: what diffusers saves, now and in older layouts, is accepted and loads; whatever differs is refused by name."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.models import ModelSpec, SdxlModels, build_models, load_local
from engine.registry.admission import Label, admit, verify
from engine.registry.checked_stream import Consume
from engine.registry.checkpoint_check import PARTS, check_checkpoint
from engine.registry.safetensors_header import AddOnRefusedError, SafetensorsHeader
from engine.registry.shapes import architecture
from engine.registry.store import FolderStore, StoreError
from engine.serving.job import Job
from engine.workers.model_sources import ModelSources
from engine.workers.painter import JobError
from tests.engine.registry.files import tiny
from tests.engine.workers.rig import paint, painter_of

KEY = "models/tiny"
UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def models() -> SdxlModels:
    return build_models(ModelSpec.tiny(), seed=4)


@pytest.fixture(scope="module")
def saved(models: SdxlModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    for name in PARTS:
        getattr(models, name).save_pretrained(folder / name)
    models.scheduler().save_pretrained(folder / "scheduler")
    # One token a letter, with and without the end of its word; the tokenizer's own alphabet is longer than the tiny vocabulary.
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    for name in ("tokenizer", "tokenizer_2"):
        (folder / name).mkdir()
        (folder / name / "vocab.json").write_text(json.dumps({word: place for place, word in enumerate(words)}))
        (folder / name / "merges.txt").write_text("#version: 0.2\n")
        (folder / name / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "CLIPTokenizer", "pad_token": "<|endoftext|>", "model_max_length": 77})
        )
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A store's copy that a test may spoil."""
    shutil.copytree(saved, tmp_path / KEY)
    return tmp_path / KEY


def check(folder: Path) -> str:
    return check_checkpoint(FolderStore(folder.parent.parent), KEY, tiny()).checkpoint_id


def rewrite(path: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def is_same(found: SdxlModels, wanted: SdxlModels) -> bool:
    return all(
        torch.equal(mine, theirs)
        for one, other in zip(found.modules, wanted.modules, strict=True)
        for mine, theirs in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    )


def test_what_diffusers_saves_is_accepted_known_by_its_parts_and_loads_to_the_same_weights(
    folder: Path, models: SdxlModels
) -> None:
    lines = [
        f"{name} {hashlib.sha256((folder / name / part.weights).read_bytes()).hexdigest()}\n"
        for name, part in PARTS.items()
    ]
    assert check(folder) == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert is_same(load_local(folder, "cpu", torch.float32, ModelSpec.tiny()), models)


def test_names_and_shapes_of_older_files_are_understood(folder: Path, models: SdxlModels) -> None:
    def as_before(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors["text_model." + name.removeprefix("text_model.")] = tensors.pop(name)
        tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]

    def old_attention(tensors: Tensors) -> None:
        for name in list(tensors):
            for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
                if f"mid_block.attentions.0.{new}." in name:
                    tensors[name.replace(new, old)] = tensors.pop(name)

    rewrite(folder / TEXT, as_before)
    rewrite(folder / VAE, old_attention)
    assert len(check(folder)) == 64
    assert is_same(load_local(folder, "cpu", torch.float32, ModelSpec.tiny()), models)


@pytest.mark.parametrize(
    ("file", "spoil", "reason"),
    [
        (UNET, lambda tensors: tensors.pop("conv_in.bias"), "lacks 'conv_in.bias'"),
        (UNET, lambda tensors: tensors.update(extra=torch.ones(1)), "has the unknown 'extra'"),
        (UNET, lambda tensors: tensors["conv_out.weight"].view(-1)[-1].fill_(float("nan")), "holds NaN or infinity"),
        (VAE, lambda tensors: tensors.update({"decoder.conv_in.bias": torch.ones(3)}), r"has shape \(3,\)"),
        (TEXT, lambda tensors: tensors.update(steps=torch.arange(3)), "'steps' holds whole numbers"),
        (TEXT, lambda tensors: tensors.update(steps=torch.ones(3, dtype=torch.int32)), "has dtype 'I32'"),
    ],
)
def test_spoilt_weights_are_refused(folder: Path, file: str, spoil: Callable[[Tensors], object], reason: str) -> None:
    rewrite(folder / file, spoil)
    with pytest.raises(AddOnRefusedError, match=reason):
        check(folder)


@pytest.mark.parametrize(
    ("file", "change", "reason"),
    [
        ("unet/config.json", {"cross_attention_dim": 768}, "says cross_attention_dim = 768, needs 64, as tiny has"),
        ("unet/config.json", {"_class_name": "FluxTransformer2DModel"}, "says that it is a 'FluxTransformer2DModel'"),
        ("vae/config.json", {"scaling_factor": 0.18215}, "says scaling_factor = 0.18215"),
        ("text_encoder_2/config.json", {"hidden_act": "quick_gelu"}, "says hidden_act = quick_gelu"),
        ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, "prediction_type = v_prediction"),
    ],
)
def test_settings_of_another_family_are_refused(folder: Path, file: str, change: dict[str, Any], reason: str) -> None:
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**config, **change}))
    with pytest.raises(AddOnRefusedError, match=reason):
        check(folder)
    with pytest.raises(AddOnRefusedError, match=reason):
        load_local(folder, "cpu", torch.float32, ModelSpec.tiny())


def test_every_part_reports_progress_and_a_check_that_is_given_up_ends(folder: Path) -> None:
    store, seen, given = FolderStore(folder.parent.parent), set(), []

    def keep(part: str, header: SafetensorsHeader) -> Consume:
        seen.add(part)
        return lambda piece, raw: given.append(piece.n_bytes)

    n_calls = []
    facts = check_checkpoint(store, KEY, tiny(), progress=lambda: n_calls.append(1), keep=keep)
    assert seen == set(PARTS)
    assert len(n_calls) >= 3 * len(PARTS)  # length, header and body of each
    assert 0 < sum(given) < facts.file_bytes, "what is kept are the values, without the headers"

    def stop() -> None:
        raise KeyError("given up")

    with pytest.raises(KeyError, match="given up"):
        check_checkpoint(store, KEY, tiny(), progress=stop)


def test_a_checkpoint_of_another_architecture_and_a_missing_part_are_refused(folder: Path) -> None:
    with pytest.raises(AddOnRefusedError, match="as sdxl has"):
        check_checkpoint(FolderStore(folder.parent.parent), KEY, architecture("sdxl"))
    shutil.rmtree(folder / "vae")
    with pytest.raises(StoreError, match=r"vae/config\.json: cannot be opened"):
        check(folder)


def test_a_checkpoint_is_admitted_and_a_replaced_part_is_found(folder: Path) -> None:
    store = FolderStore(folder.parent.parent)
    entry = admit(store, KEY, "base", "tiny", Label("tiny", "1"))
    assert entry.bytes == sum((folder / name / part.weights).stat().st_size for name, part in PARTS.items())
    assert verify(store, entry) is None
    rewrite(folder / VAE, lambda tensors: tensors["decoder.conv_in.bias"].add_(1.0))
    assert "as the catalogue says" in str(verify(store, entry))
    sources = ModelSources(ModelSpec.tiny(), {entry.id: {"file": KEY, "architecture": "tiny"}}, str(store.folder))
    with pytest.raises(JobError, match="as the catalogue says"):
        sources.checkpoint(entry.id, "cpu", torch.float32)


def test_an_engine_paints_with_a_checkpoint_of_the_store_and_its_tokenizers(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    shutil.copytree(saved, tmp_path / KEY)
    source = {"house": {"file": KEY, "architecture": "tiny"}}
    job = Job("r", base_model_id="house", prompt="a fox", n_steps=2, width_px=32, height_px=32, seed=1)
    of_store = painter_of(sources=source, store=str(tmp_path), base_model_ids=("house",))
    own = Job("r", prompt="a fox", n_steps=2, width_px=32, height_px=32, seed=1)
    of_folder = painter_of(options={"weights": str(saved)})
    found = paint(of_store, [job])
    assert torch.equal(found, paint(of_folder, [own]))
    assert not torch.equal(
        found, paint(of_folder, [Job("r", prompt="a box", n_steps=2, width_px=32, height_px=32, seed=1)])
    )
    shutil.rmtree(tmp_path / KEY / "tokenizer")
    with pytest.raises(JobError, match="has weights and no tokenizer/"):
        paint(of_store, [job])
