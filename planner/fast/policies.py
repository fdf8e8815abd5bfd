"""The engine's own decision functions, compiled: the same source that the engine and the SimPy model run.

``engine/policies`` imports no compiler, so its functions are compiled here, from copies that see compiled callees where the
originals call one another.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MappingProxyType
from typing import Any, Final, cast

import numba

from engine.policies import admission, lru, routing, sharing

OPTIONS: Final[Any] = MappingProxyType({"no_cfunc_wrapper": True, "error_model": "numpy", "_nrt": False})
"""Strict IEEE arithmetic without reordering, and no memory management: nothing compiled here allocates."""
NJIT: Final[Any] = numba.njit
"""Untyped: numba's own types know neither these options nor what compiled code may be given."""


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a function when it is first called from compiled code.

    Calls are not type-checked beyond that: numba's types are stricter, and arrays stand where policies say Sequence.
    """
    return NJIT(no_cpython_wrapper=True, **OPTIONS)(function)  # type: ignore[no-any-return]


def _compiled_copy(function: Callable[..., Any], **callees: Any) -> Callable[..., Any]:
    original = cast("FunctionType", function)
    names = {**original.__globals__, **callees}
    return compiled(FunctionType(original.__code__, names, original.__name__))


is_admitted = _compiled_copy(admission.is_admitted)
affinity = _compiled_copy(routing.affinity)
best_replica = _compiled_copy(routing.best_replica)
least_loaded = _compiled_copy(routing.least_loaded)
wait_in_passing_s = _compiled_copy(sharing.wait_in_passing_s)
fill_fair_step_rates = _compiled_copy(sharing.fill_fair_step_rates)
_link_first = _compiled_copy(lru._link_first)
remove = _compiled_copy(lru.remove)
touch = _compiled_copy(lru.touch, _link_first=_link_first)
insert = _compiled_copy(lru.insert, _link_first=_link_first, remove=remove)
