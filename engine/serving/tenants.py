"""What each tenant may have and has: limits on running and waiting jobs, and its place under weighted fairness."""

from __future__ import annotations

from collections.abc import Mapping

from engine.allocation import Policies, TenantShare
from engine.policies.admission import UNLIMITED, may_run
from engine.policies.fair_share import finish_tag, start_tag, virtual_after

UNUSED_TAGS_MAX = 10_000


def or_unlimited(limit: int | None) -> int:
    """A limit as the policies take it."""
    return UNLIMITED if limit is None else limit


class Tenants:
    """Counts of running jobs and fair-queueing tags. Nothing is held of a tenant that has caught up and runs nothing."""

    def __init__(self, policies: Policies) -> None:
        self._running: dict[str, int] = {}
        self._finish: dict[str, float] = {}
        self._virtual = 0.0
        self.set_policies(policies)

    def set_policies(self, policies: Policies) -> None:
        """Other limits and weights from now on."""
        self._shares: Mapping[str, TenantShare] = {share.tenant_id: share for share in policies.tenants}
        self._policies = policies

    @property
    def n_running(self) -> int:
        """Running jobs of all tenants."""
        return sum(self._running.values())

    def running(self) -> dict[str, int]:
        """Running jobs of those tenants that have any."""
        return dict(self._running)

    def running_max(self, tenant_id: str) -> int:
        """Most jobs of a tenant that may run at the same time."""
        share = self._shares.get(tenant_id)
        own = share.running_max if share is not None else None
        return or_unlimited(self._policies.tenant_running_max if own is None else own)

    def waiting_max(self, tenant_id: str) -> int:
        """Most jobs of a tenant that may wait."""
        share = self._shares.get(tenant_id)
        own = share.waiting_max if share is not None else None
        return or_unlimited(self._policies.tenant_waiting_max if own is None else own)

    def may_run(self, tenant_id: str) -> bool:
        """Whether one more job of a tenant may run."""
        return may_run(self._running.get(tenant_id, 0), self.running_max(tenant_id))

    def started(self, tenant_id: str, tag: float) -> None:
        """A job with this tag was taken up."""
        self._running[tenant_id] = self._running.get(tenant_id, 0) + 1
        self._virtual = virtual_after(self._virtual, tag)

    def given_back(self, tenant_id: str) -> None:
        """A job does not run any more."""
        self._running[tenant_id] -= 1
        if self._running[tenant_id] == 0:
            del self._running[tenant_id]

    def tag(self, tenant_id: str, cost: float) -> float:
        """Place of a job that joins the queue under ``queue_order`` 'weighted_tenants'; 0 under the others."""
        if self._policies.queue_order != "weighted_tenants":
            return 0.0
        share = self._shares.get(tenant_id)
        tag = start_tag(self._virtual, self._finish.get(tenant_id, 0.0))
        self._finish[tenant_id] = finish_tag(tag, cost, share.weight if share is not None else 1.0)
        if len(self._finish) > UNUSED_TAGS_MAX:  # what lies behind the virtual time says nothing any more
            self._finish = {name: finish for name, finish in self._finish.items() if finish > self._virtual}
        return tag
