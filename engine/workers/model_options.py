"""The model side's settings of a worker, read from ``WorkerSetup.options``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from engine.allocation import Policies
from engine.options import EngineOptions
from traces.problems import InputError, Problem, one_problem


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """By name in ``WorkerSetup.options``; what is left out has these defaults. Names that start with ``loader_`` are the loader's."""

    dtype: str = ""
    """``float32`` or ``bfloat16``; empty: bfloat16 on a GPU, float32 on a CPU."""
    use_cuda_graph: bool = True
    """Only on a GPU."""
    compile: bool = False
    n_checkpoints_max: int = 2
    """Checkpoints on the device at the same time."""
    n_controlnets_max: int | None = None
    """ControlNets on the device at the same time; null: as many as requests ask for."""
    tensor_transport: str = "auto"
    """``auto`` (``cuda_ipc`` between GPUs of one host, else the line's own), ``line``, ``cuda_ipc``, ``nccl`` or ``gloo``."""
    fp8_residuals: bool = False
    """Send ControlNet residuals as 8-bit floats: half the bytes of bfloat16, each number off by up to 1/16."""
    weights: str = ""
    """Local folder in diffusers' layout: the checkpoint ``default``, and its ``tokenizer/`` and ``tokenizer_2/``. Empty: the
    checkpoint has random weights, and prompts are hashed to token ids."""
    control_image_pixels_max: int = 16 * 2**20
    """Larger control images are refused before they are decoded."""
    lora_cache_max: int = 16
    """LoRA files that stay mapped (and pinned) in this process."""
    host_checkpoint_gib: float = Policies().checkpoint_host_cache_gib
    """Host memory of this process for checkpoints that have been checked: from there a load is a copy. 0: none."""
    host_controlnet_gib: float = Policies().controlnet_host_cache_gib
    """The same for ControlNets."""

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> ModelOptions:
        """Checks names and types.

        Raises:
            InputError: with every problem found.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        problems = []
        plain = {name: value for name, value in plain.items() if not name.startswith("loader_")}
        for name, value in plain.items():
            if name not in fields:
                problems.append(Problem(f"options.{name}", "is unknown", f"one of {sorted(fields)}", "Remove it."))
                continue
            default = fields[name].default
            if value is None and "None" in str(fields[name].type):
                continue
            kind = int if default is None else type(default)
            if kind is float:
                if type(value) not in {int, float} or not 0 <= value < math.inf:
                    problems.append(Problem(f"options.{name}", f"got {value!r}", "a number, 0 or more", "Set it."))
            elif type(value) is not kind or (kind is int and value < 1):
                allowed = "a whole number above 0" if kind is int else kind.__name__
                problems.append(Problem(f"options.{name}", f"got {value!r}", allowed, "Set it."))
        if problems:
            raise InputError(problems)
        options = cls(**plain)
        choices = ("auto", "line", "cuda_ipc", "nccl", "gloo")
        if options.tensor_transport not in choices:
            raise one_problem(
                "options.tensor_transport", f"got {options.tensor_transport!r}", f"one of {choices}", "Choose one."
            )
        if options.dtype not in {"", "float32", "bfloat16"}:
            raise one_problem("options.dtype", f"got {options.dtype!r}", "float32 or bfloat16", "Choose one.")
        return options

    def engine(self, device: str) -> EngineOptions:
        """How networks are run on this device."""
        options = EngineOptions.fast(device, compile=self.compile)
        changes: dict[str, Any] = {}
        if self.dtype:
            changes["dtype"] = getattr(torch, self.dtype)
        if options.is_cuda and not self.use_cuda_graph:
            changes["use_cuda_graph"] = False
        return dataclasses.replace(options, **changes)
