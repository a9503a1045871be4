"""The numbered log of one link: what may be sent, what may be received, where to resume. Sans-IO.

A link joins two slots of a job: neighbouring stages, or the same stage of two lanes. Each of its
two directions is a log of frames numbered from 0 to the end of the job, so many a segment; streams,
workers, carriers and whole nodes come and go around it. Rules (DESIGN L1, L2, S7):

LINK-1  The sender retains; the receiver says where to resume (`want` in Hello, at both ends).
LINK-2  A frame must carry the next number; a lower one is compared by digest and dropped.
LINK-3  A frame's number exceeds the highest number that this side ever sent the other way, or that
        the peer's Hello says it has of it, by at most `ahead`: the schedule never needs more, and
        more would fill disk and memory. Between stages that is the count of stages that can be
        ahead of each other, between lanes the parts of one step.
LINK-4  Hello names job, slot, link, job epoch and incarnation; another epoch is refused, an
        incarnation older than the newest one known is refused. Who is at the other end is said by
        the chain (`set_peer`): nobody else may speak.
LINK-5  Digests that the peer holds of what we sent are compared: with what we sent already at
        once, with what we are going to send (a replacement replays) before it is sent. So is its
        acknowledgement of a segment that our predecessor sent, once we made that segment. A
        mismatch stops the slot before anything new leaves.
LINK-6  Every frame is signed by the sender's session key over (job, epoch, lane, stage, link, seq,
        digest); the receiver acknowledges each segment by one signature over its link root, again
        on every new stream until nobody can need it any more.
LINK-7  The end is a handshake: Bye follows when everything was sent and received, in both
        directions; an end that said it still answers a peer that missed it, and one that misses it
        dials after a while, whichever end it is.
LINK-8  A slot that is opened again goes on with what its logs hold (`restore`): it wants what they
        lack and serves what they have at once. What its worker, which begins at an earlier
        boundary, makes again is compared by digest and dropped; it is neither signed nor logged
        again. A frame from a log is signed anew when it is sent: the epoch may be another one.
LINK-9  A slot on a new machine has nothing: it wants the first frame of the boundary where it
        begins, and whoever sent it keeps it until no slot can begin so early any more.

On the stream each message starts with its kind: frame (seq u64 ‖ signature ‖ payload), else a
MessagePack struct.
"""

import struct
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import msgspec

from tdmld.chain.crypto import KeyPair, verify
from tdmld.node.control import Id32, Link, LinkName
from tdmld.node.errors import LinkMismatch, LinkRefused
from tdmld.train.digest import link_root

HELD_DIGESTS = 256
"""Digests in a Hello: more than two segments of most jobs, 8 KiB."""
SMALL_MESSAGE_BYTES = 16 * 1024
CHECKED_EPOCHS = 64
"""So many epochs back a kept frame's signature is looked for."""
FRAME_HEADER = struct.Struct("!BQ64s")
_FRAME, _HELLO, _ACK, _BYE = b"F", b"H", b"A", b"B"

Number = Annotated[int, msgspec.Meta(ge=0, lt=2**62)]


class Place(NamedTuple):
    """Which end of which link: the slot, and the link's name there."""

    job: bytes
    epoch: int
    lane: int
    stage: int
    link: str


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

    def check_kept(
        self, peer: bytes, sender: Place, seq: int, digest: bytes, signature: bytes
    ) -> bool:
        """As `check_frame`, of a frame that may have been signed in an earlier epoch of the job."""
        epochs = range(sender.epoch, max(sender.epoch - CHECKED_EPOCHS, -1), -1)
        return any(
            self.check_frame(peer, sender._replace(epoch=epoch), seq, digest, signature)
            for epoch in epochs
        )

    def sign_ack(self, sender: Place, segment: int, root: bytes) -> bytes:
        """Acknowledge what `sender` (the other end) sent during a segment."""
        return self._key.sign("frames", self._chain_id, _signed(sender, segment, root))

    def check_ack(self, peer: bytes, sender: Place, ack: Ack) -> bool:
        """Whether the session `peer` acknowledged what we (`sender`) sent."""
        message = _signed(sender, ack.segment, ack.root)
        return verify(peer, "frames", self._chain_id, message, ack.signature)


_SIGNED = struct.Struct("!QII8sQ")


def _signed(sender: Place, number: int, digest: bytes) -> bytes:
    link = sender.link.encode("ascii")
    numbers = _SIGNED.pack(sender.epoch, sender.lane, sender.stage, link, number)
    return sender.job + numbers + digest


