"""Builds the SDXL family: real diffusers and transformers modules, with random weights or from a local folder.

Random weights cost the same time as trained ones, so that a calibration needs no download. They are drawn from a seed, so
that two processes on the same kind of device hold the same weights without sending them.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import torch
from diffusers import AutoencoderKL, ControlNetModel, EulerDiscreteScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from engine.registry.checkpoint_check import check_checkpoint_layout
from engine.registry.store import FolderStore, StoreError
from traces.problems import one_problem

N_TEXT_POSITIONS: Final = 77
N_TIME_IDS: Final = 6
"""Original height and width, crop top and left, target height and width."""

SCHEDULER_CONFIG: Final[Mapping[str, Any]] = MappingProxyType({
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "interpolation_type": "linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
})  # fmt: skip
"""The scheduler file that is published with SDXL base 1.0."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The sizes of one SDXL-shaped family. ``sdxl`` is the real one; ``tiny`` keeps its 9 + 1 residuals for tests on a CPU."""

    name: str
    block_channels: tuple[int, ...]
    transformer_layers: tuple[int, ...]
    n_heads: tuple[int, ...]
    context_width: int
    time_id_width: int
    condition_channels: tuple[int, ...]
    vae_channels: tuple[int, ...]
    vae_layers: int
    vae_norm_groups: int
    vae_scaling: float
    text_1: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    text_2: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    default_size_px: int = 1024

    @classmethod
    def sdxl(cls) -> ModelSpec:
        """Stable Diffusion XL base 1.0: UNet 2.57 B, ControlNet 1.25 B, VAE 0.08 B, text encoders 0.12 B and 0.69 B parameters."""
        return cls(
            name="sdxl",
            block_channels=(320, 640, 1280),
            transformer_layers=(1, 2, 10),
            n_heads=(5, 10, 20),
            context_width=2048,
            time_id_width=256,
            condition_channels=(16, 32, 96, 256),
            vae_channels=(128, 256, 512, 512),
            vae_layers=2,
            vae_norm_groups=32,
            vae_scaling=0.13025,
            text_1=_text(49408, 768, 3072, 12, 12, 768, "quick_gelu"),
            text_2=_text(49408, 1280, 5120, 32, 20, 1280, "gelu"),
        )

    @classmethod
    def tiny(cls) -> ModelSpec:
        """The same topology, about 1/1000 of the work."""
        return cls(
            name="tiny",
            block_channels=(32, 64, 64),
            transformer_layers=(1, 2, 2),
            n_heads=(2, 4, 4),
            context_width=64,
            time_id_width=8,
            condition_channels=(16, 32),
            vae_channels=(16, 32),
            vae_layers=1,
            vae_norm_groups=8,
            vae_scaling=0.13025,
            text_1=_text(1000, 32, 64, 2, 4, 32, "quick_gelu"),
            text_2=_text(1000, 32, 64, 3, 4, 32, "gelu"),
            default_size_px=64,
        )

    @classmethod
    def named(cls, name: str) -> ModelSpec:
        """The spec with this name.

        Raises:
            InputError: there is none.
        """
        if name == "sdxl":
            return cls.sdxl()
        if name == "tiny":
            return cls.tiny()
        raise one_problem("model", f"got {name!r}", "one of sdxl, tiny", "Choose one of them.")

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent, along each side."""
        return int(2 ** (len(self.vae_channels) - 1))

    @property
    def size_multiple_px(self) -> int:
        """Image sides must be a multiple of this, so that every level of the UNet halves exactly."""
        return int(self.vae_scale_factor * 2 ** (len(self.block_channels) - 1))

    @property
    def pooled_width(self) -> int:
        """Width of the pooled text embedding."""
        return int(self.text_2["projection_dim"])

    @property
    def n_tokens(self) -> int:
        """Size of the vocabulary."""
        return int(self.text_1["vocab_size"])

    def unet_config(self) -> dict[str, Any]:
        """Arguments of ``UNet2DConditionModel``."""
        return {
            "sample_size": self.default_size_px // self.vae_scale_factor,
            "in_channels": 4,
            "out_channels": 4,
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            **self._shared_config(),
        }

    def controlnet_config(self) -> dict[str, Any]:
        """Arguments of ``ControlNetModel``."""
        return {
            "in_channels": 4,
            "conditioning_embedding_out_channels": self.condition_channels,
            **self._shared_config(),
        }

    def _shared_config(self) -> dict[str, Any]:
        return {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "block_out_channels": self.block_channels,
            "layers_per_block": 2,
            "transformer_layers_per_block": self.transformer_layers,
            "attention_head_dim": self.n_heads,
            "cross_attention_dim": self.context_width,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": self.time_id_width,
            "projection_class_embeddings_input_dim": self.pooled_width + N_TIME_IDS * self.time_id_width,
        }

    def vae_config(self) -> dict[str, Any]:
        """Arguments of ``AutoencoderKL``. ``force_upcast`` is off: bf16 has fp32's range."""
        n_levels = len(self.vae_channels)
        return {
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 4,
            "down_block_types": ("DownEncoderBlock2D",) * n_levels,
            "up_block_types": ("UpDecoderBlock2D",) * n_levels,
            "block_out_channels": self.vae_channels,
            "layers_per_block": self.vae_layers,
            "norm_num_groups": self.vae_norm_groups,
            "sample_size": self.default_size_px,
            "scaling_factor": self.vae_scaling,
            "force_upcast": False,
        }


