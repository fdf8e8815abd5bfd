"""How a pair agrees on its transport: both sides come to the same, what cannot be had is said, and auto falls back."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from engine.links import tensor_attach
from engine.links.protocol import LineLostError
from engine.links.tcp import TcpLine
from engine.links.tensor_attach import choose, open_as_base, open_as_controlnets
from engine.links.tensor_line import TensorLine
from tests.engine.workers.rig import line_pair

TIMEOUT_S = 20.0
GPU = {"host": "h", "gpu_uuid": "0", "dtype": "bfloat16"}
OTHER_GPU = {**GPU, "gpu_uuid": "1"}
AWAY = {**OTHER_GPU, "host": "k"}
CPU = {**GPU, "gpu_uuid": ""}


@pytest.mark.parametrize(
    ("wanted", "base", "other", "chosen"),
    [
        ("auto", GPU, OTHER_GPU, "cuda_ipc"),
        ("auto", GPU, GPU, "cuda_ipc"),
        ("auto", GPU, AWAY, "line"),
        ("auto", CPU, GPU, "line"),
        ("line", GPU, OTHER_GPU, "line"),
        ("nccl", GPU, AWAY, "nccl"),
        ("gloo", CPU, CPU, "gloo"),
    ],
)
def test_the_fastest_transport_that_both_sides_have_is_chosen(wanted: str, base: Any, other: Any, chosen: str) -> None:
    assert choose(wanted, base, other) == chosen


@pytest.mark.parametrize(("wanted", "other"), [("cuda_ipc", AWAY), ("cuda_ipc", CPU), ("nccl", GPU), ("nccl", CPU)])
def test_a_transport_that_was_asked_for_by_name_and_cannot_be_had_is_an_error(wanted: str, other: Any) -> None:
    with pytest.raises(LineLostError, match="needs"):
        choose(wanted, GPU, other)


def tcp_pair() -> tuple[TcpLine, TcpLine]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        first = socket.create_connection(server.getsockname())
        second, _ = server.accept()
    return TcpLine(first, "pair", "controlnets", TIMEOUT_S), TcpLine(second, "pair", "base", TIMEOUT_S)


def open_both(
    wanted: str = "auto", ends: Any = None, dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32)
) -> tuple[TensorLine, TensorLine, Any]:
    mine, theirs = ends or line_pair("pair")
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(lambda: open_as_controlnets(theirs, theirs.hear(TIMEOUT_S), "cpu", dtypes[1], TIMEOUT_S))
        base = open_as_base(mine, "cpu", dtypes[0], wanted, TIMEOUT_S)
        return base, other.result(TIMEOUT_S), (mine, theirs)


@pytest.mark.parametrize(
    ("wanted", "make_ends"), [("auto", None), ("auto", tcp_pair), ("gloo", None), ("gloo", tcp_pair)]
)
def test_tensors_arrive_as_they_were_sent_whatever_their_type(wanted: str, make_ends: Any) -> None:
    base, other, ends = open_both(wanted, make_ends() if make_ends else None)
    lanes = base.make({"x": 4096})
    ends[0].tell({"type": "begin", "lanes": lanes})
    other.accept(ends[1].hear(TIMEOUT_S)["lanes"])
    sent = [torch.randn(7), torch.randn(3, 5).to(torch.bfloat16), torch.arange(9, dtype=torch.uint8)]
    written = [base.write("x", 256 * i, tensor) for i, tensor in enumerate(sent)]
    for item in written:
        base.publish(item)
    ends[0].tell({"type": "step"})
    assert ends[1].hear(TIMEOUT_S)["type"] == "step"
    for i, tensor in enumerate(sent):
        found = torch.empty_like(tensor)
        other.read("x", 256 * i, found)
        assert torch.equal(found, tensor)
    base.close()
    other.close()
    for end in ends:
        end.close()


def test_two_sides_that_compute_in_different_types_refuse_each_other() -> None:
    with pytest.raises(LineLostError, match="computes in bfloat16, this worker in float32"):
        open_both(dtypes=(torch.float32, torch.bfloat16))


def test_auto_falls_back_to_host_memory_where_device_memory_cannot_be_shared(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # no driver here, as in a container that forbids sharing
    monkeypatch.setattr(tensor_attach, "choose", lambda *_: "cuda_ipc")
    base, other, ends = open_both("auto")
    assert (base.transport, other.transport) == ("host_memory", "host_memory")
    assert [end.transport for end in ends] == ["host_memory", "host_memory"]
    assert "tensors go through host memory" in capfd.readouterr().err
    with pytest.raises(LineLostError, match="cuda_ipc does not work here"):
        open_both("cuda_ipc")


def test_a_group_whose_other_side_goes_is_a_lost_line() -> None:
    base, other, _ = open_both("gloo")
    other.close()
    with pytest.raises(LineLostError):
        base.read("x", 0, torch.empty(4))
