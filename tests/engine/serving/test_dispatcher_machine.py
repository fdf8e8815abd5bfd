"""The dispatcher under any order of events: a state machine that Hypothesis drives, with a model of what is true outside."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.allocation import Policies, TenantShare
from engine.serving.dispatcher import DispatchLimits
from engine.serving.job import Outcome, StageSeconds, WorkerResult
from engine.serving.ports import Start
from tests.engine.serving.fakes import World

BASES = ("b0", "b1", "b2")
NETS = ("c0", "c1")
LORAS = ("l0", "l1", "l2")
CACHE_BYTES = 200
REQUEST_LIMIT_S = 50.0
POLICIES = st.builds(
    Policies,
    queue_limit=st.sampled_from([None, None, 3]),
    lora_prefetch_depth=st.sampled_from([0, 2]),
    overtake_max=st.sampled_from([0, 2]),
    switch_overtake_max=st.sampled_from([0, 1]),
    forward_batch_max=st.sampled_from([None, 4, 8]),
    batch_window_s=st.sampled_from([0.0, 0.0, 2.0]),
    admission_slack_ratio=st.sampled_from([None, 1.0]),
    tenant_running_max=st.sampled_from([None, 1]),
    tenant_waiting_max=st.sampled_from([None, 2]),
    retry_max=st.sampled_from([0, 1, 2]),
    queue_order=st.sampled_from(["fifo", "priority", "weighted_tenants"]),
    tenants=st.sampled_from([(), (TenantShare("t", weight=3.0, running_max=1),)]),
    lora_cache_policy=st.sampled_from(["lru", "lru", "lfu"]),
)
JOBS = st.fixed_dictionaries(
    {
        "base_model_id": st.sampled_from(["x", "x", "y"]),
        "n_images": st.integers(1, 3),
        "n_steps": st.sampled_from([1, 30]),
        "controls": st.lists(st.sampled_from(["n0", "n1"]), max_size=2),
        "loras": st.lists(st.sampled_from(LORAS), max_size=2),
        "tenant_id": st.sampled_from(["t", "u"]),
        "priority": st.integers(0, 1),
        "deadline_s": st.sampled_from([None, None, 0.0, 3.0, 20.0]),
    }
)


class Watched(World):
    """Checks every action against the world at that moment."""

    def __init__(self, policies: Policies) -> None:
        self.policies = policies
        self.up: dict[str, bool] = {}
        """Base to whether it drains."""
        self.nets: dict[str, bool] = {}
        self.pairs: set[tuple[str, str]] = set()
        self.arrivals: dict[str, tuple[float, float]] = {}
        self.attempts: dict[str, int] = {}
        self.tenants: dict[str, str] = {}
        self.files: dict[str, str] = {}
        """LoRA to its file in the host tier."""
        self.in_flight: set[str] = set()
        self.quarantined: set[str] = set()
        limits = DispatchLimits(request_limit_s=REQUEST_LIMIT_S, n_waiting_max=12, fetch_limit_s=15.0)
        super().__init__(policies, limits=limits, lora_cache_bytes=CACHE_BYTES)

    def start(self, start: Start) -> None:
        super().start(start)
        assert self.up.get(start.worker_id) is False, "started on a replica that is absent or draining"
        forward_batch = sum(job.forward_batch for job in start.jobs)
        if len(start.jobs) > 1:
            assert forward_batch <= (self.policies.forward_batch_max or 0)
        for job in start.jobs:
            assert job.request_id not in self.outcomes, "started after its end"
            arrival_s, deadline_at_s = self.arrivals[job.request_id]
            assert arrival_s <= self.now_s < deadline_at_s, "started after its deadline"
            self.attempts[job.request_id] = self.attempts.get(job.request_id, 0) + 1
            assert self.attempts[job.request_id] <= 1 + self.policies.retry_max
            (workers,) = start.controlnet_workers
            assert set(workers) == {use.controlnet_id for use in job.controls}
            assert set(start.lora_paths) == {use.lora_id for use in job.loras}
            assert not self.quarantined.intersection(start.lora_paths), "started with a refused LoRA"
        if len(start.jobs) > 1:
            assert start.attempt == 1, "tried again in company"
        assert start.attempt == max(self.attempts[job.request_id] for job in start.jobs)
        others = [
            job.request_id for worker, held in self.running.items() if worker != start.worker_id for job in held.jobs
        ]
        assert not {job.request_id for job in start.jobs}.intersection(
            name for name in others if name not in self.given_up()
        ), "runs twice at once"
        for worker in start.controlnet_workers[0].values():
            assert self.nets.get(worker) is False, "uses a ControlNet worker that is absent or draining"
            assert (start.worker_id, worker) in self.pairs, "uses a ControlNet worker that is not attached"
        for lora_id, path in start.lora_paths.items():
            assert path == self.files.get(lora_id), "a file that is not there, or is and was not named"
            assert path is not None or lora_id in self.in_flight, "waits for a LoRA that nobody fetches"
        own = {share.tenant_id: share.running_max for share in self.policies.tenants}
        for tenant in {job.tenant_id for job in start.jobs}:
            n_running = sum(
                job.tenant_id == tenant and job.request_id not in self.outcomes
                for held in self.running.values()
                for job in held.jobs
            )
            limit = own.get(tenant, self.policies.tenant_running_max)
            assert limit is None or n_running <= limit

    def given_up(self) -> set[str]:
        return {name for _, name in self.cancelled}

    def cancel(self, worker_id: str, request_id: str) -> None:
        super().cancel(worker_id, request_id)
        assert request_id in {job.request_id for job in self.running[worker_id].jobs}

    def fetch_lora(self, lora_id: str) -> None:
        super().fetch_lora(lora_id)
        assert lora_id not in self.in_flight, "fetched twice at once"
        assert lora_id not in self.files, "fetched although it is there"
        self.in_flight.add(lora_id)

    def drop_lora(self, lora_id: str, path: str) -> None:
        super().drop_lora(lora_id, path)
        assert lora_id not in {name for held in self.running.values() for name in held.lora_paths}, (
            "dropped while in use"
        )
        assert self.files.pop(lora_id) == path

    def finish(self, outcome: Outcome) -> None:
        super().finish(outcome)
        arrival_s, deadline_at_s = self.arrivals[outcome.request_id]
        assert outcome.arrival_s == arrival_s
        assert outcome.end_s == self.now_s
        assert (
            (outcome.status == "done") == (outcome.code == "") == (outcome.reason == "") == (outcome.result is not None)
        )
        if outcome.status == "done":
            assert outcome.end_s < deadline_at_s, "done after its deadline"
        if outcome.status == "expired":
            assert self.now_s >= deadline_at_s
        assert outcome.retry_after_s is None or outcome.status == "rejected"


class DispatcherMachine(RuleBasedStateMachine):
    """Random submits, ups and downs, ends, failures, cancels and ticks."""

    @initialize(policies=POLICIES)
    def begin(self, policies: Policies) -> None:
        self.world = Watched(policies)
        self.n = 0
        for worker in BASES[:2]:
            self.bring_up(worker)

    def bring_up(self, worker: str) -> None:
        self.world.up[worker] = False
        self.world.base(worker)

    @rule(fields=JOBS)
    def submit(self, fields: dict[str, Any]) -> None:
        name = f"r{self.n}"
        self.n += 1
        own_s = fields["deadline_s"] if fields["deadline_s"] is not None else REQUEST_LIMIT_S
        self.world.arrivals[name] = (self.world.now_s, self.world.now_s + min(own_s, REQUEST_LIMIT_S))
        self.world.submit(name, **fields)

    @rule(worker=st.sampled_from(BASES))
    def base_up(self, worker: str) -> None:
        if worker not in self.world.up:
            self.bring_up(worker)

    @rule(worker=st.sampled_from(BASES))
    def base_draining(self, worker: str) -> None:
        if worker in self.world.up:
            self.world.up[worker] = True
            self.world.dispatcher.base_draining(worker)

    @rule(worker=st.sampled_from(BASES))
    def base_down(self, worker: str) -> None:
        self.world.up.pop(worker, None)
        self.world.pairs = {pair for pair in self.world.pairs if pair[0] != worker}
        self.world.lose(worker)

    @rule(worker=st.sampled_from(NETS), hosted=st.sampled_from([("*",), ("n0",)]))
    def controlnet_up(self, worker: str, hosted: tuple[str, ...]) -> None:
        if worker not in self.world.nets:
            self.world.nets[worker] = False
            self.world.controlnet(worker, hosted, bases=())

    @rule(worker=st.sampled_from(NETS))
    def controlnet_draining(self, worker: str) -> None:
        if worker in self.world.nets:
            self.world.nets[worker] = True
            self.world.dispatcher.controlnet_draining(worker)

    @rule(worker=st.sampled_from(NETS))
    def controlnet_down(self, worker: str) -> None:
        self.world.nets.pop(worker, None)
        self.world.pairs = {pair for pair in self.world.pairs if pair[1] != worker}
        self.world.dispatcher.controlnet_down(worker, "killed")

    @rule(base=st.sampled_from(BASES), net=st.sampled_from(NETS))
    def attach(self, base: str, net: str) -> None:
        if base in self.world.up and net in self.world.nets:
            self.world.pairs.add((base, net))
            self.world.dispatcher.attached(base, net)

    @rule(base=st.sampled_from(BASES), net=st.sampled_from(NETS))
    def detach(self, base: str, net: str) -> None:
        self.world.pairs.discard((base, net))
        self.world.dispatcher.detached(base, net)

    @precondition(lambda self: self.world.running)
    @rule(data=st.data(), how=st.sampled_from(["done", "done", "done", "fault", "peer", "partly", "silent"]))
    def batch_ends(self, data: st.DataObject, how: str) -> None:
        worker = data.draw(st.sampled_from(sorted(self.world.running)))
        start = self.world.running.pop(worker)
        names = [job.request_id for job in start.jobs]
        result = WorkerResult(StageSeconds(), is_switch=data.draw(st.booleans()))
        if how == "done":
            self.world.dispatcher.batch_done(worker, dict.fromkeys(names, result))
        elif how == "silent":
            self.world.dispatcher.batch_done(worker, {})
        else:
            done = names[:1] if how == "partly" else []
            failures = {name: "broken" for name in names if name not in done}
            is_retryable = how == "peer"
            results = dict.fromkeys(done, result)
            self.world.dispatcher.batch_failed(worker, failures, is_retryable=is_retryable, done=results)

    @precondition(lambda self: self.world.in_flight)
    @rule(
        data=st.data(),
        n_bytes=st.sampled_from([90, 100, 300]),
        how=st.sampled_from(["there", "there", "later", "never"]),
    )
    def fetch_ends(self, data: st.DataObject, n_bytes: int, how: str) -> None:
        world = self.world
        lora_id = data.draw(st.sampled_from(sorted(world.in_flight)))
        world.in_flight.discard(lora_id)
        if how == "there":
            world.files[lora_id] = f"/host/{lora_id}-{len(world.fetches)}"
            world.dispatcher.lora_fetched(lora_id, world.files[lora_id], n_bytes)
        else:
            if how == "never":
                world.quarantined.add(lora_id)
            world.dispatcher.lora_refused(lora_id, "broken", is_final=how == "never")

    @rule(lora_id=st.sampled_from(LORAS))
    def pardon(self, lora_id: str) -> None:
        self.world.quarantined.discard(lora_id)
        self.world.dispatcher.lora_pardoned(lora_id)

    @precondition(lambda self: self.n > 0)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        name = f"r{data.draw(st.integers(0, self.n - 1))}"
        was_alive = name not in self.world.outcomes
        assert self.world.dispatcher.cancel(name) == was_alive
        assert name in self.world.outcomes

    @rule(seconds=st.sampled_from([0.0, 0.5, 2.0, 7.0, 16.0]))
    def time_passes(self, seconds: float) -> None:
        world = self.world
        world.now_s += seconds
        overdue = world.dispatcher.loras.overdue(world.now_s, 15.0)
        world.in_flight.difference_update(overdue)
        next_s = world.dispatcher.tick()
        assert next_s is None or next_s > world.now_s
        for name, (_, deadline_at_s) in world.arrivals.items():
            assert name in world.outcomes or deadline_at_s > world.now_s, "outlived its deadline"

    @invariant()
    def every_job_is_somewhere(self) -> None:
        if not hasattr(self, "world"):
            return
        world = self.world
        snapshot = world.dispatcher.snapshot()
        assert snapshot.n_submitted == self.n
        assert snapshot.n_submitted == snapshot.n_waiting + snapshot.n_running + sum(snapshot.n_ended.values())
        assert snapshot.n_waiting <= 12 + len(BASES) * 4  # jobs that are tried again come on top
        assert sum(snapshot.n_ended.values()) == len(world.outcomes)
        alive = {job.request_id for start in world.running.values() for job in start.jobs} - set(world.outcomes)
        assert {name for names in snapshot.running.values() for name in names} == alive
        for worker in BASES:
            assert world.dispatcher.is_idle(worker) == (worker not in world.running)
        used = {net for start in world.running.values() for net in start.controlnet_workers[0].values()}
        for net in NETS:
            assert world.dispatcher.is_idle(net) == (net not in used)

    @invariant()
    def pins_are_those_of_running_batches(self) -> None:
        if not hasattr(self, "world"):
            return
        world = self.world
        loras = world.dispatcher.loras
        assert loras.n_pins == sum(len(start.lora_paths) for start in world.running.values())
        assert 0 <= loras.used_bytes <= CACHE_BYTES
        assert {name for name in LORAS if loras.path_of(name) is not None} == set(world.files)

    def teardown(self) -> None:
        """Whatever happened, everything ends, and nothing of it is kept."""
        if not hasattr(self, "world"):
            return
        world = self.world
        for _ in range(200):
            for worker in sorted(world.running):
                world.done(worker)
            world.now_s += 5.0
            world.in_flight.difference_update(world.dispatcher.loras.overdue(world.now_s, 15.0))
            if world.dispatcher.tick() is None and not world.running:
                break
        assert set(world.outcomes) == set(world.arrivals)
        snapshot = world.dispatcher.snapshot()
        assert (snapshot.n_waiting, snapshot.n_running) == (0, 0)
        assert set(snapshot.n_waiting_by_pool.values()) <= {0}
        assert world.dispatcher.loras.n_pins == 0
        assert world.dispatcher.n_remembered() == 0


TestDispatcherMachine = DispatcherMachine.TestCase
TestDispatcherMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None, derandomize=True)
