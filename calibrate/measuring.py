"""The loop of a measuring session: block by block, then wherever time is best spent; whatever fails is recorded and the rest goes on."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np

from calibrate.design import next_task
from calibrate.extent import Extent
from calibrate.measurement import Failure, Features, RowLog, Session
from calibrate.points import Task, fit_step_task, image, short, unordered
from calibrate.rig import Timed
from calibrate.station import Station, StationError
from calibrate.throttle import GpuWatch, GpuWindow, flags_of

TASK_TIMEOUT_S: Final = 150.0
"""A task that takes far longer than it did before hangs; a first-time task may still be capturing graphs."""
RESERVE_S: Final = 12.0
"""Kept back for writing results and for ending processes."""
ERRORS_MAX: Final = 6
NOISY_SPREAD: Final = 0.1
"""Repetitions of one task whose 10 % and 90 % quantiles are further apart than this share of their median are flagged."""
NOISY_MIN: Final = 4
START_METHOD: Final = "start"
NEVER_S: Final = 1e6


class Stacks(Protocol):
    """The stations of a session."""

    def get(self, name: str) -> Station | None:
        """One that is alive or was; built now if it is one of those that are built when needed."""
        ...

    def is_built(self, name: str) -> bool:
        """Whether a station is there without being built now."""
        ...

    def start(self, name: str, timeout_s: float) -> list[Timed]:
        """Starts a fresh worker and times it until it is ready; raises :class:`StationError`."""
        ...


@dataclass
class State:
    """What a session has done so far."""

    log: RowLog
    start_s: float
    deadline_s: float
    failures: list[Failure] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    tasks: dict[str, int] = field(default_factory=dict)
    """Task name to how often it was done in this session."""
    done_before: dict[str, int] = field(default_factory=dict)
    """Likewise in the sessions that this one resumes."""
    watch: GpuWatch | None = None
    seen: list[dict[str, object]] = field(default_factory=list)
    """What the GPU did, block by block."""

    def left_s(self) -> float:
        """Seconds of measuring that are left."""
        return self.deadline_s - time.perf_counter()

    def fail(self, part: str, error: str) -> None:
        """Notes a part that could not be measured."""
        at_s = time.perf_counter() - self.start_s
        self.failures.append(Failure(part, error, round(at_s, 1)))
        say(f"{at_s:6.1f} s  {part}: {error}")

    def spent(self, part: str, seconds: float) -> None:
        """Books time on a part."""
        self.parts[part] = round(self.parts.get(part, 0.0) + seconds, 3)


def say(text: str) -> None:
    """One line of progress."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


