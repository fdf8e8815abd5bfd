"""Writes the workloads that the simulator is held against the engine with: traces, and a table of what is in them.

    python benchmarks/validation_workloads.py --profile h200 --out examples/validation

Arrivals and mixes come from seeds; only their rate comes from the profile, so that the load of one GPU is what the table says.
The same arguments give the same bytes. Playing them: ``benchmarks/validation.py``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from calibrate.profile import LatencyProfile  # noqa: E402
from calibrate.profile_file import load_profile  # noqa: E402
from engine.allocation import Catalogue, CatalogueEntry  # noqa: E402
from planner.service import Sizes, build_service  # noqa: E402
from planner.workload import build_workload  # noqa: E402
from traces.files import written_beside  # noqa: E402
from traces.frame import checked_frame  # noqa: E402
from traces.trace import Provenance, Trace  # noqa: E402
from traces.writer import write_trace  # noqa: E402

NETS: Final = ("canny", "depth", "pose")
LORA_RANK: Final = 16
LORA_BYTES: Final = 46_500_000
"""Of a file of rank 16 on SDXL's attention, roughly: only the rate depends on it."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of request in a mix."""

    weight: float
    size_px: int
    n_steps: int
    guidance_scale: float = 5.0
    n_images: int = 1
    n_controlnets: int = 0
    n_loras: int = 0


@dataclass(frozen=True, slots=True)
class Spec:
    """One workload."""

    name: str
    seed: int
    load: float
    cv: float
    """Of the gaps between arrivals (gamma): below 1 steadier than Poisson, above 1 bursty."""
    kinds: tuple[Kind, ...]
    n_requests: int = 200
    n_lora_names: int = 6
    topology: str = "colocated"


FREE: Final = 1.0  # guidance scale: without classifier-free guidance a forward has one sample
SPECS: Final = (
    Spec(
        "w6-90-steady-many-images", 106, 0.90, 0.7,
        (Kind(0.4, 512, 4), Kind(0.3, 512, 4, n_images=2), Kind(0.15, 512, 4, n_images=3), Kind(0.15, 512, 4, n_images=4)),
    ),
    Spec(
        "w4-70-bursty-large-controlnets", 104, 0.70, 1.5,
        (
            Kind(0.15, 1024, 4), Kind(0.1, 1024, 4, n_controlnets=1), Kind(0.3, 512, 4), Kind(0.2, 512, 4, n_controlnets=1),
            Kind(0.15, 512, 4, n_controlnets=2), Kind(0.1, 512, 4, n_controlnets=3),
        ),
    ),
    Spec(
        "w2-90-bursty-30steps-controlnets", 102, 0.90, 1.5,
        (
            Kind(0.6, 512, 30, FREE), Kind(0.2, 512, 30, FREE, n_controlnets=1), Kind(0.15, 512, 30, FREE, n_controlnets=2),
            Kind(0.05, 512, 30, FREE, n_controlnets=3),
        ),
    ),
    Spec("w1-70-steady-30steps-plain", 101, 0.70, 0.5, (Kind(0.9, 512, 30, FREE), Kind(0.1, 512, 30))),
    Spec(
        "w5-past-saturation-30steps", 105, 1.30, 1.0,
        (Kind(0.85, 512, 30, FREE), Kind(0.15, 512, 30, FREE, n_controlnets=1)),
    ),
    Spec(
        "w3-light-bursty-few-steps-loras", 103, 0.50, 2.0,
        (Kind(0.5, 512, 4), Kind(0.3, 512, 4, n_loras=1), Kind(0.2, 512, 4, n_loras=2)),
    ),
    Spec(
        "w8-light-steady-mixed", 108, 0.50, 0.5,
        (
            Kind(0.35, 512, 4), Kind(0.1, 1024, 4), Kind(0.2, 512, 4, n_controlnets=1), Kind(0.15, 512, 4, n_loras=1),
            Kind(0.2, 512, 4, n_images=2),
        ),
    ),
    Spec(
        "w7-90-poisson-30steps-loras", 107, 0.90, 1.0,
        (
            Kind(0.6, 512, 30, FREE), Kind(0.2, 512, 30, FREE, n_loras=1), Kind(0.1, 512, 30, FREE, n_loras=2),
            Kind(0.1, 512, 30, FREE, n_controlnets=1, n_loras=1),
        ),
    ),
    Spec(
        "w9-path-decoupled", 109, 0.40, 1.0,
        (Kind(0.5, 512, 8), Kind(0.3, 512, 8, n_controlnets=1), Kind(0.2, 512, 8, n_controlnets=2, n_loras=1)),
        n_requests=60, topology="decoupled",
    ),
)  # fmt: skip
"""In the order in which they are played, should the time not be enough for all. The last shows that the decoupled path can be compared at all: on one GPU its workers share
the device, which no law describes."""


