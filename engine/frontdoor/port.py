"""What the front door asks of an engine: the seam between HTTP and everything behind it.

:class:`engine.serving.engine.Engine` is one; tests use a fake. All methods are called on one event loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from engine.allocation import Allocation
from engine.catalogue import Catalogue
from engine.serving.engine_view import EngineView
from engine.serving.job import Job, Outcome


class ServingEngine(Protocol):
    """An engine that runs one allocation. :meth:`view` answers at any time, before :meth:`start` and after :meth:`stop` too."""

    async def start(self) -> None:
        """Starts the allocation's workers; returns when all are ready, in bounded time.

        Raises:
            InputError: the allocation does not fit this machine, or its models cannot be loaded.
        """

    async def stop(self) -> None:
        """Ends every worker, in bounded time; jobs that still run fail with a reason."""

    async def submit(self, job: Job) -> Outcome:
        """Runs a job; every submitted job ends with exactly one outcome, in bounded time."""

    def cancel(self, request_id: str) -> bool:
        """Ends a job early; its ``submit`` returns. False if it is unknown or has ended."""

    def view(self) -> EngineView:
        """The state now; cheap enough for every request."""

    async def apply(self, allocation: Allocation) -> Mapping[str, Any]:
        """Moves to another allocation without disturbing workers that stay; what was done, as JSON values.

        Raises:
            InputError: the allocation does not fit this machine; nothing has changed.
        """

    async def admit(self, catalogue: Catalogue) -> Mapping[str, Any]:
        """Makes new entries of the catalogue known to the workers while they serve; what was done, as JSON values."""

    async def drain(self, timeout_s: float) -> bool:
        """Admits nothing more and waits for what was admitted; True if all of it ended in time."""
