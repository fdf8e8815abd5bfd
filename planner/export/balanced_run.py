"""Runs pods as they are exported: an engine and a queue each, behind something that decides which of them a request goes to.

Two ways to decide, both blind to what a request needs:

- ``random``: a Service. kube-proxy picks a pod by lot for every connection; here for every request, which flatters clients
  that keep a connection open.
- ``least_outstanding``: HAProxy's ``leastconn``. Each balancer counts its own open requests only and takes the pod with the
  smallest ``(open + 1) / weight``, a pod without any first, among equals the one whose count changed longest ago
  (``lb_fwlc.c``); a pod's weight is its base replicas.

The decision needs every pod's state at the moment of an arrival, so the pods' runs advance together from arrival to arrival. A
pod with mechanisms beyond the static model is looked at without them for this: what the balancer sees of it is then an
approximation, and its requests are simulated once more by themselves with everything that is on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import pandas as pd

from engine.allocation import Allocation, Policies
from planner.consistency import check_run
from planner.export.pods_figures import Front
from planner.replication import Inputs, profile_draw, service_table
from planner.scenario import Scenario
from planner.service import ServiceTable
from planner.simulator import mechanisms_in_use, simulate
from planner.simulator.environment import ARRIVAL
from planner.simulator.model import StaticRun
from planner.simulator.replicas import check_residency
from planner.traffic import stream_seed
from planner.workload import Ints, Workload

STATIC_POLICIES: Final = ("queue_limit", "lora_cache_gib", "lora_patch_by_step", "controlnet_host_cache_gib", "checkpoint_host_cache_gib")  # fmt: skip
"""What the static model looks at; the rest of the policies switches mechanisms on."""


@dataclass(frozen=True, slots=True, eq=False)
class Served:
    """What the pods did together."""

    requests: pd.DataFrame
    """Records of all pods' requests, in order of arrival."""
    pod_of: Mapping[str, int]
    """Request id to the number of its pod."""
    n_of_pod: tuple[int, ...]


def run_pods(
    scenario: Scenario, inputs: Inputs, workload: Workload, pods: Sequence[Allocation], front: Front, repetition: int
) -> Served:
    """One repetition of a workload on pods behind a front, with the repetition's profile draw and noise.

    Args:
        pods: one allocation a pod, all with base pools of one topology.

    Raises:
        InputError: an allocation cannot be simulated.
    """
    seed = scenario.simulation.seed
    draw = profile_draw(scenario, inputs, repetition)
    noise_seed = stream_seed(seed, "noise", repetition)
    topology = pods[0].pools_of("base")[0].topology

    def table(part: Workload, pod: Allocation) -> ServiceTable:
        return service_table(scenario, inputs, part, topology, draw=draw, noise_seed=noise_seed, allocation=pod)

    lots = Lots(workload, stream_seed(seed, "balancer", repetition))
    together: list[PodRun] = []
    if len(pods) == 1:
        pod_of = np.zeros(len(workload), dtype=np.int64)
    elif front.balancing == "random":
        pod_of = lots.draw(0, len(pods))
    else:
        service = table(workload, pods[0])
        together = [begin_pod(workload, inputs, pod, service, front.n_balancers) for pod in pods]
        pod_of = _by_outstanding(workload, together, lots.draw(1, front.n_balancers))
    frames = []
    for number, pod in enumerate(pods):
        mine = pod_of == number
        if not mine.any():
            continue
        world = scenario.world.world(stream_seed(seed, f"world of pod {number}", 1 + repetition))
        if together and not mechanisms_in_use(pod, world):
            frames.append(together[number].finish(workload))
            continue
        part = workload.subset(mine)
        services = dict.fromkeys((pool.name for pool in pod.pools_of("base")), table(part, pod))
        frames.append(simulate(part, pod, services, inputs.sizes, inputs.facts, world=world).requests)
    requests = pd.concat(frames, ignore_index=True).sort_values(["arrival_s", "request_id"], ignore_index=True)
    by_id = dict(zip(workload.request_ids, pod_of.tolist(), strict=True))
    return Served(requests, by_id, tuple(np.bincount(pod_of, minlength=len(pods)).tolist()))


