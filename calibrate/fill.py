"""What a short session on one GPU left open, carried over from a profile that was measured on another."""

from __future__ import annotations

import dataclasses

from calibrate.profile import LatencyProfile
from calibrate.roofline import transfer_profile
from traces.problems import one_problem


def filled_from(profile: LatencyProfile, other: LatencyProfile, *, seed: int = 2026) -> LatencyProfile:
    """``profile`` with the laws and facts that only ``other`` has, as :func:`calibrate.roofline.transfer_profile` makes them.

    What ``profile`` has stays as it is; what is added is ``assumed`` and says from where. Draws of added laws do not belong
    together with the measured ones'.

    Raises:
        InputError: the two differ in architecture or in their number of draws, or ``other`` cannot be transferred to this GPU.
    """
    if other.architecture != profile.architecture:
        raise one_problem(
            "--fill-from",
            f"is a profile of {other.architecture!r}",
            repr(profile.architecture),
            "Take one of this model.",
        )
    if other.n_draws != profile.n_draws:
        raise one_problem(
            "--fill-from", f"has {other.n_draws} joint draws", f"{profile.n_draws}, as this fit",
            "Fit with the same --draws.",
        )  # fmt: skip
    donor = transfer_profile(other, profile.gpu_kind, seed=seed)
    laws = {name: law for name, law in donor.laws.items() if name not in profile.laws}
    facts = {
        name: fact
        for name, fact in donor.facts.items()
        if name not in profile.facts or (profile.facts[name].status == "assumed" and not profile.facts[name].value)
    }
    if not laws and not facts:
        return profile
    draws = {key: values for key, values in donor.draws.items() if key.partition(":")[0] in laws}
    named = ", ".join(sorted([*laws, *facts]))
    note = f"Not measured in these sessions, carried over from {other.gpu_kind} (profile {other.profile_id}) by datasheet rates: {named}."
    return dataclasses.replace(
        profile,
        laws={**profile.laws, **laws},
        facts={**profile.facts, **facts},
        draws={**profile.draws, **draws},
        notes=(*profile.notes, note),
    )
