"""What the records of a plan are made of: strict tables, and figures with their intervals."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

if TYPE_CHECKING:  # reading a plan needs no scipy
    from planner.statistics import Interval


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_finite_or_none)]
"""JSON has no NaN: a figure that does not exist is null."""


class Record(BaseModel):
    """A strict, frozen table of a plan."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Estimate(Record):
    """A mean over repetitions with its t-interval; the bounds are null where there are none."""

    mean: Number
    low: Number
    high: Number

    @classmethod
    def of(cls, interval: Interval | None) -> Estimate:
        """From the statistics' interval; all null for None."""
        if interval is None:
            return cls(mean=None, low=None, high=None)
        return cls(mean=interval.mean, low=interval.low, high=interval.high)