@dataclass
class Measuring:
    """One pass over the blocks of a schedule."""

    stacks: Stacks
    extent: Extent
    state: State
    session: Callable[[], Session]
    took: dict[tuple[str, str, Features], float] = field(default_factory=dict)
    cells: dict[tuple[str, str, Features], dict[tuple[str, str, Features], list[float]]] = field(default_factory=dict)
    """By task, the values of every cell it gave."""
    windows: list[GpuWindow] = field(default_factory=list)
    """What the GPUs did in this block."""

    def run(self, blocks: Sequence[Sequence[Task]], *, fills_budget: bool = False) -> None:
        """Runs the blocks; what fits no more is left out and said once per part.

        ``fills_budget``: what time is left then goes where it is best spent.
        """
        state = self.state
        left_out: dict[str, int] = {}
        skips = dict(state.done_before)
        rng = np.random.default_rng(np.random.SeedSequence([self.extent.seed, 1]))
        for number, block in enumerate(blocks, start=1):
            start_s = time.perf_counter()
            for index in rng.permutation(len(block)):
                task = block[index]
                if skips.get(task.name, 0) > 0:
                    skips[task.name] -= 1
                elif not self._fits(task):
                    left_out[task.part] = left_out.get(task.part, 0) + 1
                else:
                    self._do(task)
            seconds = time.perf_counter() - start_s
            for part in sorted({task.part for task in block}):
                state.spent(part, seconds)
            self._end_block(block[0].part)
            say(
                f"{time.perf_counter() - state.start_s:6.1f} s  block {number} of {len(blocks)}, {block[0].part}: "
                f"{len(block)} tasks, {seconds:.1f} s; {max(0.0, state.left_s()):.0f} s of measuring left"
            )
        if fills_budget:
            self._fill(blocks)
        for part, count in sorted(left_out.items()):
            state.fail(part, f"{count} tasks were left out: the budget was spent")

    def _fill(self, blocks: Sequence[Sequence[Task]]) -> None:
        """Spends what is left where it removes most uncertainty (``calibrate.design``)."""
        state, main = self.state, image(self.extent, 0, 0)
        tasks = [task for task in unordered(list(block) for block in blocks) if task.method != START_METHOD]
        if any(task.part == "steps" for task in tasks):
            tasks += [fit_step_task(self.extent, shape) for shape in self.extent.candidate_shapes]
        start_s, n_done = time.perf_counter(), 0
        while True:
            able = [task for task in tasks if self._is_able(task)]
            task = next_task(able, self.cells, self.took, main, state.left_s())
            if task is None:
                break
            self._do(task)
            n_done += 1
        if n_done:
            state.spent("filled", time.perf_counter() - start_s)
            self._end_block("filled")
            say(f"{time.perf_counter() - state.start_s:6.1f} s  {n_done} more tasks where laws were least certain")

    def _fits(self, task: Task) -> bool:
        return self.took.get(task.key, task.cost_s) <= self.state.left_s()

    def _is_able(self, task: Task) -> bool:
        """Whether a task can be asked for again: its station lives and has not failed too often."""
        if self.took.get(task.key, 0.0) >= NEVER_S or self.state.errors.get(task.station, 0) >= ERRORS_MAX:
            return False
        station = self.stacks.get(task.station) if self.stacks.is_built(task.station) else None
        return station is not None and station.is_alive

    def _do(self, task: Task) -> None:
        state = self.state
        is_start = task.method == START_METHOD
        station = None if is_start else self.stacks.get(task.station)
        name = task.station
        if not is_start and (station is None or not station.is_alive) and task.fallback:
            name, station = task.fallback, self.stacks.get(task.fallback)
        if not is_start and (station is None or not station.is_alive):
            return
        if state.errors.get(name, 0) >= ERRORS_MAX:
            return
        began_s = time.perf_counter()
        timeout_s = min(TASK_TIMEOUT_S, state.left_s() + RESERVE_S / 2)
        try:
            if station is None:
                timed = self.stacks.start(name, timeout_s)
            else:
                timed = station.ask(task.method, task.features, task.n_repeats, timeout_s)
        except StationError as error:
            state.errors[name] = state.errors.get(name, 0) + 1
            state.fail(f"{task.part}: {name} {task.method} {short(task.features)}".rstrip(), str(error))
            if station is not None and not station.is_alive:
                state.fail(f"station {name}", "has ended; its other tasks are left out")
            # what failed once is tried once more in a later round, not in every one
            self.took[task.key] = NEVER_S if task.key in self.took else time.perf_counter() - began_s
            return
        self.took[task.key] = time.perf_counter() - began_s
        state.tasks[task.name] = state.tasks.get(task.name, 0) + 1
        self._record(task, timed)

    def _record(self, task: Task, timed: list[Timed]) -> None:
        slowed = self._look()
        kept = self.cells.setdefault(task.key, {})
        for item in timed:
            is_image = item.quantity.startswith("e2e.")
            stack = item.quantity.split(".")[1 if is_image else 0]
            quantity = f"e2e.{task.topology}" if is_image else item.quantity
            kept.setdefault((quantity, item.mode, item.features), []).extend(item.values_s)
            flags = [*flags_of(slowed), *(["noisy"] if is_noisy(item.values_s) else [])]
            self.state.log.add(
                quantity, item.values_s, stack="engine" if stack == "serving" else stack, topology=task.topology,
                mode=item.mode, features=item.features, is_held_out=task.is_held_out, flags="+".join(flags),
            )  # fmt: skip

    def _end_block(self, part: str) -> None:
        state, watch = self.state, self.state.watch
        if watch is not None and watch.can_see:
            self._look()
            state.seen.append({
                "at_s": round(time.perf_counter() - state.start_s, 1), "part": part,
                "slowed_by": sorted({why for w in self.windows for why in w.slowed_by(watch.sm_mhz_fastest)}),
                "temperature_c_max": [window.temperature_c_max for window in self.windows],
                "sm_mhz": [[window.sm_mhz_min, window.sm_mhz_max] for window in self.windows],
                "power_w_max": [round(window.power_w_max) for window in self.windows],
            })  # fmt: skip
        self.windows = []
        state.log.write_session(self.session())

    def _look(self) -> list[str]:
        """Why the GPUs were slowed since the last look; books it for the block."""
        watch = self.state.watch
        if watch is None:
            return []
        seen = watch.look()
        self.windows = self.windows or [GpuWindow() for _ in seen]
        for whole, window in zip(self.windows, seen, strict=True):
            whole.join(window)
        return sorted({why for window in seen for why in window.slowed_by(watch.sm_mhz_fastest)})


def is_noisy(values: Sequence[float]) -> bool:
    """Whether repetitions differ more than :data:`NOISY_SPREAD` between their 10 % and 90 % quantiles."""
    if len(values) < NOISY_MIN:
        return False
    low, median, high = np.quantile(np.asarray(values), (0.1, 0.5, 0.9))
    return bool((high - low) / median > NOISY_SPREAD)


def merged_counts(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Sums of several books of tasks."""
    total: dict[str, int] = {}
    for count in counts:
        for name, n in count.items():
            total[name] = total.get(name, 0) + n
    return total