def drawn_trace(spec: Spec, size_scale: float = 1.0, steps_max: int | None = None) -> Trace:
    """The requests of a workload with a mean gap of 1 s."""
    gaps, mix, add_ons = (np.random.default_rng(each) for each in np.random.SeedSequence([spec.seed]).spawn(3))
    n = spec.n_requests
    gap_s = gaps.gamma(1.0 / spec.cv**2, spec.cv**2, n)
    gap_s[0] = 0.0
    weights = np.array([kind.weight for kind in spec.kinds])
    chosen = [spec.kinds[k] for k in mix.choice(len(spec.kinds), n, p=weights / weights.sum())]
    popularity = 1.0 / np.arange(1, spec.n_lora_names + 1)
    names = [f"{spec.name.split('-')[0]}-style-{k}" for k in range(spec.n_lora_names)]
    loras = [
        [names[k] for k in add_ons.choice(len(names), kind.n_loras, replace=False, p=popularity / popularity.sum())]
        for kind in chosen
    ]
    sizes = [round(kind.size_px * size_scale) for kind in chosen]
    frame = pd.DataFrame(
        {
            "request_id": [f"{spec.name.split('-')[0]}-{k:04d}" for k in range(n)],
            "arrival_s": np.cumsum(gap_s),
            "base_model_id": "default",
            "n_steps": [kind.n_steps if steps_max is None else min(kind.n_steps, steps_max) for kind in chosen],
            "width_px": sizes,
            "height_px": sizes,
            "n_images": [kind.n_images for kind in chosen],
            "guidance_scale": [kind.guidance_scale for kind in chosen],
            "controlnet_ids": [list(NETS[: kind.n_controlnets]) for kind in chosen],
            "lora_ids": loras,
            "lora_scales": [[0.8] * len(each) for each in loras],
        }
    )
    return checked_frame(frame, spec.name, Provenance(spec.name))


def paced(trace: Trace, spec: Spec, profile: LatencyProfile, *, extrapolate: bool) -> tuple[Trace, float]:
    """The trace at the rate that loads one GPU as the spec says, and the mean service time that this rests on."""
    names = {name for names in trace.requests["lora_ids"] for name in names}
    entries = {name: CatalogueEntry(name, "lora", bytes=LORA_BYTES) for name in sorted(names)}
    sizes = Sizes.from_profile(profile, lora_bytes=LORA_BYTES, catalogue=Catalogue(entries))
    workload = build_workload(trace)
    # decoupled too by the laws of one process: on one GPU both workers share the device
    table = build_service(workload, "colocated", profile, sizes, extrapolate=extrapolate, is_store_local=True)
    first_use_s = float(table.lora_fetch_s.sum()) / len(workload)
    service_s = float(table.alone_s.mean()) + first_use_s
    arrival_s = trace.requests["arrival_s"].to_numpy(np.float64)
    wanted_s = len(workload) * service_s / spec.load
    # to the microsecond, so that the file does not hang on the last bit of the profile
    frame = trace.requests.assign(arrival_s=np.round(arrival_s * wanted_s / arrival_s[-1], 6))
    return checked_frame(frame, spec.name, trace.provenance, float(frame["arrival_s"].iloc[-1])), service_s


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the traces and ``workloads.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="h200")
    parser.add_argument("--out", type=Path, default=ROOT / "examples" / "validation")
    parser.add_argument("--extrapolate", action="store_true")
    parser.add_argument("--only", default="", help="names, or beginnings of names, separated by commas")
    parser.add_argument("--requests", type=int, help="at most so many a workload; for a try-out")
    parser.add_argument("--size-scale", type=float, default=1.0, help="of the images' sides; for a small model")
    parser.add_argument("--steps-max", type=int, help="for a small model")
    given = parser.parse_args(arguments)
    profile = load_profile(given.profile)
    given.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for spec in SPECS:
        if given.only and not spec.name.startswith(tuple(given.only.split(","))):
            continue
        if given.requests:
            spec = Spec(**{
                name: getattr(spec, name) for name in spec.__slots__ if name != "n_requests"
            }, n_requests=min(spec.n_requests, given.requests))  # fmt: skip
        trace, service_s = paced(
            drawn_trace(spec, given.size_scale, given.steps_max), spec, profile, extrapolate=given.extrapolate
        )
        write_trace(trace, given.out / f"{spec.name}.parquet")
        frame = trace.requests
        rows.append({
            "name": spec.name,
            "seed": spec.seed,
            "topology": spec.topology,
            "load": spec.load,
            "cv": spec.cv,
            "n_requests": len(frame),
            "duration_s": round(trace.duration_s, 3),
            "mean_service_s": round(service_s, 5),
            "share_with_30_steps": round(float((frame["n_steps"] >= 30).mean()), 3),
            "mean_controlnets": round(float(frame["controlnet_ids"].map(len).mean()), 3),
            "mean_loras": round(float(frame["lora_ids"].map(len).mean()), 3),
            "mean_images": round(float(frame["n_images"].mean()), 3),
            "lora_rank": LORA_RANK,
        })  # fmt: skip
        print(
            f"{spec.name:40} {len(frame):4} requests  {trace.duration_s:7.1f} s  service {service_s:.4f} s  load {spec.load}"
        )
    total_s = sum(max(row["duration_s"], row["mean_service_s"] * row["n_requests"]) for row in rows)
    print(f"about {total_s:.0f} s to play once")
    plain = {"schema_version": 1, "profile_id": profile.profile_id, "gpu_kind": profile.gpu_kind, "workloads": rows}
    with written_beside(given.out / "workloads.json") as beside:
        beside.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
