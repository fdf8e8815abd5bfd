"""The addresses that clients call. What they do is in :mod:`engine.frontdoor.service`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final
from urllib.parse import urlsplit

from aiohttp import web

from engine.frontdoor.health import worst
from engine.frontdoor.listener import is_loopback
from engine.frontdoor.refusal import RequestRefusedError
from engine.frontdoor.service import SERVER_LOG, ImageService

METRICS_CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_app(service: ImageService, *, is_local_only: bool = False) -> web.Application:
    """The public application.

    Args:
        is_local_only: Whether calls must name a loopback address or ``localhost`` as their host: without tokens, a web page
            in a browser of this machine could otherwise reach the server under a name of its own (DNS rebinding).
    """
    middlewares = [openai_errors, local_names_only] if is_local_only else [openai_errors]
    app = web.Application(middlewares=middlewares, client_max_size=service.config.limits.body_bytes_max)
    app.add_routes(
        [
            web.post("/v1/images/generations", service.generate),
            web.get("/v1/models", _Handlers(service).models),
            web.get("/v1/models/{name:.+}", _Handlers(service).model),
            *monitoring_routes(service, is_public=True),
        ]
    )
    return app


def monitoring_routes(service: ImageService, *, is_public: bool) -> list[web.RouteDef]:
    """Health and metrics. Where tokens are in use, reasons and metrics need one on the public side."""
    handlers = _Handlers(service, is_public=is_public)
    return [
        web.get("/health", handlers.health),
        web.get("/health/live", handlers.live),
        web.get("/health/ready", handlers.ready),
        web.get("/metrics", handlers.metrics),
    ]


@web.middleware
async def openai_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refusals and unknown addresses get the same kind of body."""
    try:
        return await handler(request)
    except RequestRefusedError as refusal:
        return refusal.response()
    except web.HTTPNotFound:
        return RequestRefusedError(
            404, "unknown_address", f"There is no {request.path[:200]!r}. See docs/engine.md."
        ).response()
    except web.HTTPMethodNotAllowed as error:
        allowed = ", ".join(sorted(error.allowed_methods))
        wrong = RequestRefusedError(
            405, "wrong_method", f"got {request.method[:20]!r}, needs one of {allowed}. Use it."
        )
        answer = wrong.response()
        answer.headers["Allow"] = allowed
        return answer
    except web.HTTPException:
        raise
    except Exception:
        SERVER_LOG.exception("%s %s failed", request.method, request.path)
        return RequestRefusedError(500, "internal_error", "The server failed. Its log says why.").response()


@web.middleware
async def local_names_only(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuses calls that came under the name of another host."""
    try:
        host = urlsplit(f"//{request.host}").hostname or ""
    except ValueError:
        host = request.host
    if not is_loopback(host):
        raise RequestRefusedError(
            403, "wrong_host", f"got the host {host[:80]!r}, needs localhost. Call it by that name."
        )
    return await handler(request)


class _Handlers:
    def __init__(self, service: ImageService, *, is_public: bool = True) -> None:
        self._service = service
        self._is_public = is_public

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": self._cards(request)})

    async def model(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        for card in self._cards(request):
            if name in (card["id"], card["digest"]):
                return web.json_response(card)
        raise RequestRefusedError(
            404, "not_found", f"got {name[:80]!r}, needs a name from GET /v1/models.", param="model"
        )

    async def health(self, request: web.Request) -> web.Response:
        judged = self._service.health()
        status = worst([health.status for health in judged.values()])
        shown = self._shows_internals(request)
        is_ready = self._is_ready(judged)
        body: dict[str, Any] = {"status": status, "ready": is_ready}
        if shown:
            body["draining"] = self._service.draining_reason
            body["engines"] = {name: health.to_plain(with_reasons=True) for name, health in judged.items()}
        return web.json_response(body, status=503 if status == "unhealthy" else 200)

    async def live(self, request: web.Request) -> web.Response:
        return web.json_response({"live": True})

    async def ready(self, request: web.Request) -> web.Response:
        is_ready = self._is_ready(self._service.health())
        return web.json_response({"ready": is_ready}, status=200 if is_ready else 503)

    async def metrics(self, request: web.Request) -> web.Response:
        if not self._shows_internals(request):
            raise RequestRefusedError(401, "missing_token", "Metrics need a token here, or the admin socket. Send one.")
        service = self._service
        content = service.metrics.exposition(service.n_open, service.budget.held_bytes)
        return web.Response(body=content, headers={"Content-Type": METRICS_CONTENT_TYPE})

    def _is_ready(self, judged: Any) -> bool:
        """Every engine that the split sends traffic to can take a request."""
        used = {variant.engine for variant in self._service.split.variants if variant.share > 0}
        return not self._service.draining_reason and all(judged[name].is_ready for name in used)

    def _cards(self, request: web.Request) -> list[dict[str, Any]]:
        service = self._service
        tenant = service.desk.identify(request.headers.get("Authorization"))
        return [card.to_plain() for card in service.access.models(tenant.id) if tenant.may_use(card.entry)]

    def _shows_internals(self, request: web.Request) -> bool:
        if not self._is_public or not self._service.desk.needs_token:
            return True
        try:
            self._service.desk.identify(request.headers.get("Authorization"))
        except RequestRefusedError:
            return False
        return True
