"""Money: what an allocation costs a month, and what one image inside the SLO costs."""

from __future__ import annotations

import math
from dataclasses import dataclass

SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True, slots=True)
class Cost:
    """What an allocation costs if the whole month looked like the simulated traffic."""

    n_gpus: float
    """Of unlike price: as many of the first kind as cost the same."""
    gpu_hours_per_month: float
    cost_usd_per_month: float
    in_slo_images_per_month: float
    cost_usd_per_image: float
    """Total cost over in-SLO images, idle GPUs included; infinite if no image is in time."""


def cost_of_hours(
    n_gpus: int, gpu_hours_per_hour: float, usd_per_hour: float, in_slo_images_per_s: float, hours_per_month: float
) -> Cost:
    """Prices a fleet whose size changes: ``gpu_hours_per_hour`` allocated on average, ``usd_per_hour`` for all of them.

    ``n_gpus`` is the most it may have. Raises ValueError as :func:`cost_of` does.
    """
    plain = cost_of(n_gpus, in_slo_images_per_s, 0.0, hours_per_month)
    for name, value in (("gpu_hours_per_hour", gpu_hours_per_hour), ("usd_per_hour", usd_per_hour)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} is {value}, needs a finite number, 0 or more")
    images = plain.in_slo_images_per_month
    cost_usd = usd_per_hour * hours_per_month
    return Cost(
        n_gpus, gpu_hours_per_hour * hours_per_month, cost_usd, images, cost_usd / images if images > 0 else math.inf
    )


def cost_of(n_gpus: float, in_slo_images_per_s: float, price_usd_per_gpu_hour: float, hours_per_month: float) -> Cost:
    """Prices ``n_gpus`` rented all month that draw ``in_slo_images_per_s`` on average.

    Raises:
        ValueError: a negative or non-finite input.
    """
    for name, value in (
        ("n_gpus", n_gpus),
        ("in_slo_images_per_s", in_slo_images_per_s),
        ("price_usd_per_gpu_hour", price_usd_per_gpu_hour),
        ("hours_per_month", hours_per_month),
    ):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} is {value}, needs a finite number, 0 or more")
    gpu_hours = n_gpus * hours_per_month
    cost_usd = gpu_hours * price_usd_per_gpu_hour
    images = in_slo_images_per_s * SECONDS_PER_HOUR * hours_per_month
    return Cost(n_gpus, gpu_hours, cost_usd, images, cost_usd / images if images > 0 else math.inf)
