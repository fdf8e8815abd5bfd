"""What one request takes beyond the median request, drawn by its id: the same in every topology, allocation and subset."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from calibrate.profile import RESIDUAL_LEVELS
from planner.workload import Floats, Workload


def service_noise_ratio(workload: Workload, quantiles: Sequence[float], noise_seed: int) -> Floats:
    """Inverse transform of one uniform per request between the quantiles' levels, held at the outermost ones."""
    if not quantiles:
        return np.ones(len(workload))
    stream = int.from_bytes(b"service_noise", "little")  # the stream's name, so that no other stream shares its bits
    salt = np.random.SeedSequence([noise_seed, stream]).generate_state(1, np.uint64)
    uniform = (mix(workload.request_key ^ salt[0]) >> np.uint64(11)) * 2.0**-53
    return np.asarray(np.interp(uniform, RESIDUAL_LEVELS, quantiles), dtype=np.float64)


def mix(bits: np.ndarray[tuple[int, ...], np.dtype[np.uint64]]) -> np.ndarray[tuple[int, ...], np.dtype[np.uint64]]:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): every input bit flips every output bit with probability near 1/2."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
