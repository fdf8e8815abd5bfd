"""A tiny planning question that runs in about a second: some minutes of made-up traffic on the provisional profile."""

from __future__ import annotations

from pathlib import Path

import numpy as np

PROFILE = Path(__file__).resolve().parents[1] / "data" / "provisional_profile.json"
SCENARIO = """\
name: {name}
traffic:
  trace: trace.csv
  scale_factor: 2
  shift_law: independent
slo:
  latency_s: {latency_s}
  attainment_ratio: 0.9
profile:
  name: {profile}
prices:
  price_usd_per_gpu_hour: 2.0
search:
  gpus_max: {gpus_max}
simulation:
  replications: 3
  warmup_s: 0
"""


def write_trace(folder: Path, n: int = 150, mean_gap_s: float = 3.0) -> Path:
    """A trace with zero to two ControlNets and LoRAs a request."""
    rng = np.random.default_rng(5)
    arrival_s = np.cumsum(rng.exponential(mean_gap_s, n))
    lines = ["request_id,arrival_s,n_steps,controlnet_ids,lora_ids"]
    for row in range(n):
        controlnets = ["depth", "canny"][: row % 3]
        loras = [f"style-{row % 7}"][: row % 2]
        cells = [
            "[" + " ".join(f'""{name}""' for name in names).replace(" ", ", ") + "]" for names in (controlnets, loras)
        ]
        lines.append(f'r{row},{arrival_s[row]:.3f},30,"{cells[0]}","{cells[1]}"')
    path = folder / "trace.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_scenario(
    folder: Path, *, name: str = "tiny", latency_s: float = 12.0, gpus_max: int = 40, more: str = ""
) -> Path:
    """The question as a file beside its trace."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "trace.csv").exists():
        write_trace(folder)
    path = folder / "scenario.yaml"
    text = SCENARIO.format(name=name, latency_s=latency_s, gpus_max=gpus_max, profile=PROFILE)
    path.write_text(text + more, encoding="utf-8")
    return path
