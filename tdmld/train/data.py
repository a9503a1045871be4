"""Data: the text as content-addressed shards, and which window each sequence reads.

A token is a byte, or an unsigned little-endian number of 2 or 4 bytes. Windows are drawn from all
tokens but the held-out last part:

    index = u64(BLAKE3("tdmld data 1" ‖ seed ‖ lane ‖ step ‖ micro-batch ‖ sequence)[:8])
            mod (training tokens - sequence length)                  (all u64, big-endian)

Inputs are the tokens from there, labels the same shifted by one. Places are told in bytes, here
and wherever a window begins: token number x width. Of images the number of a record
is drawn in the same way, mod (training records); a record is a label byte, then the pixels, channel
by channel and row by row, a byte each.
"""

import mmap
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from tdmld.train import limits
from tdmld.train.digest import data_root, digest
from tdmld.train.errors import FileError
from tdmld.train.spec import Spec

DATA_DOMAIN = b"tdmld data 1"


def cut_shards(text: bytes | memoryview) -> Iterator[memoryview]:
    """The shards of a text: 1 MiB each, the last one shorter."""
    view = memoryview(text)
    for at in range(0, len(view), limits.SHARD_BYTES):
        yield view[at : at + limits.SHARD_BYTES]


def shard_id(shard: bytes | memoryview) -> bytes:
    """Content id of a shard: BLAKE3-256 of its bytes."""
    return digest(shard)


def shard_file(path: Path) -> Iterator[tuple[bytes, int]]:
    """(shard id, size) of each shard of a text file, one shard in memory at a time."""
    with path.open("rb") as file:
        while shard := file.read(limits.SHARD_BYTES):
            yield shard_id(shard), len(shard)


def window_index(spec: Spec, lane: int, step: int, micro_batch: int, sequence: int) -> int:
    """At which byte the window of one sequence begins."""
    seed = digest(DATA_DOMAIN, struct.pack("!5Q", spec.seed, lane, step, micro_batch, sequence))
    return spec.window(int.from_bytes(seed[:8], "big"))


def step_indices(spec: Spec, lane: int, step: int) -> tuple[int, ...]:
    """The window indices of a step, in order of micro-batch and sequence."""
    return tuple(
        window_index(spec, lane, step, micro_batch, sequence)
        for micro_batch in range(spec.micro_batches(lane))
        for sequence in range(spec.train.micro_batch_size)
    )


class Tokens:
    """A job's whole text, mapped from its shards and checked against their ids."""

    def __init__(self, spec: Spec, shards: Sequence[bytes | memoryview | mmap.mmap]) -> None:
        """FileError when a shard is not the one that the spec names."""
        if len(shards) != len(spec.shards):
            raise FileError(f"{len(shards)} shards, the spec names {len(spec.shards)}")
        self._shards = [memoryview(shard) for shard in shards]
        for number, (shard, (name, size)) in enumerate(zip(self._shards, spec.shards, strict=True)):
            if len(shard) != size or shard_id(shard) != name:
                raise FileError(f"shard {number} is not the one that the spec names; fetch it")
        self.count = spec.data.tokens
        self.root = data_root(spec.shards)

    @classmethod
    def from_memory(cls, spec: Spec, descriptor: int) -> "Tokens":
        """Map the whole text from a memory file; the descriptor may be closed afterwards."""
        try:
            # Private: a memory file that is sealed against writing cannot be mapped otherwise.
            mapped = mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
        except (OSError, ValueError) as error:
            raise FileError(f"the text cannot be mapped: {error}") from error
        return cls(spec, list(cut_shards(memoryview(mapped))))

    @classmethod
    def from_text(cls, spec: Spec, path: Path) -> "Tokens":
        """Map the text file that the shards were cut from."""
        try:
            with path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise FileError(f"text {path}: {error}") from error
        return cls(spec, list(cut_shards(memoryview(mapped))))

    def window(self, start: int, length: int) -> bytes:
        """`length` bytes from `start`, across shard borders. IndexError beyond the text."""
        if start < 0 or start + length > self.count:
            raise IndexError(f"bytes {start} to {start + length} of {self.count}")
        pieces: list[memoryview] = []
        while length > 0:
            number, offset = divmod(start, limits.SHARD_BYTES)
            piece = self._shards[number][offset : offset + length]
            pieces.append(piece)
            start, length = start + len(piece), length - len(piece)
        return b"".join(pieces)
