"""Which HTTP status says how a job ended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from engine.frontdoor.refusal import RequestRefusedError
from engine.serving.job import Outcome, OutcomeCode

STATUS_OF_CODE: Final[Mapping[OutcomeCode, int]] = {
    "queue_full": 429, "tenant_limit": 429, "deadline_unreachable": 429, "not_admitting": 503, "unservable": 422,
    "lora_refused": 422, "deadline": 504, "cancelled": 499, "worker_lost": 503, "job_error": 422,
}  # fmt: skip
RETRY_AFTER_S: Final[Mapping[OutcomeCode, float]] = {"worker_lost": 1.0, "not_admitting": 5.0, "queue_full": 1.0,
                                                     "tenant_limit": 1.0, "deadline_unreachable": 1.0}  # fmt: skip
"""Where the outcome says nothing about it."""


def refusal_of_outcome(outcome: Outcome) -> RequestRefusedError:
    """The refusal for an outcome that is not ``done``; 500 for one whose code is not known here."""
    reason = outcome.reason or f"The job ended as {outcome.status}."
    status = STATUS_OF_CODE.get(outcome.code, 500)
    retry_after_s = outcome.retry_after_s if outcome.retry_after_s is not None else RETRY_AFTER_S.get(outcome.code)
    if status not in (429, 503):
        retry_after_s = None
    return RequestRefusedError(status, outcome.code or "job_failed", reason, retry_after_s=retry_after_s)
