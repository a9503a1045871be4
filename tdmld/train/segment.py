"""What a segment leaves behind: the record that is committed, audited and compared.

A record is made by the segment runner alone, live and in replay; two honest runs of one segment
in one class have equal records.
"""

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec

from tdmld.files import write_file
from tdmld.train import digest, limits
from tdmld.train.errors import FileError

T = TypeVar("T")

Digest = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
U32 = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]
Number = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class StepDigests(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """The digests of one optimizer step.

    `frames` stands in schedule order (see `schedule.step_frames`), received and sent; `data` is the
    root of the window indices (zeros where a stage reads no data); `gradient` the root of the
    averaged gradients before clipping; `loss_bits` the float32 loss as u32, 0 without one.
    """

    step: Number
    frames: tuple[Digest, ...]
    data: Digest
    gradient: Digest
    loss_bits: U32

    @property
    def leaf(self) -> bytes:
        """The step's leaf."""
        return digest.step_leaf(self.step, self.frames, self.data, self.gradient, self.loss_bits)


class LinkRoots(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """The roots of both directions of one link in one segment."""

    link: str
    sent: Digest
    received: Digest


class SegmentRecord(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """Everything that a segment commits to; `list_root` is its one-value summary.

    `link_roots` has an entry for each link that the slot has, in the order of `Spec.links`.
    `has_loss` says whether the slot computes the loss. In `diloco`, `contribution` is the id of
    what the lane contributes after the steps (a segment without steps has none), `included` the
    lanes whose contributions to the round before entered the outer step at its beginning.
    """

    segment: U32
    start_shared: Digest
    start_lane: Digest
    end_shared: Digest
    end_lane: Digest
    link_roots: tuple[LinkRoots, ...]
    has_loss: bool
    steps: tuple[StepDigests, ...]
    contribution: Annotated[bytes, msgspec.Meta(max_length=32)] = b""
    included: tuple[U32, ...] = ()

    @property
    def leaves(self) -> tuple[bytes, ...]:
        """The K step leaves."""
        return tuple(step.leaf for step in self.steps)

    @property
    def steps_root(self) -> bytes:
        """Merkle root of the leaves; sealed in the commitment, opened in an audit."""
        return digest.steps_root(self.leaves)

    @property
    def links(self) -> Mapping[str, tuple[bytes, bytes]]:
        """link -> (sent root, received root)."""
        return {roots.link: (roots.sent, roots.received) for roots in self.link_roots}

    @property
    def losses(self) -> tuple[float, ...] | None:
        """The loss of each step in nats a token, on the last stage."""
        return tuple(bits_loss(step.loss_bits) for step in self.steps) if self.has_loss else None

    @property
    def loss_micro(self) -> int | None:
        """Mean loss of the segment in millionths of a nat, for the commitment."""
        return round(1e6 * sum(self.losses) / len(self.losses)) if self.losses else None

    def list_root(self, job: bytes, stage: int, lane: int = 0) -> bytes:
        """The value that worker and auditor must both find."""
        return digest.list_root(
            job,
            lane,
            stage,
            self.segment,
            start=(self.start_shared, self.start_lane),
            end=(self.end_shared, self.end_lane),
            links=self.links,
            steps=self.steps_root,
            contribution=self.contribution,
        )

    def first_difference(self, other: "SegmentRecord") -> int | None:
        """The first step whose leaf differs, or None."""
        for mine, theirs in zip(self.steps, other.steps, strict=False):
            if mine.leaf != theirs.leaf:
                return mine.step
        return None


class StepReport(msgspec.Struct, frozen=True):
    """Progress of one step, for people: never hashed. Seconds by the host's clock."""

    step: int
    loss: float | None
    seconds: float
    """The whole step."""
    waiting: float
    """Of it: waiting for frames."""
    verifying: float
    """Of it: hashing frames and gradients."""
    gradient_norm: float


OnStep = Callable[[StepReport], None]


class StoredList(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """The file `list/<segment>`: the record and the salt of its seal."""

    salt: bytes
    record: SegmentRecord


def loss_bits(loss: float) -> int:
    """The float32 bits of a loss as u32."""
    return int(struct.unpack("!I", struct.pack("!f", loss))[0])


def bits_loss(bits: int) -> float:
    """The loss of its bits."""
    return float(struct.unpack("!f", struct.pack("!I", bits))[0])


def encode_record(record: SegmentRecord) -> bytes:
    """The canonical bytes of a record (MessagePack)."""
    return msgspec.msgpack.encode(record)


def decode_record(raw: bytes | memoryview, limit: int = limits.LIST_BYTES) -> SegmentRecord:
    """A record from bytes of another process or node; FileError when it is not canonical."""
    return _decode(raw, SegmentRecord, limit)


def write_list(path: Path, record: SegmentRecord, salt: bytes = b"") -> None:
    """Write the digest list and the salt of its seal, durably, before anything is committed."""
    write_file(path, msgspec.msgpack.encode(StoredList(salt, record)))


def read_list(path: Path, limit: int = limits.LIST_BYTES) -> StoredList:
    """The list of a segment; FileError when it is missing or corrupt."""
    try:
        with path.open("rb") as file:
            raw = file.read(limit + 1)
    except OSError as error:
        raise FileError(f"digest list {path}: {error}") from error
    return _decode(raw, StoredList, limit)


def _decode(raw: bytes | memoryview, kind: type[T], limit: int) -> T:
    if len(raw) > limit:
        raise FileError(f"a {kind.__name__} of {len(raw)} bytes, at most {limit} are allowed")
    try:
        value = msgspec.msgpack.decode(raw, type=kind)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise FileError(f"not a {kind.__name__}: {error}") from error
    if msgspec.msgpack.encode(value) != raw:
        raise FileError(f"not the canonical encoding of a {kind.__name__}")
    return value
