"""Worker processes that are killed, stopped or stuck: their jobs are tried once more, others go on, the worker comes back."""

from __future__ import annotations

import asyncio
import dataclasses
import signal
from pathlib import Path

import pytest

from engine.serving.engine import Engine
from engine.serving.job import ControlUse, Job, LoraUse, Outcome
from tests.faults import rig

SLOW = {"step_s": 0.03}
"""A job of 12 steps runs for at least 0.36 s: long enough to be met by a fault."""


def long_job(name: str, seed: int = 1, **changes: object) -> Job:
    return rig.job(name, seed, **{"n_steps": 12, **changes})


async def started(made: Engine, job: Job) -> asyncio.Task[Outcome]:
    """Submits a job and waits until a worker is in the middle of it."""
    task = asyncio.create_task(made.submit(job))
    await rig.until(
        lambda: any(job.request_id in ids for ids in made.dispatcher.snapshot().running.values()), "it runs"
    )
    await asyncio.sleep(0.1)
    return task


def runs_on(made: Engine, name: str) -> str:
    return next(worker for worker, names in made.dispatcher.snapshot().running.items() if name in names)


def test_a_killed_base_worker_has_its_job_tried_once_more_elsewhere_and_comes_back(tmp_path: Path) -> None:
    async def test() -> None:
        async with rig.engine(tmp_path, rig.allocation(colocated=2), options=SLOW) as made:
            job, other = long_job("a"), long_job("b", seed=2)
            running, beside = await started(made, job), await started(made, other)
            worker = runs_on(made, "a")
            pid = rig.send_signal(made, worker, signal.SIGKILL)
            outcome, untouched = await running, await beside
            rig.check_done(job, outcome)
            rig.check_done(other, untouched)
            assert (outcome.n_attempts, untouched.n_attempts) == (2, 1)
            await rig.all_ready(made)
            assert made.replicas[worker].ranks[0].pid != pid
            assert "SIGKILL" in next(e.detail for e in made.events.recent if e.kind == "down")
            rig.check_books(made)

    rig.run(test)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_cfg_pair_lives_and_dies_as_one(tmp_path: Path, rank: int) -> None:
    async def test() -> None:
        async with rig.engine(tmp_path, rig.allocation(pairs=1, controlnets=1), options=SLOW) as made:
            pids = [handle.pid for handle in made.replicas["pair-0"].ranks]
            controlnet_pid = made.replicas["cn-0"].ranks[0].pid
            job = long_job("a", controls=(ControlUse("c"),))
            running = await started(made, job)
            rig.send_signal(made, "pair-0", signal.SIGKILL, rank)
            outcome = await running
            rig.check_done(job, outcome)
            assert outcome.n_attempts == 2
            assert not {handle.pid for handle in made.replicas["pair-0"].ranks} & set(pids)
            assert made.replicas["cn-0"].ranks[0].pid == controlnet_pid

    rig.run(test)


def test_a_killed_controlnet_worker_costs_an_attempt_not_the_base_worker(tmp_path: Path) -> None:
    async def test() -> None:
        async with rig.engine(tmp_path, rig.allocation(decoupled=2, controlnets=2), options=SLOW) as made:
            job, plain = long_job("a", controls=(ControlUse("c"),)), long_job("b")
            pids = {name: made.replicas[name].ranks[0].pid for name in ("base-0", "base-1")}
            running, beside = await started(made, job), await started(made, plain)
            batch = made.orders.batches[runs_on(made, "a")]
            victim = batch.start.controlnet_workers[0]["c"]
            rig.send_signal(made, victim, signal.SIGKILL)
            outcome, untouched = await running, await beside
            rig.check_done(job, outcome)
            rig.check_done(plain, untouched)
            assert (outcome.n_attempts, untouched.n_attempts) == (2, 1)
            await rig.all_ready(made)
            assert {name: made.replicas[name].ranks[0].pid for name in pids} == pids
            after = long_job("c", controls=(ControlUse("c"), ControlUse("d")))
            rig.check_done(after, await made.submit(after))

    rig.run(test)


