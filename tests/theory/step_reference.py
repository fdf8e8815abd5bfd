"""Denoising with shared ControlNet workers, one event a step: what the constant-rate model approximates."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from planner.simulator.coupling import Client, Coupling
from planner.simulator.environment import ARRIVAL, ExactEnvironment
from planner.simulator.replicas import Cache, ControlNetWorker
from tests.simulation_builders import controlnet_pool


@dataclass(frozen=True)
class Denoiser:
    """A request that denoises: per step, encoder beside its forwards on workers, then the tail."""

    start_s: float
    n_steps: int
    forward_s: tuple[tuple[int, float], ...]
    """(worker, seconds) of each worker it uses."""
    encoder_s: float = 0.04
    transfer_s: float = 0.01
    tail_s: float = 0.06

    @property
    def period_s(self) -> float:
        return max(self.encoder_s, max(s for _, s in self.forward_s) + self.transfer_s) + self.tail_s


def denoise_by_steps(clients: Sequence[Denoiser]) -> list[float]:
    """Seconds each client takes, with first-come-first-served workers that serve one forward at a time."""
    free_s: dict[int, float] = {}
    done_s = [0.0] * len(clients)
    steps = [(client.start_s, k, 0) for k, client in enumerate(clients)]
    heapq.heapify(steps)
    while steps:  # steps begin in order of time, so forwards reach a worker in order of time too
        now_s, k, n = heapq.heappop(steps)
        client = clients[k]
        joined_s = now_s + client.encoder_s
        for worker, forward_s in client.forward_s:
            free_s[worker] = max(free_s.get(worker, 0.0), now_s) + forward_s
            joined_s = max(joined_s, free_s[worker] + client.transfer_s)
        end_s = joined_s + client.tail_s
        if n + 1 < client.n_steps:
            heapq.heappush(steps, (end_s, k, n + 1))
        else:
            done_s[k] = end_s - client.start_s
    return done_s


def denoise_by_rates(clients: Sequence[Denoiser]) -> list[float]:
    """The same by the simulator's coupling."""
    env = ExactEnvironment()
    coupling = Coupling(env, lambda worker, end_s: None)
    n_workers = 1 + max(worker for client in clients for worker, _ in client.forward_s)
    workers = [ControlNetWorker(w, controlnet_pool(1), f"w{w}", Cache([], 0), Cache([], 0)) for w in range(n_workers)]
    done_s = [0.0] * len(clients)

    def start(k: int) -> None:
        client = clients[k]

        def end(_: Client, end_s: float) -> None:
            done_s[k] = end_s - client.start_s

        users = [workers[w] for w, _ in client.forward_s]
        demand_s = [seconds for _, seconds in client.forward_s]
        coupling.join(Client(k, client.n_steps, 1.0 / client.period_s, users, demand_s, end), client.start_s)

    for k, client in enumerate(clients):
        env.call_at(client.start_s, ARRIVAL, lambda event: start(event._value), k)
    env.run()
    return done_s
