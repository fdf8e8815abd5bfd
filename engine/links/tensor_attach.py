"""Chooses how tensors travel over a new pair line, once, when it is attached; what was chosen is recorded with the attach."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from engine.links.protocol import LineLostError, PairOfBase, PairOfControlNets
from engine.links.tensor_line import HostTensorLine, TensorLine

BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
TRIAL_BYTES: Final = 4096


def about(device: torch.device | str, dtype: torch.dtype) -> dict[str, Any]:
    """What the other side must know of this one."""
    device = torch.device(device)
    uuid = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
    return {
        "host": BOOT_ID.read_text().strip() if BOOT_ID.exists() else "",
        "gpu_uuid": uuid,
        "dtype": str(dtype).removeprefix("torch."),
    }


def open_as_base(
    pair: PairOfBase, device: torch.device | str, dtype: torch.dtype, wanted: str, timeout_s: float
) -> TensorLine:
    """The base's end. Asks the other side, which answers from its own loop.

    Args:
        pair: a line that has just been attached.
        device: of this rank.
        dtype: of what travels; the other side must have the same.
        wanted: see :class:`engine.workers.model_options.ModelOptions`.
        timeout_s: for the answer.

    Raises:
        LineLostError: no answer, or what was explicitly wanted cannot be had.
    """
    mine = about(device, dtype)
    pair.tell({"type": "step", "what": "open", "wanted": wanted, **mine})
    theirs = pair.hear(timeout_s)
    if theirs["type"] != "opened":
        raise LineLostError(f"{pair.peer} answered {str(theirs)[:200]} in place of 'opened'")
    if theirs["dtype"] != mine["dtype"]:
        raise LineLostError(f"{pair.peer} computes in {theirs['dtype']}, this worker in {mine['dtype']}")
    chosen = choose(wanted, mine, theirs)
    return _line(pair, device, chosen, timeout_s, is_base=True, may_fall_back=wanted == "auto")


def open_as_controlnets(
    pair: PairOfControlNets,
    message: Mapping[str, Any],
    device: torch.device | str,
    dtype: torch.dtype,
    timeout_s: float,
    *,
    serves_many: bool = True,
) -> TensorLine:
    """The ControlNet worker's end, on the base's message; answers it. ``serves_many``: others go on when this base is gone."""
    mine = about(device, dtype)
    pair.tell({"type": "opened", **mine})
    theirs = {name: str(message.get(name, "")) for name in mine}
    if theirs["dtype"] != mine["dtype"]:
        raise LineLostError(f"{pair.peer} computes in {theirs['dtype']}, this worker in {mine['dtype']}")
    wanted = str(message["wanted"])
    chosen = choose(wanted, theirs, mine)
    may_fall_back = wanted == "auto"
    return _line(pair, device, chosen, timeout_s, is_base=False, may_fall_back=may_fall_back, serves_many=serves_many)


def choose(wanted: str, base: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """``cuda_ipc``, ``nccl``, ``gloo`` or ``line``; both sides come to the same.

    Raises:
        LineLostError: what was asked for by name cannot be had.
    """
    both_on_gpus = bool(base["gpu_uuid"] and other["gpu_uuid"])
    is_one_host = bool(base["host"]) and base["host"] == other["host"]
    if wanted == "auto":
        return "cuda_ipc" if both_on_gpus and is_one_host else "line"
    if wanted == "cuda_ipc" and not (both_on_gpus and is_one_host):
        raise LineLostError("cuda_ipc needs GPUs of one host on both sides")
    if wanted == "nccl" and not (both_on_gpus and base["gpu_uuid"] != other["gpu_uuid"]):
        raise LineLostError("nccl needs two different GPUs")
    return wanted


def _line(
    pair: PairOfBase | PairOfControlNets,
    device: torch.device | str,
    chosen: str,
    timeout_s: float,
    *,
    is_base: bool,
    may_fall_back: bool,
    serves_many: bool = False,
) -> TensorLine:
    line: TensorLine
    if chosen == "cuda_ipc":
        found = _cuda_ipc(pair, device, timeout_s, is_base=is_base, serves_many=serves_many)
        if isinstance(found, str):
            if not may_fall_back:
                raise LineLostError(f"cuda_ipc does not work here: {found}")
            sys.stderr.write(f"cuda_ipc with {pair.peer} does not work, tensors go through host memory: {found}\n")
            found = HostTensorLine(pair, device, timeout_s)
        line = found
    elif chosen in {"nccl", "gloo"}:
        from engine.links.process_group import GroupLine

        line = GroupLine(pair, device, chosen, timeout_s, is_base=is_base)
    else:
        line = HostTensorLine(pair, device, timeout_s)
    pair.transport = line.transport
    return line


def _cuda_ipc(
    pair: PairOfBase | PairOfControlNets,
    device: torch.device | str,
    timeout_s: float,
    *,
    is_base: bool,
    serves_many: bool,
) -> TensorLine | str:
    """A line that has carried bytes once; or, on both sides, why it cannot. Raises :class:`LineLostError` if the pair is lost."""
    from engine.links.cuda_ipc import CudaIpcLine, open_line

    line = open_line(pair, device, timeout_s, waits_on_host=serves_many)
    trial = torch.arange(TRIAL_BYTES, device=device).to(torch.uint8)
    reason, lanes = (line, {}) if isinstance(line, str) else ("", {})
    if is_base:
        if isinstance(line, CudaIpcLine):
            try:
                lanes = line.make({"trial": TRIAL_BYTES})
            except LineLostError as error:
                reason = str(error)
        pair.tell({"type": "step", "what": "trial", "lanes": lanes, "reason": reason})
        answer = pair.hear(timeout_s)
        reason = reason or str(answer.get("reason", ""))
        if not reason and isinstance(line, CudaIpcLine):
            found = torch.zeros_like(trial)
            line.read("trial", 0, found)
            if not torch.equal(found, trial):
                reason = "the bytes that arrived are others than were sent"
        pair.tell({"type": "step", "what": "verdict", "reason": reason})
    else:
        asked = pair.hear(timeout_s)
        reason = reason or str(asked.get("reason", ""))
        if not reason and isinstance(line, CudaIpcLine):
            try:
                line.accept(asked["lanes"])
                line.publish(line.write("trial", 0, trial))
            except LineLostError as error:
                reason = str(error)
        pair.tell({"type": "opened", "what": "trial", "reason": reason})
        reason = str(pair.hear(timeout_s).get("reason", ""))
    if reason or isinstance(line, str):
        if not isinstance(line, str):
            line.close()
        return reason
    return line
