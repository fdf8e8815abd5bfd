"""Makes the draws of provisional_profile.json anew from its laws: ``python tests/data/make_provisional_profile.py``.

The laws and facts in the file are written by hand: edit them there, then run this.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Final

from calibrate.profile_file import load_profile, to_json
from traces.streams import stream

PATH: Final = Path(__file__).with_name("provisional_profile.json")
SEED: Final = 0
N_DRAWS: Final = 16
DEVIATION_RATIO: Final = 0.01
"""Of every parameter, independently of the others."""


def regenerated(path: Path) -> str:
    """The file's text with every law's draws made anew, to 6 significant digits; each has a stream of its own name."""
    profile = load_profile(str(path))
    draws = {}
    for law in profile.laws.values():
        for name, value in law.parameters.items():
            key = f"{law.name}:{name}"
            factors = stream(SEED, "provisional_profile", key).normal(1.0, DEVIATION_RATIO, N_DRAWS)
            draws[key] = tuple(float(f"{value * factor:.6g}") for factor in factors)
    return to_json(dataclasses.replace(profile, draws=draws))


def main() -> None:
    """Writes the file beside and renames it."""
    beside = PATH.with_suffix(".part")
    beside.write_text(regenerated(PATH), encoding="utf-8")
    beside.replace(PATH)


if __name__ == "__main__":
    main()
