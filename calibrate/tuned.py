"""Tuned Diffusers under the clock: the stock pipelines with UNet, ControlNets and VAE decoder under ``torch.compile``.

What the Diffusers guide recommends: NHWC weights, full graphs, ``reduce-overhead`` (CUDA graphs), one shape. Two things are added,
without which ControlNets and LoRAs do not run so: outputs are copied out of the graphs' memory, which the next replay overwrites;
and a LoRA is fused into the weights in place and its adapter layers are taken out again, so that the compiled graph still holds.
QKV projections stay unfused: fused copies of the weights would not see the LoRA.
"""

from __future__ import annotations

import traceback
from typing import Any, Final

import torch
from diffusers.utils import BaseOutput

from calibrate.measurement import Features
from calibrate.rig import RigSetup, Timed
from calibrate.stock import StockRig
from calibrate.storage import image_lora_rank, lora_file

COMPILE_MODE: Final = "reduce-overhead"
WARM_UPS: Final = 3
"""Compiles; records the graph; replays it."""


class TunedRig(StockRig):
    """One station compiles for one forward batch: without ControlNets, or (``n_controlnets``) for 1 to that many."""

    stack = "diffusers_tuned"
    lists_controlnets = (
        True  # the pipeline calls a list's networks with other arguments: one graph serves 1 to all of them
    )

    def __init__(self, setup: RigSetup) -> None:
        self.mode = "compiled" if setup.is_compiled else "eager"
        self._pristine: dict[str, torch.Tensor] = {}
        super().__init__(setup)

    def _prepare(self) -> None:
        unet, vae = self.models.unet, self.models.vae
        for module in (unet, vae, *self.controlnets):
            module.to(memory_format=torch.channels_last)
        if self.setup.is_compiled:
            for module in (unet, *self.controlnets):
                # on the instance: the pipeline's own checks of the modules' types still hold
                module.forward = _graphed(module.forward)
        counts = range(1, len(self.controlnets) + 1) if self.controlnets else range(1)
        for batch in self.setup.forward_batches or (2,):
            for n in counts:
                for _ in range(WARM_UPS):
                    self._call(n, n_steps=4, n_images=batch // 2, output_type="latent")
            if batch == 2 and not self.controlnets:
                self._compile_vae()
        if self.controlnets:
            self._call(1, n_steps=2, n_images=1, output_type="pil")
        if self.setup.is_compiled:
            # whatever comes now fails in a second instead of compiling for minutes under the clock
            torch.compiler.set_stance("fail_on_recompile")

    def _compile_vae(self) -> None:
        """Compiles the decoder for one image; where that fails it stays eager, which its measurements then say."""
        vae = self.models.vae
        try:
            if self.setup.is_compiled:
                vae.decode = torch.compile(vae.decode, mode=COMPILE_MODE, fullgraph=True, dynamic=False)
                self.vae_mode = "compiled"
            for _ in range(WARM_UPS):
                self._call(0, n_steps=2, n_images=1, output_type="pil")
        except Exception:  # whatever the compiler raises; the traceback is logged and the rows carry the mode "eager"
            if not self.setup.is_compiled:
                raise
            traceback.print_exc()
            del vae.decode
            self.vae_mode = "eager"
            self._call(0, n_steps=2, n_images=1, output_type="pil")

    def _adapt(self, n_loras: int, rank: int = 0) -> None:
        """Loads LoRAs through PEFT, fuses them into the weights in place, and takes the adapter layers out again."""
        if not self._pristine:
            raise RuntimeError("TunedRig: no pristine weights were kept")
        super()._adapt(n_loras, rank)
        pipe = self.pipes[0]
        pipe.fuse_lora(components=["unet"])
        pipe.unload_lora_weights()

    def _keep_pristine(self) -> None:
        if not self._pristine:
            weights = self.models.unet.state_dict()
            names = [f"{name}.weight" for name in _lora_layers(self.models.unet)]
            self._pristine = {name: weights[name].clone() for name in names}

    def _unadapt(self) -> None:
        """Copies the pristine weights back: the adapter layers are gone already."""
        weights = self.models.unet.state_dict()
        torch._foreach_copy_([weights[name] for name in self._pristine], list(self._pristine.values()))
        self._loaded.clear()

    def _time_lora(self, features: Features, n_repeats: int) -> list[Timed]:
        """Load, fuse and unload the adapter of one LoRA; and the pristine weights back; ``variant`` gives the rank."""
        self._keep_pristine()
        rank = int(features.variant.removeprefix("rank"))
        n_bytes = lora_file(self.setup, rank, 0).stat().st_size
        sized = Features(n_bytes=n_bytes, n_loras=1, variant=features.variant)
        attach, detach = [], []
        for _ in range(n_repeats):
            attach.append(self.clock.wall(lambda: self._adapt(1, rank)))
            detach.append(self.clock.wall(self._unadapt))
        return [self._timed("lora_attach", sized, attach), self._timed("lora_detach", sized, detach)]

    def _time_image(self, features: Features, n_repeats: int) -> list[Timed]:
        """See :meth:`StockRig._time_image`; LoRAs are always fused here."""
        if features.n_loras:
            if features.variant != "fused":
                raise ValueError("tuned Diffusers runs LoRAs fused only")
            self._keep_pristine()
            lora_file(self.setup, image_lora_rank(self.setup), 0)
        return super()._time_image(features, n_repeats)

    def _fuse(self) -> None:
        """Nothing: :meth:`_adapt` has."""

    def _unfuse(self) -> None:
        """Nothing: :meth:`_unadapt` will."""


def _lora_layers(unet: torch.nn.Module) -> list[str]:
    """Linear layers of attention blocks: what LoRA files may name."""
    return [name for name, part in unet.named_modules() if isinstance(part, torch.nn.Linear) and ".attentions." in name]


def _graphed(forward: Any) -> Any:
    """``forward`` compiled with CUDA graphs, its outputs in memory of their own."""
    compiled = torch.compile(forward, mode=COMPILE_MODE, fullgraph=True, dynamic=False)

    def call(*args: Any, **kwargs: Any) -> Any:
        return _copied(compiled(*args, **kwargs))

    return call


def _copied(found: Any) -> Any:
    if isinstance(found, torch.Tensor):
        return found.clone()
    if isinstance(found, BaseOutput):
        return type(found)(**{name: _copied(value) for name, value in found.items()})
    if isinstance(found, tuple | list):
        return type(found)(_copied(value) for value in found)
    return found
