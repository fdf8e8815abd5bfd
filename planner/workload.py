"""The requests of a trace as columns of numbers: what service prediction and the simulator read instead of rows of text."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from traces.trace import Trace

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Windows = tuple[tuple[int, int], ...]
ROUNDING: Final = 1e-9
"""Slack when a share of the steps meets a whole step: shares are decimal fractions such as 0.1, steps are integers."""


@dataclass(frozen=True, eq=False)  # no slots: what is derived from the columns is worked out once and kept
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

    @cached_property
    def n_controlnets(self) -> Ints:
        """ControlNets of each request."""
        return _lengths(self.controlnets)

    @cached_property
    def n_loras(self) -> Ints:
        """LoRAs of each request."""
        return _lengths(self.loras)

    @cached_property
    def has_add_ons(self) -> Bools:
        """Whether each request uses a ControlNet or a LoRA."""
        return (self.n_controlnets + self.n_loras) > 0

    @cached_property
    def controlnet_uses(self) -> Ints:
        """Code of every use of a ControlNet, request after request."""
        return _chained(self.controlnets, self.n_controlnets)

    @cached_property
    def lora_uses(self) -> Ints:
        """Code of every use of a LoRA, request after request."""
        return _chained(self.loras, self.n_loras)

    @cached_property
    def use_steps(self) -> Ints:
        """Steps in which each of ``controlnet_uses`` is active."""
        flat = chain.from_iterable(chain.from_iterable(self.control_steps))
        n_uses = len(self.controlnet_uses)
        bounds = np.fromiter(flat, dtype=np.int64, count=2 * n_uses).reshape(n_uses, 2)
        return bounds[:, 1] - bounds[:, 0]

    @cached_property
    def active_steps(self) -> Ints:
        """ControlNet forwards of each request: over its ControlNets, the steps each is active in."""
        return _of_each(self.control_steps, lambda windows: sum(last - first for first, last in windows))

    @cached_property
    def joined_steps(self) -> Ints:
        """Steps of each request in which at least one ControlNet is active."""
        return _of_each(
            self.control_steps, lambda windows: len({step for window in windows for step in range(*window)})
        )

    def lora_sum(self, per_lora: Floats) -> Floats:
        """For each request, the sum of ``per_lora`` (one value a LoRA code) over its LoRAs."""
        rows = np.repeat(np.arange(len(self)), self.n_loras)
        return np.bincount(rows, weights=per_lora[self.lora_uses], minlength=len(self)).astype(np.float64)

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
    loras = _lora_codes(frame["lora_ids"], lora_codes)
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
) -> tuple[tuple[tuple[int, ...], ...], tuple[Windows, ...]]:
    known: dict[object, tuple[tuple[int, ...], Windows]] = {}  # the same few combinations repeat over many requests
    controlnets: list[tuple[int, ...]] = []
    windows: list[Windows] = []
    for asked in zip(ids, scales, starts, ends, n_steps, strict=True):
        if not asked[0]:
            controlnets.append(())
            windows.append(())
            continue
        found = known.get(asked)
        if found is None:
            found = known[asked] = _active(*asked, codes)
        controlnets.append(found[0])
        windows.append(found[1])
    return tuple(controlnets), tuple(windows)


def _active(
    names: Sequence[str],
    weights: Sequence[float],
    begins: Sequence[float],
    stops: Sequence[float],
    n_steps: int,
    codes: dict[str, int],
) -> tuple[tuple[int, ...], Windows]:
    active: list[int] = []
    ranges: list[tuple[int, int]] = []
    for j, name in enumerate(names):
        start, end = begins[j] if j < len(begins) else 0.0, stops[j] if j < len(stops) else 1.0
        window = (0, n_steps) if start == 0.0 and end == 1.0 else _step_window(start, end, n_steps)
        if (j < len(weights) and weights[j] == 0.0) or window[0] >= window[1]:
            continue
        active.append(codes.setdefault(name, len(codes)))
        ranges.append(window)
    return tuple(active), tuple(ranges)


def _step_window(start: float, end: float, n_steps: int) -> tuple[int, int]:
    """Steps i with i/n ≥ start and (i + 1)/n ≤ end: the rule of diffusers' ``control_guidance_start`` and ``_end``."""
    return math.ceil(start * n_steps - ROUNDING), math.floor(end * n_steps + ROUNDING)


def _codes(names: pd.Series[str]) -> tuple[Ints, tuple[str, ...]]:
    codes, table = pd.factorize(names.to_numpy(dtype=object), use_na_sentinel=False)  # in order of first use
    return codes.astype(np.int64), tuple(str(name) for name in table)


def _lora_codes(lists: Iterable[tuple[str, ...]], codes: dict[str, int]) -> tuple[tuple[int, ...], ...]:
    known: dict[tuple[str, ...], tuple[int, ...]] = {}
    found = []
    for names in lists:
        if names not in known:
            known[names] = tuple(codes.setdefault(name, len(codes)) for name in names)
        found.append(known[names])
    return tuple(found)


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _lengths(lists: Sequence[Sequence[int]]) -> Ints:
    return _kept(np.fromiter(map(len, lists), dtype=np.int64, count=len(lists)))


def _chained(lists: Sequence[Sequence[int]], counts: Ints) -> Ints:
    return _kept(np.fromiter(chain.from_iterable(lists), dtype=np.int64, count=int(counts.sum())))


def _of_each(lists: Sequence[Windows], value_of: Callable[[Windows], int]) -> Ints:
    """``value_of`` each entry, worked out once for those that are equal."""
    known = {windows: value_of(windows) for windows in set(lists)}
    return _kept(np.fromiter((known[windows] for windows in lists), dtype=np.int64, count=len(lists)))


def _kept(values: Ints) -> Ints:
    """Read-only, because everybody who asks gets the same array."""
    values.setflags(write=False)
    return values
