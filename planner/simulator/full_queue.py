"""How requests come, wait, are turned away and taken up: admission, order, batches, second attempts of clients."""

from __future__ import annotations

from simpy.events import Event

from engine.policies.admission import UNLIMITED, can_meet_deadline, is_admitted, wait_estimate_s
from engine.policies.batching import batch_of, is_ripe
from engine.policies.queue_order import next_in_line
from planner.simulator.environment import ARRIVAL, COMPLETION, EXPIRY
from planner.simulator.full_jobs import FullJobs
from planner.simulator.replicas import BaseReplica
from planner.simulator.waiting import Key, LaneName

MASK = (1 << 64) - 1


class FullQueue(FullJobs):
    """The queue and what decides about it."""

    def _on_arrival(self, event: Event) -> None:
        i: int = event._value
        if i + 1 < self.n_requests:
            self.env.call_at(self.arrival_s[i + 1], ARRIVAL, self._on_arrival, i + 1)
        self._ask(i, self.arrival_s[i])

    def _on_retry(self, event: Event) -> None:
        self._ask(event._value, self.env.now)

    def _ask(self, i: int, now_s: float) -> None:
        """A client asks, for the first time or again."""
        group_number = self.group_of[i]
        group = self.groups[group_number]
        tenants = self.room.tenants
        tenant = self.room.tenant[i]
        if not group.pools:
            self._end(i)
            self.recorder.turn_away(i, "rejected", "no pool can serve it", now_s)
            return
        if not self._can_be_in_time(i, now_s):
            self._reject(i, "it would miss its deadline", now_s)
            return
        starts_now = (
            tenants.may_run(tenant)
            and self._has_idle(i)
            and (self._batch_max is None or self._is_ripe(i, now_s, now_s))
        )
        if not starts_now:
            if not is_admitted(self.room.n_waiting(group_number), self.queue_limit):
                self._reject(i, "queue is full", now_s)
                return
            if not is_admitted(tenants.n_waiting[tenant], tenants.waiting_max[tenant]):
                self._reject(i, "its tenant has too many waiting", now_s)
                return
        self._join_room(i, now_s, None)
        self._dispatch(now_s)
        deadline_s = self.deadline_s[i]
        if i in self.room and deadline_s == deadline_s and i not in self._has_expiry:
            self._has_expiry.add(i)
            self.env.call_at(self.arrival_s[i] + deadline_s, EXPIRY, self._on_expiry, i)
        if i in self.room:
            self._poke(i, now_s)

    def _has_idle(self, i: int) -> bool:
        """Whether some idle replica can take the request."""
        return bool(self._usable(self.groups[self.group_of[i]].pools, self.controlnets[i]))

    def _poke(self, i: int, now_s: float) -> None:
        """Knative's activator tells its autoscaler at once of a request for a pool that has no replica."""
        for p, _ in self._stake_of(i):
            if self._fleet.n_wanted[p] == 0 and self._scalers[p].settings.kind == "kpa":
                self._fleet.set_wanted(p, 1, now_s)

    def _can_be_in_time(self, i: int, now_s: float) -> bool:
        slack_ratio = self._policies.admission_slack_ratio
        deadline_s = self.deadline_s[i]
        if slack_ratio is None or deadline_s != deadline_s:
            return True
        pools = self.groups[self.group_of[i]].pools
        n_ready = sum(self._fleet.n_ready(p) for p in pools)
        waiting_s = sum(
            self._alone_s[p][j] for p in pools[:1] for j in self.room.waiting() if self.group_of[j] == self.group_of[i]
        )
        left_s = sum(
            max(0.0, job.start_s + self._alone_s[job.replica.pool][job.requests[0]] - now_s)
            for job in self._jobs.values()
            if job.replica.pool in pools
        )
        wait_s = now_s - self.arrival_s[i] + wait_estimate_s(waiting_s, left_s, n_ready)
        if self._has_idle(i):
            wait_s = now_s - self.arrival_s[i]
        return can_meet_deadline(wait_s, self._alone_s[pools[0]][i], deadline_s, slack_ratio)

    def _reject(self, i: int, reason: str, now_s: float) -> None:
        retries = self._world.retries
        n = self._n_rejections[i] = self._n_rejections.get(i, 0) + 1
        if retries is not None and n <= retries.n_max:
            again_s = now_s + retries.wait_s(n, self._uniform(i, n))
            deadline_s = self.deadline_s[i]
            if deadline_s != deadline_s or again_s < self.arrival_s[i] + deadline_s:
                self.env.call_at(again_s, ARRIVAL, self._on_retry, i)
                return
        self._end(i)
        self.recorder.turn_away(i, "rejected", reason if n == 1 else f"{reason}, asked {n} times", now_s)

    def _uniform(self, i: int, attempt: int) -> float:
        """In [0, 1), by request, attempt and seed: SplitMix64's finaliser."""
        bits = (self._request_key[i] ^ (self._world.seed * 0x9E3779B97F4A7C15) ^ (attempt << 32)) & MASK
        bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & MASK
        return float(((bits ^ (bits >> 31)) >> 11) * 2.0**-53)

    def _on_expiry(self, event: Event) -> None:
        i: int = event._value
        if i in self.room:
            now_s = self.env.now
            self._leave_room(i, now_s)
            self._end(i)
            self.recorder.turn_away(i, "expired", "deadline passed in the queue", now_s)

    def _join_room(self, i: int, now_s: float, key: Key | None) -> None:
        group = self.groups[self.group_of[i]]
        needs = self.controlnets[i] if any(self._is_decoupled[p] for p in group.pools) else ()
        self._place_in_line[i] = self.room.join(
            i, now_s, self._alone_s[group.pools[0]][i], tuple(sorted(set(needs))), key
        )
        for p, share in self._stake_of(i):
            self._sights[p].ongoing.add(share, now_s)

    def _leave_room(self, i: int, now_s: float) -> None:
        self.room.leave(i)
        for p, share in self._stake_of(i):
            self._sights[p].ongoing.add(-share, now_s)

    def _is_open(self, name: LaneName) -> bool:
        return bool(self._usable(self.groups[name.group].pools, name.needs))

    def _is_ripe(self, i: int, joined_s: float, now_s: float) -> bool:
        most = self._batch_max or 0
        kind = self._kinds[i] if self._kinds is not None else -1
        waiting = self.room.samples_of_kind(kind, self.group_of[i]) + (0 if i in self.room else self._samples[i])
        return is_ripe(now_s, joined_s, self._policies.batch_window_s, self._samples[i], waiting, most)

    def _dispatch(self, now_s: float) -> None:
        """Takes up whatever can start now."""
        while len(self.room) and any(self.idle):
            heads = self.room.heads(self._is_open)
            if self._batch_max is not None and self._policies.batch_window_s > 0:
                ripe = [head for head in heads if self._is_ripe(head[1], self.room.joined_s[head[1]], now_s)]
                self._ripen(heads, now_s)
                heads = ripe
            if not heads:
                return
            chosen = self._pass_over(heads, now_s)
            _, lead, name = heads[chosen]
            index = self._best_idle_of(lead)
            chosen_replica = self.replicas[index]
            members = self._company(lead, name, chosen_replica)
            for i in members:
                self._place_in_line[i] = self.room.take(i)
                for p, share in self._stake_of(i):
                    self._sights[p].ongoing.add(-share, now_s)
            self.idle[chosen_replica.pool].remove(index)
            self._begin(members, chosen_replica, now_s)

    def _pass_over(self, heads: list[tuple[Key, int, LaneName]], now_s: float) -> int:
        """Index of the head to start, with bounded overtaking."""
        policies = self._policies
        if policies.overtake_max == 0 and policies.switch_overtake_max == 0:
            return 0
        ready, resident, passed = [], [], []
        for _, i, _ in heads:
            best = self.replicas[self._best_idle_of(i)]
            ready.append(all(self._has_lora(best, lora, now_s) for lora in self.loras[i]))
            resident.append(best.device.holds(self.checkpoint[i]))
            passed.append(self._n_overtaken.get(i, 0))
        chosen = next_in_line(ready, resident, passed, policies.overtake_max, policies.switch_overtake_max)
        key = heads[chosen][0]
        names = {name for _, _, name in heads}
        for i in self.room.waiting():
            if self._place_in_line[i] < key and self.room.name_of(i) in names:
                self._n_overtaken[i] = self._n_overtaken.get(i, 0) + 1
        return chosen

    def _ripen(self, heads: list[tuple[Key, int, LaneName]], now_s: float) -> None:
        """Looks again when the next window ends."""
        window_s = self._policies.batch_window_s
        ends = [self.room.joined_s[i] + window_s for _, i, _ in heads]
        ends = [end_s for end_s in ends if end_s > now_s]
        if ends and (min(ends) < self._ripening_s or self._ripening_s <= now_s):
            self._ripening_s = min(ends)
            self.env.call_at(self._ripening_s, COMPLETION, lambda _: self._dispatch(self.env.now), None)

    def _company(self, lead: int, name: LaneName, chosen: BaseReplica) -> list[int]:
        if self._batch_max is None or self.tables[chosen.pool].is_remote[lead]:
            return [lead]
        others = [i for _, i in self.room.of_kind(name.kind, name.group)]
        tenants = self.room.tenants
        left = dict.fromkeys((self.room.tenant[i] for i in others), 0)
        is_free = []
        for i in others:
            tenant = self.room.tenant[i]
            limit = tenants.running_max[tenant]
            left[tenant] += 1
            within = limit == UNLIMITED or tenants.n_running[tenant] + left[tenant] <= limit
            is_free.append(within and self._n_attempts.get(i, 0) == 0)
        samples = [self._samples[i] for i in others]
        chosen_rows = batch_of(others.index(lead), [name.kind] * len(others), samples, is_free, self._batch_max)
        return [others[k] for k in chosen_rows]
