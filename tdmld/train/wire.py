"""Boundary tensors on the wire: made, read and rounded. Formats: `wireformat`."""

import torch

from tdmld.train.device import CPU, bytes_on, to_host
from tdmld.train.digest import Buffer
from tdmld.train.wireformat import BLOCK, WireError, pack, plain_bytes, split_name, unpack

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor: in place, where it must outlive the view unchanged, or of a
    copy when it is on a GPU."""
    return to_host(tensor.detach().reshape(-1).view(torch.uint8)).numpy().data


def encode(tensor: torch.Tensor, wire: str) -> memoryview:
    """A boundary tensor as wire bytes; for fp32 in place, so nobody may write to it afterwards."""
    base, packed = split_name(wire)
    values = tensor.detach().contiguous()
    if base == "int8":
        scales, numbers = _to_blocks(values)
        raw = torch.cat((scales.view(torch.uint8), numbers.view(torch.uint8)))
        return memoryview(pack(tensor_bytes(raw), numbers.numel())) if packed else tensor_bytes(raw)
    values = values.to(_DTYPES[base])
    if not packed:
        return tensor_bytes(values)
    planes = values.reshape(-1, 1).view(torch.uint8).t().contiguous()
    return memoryview(pack(tensor_bytes(planes), values.numel()))


def decode(
    payload: Buffer, shape: tuple[int, ...], wire: str, device: torch.device = CPU
) -> torch.Tensor:
    """A float32 tensor of this shape and of its own memory from wire bytes; WireError."""
    base, packed = split_name(wire)
    count = torch.Size(shape).numel()
    size = plain_bytes(wire, count)
    if packed:
        payload = unpack(payload, size, count)
    if len(payload) != size:
        raise WireError(f"{len(payload)} bytes, not {size}")
    raw = bytes_on(payload, device)
    if base == "int8":
        blocks = size - count
        return _from_blocks(raw[:blocks].view(torch.float32), raw[blocks:]).view(shape)
    if packed:
        raw = raw.view(-1, count).t().contiguous().view(-1)
    return raw.view(_DTYPES[base]).view(shape).to(torch.float32)


def round_to_wire(tensor: torch.Tensor, wire: str) -> torch.Tensor:
    """What a tensor is after it crossed the wire."""
    base, _ = split_name(wire)
    if base == "int8":
        scales, numbers = _to_blocks(tensor.contiguous())
        return _from_blocks(scales, numbers.view(torch.uint8)).view(tensor.shape)
    return tensor.to(_DTYPES[base]).to(torch.float32)


def _to_blocks(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and int8 values; a block of zeros has the scale 0 and zeros."""
    flat = tensor.reshape(-1)
    count = flat.numel()
    blocks = _rows(flat)
    scales = blocks.abs().amax(dim=1) / 127
    # A scale may be 0 (0 / 0 must become 0: what NaN is as an integer no standard says), or be
    # rounded so coarsely that a quotient exceeds 127.
    numbers = (blocks / scales[:, None]).round_().clamp_(-127, 127).nan_to_num_(0.0)
    return scales, numbers.to(torch.int8).reshape(-1)[:count].contiguous()


def _from_blocks(scales: torch.Tensor, raw: torch.Tensor) -> torch.Tensor:
    """The values of scales and of int8 bytes, flat."""
    count = raw.numel()
    blocks = _rows(raw.view(torch.int8).to(torch.float32))
    return (blocks * scales[:, None]).reshape(-1)[:count]


def _rows(flat: torch.Tensor) -> torch.Tensor:
    """The values as rows of BLOCK, zeros behind the last one."""
    return torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
