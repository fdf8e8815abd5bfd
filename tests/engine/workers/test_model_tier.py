"""Models that wait in host memory: a load from there gives the same bits as from a file, and nothing spoils what is kept."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.allocation import GIB, Policies
from engine.base import BaseWorker
from engine.models import ModelSpec, SdxlModels, build_controlnet, build_models, load_local
from engine.options import EngineOptions, ImageRequest, PromptEmbeddings
from engine.registry.admission import Label, admit
from engine.registry.checkpoint_check import PARTS
from engine.registry.store import FolderStore
from engine.serving.job import ControlUse, Job, LoraUse
from engine.serving.settings import EngineSettings, with_host_budgets
from engine.workers.host_segments import PageLocker, available_bytes, segments_for
from engine.workers.host_weights import HostLayout, HostWeights
from engine.workers.loader import Loader
from engine.workers.model_options import ModelOptions
from engine.workers.model_sources import ModelSources
from engine.workers.model_tier import FREE_BYTES_MIN, ModelTier
from engine.workers.painter import JobError, LoadedLora
from engine.workers.sdxl_painter import SdxlPainter
from tests.engine.workers.rig import paint, painter_of
from traces.problems import InputError

SPEC = ModelSpec.tiny()
UNET = "unet/diffusion_pytorch_model.safetensors"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints and a ControlNet as diffusers saves them."""
    store = tmp_path_factory.mktemp("store")
    for name, seed in (("one", 4), ("two", 5)):
        models = build_models(SPEC, seed=seed)
        for part, module in zip(PARTS, models.modules, strict=True):
            module.save_pretrained(store / name / part)
    build_controlnet(SPEC, seed=6).save_pretrained(store / "net")
    return store


@pytest.fixture
def store(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(saved, tmp_path / "store"))


def painter_on(store: Path, **options: float) -> SdxlPainter:
    """Room for one checkpoint on the device; tokenizers are those of random weights."""
    files = {name: {"file": name, "architecture": "tiny"} for name in ("one", "two", "net")}
    painter = painter_of(sources=files, store=str(store), options={"n_checkpoints_max": 1, **options})
    painter._prompts.use = lambda model_id: None  # type: ignore[method-assign]
    return painter


def job_of(checkpoint: str, **changes: object) -> Job:
    values = {"prompt": "a fox", "n_steps": 2, "width_px": 32, "height_px": 32, "seed": 1}
    return Job("r", base_model_id=checkpoint, **{**values, **changes})  # type: ignore[arg-type]


