"""One request for images from its first header to its answer: who asks, what, may it, and what came of it."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import time
from base64 import b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from aiohttp import web

from engine.catalogue import AddOnKind, Catalogue
from engine.frontdoor.catalogue_access import CatalogueAccess
from engine.frontdoor.health import DoneWatch, EngineHealth, HealthLimits, engine_health
from engine.frontdoor.image_call import ImageCall, read_call
from engine.frontdoor.json_body import BodyBudget
from engine.frontdoor.metrics import FrontMetrics
from engine.frontdoor.outcome_answer import refusal_of_outcome
from engine.frontdoor.port import ServingEngine
from engine.frontdoor.refusal import RequestRefusedError, refusal_of
from engine.frontdoor.request_log import JsonLog, RequestTrail
from engine.frontdoor.settings import Defaults, Limits
from engine.frontdoor.split import Split, Variant, sticky_key
from engine.frontdoor.tenants import Tenant, TenantDesk
from engine.pixels import to_file
from engine.serving.engine_view import EngineView
from engine.serving.job import Job, Outcome
from traces.problems import InputError, one_problem

SERVER_LOG: Final = logging.getLogger("engine.frontdoor")


@dataclass(frozen=True, slots=True)
class FrontConfig:
    """What does not change while the service runs."""

    limits: Limits = field(default_factory=Limits)
    defaults: Defaults = field(default_factory=Defaults)
    health: HealthLimits = field(default_factory=HealthLimits)
    default_model: str = "default"


class ImageService:
    """Requests between HTTP and the engines. The only holder of state that changes: split, draining, counters.

    Args:
        engines: By name; a split sends traffic to them.
        clock: Seconds on a monotonic clock.
        draw_request_id: A name that no other request of any process has.
    """

    def __init__(
        self,
        engines: Mapping[str, ServingEngine],
        access: CatalogueAccess,
        desk: TenantDesk,
        log: JsonLog,
        config: FrontConfig,
        *,
        clock: Callable[[], float],
        draw_request_id: Callable[[], str],
        split: Split | None = None,
    ) -> None:
        self.engines = dict(engines)
        self.access = access
        self.desk = desk
        self.config = config
        self.split = split if split is not None else Split()
        self.budget = BodyBudget(config.limits)
        self.n_open = 0
        self.draining_reason = ""
        self.changing = asyncio.Lock()
        """Held by whatever changes engines or catalogue: two changes at once would each see half of the other."""
        self._log = log
        self._clock = clock
        self._draw_request_id = draw_request_id
        self._watches = {name: DoneWatch() for name in self.engines}
        self.metrics = FrontMetrics(self.views, self.health)
        self.know_add_ons()

    def know_add_ons(self) -> None:
        """Gives the catalogue's entries labels of their own in the metrics; call it when the catalogue has changed."""
        self.metrics.know((entry.kind, entry.id, entry.title) for entry in self.access.catalogue.entries.values())

    async def take_catalogue(self, catalogue: Catalogue) -> dict[str, Any]:
        """Admits what is new to every engine, then answers by it; what each engine did, as JSON values."""
        async with self.changing:
            done = {name: dict(await engine.admit(catalogue)) for name, engine in self.engines.items()}
            self.access.catalogue = catalogue
            self.know_add_ons()
        return done

    def views(self) -> dict[str, EngineView]:
        """Every engine now."""
        return {name: engine.view() for name, engine in self.engines.items()}

    def health(self) -> dict[str, EngineHealth]:
        """Every engine judged now; call it regularly, it also remembers when work was last done."""
        now_s = self._clock()
        judged = {}
        for name, view in self.views().items():
            done_age_s = self._watches.setdefault(name, DoneWatch()).look(view, now_s)
            judged[name] = engine_health(view, done_age_s, self.config.health)
        return judged

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """``POST /v1/images/generations``."""
        trail = RequestTrail(self._draw_request_id(), request.path, self._clock())
        self.n_open += 1
        try:
            try:
                response = await self._answer(request, trail)
            except RequestRefusedError as refusal:
                response = refusal.response()
                trail.http_status, trail.code = refusal.status, refusal.code
            except Exception as error:
                SERVER_LOG.exception("request %s failed in the front door", trail.request_id)
                trail.events.append(type(error).__name__)
                trail.http_status, trail.code = 500, "internal_error"
                message = f"The server failed. Quote request {trail.request_id}."
                response = RequestRefusedError(500, trail.code, message).response()
            response.headers["X-Request-Id"] = trail.request_id
            if trail.variant:
                response.headers["X-Diffplan-Variant"] = trail.variant
            await self._send(request, response, trail)
            return response
        except asyncio.CancelledError:
            trail.http_status, trail.code = 499, "client_closed"
            raise
        finally:
            self.n_open -= 1
            end_s = self._clock()
            self.metrics.observe(trail, end_s - trail.start_s)
            self._log.write(trail.line(end_s, datetime.now(UTC).isoformat(timespec="milliseconds")))

    async def _answer(self, request: web.Request, trail: RequestTrail) -> web.Response:
        self._check_open()
        tenant = self.desk.identify(request.headers.get("Authorization"))
        trail.tenant_id = tenant.id
        with self.desk.admitted(tenant, self._clock()):
            async with self.budget.body(request) as body:
                try:
                    call = read_call(
                        body,
                        trail.request_id,
                        tenant.id,
                        self.config.limits,
                        self.config.defaults,
                        self.config.default_model,
                    )
                    del body  # the base64 text; the decoded images are in the call
                    variant = self.split.variant_of(sticky_key(tenant.id, call.user, trail.request_id))
                    trail.variant, trail.engine = variant.name, variant.engine
                    job = self._resolved(call, tenant, variant)
                except InputError as error:
                    raise refusal_of(error) from None
                del call
                trail.job = job
                outcome = await self._run(self._engine(variant), job, trail)
        if outcome.code == "cancelled" and self.draining_reason:
            raise RequestRefusedError(
                503, "draining", f"The server is {self.draining_reason}. Try another one.", retry_after_s=5.0
            )
        if outcome.status != "done" or outcome.result is None:
            raise refusal_of_outcome(outcome)
        trail.http_status = 200
        body_bytes = await asyncio.to_thread(_done_body, job, outcome, variant.name)
        return web.Response(body=body_bytes, content_type="application/json")

    def _check_open(self) -> None:
        if self.draining_reason:
            raise RequestRefusedError(
                503, "draining", f"The server is {self.draining_reason}. Try another one.", retry_after_s=5.0
            )

    def _engine(self, variant: Variant) -> ServingEngine:
        engine = self.engines[variant.engine]
        view = engine.view()
        if not view.is_admitting:
            raise RequestRefusedError(503, "draining", "The engine is draining. Try again later.", retry_after_s=5.0)
        if not any(worker.role == "base" and worker.state in ("ready", "draining") for worker in view.workers):
            raise RequestRefusedError(503, "no_worker", "No base worker is ready. Try again later.", retry_after_s=5.0)
        return engine

    def _resolved(self, call: ImageCall, tenant: Tenant, variant: Variant) -> Job:
        job = call.job
        if job.priority > tenant.priority_max:
            raise one_problem(
                "priority", f"got {job.priority}", f"at most {tenant.priority_max} for this tenant", "Lower it."
            )

        seen: set[str] = set()

        def resolve(kind: AddOnKind, name: str, place: str) -> str:
            meant = variant.add_ons.get(name, name)
            try:
                entry = self.access.resolve(kind, meant, tenant.id)
            except InputError as error:
                raise RequestRefusedError(404, "not_found", f"{place}: {error}", param=place) from None
            if not tenant.may_use(entry):
                raise RequestRefusedError(
                    403, "not_allowed", f"{place}: {name!r} is not allowed for this tenant.", param=place
                )
            if entry.id in seen:
                raise one_problem(
                    place, f"got {name!r}, which is used already by another name", "each add-on once", "Remove one."
                )
            seen.add(entry.id)
            return entry.id

        return dataclasses.replace(
            job,
            base_model_id=resolve("base", job.base_model_id, "model"),
            controls=tuple(
                dataclasses.replace(use, controlnet_id=resolve("controlnet", use.controlnet_id, f"controlnets[{i}].id"))
                for i, use in enumerate(job.controls)
            ),
            loras=tuple(
                dataclasses.replace(use, lora_id=resolve("lora", use.lora_id, f"loras[{i}].id"))
                for i, use in enumerate(job.loras)
            ),
            variant=variant.name,
        )

    async def _run(self, engine: ServingEngine, job: Job, trail: RequestTrail) -> Outcome:
        """Waits for a job, at most its deadline and a little more. A client that goes takes its job with it."""
        settle_s = self.config.limits.settle_s
        task = asyncio.create_task(engine.submit(job))
        try:
            done, _ = await asyncio.wait(
                {task}, timeout=(job.deadline_s or self.config.limits.deadline_s_max) + settle_s
            )
            if not done:
                trail.events.append("overdue")
                engine.cancel(job.request_id)
                done, _ = await asyncio.wait({task}, timeout=settle_s)
        except asyncio.CancelledError:
            trail.events.append("client_closed")
            engine.cancel(job.request_id)
            # Its place in the tenant's and the memory's count stays taken until the worker has let go of it.
            await asyncio.wait({task}, timeout=settle_s)
            trail.outcome = _abandoned(task, job.request_id, SERVER_LOG)
            raise
        if not done:
            _abandoned(task, job.request_id, SERVER_LOG)
            raise RequestRefusedError(
                504, "deadline", f"No image within {job.deadline_s:g} s. Raise deadline_s or try again later."
            )
        trail.outcome = task.result()
        return task.result()

    async def _send(self, request: web.Request, response: web.Response, trail: RequestTrail) -> None:
        """Sends within a bound, so that a client that does not read cannot hold its images for ever."""
        try:
            async with asyncio.timeout(self.config.limits.answer_send_s):
                await response.prepare(request)
                await response.write_eof()
        except TimeoutError:
            trail.events.append("send_timeout")
            if request.transport is not None:
                request.transport.abort()
        except ConnectionError:
            trail.events.append("client_closed")


