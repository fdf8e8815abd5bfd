"""Turns a function over static buffers into something cheap to call again: itself on a CPU, a captured CUDA graph on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Final

import torch

Part = Callable[[], None]
N_WARM_UPS: Final = 3
"""Runs before a capture: libraries choose kernels and allocate workspaces, torch.compile compiles, Triton tunes."""


class Recorder:
    """Makes parts for one device. All graphs of a recorder share one memory pool and must be replayed on one stream, in turn."""

    def __init__(
        self,
        device: torch.device,
        *,
        uses_graphs: bool,
        surroundings: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        """``surroundings`` is entered around every run, warm-up and capture (swapped kernels, attention choice)."""
        self._device = device
        self._surroundings = surroundings
        self._pool = torch.cuda.graph_pool_handle() if uses_graphs else None
        # One for all warm-ups: the allocator keeps freed memory by stream.
        self._side = torch.cuda.Stream(device) if uses_graphs else None

    def record(self, run: Callable[[], Any]) -> Part:
        """Returns a part that does what ``run`` does. ``run`` reads and writes static tensors only and never waits for the host.

        With graphs, ``run`` is executed a few times now, so its static inputs must hold finite numbers and its outputs are
        overwritten.
        """
        if self._side is None:

            def plain() -> None:
                with torch.no_grad(), self._surroundings():
                    run()

            return plain
        with torch.cuda.device(self._device), torch.no_grad(), self._surroundings():
            side = self._side
            side.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(side):
                for _ in range(N_WARM_UPS):
                    run()
            torch.cuda.current_stream(self._device).wait_stream(side)
            torch.cuda.synchronize(self._device)
            graph = torch.cuda.CUDAGraph()
            # thread_local: NCCL's watchdog thread queries events meanwhile, which a global capture would forbid.
            with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
                kept = run()
            torch.cuda.synchronize(self._device)
        return _Replay(graph, kept)


class _Replay:
    """A captured graph and the tensors that it must keep alive."""

    def __init__(self, graph: torch.cuda.CUDAGraph, kept: Any) -> None:
        self._graph = graph
        self._kept = kept

    def __call__(self) -> None:
        self._graph.replay()


@contextmanager
def attention_choice(name: str) -> Any:
    """Makes torch try cuDNN's attention first; ``default`` leaves torch's own order."""
    with ExitStack() as stack:
        if name == "cudnn":
            from torch.nn.attention import SDPBackend, sdpa_kernel

            order = [
                SDPBackend.CUDNN_ATTENTION,
                SDPBackend.FLASH_ATTENTION,
                SDPBackend.EFFICIENT_ATTENTION,
                SDPBackend.MATH,
            ]
            stack.enter_context(sdpa_kernel(order, set_priority=True))
        yield
