"""What a lane tells the others after K inner steps: the form of the file, without torch.

    head        "tdmldct1" ‖ lane u32 ‖ stage u32 ‖ round u32 ‖ density u16 ‖ bits u16 ‖
                  values u64 ‖ buffer values u64                                  (big-endian)
    chunks      of 4096 values of the flat delta, the last one shorter, each with k = min(density,
                  its length n) kept ones:
                  scales      2 bits: float32 low, float32 high; 8 bits: float32 scale
                  indices     ascending, Elias-Fano: with l = floor(log2(n / k)) the l low bits of
                              each, then a bitmap of k + floor((n - 1) / 2^l) + 1 bits in which the
                              j-th one stands at j + (index >> l)
                  numbers     k x 2 bits (bit 0 negative, bit 1 high) or k int8
    buffers     the float buffers (running statistics) as float32

Bits are packed from the low bit of each byte on, with zeros behind the last one; scales, buffers
and numbers are little-endian.

The flat delta is (weights before the K steps - weights after them) of all parameters of the stage,
in the order of their names, plus the fed-back residual. All parts of one kind stand together: the
scales of all chunks, then all indices, then all numbers. The size follows from the spec alone, and
each delta has one spelling: another one is refused. The id of a contribution is BLAKE3 of the file.
"""

import struct
from typing import NamedTuple

CHUNK = 4096
"""Values among which the greatest are chosen."""
ROWS = 1024
"""Chunks that are worked on at a time: bounds the memory of a large delta."""
MAGIC = b"tdmldct1"
HEAD = struct.Struct("!8sIIIHHQQ")
SCALE_BYTES = {2: 8, 8: 4}


class Sizes(NamedTuple):
    """Bytes of each part of a chunk."""

    kept: int
    scales: int
    indices: int
    numbers: int

    @property
    def total(self) -> int:
        """Bytes of the chunk."""
        return self.scales + self.indices + self.numbers


def low_bits(length: int, kept: int) -> int:
    """How many low bits of an index stand by themselves."""
    return (length // kept).bit_length() - 1


def chunk_sizes(length: int, density: int, bits: int) -> Sizes:
    """Sizes of a chunk of `length` values."""
    kept = min(density, length)
    low = low_bits(length, kept)
    indices = kept * low + kept + (length - 1 >> low) + 1
    return Sizes(kept, SCALE_BYTES[bits], -(-indices // 8), -(-bits * kept // 8))


def contribution_size(values: int, buffers: int, density: int, bits: int) -> int:
    """Bytes of a contribution of so many trained values and buffer values."""
    whole, rest = divmod(values, CHUNK)
    size = HEAD.size + whole * chunk_sizes(CHUNK, density, bits).total + 4 * buffers
    return size + (chunk_sizes(rest, density, bits).total if rest else 0)


def contribution_name(number: int, lane: int) -> str:
    """The file name of a lane's contribution to round `number`."""
    return f"{number}.{lane}"
