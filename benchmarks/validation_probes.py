"""Turns the single jobs that ``benchmarks/validation.py --probes N`` timed into rows that ``diffplan calibrate fit`` reads.

    python benchmarks/validation_probes.py played --gpu-kind nvidia-h200 --out probes.parquet
    diffplan calibrate fit run1 run2 probes.parquet --out my-h200.json

They are small requests through the serving processes, alone on the engine: what text encoding, control images and the way to the worker
and back cost there. No replay is in them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from calibrate.measurement import Features, Measurement, Measurements, Session, write_measurements  # noqa: E402

STAGES = ("switch", "controlnet_load", "lora_wait", "text", "denoise", "decode")


def rows_of(plain: Sequence[dict[str, Any]], session: str, mode: str) -> list[Measurement]:
    """As the serving part of ``calibrate run`` names them: latency, stages that take time, and what is left as overhead."""
    rows = []
    for kind in plain:
        guided = kind["guidance_scale"] > 1.0
        features = Features(
            forward_batch=kind["n_images"] * (2 if guided else 1), n_images=kind["n_images"], width_px=kind["size_px"],
            height_px=kind["size_px"], n_steps=kind["n_steps"], n_controlnets=kind["n_controlnets"], n_loras=kind["n_loras"],
            n_bytes=kind["n_bytes"],
        )  # fmt: skip
        values = {name: kind[f"{name}_s"] for name in ("latency", *STAGES)}
        values["overhead"] = [
            latency_s - sum(kind[f"{name}_s"][k] for name in STAGES) for k, latency_s in enumerate(kind["latency_s"])
        ]
        for name, seconds in values.items():
            if all(value > 0 for value in seconds):
                rows += [
                    Measurement(
                        session, f"serving.{name}", "engine", "colocated", mode, features, k, len(rows) + k, value
                    )
                    for k, value in enumerate(seconds)
                ]
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("played", type=Path, help="folder with probes.json and facts.json")
    parser.add_argument("--gpu-kind", required=True)
    parser.add_argument("--started", default="", help="UTC, ISO 8601, where facts.json does not say; names the session")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    facts = json.loads((given.played / "facts.json").read_text(encoding="utf-8"))
    started = given.started or facts.get("started", "")
    session = f"probes-{started or 'undated'}"
    plain = json.loads((given.played / "probes.json").read_text(encoding="utf-8"))
    rows = rows_of(plain, session, "eager" if facts["device"] == "cpu" else "graph")
    fingerprint = {name: facts[name] for name in ("torch", "gpu", "python", "n_cores") if name in facts}
    found = Session(session, facts["model"], given.gpu_kind, started, 0, fingerprint)
    write_measurements(Measurements(tuple(rows), (found,)), given.out)
    print(f"{len(rows)} rows of {len(plain)} kinds of jobs")


if __name__ == "__main__":
    main()
