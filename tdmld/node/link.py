"""The numbered log of one link: what may be sent, what may be received, where to resume. Sans-IO.

A link joins two neighbouring slots; each of its two directions is a log of frames numbered
seq = step x micro_batches + micro_batch. Streams come and go below it. Rules (DESIGN L1, L2, S7):

LINK-1  The sender retains; the receiver says where to resume (`want` in Hello, at both ends).
LINK-2  A frame must carry the next number; a lower one is compared by digest and dropped.
LINK-3  A frame's number exceeds the highest number that this side ever sent the other way by at
        most the count of stages: 1F1B never needs more, and more would fill the memory.
LINK-4  Hello names job, both slots, job epoch and incarnation; another epoch is refused, an
        incarnation older than the newest one seen is refused.
LINK-5  Digests that the peer holds of what we sent are compared: with what we sent already at
        once, with what we are going to send (a replacement replays) before it is sent. A
        mismatch stops the slot before anything new leaves.
LINK-6  Every frame is signed by the sender's session key over (job, epoch, lane, stage, direction,
        seq, digest); the receiver acknowledges each segment by one signature over its link root,
        again on every new stream until it is settled.
LINK-7  The end is a handshake: Bye follows when everything was sent and received, in both
        directions; a link that said it still answers a peer that missed it.

On the stream each message starts with its kind: frame (seq u64 ‖ signature ‖ payload), else a
MessagePack struct.
"""

import struct
from typing import Annotated, NamedTuple

import msgspec

from tdmld.chain.crypto import KeyPair, verify
from tdmld.node.control import Dimensions, Id32, LinkName
from tdmld.node.errors import LinkMismatch, LinkRefused
from tdmld.train.digest import link_root

HELD_DIGESTS = 256
"""Digests in a Hello: more than two segments of most jobs, 8 KiB."""
SMALL_MESSAGE_BYTES = 16 * 1024
FRAME_HEADER = struct.Struct("!BQ64s")
_FRAME, _HELLO, _ACK, _BYE = b"F", b"H", b"A", b"B"

Number = Annotated[int, msgspec.Meta(ge=0, lt=2**62)]


class Place(NamedTuple):
    """Which end of which link: the slot, and "up" or "down" as seen from it."""

    job: bytes
    epoch: int
    lane: int
    stage: int
    link: str

    @property
    def other(self) -> "Place":
        """The same link seen from its other end."""
        if self.link == "down":
            return self._replace(stage=self.stage + 1, link="up")
        return self._replace(stage=self.stage - 1, link="down")


