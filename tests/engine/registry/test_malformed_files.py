"""Files that must not be used are refused with the reason, whatever is wrong with them, and never by a crash."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from engine.registry.lora_admission import Expected, Limits, check_lora
from engine.registry.safetensors_header import HEADER_BYTES_MAX, AddOnRefusedError
from engine.registry.store import StoreError
from tests.engine.registry.files import (
    Bytes,
    Header,
    check,
    file_of,
    joined,
    lora_bytes,
    parts,
    tensors_of,
    tiny,
    with_text,
)

Tensors = dict[str, np.ndarray]


def test_the_file_that_is_spoilt_below_is_right_by_itself() -> None:
    facts = check(lora_bytes())
    assert facts.rank == 4
    assert facts.targets == ("attn1.to_k", "attn1.to_out.0", "attn1.to_q", "attn1.to_v",
                             "attn2.to_k", "attn2.to_out.0", "attn2.to_q", "attn2.to_v")  # fmt: skip


def first(header: Header) -> Header:
    return header[next(name for name in header if name != "__metadata__")]


def in_header(change: Callable[[Header], object]) -> Callable[[bytes], bytes]:
    def spoil(data: bytes) -> bytes:
        header, body = parts(data)
        change(header)
        return joined(header, body)

    return spoil


def in_text(change: Callable[[str], str]) -> Callable[[bytes], bytes]:
    def spoil(data: bytes) -> bytes:
        header, body = parts(data)
        return with_text(change(json.dumps(header)).encode(), body)

    return spoil


def in_tensors(change: Callable[[Tensors, str], object]) -> Callable[[bytes], bytes]:
    def spoil(data: bytes) -> bytes:
        tensors = tensors_of(data)
        change(tensors, next(name for name in tensors if name.endswith("lora_A.weight")))
        return file_of(tensors)

    return spoil


def twice(text: str) -> str:
    header = json.loads(text)
    name = next(name for name in header if name != "__metadata__")
    return text[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}"


def gap(header: Header) -> None:
    last = max((entry for name, entry in header.items() if name[0] != "_"), key=lambda entry: entry["data_offsets"][1])
    last["data_offsets"] = [offset + 2 for offset in last["data_offsets"]]


def same_place_as_the_next(header: Header) -> None:
    one, two = [entry for name, entry in header.items() if name[0] != "_"][:2]
    two["data_offsets"] = one["data_offsets"]


def set_to(row: int, column: int, value: float) -> Callable[[Tensors, str], None]:
    def change(tensors: Tensors, name: str) -> None:
        tensors[name][row, column] = value

    return change


def rank_300(tensors: Tensors, name: str) -> None:
    up = name.replace("lora_A", "lora_B")
    tensors[name] = np.zeros((300, tensors[name].shape[1]), np.float16)
    tensors[up] = np.zeros((tensors[up].shape[0], 300), np.float16)


def other_rank_above(tensors: Tensors, name: str) -> None:
    up = name.replace("lora_A", "lora_B")
    tensors[up] = np.zeros((tensors[up].shape[0], 5), np.float16)


ZOO = [
    # the container
    (lambda data: b"", "is truncated: 0 bytes"),
    (lambda data: data[:4], "is truncated: 4 bytes"),
    (lambda data: data[:40], "truncated inside its header"),
    (lambda data: data[:-10], "is truncated"),
    (lambda data: data + b"hidden", "6 bytes that no tensor owns"),
    (lambda data: pickle.dumps({"a": 1}), "is a pickle"),
    (lambda data: b"PK\x03\x04" + bytes(100), "zip archive"),
    (lambda data: struct.pack("<Q", 2**63) + data[8:], "says that its header has 9223372036854775808 bytes"),
    (lambda data: struct.pack("<Q", HEADER_BYTES_MAX + 1) + data[8:], "says that its header has"),
    (lambda data: struct.pack("<Q", 0) + data[8:], "broken header"),
    # the JSON
    (in_text(lambda text: text[:-1]), "broken header"),
    (in_text(lambda text: "[1, 2]"), "header of type list"),
    (in_text(lambda text: "[" * 100_000), "broken header"),
    (in_text(lambda text: '{"a":' * 100_000), "broken header"),
    (in_text(lambda text: "\x00" + text), "broken header"),
    (in_text(lambda text: text + "{}"), "broken header"),
    (in_text(lambda text: "{}"), "bytes that no tensor owns"),
    (in_text(lambda text: text.replace('"F16"', "NaN", 1)), "NaN is not a number"),
    (in_text(lambda text: text.replace('[0,', "[" + "9" * 5000 + ",", 1)), "broken header"),
    (in_text(twice), "duplicate key"),
    (in_text(lambda text: text.replace('"dtype"', '"dtype": "F16", "dtype"', 1)), "duplicate key 'dtype'"),
    (lambda data: with_text(b'{"a\xff": 1}', b""), "broken header"),
    (in_header(lambda header: header.update(__metadata__={"a": 1})), "has the metadata"),
    (in_header(lambda header: header.update(__metadata__=[])), "has the metadata"),
    (in_header(lambda header: header.update({"x" * 2000: first(header)})), "a tensor name of 2000 characters"),
    # the entries
    (in_header(lambda header: first(header).update(dtype="F64")), "dtype 'F64'"),
    (in_header(lambda header: first(header).update(dtype="I32")), "dtype 'I32'"),
    (in_header(lambda header: first(header).update(dtype=["F16"])), "has dtype"),
    (in_header(lambda header: first(header).update(extra=1)), "is described by"),
    (in_header(lambda header: first(header).pop("shape")), "is described by"),
    (in_header(lambda header: first(header).update(shape=[4, -64])), "has shape"),
    (in_header(lambda header: first(header).update(shape=[4.0, 64.0])), "has shape"),
    (in_header(lambda header: first(header).update(shape=[True, 64])), "has shape"),
    (in_header(lambda header: first(header).update(shape=[2**47, 2**47])), "lies at"),
    (in_header(lambda header: first(header).update(shape=[1] * 40)), "has shape"),
    (in_header(lambda header: first(header).update(data_offsets=[0])), "offsets"),
    (in_header(lambda header: first(header).update(data_offsets=[8, 0])), "the first at most the second"),
    (in_header(lambda header: first(header)["data_offsets"].__setitem__(0, -8)), "offsets"),
    (in_header(lambda header: first(header)["data_offsets"].__setitem__(1, 2**47)), "lies at"),
    (in_header(gap), "lies at"),
    (in_header(same_place_as_the_next), "lies at"),
    (in_header(lambda header: header.update({"empty": {"dtype": "F16", "shape": [0, 4], "data_offsets": [0, 0]}})), "is empty"),
    # what the tensors mean
    (in_tensors(lambda tensors, name: tensors.clear()), "holds no tensor"),
    (in_tensors(lambda tensors, name: tensors.pop(name)), "is unpaired"),
    (in_tensors(rank_300), "rank 300, needs at most 256"),
    (in_tensors(other_rank_above), "has shapes"),
    (in_tensors(lambda tensors, name: tensors.update({name: tensors[name][:, 1:]})), "has shapes"),
    (in_tensors(lambda tensors, name: tensors.update({name: tensors[name][None, :, :]})), "has shape"),
    (in_tensors(lambda tensors, name: tensors.update({"unet.nowhere.to_q.alpha": np.ones(1, np.float16)})), "'nowhere.to_q' does not"),
    (in_tensors(lambda tensors, name: tensors.update({name.removeprefix("unet."): tensors[name]})), "twice"),
    (in_tensors(lambda tensors, name: tensors.update({name + ".dora_scale": np.ones((4, 1), np.float16)})), "is not understood"),
    (in_tensors(lambda tensors, name: tensors.update({"lora_te1_text_model_layers_0.alpha": np.ones(1, np.float16)})), "patches a text encoder"),
    (in_tensors(lambda tensors, name: tensors.update({"text_encoder_2.x.lora_A.weight": np.ones((4, 8), np.float16)})), "patches a text encoder"),
    # the values
    (in_tensors(set_to(0, 0, np.nan)), "holds NaN or infinity"),
    (in_tensors(set_to(-1, -1, np.inf)), "holds NaN or infinity"),
    (in_tensors(set_to(1, 2, -np.inf)), "holds NaN or infinity"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "reason"), ZOO, ids=[f"{i}: {reason[:40]}" for i, (_, reason) in enumerate(ZOO)])
def test_a_malformed_file_is_refused_with_the_reason(spoil: Callable[[bytes], bytes], reason: str) -> None:
    with pytest.raises(AddOnRefusedError, match=reason):
        check(spoil(lora_bytes()))


def test_all_reasons_that_the_header_gives_are_given_together() -> None:
    tensors = tensors_of(lora_bytes())
    name = next(iter(tensors))
    del tensors[name]
    tensors["text_encoder.a.lora_A.weight"] = np.ones((4, 8), np.float16)
    with pytest.raises(AddOnRefusedError) as refused:
        check(file_of(tensors))
    assert len(refused.value.problems) == 2


def test_size_rank_and_identity_are_checked_against_limits_and_catalogue() -> None:
    data = lora_bytes()
    with pytest.raises(AddOnRefusedError, match="is oversized"):
        check_lora(Bytes(data), "file", tiny(), limits=Limits(file_bytes=1000))
    with pytest.raises(AddOnRefusedError, match="rank 4, needs at most 3"):
        check_lora(Bytes(data), "file", tiny(), limits=Limits(rank=3))
    with pytest.raises(AddOnRefusedError, match="as the catalogue says"):
        check_lora(Bytes(data), "file", tiny(), expected=Expected(file_bytes=len(data) + 1))
    with pytest.raises(AddOnRefusedError, match="has the sha256"):
        check_lora(Bytes(data), "file", tiny(), expected=Expected(sha256="0" * 64))


def test_an_oversized_file_is_refused_before_a_byte_of_it_is_read() -> None:
    source = Bytes(lora_bytes())
    with pytest.raises(AddOnRefusedError, match="is oversized"):
        check_lora(source, "file", tiny(), limits=Limits(file_bytes=1000))
    assert source.at == 0


def test_a_source_that_gives_less_than_it_stated_is_a_matter_of_the_store_and_one_that_gives_more_is_refused() -> None:
    data = lora_bytes()
    with pytest.raises(StoreError, match="ended 5 bytes early"):
        check_lora(Bytes(data[:-5], stated_bytes=len(data)), "file", tiny())
    with pytest.raises(AddOnRefusedError, match="goes on after its end"):
        check_lora(Bytes(data + b"x", stated_bytes=len(data)), "file", tiny())


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_mutated_header_is_refused_or_means_what_safetensors_reads(data: st.DataObject) -> None:
    whole = bytearray(lora_bytes(rank=1))
    header_end = 8 + struct.unpack("<Q", whole[:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, header_end - 1))
        kind = data.draw(st.sampled_from(["set", "delete", "insert", "digit"]))
        if kind == "set":
            whole[at] = data.draw(st.integers(0, 255))
        elif kind == "delete":
            del whole[at]
        elif kind == "insert":
            whole[at:at] = data.draw(st.sampled_from([b"0", b"9", b'"', b",", b"{", b"]", b"-", b"1e9", b"\\u0000"]))
        else:
            digits = [i for i in range(8, min(header_end, len(whole))) if chr(whole[i]).isdigit()]
            whole[data.draw(st.sampled_from(digits))] = ord(data.draw(st.sampled_from("0123456789")))
    spoilt = bytes(whole)
    try:
        facts = check(spoilt)
    except AddOnRefusedError:
        return  # any other exception fails the test
    try:
        read = dict(deserialize(spoilt))
    except SafetensorError as error:
        pytest.fail(f"accepted what safetensors refuses: {error}")
    assert 2 * facts.n_layers <= len(read)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["F16", "BF16", "F32"]), st.integers(0, 2**32 - 1), st.integers(0, 255))
def test_any_value_is_accepted_exactly_if_it_is_finite(dtype: str, bits: int, place: int) -> None:
    layer, (n_out, n_in) = next(iter(sorted(tiny().lora_targets.items())))
    kind = np.uint32 if dtype == "F32" else np.uint16
    down = np.zeros((4, n_in), kind)
    down.reshape(-1)[place % down.size] = bits & np.iinfo(kind).max
    names = [f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"]
    if dtype == "F32":
        tensors, is_finite = {names[0]: down.view(np.float32)}, bool(np.isfinite(down.view(np.float32)).all())
    elif dtype == "F16":
        tensors, is_finite = {names[0]: down.view(np.float16)}, bool(np.isfinite(down.view(np.float16)).all())
    else:
        tensors = {names[0]: down}
        is_finite = bool(np.isfinite((down.astype(np.uint32) << 16).view(np.float32)).all())
    tensors[names[1]] = np.zeros((n_out, 4), np.float16)
    data = file_of(tensors)
    if is_finite:
        assert check(data).n_layers == 1
    else:
        with pytest.raises(AddOnRefusedError, match="NaN or infinity"):
            check(data)
