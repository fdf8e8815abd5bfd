"""Who waits, in which order they are looked at, and who may be taken up now: queues with priorities, tenants and batches.

Requests that are alike in everything that decides whether and where they can start wait in one lane, in order; only the head of
a lane can be next, so a look costs the number of lanes that are not empty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Final

from engine.allocation import Policies
from engine.policies.admission import UNLIMITED, may_run
from engine.policies.fair_share import finish_tag, start_tag, virtual_after
from engine.policies.queue_order import queue_key
from planner.workload import Workload

Key = tuple[int, float, float, int]


@dataclass(frozen=True, slots=True)
class LaneName:
    """What the requests of a lane have in common."""

    group: int
    """Which base pools can serve them."""
    priority: int
    tenant: int
    kind: int
    """Requests of one kind may share a batch; -1 where that does not matter."""
    needs: tuple[int, ...]
    """ControlNets that must be on some worker that is up; () where no worker ever goes."""


class Lane:
    """Requests of one name, in order."""

    __slots__ = ("entries", "name")

    def __init__(self, name: LaneName) -> None:
        self.name = name
        self.entries: list[tuple[Key, int]] = []
        """A heap; may still hold requests that wait no more."""


class Tenants:
    """Limits, weights and what each tenant uses now."""

    def __init__(self, workload: Workload, policies: Policies) -> None:
        shares = {share.tenant_id: share for share in policies.tenants}
        n = len(workload.tenant_names)

        def limit(own: int | None, common: int | None) -> int:
            chosen = common if own is None else own
            return UNLIMITED if chosen is None else chosen

        self.weight = [1.0] * n
        self.running_max = [limit(None, policies.tenant_running_max)] * n
        self.waiting_max = [limit(None, policies.tenant_waiting_max)] * n
        for code, name in enumerate(workload.tenant_names):
            if name in shares:
                self.weight[code] = shares[name].weight
                self.running_max[code] = limit(shares[name].running_max, policies.tenant_running_max)
                self.waiting_max[code] = limit(shares[name].waiting_max, policies.tenant_waiting_max)
        self.n_running = [0] * n
        self.n_waiting = [0] * n
        self.is_limited = any(item != UNLIMITED for item in (*self.running_max, *self.waiting_max))
        self._finish = [0.0] * n
        self._virtual = 0.0

    def may_run(self, tenant: int) -> bool:
        """Whether one more of the tenant's requests may run."""
        return may_run(self.n_running[tenant], self.running_max[tenant])

    def tag(self, tenant: int, cost_s: float) -> float:
        """Start tag of a request that joins the queue; its cost is its service when alone."""
        start = start_tag(self._virtual, self._finish[tenant])
        self._finish[tenant] = finish_tag(start, cost_s, self.weight[tenant])
        return start

    def serve(self, tag: float) -> None:
        """A request with this tag is taken up."""
        self._virtual = virtual_after(self._virtual, tag)


NO_TENANT: Final = -1


class WaitingRoom:
    """All waiting requests."""

    def __init__(self, workload: Workload, policies: Policies, group_of: list[int], kinds: list[int] | None) -> None:
        self._order = policies.queue_order
        self._group_of = group_of
        self._kinds = kinds
        self._priority: list[int] = workload.priority.tolist() if self._order != "fifo" else [0] * len(workload)
        self.tenant: list[int] = workload.tenant.tolist()
        self.tenants = Tenants(workload, policies)
        self._splits_tenants = self.tenants.is_limited or self._order == "weighted_tenants"
        self._samples: list[int] = workload.forward_batch.tolist()
        self._lanes: dict[LaneName, Lane] = {}
        self._lanes_of_kind: dict[tuple[int, int], dict[LaneName, Lane]] = {}
        self._samples_of_kind: dict[tuple[int, int], int] = {}
        self._key: dict[int, Key] = {}
        """Of the requests that wait now."""
        self._name: dict[int, LaneName] = {}
        self.n_of_group: dict[int, int] = {}
        self.joined_s: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self._key)

    def __contains__(self, i: int) -> bool:
        return i in self._key

    def n_waiting(self, group: int) -> int:
        """Waiting requests of a group."""
        return self.n_of_group.get(group, 0)

    def join(self, i: int, now_s: float, cost_s: float, needs: tuple[int, ...], key: Key | None = None) -> Key:
        """Puts a request into its lane; with ``key``, at the place that it had before."""
        tenant = self.tenant[i]
        if key is None:
            tag = self.tenants.tag(tenant, cost_s) if self._order == "weighted_tenants" else 0.0
            key = queue_key(self._priority[i], tag, now_s, i)
        name = LaneName(
            self._group_of[i],
            self._priority[i],
            tenant if self._splits_tenants else NO_TENANT,
            self._kinds[i] if self._kinds is not None else -1,
            needs,
        )
        lane = self._lanes.get(name)
        if lane is None:
            lane = self._lanes[name] = Lane(name)
            self._lanes_of_kind.setdefault((name.kind, name.group), {})[name] = lane
        heappush(lane.entries, (key, i))
        self._key[i] = key
        self._name[i] = name
        self.joined_s[i] = now_s
        self.n_of_group[name.group] = self.n_of_group.get(name.group, 0) + 1
        alike = name.kind, name.group
        self._samples_of_kind[alike] = self._samples_of_kind.get(alike, 0) + self._samples[i]
        self.tenants.n_waiting[tenant] += 1
        return key

    def leave(self, i: int) -> Key:
        """Takes a request out, whatever its place; returns that place."""
        name = self._name.pop(i)
        key = self._key.pop(i)
        del self.joined_s[i]
        self.n_of_group[name.group] -= 1
        self._samples_of_kind[name.kind, name.group] -= self._samples[i]
        self.tenants.n_waiting[self.tenant[i]] -= 1
        lane = self._lanes[name]
        self._clean(lane)
        if not lane.entries:
            del self._lanes[name]
            del self._lanes_of_kind[name.kind, name.group][name]
        return key

    def take(self, i: int) -> Key:
        """As :meth:`leave`, for a request that is taken up."""
        key = self.leave(i)
        if self._order == "weighted_tenants":
            self.tenants.serve(key[1])
        return key

    def heads(self, is_open: Callable[[LaneName], bool]) -> list[tuple[Key, int, LaneName]]:
        """First of every lane that may go now, in the order in which they should."""
        found = []
        for name, lane in self._lanes.items():
            if (name.tenant == NO_TENANT or self.tenants.may_run(name.tenant)) and is_open(name):
                key, i = lane.entries[0]
                found.append((key, i, name))
        found.sort(key=lambda item: item[0])
        return found

    def samples_of_kind(self, kind: int, group: int) -> int:
        """Forward samples of all waiting requests of one kind and group."""
        return self._samples_of_kind.get((kind, group), 0)

    def of_kind(self, kind: int, group: int) -> list[tuple[Key, int]]:
        """Waiting requests of one kind and group, in order."""
        found = [
            entry
            for lane in self._lanes_of_kind.get((kind, group), {}).values()
            for entry in lane.entries
            if self._key.get(entry[1]) == entry[0]
        ]
        found.sort()
        return found

    def name_of(self, i: int) -> LaneName:
        """The lane that a waiting request is in."""
        return self._name[i]

    def waiting(self) -> Iterator[int]:
        """Every waiting request, in no particular but a fixed order."""
        return iter(self._key)

    def _clean(self, lane: Lane) -> None:
        entries = lane.entries
        while entries and self._key.get(entries[0][1]) != entries[0][0]:
            heappop(entries)
