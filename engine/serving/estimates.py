"""How long a job is likely to take, learnt from those that ended: only for refusing what cannot be in time, and for Retry-After.

Not a latency law: seconds per unit of work (steps × samples × pixels), apart by number of ControlNets, as a moving average.
"""

from __future__ import annotations

from typing import Final

from engine.serving.job import Job

WEIGHT: Final = 0.1
"""Of a new observation: the last twenty or so decide, so that a slower replica or another mix is followed within minutes."""
CONTROLNETS_MAX: Final = 4
"""Jobs with this many ControlNets or more are one class."""


def work_of(job: Job) -> float:
    """Steps × samples of a forward × megapixels."""
    return job.n_steps * job.forward_batch * job.width_px * job.height_px / 1e6


def class_of(job: Job) -> int:
    """Jobs of one class take about the same time per unit of work."""
    return min(len(job.controls), CONTROLNETS_MAX)


class ServiceEstimates:
    """Moving averages of seconds per unit of work; 0 until the first job has ended."""

    def __init__(self) -> None:
        self._s_per_work: dict[int, float] = {}
        self._overall = 0.0
        self._n = 0

    def observe(self, job: Job, service_s: float, n_in_batch: int) -> None:
        """A job was done in ``service_s`` from take-up to end, as one of a batch."""
        rate = service_s / (work_of(job) * max(1, n_in_batch))
        known = self._s_per_work.get(class_of(job))
        self._s_per_work[class_of(job)] = rate if known is None else known + WEIGHT * (rate - known)
        self._overall = rate if self._n == 0 else self._overall + WEIGHT * (rate - self._overall)
        self._n += 1

    def s_per_work(self, job_class: int) -> float:
        """Seconds per unit of work of a class; that of all jobs where the class is new."""
        return self._s_per_work.get(job_class, self._overall)

    def service_s(self, job: Job) -> float:
        """Expected seconds from take-up to end, alone; 0 if nothing is known yet."""
        return self.s_per_work(class_of(job)) * work_of(job)