class LinkLog:
    """Both directions of one link: numbers and digests, no payloads, no streams.

    `produced` and `consumed` count frames: the next number to send and the next one wanted.
    """

    def __init__(
        self,
        job: bytes,
        epoch: int,
        slot: tuple[int, int],
        incarnation: int,
        link: Link,
        start: int,
    ) -> None:
        """The end of `link` at `slot` (lane, stage), whose worker begins at boundary `start`."""
        self.place = Place(job, epoch, *slot, link.name)
        self.other = Place(job, epoch, link.other_lane, link.other_stage, link.other_link)
        self.incarnation = incarnation
        self.segment_frames = link.segment_frames
        self.frame_bytes = link.frame_bytes
        self.end = link.segments * link.segment_frames
        first = min(start * link.segment_frames, self.end)
        self.made = first
        """The next number that our worker may send."""
        self.produced = first
        self.consumed = first
        self.kept_from = first
        """Frames below it can be asked for by nobody."""
        self.peer_incarnation = link.incarnation
        self.peer_wanted = 0
        """Of its last Hello: it has every frame below."""
        self._ahead = link.ahead
        self._sent: dict[int, bytes] = {}
        self._received: dict[int, bytes] = {}
        self._peer_holds: dict[int, bytes] = {}

    @property
    def complete(self) -> bool:
        """Every frame of the job went both ways."""
        return self.produced == self.end and self.consumed == self.end

    def restore(self, first: int, sent: Sequence[bytes], received: Sequence[bytes]) -> None:
        """Go on with what the logs hold: digests of both directions from number `first` on, which
        begins a segment, is not above the worker's start, and neither ends below that (LINK-8)."""
        if first > self.made or first + min(len(sent), len(received)) < self.made:
            raise ValueError(f"logs from {first} do not reach frame {self.made}")
        self.kept_from = first
        self._sent = dict(enumerate(sent, first))
        self._received = dict(enumerate(received, first))
        self.produced = first + len(sent)
        self.consumed = first + len(received)

    def set_peer(self, incarnation: int) -> bool:
        """Somebody else has the other end now; False when that is older news (LINK-4)."""
        if incarnation < self.peer_incarnation:
            return False
        self.peer_incarnation = incarnation
        self.peer_wanted = 0
        self._peer_holds = {}
        return True

    def hello(self) -> Hello:
        """What we say on a new stream (LINK-1)."""
        first = max(self.consumed - HELD_DIGESTS, 0)
        while first < self.consumed and first not in self._received:
            first += 1
        held = tuple(self._received[seq] for seq in range(first, self.consumed))
        return Hello(*self.place, self.incarnation, self.consumed, held)

    def greeted(self, hello: Hello) -> int:
        """The peer's Hello: gives the number from which to send. LinkRefused, LinkMismatch."""
        if hello.place != self.other:
            raise LinkRefused("the Hello speaks of another job, epoch, slot or link")
        if hello.incarnation < self.peer_incarnation:
            raise LinkRefused(
                f"incarnation {hello.incarnation} is older than {self.peer_incarnation}"
            )
        if not self.kept_from <= hello.want <= self.end or len(hello.held) > hello.want:
            raise LinkRefused(
                f"the peer wants frame {hello.want}; {self.kept_from} to {self.end} can be had"
            )
        self.peer_incarnation = hello.incarnation
        self.peer_wanted = hello.want
        self._peer_holds = {}
        for seq, digest in enumerate(hello.held, hello.want - len(hello.held)):
            ours = self._sent.get(seq)
            if ours is not None and ours != digest:
                raise LinkMismatch(f"frame {seq}: the peer holds another digest than was sent")
            if ours is None and seq >= self.produced:
                self._peer_holds[seq] = digest
        return hello.want

    def produce(self, seq: int, digest: bytes) -> bool:
        """Our worker made frame `seq`: whether it is a new one, which must be signed and kept.
        ValueError out of order, LinkMismatch (LINK-5, LINK-8)."""
        if seq != self.made or seq >= self.end:
            raise ValueError(f"the worker sent frame {seq} where {self.made} was due")
        if seq < self.produced:
            if self._sent.get(seq, digest) != digest:
                raise LinkMismatch(
                    f"frame {seq}: the worker made another one than before; memory or disk of this"
                    " machine is not reliable"
                )
            self.made += 1
            return False
        held = self._peer_holds.pop(seq, None)
        if held is not None and held != digest:
            raise LinkMismatch(f"frame {seq}: the peer holds another digest than was made now")
        self._sent[seq] = digest
        self.made += 1
        self.produced += 1
        return True

    def admits(self, seq: int, length: int) -> bool:
        """Whether an arriving frame is the next one (True) or an old one (False); LinkRefused when
        its number or size is neither (LINK-2, LINK-3)."""
        if not 0 < length <= self.frame_bytes:
            raise LinkRefused(f"frame {seq} has {length} bytes, at most {self.frame_bytes}")
        if seq < self.consumed:
            return False
        if seq > self.consumed or seq >= self.end:
            raise LinkRefused(f"frame {seq} where {self.consumed} was due")
        highest = max(self.produced, self.peer_wanted) - 1
        if seq > highest + self._ahead:
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

    def sent_digest(self, seq: int) -> bytes:
        """Of a frame that was sent and not forgotten. KeyError."""
        return self._sent[seq]

    def roots(self, segment: int) -> tuple[bytes, bytes]:
        """(sent root, received root) of a segment, as far as its frames went."""
        span = range(segment * self.segment_frames, (segment + 1) * self.segment_frames)
        return (
            link_root((seq, self._sent[seq]) for seq in span if seq in self._sent),
            link_root((seq, self._received[seq]) for seq in span if seq in self._received),
        )

    def keeps(self, segment: int) -> bool:
        """Whether the digests of a segment's frames are still here."""
        return segment * self.segment_frames >= self.kept_from

    def discard(self, keep_from: int) -> int:
        """Forget segments < `keep_from`; frames below cannot be asked for any more. Gives the first
        number that can."""
        border = min(keep_from * self.segment_frames, self.made, self.consumed)
        for seq in range(self.kept_from, border):
            self._sent.pop(seq, None)
            self._received.pop(seq, None)
        self.kept_from = max(self.kept_from, border)
        return self.kept_from
