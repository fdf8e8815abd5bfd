"""What a profile holds beside its laws: memory and sizes, and how much one request differs from the next."""

from __future__ import annotations

import dataclasses
from typing import Final

import numpy as np

from calibrate.cells import Cells
from calibrate.compose import QUANTITY_OF, STACK_OF
from calibrate.measurement import Session
from calibrate.profile import FACTS, RESIDUAL_LEVELS, STACKS, Fact

GIB: Final = 2**30
# A quantile of ratios needs some repetitions; with fewer, the profile says nothing about noise.
NOISE_ROWS_MIN: Final = 2


def profile_facts(sessions: tuple[Session, ...], older: tuple[Session, ...] = ()) -> dict[str, Fact]:
    """Every fact a profile needs: measured in one of the sessions, else in an older one, or assumed with its source."""
    facts = _measured_facts(sessions)
    for name, fact in _measured_facts(older).items():
        facts.setdefault(name, dataclasses.replace(fact, source=f"{fact.source}, an older one"))
    missing = {
        "device_memory_gib": (0.0, "no GPU in these sessions"),
        "checkpoint_gib": (6.46, "SDXL base 1.0 in bf16: 3.47 B parameters"),
        "controlnet_gib": (2.33, "an SDXL ControlNet in bf16: 1.25 B parameters"),
        "activation_gib_per_sample": (0.0, "no GPU memory was measured in these sessions"),
        "residual_bytes_per_sample": (53_739_520.0, "shapes of SDXL's 10 residuals at 1024 x 1024 in bf16"),
    }
    return {
        name: facts[name] if name in facts else Fact(missing[name][0], "assumed", missing[name][1]) for name in FACTS
    }


def _measured_facts(sessions: tuple[Session, ...]) -> dict[str, Fact]:

    def largest(*endings: str) -> tuple[str, float] | None:
        found = [
            (key, value)
            for s in sessions
            for key, value in sorted(s.facts.items())
            if key.endswith(endings) and value > 0
        ]
        return max(found, key=lambda item: item[1]) if found else None

    facts = {}
    for name, ending in (
        ("device_memory_gib", "device_memory_bytes"),
        ("checkpoint_gib", "checkpoint_bytes"),
        ("controlnet_gib", "controlnet_bytes"),
    ):
        found = largest(ending)
        if found:
            facts[name] = Fact(found[1] / GIB, "measured", f"{found[0]} of the session")
    residual = largest("residual_bytes_per_sample")
    if residual:
        facts["residual_bytes_per_sample"] = Fact(residual[1], "measured", f"{residual[0]} of the session")
    # Peak of whole images of the stock pipeline, VAE included: a captured graph's pool hides ours from the allocator.
    per_sample = [
        (value / (2 * int(key.rsplit(".", 1)[1].split("_")[0])) / GIB, key)
        for s in sessions
        for key, value in sorted(s.facts.items())
        if "stock.activation_bytes." in key and value > 0
    ]
    if per_sample:
        value, key = max(per_sample)
        facts["activation_gib_per_sample"] = Fact(value, "measured", f"{key} over its forward batch, peak with the VAE")
    return facts


def service_noise(cells: Cells) -> dict[str, tuple[float, ...]]:
    """Repetition / median of its own image and session: what one request differs from the next, machines aside.

    Ours comes from the serving processes, where they were measured. Deviations from the median of n repetitions are too small
    by about sqrt((n - 1) / n); they are widened by its inverse.
    """
    whole = {QUANTITY_OF[topology]: stack for topology, stack in STACK_OF.items()}
    served = cells.matching(QUANTITY_OF["serving"], lambda f: not f.variant)
    ratios: dict[str, list[np.ndarray]] = {}
    for cell, by_session in cells.values.items():
        stack = whole.get(cell[0], "")
        if not stack or (stack == "engine" and bool(served) != (cell in served)):
            continue
        for values in by_session.values():
            if values.size >= NOISE_ROWS_MIN:
                deviations = values / np.median(values) - 1.0
                widened = 1.0 + deviations * np.sqrt(values.size / (values.size - 1))
                ratios.setdefault(stack, []).append(widened)
    return {
        stack: tuple(float(v) for v in np.quantile(np.concatenate(ratios[stack]), RESIDUAL_LEVELS))
        for stack in STACKS
        if stack in ratios
    }
