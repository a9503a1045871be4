"""The formats in which a boundary tensor crosses a link: names, sizes and limits.

    fp32        the values as they are, little-endian
    bf16        each value rounded to the nearest, ties to even
    int8        blocks of 64 values in row-major order, the last one shorter: first a float32 scale
                for each block, the greatest magnitude / 127; then an int8 for each value,
                value / scale rounded to the nearest, ties to even
    ...+zlib    the same bytes, split into planes (see below), the one with the exponents deflated

Deflated frames: the planes of a format are byte 0, byte 1, ... of all its values (int8: the scales,
then the values). All planes but the last stand first as they are; then the last one as a raw
deflate stream of Huffman codes alone, or as it is when that is not shorter: a frame of the full
size is not deflated. What a frame can unpack to is known before it is unpacked.

The digest of a frame is over these bytes. Deflating is not specified to the bit, so the zlib of a
machine belongs to its class (`numerics.program_hash`).
"""

import zlib
from typing import Literal

from tdmld.train.digest import Buffer

Wire = Literal["fp32", "bf16", "int8", "fp32+zlib", "bf16+zlib", "int8+zlib"]

BLOCK = 64
"""Values that share a scale."""
_ITEM = {"fp32": 4, "bf16": 2}
_LEVEL, _RAW, _MEMORY = 1, -15, 9


class WireError(ValueError):
    """Bytes that are no frame of the format. The runner turns it into a fault of the segment."""


def split_name(wire: str) -> tuple[str, bool]:
    """(what the values become, whether they are deflated)"""
    base, _, packed = wire.partition("+")
    return base, bool(packed)


def plain_bytes(wire: str, values: int) -> int:
    """Size of a frame of so many values that is not deflated: the greatest size of any frame."""
    base, _ = split_name(wire)
    if base == "int8":
        return 4 * -(-values // BLOCK) + values
    return _ITEM[base] * values


def pack(planes: Buffer, last: int) -> bytes:
    """The frame of planes that stand one behind another, the last one `last` bytes long."""
    view = memoryview(planes)
    packer = zlib.compressobj(_LEVEL, zlib.DEFLATED, _RAW, _MEMORY, zlib.Z_HUFFMAN_ONLY)
    packed = packer.compress(view[len(view) - last :]) + packer.flush()
    return bytes(view) if len(packed) >= last else b"".join((view[: len(view) - last], packed))


def unpack(payload: Buffer, size: int, last: int) -> bytes | memoryview:
    """The planes of a frame, `size` bytes; never more are made. WireError for any other frame."""
    view = memoryview(payload)
    first = size - last
    if len(view) == size:
        return view
    if not first < len(view) < size:
        raise WireError(f"{len(view)} bytes, not {first + 1} to {size}")
    unpacker = zlib.decompressobj(_RAW)
    try:
        found = unpacker.decompress(view[first:], last + 1)
    except zlib.error as error:
        raise WireError(f"no deflate stream: {error}") from error
    if len(found) != last or not unpacker.eof or unpacker.unused_data:
        raise WireError(f"a deflate stream of {len(found)} bytes or more, not {last}")
    return b"".join((view[:first], found))
