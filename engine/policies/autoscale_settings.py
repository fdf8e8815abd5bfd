"""Settings of a pool's autoscaler: every field with its unit, range and the default of the system it belongs to.

Which fields count depends on ``kind``; the rules that read them are in ``autoscale``.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

AutoscalerKind = Literal["hpa", "keda", "kpa", "ray_serve"]

TARGET_DEFAULT: Final = MappingProxyType({"hpa": 0.8, "keda": 5.0, "kpa": 1.0, "ray_serve": 2.0})
"""HPA: busy ratio (Kubernetes' default CPU target is 80 %). KEDA: requests a replica (its queue scalers' 5). Knative: the
concurrency of a worker that does one request at a time. Ray Serve: ``target_ongoing_requests``."""
INTERVAL_DEFAULT_S: Final = MappingProxyType({"hpa": 15.0, "keda": 15.0, "kpa": 2.0, "ray_serve": 0.1})
"""Time between two looks: the HPA controller's sync period, Knative's tick, Ray Serve's control loop."""


@dataclass(frozen=True, slots=True)
class Autoscale:
    """How a pool grows and shrinks between ``min_replicas`` and ``max_replicas``."""

    max_replicas: int
    """1..100000. The pool never occupies more GPUs than these need, replicas that are still draining included."""
    kind: AutoscalerKind = "keda"
    min_replicas: int = 1
    """0..max_replicas. HPA needs 1: only KEDA, Knative and Ray Serve reach zero."""
    target: float | None = None
    """Above 0. None: ``TARGET_DEFAULT`` of the kind."""
    interval_s: float | None = None
    """Above 0. None: ``INTERVAL_DEFAULT_S`` of the kind."""
    start_s: float = 60.0
    """From the decision until the worker's process is up, GPU included."""
    attach_s: float = 0.0
    """After that, until the service sends it requests; the loads of the models it starts with come between."""
    warm_replicas: int = 0
    """Started beyond those asked for, kept without models and paid for: taking one costs attach and loads, no start."""
    # hpa, keda
    tolerance_ratio: float = 0.1
    up_window_s: float = 0.0
    down_window_s: float = 300.0
    up_replicas: int = 4
    """Most replicas added within ``up_period_s``, or ``up_ratio`` of those at its start if that is more."""
    up_ratio: float = 1.0
    up_period_s: float = 15.0
    down_replicas: int = 0
    """Likewise downwards; 0 leaves the ratio alone to decide."""
    down_ratio: float = 1.0
    down_period_s: float = 15.0
    # keda
    polling_s: float = 30.0
    """Time between looks at whether to leave or reach zero."""
    cooldown_s: float = 300.0
    activation: float = 0.0
    # kpa
    target_utilisation_ratio: float = 0.7
    stable_window_s: float = 60.0
    panic_window_ratio: float = 0.1
    panic_threshold_ratio: float = 2.0
    max_up_ratio: float = 1000.0
    max_down_ratio: float = 2.0
    down_delay_s: float = 0.0
    zero_grace_s: float = 30.0
    # ray_serve
    look_back_s: float = 30.0
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 600.0
    downscale_to_zero_delay_s: float | None = None
    upscaling_factor: float = 1.0
    downscaling_factor: float = 1.0

    @property
    def target_value(self) -> float:
        """The target in force."""
        return TARGET_DEFAULT[self.kind] if self.target is None else self.target

    @property
    def look_s(self) -> float:
        """The time between two looks in force."""
        return INTERVAL_DEFAULT_S[self.kind] if self.interval_s is None else self.interval_s


def autoscale_faults(settings: Autoscale, n_replicas: int) -> list[tuple[str, str, str]]:
    """Field, value seen, what is allowed: every rule the settings break. ``n_replicas`` is the pool's count at the start."""
    faults = []

    def need(holds: bool, name: str, allowed: str) -> None:
        if not holds:
            faults.append((name, f"{name} is {getattr(settings, name)}", allowed))

    need(1 <= settings.max_replicas <= 100_000, "max_replicas", "1..100000")
    need(
        settings.min_replicas <= settings.max_replicas, "min_replicas", f"at most max_replicas, {settings.max_replicas}"
    )
    need(settings.min_replicas > 0 or settings.kind != "hpa", "min_replicas", "1 or more for kind 'hpa'")
    need(
        settings.warm_replicas <= settings.max_replicas,
        "warm_replicas",
        f"at most max_replicas, {settings.max_replicas}",
    )
    for name in ("target", "interval_s"):
        value = getattr(settings, name)
        need(value is None or value > 0, name, "above 0, or null for the default of the kind")
    need(settings.kind != "hpa" or settings.target_value <= 1, "target", "a busy ratio, at most 1, for kind 'hpa'")
    need(settings.look_s >= 0.01, "interval_s", "0.01 s or more")
    for name in (
        "polling_s", "stable_window_s", "look_back_s", "upscaling_factor", "downscaling_factor", "panic_threshold_ratio",
        "max_up_ratio",
    ):  # fmt: skip
        need(getattr(settings, name) > 0, name, "above 0")
    for name in ("target_utilisation_ratio", "panic_window_ratio"):
        need(0 < getattr(settings, name) <= 1, name, "above 0, at most 1")
    need(settings.max_down_ratio > 1, "max_down_ratio", "above 1")
    need(settings.down_ratio <= 1, "down_ratio", "at most 1")
    need(settings.up_replicas > 0 or settings.up_ratio > 0, "up_replicas", "1 or more where up_ratio is 0")
    need(settings.tolerance_ratio < 1, "tolerance_ratio", "below 1")
    if not settings.min_replicas <= n_replicas <= settings.max_replicas:
        faults.append((
            "n_replicas", f"n_replicas is {n_replicas}",
            f"min_replicas..max_replicas, {settings.min_replicas}..{settings.max_replicas}",
        ))  # fmt: skip
    return faults