def _text(
    vocab_size: int, hidden: int, intermediate: int, layers: int, heads: int, projection: int, activation: str
) -> Mapping[str, Any]:
    return MappingProxyType({
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "projection_dim": projection,
        "hidden_act": activation,
        "max_position_embeddings": N_TEXT_POSITIONS,
        "bos_token_id": vocab_size - 2,
        "eos_token_id": vocab_size - 1,
        "pad_token_id": 1,
    })  # fmt: skip


@dataclass(frozen=True, slots=True)
class SdxlModels:
    """One checkpoint in device memory. The modules are diffusers' own: any diffusers pipeline can be built from them."""

    spec: ModelSpec
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    text_encoder_2: CLIPTextModelWithProjection

    def scheduler(self) -> EulerDiscreteScheduler:
        """A fresh Euler scheduler with SDXL's configuration."""
        return EulerDiscreteScheduler(**SCHEDULER_CONFIG)

    @property
    def device(self) -> torch.device:
        """Where the UNet's weights are. ``unet.device`` walks every module to say it: milliseconds of a request."""
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the UNet's weights; see :attr:`device`."""
        return self.unet.conv_in.weight.dtype

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """All four networks."""
        return (self.unet, self.vae, self.text_encoder, self.text_encoder_2)

    @property
    def bytes(self) -> int:
        """Bytes of all weights."""
        return sum(bytes_of(module) for module in self.modules)


def build_models(
    spec: ModelSpec, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> SdxlModels:
    """Builds a checkpoint with random weights directly on ``device``; bf16 activations stay finite."""
    device = torch.device(device)
    return SdxlModels(
        spec,
        _build(lambda: UNet2DConditionModel(**spec.unet_config()), "unet", device, dtype, seed),
        _build(lambda: AutoencoderKL(**spec.vae_config()), "vae", device, dtype, seed),
        _build(lambda: CLIPTextModel(CLIPTextConfig(**spec.text_1)), "text_encoder", device, dtype, seed),
        _build(
            lambda: CLIPTextModelWithProjection(CLIPTextConfig(**spec.text_2)), "text_encoder_2", device, dtype, seed
        ),
    )


def build_controlnet(
    spec: ModelSpec, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> ControlNetModel:
    """Builds a ControlNet with random weights. Its zero-convolutions are drawn too: with zeros it would change nothing."""
    return _build(lambda: ControlNetModel(**spec.controlnet_config()), "controlnet", torch.device(device), dtype, seed)


def load_local(
    folder: Path, device: str | torch.device, dtype: torch.dtype, spec: ModelSpec | None = None
) -> SdxlModels:
    """Loads a checkpoint from a folder in diffusers' layout (``unet/``, ``vae/``, …). Safetensors only, nothing is downloaded.

    Settings, names and shapes are compared with the spec; values are not looked at (``engine.registry.checkpoint_check`` does).

    Args:
        folder: links in it are followed, as in a download cache.
        device: where the weights go.
        dtype: of the weights there.
        spec: what it must be; None: SDXL.

    Raises:
        InputError: something is missing, or of another family.
    """
    spec = spec or ModelSpec.sdxl()
    try:
        check_checkpoint_layout(
            FolderStore(folder.resolve().parent, follows_links=True), folder.resolve().name, spec.name
        )
    except StoreError as error:
        raise one_problem(str(folder), str(error), "diffusers' layout of SDXL", "Check the path.") from None
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True}
    text: dict[str, Any] = {"dtype": dtype, **options}
    modules = [
        UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype, **options),
        AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=dtype, **options),
        CLIPTextModel.from_pretrained(folder / "text_encoder", **text),
        CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2", **text),
    ]
    # nn.Module's own `to`: diffusers' wants to keep some layers in fp32.
    on_device = [nn.Module.to(module, device=device, dtype=dtype) for module in modules]
    return SdxlModels(spec, *(module.eval().requires_grad_(False) for module in on_device))