class Hello(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """First message of both ends. `lane`, `stage` and `link` are the sender's; `held` are the
    digests of the last frames that it received, ending before `want`."""

    job: Id32
    epoch: Number
    lane: Number
    stage: Number
    link: LinkName
    incarnation: Number
    want: Number
    held: Annotated[tuple[Id32, ...], msgspec.Meta(max_length=HELD_DIGESTS)]

    @property
    def place(self) -> Place:
        """The sender's end."""
        return Place(self.job, self.epoch, self.lane, self.stage, self.link)


class Ack(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """The receiver has every frame of `segment`; `signature` is over the link root it found."""

    segment: Number
    root: Id32
    signature: Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]


class Bye(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """Everything was sent and received."""


class Frame(NamedTuple):
    """A frame from the peer. `payload` lies in the received message."""

    seq: int
    signature: bytes
    payload: memoryview


LinkMessage = Hello | Ack | Bye | Frame
_small = {_HELLO: Hello, _ACK: Ack, _BYE: Bye}
_decoders = {kind: msgspec.msgpack.Decoder(made) for kind, made in _small.items()}


def encode_small(message: Hello | Ack | Bye) -> bytes:
    """The bytes of a message that is no frame."""
    kind = next(kind for kind, made in _small.items() if isinstance(message, made))
    return kind + msgspec.msgpack.encode(message)


def frame_header(seq: int, signature: bytes) -> bytes:
    """What goes before a frame's payload."""
    return FRAME_HEADER.pack(_FRAME[0], seq, signature)


def message_limit(frame_bytes: int) -> int:
    """The greatest message on a link."""
    return max(FRAME_HEADER.size + frame_bytes, SMALL_MESSAGE_BYTES)


def decode_message(raw: bytes) -> LinkMessage:
    """A message of the peer; LinkRefused when it is none."""
    kind = raw[:1]
    if kind == _FRAME:
        if len(raw) <= FRAME_HEADER.size:
            raise LinkRefused("a frame without a payload")
        _, seq, signature = FRAME_HEADER.unpack_from(raw)
        return Frame(seq, signature, memoryview(raw)[FRAME_HEADER.size :])
    decoder = _decoders.get(kind)
    if decoder is None or len(raw) > SMALL_MESSAGE_BYTES:
        raise LinkRefused(f"unknown or oversized message ({kind!r}, {len(raw)} bytes)")
    try:
        message: LinkMessage = decoder.decode(raw[1:])
    except msgspec.MsgspecError as error:
        raise LinkRefused(f"malformed message: {error}") from error
    return message


class LinkSigner:
    """Signatures of frames and acknowledgements on one chain (LINK-6)."""

    def __init__(self, key: KeyPair, chain_id: bytes) -> None:
        self._key = key
        self._chain_id = chain_id

    def sign_frame(self, sender: Place, seq: int, digest: bytes) -> bytes:
        """Sign a frame of ours; `sender` is our end."""
        return self._key.sign("frame", self._chain_id, _signed(sender, seq, digest))

    def check_frame(
        self, peer: bytes, sender: Place, seq: int, digest: bytes, signature: bytes
    ) -> bool:
        """Whether the session `peer` (public key) signed this frame."""
        return verify(peer, "frame", self._chain_id, _signed(sender, seq, digest), signature)

    def sign_ack(self, sender: Place, segment: int, root: bytes) -> bytes:
        """Acknowledge what `sender` (the other end) sent during a segment."""
        return self._key.sign("frames", self._chain_id, _signed(sender, segment, root))

    def check_ack(self, peer: bytes, sender: Place, ack: Ack) -> bool:
        """Whether the session `peer` acknowledged what we (`sender`) sent."""
        message = _signed(sender, ack.segment, ack.root)
        return verify(peer, "frames", self._chain_id, message, ack.signature)


def _signed(sender: Place, number: int, digest: bytes) -> bytes:
    numbers = struct.pack(
        "!QII?Q", sender.epoch, sender.lane, sender.stage, sender.link == "down", number
    )
    return sender.job + numbers + digest


class LinkLog:
    """Both directions of one link: numbers and digests, no payloads, no streams.

    `produced` and `consumed` count frames: the next number to send and the next one wanted.
    """

    def __init__(self, place: Place, incarnation: int, dimensions: Dimensions) -> None:
        self.place = place
        self.incarnation = incarnation
        self.segment_frames = dimensions.segment_steps * dimensions.micro_batches
        self.end = dimensions.rounds * self.segment_frames
        self.produced = 0
        self.consumed = 0
        self.peer_incarnation = -1
        self.peer_wanted = 0
        """Of its last Hello: it has every frame below."""
        self._stages = dimensions.stages
        self._frame_bytes = dimensions.frame_bytes
        self._kept_from = 0
        self._sent: dict[int, bytes] = {}
        self._received: dict[int, bytes] = {}
        self._peer_holds: dict[int, bytes] = {}

    @property
    def complete(self) -> bool:
        """Every frame of the job went both ways."""
        return self.produced == self.end and self.consumed == self.end

    def hello(self) -> Hello:
        """What we say on a new stream (LINK-1)."""
        first = max(self.consumed - HELD_DIGESTS, 0)
        while first < self.consumed and first not in self._received:
            first += 1
        held = tuple(self._received[seq] for seq in range(first, self.consumed))
        return Hello(*self.place, self.incarnation, self.consumed, held)

    def greeted(self, hello: Hello) -> int:
        """The peer's Hello: gives the number from which to send. LinkRefused, LinkMismatch."""
        if hello.place != self.place.other:
            raise LinkRefused("the Hello speaks of another job, epoch, slot or link")
        if hello.incarnation < self.peer_incarnation:
            raise LinkRefused(
                f"incarnation {hello.incarnation} is older than {self.peer_incarnation}"
            )
        if not self._kept_from <= hello.want <= self.end or len(hello.held) > hello.want:
            raise LinkRefused(
                f"the peer wants frame {hello.want}; {self._kept_from} to {self.end} can be had"
            )
        self.peer_incarnation = hello.incarnation
        self.peer_wanted = hello.want
        self._peer_holds = {}
        for seq, digest in enumerate(hello.held, hello.want - len(hello.held)):
            ours = self._sent.get(seq)
            if ours is None:
                self._peer_holds[seq] = digest
            elif ours != digest:
                raise LinkMismatch(f"frame {seq}: the peer holds another digest than was sent")
        return hello.want

    def produce(self, seq: int, digest: bytes) -> None:
        """Our worker made frame `seq`. ValueError out of order, LinkMismatch (LINK-5)."""
        if seq != self.produced or seq >= self.end:
            raise ValueError(f"the worker sent frame {seq} where {self.produced} was due")
        held = self._peer_holds.pop(seq, None)
        if held is not None and held != digest:
            raise LinkMismatch(f"frame {seq}: the peer holds another digest than was made now")
        self._sent[seq] = digest
        self.produced += 1

    def admits(self, seq: int, length: int) -> bool:
        """Whether an arriving frame is the next one (True) or an old one (False); LinkRefused when
        its number or size is neither (LINK-2, LINK-3)."""
        if not 0 < length <= self._frame_bytes:
            raise LinkRefused(f"frame {seq} has {length} bytes, at most {self._frame_bytes}")
        if seq < self.consumed:
            return False
        if seq > self.consumed or seq >= self.end:
            raise LinkRefused(f"frame {seq} where {self.consumed} was due")
        highest = max(self.produced, *(known + 1 for known in self._peer_holds), 0) - 1
        if seq > highest + self._stages:
            raise LinkRefused(f"frame {seq} is ahead of the schedule (we sent up to {highest})")
        return True

    def consume(self, seq: int, digest: bytes) -> None:
        """Frame `seq` was verified; when it is an old one its digest is compared (LINK-5)."""
        if seq < self.consumed:
            known = self._received.get(seq)
            if known is not None and known != digest:
                raise LinkMismatch(f"frame {seq} came again with another digest")
            return
        self._received[seq] = digest
        self.consumed += 1

    def roots(self, segment: int) -> tuple[bytes, bytes]:
        """(sent root, received root) of a segment, as far as its frames went."""
        span = range(segment * self.segment_frames, (segment + 1) * self.segment_frames)
        return (
            link_root((seq, self._sent[seq]) for seq in span if seq in self._sent),
            link_root((seq, self._received[seq]) for seq in span if seq in self._received),
        )

    def keeps(self, segment: int) -> bool:
        """Whether the digests of a segment's frames are still here."""
        return segment * self.segment_frames >= self._kept_from

    def discard(self, segment: int) -> None:
        """Forget segments <= `segment`; frames below cannot be asked for any more."""
        border = min((segment + 1) * self.segment_frames, self.produced, self.consumed)
        for seq in range(self._kept_from, border):
            self._sent.pop(seq, None)
            self._received.pop(seq, None)
        self._kept_from = max(self._kept_from, border)
