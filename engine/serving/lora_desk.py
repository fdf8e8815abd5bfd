"""LoRAs on their way to running batches: single-flight fetches, who waits for what, what is counted and what is dropped."""

from __future__ import annotations

from collections.abc import Sequence

from engine.serving.lora_cache import Dropped, LoraCache
from engine.serving.ports import Actions
from engine.serving.roster import Batch, Roster
from engine.serving.waiting import Ticket


class LoraDesk:
    """Keeps :class:`engine.serving.lora_cache.LoraCache` and tells the engine what has to be fetched, dropped and passed on."""

    def __init__(self, actions: Actions, cache: LoraCache, roster: Roster) -> None:
        self._actions = actions
        self._cache = cache
        self._roster = roster
        self.n_hits = 0
        self.n_misses = 0

    def want(self, ticket: Ticket, now_s: float) -> None:
        """A ticket is next in line: its LoRAs are kept or fetched, and counted once as hits or misses.

        Only the first call for a ticket asks for a fetch: where the host tier is too small for those in line, fetching again
        what was just evicted would go on for as long as they wait.
        """
        for lora_id in ticket.lora_ids:
            is_there = self._cache.touch(lora_id, now_s)
            if lora_id in ticket.lora_misses or lora_id in ticket.lora_hits:
                continue
            (ticket.lora_hits if is_there else ticket.lora_misses).add(lora_id)
            self._cache.count_use(lora_id)
            self.n_hits += is_there
            self.n_misses += not is_there
            if not is_there and self._cache.may_prefetch(lora_id, now_s):
                self._fetch(lora_id, now_s)

    def begin(self, batch: Batch, now_s: float) -> dict[str, str | None]:
        """A batch starts: its LoRAs are pinned, those that are not there are fetched. Id to file, None where it follows."""
        for lora_id in batch.lora_ids:
            self._cache.pin(lora_id)
            self._cache.touch(lora_id, now_s)
            if self._cache.path_of(lora_id) is None and not self._cache.is_fetching(lora_id):
                self._fetch(lora_id, now_s)  # also in the pause after a failed fetch: now somebody waits for it
        paths = {lora_id: self._cache.path_of(lora_id) for lora_id in batch.lora_ids}
        batch.awaited_loras.update(lora_id for lora_id, path in paths.items() if path is None)
        return paths

    def end(self, batch: Batch) -> None:
        """A batch has ended: its pins go."""
        for lora_id in batch.lora_ids:
            self._drop(self._cache.unpin(lora_id))

    def expire(self, now_s: float) -> None:
        """Drops what the policy keeps for a time only."""
        self._drop(self._cache.stale(now_s))

    def fetched(self, lora_id: str, path: str, n_bytes: int, now_s: float) -> None:
        """A checked file is in the host tier; replicas that wait for it are told."""
        self._drop(self._cache.fetched(lora_id, path, n_bytes, now_s))
        held = self._cache.path_of(lora_id)
        if held is not None:
            for batch in self._waiting_for(lora_id):
                self._actions.lora_ready(batch.worker_id, lora_id, held)

    def refused(self, lora_id: str, reason: str, now_s: float, *, is_final: bool) -> None:
        """A fetch came to nothing; replicas that wait for it are told."""
        if is_final:
            self._cache.refuse(lora_id, reason)
        else:
            self._cache.fetch_failed(lora_id, now_s)
        for batch in self._waiting_for(lora_id):
            if not is_final:
                batch.lost_loras.add(lora_id)
            self._actions.lora_refused(batch.worker_id, lora_id, reason)

    def refusal_of(self, ticket: Ticket) -> str:
        """Why a LoRA of a ticket may not be used; empty if all may."""
        for lora_id in ticket.lora_ids:
            reason = self._cache.refusal_of(lora_id)
            if reason is not None:
                return f"LoRA {lora_id} was refused: {reason}"
        return ""

    def _fetch(self, lora_id: str, now_s: float) -> None:
        self._cache.begin_fetch(lora_id, now_s)
        self._actions.fetch_lora(lora_id)

    def _waiting_for(self, lora_id: str) -> list[Batch]:
        """Running batches that started without this LoRA's file; each is told once."""
        found = []
        for base in self._roster.bases.values():
            if base.batch is not None and lora_id in base.batch.awaited_loras:
                base.batch.awaited_loras.discard(lora_id)
                found.append(base.batch)
        return found

    def _drop(self, dropped: Sequence[Dropped]) -> None:
        for item in dropped:
            self._actions.drop_lora(item.lora_id, item.path)
