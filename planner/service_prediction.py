"""Many predictions of one law at once."""

from __future__ import annotations

import numpy as np

from calibrate.profile import Predictor
from planner.workload import Floats, Ints


def by_shape(predictor: Predictor, law: str, **features: Ints | Floats) -> Floats:
    """Predicts the few distinct feature vectors of a trace once each: a profile draw then costs microseconds per law."""
    code = np.zeros(len(next(iter(features.values()))), dtype=np.int64)
    tables = {}
    for name, values in features.items():
        tables[name], inverse = np.unique(values, return_inverse=True)
        code = code * len(tables[name]) + inverse
    distinct, rows, inverse = np.unique(code, return_index=True, return_inverse=True)
    chosen = {name: np.asarray(values[rows], dtype=np.float64) for name, values in features.items()}
    return np.broadcast_to(predictor.seconds(law, **chosen), distinct.shape)[inverse]


def by_bytes(predictor: Predictor, law: str, n_bytes: Ints) -> Floats:
    """Seconds of a law of bytes for each model; nothing for none."""
    return by_shape(predictor, law, n_bytes=n_bytes) if len(n_bytes) else np.zeros(0)
