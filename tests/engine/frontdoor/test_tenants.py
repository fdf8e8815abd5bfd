"""Tokens, limits and what each tenant may use."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from engine.frontdoor.refusal import RequestRefusedError
from engine.frontdoor.tenants import Tenant, TenantDesk, hash_token, new_token, read_tenants
from tests.engine.frontdoor.conftest import OpenDoor, run
from tests.engine.frontdoor.dispatcher_engine import DispatcherEngine
from traces.problems import InputError

ACME = Tenant("acme", (hash_token("acme-1"), hash_token("acme-2")), priority_max=5)
BETA = Tenant("beta", (hash_token("beta-1"),), allowed=("tiny", "canny", "ink"))


def test_a_request_needs_a_known_token_and_is_its_tenants(open_door: OpenDoor) -> None:
    async def test() -> None:
        engine = DispatcherEngine()
        async with open_door(engine, tenants=(ACME, BETA)) as door:
            assert (await door.refused())[:2] == (401, "missing_token")
            assert (await door.refused(bearer="acme-3"))[:2] == (401, "invalid_token")
            assert (await door.refused(bearer="tökén"))[:2] == (401, "invalid_token")
            for token in ("acme-1", "acme-2", "beta-1"):
                assert (await door.ask(bearer=token))[0] == 200
            assert [job.tenant_id for job in engine.jobs] == ["acme", "acme", "beta"]
            log = door.log.getvalue()
            assert "acme-1" not in log
            assert "a lighthouse" not in log  # nor the prompt

    run(test())


def test_a_tenant_uses_and_sees_only_what_catalogue_and_token_file_grant(open_door: OpenDoor) -> None:
    async def test() -> None:
        async with open_door(tenants=(ACME, BETA)) as door:
            assert (await door.ask(bearer="acme-1", loras=[{"id": "brand"}]))[0] == 200
            assert (await door.refused(bearer="beta-1", loras=[{"id": "brand"}]))[:2] == (404, "not_found")
            assert (await door.ask(bearer="beta-1", loras=[{"id": "ink@2"}]))[0] == 200
            seen = {}
            for token in ("acme-1", "beta-1"):
                async with door.session.get(
                    f"{door.url}/v1/models", headers={"Authorization": f"Bearer {token}"}
                ) as answer:
                    seen[token] = {card["id"] for card in (await answer.json())["data"]}
            assert seen == {
                "acme-1": {"tiny", "canny", "depth", "ink", "ink@2", "brand"},
                "beta-1": {"tiny", "canny", "ink", "ink@2"},
            }
            async with door.session.get(f"{door.url}/v1/models") as answer:
                assert answer.status == 401

    run(test())


def test_priority_is_bounded_by_the_tenant(open_door: OpenDoor) -> None:
    async def test() -> None:
        async with open_door(tenants=(ACME, BETA)) as door:
            assert (await door.ask(bearer="acme-1", priority=5))[0] == 200
            assert (await door.refused(bearer="beta-1", priority=1))[:2] == (400, "invalid_value")

    run(test())


def test_a_burst_is_let_through_and_then_the_rate_holds() -> None:
    desk = TenantDesk(None)
    tenant = Tenant("a", rate_per_s=2.0, burst=3)

    def is_let_in(now_s: float) -> float:
        """0, or the seconds after which to try again."""
        try:
            with desk.admitted(tenant, now_s):
                return 0.0
        except RequestRefusedError as refusal:
            return (refusal.retry_after_s or 0.0) if (refusal.status, refusal.code) == (429, "tenant_rate") else -1.0

    assert [is_let_in(0.0) for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]
    assert is_let_in(0.25) == 0.25
    assert is_let_in(0.5) == 0.0
    assert [is_let_in(100.0) for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]  # what was not used is kept up to the burst


def test_requests_at_once_are_bounded_for_each_tenant_alone(open_door: OpenDoor) -> None:
    import asyncio

    tenants = (Tenant("one", (hash_token("one"),), n_concurrent_max=1), Tenant("two", (hash_token("two"),)))

    async def test() -> None:
        async with open_door(DispatcherEngine(n_workers=2, service_s=0.3), tenants=tenants) as door:
            first = asyncio.create_task(door.ask(bearer="one"))
            while not door.service.n_open:
                await asyncio.sleep(0.005)
            status, answer, headers = await door.ask(bearer="one")
            assert (status, answer["error"]["code"], headers["Retry-After"]) == (429, "tenant_concurrency", "1")
            assert (await door.ask(bearer="two"))[0] == 200
            assert (await first)[0] == 200
            assert (await door.ask(bearer="one"))[0] == 200

    run(test())


def write(path: Path, tenants: Any, mode: int = 0o600, **more: Any) -> Path:
    path.write_text(json.dumps({"schema_version": 1, "tenants": tenants, **more}), encoding="utf-8")
    path.chmod(mode)
    return path


def test_a_token_file_holds_hashes_and_gives_tenants(tmp_path: Path) -> None:
    token = new_token()
    path = write(tmp_path / "t.json", [{"id": "a", "token_sha256": [hash_token(token)], "rate_per_s": 0.5, "burst": 2,
                                       "n_concurrent_max": 3, "allowed": ["ink"], "priority_max": 1}])  # fmt: skip
    (tenant,) = read_tenants(path)
    assert tenant == Tenant("a", (hash_token(token),), 0.5, 2, 3, ("ink",), 1)
    assert token not in path.read_text(encoding="utf-8")
    assert TenantDesk((tenant,)).identify(f"Bearer {token}") is tenant


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660])
def test_a_token_file_that_others_can_reach_is_refused(tmp_path: Path, mode: int) -> None:
    path = write(tmp_path / "t.json", [{"id": "a", "token_sha256": ["0" * 64]}], mode)
    with pytest.raises(InputError, match=f"has mode {mode:04o}.*chmod 600"):
        read_tenants(path)


@pytest.mark.parametrize(
    ("tenant", "words"),
    [
        ({}, "id needs a text"),
        ({"id": "a"}, "token_sha256 needs a list"),
        ({"id": "a", "token_sha256": []}, "token_sha256 needs"),
        ({"id": "a", "token_sha256": ["secret"]}, "in lower-case hex"),
        ({"id": "a", "token_sha256": ["0" * 64], "rate_per_s": 0}, "rate_per_s needs a number above 0"),
        ({"id": "a", "token_sha256": ["0" * 64], "burst": 0}, "burst needs"),
        ({"id": "a", "token_sha256": ["0" * 64], "n_concurrent_max": True}, "n_concurrent_max needs"),
        ({"id": "a", "token_sha256": ["0" * 64], "allowed": "*"}, "allowed needs a list"),
        ({"id": "a", "token_sha256": ["0" * 64], "priority_max": 101}, "priority_max needs"),
        ({"id": "a", "token_sha256": ["0" * 64], "token": "x"}, "token is not a known field"),
        ("a", "id needs a text"),
    ],
)
def test_a_damaged_token_file_is_refused_with_the_field(tmp_path: Path, tenant: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_tenants(write(tmp_path / "t.json", [tenant]))


def test_a_token_of_two_tenants_or_a_tenant_twice_is_refused(tmp_path: Path) -> None:
    one = {"id": "a", "token_sha256": ["0" * 64]}
    with pytest.raises(InputError, match="is that of 'a' too"):
        read_tenants(write(tmp_path / "t.json", [one, {**one, "id": "b"}]))
    with pytest.raises(InputError, match="appears twice"):
        read_tenants(write(tmp_path / "t.json", [one, {"id": "a", "token_sha256": ["1" * 64]}]))


def test_a_missing_or_strange_token_file_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_tenants(tmp_path / "none.json")
    with pytest.raises(InputError, match="Is a directory"):
        read_tenants(tmp_path)
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(InputError, match="not a plain file"):
        read_tenants(tmp_path / "pipe")
    with pytest.raises(InputError, match="is empty"):
        read_tenants(write(tmp_path / "t.json", []))
    with pytest.raises(InputError, match="is not a token file"):
        read_tenants(write(tmp_path / "t.json", [], schema_version=2))
