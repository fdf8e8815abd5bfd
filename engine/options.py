"""What a worker is told: its options, the requests it gets and the results it gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from traces.problems import InputError, Problem

if TYPE_CHECKING:
    from engine.lora import PinnedLora
    from engine.models import ModelSpec


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How a worker runs its networks. The defaults suit a test on a CPU; :meth:`fast` suits a GPU."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    use_cuda_graph: bool = False
    """Capture each part of a step once per shape and replay it. Only on CUDA."""
    compile: bool = False
    """Compile encoder, decoder, ControlNets and VAE with torch.compile (about 100 s per shape for SDXL)."""
    channels_last: bool = False
    """Keep activations and convolution weights in NHWC order. Re-lays the modules' weights; their values stay."""
    use_triton_kernels: bool = True
    """Fused blocks and kernels where the code is not compiled and runs on CUDA in NHWC order."""
    fuses_on_cpu: bool = False
    """Fused blocks in NHWC order on a CPU too, on the kernels' references: for tests of their arithmetic."""
    attention: Literal["default", "cudnn"] = "default"
    """Which attention kernel torch tries first."""

    @classmethod
    def fast(cls, device: str, *, compile: bool = False) -> EngineOptions:
        """CUDA: bf16, NHWC, CUDA graphs, fused kernels. CPU: fp32, plain."""
        if torch.device(device).type != "cuda":
            return cls(device=device)
        return cls(device, torch.bfloat16, use_cuda_graph=True, compile=compile, channels_last=True)

    @property
    def is_cuda(self) -> bool:
        """Whether the worker runs on a GPU."""
        return torch.device(self.device).type == "cuda"

    @property
    def uses_graphs(self) -> bool:
        """Whether parts are captured into CUDA graphs."""
        return self.use_cuda_graph and self.is_cuda

    @property
    def is_fused(self) -> bool:
        """Whether fused blocks replace diffusers' own."""
        has_place = self.is_cuda or self.fuses_on_cpu
        return self.use_triton_kernels and self.channels_last and has_place and not self.compile


@dataclass(frozen=True, slots=True)
class TokenIds:
    """A prompt as token ids of the two text encoders, each ``[1 or n_images, 77]`` (int64)."""

    ids: torch.Tensor
    ids_2: torch.Tensor


@dataclass(frozen=True, slots=True)
class PromptEmbeddings:
    """A prompt as the text encoders' output."""

    context: torch.Tensor
    """``[1 or n_images, 77, context width]``."""
    pooled: torch.Tensor
    """``[1 or n_images, pooled width]``."""


@dataclass(frozen=True, slots=True)
class ControlInput:
    """One use of a ControlNet in a request."""

    name: str
    image: torch.Tensor
    """``[1 or n_images, 3, height, width]`` in 0..1."""
    scale: float = 1.0
    start: float = 0.0
    """Share of the steps before which it is not used."""
    end: float = 1.0
    """Share of the steps after which it is not used."""


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """One job: ``n_images`` images of the same prompt and size."""

    prompt: TokenIds | PromptEmbeddings
    negative: TokenIds | PromptEmbeddings | None = None
    """None: zeros, as SDXL's pipeline does for an absent negative prompt."""
    n_images: int = 1
    n_steps: int = 30
    width: int = 1024
    height: int = 1024
    guidance: float = 5.0
    """1 or less: no classifier-free guidance, the forward batch is ``n_images`` and not twice that."""
    controls: Sequence[ControlInput] = ()
    loras: Sequence[tuple[PinnedLora, float]] = ()
    seed: int = 0
    latents: torch.Tensor | None = None
    """Unit noise ``[n_images, 4, height / 8, width / 8]`` to start from. None: drawn on the CPU from ``seed``."""

    @property
    def uses_cfg(self) -> bool:
        """Whether classifier-free guidance doubles the forward batch."""
        return self.guidance > 1.0

    def check(self, spec: ModelSpec, controlnet_names: Sequence[str]) -> None:
        """Checks the request against what the worker holds.

        Raises:
            InputError: with every problem found.
        """
        problems = []

        def refuse(place: str, what: str, allowed: str, repair: str) -> None:
            problems.append(Problem(f"request {place}", what, allowed, repair))

        multiple = spec.size_multiple_px
        for place, value in (("width", self.width), ("height", self.height)):
            if value <= 0 or value % multiple or value > 8192:
                refuse(place, f"got {value}", f"a multiple of {multiple} up to 8192", "Round it.")
        for place, value, most in (("n_images", self.n_images, 64), ("n_steps", self.n_steps, 1000)):
            if not 1 <= value <= most:
                refuse(place, f"got {value}", f"1..{most}", "Set it.")
        names = [control.name for control in self.controls]
        for place, control in enumerate(self.controls):
            where = f"controls[{place}]"
            if control.name not in controlnet_names:
                refuse(where, f"names {control.name!r}", f"one of {sorted(controlnet_names)}", "Load it or rename it.")
            if names.count(control.name) > 1:
                refuse(where, f"uses {control.name!r} twice", "each ControlNet once", "Remove one.")
            if not 0.0 <= control.start < control.end <= 1.0:
                refuse(where, f"start {control.start}, end {control.end}", "0 <= start < end <= 1", "Set them.")
            shape = tuple(control.image.shape)
            if shape not in {(n, 3, self.height, self.width) for n in (1, self.n_images)}:
                refuse(where, f"image has shape {shape}", f"(1, 3, {self.height}, {self.width})", "Resize the image.")
        size = (self.n_images, 4, self.height // spec.vae_scale_factor, self.width // spec.vae_scale_factor)
        if self.latents is not None and tuple(self.latents.shape) != size:
            refuse("latents", f"have shape {tuple(self.latents.shape)}", str(size), "Draw them anew.")
        if problems:
            raise InputError(problems)


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Wall time of each stage, the device synchronised at both ends."""

    text_s: float
    lora_s: float
    denoise_s: float
    decode_s: float
    lora_restore_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class ImageResult:
    """What a request gives."""

    images: torch.Tensor
    """``[n_images, 3, height, width]`` in 0..1, on the worker's device and in its type."""
    latents: torch.Tensor
    """``[n_images, 4, height / 8, width / 8]`` after the last step."""
    stages: StageTimes