def test_a_killed_loader_has_its_fetch_done_by_the_next(tmp_path: Path) -> None:
    async def test() -> None:
        options = {**SLOW, "fetch_s": 0.3}
        async with rig.engine(tmp_path, rig.allocation(colocated=1), options=options) as made:
            job = long_job("a", loras=(LoraUse("l"),))
            running = await started(made, job)
            rig.send_signal(made, "loaders-0", signal.SIGKILL)
            outcome = await running
            rig.check_done(job, outcome)
            assert outcome.n_attempts == 1

    rig.run(test)


@pytest.mark.parametrize("worker", ["base-0", "cn-0"])
def test_a_stopped_worker_is_found_by_its_silence(tmp_path: Path, worker: str) -> None:
    async def test() -> None:
        async with rig.engine(tmp_path, rig.allocation(decoupled=1, controlnets=1), options=SLOW) as made:
            job = long_job("a", controls=(ControlUse("c"),))
            running = await started(made, job)
            rig.send_signal(made, worker, signal.SIGSTOP)
            outcome = await running
            rig.check_done(job, outcome)
            assert outcome.n_attempts == 2
            killed = next(e for e in made.events.recent if e.kind == "kill")
            assert killed.worker_id == worker
            assert "no heartbeat" in killed.detail

    rig.run(test)


@pytest.mark.parametrize("worker", ["base-0", "cn-0"])
def test_a_worker_whose_heart_beats_while_its_work_stands_still_is_killed(tmp_path: Path, worker: str) -> None:
    async def test() -> None:
        async with rig.engine(tmp_path, rig.allocation(decoupled=1, controlnets=1), options=SLOW) as made:
            stuck = tmp_path / "faults" / f"{worker}.stuck"
            job = long_job("a", controls=(ControlUse("c"),))
            running = await started(made, job)
            stuck.touch()
            await rig.until(lambda: made.events.counts["kill"] > 0, "it is killed")
            stuck.unlink()
            outcome = await running
            killed = next(e for e in made.events.recent if e.kind == "kill")
            assert killed.worker_id == worker
            assert "stood still in phase 'step'" in killed.detail
            # With the ControlNet worker stuck, the base gives up first and its second attempt meets the same worker.
            if worker == "base-0":
                rig.check_done(job, outcome)
            else:
                assert outcome.reason or outcome.status == "done"
            rig.check_books(made)

    rig.run(test)


def test_a_worker_that_keeps_crashing_is_started_ever_later_and_says_why(tmp_path: Path) -> None:
    async def test() -> None:
        async with rig.engine(tmp_path, rig.allocation(colocated=2)) as made:
            crash = tmp_path / "faults" / "solo-1.crash"
            crash.touch()
            rig.send_signal(made, "solo-1", signal.SIGKILL)
            replica = made.replicas["solo-1"]
            await rig.until(lambda: replica.n_failures_in_row >= 6, "it failed six times in a row")
            view = next(w for w in made.view().workers if w.worker_id == "solo-1")
            assert view.state in {"starting", "restarting"}
            assert "failures in a row" in view.reason
            assert "told to crash" in view.reason
            waits = [
                float(e.detail.split(" in ")[1].split(" s ")[0]) for e in made.events.recent if e.kind == "restart"
            ]
            assert waits[:6] == [0.02, 0.04, 0.08, 0.16, 0.3, 0.3]  # doubled each time, up to backoff_max_s
            job = rig.job("a")
            rig.check_done(job, await made.submit(job))
            crash.unlink()
            await rig.all_ready(made)

    rig.run(test)


def test_a_worker_that_never_gets_ready_is_given_up_and_tried_again(tmp_path: Path) -> None:
    async def test() -> None:
        bounds = dataclasses.replace(rig.BOUNDS, load_s=0.6)
        folder = tmp_path / "faults"
        folder.mkdir()
        (folder / "solo-1.never_ready").touch()
        async with rig.engine(tmp_path, rig.allocation(colocated=2), bounds=bounds) as made:
            replica = made.replicas["solo-1"]
            assert not replica.is_ready
            assert "stood still in phase 'load'" in replica.reason
            job = rig.job("a")
            rig.check_done(job, await made.submit(job))
            (folder / "solo-1.never_ready").unlink()
            await rig.all_ready(made)

    rig.run(test)


