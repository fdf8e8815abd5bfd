"""Which simulated autoscaler settings a cluster's own autoscalers can hold, and which of them count for each kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from engine.policies.autoscale_settings import Autoscale
from traces.problems import Problem

CLUSTER_WIDE: Final = {"tolerance_ratio": 0.1}
KNATIVE_CLUSTER_WIDE: Final = {"max_up_ratio": 1000.0, "max_down_ratio": 2.0, "zero_grace_s": 30.0}
CONTROLLER_PERIOD_S: Final = {"keda": 15.0, "hpa": 15.0, "kpa": 2.0}
COMMON: Final = ("max_replicas", "kind", "min_replicas", "target", "start_s", "attach_s")
OF_HPA: Final = (
    "up_window_s", "down_window_s", "up_replicas", "up_ratio", "up_period_s", "down_replicas", "down_ratio", "down_period_s",
)  # fmt: skip
FIELDS: Final[Mapping[str, tuple[str, ...]]] = {
    "keda": (*COMMON, *OF_HPA, "polling_s", "cooldown_s", "activation"),
    "hpa": (*COMMON, *OF_HPA),
    "kpa": (
        *COMMON, "target_utilisation_ratio", "stable_window_s", "panic_window_ratio", "panic_threshold_ratio",
        "down_delay_s",
    ),
}  # fmt: skip


def effective(settings: Autoscale) -> Autoscale:
    """The settings that count for their kind, with targets and periods stated; the others at their defaults."""
    values = {name: getattr(settings, name) for name in FIELDS[settings.kind]}
    return Autoscale(**{**values, "target": settings.target_value})


def inexpressible(pool: str, settings: Autoscale | None) -> list[Problem]:
    """Simulated settings that the target cannot hold, one problem each."""
    if settings is None:
        return []
    found: list[tuple[str, str, str]] = []

    def refuse(name: str, allowed: str, repair: str = "Plan with that") -> None:
        found.append((f"{name} is {getattr(settings, name)}", allowed, repair))

    if settings.kind == "ray_serve":
        return [
            Problem(
                f"pool {pool!r} autoscale.kind",
                "is 'ray_serve'",
                "keda, hpa or kpa",
                "Ray Serve does not run this engine",
            )
        ]
    if settings.warm_replicas:
        refuse("warm_replicas", "0: Kubernetes keeps no half-started pods")
    if settings.kind == "hpa" and round(settings.target_value, 9) != settings.target_value:
        found.append(
            (f"target is {settings.target_value}", "at most 9 digits after the point", "Round it in the scenario")
        )
    if settings.look_s != CONTROLLER_PERIOD_S[settings.kind]:
        refuse("interval_s", f"{CONTROLLER_PERIOD_S[settings.kind]:g}, which is the controller's own")
    if settings.kind == "kpa":
        shared: Mapping[str, float] = KNATIVE_CLUSTER_WIDE
        whole: tuple[str, ...] = ("down_delay_s",)
        ranges = {"stable_window_s": (6, 3600), "down_delay_s": (0, 3600)}
    else:
        shared = CLUSTER_WIDE
        whole = ("up_window_s", "down_window_s", "up_period_s", "down_period_s")
        whole += ("polling_s", "cooldown_s") if settings.kind == "keda" else ()
        ranges = {
            "up_window_s": (0, 3600),
            "down_window_s": (0, 3600),
            "up_period_s": (1, 1800),
            "down_period_s": (1, 1800),
        }
        if settings.min_replicas == 0:
            refuse("min_replicas", "1 or more: with no pod there is no engine whose queue could ask for one")
        for name in ("up_ratio", "down_ratio"):
            if round(getattr(settings, name) * 100, 6) % 1:
                refuse(name, "whole percents")
    for name, value in shared.items():
        if getattr(settings, name) != value:
            refuse(name, f"{value:g}, a setting of the whole cluster")
    for name in whole:
        if getattr(settings, name) % 1:
            refuse(name, "whole seconds")
    for name, (low, high) in ranges.items():
        if not low <= getattr(settings, name) <= high:
            refuse(name, f"{low}..{high} s")
    return [Problem(f"pool {pool!r} autoscale", *fault) for fault in found]
