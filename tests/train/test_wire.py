"""Boundary tensors on the wire: exact formats, rounding, and what strangers may send."""

import contextlib
import tracemalloc
import zlib
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tdmld.train.wire import decode, encode, round_to_wire
from tdmld.train.wireformat import BLOCK, Wire, WireError, pack, plain_bytes, unpack

WIRES = get_args(Wire)
PACKED = [wire for wire in WIRES if wire.endswith("+zlib")]


def sample(count: int = 1000, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("shape", [(2, 12, 16), (1, 1, 1), (3, 5, 13)])
def test_what_arrives_is_what_the_reference_rounds(wire: str, shape: tuple[int, ...]) -> None:
    tensor = sample(torch.Size(shape).numel()).view(shape)
    for sent in (tensor, torch.zeros(shape), tensor * 1e-42, tensor * 1e38, tensor.transpose(0, 2)):
        payload = encode(sent, wire)
        assert 0 < len(payload) <= plain_bytes(wire, sent.numel())
        found = decode(payload, tuple(sent.shape), wire)
        assert torch.equal(found.view(torch.int32), round_to_wire(sent, wire).view(torch.int32))
        assert bytes(encode(sent, wire)) == bytes(payload)


@pytest.mark.parametrize("wire", WIRES)
def test_a_second_crossing_changes_nothing(wire: str) -> None:
    once = round_to_wire(sample(), wire)
    assert torch.equal(round_to_wire(once, wire), once)


@pytest.mark.parametrize(("wire", "error"), [("fp32", 0), ("bf16", 2e-3), ("int8", 8e-3)])
def test_rounding_costs_what_it_should(wire: str, error: float) -> None:
    tensor = sample(100_000)
    lost = torch.linalg.vector_norm(round_to_wire(tensor, wire) - tensor)
    assert float(lost / torch.linalg.vector_norm(tensor)) <= error


@pytest.mark.parametrize("size", [1e-38, 1e-42, 2e-44, 1.5e-45, 1.0, 1e38])
def test_int8_changes_no_sign_whatever_the_size(size: float) -> None:
    tensor = sample().clamp(-3, 3) * size
    found = round_to_wire(tensor, "int8")
    assert bool(((found == 0) | (found.sign() == tensor.sign())).all())
    assert bool((found.abs() <= 2 * tensor.abs().max()).all())


def test_the_layout_of_int8_is_scales_then_values() -> None:
    tensor = torch.zeros(BLOCK + 2)
    tensor[0], tensor[1], tensor[BLOCK], tensor[BLOCK + 1] = 127.0, -2.5, 1.0, -0.25
    payload = bytes(encode(tensor, "int8"))
    scales = torch.frombuffer(bytearray(payload[:8]), dtype=torch.float32)
    assert scales.tolist() == [1.0, float(torch.tensor(1.0) / 127)]
    assert payload[8:10] == bytes([127, 254])  # -2.5 goes to the even -2
    assert payload[8 + BLOCK :] == bytes([127, 224])  # -31.75 goes to -32
    assert len(payload) == plain_bytes("int8", BLOCK + 2) == 8 + BLOCK + 2


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_stays_so(wire: str, bad: float) -> None:
    tensor = sample(100)
    tensor[7] = bad
    assert not bool(torch.isfinite(decode(encode(tensor, wire), (100,), wire)).all())


@pytest.mark.parametrize("wire", ["fp32+zlib", "bf16+zlib"])
def test_deflating_saves_the_exponents(wire: str) -> None:
    assert len(encode(sample(100_000), wire)) < plain_bytes(wire, 100_000) * 0.9


def test_what_does_not_shrink_is_sent_as_it_is() -> None:
    noise = torch.randint(0, 256, (1000,), generator=torch.Generator().manual_seed(1))
    raw = bytes(noise.to(torch.uint8).tolist())
    assert pack(raw, 500) == raw
    assert unpack(raw, 1000, 500) == raw


@pytest.mark.parametrize("wire", WIRES)
@given(raw=st.binary(max_size=600))
@settings(max_examples=50)
def test_rubbish_is_refused_or_read_never_worse(wire: str, raw: bytes) -> None:
    with contextlib.suppress(WireError):
        assert decode(raw, (100,), wire).shape == (100,)


@pytest.mark.parametrize("wire", PACKED)
def test_a_bomb_is_not_unpacked(wire: str) -> None:
    """A frame that would become a thousand times larger costs its own size, not that."""
    count = 1 << 20
    size = plain_bytes(wire, count)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = packer.compress(bytes(64 << 20)) + packer.flush()
    frame = bytes(size - count) + bomb
    assert len(frame) < size
    tracemalloc.start()
    with pytest.raises(WireError, match="or more"):
        decode(frame, (count,), wire)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * size


@pytest.mark.parametrize("wire", PACKED)
def test_a_stream_that_ends_early_or_late_is_refused(wire: str) -> None:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    whole = packer.compress(bytes(1000)) + packer.flush()
    first = bytes(plain_bytes(wire, 1000) - 1000)
    assert decode(first + whole, (1000,), wire).shape == (1000,)
    for frame in (whole[:-1], whole + b"x", whole + whole):
        with pytest.raises(WireError):
            decode(first + frame, (1000,), wire)
