"""HAProxy between engines of several nodes: its objects, its configuration, and what the real program does with it."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from hypothesis import HealthCheck, Phase, given, settings

from engine.allocation import Allocation
from engine.policies.autoscale_settings import Autoscale
from planner.export.balancer import ALIVE_PATH, CONFIG_KEY, METRICS_PATH
from planner.export.cluster import Balancer
from planner.export.kubernetes import kubernetes_texts
from planner.export.kubernetes_check import object_faults
from planner.export.kubernetes_read import objects_in
from planner.export.prometheus import scrape_config
from planner.export.source import Source
from tests.export.plans import CLUSTER, decoupled, hostile_sources, pool, source_of
from traces.problems import InputError

BALANCED = CLUSTER.model_copy(update={"balancer": Balancer(image="haproxy:3.0")})
needs_haproxy = pytest.mark.skipif(
    shutil.which("haproxy") is None, reason="haproxy is not installed (Debian: apt-get install haproxy)"
)


def objects_of(source: Source) -> dict[tuple[str, str], dict[str, Any]]:
    objects = objects_in(kubernetes_texts(source, BALANCED, None))
    assert object_faults(objects) == []
    return {(item["kind"], item["metadata"]["name"]): item for item in objects}


def config_of(source: Source) -> str:
    (found,) = [
        item["data"][CONFIG_KEY] for (kind, _), item in objects_of(source).items() if kind == "ConfigMap" and CONFIG_KEY in item["data"]
    ]  # fmt: skip
    return str(found)


def pods_selected(objects: dict[tuple[str, str], dict[str, Any]], selector: dict[str, str]) -> set[str]:
    return {
        name
        for (kind, name), item in objects.items()
        if kind == "Deployment" and selector.items() <= item["spec"]["template"]["metadata"]["labels"].items()
    }


def test_clients_reach_the_balancers_and_balancers_reach_each_kind_of_engine_pod() -> None:
    objects = objects_of(source_of(decoupled(30, 13)))
    called = objects["Service", "diffplan-base"]["spec"]
    assert pods_selected(objects, called["selector"]) == {"diffplan-balancer-base"}
    assert called["ports"][0]["targetPort"] == "calls"
    for cell in ("base-1", "base-2"):
        headless = objects["Service", f"diffplan-{cell}-pods"]["spec"]
        assert headless["clusterIP"] == "None"
        assert pods_selected(objects, headless["selector"]) == {f"diffplan-{cell}"}


def test_a_pod_that_goes_admits_calls_until_the_balancers_have_heard_of_it() -> None:
    for cluster, at_least_s in (
        (CLUSTER, 5),
        (BALANCED, 5 + 2 + 1),
    ):  # the cluster's DNS, HAProxy's own hold, its interval
        objects = objects_in(kubernetes_texts(source_of(decoupled(30, 13)), cluster, None))
        spec = next(x for x in objects if x["metadata"]["name"] == "diffplan-base-1")["spec"]["template"]["spec"]
        engine = spec["containers"][0]
        word, seconds = engine["lifecycle"]["preStop"]["exec"]["command"]
        assert (word, int(seconds) >= at_least_s) == ("sleep", True)
        drain_s = int(engine["args"][engine["args"].index("--drain-seconds") + 1])
        assert spec["terminationGracePeriodSeconds"] > int(seconds) + drain_s


def test_a_plan_on_one_node_needs_no_balancer() -> None:
    assert not [name for _, name in objects_of(source_of(decoupled(4, 2))) if "balancer" in name]


def test_weights_are_base_replicas_and_servers_are_pods() -> None:
    # 41 GPUs on nodes of 8: pods of 5+2, four of 4+3, and 4+2
    lines = [line.split() for line in config_of(source_of(decoupled(25, 16))).splitlines() if "server-template" in line]
    assert [(line[2], line[-1]) for line in lines] == [("1", "5"), ("4", "4"), ("1", "4")]


def test_an_autoscaled_pool_has_room_for_all_replicas_it_may_grow_to() -> None:
    scaled = pool(n=3, autoscale=Autoscale(max_replicas=12))
    (line,) = [x for x in config_of(source_of(Allocation((scaled,)))).splitlines() if "server-template" in x]
    assert line.split()[2] == "12"


def test_balancers_may_talk_to_engines_and_names_only_and_are_not_scraped_as_engines() -> None:
    objects = objects_of(source_of(decoupled(30, 13)))
    egress = objects["NetworkPolicy", "diffplan-balancer"]["spec"]["egress"]
    assert [port["port"] for rule in egress for port in rule["ports"]] == [53, 53, 8080]
    pod = objects["Deployment", "diffplan-balancer-base"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["containers"][0]["securityContext"]["readOnlyRootFilesystem"]
    kept = next(
        rule["regex"]
        for rule in scrape_config("diffplan")["scrape_configs"][0]["relabel_configs"]
        if rule.get("action") == "keep" and "port_name" in rule["source_labels"][0]
    )
    assert kept not in {port["name"] for port in pod["containers"][0]["ports"]}


@needs_haproxy
def test_haproxy_accepts_the_configuration_of_hostile_plans(tmp_path: Path) -> None:
    configs: set[str] = set()

    # every plan is checked as objects; distinct configurations go to haproxy, which takes 20 ms each
    @settings(
        max_examples=40, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(hostile_sources())
    def collect(source: Source) -> None:
        try:
            objects = objects_of(source)
        except InputError:
            return  # cannot be cut into nodes of eight
        configs.update(
            item["data"][CONFIG_KEY] for (kind, _), item in objects.items() if kind == "ConfigMap" and CONFIG_KEY in item["data"]
        )  # fmt: skip

    collect()
    assert len(configs) >= 10
    for number, text in enumerate(sorted(configs)):
        path = tmp_path / f"{number}.cfg"
        path.write_text(text, encoding="utf-8")
        done = subprocess.run(
            [shutil.which("haproxy") or "haproxy", "-c", "-f", str(path)], capture_output=True, text=True, timeout=30, check=False
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "warning" not in done.stderr.lower(), done.stderr


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


@dataclasses.dataclass
class Engine:
    """Answers calls after a while, and remembers how many were open at a time."""

    delay_s: float = 0.2
    is_ready: bool = True
    n_open: int = 0
    most_open: int = 0
    n_done: int = 0

    async def make(self, request: web.Request) -> web.Response:
        self.n_open += 1
        self.most_open = max(self.most_open, self.n_open)
        await request.read()
        await asyncio.sleep(self.delay_s)
        self.n_open -= 1
        self.n_done += 1
        return web.json_response(
            {"from": request.headers.get("X-Forwarded-For"), "who": request.headers.get("Authorization")}
        )

    async def ready(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if self.is_ready else 503)


@asynccontextmanager
async def running(engines: list[Engine], folder: Path, weights: list[int]) -> AsyncIterator[tuple[str, str]]:
    """The exported configuration, its names replaced by loopback ports; gives the addresses of calls and state."""
    runners, servers = [], []
    for number, (engine, weight) in enumerate(zip(engines, weights, strict=True)):
        app = web.Application()
        app.router.add_post("/v1/images/generations", engine.make)
        app.router.add_get("/health/ready", engine.ready)
        runner = web.AppRunner(app)
        await runner.setup()
        port = free_port()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        runners.append(runner)
        servers.append(f"    server s{number} 127.0.0.1:{port} check inter 200ms weight {weight}")
    calls, state = free_port(), free_port()
    lines = (
        config_of(source_of(decoupled(25, 16)))
        .replace(":8080\n", f"127.0.0.1:{calls}\n")
        .replace(":8405\n", f"127.0.0.1:{state}\n")
    )
    kept = [line for line in lines.splitlines() if "server-template" not in line]
    path = folder / "haproxy.cfg"
    path.write_text("\n".join([*kept, *servers, ""]), encoding="utf-8")
    process = await asyncio.create_subprocess_exec(shutil.which("haproxy") or "haproxy", "-db", "-f", str(path))
    try:
        yield f"http://127.0.0.1:{calls}", f"http://127.0.0.1:{state}"
    finally:
        process.terminate()
        await asyncio.wait_for(process.wait(), 10)
        for runner in runners:
            await runner.cleanup()


async def until(condition: Any, limit_s: float = 10.0) -> None:
    end_s = time.monotonic() + limit_s
    while not await condition():
        assert time.monotonic() < end_s, "did not happen in time"
        await asyncio.sleep(0.05)


@needs_haproxy
def test_haproxy_gives_calls_to_the_engine_with_the_fewest_for_its_size_and_none_to_one_that_is_not_ready(
    tmp_path: Path,
) -> None:
    asyncio.run(_calls(tmp_path))


async def _calls(folder: Path) -> None:
    slow, fast, broken = Engine(delay_s=0.6), Engine(delay_s=0.1), Engine(is_ready=False)
    async with running([slow, fast, broken], folder, [2, 2, 2]) as (calls, state), aiohttp.ClientSession() as client:

        async def is_up() -> bool:
            try:
                async with client.get(f"{state}{METRICS_PATH}") as answer:
                    text = await answer.text()
            except aiohttp.ClientError:
                return False
            return 'haproxy_server_check_status{proxy="engines",server="s2",state="L7STS"} 1' in text

        await until(is_up)
        async with client.get(f"{state}{ALIVE_PATH}") as answer:
            assert answer.status == 200
        async with client.get(f"{state}/other") as answer:
            assert answer.status == 404

        async def call() -> dict[str, Any]:
            headers = {"Authorization": "Bearer t"}
            async with client.post(
                f"{calls}/v1/images/generations", json={"prompt": "x" * 50_000}, headers=headers
            ) as got:
                assert got.status == 200
                found: dict[str, Any] = await got.json()
                return found

        # six callers at a time: each engine gets half of those that are open at any moment, so the fast one ends with more
        async def caller() -> None:
            for _ in range(5):
                assert await call() == {"from": "127.0.0.1", "who": "Bearer t"}

        await asyncio.gather(*(caller() for _ in range(6)))
    assert (slow.n_done + fast.n_done, broken.n_done) == (30, 0)
    assert fast.n_done > 2 * slow.n_done  # by lot both would have 15; six times as fast, kept equally full
    assert max(slow.most_open, fast.most_open) <= 4  # three each, and one while an answer is on its way


@needs_haproxy
def test_haproxy_fills_a_pod_of_twice_the_size_twice_as_much(tmp_path: Path) -> None:
    async def fill() -> tuple[int, int]:
        large, small = Engine(delay_s=1.0), Engine(delay_s=1.0)
        async with running([large, small], tmp_path, [4, 2]) as (calls, state), aiohttp.ClientSession() as client:

            async def is_up() -> bool:
                try:
                    async with client.get(f"{state}{METRICS_PATH}") as answer:
                        return (await answer.text()).count(',state="L7OK"} 1') == 2
                except aiohttp.ClientError:
                    return False

            await until(is_up)
            answers = await asyncio.gather(*(client.post(f"{calls}/v1/images/generations", json={}) for _ in range(12)))
            for answer in answers:
                assert answer.status == 200
                answer.release()
        return large.most_open, small.most_open

    assert asyncio.run(fill()) == (8, 4)


class Names(asyncio.DatagramProtocol):
    """A name server with one answer: the addresses of the pods that are ready, as the cluster's would give it."""

    def __init__(self) -> None:
        self.addresses: list[str] = []
        self.asked: set[str] = set()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, peer: Any) -> None:
        labels, place = [], 12
        while data[place]:
            labels.append(data[place + 1 : place + 1 + data[place]].decode())
            place += 1 + data[place]
        question = data[12 : place + 5]
        self.asked.add(".".join(labels))
        found = self.addresses if question[-4:-2] == b"\x00\x01" else []  # A, and nothing for AAAA
        # response, recursion available; one question; an answer each that points to the question's name, kept 1 s
        head = data[:2] + b"\x81\x80\x00\x01" + len(found).to_bytes(2, "big") + b"\x00\x00\x00\x00"
        record = b"\xc0\x0c\x00\x01\x00\x01\x00\x00\x00\x01\x00\x04"
        self._transport.sendto(head + question + b"".join(record + socket.inet_aton(ip) for ip in found), peer)


