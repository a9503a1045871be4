"""The digests that bind a segment: tensors, frames, steps, links, states.

Everything is BLAKE3-256. Integers inside hashed bytes are big-endian, of the width written here.

    merkle(leaves)  leaf H(0 ‖ data), inner H(1 ‖ left ‖ right), an odd node moves up, none: zeros
    step leaf       H(step u64 ‖ count u32 ‖ frame digests in schedule order ‖ data indices root ‖
                      gradient root ‖ loss bits u32)
    steps root      merkle(step leaves)
    link root       merkle(seq u64 ‖ digest) of one direction of one link, in order of seq
    list root       H(job ‖ lane u32 ‖ stage u32 ‖ segment u64 ‖ start shared ‖ start lane ‖
                      end shared ‖ end lane ‖ for each link that the slot has, in the order "up",
                      "down", "lane0", "lane1", ..: sent root ‖ received root ‖ id of the
                      contribution, where one is made ‖ steps root); the chain computes the same
    state root      merkle(leaf) over the tensors of one part sorted by name, leaf = part, name,
                      dtype, shape, H(bytes); every string u16 length + ASCII, shape u8 count + u64

Source: design annex A6.
"""

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from blake3 import blake3

DIGEST_BYTES = 32
ZERO_DIGEST = bytes(DIGEST_BYTES)
Buffer = bytes | bytearray | memoryview


def digest(*parts: Buffer) -> bytes:
    """BLAKE3-256 of the concatenated parts, read in place."""
    hasher = blake3()
    for part in parts:
        hasher.update(part)
    return hasher.digest()


def merkle_root(leaves: Iterable[Buffer]) -> bytes:
    """Root over the data of `leaves` in the given order; zeros when there is none."""
    level = [digest(b"\0", leaf) for leaf in leaves]
    if not level:
        return ZERO_DIGEST
    while len(level) > 1:
        above = [digest(b"\1", level[at], level[at + 1]) for at in range(0, len(level) - 1, 2)]
        if len(level) % 2:
            above.append(level[-1])
        level = above
    return level[0]


def step_leaf(
    step: int, frames: Sequence[bytes], data_root: bytes, gradient_root: bytes, loss_bits: int
) -> bytes:
    """What one optimizer step commits to. `loss_bits` is the float32 loss as u32, 0 without one."""
    return digest(
        struct.pack("!QI", step, len(frames)),
        *frames,
        data_root,
        gradient_root,
        struct.pack("!I", loss_bits),
    )


def steps_root(leaves: Sequence[bytes]) -> bytes:
    """Merkle root of a segment's K step leaves."""
    return merkle_root(leaves)


def link_root(frames: Iterable[tuple[int, bytes]]) -> bytes:
    """Root of one direction of a link: (seq, frame digest) in ascending order of seq."""
    return merkle_root(struct.pack("!Q", seq) + value for seq, value in frames)


def list_root(
    job: bytes,
    lane: int,
    stage: int,
    segment: int,
    *,
    start: tuple[bytes, bytes],
    end: tuple[bytes, bytes],
    links: Mapping[str, tuple[bytes, bytes]],
    steps: bytes,
    contribution: bytes = b"",
) -> bytes:
    """The one value that an audit compares.

    `start` and `end` are (shared root, lane root); `links` maps the links that the slot has to
    (sent root, received root); `contribution` is an id or nothing.
    """
    roots = [root for link in sorted(links, key=link_order) for root in links[link]]
    place = struct.pack("!IIQ", lane, stage, segment)
    return digest(job, place, *start, *end, *roots, contribution, steps)


def link_order(link: str) -> int:
    """Where a link stands among those of its slot: up, down, then the lanes by number."""
    return ("up", "down").index(link) if link in ("up", "down") else 2 + int(link[len("lane") :])


@dataclass(frozen=True, order=True)
class Leaf:
    """One tensor of a state: `part` is shared or lane, `dtype` a safetensors name such as F32."""

    name: str
    part: str
    dtype: str
    shape: tuple[int, ...]
    digest: bytes

    def encode(self) -> bytes:
        """The bytes that the Merkle tree hashes."""
        texts = b"".join(
            struct.pack("!H", len(text)) + text.encode("ascii")
            for text in (self.part, self.name, self.dtype)
        )
        dims = struct.pack(f"!B{len(self.shape)}Q", len(self.shape), *self.shape)
        return texts + dims + self.digest


def state_root(leaves: Iterable[Leaf]) -> bytes:
    """Root of one part of a state; the leaves are sorted by name here."""
    return merkle_root(leaf.encode() for leaf in sorted(leaves))


def data_root(shards: Iterable[tuple[bytes, int]]) -> bytes:
    """Root of a job's data: (shard id, size) in the order of the text."""
    return merkle_root(shard + struct.pack("!Q", size) for shard, size in shards)


def indices_root(indices: Iterable[int]) -> bytes:
    """Root of the window indices of one step, in order of micro-batch and sequence."""
    return merkle_root(struct.pack("!Q", index) for index in indices)
