"""Contributions: made from a delta, read back strictly. Form: `contribution`. No torch.

The values kept of a chunk are those of the greatest magnitude; among equals the ones with the lower
index. With 8 bits they are rounded to the nearest multiple (ties to even) of a scale, the greatest
magnitude / 127. With 2 bits a value becomes its sign and one of two magnitudes: those above the
mean magnitude of the kept values become the mean of such values, the others the mean of the rest.
Sums are in float64, everything else in float32.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tdmld.train.contribution import (
    CHUNK,
    HEAD,
    MAGIC,
    ROWS,
    chunk_sizes,
    contribution_size,
    low_bits,
)
from tdmld.train.digest import Buffer, digest
from tdmld.train.errors import FileError
from tdmld.train.spec import Spec, stage_parameters

Floats = NDArray[np.float32]


class Place(NamedTuple):
    """Which contribution it is."""

    lane: int
    stage: int
    number: int
    """The round."""


class Contribution(NamedTuple):
    """A contribution as read: the kept values and where they belong in the flat delta."""

    places: NDArray[np.int64]
    """Ascending, each once."""
    values: Floats
    buffers: Floats
    identity: bytes
    """BLAKE3 of its bytes."""

    @property
    def norm(self) -> float:
        """The norm of the delta, its squares summed in float64."""
        return float(np.sqrt(np.square(self.values, dtype=np.float64).sum()))


def encode_contribution(spec: Spec, place: Place, delta: Floats, buffers: Floats) -> bytes:
    """The bytes of a contribution: `delta` flat, in order of names, and the float buffers.

    ValueError when the sizes are not those of the stage, or a value is not finite.
    """
    outer, values = spec.outer, stage_parameters(spec, place.stage)
    if (delta.size, buffers.size) != (values, spec.float_buffers(place.stage)):
        raise ValueError(f"a delta of {delta.size} values, {buffers.size} of buffers")
    if not (np.isfinite(delta).all() and np.isfinite(buffers).all()):
        raise ValueError("the delta is not finite")
    pieces = [_encode_rows(rows, outer.density, outer.bits) for rows in _blocks(delta)]
    return b"".join(
        (
            _head(spec, place),
            *(scales for scales, _, _ in pieces),
            *(indices for _, indices, _ in pieces),
            *(numbers for _, _, numbers in pieces),
            buffers.astype("<f4").tobytes(),
        )
    )


def decode_contribution(spec: Spec, place: Place, raw: Buffer) -> Contribution:
    """The contribution of these bytes; FileError unless they are one of this place, well formed."""
    values, extra = stage_parameters(spec, place.stage), spec.float_buffers(place.stage)
    density, bits = spec.outer.density, spec.outer.bits
    named = f"contribution of lane {place.lane}, stage {place.stage} to round {place.number}"
    if len(raw) != contribution_size(values, extra, density, bits):
        raise FileError(f"{named}: {len(raw)} bytes; the slot that made it is at fault")
    view = memoryview(raw)
    if view[: HEAD.size] != _head(spec, place):
        raise FileError(f"{named}: the head is another one's; the slot that made it is at fault")
    whole, rest = divmod(values, CHUNK)
    groups = [(0, whole, CHUNK)] * (whole > 0) + [(values - rest, 1, rest)] * (rest > 0)
    sizes = [chunk_sizes(length, density, bits) for _, _, length in groups]
    at = HEAD.size
    parts: list[list[memoryview]] = [[] for _ in groups]
    for kind in ("scales", "indices", "numbers"):
        for part, size, (_, count, _) in zip(parts, sizes, groups, strict=True):
            end = at + count * int(getattr(size, kind))
            part.append(view[at:end])
            at = end
    places, found = [], []
    for (first, count, length), size, part in zip(groups, sizes, parts, strict=True):
        indices, numbers = _decode_rows(part, count, size.kept, bits, length, named)
        starts = first + np.arange(count, dtype=np.int64)[:, None] * CHUNK
        places.append((starts + indices).reshape(-1))
        found.append(numbers.reshape(-1))
    buffers = np.frombuffer(view[at:], dtype="<f4").astype(np.float32)
    if not np.isfinite(buffers).all():
        raise FileError(f"{named}: a buffer is not finite; the slot that made it is at fault")
    return Contribution(np.concatenate(places), np.concatenate(found), buffers, digest(raw))


def read_contribution(spec: Spec, place: Place, path: Path) -> Contribution:
    """The contribution in a file; FileError when it is missing or is none of this place."""
    limit = spec.contribution_bytes(place.stage)
    try:
        with path.open("rb") as file:
            raw = file.read(limit + 1)
    except OSError as error:
        raise FileError(f"contribution {path}: {error.strerror}; fetch it again") from error
    return decode_contribution(spec, place, raw)


def _head(spec: Spec, place: Place) -> bytes:
    outer = spec.outer
    return HEAD.pack(
        MAGIC,
        place.lane,
        place.stage,
        place.number,
        outer.density,
        outer.bits,
        stage_parameters(spec, place.stage),
        spec.float_buffers(place.stage),
    )


def _blocks(flat: Floats) -> Iterator[Floats]:
    """The chunks of a flat delta as rows, some at a time; the shorter last one by itself."""
    whole = flat.size // CHUNK
    rows = flat[: whole * CHUNK].reshape(whole, CHUNK)
    for at in range(0, whole, ROWS):
        yield rows[at : at + ROWS]
    if flat.size % CHUNK:
        yield flat[whole * CHUNK :].reshape(1, -1)


def _encode_rows(rows: Floats, density: int, bits: int) -> tuple[bytes, bytes, bytes]:
    """(scales, indices, numbers) of chunks of one length."""
    indices = _kept(rows, min(density, rows.shape[1]))
    values = np.take_along_axis(rows, indices, axis=1)
    scales, numbers = _quantize(values, bits)
    packed = _pack_indices(indices, rows.shape[1])
    return scales.astype("<f4").tobytes(), packed, _pack_numbers(numbers, bits)


def _kept(rows: Floats, kept: int) -> NDArray[np.int64]:
    """The indices of the greatest magnitudes of each row, ascending."""
    size = np.abs(rows)
    least = np.partition(size, rows.shape[1] - kept, axis=1)[:, rows.shape[1] - kept, None]
    above, equal = size > least, size == least
    room = kept - above.sum(axis=1, keepdims=True)
    chosen = above | (equal & (equal.cumsum(axis=1) <= room))
    return np.nonzero(chosen)[1].reshape(len(rows), kept)


def _quantize(values: Floats, bits: int) -> tuple[Floats, NDArray[Any]]:
    """(scales, numbers) of the kept values of each row."""
    size = np.abs(values)
    if bits == 8:
        scale = (size.max(axis=1, keepdims=True) / np.float32(127)).astype(np.float32)
        # A scale of 0, or one so small that it was rounded coarsely: 0, and at most 127.
        ratio = np.divide(values, scale, out=np.zeros_like(values), where=scale > 0)
        return scale, np.clip(np.rint(ratio), -127, 127).astype(np.int8)
    high = size > size.mean(axis=1, keepdims=True, dtype=np.float64)
    above = high.sum(axis=1)
    total = size.sum(axis=1, dtype=np.float64)
    upper = np.where(high, size, np.float32(0)).sum(axis=1, dtype=np.float64)
    # The mean is never below all values, so some are not above it.
    low = ((total - upper) / (size.shape[1] - above)).astype(np.float32)
    top = (upper / np.maximum(above, 1)).astype(np.float32)
    scales = np.stack((low, np.maximum(top, low)), axis=1)
    return scales, (values < 0).astype(np.uint8) | (high.astype(np.uint8) << 1)


def _decode_rows(
    part: list[memoryview], count: int, kept: int, bits: int, length: int, named: str
) -> tuple[NDArray[np.int64], Floats]:
    """(indices, values) of chunks of one length; FileError unless they are spelled as made."""
    scales = np.frombuffer(part[0], dtype="<f4").astype(np.float32).reshape(count, -1)
    indices = _unpack_indices(part[1], count, kept, length)
    if indices is None:
        raise FileError(f"{named}: wrong indices; the slot that made it is at fault")
    numbers = _unpack_numbers(part[2], count, kept, bits)
    ordered = (np.diff(indices, axis=1) > 0).all() and (indices < length).all()
    if not ordered or _pack_indices(indices, length) != part[1]:
        raise FileError(f"{named}: indices out of order; the slot that made it is at fault")
    sound = np.isfinite(scales).all() and (scales >= 0).all()
    if bits == 2:
        sound = sound and (scales[:, 0] <= scales[:, 1]).all()
    if not sound or _pack_numbers(numbers, bits) != part[2] or (numbers == -128).any():
        raise FileError(f"{named}: wrong scales or numbers; the slot that made it is at fault")
    if bits == 8:
        with np.errstate(over="ignore"):
            values = numbers.astype(np.float32) * scales
        if not np.isfinite(values).all():
            raise FileError(f"{named}: a scale is too large; the slot that made it is at fault")
        return indices, values
    size = np.where(numbers & 2, scales[:, 1:], scales[:, :1])
    return indices, np.where(numbers & 1, -size, size)


def _pack_indices(indices: NDArray[np.int64], length: int) -> bytes:
    """Elias-Fano: low bits, then a bitmap of the rest in unary; each row in bytes of its own."""
    rows, kept = indices.shape
    low = low_bits(length, kept)
    shifts = np.arange(low)
    lows = (indices[:, :, None] >> shifts & 1).astype(np.uint8).reshape(rows, kept * low)
    highs = np.zeros((rows, kept + (length - 1 >> low) + 1), dtype=np.uint8)
    np.put_along_axis(highs, (indices >> low) + np.arange(kept), 1, axis=1)
    return np.packbits(np.hstack((lows, highs)), axis=1, bitorder="little").tobytes()


def _unpack_indices(raw: memoryview, rows: int, kept: int, length: int) -> NDArray[np.int64] | None:
    """The indices, or None when a bitmap has not one bit for each."""
    low = low_bits(length, kept)
    high = kept + (length - 1 >> low) + 1
    data = np.frombuffer(raw, dtype=np.uint8).reshape(rows, -1)
    bits = np.unpackbits(data, axis=1, bitorder="little")
    highs = bits[:, kept * low : kept * low + high]
    if (highs.sum(axis=1) != kept).any():
        return None
    upper = np.nonzero(highs)[1].reshape(rows, kept) - np.arange(kept)
    lows = bits[:, : kept * low].reshape(rows, kept, low).astype(np.int64)
    lower: NDArray[np.int64] = (lows << np.arange(low)).sum(axis=2)
    return upper << low | lower


def _pack_numbers(numbers: NDArray[Any], bits: int) -> bytes:
    if bits == 8:
        return numbers.astype(np.int8).tobytes()
    rows, kept = numbers.shape
    four = np.zeros((rows, -(-kept // 4) * 4), dtype=np.uint8)
    four[:, :kept] = numbers
    packed: NDArray[np.uint8] = (
        four[:, 0::4] | four[:, 1::4] << 2 | four[:, 2::4] << 4 | four[:, 3::4] << 6
    )
    return packed.tobytes()


def _unpack_numbers(raw: memoryview, rows: int, kept: int, bits: int) -> NDArray[Any]:
    if bits == 8:
        return np.frombuffer(raw, dtype=np.int8).reshape(rows, kept)
    data = np.frombuffer(raw, dtype=np.uint8).reshape(rows, -1)
    four = np.stack([data >> shift & 3 for shift in (0, 2, 4, 6)], axis=2)
    return four.reshape(rows, -1)[:, :kept].astype(np.int16)


__all__ = [
    "Contribution",
    "Place",
    "decode_contribution",
    "encode_contribution",
    "read_contribution",
]
