"""What operators do with a running engine, on a Unix socket that only its user reaches: the socket's mode is the permission."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from aiohttp import web

from engine.allocation import ANY, Allocation, allocation_from_plain
from engine.catalogue import Catalogue
from engine.frontdoor.app import monitoring_routes, openai_errors
from engine.frontdoor.json_body import BodyBudget
from engine.frontdoor.refusal import RequestRefusedError, refusal_of
from engine.frontdoor.service import ImageService
from engine.frontdoor.settings import MIB, Limits
from engine.frontdoor.split import split_from_plain
from engine.frontdoor.tenants import Tenant
from traces.problems import InputError, Problem, one_problem

ADMIN_LIMITS: Final = Limits(body_bytes_max=16 * MIB, bodies_bytes_max=64 * MIB, json_openings_max=1_000_000)
DRAIN_S_MAX: Final = 3600.0


@dataclass(frozen=True, slots=True)
class Reload:
    """How files given at the start are read again; None where none was given."""

    catalogue: Callable[[], Catalogue] | None = None
    tenants: Callable[[], tuple[Tenant, ...]] | None = None
    live_catalogue: Callable[[], Catalogue] | None = None
    """The catalogue as it is now: the same object as long as the file has not changed, or cannot be used."""


def make_admin_app(service: ImageService, reload: Reload, stop: Callable[[str, float], None]) -> web.Application:
    """The operators' application.

    Args:
        stop: Called with a reason and a time limit in seconds; ends the server once what was admitted has ended.
    """
    app = web.Application(middlewares=[openai_errors], client_max_size=ADMIN_LIMITS.body_bytes_max)
    desk = _AdminDesk(service, reload, stop)
    app.add_routes(
        [
            web.get("/admin/status", desk.status),
            web.post("/admin/apply", desk.apply),
            web.get("/admin/split", desk.get_split),
            web.put("/admin/split", desk.put_split),
            web.post("/admin/drain", desk.drain),
            web.post("/admin/reload", desk.reload),
            *monitoring_routes(service, is_public=False),
        ]
    )
    return app


class _AdminDesk:
    def __init__(self, service: ImageService, reload: Reload, stop: Callable[[str, float], None]) -> None:
        self._service = service
        self._reload = reload
        self._stop = stop
        self._budget = BodyBudget(ADMIN_LIMITS)

    async def status(self, request: web.Request) -> web.Response:
        service = self._service
        views = service.views()
        judged = service.health()
        engines = {
            name: {
                **judged[name].to_plain(with_reasons=True),
                "workers": [_plain(worker) for worker in view.workers],
                "dispatch": _plain(view.dispatch),
                "wanted": dict(view.wanted),
                "events": dict(view.n_events),
            }
            for name, view in views.items()
        }
        return web.json_response({
            "draining": service.draining_reason, "open_requests": service.n_open, "split": service.split.to_plain(),
            "catalogue_entries": len(service.access.catalogue.entries), "engines": engines,
        })  # fmt: skip

    async def apply(self, request: web.Request) -> web.Response:
        table = await self._table(request, {"engine", "allocation"})
        name = table.get("engine", "main")
        engine = self._service.engines.get(name)
        try:
            if engine is None:
                raise one_problem(
                    "engine", f"got {name!r:.80}", f"one of {sorted(self._service.engines)}", "Correct it."
                )
            allocation = allocation_from_plain(table.get("allocation"), "allocation")
            problems = unknown_models(allocation, self._service.access.catalogue)
            if problems:
                raise InputError(problems)
            async with self._service.changing:
                done = await engine.apply(allocation)
        except InputError as error:
            raise refusal_of(error) from None
        return web.json_response({"engine": name, **done})

    async def get_split(self, request: web.Request) -> web.Response:
        return web.json_response(self._service.split.to_plain())

    async def put_split(self, request: web.Request) -> web.Response:
        async with self._budget.body(request) as plain:
            try:
                self._service.split = split_from_plain(plain, self._service.engines)
            except InputError as error:
                raise refusal_of(error) from None
        return web.json_response(self._service.split.to_plain())

    async def drain(self, request: web.Request) -> web.Response:
        table = await self._table(request, {"timeout_s"})
        timeout_s = table.get("timeout_s", 120.0)
        if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or not 0 < timeout_s <= DRAIN_S_MAX:
            raise RequestRefusedError(
                400, "invalid_value", f"timeout_s: got {timeout_s!r:.80}, needs 0..{DRAIN_S_MAX:g}.", param="timeout_s"
            )
        self._stop("draining for its operator", float(timeout_s))
        return web.json_response({"draining": True, "timeout_s": timeout_s})

    async def reload(self, request: web.Request) -> web.Response:
        """Reads catalogue and token file again; either both are taken or none."""
        try:
            catalogue = await asyncio.to_thread(self._reload.catalogue) if self._reload.catalogue else None
            tenants = await asyncio.to_thread(self._reload.tenants) if self._reload.tenants else None
        except InputError as error:
            raise refusal_of(error) from None
        service = self._service
        done: dict[str, Any] = {"catalogue_entries": None, "tenants": None, "engines": {}}
        if catalogue is not None:
            done["engines"] = await service.take_catalogue(catalogue)
            done["catalogue_entries"] = len(catalogue.entries)
        if tenants is not None:
            service.desk.replace(tenants)
            done["tenants"] = len(tenants)
        return web.json_response(done)

    async def _table(self, request: web.Request, known: set[str]) -> Mapping[str, Any]:
        async with self._budget.body(request) as plain:
            if not isinstance(plain, dict):
                raise RequestRefusedError(400, "invalid_value", "The body is not a JSON object. Send one.")
            unknown = sorted(set(plain) - known)
            if unknown:
                raise RequestRefusedError(400, "invalid_value", f"{unknown[0][:80]!r} is not a known field, needs one of {sorted(known)}.",
                              param=unknown[0][:80])  # fmt: skip
            return plain


def unknown_models(allocation: Allocation, catalogue: Catalogue, where: str = "allocation") -> list[Problem]:
    """A problem for every base model and ControlNet of an allocation that the catalogue does not have."""
    problems = []
    for pool in allocation.pools:
        for kind, ids in (
            ("base", pool.base_model_ids if pool.role == "base" else ()),
            ("controlnet", pool.controlnet_ids),
        ):
            known = sorted(entry.id for entry in catalogue.entries.values() if entry.kind == kind)
            for missing in sorted(set(ids) - {ANY, *known}):
                allowed = f"ids of the catalogue: {', '.join(known[:10])}" + (", …" if len(known) > 10 else "")
                problems.append(
                    Problem(f"{where} pool {pool.name!r}", f"names the {kind} {missing!r}", allowed, "Admit it first.")
                )
    return problems


def _plain(record: Any) -> dict[str, Any]:
    """JSON values of a flat record; mapping proxies included, which ``dataclasses.asdict`` cannot copy."""
    found: dict[str, Any] = {}
    for item in dataclasses.fields(record):
        value = getattr(record, item.name)
        if isinstance(value, Mapping):
            value = {key: list(part) if isinstance(part, list | tuple) else part for key, part in value.items()}
        found[item.name] = list(value) if isinstance(value, tuple) else value
    return found
