"""Denoising with shared ControlNet workers: rates that are constant until somebody joins or leaves.

Progress is counted in steps of median length: a request with noise ratio m has m·n_steps of them, so that every rate depends
on shapes and placement only and repeats. A worker binds only if its clients at their own pace would load it above 1; requests
touch one another's rates through such full workers, so a change is carried through the component they connect; and those of
unequal pace wait for one another in passing, on any worker of both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from simpy.events import Event

from engine.policies.sharing import fair_step_rates, wait_in_passing_s
from planner.simulator.environment import COMPLETION, ExactEnvironment
from planner.simulator.replicas import ControlNetWorker

FULL: Final = 1.0 + 1e-9
"""Load above which a worker is full; the slack absorbs the rounding of adding and removing clients."""
MEMO_MAX: Final = 1 << 16


class Client:
    """One request while it uses ControlNet workers."""

    __slots__ = (
        "alone_per_s",
        "demand_s",
        "finish_s",
        "is_gone",
        "n_left",
        "n_steps",
        "on_done",
        "pace_per_s",
        "rate_per_s",
        "request",
        "scheduled_s",
        "updated_s",
        "workers",
    )

    def __init__(
        self,
        request: int,
        n_steps: float,
        alone_per_s: float,
        workers: Sequence[ControlNetWorker],
        demand_s: Sequence[float],
        on_done: Callable[[Client, float], None],
    ) -> None:
        self.request = request
        self.n_steps = n_steps
        self.n_left = n_steps
        self.alone_per_s = alone_per_s
        self.pace_per_s = alone_per_s
        """The same with the waits for others in passing: its rate where no worker is full."""
        self.workers = workers
        self.demand_s = demand_s
        self.on_done = on_done
        self.rate_per_s = 0.0
        self.updated_s = 0.0
        self.finish_s = float("inf")
        self.scheduled_s = float("inf")
        self.is_gone = False


class Coupling:
    """The requests that denoise with ControlNet workers now, and their rates."""

    def __init__(self, env: ExactEnvironment, record_span: Callable[[ControlNetWorker, float], None]) -> None:
        self._env = env
        self._record_span = record_span
        self._memo: dict[
            tuple[tuple[float, ...], tuple[int, ...], tuple[int, ...], tuple[float, ...]], list[float]
        ] = {}

    def join(self, client: Client, now_s: float) -> None:
        """Starts a client's denoising; ``client.on_done(client, end)`` is called when its last step has ended."""
        client.updated_s = now_s
        full = []
        for worker, demand_s in zip(client.workers, client.demand_s, strict=True):
            if not worker.clients:
                worker.span_start_s = now_s
            worker.clients[client] = demand_s
            worker.alone_load += demand_s * client.alone_per_s
            if worker.alone_load > FULL:
                worker.is_full = True
                full.append(worker)
        mates = self._mates(client)
        if mates:
            client.pace_per_s = self._pace(client)
            self._share_with(mates, full, now_s)
        elif full:
            self._share(full, now_s)
        if not full:
            self._set_rate(client, client.pace_per_s, now_s)

    def abandon(self, client: Client, now_s: float) -> None:
        """Takes a client off before its last step; ``on_done`` is not called, the work done until now counts."""
        n_left = client.n_left - client.rate_per_s * (now_s - client.updated_s)
        self._take_off(client, min(max(client.n_steps - n_left, 0.0), client.n_steps), now_s)

    def _leave(self, client: Client, now_s: float) -> None:
        self._take_off(client, client.n_steps, now_s)
        client.on_done(client, now_s)

    def _take_off(self, client: Client, n_steps_done: float, now_s: float) -> None:
        client.is_gone = True
        mates = self._mates(client)
        freed = []
        for worker, demand_s in zip(client.workers, client.demand_s, strict=True):
            del worker.clients[client]
            worker.work_s += n_steps_done * demand_s
            if worker.is_full:
                freed.append(worker)
            if worker.clients:
                worker.alone_load -= demand_s * client.alone_per_s
                worker.is_full = worker.alone_load > FULL
            else:
                worker.alone_load = 0.0
                worker.is_full = False
                self._record_span(worker, now_s)
                worker.work_s = 0.0
        if mates:
            self._share_with(mates, freed, now_s)
        elif freed:
            self._share(freed, now_s)

    def _mates(self, client: Client) -> list[Client]:
        """Those on a worker of this client who wait for it, or it for them."""
        found: dict[Client, None] = {}
        alone_per_s = client.alone_per_s
        for worker, demand_s in zip(client.workers, client.demand_s, strict=True):
            if worker.has_waits:
                for other in worker.clients:
                    # a mate either way: nearness is relative to the one who waits
                    other_per_s = other.alone_per_s
                    if other_per_s != alone_per_s and (
                        wait_in_passing_s(other_per_s, alone_per_s, demand_s) > 0.0
                        or wait_in_passing_s(alone_per_s, other_per_s, worker.clients[other]) > 0.0
                    ):
                        found[other] = None
        return list(found)

    def _pace(self, client: Client) -> float:
        alone_per_s = client.alone_per_s
        longest_s = 0.0
        for worker in client.workers:
            if worker.has_waits:
                wait_s = 0.0
                for other, demand_s in worker.clients.items():
                    if other.alone_per_s != alone_per_s:
                        wait_s += wait_in_passing_s(alone_per_s, other.alone_per_s, demand_s)
                longest_s = max(longest_s, wait_s)
        return 1.0 / (1.0 / alone_per_s + longest_s) if longest_s > 0.0 else alone_per_s

    def _share_with(self, mates: Sequence[Client], seeds: list[ControlNetWorker], now_s: float) -> None:
        """As :meth:`_share`, after a change on which the mates' own paces depend."""
        changed = []
        for mate in mates:
            pace_per_s = self._pace(mate)
            if pace_per_s != mate.pace_per_s:
                mate.pace_per_s = pace_per_s
                changed.append(mate)
                seeds = [*seeds, *(worker for worker in mate.workers if worker.is_full and worker not in seeds)]
        if seeds:
            self._share(seeds, now_s)
        for mate in changed:
            if not any(worker.is_full for worker in mate.workers) and mate.rate_per_s != mate.pace_per_s:
                self._set_rate(mate, mate.pace_per_s, now_s)

    def _share(self, seeds: Iterable[ControlNetWorker], now_s: float) -> None:
        """Recomputes the rates of everybody connected to the seeds through full workers."""
        workers = list(seeds)
        local_worker = {worker: k for k, worker in enumerate(workers)}
        clients: dict[Client, int] = {}
        edge_client: list[int] = []
        edge_worker: list[int] = []
        edge_demand_s: list[float] = []
        for worker in workers:  # grows while it is walked
            for client, demand_s in worker.clients.items():
                k = clients.get(client)
                if k is None:
                    k = clients[client] = len(clients)
                    for other in client.workers:
                        if other.is_full and other not in local_worker:
                            local_worker[other] = len(workers)
                            workers.append(other)
                edge_client.append(k)
                edge_worker.append(local_worker[worker])
                edge_demand_s.append(demand_s)
        if not clients:
            return
        key = (
            tuple([client.pace_per_s for client in clients]),
            tuple(edge_client),
            tuple(edge_worker),
            tuple(edge_demand_s),
        )
        rates = self._memo.get(key)
        if rates is None:
            if len(self._memo) >= MEMO_MAX:
                self._memo.clear()
            rates = self._memo[key] = fair_step_rates(*key, len(workers))
        for client, rate_per_s in zip(clients, rates, strict=True):
            if rate_per_s != client.rate_per_s:
                self._set_rate(client, rate_per_s, now_s)

    def _set_rate(self, client: Client, rate_per_s: float, now_s: float) -> None:
        client.n_left -= client.rate_per_s * (now_s - client.updated_s)
        client.updated_s = now_s
        client.rate_per_s = rate_per_s
        client.finish_s = now_s + max(client.n_left, 0.0) / rate_per_s
        # a client slowed down is woken at its old time and sleeps again; only one sped up needs a new event
        if client.finish_s < client.scheduled_s:
            client.scheduled_s = client.finish_s
            self._env.call_at(client.finish_s, COMPLETION, self._on_wake, (client, client.finish_s))

    def _on_wake(self, event: Event) -> None:
        client, due_s = event._value
        if client.is_gone or due_s != client.scheduled_s:
            return
        if client.finish_s > due_s:
            client.scheduled_s = client.finish_s
            self._env.call_at(client.finish_s, COMPLETION, self._on_wake, (client, client.finish_s))
        else:
            self._leave(client, client.finish_s)
