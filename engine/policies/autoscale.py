"""How many replicas an autoscaler asks for: the documented rules of Kubernetes HPA, KEDA, Knative KPA and Ray Serve.

Each rule is a function of what the autoscaler sees now and of the state it carries from one look to the next; the caller keeps
that state. Sources: kubernetes pkg/controller/podautoscaler (replica_calculator.go; horizontal.go, autoscaling/v2 behaviour,
1.21 and later), keda pkg/scaling/executor, knative/serving pkg/autoscaler/scaling/autoscaler.go, ray python/ray/serve
autoscaling_policy.py. Times are seconds on any one clock.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

NEVER_S = -1.0
"""A time for "not since the start"."""


def hpa_for_total(total: float, target_per_replica: float, n_current: int, tolerance_ratio: float) -> int:
    """HPA on an external metric with an AverageValue target, which is what KEDA creates: ⌈total / target⌉.

    ``n_current`` counts all replicas asked for, ready or not; within the tolerance of ``total / (target · n_current)`` it stays.
    """
    if n_current > 0 and abs(1.0 - total / (target_per_replica * n_current)) <= tolerance_ratio:
        return n_current
    return math.ceil(total / target_per_replica)


def hpa_for_usage(
    usage_sum: float, n_ready: int, n_unready: int, target_usage: float, n_current: int, tolerance_ratio: float
) -> int:
    """HPA on the mean usage of the replicas (Resource or Pods metric): ⌈n_ready · mean / target⌉.

    Replicas that are not ready are left out; if the ready ones ask for more, those count as using nothing, and a change of
    direction that this brings keeps ``n_current``. ``usage_sum`` is the sum over the ready ones.
    """
    if n_ready == 0:
        return n_current  # the controller has no metric to go by
    ratio = usage_sum / n_ready / target_usage
    if n_unready == 0 or ratio <= 1.0:
        if abs(1.0 - ratio) <= tolerance_ratio:
            return n_current
        return math.ceil(ratio * n_ready)
    n_counted = n_ready + n_unready
    ratio_of_all = usage_sum / n_counted / target_usage
    if abs(1.0 - ratio_of_all) <= tolerance_ratio or ratio_of_all < 1.0:
        return n_current
    wanted = math.ceil(ratio_of_all * n_counted)
    return wanted if wanted > n_current else n_current


def hpa_stabilised(
    n_current: int,
    n_wanted: int,
    times_s: Sequence[float],
    recommendations: Sequence[int],
    now_s: float,
    up_window_s: float,
    down_window_s: float,
) -> int:
    """Holds a recommendation between the lowest of the up window and the highest of the down window.

    ``times_s`` and ``recommendations`` are earlier recommendations before this step; only those strictly inside a window count.
    """
    low = n_wanted
    high = n_wanted
    for k in range(len(times_s)):
        if times_s[k] > now_s - up_window_s and recommendations[k] < low:
            low = recommendations[k]
        if times_s[k] > now_s - down_window_s and recommendations[k] > high:
            high = recommendations[k]
    held = n_current
    if held < low:
        held = low
    if held > high:
        held = high
    return held


def change_within(event_times_s: Sequence[float], event_changes: Sequence[int], now_s: float, period_s: float) -> int:
    """Sum of the changes strictly later than ``now_s − period_s``."""
    total = 0
    for k in range(len(event_times_s)):
        if event_times_s[k] > now_s - period_s:
            total += event_changes[k]
    return total


def hpa_most(n_current: int, n_added: int, n_removed: int, step_replicas: int, step_ratio: float) -> int:
    """Most replicas that the scale-up policies (selectPolicy Max) allow; ``n_added``, ``n_removed`` within their period.

    One policy in replicas and one as a share of the replicas at the period's start (1.0 is Kubernetes' 100 percent).
    """
    at_start = n_current - n_added + n_removed
    by_replicas = at_start + step_replicas
    by_ratio = math.ceil(at_start * (1.0 + step_ratio))
    most = by_replicas if by_replicas > by_ratio else by_ratio
    return most if most > n_current else n_current


def hpa_fewest(n_current: int, n_added: int, n_removed: int, step_replicas: int, step_ratio: float) -> int:
    """Fewest replicas that the scale-down policies (selectPolicy Max) allow. ``step_replicas`` 0: no policy in replicas."""
    at_start = n_current - n_added + n_removed
    fewest = int(at_start * (1.0 - step_ratio))
    if step_replicas > 0 and at_start - step_replicas < fewest:
        fewest = at_start - step_replicas
    return fewest if fewest < n_current else n_current


def hpa_limited(n_current: int, n_wanted: int, n_min: int, n_max: int, most: int, fewest: int) -> int:
    """A stabilised recommendation within what rates and bounds allow."""
    if n_wanted > n_current:
        return min(n_wanted, n_max, most)
    if n_wanted < n_current:
        return max(n_wanted, n_min, fewest)
    return n_wanted


def keda_to_or_from_zero(
    n_current: int, n_min: int, metric: float, activation: float, now_s: float, last_active_s: float, cooldown_s: float
) -> int:
    """KEDA's own part: 0 → ``max(1, n_min)`` when the metric exceeds ``activation``; → 0 after ``cooldown_s`` without.

    Anything else keeps ``n_current`` and is left to the HPA. ``last_active_s`` is the last poll at which the metric was above.
    """
    if metric > activation:
        return max(1, n_min) if n_current == 0 else n_current
    if n_current > 0 and n_min == 0 and now_s - last_active_s > cooldown_s:
        return 0
    return n_current


def kpa_step(
    stable_concurrency: float,
    panic_concurrency: float,
    n_ready: int,
    target_concurrency: float,
    panic_threshold_ratio: float,
    max_up_ratio: float,
    max_down_ratio: float,
    stable_window_s: float,
    now_s: float,
    panic_since_s: float,
    n_panic_max: int,
) -> tuple[int, float, int]:
    """One tick of Knative's autoscaler: replicas asked for, then the panic state to carry (``panic_since_s`` NEVER_S: calm).

    ``target_concurrency`` is the container's concurrency times the target utilisation. Bounds are the caller's.
    """
    ready = max(1, n_ready)
    most = math.ceil(max_up_ratio * ready)
    fewest = math.floor(ready / max_down_ratio)
    by_stable = math.ceil(stable_concurrency / target_concurrency)
    by_panic = math.ceil(panic_concurrency / target_concurrency)
    wanted = min(max(by_stable, fewest), most)
    wanted_in_panic = min(max(by_panic, fewest), most)
    if by_panic / ready >= panic_threshold_ratio:
        panic_since_s = now_s
    elif panic_since_s >= 0.0 and panic_since_s + stable_window_s < now_s:
        panic_since_s = NEVER_S
        n_panic_max = 0
    if panic_since_s >= 0.0:
        n_panic_max = max(n_panic_max, wanted, wanted_in_panic)
        wanted = n_panic_max
    return wanted, panic_since_s, n_panic_max


def kpa_last_replica(n_wanted: int, now_s: float, idle_since_s: float, grace_s: float) -> tuple[int, float]:
    """Keeps one replica for the grace period after the first tick that asked for none; the state to carry is its time."""
    if n_wanted > 0:
        return n_wanted, NEVER_S
    if idle_since_s < 0.0:
        idle_since_s = now_s
    if now_s - idle_since_s < grace_s:
        return 1, idle_since_s
    return 0, idle_since_s


def ray_serve_step(
    n_ongoing: float,
    n_running: int,
    n_target: int,
    target_ongoing: float,
    up_factor: float,
    down_factor: float,
    n_min: int,
    n_max: int,
    n_up_looks: int,
    n_down_looks: int,
    n_to_zero_looks: int,
    counter: int,
) -> tuple[int, int]:
    """One control loop of Ray Serve: replicas asked for, and the counter of consecutive equal decisions to carry.

    ``n_ongoing`` is averaged over the look-back period; a change needs more than ``n_…_looks`` loops in a row that want it.
    """
    if n_running == 0:
        if n_ongoing > 0.0:
            return max(math.ceil(up_factor), n_target), counter
        return n_target, counter
    wanted_exactly = n_running * (n_ongoing / (target_ongoing * n_running))
    change = wanted_exactly - n_running
    wanted = math.ceil(n_running + (up_factor if change > 0.0 else down_factor) * change)
    if math.ceil(wanted_exactly) < n_running and wanted == n_running:
        wanted -= 1  # a factor below 1 must not hold it for ever
    wanted = max(n_min, min(n_max, wanted))
    decision = n_target
    if wanted > n_target:
        counter = max(counter, 0) + 1
        if counter > n_up_looks:
            counter = 0
            decision = wanted
    elif wanted < n_target:
        counter = min(counter, 0) - 1
        n_looks = n_down_looks
        if n_target == 1:
            n_looks = n_to_zero_looks
        else:
            wanted = max(1, wanted)  # to zero only from one
        if counter < -n_looks:
            counter = 0
            decision = wanted
    else:
        counter = 0
    return decision, counter