def write_random_lora(path: Path, target: ModelSpec | nn.Module, rank: int = 64, seed: int = 0) -> None:
    """Writes a LoRA on every attention projection (to_q, to_k, to_v, to_out) in diffusers' key names, fp16, ``up`` not zero.

    Args:
        path: the file to write; its folder must exist.
        target: a UNet, or a spec whose UNet is built without memory to learn its shapes.
        rank: of every layer.
        seed: of the values.
    """
    from safetensors.torch import save_file

    from engine.lora_file import lora_targets

    if isinstance(target, ModelSpec):
        with torch.device("meta"):
            target = UNet2DConditionModel(**target.unet_config())
    generator = torch.Generator().manual_seed(seed_for(seed, "lora"))
    tensors = {}
    for name, (n_out, n_in) in lora_targets(target).items():
        if not name.endswith((".to_q", ".to_k", ".to_v", ".to_out.0")):
            continue
        down = torch.randn(rank, n_in, generator=generator) * n_in**-0.5
        up = torch.randn(n_out, rank, generator=generator) * (0.3 * rank**-0.5)
        tensors[f"unet.{name}.lora_A.weight"] = down.to(torch.float16)
        tensors[f"unet.{name}.lora_B.weight"] = up.to(torch.float16)
    beside = path.with_name(path.name + ".part")
    save_file(tensors, beside, metadata={"format": "pt"})
    beside.replace(path)


def bytes_of(module: nn.Module) -> int:
    """Bytes of a module's weights."""
    return sum(weight.numel() * weight.element_size() for weight in module.parameters())


def seed_for(seed: int, name: str) -> int:
    """A 63-bit seed for the stream called ``name``; adding a stream never shifts another one."""
    sequence = np.random.SeedSequence([seed, zlib.crc32(name.encode())])
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def _build(make: Any, name: str, device: torch.device, dtype: torch.dtype, seed: int) -> Any:
    # The modules' own initialisation runs first (on the device: ~10 ms a billion weights) and must not disturb the
    # caller's random state.
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices, device_type="cuda"), torch.device(device):
        module = make()
    # nn.Module's own `to`: diffusers' prints a warning about layers to keep in fp32, of which there are none here.
    module = nn.Module.to(module, device=device, dtype=dtype).eval().requires_grad_(False)
    _draw(module, name, seed)
    return module


def _draw(module: nn.Module, name: str, seed: int) -> None:
    generator = torch.Generator(next(module.parameters()).device).manual_seed(seed_for(seed, name))
    for part in module.modules():
        _initialise(part, generator)


def redraw_models(models: SdxlModels, seed: int) -> None:
    """Makes the weights those of :func:`build_models` with this seed, in place: captured graphs stay valid."""
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        _draw(getattr(models, name), name, seed)


def redraw_controlnet(net: ControlNetModel, seed: int) -> None:
    """Makes the weights those of :func:`build_controlnet` with this seed, in place."""
    _draw(net, "controlnet", seed)


def _initialise(part: nn.Module, generator: torch.Generator) -> None:
    """Keeps the variance of activations near one, with every weight and bias different from zero."""
    if isinstance(part, nn.GroupNorm | nn.LayerNorm):
        if part.weight is not None:
            part.weight.data.normal_(1.0, 0.1, generator=generator)
        if part.bias is not None:
            part.bias.data.normal_(0.0, 0.1, generator=generator)
    elif isinstance(part, nn.Linear | nn.Conv2d):
        fan_in = part.weight[0].numel()
        part.weight.data.normal_(0.0, fan_in**-0.5, generator=generator)
        if part.bias is not None:
            part.bias.data.normal_(0.0, 0.02, generator=generator)
    elif isinstance(part, nn.Embedding):
        part.weight.data.normal_(0.0, 0.02, generator=generator)
