"""What a base replica does with what it takes up: load, fetch, denoise alone or with ControlNet workers, decode; or lose it."""

from __future__ import annotations

from bisect import insort

from simpy.events import Event

from planner.simulator.coupling import Client
from planner.simulator.environment import COMPLETION
from planner.simulator.full_state import FullState, Job
from planner.simulator.lora_tiers import Fetching
from planner.simulator.model import Table
from planner.simulator.replicas import BaseReplica


class FullJobs(FullState):
    """Jobs, from take-up to their end."""

    def _begin(self, requests: list[int], chosen: BaseReplica, now_s: float) -> None:
        lead = requests[0]
        table = self.tables[chosen.pool]
        job = Job(requests, chosen, now_s)
        self._jobs[chosen.index] = job
        self._last_taken_s = now_s
        for i in requests:
            self.recorder.start(i, chosen.index, now_s)
            self.room.tenants.n_running[self.room.tenant[i]] += 1
        self._sights[chosen.pool].ongoing.add(len(requests), now_s)
        self._sights[chosen.pool].busy.add(1.0, now_s)
        for p in self._controlnet_pools_of(job):
            self._sights[p].ongoing.add(len(requests), now_s)
        is_remote = table.is_remote[lead]
        switch_s, load_s = self._load_models(lead, chosen, table, is_remote)
        for i in requests[1:]:
            self.recorder.switch_s[i], self.recorder.controlnet_load_s[i] = switch_s, load_s
        clock = self._clocks[chosen.pool]
        if clock is not None and len(requests) > 1:
            n_samples = sum(self._samples[i] for i in requests)
            job.stages_s = clock.stages_s(lead, n_samples, sum(self._n_images[i] for i in requests))
            for i in requests:
                self.recorder.stage_s[i] = job.stages_s
        if is_remote:
            placement = self.placer.place_from(chosen.pool, lead, table.parts, now_s)
            job.placement = placement
            self.recorder.n_controlnet_misses[lead] = placement.n_misses
            job.prepared_s = now_s + switch_s + table.text_s[lead]
            exposed_s = max(0.0, placement.ready_s - job.prepared_s)
            self.recorder.controlnet_load_s[lead] = load_s = exposed_s
        job.ready_s = now_s + (switch_s + load_s)
        if self._tiers is None or not self.loras[lead]:
            self._fetch_at_once(job, table)
            self._compute(job, table, switch_s, load_s)
            return

        def there(end_s: float) -> None:
            if job.is_over or job.fetching is None:
                return
            fetching = job.fetching
            job.fetching = None
            fetching.release()
            self._fetched(job, table, fetching.n_fetched, end_s)
            if job.placement is None and not is_remote:
                self._compute(job, table, switch_s, load_s)
            elif job.denoised_s is not None:
                self._decode(job, job.denoised_s)

        if is_remote:  # denoising begins without them; what it does not hide is added at its end
            self._compute(job, table, switch_s, load_s)
        tier = self._tiers[chosen.index]
        job.fetching = Fetching(tier, self._store, self._lora_bytes, table.lora_fetch_s, self.loras[lead], there)
        job.fetching.go(now_s)

    def _fetch_at_once(self, job: Job, table: Table) -> None:
        """LoRAs as in the static model: the time of every fetch is known, and nobody else uses the tier meanwhile."""
        lead = job.requests[0]
        if not self.loras[lead]:
            return
        fetch_s = 0.0
        host = job.replica.host_loras
        n_fetched = 0
        for lora in self.loras[lead]:
            if not host.touch(lora):
                fetch_s += table.lora_fetch_s[lora]
                n_fetched += 1
                host.insert(lora)
        self._fetched(job, table, n_fetched, job.start_s + fetch_s, fetch_s)

    def _fetched(self, job: Job, table: Table, n_fetched: int, end_s: float, fetch_s: float | None = None) -> None:
        lead = job.requests[0]
        took_s = end_s - job.start_s if fetch_s is None else fetch_s
        exposed_s = max(0.0, took_s - table.lora_hidden_s[lead])
        job.lora_wait_s = exposed_s + table.attach_detach_s[lead]
        job.ready_s += exposed_s
        self.recorder.n_lora_misses[lead] = n_fetched
        for i in job.requests:
            self.recorder.lora_fetch_s[i] = exposed_s
            self.recorder.lora_wait_s[i] = job.lora_wait_s

    def _compute(self, job: Job, table: Table, switch_s: float, load_s: float) -> None:
        """Everything is there, or known when it will be: the rest follows."""
        lead = job.requests[0]
        if job.placement is None:
            compute_s = table.compute_s[lead] if job.stages_s is None else sum(job.stages_s)
            end_s = job.start_s + (switch_s + load_s + job.lora_wait_s + compute_s)
            self.env.call_at(end_s, COMPLETION, self._on_job_end, (job, end_s))
            return
        # what denoising does not hide comes before the first step where it is known, else after the last
        begin_s = job.prepared_s + load_s + job.lora_wait_s
        self.env.call_at(begin_s, COMPLETION, self._on_job_denoise, job)

    def _on_job_denoise(self, event: Event) -> None:
        job: Job = event._value
        if job.is_over or job.placement is None:
            return
        i = job.requests[0]
        now_s = self.env.now
        placement = job.placement
        n_steps = self.n_steps[i] * self.tables[job.replica.pool].noise_ratio[i]
        self.recorder.denoise_start_s[i] = now_s
        self.recorder.denoise_alone_s[i] = n_steps * placement.period_s

        def done(client: Client, end_s: float) -> None:
            job.client = None
            self._release_placement(job, end_s)
            self.recorder.denoise_s[i] = end_s - self.recorder.denoise_start_s[i]
            if job.fetching is None:
                self._decode(job, end_s)
            else:
                job.denoised_s = end_s

        job.client = Client(i, n_steps, 1.0 / placement.period_s, placement.workers, placement.demand_s, done)
        self.coupling.join(job.client, now_s)

    def _decode(self, job: Job, denoised_s: float) -> None:
        lead = job.requests[0]
        end_s = denoised_s + self.decode_s[job.replica.pool][lead]
        if self._tiers is not None:
            end_s += job.lora_wait_s
        self.env.call_at(end_s, COMPLETION, self._on_job_end, (job, end_s))

    def _release_placement(self, job: Job, now_s: float) -> None:
        placement = job.placement
        if placement is None:
            return
        for p in self._controlnet_pools_of(job):
            self._sights[p].ongoing.add(-len(job.requests), now_s)
        workers = placement.workers[: len(placement.workers) - placement.n_lines]
        self.placer.release(placement)
        job.placement = None
        for worker in workers:
            member = self._member_of[len(self.replicas) + worker.index]
            if worker.n_attached == 0:
                self._fleet.released(member, now_s)

    def _on_job_end(self, event: Event) -> None:
        job, end_s = event._value
        if job.is_over:
            return
        self._stop(job, end_s)
        for i in job.requests:
            self.recorder.end_s[i] = end_s
            self._end(i)
        member = self._member_of[job.replica.index]
        if member.state == "ready":
            insort(self.idle[job.replica.pool], job.replica.index)
        else:
            self._fleet.released(member, end_s)
        self._dispatch(end_s)

    def _stop(self, job: Job, now_s: float) -> None:
        """The replica has nothing more to do with the job."""
        job.is_over = True
        del self._jobs[job.replica.index]
        self.recorder.base_span(job.replica.index, job.start_s, job.ready_s, now_s)
        self._sights[job.replica.pool].ongoing.add(-len(job.requests), now_s)
        self._sights[job.replica.pool].busy.add(-1.0, now_s)
        for i in job.requests:
            self.room.tenants.n_running[self.room.tenant[i]] -= 1
        if job.fetching is not None:
            job.fetching.release()
