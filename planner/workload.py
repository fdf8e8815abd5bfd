"""The requests of a trace as columns of numbers: what service prediction and the simulator read instead of rows of text."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from traces.trace import Trace

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
ROUNDING: Final = 1e-9
"""Slack when a share of the steps meets a whole step: shares are decimal fractions such as 0.1, steps are integers."""


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """n requests in order of arrival; every per-request column has length n and ids are codes into the name tables.

    ``controlnets[i]`` holds only ControlNets that do something: a weight of 0, or a window without a step, drops one.
    ``control_steps[i][j]`` is the half-open range of steps ``(first, last)`` in which ``controlnets[i][j]`` is active.
    """

    request_ids: tuple[str, ...]
    request_key: npt.NDArray[np.uint64]
    """64-bit digest of each request id; random draws are keyed by it, so they do not depend on the other requests."""
    arrival_s: Floats
    checkpoint: Ints
    controlnets: tuple[tuple[int, ...], ...]
    control_steps: tuple[tuple[tuple[int, int], ...], ...]
    loras: tuple[tuple[int, ...], ...]
    n_steps: Ints
    n_images: Ints
    forward_batch: Ints
    """Samples in one UNet forward: 2·n_images under classifier-free guidance (guidance_scale > 1), else n_images."""
    megapixels: Floats
    """width_px · height_px / 2**20 of one image."""
    deadline_s: Floats
    """Seconds after arrival at which the result is worthless; NaN for none."""
    tenant: Ints
    priority: Ints
    """Larger is more urgent; only looked at where the policies order the queue by it."""
    checkpoint_names: tuple[str, ...]
    controlnet_names: tuple[str, ...]
    lora_names: tuple[str, ...]
    tenant_names: tuple[str, ...]
    duration_s: float
    """Length of the observed window, from 0."""

    def __len__(self) -> int:
        return len(self.request_ids)

    @property
    def n_controlnets(self) -> Ints:
        """ControlNets of each request."""
        return _lengths(self.controlnets)

    @property
    def n_loras(self) -> Ints:
        """LoRAs of each request."""
        return _lengths(self.loras)

    @property
    def has_add_ons(self) -> Bools:
        """Whether each request uses a ControlNet or a LoRA."""
        return (self.n_controlnets + self.n_loras) > 0

    def lora_sum(self, per_lora: Floats) -> Floats:
        """For each request, the sum of ``per_lora`` (one value a LoRA code) over its LoRAs."""
        counts = self.n_loras
        flat = np.fromiter((code for codes in self.loras for code in codes), dtype=np.int64, count=int(counts.sum()))
        rows = np.repeat(np.arange(len(self)), counts)
        return np.bincount(rows, weights=per_lora[flat], minlength=len(self)).astype(np.float64)

    def subset(self, mask: Bools) -> Workload:
        """The requests where ``mask`` (bool, length n) holds, with the same name tables and window.

        Raises:
            ValueError: the mask has another length or is not boolean.
        """
        if mask.shape != (len(self),) or mask.dtype != np.bool_:
            raise ValueError(f"the mask is {mask.dtype}{list(mask.shape)}, needs bool[{len(self)}]")
        rows = np.flatnonzero(mask)
        keep = rows.tolist()
        return Workload(
            request_ids=tuple(self.request_ids[i] for i in keep),
            request_key=self.request_key[rows],
            arrival_s=self.arrival_s[rows],
            checkpoint=self.checkpoint[rows],
            controlnets=tuple(self.controlnets[i] for i in keep),
            control_steps=tuple(self.control_steps[i] for i in keep),
            loras=tuple(self.loras[i] for i in keep),
            n_steps=self.n_steps[rows],
            n_images=self.n_images[rows],
            forward_batch=self.forward_batch[rows],
            megapixels=self.megapixels[rows],
            deadline_s=self.deadline_s[rows],
            tenant=self.tenant[rows],
            priority=self.priority[rows],
            checkpoint_names=self.checkpoint_names,
            controlnet_names=self.controlnet_names,
            lora_names=self.lora_names,
            tenant_names=self.tenant_names,
            duration_s=self.duration_s,
        )


def build_workload(trace: Trace) -> Workload:
    """Turns a trace (sorted by arrival, checked on import) into columns. Codes are given in order of first use.

    Raises:
        ValueError: arrivals are not in order, which a :class:`traces.trace.Trace` promises.
    """
    frame = trace.requests
    arrival_s = frame["arrival_s"].to_numpy(dtype=np.float64)
    if (np.diff(arrival_s) < 0).any():
        row = int(np.flatnonzero(np.diff(arrival_s) < 0)[0]) + 1
        raise ValueError(
            f"row {row} arrives at {arrival_s[row]:g} s, before row {row - 1}; sort the trace by arrival_s"
        )
    n_steps = frame["n_steps"].to_numpy(dtype=np.int64)
    n_images = frame["n_images"].to_numpy(dtype=np.int64)
    guided = frame["guidance_scale"].to_numpy(dtype=np.float64) > 1.0
    pixels = frame["width_px"].to_numpy(dtype=np.float64) * frame["height_px"].to_numpy(dtype=np.float64)
    request_ids = tuple(str(value) for value in frame["request_id"])
    checkpoint, checkpoint_names = _codes(frame["base_model_id"])
    tenant, tenant_names = _codes(frame["tenant_id"])
    controlnet_codes: dict[str, int] = {}
    controlnets, control_steps = _active_controlnets(
        frame["controlnet_ids"],
        frame["controlnet_scales"],
        frame["control_start"],
        frame["control_end"],
        n_steps.tolist(),
        controlnet_codes,
    )
    lora_codes: dict[str, int] = {}
    loras = tuple(tuple(lora_codes.setdefault(name, len(lora_codes)) for name in names) for names in frame["lora_ids"])
    return Workload(
        request_ids=request_ids,
        request_key=np.array([_digest(name) for name in request_ids], dtype=np.uint64),
        arrival_s=arrival_s,
        checkpoint=checkpoint,
        controlnets=controlnets,
        control_steps=control_steps,
        loras=loras,
        n_steps=n_steps,
        n_images=n_images,
        forward_batch=np.where(guided, 2 * n_images, n_images),
        megapixels=pixels / 2**20,
        deadline_s=frame["deadline_s"].to_numpy(dtype=np.float64, na_value=np.nan),
        tenant=tenant,
        priority=frame["priority"].to_numpy(dtype=np.int64),
        checkpoint_names=checkpoint_names,
        controlnet_names=tuple(controlnet_codes),
        lora_names=tuple(lora_codes),
        tenant_names=tenant_names,
        duration_s=float(trace.duration_s),
    )


def _active_controlnets(
    ids: Iterable[tuple[str, ...]],
    scales: Iterable[tuple[float, ...]],
    starts: Iterable[tuple[float, ...]],
    ends: Iterable[tuple[float, ...]],
    n_steps: Iterable[int],
    codes: dict[str, int],
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[tuple[int, int], ...], ...]]:
    controlnets: list[tuple[int, ...]] = []
    windows: list[tuple[tuple[int, int], ...]] = []
    for names, weights, begins, stops, steps in zip(ids, scales, starts, ends, n_steps, strict=True):
        if not len(names):
            controlnets.append(())
            windows.append(())
            continue
        active: list[int] = []
        ranges: list[tuple[int, int]] = []
        for j, name in enumerate(names):
            start, end = begins[j] if j < len(begins) else 0.0, stops[j] if j < len(stops) else 1.0
            window = (0, steps) if start == 0.0 and end == 1.0 else _step_window(start, end, steps)
            if (j < len(weights) and weights[j] == 0.0) or window[0] >= window[1]:
                continue
            active.append(codes.setdefault(name, len(codes)))
            ranges.append(window)
        controlnets.append(tuple(active))
        windows.append(tuple(ranges))
    return tuple(controlnets), tuple(windows)


def _step_window(start: float, end: float, n_steps: int) -> tuple[int, int]:
    """Steps i with i/n ≥ start and (i + 1)/n ≤ end: the rule of diffusers' ``control_guidance_start`` and ``_end``."""
    return math.ceil(start * n_steps - ROUNDING), math.floor(end * n_steps + ROUNDING)


def _codes(names: pd.Series[str]) -> tuple[Ints, tuple[str, ...]]:
    table: dict[str, int] = {}
    codes = np.fromiter((table.setdefault(name, len(table)) for name in names), dtype=np.int64, count=len(names))
    return codes, tuple(table)


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _lengths(lists: Sequence[Sequence[int]]) -> Ints:
    return np.fromiter(map(len, lists), dtype=np.int64, count=len(lists))
