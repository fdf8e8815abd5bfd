"""More than can be served, clients that go, answers that come too late: every request is answered, nothing is kept."""

from __future__ import annotations

import asyncio
import base64
import json
from collections import Counter
from dataclasses import replace

from engine.allocation import Policies
from engine.frontdoor.settings import Limits
from engine.serving.job import Job, Outcome
from tests.engine.frontdoor.conftest import OpenDoor, run
from tests.engine.frontdoor.dispatcher_engine import DispatcherEngine, png


def test_ten_times_too_much_is_answered_and_what_is_accepted_is_in_time(open_door: OpenDoor) -> None:
    async def test() -> None:
        # Two workers of 20 ms do 100 a second; a queue of 10 is worked off in 0.1 s, far within the deadline of 5 s.
        engine = DispatcherEngine(n_workers=2, service_s=0.02, policies=Policies(queue_limit=10))
        async with open_door(engine) as door:
            answers = []

            async def ask(at_s: float) -> None:
                await asyncio.sleep(at_s)
                answers.append(await door.ask(deadline_s=5))

            await asyncio.gather(*(ask(number / 1000) for number in range(500)))
            counts = Counter(status for status, _, _ in answers)
            assert set(counts) == {200, 429}
            assert sum(counts.values()) == 500
            assert counts[200] >= 12  # two in work and ten waiting are never turned away
            for status, answer, headers in answers:
                if status == 429:
                    assert answer["error"]["code"] == "queue_full"
                    assert int(headers["Retry-After"]) >= 1
            assert door.service.n_open == 0
            assert door.service.budget.held_bytes == 0
            assert engine.view().dispatch.n_ended["done"] == counts[200]
            assert len(door.log_rows()) == 500

    run(test())


def test_a_job_that_is_not_done_by_its_deadline_is_a_504(open_door: OpenDoor) -> None:
    async def test() -> None:
        async with open_door(DispatcherEngine(service_s=30)) as door:
            status, code, _ = await door.refused(deadline_s=0.1)
        assert (status, code) == (504, "deadline")

    run(test())


def test_an_engine_that_misses_the_deadline_itself_is_not_waited_for(open_door: OpenDoor) -> None:
    class Deaf(DispatcherEngine):
        async def submit(self, job: object) -> object:  # type: ignore[override]
            await asyncio.sleep(3600)

        def cancel(self, request_id: str) -> bool:
            self.cancelled.append(request_id)
            return False

    async def test() -> None:
        engine = Deaf()
        async with open_door(engine, limits=Limits(settle_s=0.05)) as door:
            status, code, _ = await door.refused(deadline_s=0.05)
            assert (status, code) == (504, "deadline")
            assert engine.cancelled == ["img-0"]
            assert door.log_rows()[0]["events"] == ["overdue"]

    run(test())


def test_a_client_that_goes_takes_its_job_with_it_waiting_or_running(open_door: OpenDoor) -> None:
    async def test() -> None:
        engine = DispatcherEngine(service_s=30)
        async with open_door(engine) as door:
            asks = [asyncio.create_task(door.ask()) for _ in range(2)]
            while len(engine.jobs) < 2:
                await asyncio.sleep(0.005)
            for ask in asks:
                ask.cancel()
            while door.service.n_open:
                await asyncio.sleep(0.005)
            view = engine.view().dispatch
            assert (view.n_waiting, view.n_running, view.n_ended["failed"]) == (0, 0, 2)
            assert len(engine.cancelled) == 1  # the one that ran; the other was only taken out of the queue
            assert [(row["http_status"], row["code"]) for row in door.log_rows()] == [(499, "client_closed")] * 2
            engine.service_s = 0.0
            assert (await door.ask())[0] == 200

    run(test())


def test_bodies_beyond_the_memory_for_all_requests_are_turned_away_unread(open_door: OpenDoor) -> None:
    async def test() -> None:
        image = base64.b64encode(png(64, 64, extra=b"")).decode()
        engine = DispatcherEngine(service_s=0.3)
        size = len(json.dumps({"prompt": "a lighthouse", "size": "64x64", "steps": 2,
                               "controlnets": [{"id": "canny", "image": image}]}))  # fmt: skip
        async with open_door(engine, limits=Limits(bodies_bytes_max=2 * size + 50)) as door:
            asks = [asyncio.create_task(door.ask(controlnets=[{"id": "canny", "image": image}])) for _ in range(6)]
            answers = [await ask for ask in asks]
            assert Counter(status for status, _, _ in answers) == {200: 2, 429: 4}
            assert {answer["error"]["code"] for status, answer, _ in answers if status == 429} == {"overloaded"}
            assert door.service.budget.held_bytes == 0

    run(test())


def test_connections_beyond_the_limit_are_told_and_those_that_say_nothing_are_closed(open_door: OpenDoor) -> None:
    async def test() -> None:
        async with open_door(limits=Limits(connections_max=3, header_read_s=0.2)) as door:
            host, port = door.url.removeprefix("http://").split(":")
            silent = [await asyncio.open_connection(host, int(port)) for _ in range(3)]
            status, code, _ = await door.refused()
            assert (status, code) == (503, "too_many_connections")
            assert door.listener.n_refused == 1
            silent[0][1].write(b"POST /v1/images/generations HTTP/1.1\r\nHost")
            for reader, writer in silent:
                assert await asyncio.wait_for(reader.read(), 5) == b""
                writer.close()
            assert (await door.ask())[0] == 200

    run(test())


def test_a_client_that_does_not_read_its_images_is_cut_off(open_door: OpenDoor) -> None:
    class Large(DispatcherEngine):
        async def submit(self, job: Job) -> Outcome:
            outcome = await super().submit(job)
            assert outcome.result is not None
            return replace(outcome, result=replace(outcome.result, images=(bytes(30_000_000),)))

    async def test() -> None:
        async with open_door(Large(), limits=Limits(answer_send_s=0.2)) as door:
            host, port = door.url.removeprefix("http://").split(":")
            _, writer = await asyncio.open_connection(host, int(port), limit=1024)
            body = b'{"prompt": "a"}'
            head = f"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
            writer.write(f"{head}\r\n\r\n".encode() + body)
            while not door.log_rows():
                await asyncio.sleep(0.02)
            assert door.log_rows()[0]["events"] == ["send_timeout"]
            assert door.service.n_open == 0
            writer.close()

    run(test())


def test_without_a_ready_worker_the_answer_is_503_and_with_one_again_200(open_door: OpenDoor) -> None:
    async def test() -> None:
        engine = DispatcherEngine()
        async with open_door(engine) as door:
            engine.down("base-0")
            status, answer, headers = await door.ask()
            assert (status, answer["error"]["code"]) == (503, "no_worker")
            assert "Retry-After" in headers
            engine.up("base-0")
            assert (await door.ask())[0] == 200

    run(test())
