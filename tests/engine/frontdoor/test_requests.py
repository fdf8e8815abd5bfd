"""What a request for images gets: images, or a refusal that says what is wrong with it."""

from __future__ import annotations

import base64
import json
from typing import Any

import openai
import pytest

from engine.frontdoor.settings import Limits
from tests.engine.frontdoor.conftest import INK_1, INK_2, Door, OpenDoor, run
from tests.engine.frontdoor.dispatcher_engine import DispatcherEngine, png


def image(width_px: int = 64, height_px: int = 64, **more: Any) -> str:
    return base64.b64encode(png(width_px, height_px, **more)).decode()


def test_a_request_gets_its_images_and_what_is_needed_to_repeat_it(open_door: OpenDoor) -> None:
    async def test() -> None:
        engine = DispatcherEngine()
        async with open_door(engine) as door:
            status, answer, headers = await door.ask(n=2, seed=7)
        assert status == 200
        assert [base64.b64decode(item["b64_json"]) for item in answer["data"]] == [png(8, 8, 7), png(8, 8, 8)]
        assert answer["diffplan"]["seed"] == 7
        assert headers["X-Request-Id"] == answer["diffplan"]["request_id"] == engine.jobs[0].request_id
        assert headers["X-Diffplan-Variant"] == "main"

    run(test())


def test_every_field_reaches_the_job(open_door: OpenDoor) -> None:
    async def test() -> None:
        engine = DispatcherEngine()
        control = {"id": "canny", "image": image(128, 64), "scale": 0.5, "start": 0.1, "end": 0.9}
        async with open_door(engine) as door:
            status, _, _ = await door.ask(
                model="tiny", prompt="a", negative_prompt="b", n=3, size="128x64", response_format="b64_json", user="u",
                steps=5, guidance_scale=2.5, seed=9, controlnets=[control], loras=[{"id": "ink@2", "scale": 0.3}],
                deadline_s=9.5, priority=0,
            )  # fmt: skip
        assert status == 200
        (job,) = engine.jobs
        assert (job.base_model_id, job.prompt, job.negative_prompt, job.n_images) == ("tiny", "a", "b", 3)
        assert (job.width_px, job.height_px, job.n_steps, job.guidance_scale, job.seed) == (128, 64, 5, 2.5, 9)
        (use,) = job.controls
        assert (use.controlnet_id, use.scale, use.start, use.end) == ("canny", 0.5, 0.1, 0.9)
        assert job.blobs[use.image or 0] == png(128, 64)
        assert [(use.lora_id, use.scale) for use in job.loras] == [(INK_2, 0.3)]
        assert job.deadline_s == 9.5

    run(test())


def test_a_plain_name_means_the_version_that_the_catalogue_says(open_door: OpenDoor) -> None:
    async def test() -> None:
        engine = DispatcherEngine()
        async with open_door(engine) as door:
            await door.ask(loras=[{"id": "ink"}])
        assert engine.jobs[0].loras[0].lora_id == INK_1

    run(test())


