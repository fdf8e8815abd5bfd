"""What faults and overload must not cost: descriptors, threads, shared memory, zombies, orphans, memory."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from engine.serving.host_tier import PREFIX
from engine.serving.job import ControlUse, Outcome
from tests.faults import rig

N_KILLS = 50
RESIDENT_GROWTH_MAX = 12 * 2**20
"""After a warm-up, 40 restarts may grow the front by what the allocator keeps: 0.3 MiB each would be a leak."""


def children() -> dict[int, str]:
    """Own child processes and their states; Z is a zombie."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[1]) == os.getpid():
                found[int(entry.name)] = fields[0]
    return found


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_fifty_kills_leave_nothing_behind(tmp_path: Path) -> None:
    async def test() -> None:
        shared = Path("/dev/shm")  # noqa: S108
        shared_before = set(shared.iterdir())
        async with rig.engine(tmp_path, rig.allocation(decoupled=2, controlnets=1)) as made:
            names = ["base-0", "cn-0", "base-1", "loaders-0"]
            at_rest: tuple[int, int, int] | None = None
            resident = 0
            for k in range(N_KILLS):
                job = rig.job(f"j{k}", k, controls=(ControlUse("c"),))
                running = asyncio.create_task(made.submit(job))
                await asyncio.sleep(0.004)
                rig.send_signal(made, names[k % len(names)], signal.SIGKILL)
                outcome = await running
                if outcome.status == "done":
                    rig.check_done(job, outcome)
                assert outcome.status in {"done", "failed"}
                await rig.all_ready(made)
                if k == 9:
                    gc.collect()
                    at_rest = (descriptors(), threading.active_count(), len(children()))
                    resident = resident_bytes()
            gc.collect()
            await rig.until(
                lambda: (descriptors(), threading.active_count(), len(children())) == at_rest, "all is freed"
            )
            assert "Z" not in children().values()
            assert resident_bytes() - resident < RESIDENT_GROWTH_MAX
            # Engines of other tests that run beside this one have folders there too.
            new = {path for path in set(shared.iterdir()) - shared_before if path.name.startswith("diffplan")}
            assert all(path.name.startswith(PREFIX) for path in new)
            tier = made.host_tier
            assert tier is not None
            assert {path.name for path in tier.iterdir()} == {".in-use"}
            assert made.events.counts["ready"] == 4 + N_KILLS
            rig.check_books(made)
        assert not tier.exists()
        assert "Z" not in children().values()

    rig.run(test, limit_s=120.0)


def test_ten_times_overload_is_answered_and_bounded(tmp_path: Path) -> None:
    """One worker serves about 70 jobs a second at most (6 steps of 2 ms and more); 1,400 come within two seconds."""

    async def test() -> None:
        policies = rig.Policies(queue_limit=20)
        async with rig.engine(tmp_path, rig.allocation(colocated=1, policies=policies)) as made:
            loads: list[asyncio.Task[Outcome]] = []
            jobs = [rig.job(f"j{k}", k, deadline_s=10.0) for k in range(1400)]
            for k, job in enumerate(jobs):
                loads.append(asyncio.create_task(made.submit(job)))
                if k % 7 == 0:
                    await asyncio.sleep(0.01)
                    assert made.dispatcher.snapshot().n_waiting <= 20
            outcomes = await asyncio.gather(*loads)
            done = [(job, outcome) for job, outcome in zip(jobs, outcomes, strict=True) if outcome.status == "done"]
            rejected = [outcome for outcome in outcomes if outcome.status == "rejected"]
            assert len(done) + len(rejected) == len(jobs)
            assert len(rejected) > len(jobs) / 2
            assert len(done) > 20
            for job, outcome in done:
                rig.check_done(job, outcome)
                assert outcome.end_s - outcome.arrival_s <= 10.0
            rig.check_books(made)

    rig.run(test)


SCRIPT = """
import asyncio, sys
from pathlib import Path
from tests.faults import rig

async def main():
    async with rig.engine(Path(sys.argv[1]), rig.allocation(decoupled=1, pairs=1, controlnets=1)) as made:
        pids = [rank.pid for replica in made.replicas.values() for rank in replica.ranks]
        made.replicas["cn-0"].ranks[0].signal(19)  # SIGSTOP: a stopped process cannot end itself
        print(made.host_tier, *pids, flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


def test_workers_do_not_outlive_a_front_that_is_killed_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    from engine.serving.host_tier import remove_left_overs

    root = str(Path(__file__).parents[2])
    front = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=root, env={**os.environ}
    )
    try:
        assert front.stdout is not None
        folder, *pids = front.stdout.readline().split()
        assert len(pids) == 5
        front.kill()
        front.wait(10)
    finally:
        front.kill()
        front.wait(10)

    async def gone() -> None:
        await rig.until(lambda: not any(_lives(int(pid)) for pid in pids), "no worker lives")

    rig.run(gone)
    assert Path(folder).exists()
    assert Path(folder) in remove_left_overs(Path(folder).parent)
    assert not Path(folder).exists()


def _lives(pid: int) -> bool:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"engine.workers.main" in command