@pytest.mark.parametrize("worker", ["base-0", "cn-0"])
def test_sigterm_to_a_worker_finishes_what_it_has_and_renews_it(tmp_path: Path, worker: str) -> None:
    async def test() -> None:
        async with rig.engine(tmp_path, rig.allocation(decoupled=1, controlnets=1), options=SLOW) as made:
            job = long_job("a", controls=(ControlUse("c"),))
            running = await started(made, job)
            pid = rig.send_signal(made, worker, signal.SIGTERM)
            outcome = await running
            rig.check_done(job, outcome)
            assert outcome.n_attempts == 1
            await rig.until(lambda: made.events.counts["restart"] > 0, "it is renewed")
            await rig.all_ready(made)
            assert made.replicas[worker].ranks[0].pid != pid
            assert made.replicas[worker].n_failures_in_row == 0
            after = long_job("b", controls=(ControlUse("c"),))
            rig.check_done(after, await made.submit(after))

    rig.run(test)


def test_a_cancelled_job_frees_its_worker_before_its_last_step(tmp_path: Path) -> None:
    async def test() -> None:
        async with rig.engine(tmp_path, rig.allocation(pairs=1), options=SLOW) as made:
            running = await started(made, long_job("a", n_steps=600))
            assert made.cancel("a")
            outcome = await running
            assert (outcome.status, outcome.reason) == ("failed", "cancelled")
            job = rig.job("b")
            # 600 steps would take 18 s; the limit is the check that the first job was given up, not a measurement.
            rig.check_done(job, await asyncio.wait_for(made.submit(job), 10.0))
            rig.check_books(made)

    rig.run(test)


def test_bad_add_ons_fail_only_the_jobs_that_use_them(tmp_path: Path) -> None:
    async def test() -> None:
        async with rig.engine(tmp_path, rig.allocation(colocated=1, pairs=1)) as made:
            bad = [
                rig.job("corrupt", loras=(LoraUse("corrupt-1"),)),
                rig.job("missing", loras=(LoraUse("missing-1"),)),
                rig.job("misfit", loras=(LoraUse("misfit-1"),)),
                rig.job("picture", controls=(ControlUse("c", image=0),), blobs=(b"no picture",)),
            ]
            good = [rig.job(f"good{k}", k, loras=(LoraUse("l"),)) for k in range(6)]
            outcomes = await asyncio.gather(*(made.submit(job) for job in [*bad, *good]))
            for job, outcome in zip(bad, outcomes, strict=False):
                assert outcome.status in {"failed", "rejected"}, outcome
                assert outcome.reason
                del job
            for job, outcome in zip(good, outcomes[len(bad) :], strict=True):
                rig.check_done(job, outcome)
            again = await made.submit(rig.job("corrupt again", loras=(LoraUse("corrupt-1"),)))
            assert again.status == "rejected"
            assert made.events.counts["down"] == 0
            rig.check_books(made)

    rig.run(test)


def test_a_lora_that_comes_late_is_patched_in_by_the_bound_on_both_ranks(tmp_path: Path) -> None:
    async def test() -> None:
        options = {**SLOW, "fetch_s": 0.25}
        policies = rig.Policies(lora_patch_by_step=4)
        async with rig.engine(tmp_path, rig.allocation(pairs=1, policies=policies), options=options) as made:
            cold, warm = long_job("cold", loras=(LoraUse("l"),)), long_job("warm", loras=(LoraUse("l"),))
            outcome = await made.submit(cold)
            rig.check_done(cold, outcome)
            assert outcome.result is not None
            assert 0 < (outcome.result.lora_patch_step or 0) <= 4
            assert outcome.result.stages.denoise_s > 0
            second = await made.submit(warm)
            rig.check_done(warm, second)
            assert second.result is not None
            assert second.result.lora_patch_step == 0

    rig.run(test)
