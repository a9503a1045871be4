"""Boundary tensors on the wire: fp32, or rounded to bf16 in both directions."""

import torch

from tdmld.train.digest import Buffer
from tdmld.train.spec import Spec

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, in place. The tensor must outlive the view unchanged."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def encode(tensor: torch.Tensor, wire: str) -> memoryview:
    """A boundary tensor as wire bytes; for fp32 in place, so nobody may write to it afterwards."""
    return tensor_bytes(tensor.detach().to(_DTYPES[wire]).contiguous())


def decode(payload: Buffer, spec: Spec) -> torch.Tensor:
    """A float32 tensor (batch, sequence, width) of its own memory from wire bytes."""
    width = spec.model.width(spec.config)
    shape = (spec.train.micro_batch_size, spec.data.sequence, width)
    raw = torch.frombuffer(bytearray(payload), dtype=_DTYPES[spec.train.wire]).view(shape)
    return raw.to(torch.float32)


def round_to_wire(tensor: torch.Tensor, wire: str) -> torch.Tensor:
    """What a tensor is after it crossed the wire."""
    return tensor.to(_DTYPES[wire]).to(torch.float32)
