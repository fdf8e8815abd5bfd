"""What a form misses at the sizes that it was fitted to, carried to the sizes between them.

Kernels change with the size, and no form of a few parameters follows that. The ratio of measured to form is known at the measured
sizes; between them its logarithm is taken as linear, first along the batch at each measured size of image, then from one size
of image to the next, both on a logarithmic scale. Beyond the measured ones it stays as it is at the nearest.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
SAME: Final = 1e-8
"""Sizes of images whose binary logarithms differ by less are one size."""


def surface_ratio(
    points: Floats | tuple[tuple[float, ...], ...], ratios: Floats | tuple[float, ...], asked: Floats
) -> Floats:
    """measured / form at the features asked for; at a measured size exactly the ratio there.

    Args:
        points: measured sizes, (n, 2): batch or number of images, megapixels of one image; all above 0, none twice.
        ratios: measured / form at each, above 0.
        asked: (..., 2), above 0.
    """
    known, logs = np.log2(np.asarray(points, dtype=np.float64)), np.log2(np.asarray(ratios, dtype=np.float64))
    wanted = np.log2(np.asarray(asked, dtype=np.float64))
    sizes = np.unique(known[:, 1])
    # the same size of image may come from two roundings
    sizes = sizes[np.diff(sizes, prepend=-np.inf) > SAME]
    columns = []
    for size in sizes:
        at = np.flatnonzero(np.abs(known[:, 1] - size) <= SAME)
        order = at[np.argsort(known[at, 0])]
        columns.append(np.interp(wanted[..., 0], known[order, 0], logs[order]))
    by_size = np.stack(columns)
    right = np.clip(np.searchsorted(sizes, wanted[..., 1]), 1, max(len(sizes) - 1, 1))
    if len(sizes) == 1:
        return np.asarray(2.0 ** by_size[0])
    left = right - 1
    share = np.clip((wanted[..., 1] - sizes[left]) / (sizes[right] - sizes[left]), 0.0, 1.0)
    low = np.take_along_axis(by_size, left[None], axis=0)[0]
    high = np.take_along_axis(by_size, right[None], axis=0)[0]
    return np.asarray(2.0 ** (low + share * (high - low)))