def rewrite(path: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def sources_of(store: Path, layout: HostLayout | None = None, gib: float = 1.0) -> ModelSources:
    files = {name: {"file": name, "architecture": "tiny"} for name in ("one", "two", "net")}
    return ModelSources(
        SPEC, files, str(store), layout=layout, checkpoints=ModelTier("checkpoint", gib), controlnets=ModelTier("controlnet", gib)
    )  # fmt: skip


def weights_of(models: SdxlModels) -> list[torch.Tensor]:
    return [tensor.clone() for module in models.modules for tensor in module.state_dict().values()]


def are_equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_load_from_the_host_paints_the_same_bits_as_a_fresh_one(saved: Path) -> None:
    painter, fresh = painter_on(saved), painter_on(saved, host_checkpoint_gib=0, host_controlnet_gib=0.0)
    uses = (ControlUse("net"),)
    expected = {name: paint(fresh, [job_of(name, controls=uses)]) for name in ("one", "two")}
    assert not torch.equal(expected["one"], expected["two"])
    for name in ("one", "two", "one", "default", "two"):
        found = paint(painter, [job_of(name, controls=uses)])
        assert name == "default" or torch.equal(found, expected[name])
    assert painter._checkpoints.worker("two").models.unet is not None
    assert painter._sources.read_checkpoint("one").origin == "host"
    assert painter._sources.read_controlnet("net").origin == "host"
    assert painter._sources.read_checkpoint("default").origin == "host", "what was drawn once is copied from then on"
    assert fresh._sources.read_checkpoint("one").origin == "store"


def as_old_software_wrote_it(folder: Path) -> None:
    def text(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors["text_model." + name.removeprefix("text_model.")] = tensors.pop(name)
        tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]

    def attention(tensors: Tensors) -> None:
        for name in list(tensors):
            for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
                if f"mid_block.attentions.0.{new}." in name:
                    weight = tensors.pop(name)
                    is_matrix = weight.ndim == 2
                    tensors[name.replace(new, old)] = weight[:, :, None, None].contiguous() if is_matrix else weight

    rewrite(folder / "text_encoder/model.safetensors", text)
    rewrite(folder / "vae/diffusion_pytorch_model.safetensors", attention)


def in_type(folder: Path, dtype: torch.dtype) -> None:
    for name, part in PARTS.items():
        rewrite(
            folder / name / part.weights,
            lambda tensors: tensors.update({k: v.to(dtype) for k, v in tensors.items() if v.is_floating_point()}),
        )


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_channels_last", [False, True])
def test_every_type_of_file_old_names_included_gives_what_diffusers_own_loader_gives(
    store: Path, stored: torch.dtype, kept: torch.dtype, is_channels_last: bool
) -> None:
    in_type(store / "one", stored)
    expected = load_local(store / "one", "cpu", kept, SPEC)
    as_old_software_wrote_it(store / "one")  # with the attention as 1x1 convolutions, which diffusers takes no longer
    sources = sources_of(store, HostLayout(kept, is_channels_last))
    target = build_models(SPEC, "cpu", kept, seed=9)
    if is_channels_last:
        target.unet.to(memory_format=torch.channels_last)
    addresses = [weight.data_ptr() for weight in target.unet.parameters()]
    sources.checkpoint_into("one", target)
    assert are_equal(weights_of(target), weights_of(expected))
    assert [weight.data_ptr() for weight in target.unet.parameters()] == addresses
    assert are_equal(weights_of(sources.checkpoint("one", "cpu", kept)), weights_of(expected))
    if is_channels_last:
        held = sources.read_checkpoint("one").host
        assert held is not None
        window = held._parts["unet"]["conv_in.weight"]
        assert window.stride() == target.unet.conv_in.weight.stride(), "a copy would have to re-lay it"


def test_an_image_of_a_checkpoint_that_was_read_once_is_that_of_diffusers_own_loader(saved: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    text = PromptEmbeddings(
        torch.randn((1, 77, SPEC.context_width), generator=generator), torch.randn((1, SPEC.pooled_width), generator=generator)
    )  # fmt: skip
    request = ImageRequest(text, n_steps=2, width=32, height=32, seed=3)
    images = [
        BaseWorker(models, {}, EngineOptions("cpu")).generate(request).images
        for models in (
            load_local(saved / "one", "cpu", torch.float32, SPEC),
            sources_of(saved).checkpoint("one", "cpu", torch.float32),
        )
    ]
    assert torch.equal(*images)


def test_the_least_recently_used_leaves_by_bytes() -> None:
    def weights() -> HostWeights:
        kept = HostWeights(HostLayout())
        kept.copy_from("a", torch.nn.Linear(64, 1024, bias=False))
        return kept

    one = weights().bytes
    tier = ModelTier("checkpoint", 2.5 * one / GIB)
    for name in ("a", "b"):
        assert tier.put(name, 0, weights())
    assert tier.get("a", 0) is not None
    assert tier.put("c", 0, weights())
    assert (tier.ids, tier.used_bytes) == (["a", "c"], 2 * one)
    assert tier.get("b", 0) is None
    assert tier.put("a", 1, weights()), "the same id from another source takes the place of the former"
    assert (tier.ids, tier.used_bytes) == (["c", "a"], 2 * one)
    assert tier.get("a", 0) is None
    assert tier.ids == ["c"], "what was read from a source that looked different is dropped"
    tier.drop("c")
    tier.drop("nobody")
    assert (tier.ids, tier.used_bytes) == ([], 0)
    small = ModelTier("checkpoint", 0.5 * one / GIB)
    assert not small.put("a", 0, weights())
    assert small.ids == []


def test_a_host_with_little_memory_keeps_less_and_says_so_once() -> None:
    said: list[str] = []
    free = [FREE_BYTES_MIN + 2**30]
    tier = ModelTier("checkpoint", 256.0, available=lambda: free[0], say=said.append)

    def weights() -> HostWeights:
        kept = HostWeights(HostLayout())
        kept.copy_from("a", torch.nn.Linear(64, 1024, bias=False))
        return kept

    n_bytes = weights().bytes
    assert tier.put("a", 0, weights())
    assert tier.put("b", 0, weights())
    free[0] = FREE_BYTES_MIN + n_bytes // 2
    assert tier.put("c", 0, weights())
    assert tier.put("d", 0, weights())
    assert tier.used_bytes <= 2 * n_bytes
    assert tier.ids[-1] == "d"
    free[0] = 0
    assert not tier.put("e", 0, weights())
    assert not tier.may_keep(n_bytes)
    assert len(said) == 1
    assert "too little free memory for 256 GiB" in said[0]
    assert available_bytes() > 0


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1000]), "truncated"),
        (lambda path: rewrite(path, lambda tensors: tensors["conv_out.weight"].view(-1)[-1:].fill_(float("nan"))), "NaN"),
        (lambda path: rewrite(path, lambda tensors: tensors.pop("conv_in.bias")), "lacks"),
        (lambda path: path.unlink(), "cannot be opened"),
    ],
)  # fmt: skip
def test_a_spoilt_checkpoint_leaves_host_table_and_device_as_they_were(
    store: Path, spoil: Callable[[Path], object], said: str
) -> None:
    painter = painter_on(store)
    expected = paint(painter, [job_of("one")])
    spoil(store / "two" / UNET)
    resident, held = painter.resident(), painter._sources._checkpoints.ids
    with pytest.raises(JobError, match=said):
        paint(painter, [job_of("two")])
    assert (painter.resident(), painter._sources._checkpoints.ids) == (resident, held)
    assert not painter.activate("one"), "it is still on the device"
    assert torch.equal(paint(painter, [job_of("one")]), expected)


