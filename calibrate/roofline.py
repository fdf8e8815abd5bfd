"""Carries a measured profile over to a GPU that is not at hand: each law is split by what bounds it, each share scales with its rate.

A share bound by arithmetic takes ``rate of the measured GPU / rate of the other`` times as long, likewise one bound by memory or
by a link (Williams, Waterman, Patterson: Roofline, CACM 2009, taken share by share); launches and the host stay as they are. The
other GPU is taken to reach the same part of its datasheet rate as the measured one did; nobody knows whether it does, so the
draws vary that part widely. Every law comes out ``assumed``. Not modelled: memory that is too small for what is resident, power
limits, kernels that an architecture lacks, another host.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, get_args

import numpy as np

from calibrate.profile import Fact, LatencyProfile, Law, has_loads_in_two_parts
from calibrate.roofline_gpus import GIB, Datasheet, datasheet_of
from traces.problems import one_problem

Resource = Literal["compute", "memory", "launch", "pcie", "nvlink", "host", "network"]
RESOURCES: Final[tuple[Resource, ...]] = get_args(Resource)
Z_90: Final = 1.6448536269514722
N_DRAWS: Final = 64

# 90 % of the draws lie within times or divided by these: how far the part of the datasheet rate that is reached may differ.
SAME_ARCHITECTURE: Final[Mapping[Resource, float]] = {"compute": 1.12, "memory": 1.15}
OTHER_ARCHITECTURE: Final[Mapping[Resource, float]] = {"compute": 1.45, "memory": 1.35}
# Another host launches and copies at another pace. Two hosts with the same H200 needed 3.1 and 4.2 s for one stock image.
ANY_GPU: Final[Mapping[Resource, float]] = {"launch": 1.5, "pcie": 1.4, "nvlink": 1.3, "host": 1.6, "network": 1.0}
# The split itself comes from one kernel trace.
SPLIT_SPREAD: Final = 1.15


@dataclass(frozen=True, slots=True)
class Split:
    """What bounds a law: shares that add up to 1, of what grows with the work and of what does not."""

    growing: Mapping[Resource, float]
    fixed: Mapping[Resource, float]
    source: str


_TRACE = (
    "kernel trace of one fused UNet forward, batch 2 (docs/speed.md): of 28.6 ms 23 in GEMM, attention and convolution, "
    "4 in bandwidth-bound kernels, 0.8 in gaps; without samples 5.1 GB of weights would still be read, in 1.1 ms"
)
_FUSED = Split({"compute": 0.82, "memory": 0.15, "launch": 0.03}, {"memory": 0.25, "launch": 0.75}, _TRACE)
_EAGER = Split(
    {"compute": 0.70, "memory": 0.30}, {"launch": 1.0},
    "the same 11.5 ms of GEMM, attention and convolution a sample in 16.5 ms of eager execution; its floor is the host's launches",
)  # fmt: skip
_VAE = Split(
    {"compute": 0.55, "memory": 0.42, "launch": 0.03}, {"memory": 0.25, "launch": 0.75},
    "10.5 TFLOP an image at the 800 TFLOP/s measured are 13 of 24 ms; the rest is norms and upsampling",
)  # fmt: skip
_HOST = Split({"host": 1.0}, {"host": 1.0}, "files, Python and the host's processor")
_HOST_TIER_LOAD = Split({"pcie": 1.0}, {"host": 1.0}, "copies from page-locked memory")
_LOAD = Split(
    {"pcie": 0.15, "host": 0.85}, {"host": 1.0}, "55 GB/s over PCIe measured, loads reach 7 GB/s: the host bounds them"
)
SPLITS: Final[Mapping[str, Split]] = {
    "engine.lora_attach": Split(
        {"pcie": 0.45, "memory": 0.35, "launch": 0.20}, {"launch": 1.0},
        "186 MB: 3.4 ms over PCIe and 2.8 ms of patching of 9 ms",
    ),
    "engine.lora_detach": Split({"memory": 0.8, "launch": 0.2}, {"launch": 1.0}, "a copy of the pristine weights"),
    "engine.text_encode": Split(
        {}, {"compute": 0.2, "memory": 0.3, "launch": 0.5}, "two short prompts through a graph: small kernels"
    ),
    "engine.text_encode_unguided": Split(
        {}, {"compute": 0.2, "memory": 0.3, "launch": 0.5}, "one short prompt through a graph: small kernels"
    ),
    "engine.residual_transfer.nvlink": Split({"nvlink": 1.0}, {"launch": 1.0}, "bytes over the link"),
    "engine.residual_transfer.pcie": Split({"pcie": 1.0}, {"launch": 1.0}, "bytes over the link"),
    "engine.residual_transfer.network": Split({"network": 1.0}, {"network": 1.0}, "another host's network is the same"),
    "engine.remote_join": Split({}, {"launch": 1.0}, "waits and a flag"),
    "lora_fetch.remote": Split({"network": 1.0}, {"network": 1.0}, "the store does not know the GPU"),
    "model_fetch.remote": Split({"network": 1.0}, {"network": 1.0}, "the store does not know the GPU"),
}  # fmt: skip
"""Laws with a split of their own; the others go by their ending, see :func:`split_of`."""


def split_of(law: str, *, has_host_tier: bool = False) -> Split:
    """What bounds a law; ``has_host_tier``: loads of our engine are no more than copies from page-locked memory."""
    if law in SPLITS:
        return SPLITS[law]
    if law.endswith("_step"):
        return _EAGER if law.startswith("diffusers.") else _FUSED
    if law.endswith(".vae_decode"):
        return _VAE
    if law.endswith("_load"):
        return _HOST_TIER_LOAD if has_host_tier and law.startswith("engine.") else _LOAD
    return _HOST


def transfer_profile(profile: LatencyProfile, to: str, *, seed: int = 2026) -> LatencyProfile:
    """The profile of another GPU, every law ``assumed``; the same arguments give the same profile to the byte.

    The measured box stays, and so do the sizes of models and the noise from one request to the next.

    Raises:
        InputError: no datasheet of either GPU, the same GPU, or a profile that was transferred itself.
    """
    source, target = datasheet_of(profile.gpu_kind), datasheet_of(to)
    if "transferred_from" in profile.fingerprint:
        raise one_problem(
            "profile", f"was itself transferred to {profile.gpu_kind}", "a measured profile", "Transfer the original."
        )
    if source.gpu_kind == target.gpu_kind:
        raise one_problem("--to", f"got {to!r}, the GPU of the profile", "another GPU", "Use the profile as it is.")
    laws = {
        name: _transferred(law, source, target, profile)
        for name, law in profile.laws.items()
        if target.nvlink_gb_per_s or not name.endswith(".nvlink")
    }
    memory_gib = target.memory_gb * 1e9 / GIB
    facts = {
        **profile.facts,
        "device_memory_gib": Fact(memory_gib, "assumed", f"datasheet: {target.memory_gb:g} GB ({target.source})"),
    }
    return dataclasses.replace(
        profile,
        gpu_kind=target.gpu_kind,
        laws=laws,
        facts=facts,
        draws=_draws(profile, laws, source, target, seed),
        fingerprint={
            "gpu": target.gpu_kind,
            "transferred_from": {"profile_id": profile.profile_id, "gpu_kind": profile.gpu_kind, "seed": seed},
        },
        raw_sha256="",
        notes=_notes(profile, source, target),
    )


def _notes(profile: LatencyProfile, source: Datasheet, target: Datasheet) -> tuple[str, ...]:
    spread = _spread(source, target)
    lost = [] if target.nvlink_gb_per_s else [f"{target.gpu_kind} has no NVLink: its transfers go over PCIe."]
    return (
        f"Nothing was measured on {target.gpu_kind}: every law is carried over from {profile.gpu_kind} "
        f"(profile {profile.profile_id}) by datasheet rates.",
        f"{source.gpu_kind}: {source.source}.",
        f"{target.gpu_kind}: {target.source}.",
        "90 % of the draws vary the part of each rate that is reached by times or divided by "
        + ", ".join(f"{spread[name]:g} ({name})" for name in RESOURCES if spread[name] > 1)
        + f", and each law's split by {SPLIT_SPREAD:g}.",
        "Not modelled: memory too small for what is resident, power limits, kernels that an architecture lacks.",
        *lost,
    )


def _rates(sheet: Datasheet) -> dict[Resource, float]:
    return {
        "compute": sheet.bf16_tflops, "memory": sheet.memory_tb_per_s, "pcie": sheet.pcie_gb_per_s,
        "nvlink": sheet.nvlink_gb_per_s, "launch": 1.0, "host": 1.0, "network": 1.0,
    }  # fmt: skip


def _spread(source: Datasheet, target: Datasheet) -> dict[Resource, float]:
    own = SAME_ARCHITECTURE if source.architecture == target.architecture else OTHER_ARCHITECTURE
    return {**ANY_GPU, **own}


def _factor(
    split: Mapping[Resource, float], source: Datasheet, target: Datasheet, achieved: Mapping[Resource, float]
) -> float:
    """Times as long on the target; 1 where a law has no such part."""
    if not split:
        return 1.0
    ours, theirs = _rates(source), _rates(target)
    return sum(
        share * achieved[name] * (ours[name] / theirs[name] if ours[name] and theirs[name] else 1.0)
        for name, share in split.items()
    )


_AS_SAID: Final[Mapping[Resource, float]] = dict.fromkeys(RESOURCES, 1.0)


def _part(split: Split, parameter: str) -> Mapping[Resource, float]:
    return (
        split.growing
        if parameter in ("per_unit_s", "attention_s", "row_padding_s", "sequence_padding_s")
        else split.fixed
    )


def _transferred(law: Law, source: Datasheet, target: Datasheet, profile: LatencyProfile) -> Law:
    split = split_of(law.name, has_host_tier=has_loads_in_two_parts(profile))
    parameters = {
        name: value * _factor(_part(split, name), source, target, _AS_SAID) for name, value in law.parameters.items()
    }

    def words(part: Mapping[Resource, float]) -> str:
        return ", ".join(f"{share:.0%} {name}" for name, share in part.items())

    parts = [f"growing part {words(split.growing)}" if split.growing and len(law.parameters) > 1 else ""]
    parts += [f"fixed part {words(split.fixed)}" if split.fixed else ""]
    text = f"roofline from {source.gpu_kind} (profile {profile.profile_id}), bound by: {'; '.join(p for p in parts if p)} ({split.source})"
    if law.status == "assumed":
        text += f"; there {law.source}"
    return dataclasses.replace(
        law, parameters=parameters, status="assumed", source=text, points=(), point_ratios=(), n_repetitions=0, residual_ratio_quantiles=()
    )  # fmt: skip


def _draws(
    profile: LatencyProfile, laws: Mapping[str, Law], source: Datasheet, target: Datasheet, seed: int
) -> dict[str, tuple[float, ...]]:
    """Draws of the measured profile, each with its own reached rates: one set for all laws of a draw, and one split a law."""
    n = profile.n_draws or N_DRAWS
    spread = _spread(source, target)
    rng = np.random.default_rng(np.random.SeedSequence([seed, zlib.crc32(target.gpu_kind.encode())]))
    reached = {name: np.exp(math.log(spread[name]) / Z_90 * rng.standard_normal(n)) for name in RESOURCES}
    found = {}
    for name, law in sorted(laws.items()):
        split = split_of(name, has_host_tier=has_loads_in_two_parts(profile))
        own = np.random.default_rng(np.random.SeedSequence([seed, zlib.crc32(f"{target.gpu_kind}|{name}".encode())]))
        split_ratio = np.exp(math.log(SPLIT_SPREAD) / Z_90 * own.standard_normal(n))
        if set(split.growing) | set(split.fixed) <= {"network"}:
            split_ratio = np.ones(n)
        for parameter in law.parameters:
            key = f"{name}:{parameter}"
            measured = profile.laws[name].parameters[parameter]
            drawn = profile.draws.get(key, (measured,) * n)
            part = _part(split, parameter)
            values = [
                drawn[k] * split_ratio[k]
                * _factor(part, source, target, {resource: float(reached[resource][k]) for resource in RESOURCES})
                for k in range(n)
            ]  # fmt: skip
            found[key] = tuple(float(f"{value_s:.9g}") for value_s in values)
    return found