def test_the_openai_client_gets_images_models_and_typed_errors(open_door: OpenDoor) -> None:
    async def test() -> None:
        async with open_door() as door:
            client = openai.AsyncOpenAI(api_key="none", base_url=f"{door.url}/v1", max_retries=0, timeout=20)
            made = await client.images.generate(
                model="tiny", prompt="a lighthouse", n=1, size="64x64", response_format="b64_json",  # type: ignore[call-overload]
                extra_body={"steps": 2, "seed": 3, "loras": [{"id": "ink"}]},
            )  # fmt: skip
            assert base64.b64decode(made.data[0].b64_json) == png(8, 8, 3)
            models = await client.models.list()
            assert {model.id for model in models.data} == {"tiny", "canny", "depth", "ink", "ink@2"}
            assert (await client.models.retrieve("ink@2")).id == "ink@2"
            with pytest.raises(openai.BadRequestError) as caught:
                await client.images.generate(prompt="a", size="65x64")  # type: ignore[call-overload]
            assert caught.value.param == "size"
            with pytest.raises(openai.NotFoundError) as missing:
                await client.images.generate(model="nothing", prompt="a", size="64x64")  # type: ignore[call-overload]
            assert missing.value.code == "not_found"
            await client.close()

    run(test())


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": ""}, "prompt", "is missing"),
    ({"prompt": 5}, "prompt", "got a number"),
    ({"prompt": "x" * 5000}, "prompt", "has 5000 characters, needs at most 4000"),
    ({"prompt": "\ud800"}, "prompt", "surrogate"),
    ({"negative_prompt": ["a"]}, "negative_prompt", "got a list"),
    ({"n": 0}, "n", "got 0, needs a whole number, 1..8"),
    ({"n": True}, "n", "got True"),
    ({"n": 1.5}, "n", "got 1.5"),
    ({"steps": 201}, "steps", "1..200"),
    ({"size": "64"}, "size", "WIDTHxHEIGHT"),
    ({"size": "66x64"}, "size", "multiples of 8"),
    ({"size": "4096x64"}, "size", "from 64 to 2048"),
    ({"size": "2048x2048", "n": 8}, "size", "pixels"),
    ({"guidance_scale": "high"}, "guidance_scale", "got 'high'"),
    ({"seed": -1}, "seed", "got -1"),
    ({"seed": 2**63}, "seed", "0..9223372036854775807"),
    ({"deadline_s": 0}, "deadline_s", "got 0"),
    ({"deadline_s": 601}, "deadline_s", "600"),
    ({"priority": 101}, "priority", "-100..100"),
    ({"priority": 1}, "priority", "at most 0 for this tenant"),
    ({"response_format": "url"}, "response_format", "no image is stored"),
    ({"quality": "hd"}, "quality", "got 'hd'"),
    ({"stream": True}, "stream", "got True"),
    ({"stepps": 3}, "stepps", "is not a known field, needs one of controlnets, deadline_s"),
    ({"loras": {"id": "ink"}}, "loras", "got an object, needs a list"),
    ({"loras": [{"id": "ink"}] * 5}, "loras", "got 5 items"),
    ({"loras": [{"id": "ink"}, {"id": "ink"}]}, "loras[1].id", "a second time"),
    ({"loras": [{"id": "ink"}, {"id": "ink@1"}]}, "loras[1].id", "used already by another name"),
    ({"loras": ["ink"]}, "loras[0]", "got a text, needs a JSON object"),
    ({"loras": [{"id": "ink", "scale": 11}]}, "loras[0].scale", "got 11"),
    ({"loras": [{"id": "ink", "weight": 1}]}, "loras[0].weight", "is not a known field"),
    ({"controlnets": [{"id": "canny"}]}, "controlnets[0].image", "is missing"),
    ({"controlnets": [{"id": "canny", "image": "%%%"}]}, "controlnets[0].image", "is not base64"),
    (
        {"controlnets": [{"id": "canny", "image": base64.b64encode(b"GIF89a").decode()}]},
        "controlnets[0].image",
        "needs PNG",
    ),
    (
        {"controlnets": [{"id": "canny", "image": image(32, 32)}]},
        "controlnets[0].image",
        "has 32x32 pixels, needs the size",
    ),
    (
        {"controlnets": [{"id": "canny", "image": image(), "start": 0.5, "end": 0.5}]},
        "controlnets[0].start",
        "start < end",
    ),
]


def test_every_wrong_value_is_refused_with_its_field_and_what_is_allowed(open_door: OpenDoor) -> None:
    async def test() -> None:
        engine = DispatcherEngine()
        async with open_door(engine) as door:
            for fields, param, words in REFUSED:
                status, answer, _ = await door.ask(**fields)
                error = answer["error"]
                assert (status, error["param"], error["type"]) == (400, param, "invalid_request_error"), (
                    fields,
                    answer,
                )
                assert words in error["message"], (fields, answer)
        assert engine.jobs == []

    run(test())


def test_all_mistakes_of_a_request_are_told_at_once(open_door: OpenDoor) -> None:
    async def test() -> None:
        async with open_door() as door:
            _, _, message = await door.refused(n=0, steps=0, size="1x1")
        assert [line.partition(":")[0] for line in message.splitlines()] == ["n", "size", "steps"]

    run(test())


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": "other"}, "model"),
        ({"loras": [{"id": "nothing"}]}, "loras[0].id"),
        ({"loras": [{"id": "canny"}]}, "loras[0].id"),
        ({"loras": [{"id": "../../etc/passwd"}]}, "loras[0].id"),
        ({"loras": [{"id": "brand"}]}, "loras[0].id"),
    ],
    ids=["unknown model", "unknown LoRA", "a ControlNet as LoRA", "a path", "another tenant's LoRA"],
)
def test_what_the_catalogue_does_not_grant_is_not_found(
    open_door: OpenDoor, fields: dict[str, Any], param: str
) -> None:
    async def test() -> None:
        engine = DispatcherEngine()
        async with open_door(engine) as door:
            status, answer, _ = await door.ask(**fields)
        assert (status, answer["error"]["code"], answer["error"]["param"]) == (404, "not_found", param)
        assert engine.jobs == []

    run(test())