class Lots:
    """Draws keyed by request, so that one request's lot does not depend on the others."""

    def __init__(self, workload: Workload, seed: int) -> None:
        self._key = workload.request_key
        self._seed = seed

    def draw(self, purpose: int, n: int) -> Ints:
        """A whole number below ``n`` for every request, all equally likely."""
        salt = np.random.SeedSequence([self._seed, purpose]).generate_state(1, np.uint64)[0]
        bits = self._key ^ salt
        # SplitMix64's finaliser, as for the service noise
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        uniform = ((bits ^ (bits >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53
        return np.asarray(uniform * n, dtype=np.int64)


class PodRun:
    """One pod's run, advanced by others, and what each balancer knows of it."""

    def __init__(self, run: StaticRun, weight: int, n_balancers: int) -> None:
        run.n_requests = 0  # the run plans no arrival by itself
        self._run = run
        self._weight = weight
        self._open: list[list[int]] = [[] for _ in range(n_balancers)]
        self._given: list[int] = []
        self.changed_s = [0.0] * n_balancers
        """When each balancer's count of open requests last changed."""

    def advance(self, now_s: float) -> None:
        """Everything that happens up to and at ``now_s``."""
        env = self._run.env
        while env.peek() <= now_s:
            env.step()

    @property
    def has_requests(self) -> bool:
        """Whether it was ever given one."""
        return bool(self._given)

    def n_open(self, now_s: float) -> int:
        """Requests that wait or run here, whoever sent them."""
        end_s = self._run.recorder.end_s
        return sum(not end_s[i] <= now_s for held in self._open for i in held)

    def load_s(self) -> float:
        """Seconds in which a new machine loads from the store what the pod's first replica starts with, as autoscaled plans count it."""
        replica, n = self._run.replicas[0], self._run.n_checkpoints
        table = self._run.tables[replica.pool]
        held = [key for key in range(len(replica.device.n_bytes)) if replica.device.holds(key)]
        checkpoints_s = sum(table.checkpoint_load_s[key] + table.checkpoint_fetch_s[key] for key in held if key < n)
        return checkpoints_s + sum(
            table.parts.load_s[key - n] + table.parts.fetch_s[key - n] for key in held if key >= n
        )

    def share(self, other: PodRun) -> None:
        """Uses the other's columns of the same workload: many pods then need little memory."""
        mine, theirs = self._run, other._run
        mine.tables, mine.decode_s = theirs.tables, theirs.decode_s
        mine.arrival_s, mine.deadline_s = theirs.arrival_s, theirs.deadline_s
        mine.checkpoint, mine.n_steps = theirs.checkpoint, theirs.n_steps

    def finish(self, workload: Workload) -> pd.DataFrame:
        """Runs to the end; records of the pod's own requests, checked like any run's."""
        self.advance(np.finfo(np.float64).max)
        check_residency(self._run.replicas, self._run.workers)
        mine = np.zeros(len(workload), dtype=np.bool_)
        mine[self._given] = True
        part = workload.subset(mine)
        whole = self._run.recorder.result(self._run.env.n_events, part.duration_s)
        requests = whole.requests[mine].reset_index(drop=True)
        check_run(dataclasses.replace(whole, requests=requests), part)
        return requests

    def cost(self, balancer: int, now_s: float) -> float:
        """HAProxy's key: smaller goes first."""
        mine, end_s = self._open[balancer], self._run.recorder.end_s
        still = [i for i in mine if not end_s[i] <= now_s]  # an open request's end is NaN
        if len(still) < len(mine):
            self.changed_s[balancer] = max(end_s[i] for i in mine if end_s[i] <= now_s)
            self._open[balancer] = still
        return (len(still) + 1) / self._weight if still else 0.0

    def give(self, i: int, balancer: int, now_s: float) -> None:
        """Request ``i`` arrives here now."""
        self._run.env.call_at(now_s, ARRIVAL, self._run._on_arrival, i)
        self.advance(now_s)
        self._open[balancer].append(i)
        self._given.append(i)
        self.changed_s[balancer] = now_s


def begin_pod(workload: Workload, inputs: Inputs, pod: Allocation, service: ServiceTable, n_balancers: int) -> PodRun:
    """An empty pod's run at time 0."""
    plain, ratios = _without_mechanisms(pod)
    services = {name: service.slowed(ratio) if ratio != 1.0 else service for name, ratio in ratios.items()}
    run = StaticRun(workload, plain, services, inputs.sizes, inputs.facts, len(workload))
    return PodRun(run, sum(pool.n_replicas for pool in pod.pools_of("base")), n_balancers)


def _by_outstanding(workload: Workload, pods: Sequence[PodRun], balancer_of: Ints) -> Ints:
    """The pod of every request under ``least_outstanding``; the pods are advanced to the last arrival."""
    chosen = np.empty(len(workload), dtype=np.int64)
    for i, (now_s, balancer) in enumerate(zip(workload.arrival_s.tolist(), balancer_of.tolist(), strict=True)):
        for pod in pods:
            pod.advance(now_s)
        # cost first: it brings changed_s up to now
        best = min((pod.cost(balancer, now_s), pod.changed_s[balancer], k) for k, pod in enumerate(pods))[2]
        pods[best].give(i, balancer, now_s)
        chosen[i] = best
    return chosen


def _without_mechanisms(pod: Allocation) -> tuple[Allocation, Mapping[str, float]]:
    """The pod for the static model, and for each base pool how much longer its replicas compute than a whole GPU."""
    pools = tuple(dataclasses.replace(p, autoscale=None, workers_per_gpu=1, speed_ratio=None) for p in pod.pools)
    policies = Policies(**{name: getattr(pod.policies, name) for name in STATIC_POLICIES})
    ratios = {p.name: 1.0 / (p.speed_ratio or 1.0 / p.workers_per_gpu) for p in pod.pools_of("base")}
    return Allocation(pools, policies=policies), ratios
