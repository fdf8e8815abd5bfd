"""Workers of other hosts: they join over TCP with a token and torchrun's variables, and lines between hosts carry the same bytes."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.serving.engine import Engine
from engine.serving.host_tier import PREFIX
from engine.serving.job import ControlUse, LoraUse
from engine.serving.settings import EngineSettings
from engine.serving.wire import BlockingWire, WireClosedError
from engine.workers.featherweight_arithmetic import number
from tests.faults import rig

TOKEN = "a token of this test"  # noqa: S105


class Host:
    """Stands for another host: starts workers as ``torchrun`` would and ends them."""

    def __init__(self, folder: Path) -> None:
        self.token_file = folder / "token"
        self.token_file.write_text(TOKEN)
        self.workers: list[subprocess.Popen[bytes]] = []

    def start(self, rank: int, port: int) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
        worker = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "engine.workers.main",
                "--join",
                f"127.0.0.1:{port}",
                "--token-file",
                self.token_file,
            ],
            env=environment,
            cwd=Path(__file__).parents[2],
        )
        self.workers.append(worker)
        return worker


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    made = Host(tmp_path)
    yield made
    for worker in made.workers:
        worker.kill()
        worker.wait(10)


def joining(folder: Path, plan: rig.Allocation, devices: tuple[str, ...]) -> Engine:
    return Engine(
        plan,
        EngineSettings(
            run_dir=folder / "run",
            model="featherweight",
            devices=devices,
            options={"step_s": 0.01},
            bounds=rig.BOUNDS,
            join_address="127.0.0.1:0",
            join_token=TOKEN,
        ),
    )


@pytest.mark.parametrize(
    "devices", [("@0", "@1", "@2"), ("@0", "cpu", "cpu"), ("cpu", "@1", "cpu"), ("cpu", "cpu", "@2")]
)
def test_a_cfg_pair_and_its_controlnet_worker_may_be_on_any_hosts(
    tmp_path: Path, host: Host, devices: tuple[str, ...]
) -> None:
    async def test() -> None:
        made = joining(tmp_path, rig.allocation(pairs=1, controlnets=1), devices)
        lora_id = f"lora of {tmp_path}"  # of this test only: other engines have tiers in the same place
        try:
            starting = asyncio.create_task(made.start())
            await rig.until(lambda: made.join_port > 0, "it listens")
            for device in devices:
                if device != "cpu":
                    host.start(int(device[1:]), made.join_port)
            await starting
            await rig.all_ready(made)
            jobs = [
                rig.job(f"j{k}", k, n_images=2, controls=(ControlUse("c"), ControlUse("d")), loras=(LoraUse(lora_id),))
                for k in range(4)
            ]
            for job in jobs:
                rig.check_done(job, await made.submit(job))
            copies = list(Path("/dev/shm").glob(f"{PREFIX}*/{number(lora_id):016x}.flat"))  # noqa: S108
            assert len(copies) == 1 + sum(device != "cpu" for device in devices[:2]), (
                "one here, one for each rank that is far"
            )
            rank_is_far = [device != "cpu" for device in devices]
            ways = {name.split("~")[0][-1]: way for name, way in made.pairs.transports.items()}
            for rank in (0, 1):
                assert ways[str(rank)] == ("tcp" if rank_is_far[rank] or rank_is_far[2] else "host_memory")
        finally:
            await made.stop()
        for worker in host.workers:
            assert worker.wait(10) in {0, 70}  # ended with its control channel

    rig.run(test)


def test_a_joined_worker_that_is_killed_is_replaced_by_the_next_that_joins(tmp_path: Path, host: Host) -> None:
    async def test() -> None:
        made = joining(tmp_path, rig.allocation(colocated=1), ("@0",))
        try:
            starting = asyncio.create_task(made.start())
            await rig.until(lambda: made.join_port > 0, "it listens")
            first = host.start(0, made.join_port)
            await starting
            job = rig.job("a", n_steps=60)
            running = asyncio.create_task(made.submit(job))
            await asyncio.sleep(0.1)
            first.kill()
            host.start(0, made.join_port)
            outcome = await running
            rig.check_done(job, outcome)
            assert outcome.n_attempts == 2
        finally:
            await made.stop()

    rig.run(test)


def test_nobody_joins_without_the_token(tmp_path: Path) -> None:
    async def test() -> None:
        made = joining(tmp_path, rig.allocation(colocated=1), ("@0",))
        try:
            starting = asyncio.create_task(made.start())
            await rig.until(lambda: made.join_port > 0, "it listens")
            hellos = [
                {
                    "type": "join",
                    "version": 1,
                    "token": "a guess of a token",
                    "rank": 0,
                    "local_rank": 0,
                    "pid": 1,
                    "host": "x",
                },
                {"type": "join", "version": 2, "token": TOKEN, "rank": 0, "local_rank": 0, "pid": 1, "host": "x"},
                {"type": "join", "version": 1, "token": TOKEN, "rank": "0", "local_rank": 0, "pid": 1, "host": "x"},
                {"type": "hello", "version": 1, "token": TOKEN, "rank": 0, "local_rank": 0, "pid": 1, "host": "x"},
                {
                    "type": "join",
                    "version": 1,
                    "token": TOKEN * 1000,
                    "rank": 0,
                    "local_rank": 0,
                    "pid": 1,
                    "host": "x",
                },
            ]
            for hello in hellos:
                assert await asyncio.to_thread(_is_sent_away, made.join_port, hello)
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
        finally:
            await made.stop()

    rig.run(test)


def _is_sent_away(port: int, hello: dict[str, object]) -> bool:
    import socket

    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        wire = BlockingWire(connection)
        connection.settimeout(5)
        try:
            wire.send(hello)
            wire.receive()
        except WireClosedError as error:
            return "timed out" not in str(error)
    return False