@needs_haproxy
def test_haproxy_finds_pods_by_the_name_of_their_headless_service_as_they_come_and_go(tmp_path: Path) -> None:
    async def follow() -> None:
        names, calls, state, pods = Names(), free_port(), free_port(), free_port()
        transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
            lambda: names, local_addr=("127.0.0.1", 0)
        )
        server = f"    nameserver test 127.0.0.1:{transport.get_extra_info('sockname')[1]}"
        text = config_of(source_of(Allocation((pool(n=16),))))  # two pods of eight
        for old, new in (
            (":8080\n", f"127.0.0.1:{calls}\n"), (":8405\n", f"127.0.0.1:{state}\n"), (":8080 check", f":{pods} check"),
            ("    parse-resolv-conf", server), ("inter 5s", "inter 200ms"),
        ):  # fmt: skip
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "haproxy.cfg").write_text(text, encoding="utf-8")
        app = web.Application()
        app.router.add_get("/health/ready", Engine().ready)
        runner = web.AppRunner(app)
        await runner.setup()
        for address in ("127.0.0.2", "127.0.0.3"):
            await web.TCPSite(runner, address, pods).start()
        process = await asyncio.create_subprocess_exec(
            shutil.which("haproxy") or "haproxy", "-db", "-f", str(tmp_path / "haproxy.cfg")
        )
        try:
            async with aiohttp.ClientSession() as client:

                async def n_serving() -> int:
                    try:
                        async with client.get(f"http://127.0.0.1:{state}{METRICS_PATH}") as answer:
                            lines = (await answer.text()).splitlines()
                    except aiohttp.ClientError:
                        return -1
                    return sum(
                        line.startswith("haproxy_server_status{") and line.endswith('state="UP"} 1') for line in lines
                    )

                for addresses in ([], ["127.0.0.2"], ["127.0.0.2", "127.0.0.3"], ["127.0.0.3"]):
                    names.addresses = addresses

                    async def is_followed(wanted: int = len(addresses)) -> bool:
                        return await n_serving() == wanted

                    await until(is_followed, 20.0)
        finally:
            process.terminate()
            await asyncio.wait_for(process.wait(), 10)
            await runner.cleanup()
            transport.close()
        assert names.asked == {"diffplan-base-1-pods.diffplan.svc.cluster.local"}

    asyncio.run(follow())
