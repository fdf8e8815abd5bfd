"""A session's order as it is said on the command line."""

from __future__ import annotations

import pytest

from calibrate.extent import Extent
from calibrate.passes import GROUPS, passes
from calibrate.setups import setups
from traces.problems import InputError


def test_passes_come_in_the_order_and_as_often_as_they_are_named() -> None:
    blocks = passes(Extent(), "memory, 2*loads:engine+decode:stock ,brief")
    assert [sorted({(task.part, task.station) for task in block}) for block in blocks] == [
        [("memory", "engine"), ("memory", "stock")],
        [("decode", "stock"), ("loads", "engine")],
        [("decode", "stock"), ("loads", "engine")],
        [("serving", "serving")],
    ]


def test_every_cell_of_the_table_is_an_image_of_every_stack() -> None:
    (block,) = passes(Extent(), "cells")
    cells = {(task.topology, task.features.n_controlnets, task.features.n_loras) for task in block}
    assert cells == {
        (t, c, n) for t in ("colocated", "diffusers_tuned", "diffusers") for c in range(4) for n in range(3)
    }
    assert len(block) == 36
    assert {task.features.variant for task in block if task.features.n_loras and task.station != "engine"} == {"fused"}


def test_a_group_is_narrowed_by_station_and_by_numbers_of_add_ons() -> None:
    (block,) = passes(Extent(), "cells:tuned:03c:12l")
    assert {(task.station, task.features.n_controlnets, task.features.n_loras) for task in block} == {
        ("tuned-2", 0, 1), ("tuned-2", 0, 2), ("tuned-controlnets", 3, 1), ("tuned-controlnets", 3, 2),
    }  # fmt: skip


def test_all_that_cannot_be_is_said_at_once() -> None:
    with pytest.raises(InputError) as caught:
        passes(Extent(tuned_batches=()), "lunch,cells:tuned,99*memory,cells:03d")
    text = str(caught.value)
    for part in ("'lunch' is no group", "'cells:tuned'", "is repeated 99 times", "'cells:03d'"):
        assert part in text
    with pytest.raises(InputError, match="names nothing"):
        passes(Extent(), " , ")


def test_every_group_has_stations_that_are_built() -> None:
    extent = Extent(n_gpus=2)
    built = {setup.name for setup in setups(extent, "")}
    for name in GROUPS:
        (block,) = passes(extent, name)
        assert {task.station for task in block} <= built
