"""Keeps the compiled run on disk, so that a machine compiles it once.

Numba's own cache looks only at the file of the function it stores, while the run also contains the engine's policies and its
helpers from other files. The name under which it is stored therefore carries a digest of all of them, of the compiler and of the
processor: an entry is never replaced by another one, and processes that start together can only write the same bytes.

Numba stores beside the source where it may write there, else in the user's cache folder; ``NUMBA_CACHE_DIR`` overrides both.
Where neither can be written, every process compiles for itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, cast

import llvmlite
import numba
import numpy as np
from llvmlite import binding

from engine.policies import admission, lru, routing, sharing
from planner.fast.policies import NJIT, OPTIONS

DIGITS: Final = 12


def source_digest() -> str:
    """Identity of everything the compiled run is made of."""
    digest = hashlib.sha256()
    files = sorted(Path(__file__).parent.glob("*.py")) + [
        Path(str(module.__file__)) for module in (admission, lru, routing, sharing)
    ]
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    features = binding.get_host_cpu_features().flatten()
    for part in (numba.__version__, llvmlite.__version__, np.__version__, binding.get_host_cpu_name(), features):
        digest.update(str(part).encode() + b"\0")
    return digest.hexdigest()[:DIGITS]


def compiled_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles when first called, without holding Python's lock while it runs, and keeps the result on disk if it can."""
    plain = cast("Any", function)
    plain.__qualname__ = f"{plain.__qualname__}_{source_digest()}"
    try:
        return NJIT(cache=True, nogil=True, **OPTIONS)(plain)  # type: ignore[no-any-return]
    except RuntimeError as error:  # numba found no folder that it may write to
        if "cannot cache" not in str(error):
            raise
        return NJIT(nogil=True, **OPTIONS)(plain)  # type: ignore[no-any-return]