def test_nothing_is_kept_without_a_budget(saved: Path) -> None:
    painter = painter_on(saved, host_checkpoint_gib=0, host_controlnet_gib=0)
    first = paint(painter, [job_of("one", controls=(ControlUse("net"),))])
    paint(painter, [job_of("default")])
    assert torch.equal(paint(painter, [job_of("one", controls=(ControlUse("net"),))]), first)
    assert painter._sources._checkpoints.used_bytes == painter._sources._controlnets.used_bytes == 0


@pytest.mark.parametrize("name", ["one", "default"])
def test_a_checkpoint_that_left_the_device_patched_comes_back_pristine(saved: Path, tmp_path: Path, name: str) -> None:
    painter = painter_on(saved)
    lora = LoadedLora("l1", str(Loader(tmp_path, "tiny", "F32").fetch("l1", {})))
    expected = paint(painter, [job_of(name)])
    host = painter._sources.read_checkpoint(name).host
    assert host is not None
    before = [tensor.clone() for part in host._parts.values() for tensor in part.values()]
    patched = paint(painter, [job_of(name, loras=(LoraUse("l1", 0.8),))], loras=[(lora, 0.8)])
    assert not torch.equal(patched, expected)
    paint(painter, [job_of("two")])
    assert painter._sources.read_checkpoint(name).origin == "host"
    assert torch.equal(paint(painter, [job_of(name)]), expected)
    assert are_equal([tensor for part in host._parts.values() for tensor in part.values()], before)


def test_a_file_replaced_under_its_sha256_is_refused_also_where_the_host_holds_the_former(store: Path) -> None:
    entry = admit(FolderStore(store), "one", "base", "tiny", Label("tiny", "1"))
    source = {entry.id: {"file": "one", "architecture": "tiny"}}
    tier = ModelTier("checkpoint", 1.0)
    sources = ModelSources(SPEC, source, str(store), checkpoints=tier)
    sources.checkpoint(entry.id, "cpu", torch.float32)
    assert sources.read_checkpoint(entry.id).origin == "host"
    rewrite(store / "one" / UNET, lambda tensors: tensors["conv_in.bias"].add_(1.0))
    with pytest.raises(JobError, match="as the catalogue says"):
        sources.read_checkpoint(entry.id)
    assert tier.ids == []


def test_another_file_or_another_entry_under_the_same_name_is_what_is_loaded_next(store: Path) -> None:
    sources = sources_of(store)
    first = weights_of(sources.checkpoint("one", "cpu", torch.float32))
    rewrite(store / "one" / UNET, lambda tensors: tensors["conv_in.bias"].add_(1.0))
    assert sources.read_checkpoint("one").origin == "store"
    assert not are_equal(weights_of(sources.checkpoint("one", "cpu", torch.float32)), first)
    sources.admit("one", {"file": "two", "architecture": "tiny"})
    assert sources._checkpoints.ids == []
    expected = weights_of(load_local(store / "two", "cpu", torch.float32, SPEC))
    assert are_equal(weights_of(sources.checkpoint("one", "cpu", torch.float32)), expected)
    sources.admit("one", {"file": "two", "architecture": "tiny"})
    assert sources._checkpoints.ids == ["one"], "the same entry once more changes nothing"


