"""Another allocation is applied to a running engine: workers that stay keep their processes, nothing that runs is disturbed."""

from __future__ import annotations

import asyncio
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from engine.allocation import Allocation, Link, Policies, Pool
from engine.catalogue import Catalogue, CatalogueEntry
from engine.serving.engine import Engine
from engine.serving.engine_view import WorkerView
from engine.serving.job import ControlUse, LoraUse
from engine.serving.warm_shapes import read_warm_shapes
from tests.faults import rig
from traces.problems import InputError


def pids(made: Engine) -> dict[str, tuple[int, ...]]:
    return {name: tuple(rank.pid for rank in replica.ranks) for name, replica in made.replicas.items()}


def test_workers_that_stay_keep_their_processes_while_others_come_and_go_under_load(tmp_path: Path) -> None:
    async def test() -> None:
        async with rig.engine(tmp_path, rig.allocation(decoupled=2, controlnets=1)) as made:
            jobs = [
                rig.job(f"j{k}", k, controls=(ControlUse(f"c{k % 3}"),), loras=(LoraUse(f"l{k % 4}"),))
                for k in range(120)
            ]
            before = pids(made)
            load = [asyncio.create_task(made.submit(job)) for job in jobs]
            report = await made.apply(rig.allocation(decoupled=1, pairs=1, controlnets=2))
            assert set(report["started"]) == {"pair-0", "cn-1"}
            assert report["stopped"] == ["base-1"]
            assert report["is_attached"]
            for job, outcome in zip(jobs, await asyncio.gather(*load), strict=True):
                rig.check_done(job, outcome)
                assert outcome.n_attempts == 1, outcome
            after = pids(made)
            assert set(after) == {"base-0", "pair-0", "cn-0", "cn-1", "loaders-0"}
            assert all(after[name] == before[name] for name in ("base-0", "cn-0", "loaders-0"))
            kinds = made.events.counts
            assert (kinds["drain"], kinds["stop"], kinds["down"], kinds["apply"]) == (1, 1, 1, 1)
            assert (
                kinds["attach"] == 2 + 1 + 4
            )  # two bases with cn-0; base-0 with cn-1; both ranks of the pair with both
            assert all(e.duration_s is not None for e in made.events.recent if e.kind in {"attach", "drain", "ready"})
            rig.check_books(made)

    rig.run(test)


def test_a_controlnet_is_added_to_a_running_worker_without_a_restart(tmp_path: Path) -> None:
    async def test() -> None:
        plan = rig.allocation(decoupled=1, controlnets=1, controlnet_ids=("c0",))
        async with rig.engine(tmp_path, plan) as made:
            before = pids(made)
            job = rig.job("a", controls=(ControlUse("c1"),))
            assert (await made.submit(job)).status == "rejected"
            report = await made.apply(rig.allocation(decoupled=1, controlnets=1, controlnet_ids=("c0", "c1")))
            assert report["updated"] == ["cn-0"]
            again = rig.job("b", controls=(ControlUse("c1"), ControlUse("c0")))
            rig.check_done(again, await made.submit(again))
            assert pids(made) == before

    rig.run(test)


def test_a_new_entry_of_the_catalogue_reaches_the_workers_while_they_serve(tmp_path: Path) -> None:
    async def test() -> None:
        async with rig.engine(tmp_path, rig.allocation(decoupled=1, controlnets=1)) as made:
            entry = CatalogueEntry("canny", "controlnet", "tiny", file="seed:7")
            assert await made.admit(Catalogue({"canny": entry})) == {"admitted": ["canny"], "refused": {}}
            assert await made.admit(Catalogue({"canny": entry})) == {"admitted": [], "refused": {}}
            assert made.events.counts["admit"] == 2  # the base and the ControlNet worker

    rig.run(test)


def test_links_decide_which_base_uses_which_controlnet_worker_and_can_be_moved(tmp_path: Path) -> None:
    def plan(link: str) -> Allocation:
        base = Pool("base", "base", 1, "cpu", 1, "decoupled")
        pools = (base, Pool("left", "controlnet", 1, "cpu"), Pool("right", "controlnet", 1, "cpu"))
        return Allocation(pools=pools, links=(Link("base", link),), policies=Policies(lora_patch_by_step=0))

    async def test() -> None:
        async with rig.engine(tmp_path, plan("left")) as made:
            before = pids(made)
            assert [name.split("#")[0] for name in made.pairs.transports] == ["base-0.0~left-0"]
            await made.apply(plan("right"))
            assert [name.split("#")[0] for name in made.pairs.transports] == ["base-0.0~right-0"]
            job = rig.job("a", controls=(ControlUse("c"),))
            rig.check_done(job, await made.submit(job))
            await rig.until(lambda: made.events.counts["detach"] == 1, "the old pair is detached")
            assert pids(made) == before

    rig.run(test)


