"""Runs a pool's autoscaler: measures what it sees, carries its state from look to look, asks ``engine.policies.autoscale``."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from engine.policies import autoscale
from engine.policies.autoscale_settings import Autoscale


class Gauge:
    """A number that changes in steps, and its integral over time."""

    __slots__ = ("_integral", "_since_s", "value")

    def __init__(self) -> None:
        self.value = 0.0
        self._integral = 0.0
        self._since_s = 0.0

    def add(self, change: float, now_s: float) -> None:
        """Changes the number at this time."""
        self._integral += self.value * (now_s - self._since_s)
        self._since_s = now_s
        self.value += change

    def integral(self, now_s: float) -> float:
        """Its integral from 0 to now."""
        return self._integral + self.value * (now_s - self._since_s)


class WindowMean:
    """Mean of a gauge over windows that end now, from its integral at earlier looks."""

    def __init__(self, gauge: Gauge, longest_s: float) -> None:
        self._gauge = gauge
        self._longest_s = longest_s
        self._looks: deque[tuple[float, float]] = deque([(0.0, 0.0)])

    def look(self, now_s: float) -> None:
        """Remembers the integral now."""
        self._looks.append((now_s, self._gauge.integral(now_s)))
        while len(self._looks) > 2 and self._looks[1][0] <= now_s - self._longest_s:
            self._looks.popleft()

    def mean(self, now_s: float, window_s: float) -> float:
        """Mean over the last ``window_s``; since time 0 while less has passed.

        Exact where the window begins at a look, which it does if it is a multiple of their distance; else linear between two.
        """
        begin_s = max(0.0, now_s - window_s)
        if now_s <= begin_s:
            return self._gauge.value
        earlier = later = self._looks[0]
        for item in self._looks:  # from the left: the longest window begins there
            if item[0] > begin_s:
                later = item
                break
            earlier = later = item
        share = (begin_s - earlier[0]) / (later[0] - earlier[0]) if later[0] > earlier[0] else 0.0
        at_begin = earlier[1] + max(0.0, share) * (later[1] - earlier[1])
        return (self._gauge.integral(now_s) - at_begin) / (now_s - begin_s)


@dataclass(slots=True)
class Sight:
    """What an autoscaler sees of its pool."""

    ongoing: Gauge
    """Requests in the pool, waiting and running."""
    busy: Gauge
    """Replicas at work."""


class Autoscaler:
    """One pool's."""

    def __init__(self, settings: Autoscale, sight: Sight, n_start: int) -> None:
        self.settings = settings
        self._sight = sight
        self._times_s: list[float] = [0.0]
        self._recommended: list[int] = [n_start]
        self._event_times_s: list[float] = []
        self._event_changes: list[int] = []
        self._last_poll_s = 0.0
        self._last_active_s = 0.0
        self._panic_since_s = 0.0 if settings.kind == "kpa" and n_start > 1 else autoscale.NEVER_S
        self._n_panic_max = n_start if settings.kind == "kpa" and n_start > 1 else 0
        self._idle_since_s = autoscale.NEVER_S
        self._delayed: deque[tuple[float, int]] = deque()
        self._counter = 0
        longest_s = {
            "hpa": settings.look_s, "keda": settings.look_s, "kpa": settings.stable_window_s, "ray_serve": settings.look_back_s
        }[settings.kind]  # fmt: skip
        self._ongoing = WindowMean(sight.ongoing, longest_s)
        self._busy = WindowMean(sight.busy, longest_s)

    def wanted(self, n_current: int, n_ready: int, now_s: float) -> int:
        """Replicas to ask for now. ``n_current``: asked for so far; ``n_ready``: of those, how many serve."""
        settings = self.settings
        if settings.kind == "kpa":
            n = self._kpa(n_ready, now_s)
        elif settings.kind == "ray_serve":
            n = self._ray_serve(n_current, n_ready, now_s)
        else:
            n = self._hpa(n_current, n_ready, now_s)
        return max(settings.min_replicas, min(settings.max_replicas, n))

    def _hpa(self, n_current: int, n_ready: int, now_s: float) -> int:
        settings = self.settings
        metric = self._sight.ongoing.value
        if settings.kind == "keda":
            if now_s - self._last_poll_s >= settings.polling_s - 1e-9:
                self._last_poll_s = now_s
                if metric > settings.activation:
                    self._last_active_s = now_s
                n = autoscale.keda_to_or_from_zero(
                    n_current, settings.min_replicas, metric, settings.activation, now_s, self._last_active_s, settings.cooldown_s
                )  # fmt: skip
                if n == 0 or n_current == 0:
                    return n
            if n_current == 0:
                return 0  # the HPA rests while KEDA keeps the pool at zero
            wanted = autoscale.hpa_for_total(metric, settings.target_value, n_current, settings.tolerance_ratio)
        else:
            self._busy.look(now_s)
            usage_sum = self._busy.mean(now_s, settings.look_s)
            wanted = autoscale.hpa_for_usage(
                usage_sum, n_ready, n_current - n_ready, settings.target_value, n_current, settings.tolerance_ratio
            )  # fmt: skip
        n_min = max(1, settings.min_replicas)  # to zero is KEDA's own decision
        if wanted == n_current or wanted < n_current == n_min:
            # no window, rate or bound makes anything else of it
            self._recommend(wanted, now_s)
            return n_current
        held = autoscale.hpa_stabilised(
            n_current, wanted, self._times_s, self._recommended, now_s, settings.up_window_s, settings.down_window_s
        )
        self._recommend(wanted, now_s)
        ups = [max(change, 0) for change in self._event_changes]
        downs = [max(-change, 0) for change in self._event_changes]

        def changed(changes: list[int], period_s: float) -> int:
            return autoscale.change_within(self._event_times_s, changes, now_s, period_s)

        most = autoscale.hpa_most(
            n_current, changed(ups, settings.up_period_s), changed(downs, settings.up_period_s), settings.up_replicas,
            settings.up_ratio,
        )  # fmt: skip
        fewest = autoscale.hpa_fewest(
            n_current, changed(ups, settings.down_period_s), changed(downs, settings.down_period_s),
            settings.down_replicas, settings.down_ratio,
        )  # fmt: skip
        n = autoscale.hpa_limited(n_current, held, n_min, settings.max_replicas, most, fewest)
        if n != n_current:
            self._remember(
                self._event_times_s, self._event_changes, now_s, n - n_current, max(settings.up_period_s, settings.down_period_s)
            )  # fmt: skip
        return n

    def _recommend(self, wanted: int, now_s: float) -> None:
        window_s = max(self.settings.up_window_s, self.settings.down_window_s)
        self._remember(self._times_s, self._recommended, now_s, wanted, window_s)

    @staticmethod
    def _remember(times_s: list[float], values: list[int], now_s: float, value: int, window_s: float) -> None:
        times_s.append(now_s)
        values.append(value)
        while times_s[0] <= now_s - window_s:
            del times_s[0], values[0]
            if not times_s:
                break

    def _kpa(self, n_ready: int, now_s: float) -> int:
        settings = self.settings
        self._ongoing.look(now_s)
        n, self._panic_since_s, self._n_panic_max = autoscale.kpa_step(
            self._ongoing.mean(now_s, settings.stable_window_s),
            self._ongoing.mean(now_s, settings.stable_window_s * settings.panic_window_ratio),
            n_ready, settings.target_value * settings.target_utilisation_ratio, settings.panic_threshold_ratio,
            settings.max_up_ratio, settings.max_down_ratio, settings.stable_window_s, now_s,
            self._panic_since_s, self._n_panic_max,
        )  # fmt: skip
        if settings.down_delay_s > 0:
            self._delayed.append((now_s, n))
            while self._delayed[0][0] <= now_s - settings.down_delay_s:
                self._delayed.popleft()
            n = max(count for _, count in self._delayed)
        if settings.min_replicas == 0 and n_ready > 0:
            n, self._idle_since_s = autoscale.kpa_last_replica(n, now_s, self._idle_since_s, settings.zero_grace_s)
        return n

    def _ray_serve(self, n_current: int, n_ready: int, now_s: float) -> int:
        settings = self.settings
        to_zero_s = settings.downscale_to_zero_delay_s
        self._ongoing.look(now_s)

        def looks(delay_s: float) -> int:
            return int(delay_s / settings.look_s)

        n, self._counter = autoscale.ray_serve_step(
            self._ongoing.mean(now_s, settings.look_back_s), n_ready, n_current, settings.target_value,
            settings.upscaling_factor, settings.downscaling_factor, settings.min_replicas, settings.max_replicas,
            looks(settings.upscale_delay_s), looks(settings.downscale_delay_s),
            looks(settings.downscale_delay_s if to_zero_s is None else to_zero_s), self._counter,
        )  # fmt: skip
        return n
