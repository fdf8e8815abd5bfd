"""Runs an autoscaled pool as it is exported: one replica a pod, each with a queue, a front that knows no queue, KEDA that adds and removes pods.

A plan simulates the same autoscaler with one queue for all replicas. Here a pod that starts is empty and holds nothing; one that is
to go gets no more requests and finishes those it has, and is paid for until then. KEDA asks for the requests that wait and run in
all pods, those that go included, as the exported query does. Not modelled: how long DNS, balancers and scrapes take to notice a pod.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from engine.allocation import Allocation
from engine.policies.autoscale_settings import Autoscale
from planner.export.balanced_run import Lots, PodRun, begin_pod
from planner.export.pods_figures import Front
from planner.replication import Inputs, profile_draw, service_table
from planner.scenario import Scenario
from planner.simulator.autoscaler import Autoscaler, Gauge, Sight
from planner.simulator.mechanisms import mechanisms_in_use
from planner.traffic import stream_seed
from planner.workload import Ints, Workload
from traces.problems import one_problem


@dataclass(frozen=True, slots=True, eq=False)
class ScaledServed:
    """What the pods did together."""

    requests: pd.DataFrame
    """Records of all requests, in order of arrival."""
    mean_gpus: float
    """Allocated on average from 0 to the end of the offered traffic, starting and leaving pods included."""
    n_starts: int


class _Life:
    """A pod from the decision to start it until it is gone."""

    __slots__ = ("begun_s", "gone_s", "is_leaving", "left_s", "ready_s", "records", "run")

    def __init__(self, run: PodRun, begun_s: float, ready_s: float) -> None:
        self.run = run
        self.begun_s = begun_s
        self.ready_s = ready_s
        self.is_leaving = False
        self.left_s = 0.0
        """When it was told to go."""
        self.gone_s: float | None = None
        self.records: pd.DataFrame | None = None
        """Once it is gone, in place of its run; None also if it had no request."""


def run_scaled_pods(
    scenario: Scenario,
    inputs: Inputs,
    workload: Workload,
    pod: Allocation,
    settings: Autoscale,
    n_start: int,
    front: Front,
    repetition: int,
) -> ScaledServed:
    """One repetition of a workload on pods that KEDA scales.

    Args:
        pod: one replica, as each pod has it.
        n_start: pods at time 0, ready.

    Raises:
        InputError: the autoscaler is no KEDA, may scale to zero, or the pod has mechanisms beyond the static model.
    """
    _refuse(scenario, pod, settings)
    seed = scenario.simulation.seed
    service = service_table(
        scenario, inputs, workload, pod.pools[0].topology, draw=profile_draw(scenario, inputs, repetition),
        noise_seed=stream_seed(seed, "noise", repetition), allocation=pod,
    )  # fmt: skip
    lots = Lots(workload, stream_seed(seed, "balancer", repetition))
    first = begin_pod(workload, inputs, pod, service, front.n_balancers)

    def new_run() -> PodRun:
        run = begin_pod(workload, inputs, pod, service, front.n_balancers)
        run.share(first)
        return run

    start_s = settings.start_s + settings.attach_s + first.load_s()
    fleet = _Fleet(workload, new_run, settings, n_start, start_s)
    lot = lots.draw(0, 2**40) if front.balancing == "random" else None
    _run(workload, fleet, lots.draw(1, front.n_balancers), lot)
    requests = pd.concat(fleet.records(), ignore_index=True).sort_values(["arrival_s", "request_id"], ignore_index=True)
    end_s = workload.duration_s
    allocated_s = sum(
        max(0.0, min(end_s, end_s if life.gone_s is None else life.gone_s) - life.begun_s) for life in fleet.lives
    )
    return ScaledServed(requests, allocated_s * pod.n_gpus / end_s, len(fleet.lives) - n_start)


def _refuse(scenario: Scenario, pod: Allocation, settings: Autoscale) -> None:
    on = mechanisms_in_use(pod, scenario.world.world(0))
    if settings.kind != "keda" or settings.min_replicas == 0:
        kind = settings.kind if settings.kind != "keda" else "keda with min_replicas 0"
        raise one_problem(
            "--check-pods", f"meets pods that {kind} scales", "keda, from one pod up", "Leave --check-pods out"
        )
    if on:
        raise one_problem(
            "--check-pods",
            f"meets autoscaled pods with {', '.join(on)}",
            "no mechanism besides",
            "Leave --check-pods out",
        )


class _Fleet:
    """The pods there are, and KEDA's looks at them."""

    def __init__(
        self, workload: Workload, new_run: Callable[[], PodRun], settings: Autoscale, n_start: int, start_s: float
    ) -> None:
        self._workload, self._new_run, self._settings, self._start_s = workload, new_run, settings, start_s
        self.lives = [_Life(new_run(), 0.0, 0.0) for _ in range(n_start)]
        self._there = list(self.lives)
        """Those that are not gone."""
        self._n_wanted = n_start
        self._ongoing = Gauge()
        self._scaler = Autoscaler(settings, Sight(self._ongoing, Gauge()), n_start)
        self._n_looks = 0

    def advance(self, now_s: float) -> None:
        """Everything that happens up to ``now_s``, looks included."""
        while (look_s := (self._n_looks + 1) * self._settings.look_s) <= now_s:
            self._n_looks += 1
            self._look(look_s)
        self._settle(now_s)

    def ready(self, now_s: float) -> list[_Life]:
        """Pods that take requests; at least one, because those that are not ready go first and KEDA keeps one."""
        return [life for life in self._there if not life.is_leaving and life.ready_s <= now_s]

    def records(self) -> list[pd.DataFrame]:
        """Of every pod that had requests, each run to its end."""
        for life in self._there:
            self._close(life)
        return [life.records for life in self.lives if life.records is not None]

    def _settle(self, now_s: float) -> None:
        for life in self._there:
            life.run.advance(now_s)
            if life.is_leaving and life.run.n_open(now_s) == 0:
                self._close(life)
                ended_s = 0.0 if life.records is None else float(life.records["end_s"].max())
                life.gone_s = max(ended_s, life.left_s)
        self._there = [life for life in self._there if life.gone_s is None]

    def _close(self, life: _Life) -> None:
        life.records = life.run.finish(self._workload) if life.run.has_requests else None
        del life.run

    def _look(self, now_s: float) -> None:
        self._settle(now_s)
        n_ongoing = sum(life.run.n_open(now_s) for life in self._there)
        self._ongoing.add(n_ongoing - self._ongoing.value, now_s)
        staying = [life for life in self._there if not life.is_leaving]
        n_ready = sum(life.ready_s <= now_s for life in staying)
        self._n_wanted = self._scaler.wanted(self._n_wanted, n_ready, now_s)
        for _ in range(self._n_wanted - len(staying)):
            life = _Life(self._new_run(), now_s, now_s + self._start_s)
            self.lives.append(life)
            self._there.append(life)
        # as a ReplicaSet does it: first those that are not ready, then the youngest
        staying.sort(key=lambda life: (life.ready_s <= now_s, -life.begun_s))
        for life in staying[: max(0, len(staying) - self._n_wanted)]:
            life.is_leaving, life.left_s = True, now_s
        self._settle(now_s)


def _run(workload: Workload, fleet: _Fleet, balancer_of: Ints, lot: Ints | None) -> None:
    """Gives every request to a pod; ``lot``: a large random number each, None for the fewest open requests."""
    for i, (now_s, balancer) in enumerate(zip(workload.arrival_s.tolist(), balancer_of.tolist(), strict=True)):
        fleet.advance(now_s)
        ready = fleet.ready(now_s)
        if lot is not None:
            best = int(lot[i]) % len(ready)
        else:
            runs = [life.run for life in ready]
            best = min((run.cost(balancer, now_s), run.changed_s[balancer], k) for k, run in enumerate(runs))[2]
        ready[best].run.give(i, balancer, now_s)
    fleet.advance(workload.duration_s)