def _abandoned(task: asyncio.Task[Outcome], request_id: str, log: logging.Logger) -> Outcome | None:
    """The outcome of a job that nobody waits for, if there is one already; an engine's error is logged, never lost."""

    def report(ended: asyncio.Task[Outcome]) -> None:
        if not ended.cancelled() and ended.exception() is not None:
            log.error("job %s, given up, failed", request_id, exc_info=ended.exception())

    if not task.done():
        log.warning("job %s did not end within the time that cancelling takes", request_id)
        task.add_done_callback(report)
        return None
    report(task)
    return None if task.cancelled() or task.exception() is not None else task.result()


def _done_body(job: Job, outcome: Outcome, variant: str) -> bytes:
    """The answer as bytes; images are joined in without passing through a JSON encoder."""
    result = outcome.result
    assert result is not None  # noqa: S101  (the caller has looked)
    more = {
        "request_id": job.request_id, "variant": variant, "seed": job.seed, "worker_id": outcome.worker_id,
        "stages": dataclasses.asdict(result.stages), "lora_patch_step": result.lora_patch_step,
    }  # fmt: skip
    parts = [b'{"created":%d,"data":[' % int(time.time())]
    for index, image in enumerate(result.images):
        parts += [b"," if index else b"", b'{"b64_json":"', b64encode(to_file(image)), b'"}']
    parts += [b'],"diffplan":', json.dumps(more, separators=(",", ":")).encode(), b"}"]
    return b"".join(parts)