HOSTILE: list[tuple[str, bytes, int, str]] = [
    ("nested a million deep", b"[" * 1_000_000, 400, "too_nested"),
    ("nested within the count", b"[" * 4000 + b"]" * 4000, 400, "too_nested"),
    ("cut off", b'{"prompt": "a', 400, "not_json"),
    ("not UTF-8", b'{"prompt": "\xff"}', 400, "not_utf8"),
    ("NaN", b'{"prompt": "a", "guidance_scale": NaN}', 400, "not_json"),
    ("Infinity", b'{"prompt": "a", "guidance_scale": -Infinity}', 400, "not_json"),
    ("a float beyond range", b'{"prompt": "a", "guidance_scale": 1e999}', 400, "not_json"),
    ("a number of 5000 digits", b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", 400, "not_json"),
    ("a key twice", b'{"prompt": "a", "prompt": "b"}', 400, "not_json"),
    ("a list", b"[1]", 400, "invalid_value"),
    ("null", b"null", 400, "invalid_value"),
    ("empty", b"", 400, "not_json"),
    ("more than allowed", b'{"prompt": "' + b"a" * 2_000_000 + b'"}', 413, "body_too_large"),
    ("image of too many bytes", json.dumps({"prompt": "a", "controlnets": [{"id": "canny", "image": "A" * 90_000}]}).encode(),
     400, "invalid_value"),
]  # fmt: skip


def test_hostile_bodies_are_refused_and_the_server_goes_on(open_door: OpenDoor) -> None:
    async def test() -> None:
        engine = DispatcherEngine()
        limits = Limits(body_bytes_max=1_100_000, control_image_bytes_max=50_000)
        async with open_door(engine, limits=limits) as door:
            for name, body, status, code in HOSTILE:
                seen, seen_code, message = await door.refused(body)
                assert (seen, seen_code) == (status, code), (name, message)
                assert len(message) < 1000, name
            assert (await door.ask())[0] == 200
            assert door.service.budget.held_bytes == 0
        assert len(engine.jobs) == 1

    run(test())


async def raw(door: Door, head: str, body: bytes = b"") -> bytes:
    """The answer's first line to bytes that no client library would send."""
    import asyncio

    host, port = door.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)
    line = await asyncio.wait_for(reader.readline(), 10)
    writer.close()
    return line


def test_bodies_are_refused_by_their_headers_before_they_are_read(open_door: OpenDoor) -> None:
    post = "POST /v1/images/generations HTTP/1.1\nHost: a\nContent-Type: application/json"

    async def test() -> None:
        async with open_door(limits=Limits(body_read_s=0.2)) as door:
            assert b" 413 " in await raw(door, f"{post}\nContent-Length: 99999999999")
            assert b" 411 " in await raw(door, f"{post}\nTransfer-Encoding: chunked", b"2\r\n{}\r\n0\r\n\r\n")
            assert b" 415 " in await raw(door, f"{post}\nContent-Encoding: gzip\nContent-Length: 2", b"{}")
            assert b" 415 " in await raw(
                door, post.replace("application/json", "text/plain") + "\nContent-Length: 2", b"{}"
            )
            assert b" 408 " in await raw(door, f"{post}\nContent-Length: 50", b"{")
            assert b" 404 " in await raw(door, "GET /v1/nothing HTTP/1.1\nHost: a")
            assert b" 405 " in await raw(door, "GET /v1/images/generations HTTP/1.1\nHost: a")
            assert b" 400 " in await raw(door, "nonsense")
            assert b" 400 " in await raw(door, "GET / HTTP/1.1\nHost: a\nX: " + "a" * 20_000)

    run(test())


def test_an_error_inside_the_server_is_a_500_that_tells_nothing_but_the_request_id(open_door: OpenDoor) -> None:
    class Broken(DispatcherEngine):
        async def submit(self, job: Any) -> Any:
            raise RuntimeError("the secret is 1234")

    async def test() -> None:
        async with open_door(Broken()) as door:
            status, answer, headers = await door.ask()
            assert status == 500
            assert "1234" not in json.dumps(answer)
            assert headers["X-Request-Id"] in answer["error"]["message"]
            assert door.log_rows()[0]["events"] == ["RuntimeError"]

    run(test())


def test_a_job_that_fails_says_why(open_door: OpenDoor) -> None:
    async def test() -> None:
        engine = DispatcherEngine()
        engine.failures["bad"] = "LoRA ink does not fit this checkpoint"
        async with open_door(engine) as door:
            status, code, message = await door.refused(prompt="bad")
        assert (status, code) == (422, "job_error")
        assert "does not fit" in message

    run(test())