def test_segments_are_page_locked_and_let_go_with_their_model(saved: Path) -> None:
    locked: dict[int, int] = {}

    def register(address: int, n_bytes: int) -> int:
        locked[address] = n_bytes
        return 0

    def unregister(address: int) -> int:
        del locked[address]
        return 0

    locker = PageLocker("cpu", register=register, unregister=unregister)
    sources = sources_of(saved, HostLayout(locker=locker))
    weights = sources.read_checkpoint("one").host
    assert weights is not None
    assert locker.settle()
    assert weights.locked_bytes == weights.bytes == sum(locked.values())
    sources._checkpoints.drop("one")
    del weights
    gc.collect()
    assert locker.settle()
    assert locked == {}
    locker.close()
    assert sources.read_checkpoint("two").host is not None
    assert locker.settle()
    assert locked == {}, "after its end nothing is locked any more"


def test_memory_that_cannot_be_page_locked_is_used_as_it_is_and_said_once(saved: Path) -> None:
    said: list[str] = []
    locker = PageLocker("cpu", say=said.append, register=lambda address, n_bytes: 2)
    sources = sources_of(saved, HostLayout(locker=locker))
    expected = weights_of(load_local(saved / "one", "cpu", torch.float32, SPEC))
    for _ in range(2):
        assert are_equal(weights_of(sources.checkpoint("one", "cpu", torch.float32)), expected)
        sources.read_checkpoint("two")
    assert locker.settle()
    assert len(said) == 1
    assert "cannot be page-locked (2)" in said[0]


def test_free_memory_is_that_of_the_system_or_of_the_control_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = tmp_path / "meminfo"
    system.write_text("MemTotal:       9000000 kB\nMemAvailable:   8000000 kB\n")
    limit, used, rows = (tmp_path / name for name in ("memory.max", "memory.current", "memory.stat"))
    monkeypatch.setattr("engine.workers.host_segments._MEMORY", system)
    monkeypatch.setattr("engine.workers.host_segments._GROUPS", ((str(limit), str(used), str(rows), ""),))
    assert available_bytes() == 8_000_000 * 1024, "no control group"
    limit.write_text("max\n")
    used.write_text("5000000\n")
    rows.write_text("anon 1000\nactive_file 300000\ninactive_file 200000\n")
    assert available_bytes() == 8_000_000 * 1024
    limit.write_text("6000000\n")
    assert available_bytes() == 1_500_000, "cached files are given back when memory is asked for"
    limit.write_text("4000000\n")
    assert available_bytes() == 0


def test_no_tensor_lies_in_two_segments() -> None:
    sizes = [100 * 2**20, 3, 60 * 2**20, 2**20]
    segments, places = segments_for(sizes)
    assert [number for number, _ in places] == [0, 0, 0, 1]
    for size, (number, at) in zip(sizes, places, strict=True):
        assert at % 256 == 0
        assert at + size <= segments[number].n_bytes


def test_budgets_are_numbers_and_come_from_the_policies(tmp_path: Path) -> None:
    policies = Policies(checkpoint_host_cache_gib=7.0, controlnet_host_cache_gib=0.0)
    told = with_host_budgets(EngineSettings(tmp_path, options={"host_controlnet_gib": 3}), policies)
    assert dict(told.options) == {"host_checkpoint_gib": 7.0, "host_controlnet_gib": 3}
    options = ModelOptions.from_plain({"host_checkpoint_gib": 0, "host_controlnet_gib": 1.5})
    assert (options.host_checkpoint_gib, options.host_controlnet_gib) == (0, 1.5)
    assert ModelOptions().host_checkpoint_gib == 256.0
    with pytest.raises(InputError) as refused:
        ModelOptions.from_plain({"host_checkpoint_gib": -1.0, "host_controlnet_gib": "all"})
    assert "host_checkpoint_gib: got -1.0" in str(refused.value)
    assert "host_controlnet_gib: got 'all'" in str(refused.value)