def test_each_half_of_a_pair_uses_a_controlnet_worker_of_its_own_if_there_are_two(tmp_path: Path) -> None:
    async def test() -> None:
        async with rig.engine(tmp_path, rig.allocation(pairs=1, controlnets=2)) as made:
            job = rig.job("a", controls=(ControlUse("c"), ControlUse("d")))
            running = asyncio.create_task(made.submit(job))
            await rig.until(lambda: bool(made.orders.batches), "it runs")
            workers = made.orders.batches["pair-0"].start.controlnet_workers
            assert sorted(sorted(set(of_rank.values())) for of_rank in workers) == [["cn-0"], ["cn-1"]]
            rig.check_done(job, await running)
            rig.check_books(made)

    rig.run(test)


def test_an_allocation_whose_new_workers_do_not_get_ready_changes_nothing(tmp_path: Path) -> None:
    async def test() -> None:
        async with rig.engine(tmp_path, rig.allocation(colocated=1)) as made:
            before = pids(made)
            (tmp_path / "faults" / "base-0.crash").touch()
            with pytest.raises(InputError, match="told to crash"):
                await made.apply(rig.allocation(decoupled=1))
            assert pids(made) == before
            assert made.view().wanted == {"solo": 1}
            job = rig.job("a")
            rig.check_done(job, await made.submit(job))

    rig.run(test)


def test_devices_of_workers_that_go_are_given_to_those_that_come(tmp_path: Path) -> None:
    async def test() -> None:
        devices = ("made-up:0", "made-up:1")
        async with rig.engine(tmp_path, rig.allocation(colocated=2), devices=devices) as made:
            assert [made.replicas[name].devices for name in ("solo-0", "solo-1")] == [("made-up:0",), ("made-up:1",)]
            with pytest.raises(InputError, match="names 2 devices, the allocation needs 4"):
                await made.apply(rig.allocation(colocated=2, pairs=1))
            report = await made.apply(rig.allocation(pairs=1))
            assert not report["not_ready"]
            assert made.replicas["pair-0"].devices == devices
            job = rig.job("a")
            rig.check_done(job, await made.submit(job))

    rig.run(test)


def test_drain_ends_what_was_admitted_and_refuses_the_rest(tmp_path: Path) -> None:
    async def test() -> None:
        async with rig.engine(tmp_path, rig.allocation(colocated=1), options={"step_s": 0.02}) as made:
            jobs = [rig.job(f"j{k}", k) for k in range(5)]
            load = [asyncio.create_task(made.submit(job)) for job in jobs]
            await asyncio.sleep(0)
            draining = asyncio.create_task(made.drain(20.0))
            await asyncio.sleep(0)
            late = await made.submit(rig.job("late"))
            assert late.status == "rejected"
            assert "draining" in late.reason
            assert await draining
            for job, outcome in zip(jobs, await asyncio.gather(*load), strict=True):
                rig.check_done(job, outcome)

    rig.run(test)


def test_stop_ends_every_job_with_a_reason(tmp_path: Path) -> None:
    async def test() -> None:
        async with rig.engine(tmp_path, rig.allocation(colocated=1), options={"step_s": 0.1}) as made:
            load = [asyncio.create_task(made.submit(rig.job(f"j{k}", k))) for k in range(5)]
            await asyncio.sleep(0.1)
            await made.stop()
            for outcome in await asyncio.gather(*load):
                assert (outcome.status, outcome.reason) == ("failed", "the engine was stopped")
            rig.check_books(made)

    rig.run(test)


def test_a_controlnet_worker_that_loads_for_one_client_goes_on_serving_the_others(tmp_path: Path) -> None:
    async def test() -> None:
        plan = rig.allocation(decoupled=2, controlnets=1)
        bounds = replace(rig.BOUNDS, line_s=20.0)
        async with rig.engine(tmp_path, plan, options={"controlnet_load_s": 3.0}, bounds=bounds) as made:
            await rig.all_ready(made)
            known = rig.job("known", controls=(ControlUse("c0"),))
            rig.check_done(known, await made.submit(known))
            new = rig.job("new", controls=(ControlUse("c1"),))
            loading = asyncio.create_task(made.submit(new))
            await rig.until(lambda: len(made.orders.batches) == 1, "the load has begun")
            for k in range(3):
                beside = rig.job(f"beside-{k}", k, controls=(ControlUse("c0"),))
                rig.check_done(beside, await made.submit(beside))
                assert not loading.done(), "it ended before a request that did not have to wait for its load"
            rig.check_done(new, await loading)
            rig.check_books(made)

    rig.run(test)


def test_a_worker_is_ready_once_it_has_captured_its_warm_shapes_and_again_after_a_restart(tmp_path: Path) -> None:
    async def test() -> None:
        warm = read_warm_shapes("16x16:1,16x16:2")
        async with rig.engine(tmp_path, rig.allocation(decoupled=1), options={"warm_s": 0.3}, warm=warm) as made:

            def base() -> WorkerView:
                return next(worker for worker in made.view().workers if worker.role == "base")

            assert (base().state, base().shapes) == ("ready", ("16x16:1", "16x16:2"))
            rig.send_signal(made, "base-0", signal.SIGKILL)
            await rig.until(
                lambda: base().state == "starting" and "warm shapes" in base().reason, "it says what it is at"
            )
            assert base().shapes == ()
            await rig.all_ready(made)
            assert base().shapes == ("16x16:1", "16x16:2")

    rig.run(test)
