"""Weighted fairness between tenants: start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996).

A waiting request carries a start tag and requests go by tags; service is shared out by weight, whatever each tenant asks for,
and a tenant that was away cannot save its share up. The state is one virtual time for all and one finish tag a tenant.
"""

from __future__ import annotations


def start_tag(virtual: float, last_finish: float) -> float:
    """Tag of a request that joins: no earlier than the one in service, nor than its tenant's last one is over."""
    return max(virtual, last_finish)


def finish_tag(start: float, cost: float, weight: float) -> float:
    """When the tenant's next request may begin: the cost (any unit, the same for all) over the tenant's weight later."""
    return start + cost / weight


def virtual_after(virtual: float, tag_served: float) -> float:
    """Virtual time once a request with this tag is taken up."""
    return max(virtual, tag_served)
