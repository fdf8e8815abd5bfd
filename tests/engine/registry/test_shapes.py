"""The tables of shapes say what the networks say."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.models import ModelSpec
from engine.registry.shapes import TABLES, architecture, architecture_names, compress, expand
from engine.shape_tables import as_text, table
from traces.problems import InputError


@pytest.mark.parametrize("name", ["sdxl", "tiny"])
def test_a_table_is_what_the_networks_give_now(name: str) -> None:
    written = (TABLES / f"{name}.json").read_text(encoding="utf-8")
    assert written == as_text(table(ModelSpec.named(name))), "run python -m engine.shape_tables"
    assert json.loads(written)


def test_sdxl_has_the_layers_that_everybody_patches() -> None:
    sdxl = architecture("sdxl")
    assert len(sdxl.lora_targets) == 722  # 70 transformer blocks of 10 linear layers, 11 attention blocks of 2
    assert sdxl.lora_targets["mid_block.attentions.0.transformer_blocks.9.attn2.to_k"] == (1280, 2048)
    assert sdxl.controlnet["controlnet_cond_embedding.conv_in.weight"] == (16, 3, 3, 3)


def test_every_architecture_has_a_table_and_others_are_refused_by_name() -> None:
    assert architecture_names() == ("sdxl", "tiny")
    with pytest.raises(InputError, match="got 'flux', needs one of sdxl, tiny"):
        architecture("flux")


names = st.lists(st.sampled_from(["a", "b", "0", "1", "2", "9", "10"]), min_size=1, max_size=4).map(".".join)


@given(st.dictionaries(names, st.sampled_from([(1, 2), (3,)]), min_size=1, max_size=40))
def test_expanding_what_was_compressed_gives_it_back(shapes: dict[str, tuple[int, ...]]) -> None:
    assert expand(compress(shapes)) == shapes
