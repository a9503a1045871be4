"""A link on its streams: connects, greets, always reads, sends what is due, says goodbye.

The numbered log (`link.LinkLog`) decides; this shell moves bytes. At most one stream serves a link;
a newer one replaces it. The end at the smaller stage dials, with back-off.
"""

import logging
import math
from collections.abc import Awaitable, Callable

import trio

from tdmld.chain.crypto import public_key
from tdmld.node.errors import LinkMismatch, LinkRefused
from tdmld.node.layout import disk_text
from tdmld.node.link import (
    Ack,
    Bye,
    Frame,
    Hello,
    LinkLog,
    LinkSigner,
    Place,
    decode_message,
    encode_small,
    frame_header,
    message_limit,
)
from tdmld.node.ring import SlotRing
from tdmld.p2p import Host, Stream
from tdmld.p2p.errors import P2PError
from tdmld.train.digest import digest

log = logging.getLogger(__name__)

HELLO_SECONDS = 15.0
"""A peer that opened a stream and does not greet in this time is dropped."""
REDIAL_FIRST_SECONDS = 0.1
REDIAL_LAST_SECONDS = 5.0

Room = Callable[[str], Awaitable[None]]
Deliver = Callable[[str, int, memoryview], None]


class LinkServer:
    """One end of one link of a live slot.

    `room(link)` waits until one more frame can be taken (the peer then waits too): LINK-3 bounds
    what an honest peer sends, but a peer's Hello says itself what it holds of ours.
    `deliver(link, seq, payload)` takes a verified frame.
    `broken(text)` is called when the slot must stop: LinkMismatch, or the disk.
    """

    def __init__(
        self,
        state: LinkLog,
        ring: SlotRing,
        signer: LinkSigner,
        peer: str,
        frame_bytes: int,
        room: Room,
        deliver: Deliver,
        broken: Callable[[str], None],
    ) -> None:
        self.state = state
        self.peer = peer
        self.done = trio.Event()
        """Both ends said goodbye."""
        self._peer_key = public_key(peer)
        self._ring = ring
        self._signer = signer
        self._limit = message_limit(frame_bytes)
        self._room = room
        self._deliver = deliver
        self._broken = broken
        self._scope: trio.CancelScope | None = None
        self._changed = trio.Event()
        self._kept = 0
        """Frames of ours that the ring has: what may be sent."""
        self._receiving = trio.Lock()
        """One arriving frame at a time, also when a newer stream replaces the one it came on."""
        self._stopped = False
        self._given: list[Ack] = []
        """Our acknowledgements of segments that are not settled, said on every new stream: one that
        was on its way when a stream broke is lost."""
        self.acks: dict[int, Ack] = {}
        """The peer's acknowledgements of what we sent, by segment."""

    @property
    def place(self) -> Place:
        """Our end."""
        return self.state.place

    @property
    def connected(self) -> bool:
        """Whether a stream serves this link now."""
        return self._scope is not None

    async def produce(self, seq: int, payload: memoryview) -> None:
        """The worker's frame `seq`: sign, keep, send when a peer is there. One call at a time;
        ValueError (out of order), LinkMismatch, OSError (disk)."""
        value = digest(payload)
        self.state.produce(seq, value)
        signature = self._signer.sign_frame(self.place, seq, value)
        await self._ring.append(self.place.link, "sent", seq, signature, payload)
        self._kept += 1
        self._wake()

    async def stop(self) -> None:
        """Let the stream go and write no more to the ring; returns when nothing is being written.
        Not cancelled."""
        self._stopped = True
        if self._scope is not None:
            self._scope.cancel()
        with trio.CancelScope(shield=True):
            async with self._receiving:
                pass

    def discard(self, segment: int) -> None:
        """Frames and acknowledgements of segments <= `segment` are of no use any more."""
        self.state.discard(segment)
        self.acks = {number: ack for number, ack in self.acks.items() if number > segment}
        self._given = [ack for ack in self._given if ack.segment > segment]

    async def dial(self, host: Host, protocol: str) -> None:
        """Keep a stream until the goodbye; for the end at the smaller stage. Cancel to stop."""
        pause = REDIAL_FIRST_SECONDS
        while not self.done.is_set():
            before = self.state.consumed, self.state.produced
            try:
                stream = await host.open_stream(self.peer, protocol)
                async with stream:
                    await stream.send(encode_small(self.state.hello()))
                    await self._greeted(stream, await self._first(stream))
            except (P2PError, LinkRefused) as error:
                log.info("link %s to %s: %s", self.place.link, self.peer, error)
            if (self.state.consumed, self.state.produced) != before:
                pause = REDIAL_FIRST_SECONDS
            if not self.done.is_set():
                await trio.sleep(pause)
                pause = min(pause * 2, REDIAL_LAST_SECONDS)

    async def answer(self, stream: Stream, hello: Hello) -> None:
        """Serve a stream that the peer opened and greeted on. LinkRefused, P2PError."""
        if stream.peer_id != self.peer:
            raise LinkRefused(f"{stream.peer_id} is not the neighbour of this slot")
        await stream.send(encode_small(self.state.hello()))
        await self._greeted(stream, hello)

    async def _first(self, stream: Stream) -> Hello:
        with trio.move_on_after(HELLO_SECONDS):
            message = decode_message(await stream.receive(self._limit))
            if isinstance(message, Hello):
                return message
            raise LinkRefused(f"a {type(message).__name__} before the Hello")
        raise LinkRefused(f"no Hello in {HELLO_SECONDS:.0f} s")

    async def _greeted(self, stream: Stream, hello: Hello) -> None:
        try:
            cursor = self.state.greeted(hello)
            await self._serve(stream, cursor)
        except LinkMismatch as error:
            self._broken(f"link {self.place.link} to {self.peer}: {error}")
            raise
        except OSError as error:
            self._broken(f"link {self.place.link}: {disk_text(error)}")

    async def _serve(self, stream: Stream, cursor: int) -> None:
        if self._scope is not None:
            self._scope.cancel()
        heard = trio.Event()
        with trio.CancelScope() as scope:
            self._scope = scope
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write, stream, cursor, heard)
                    await self._read(stream, heard)
            except* (P2PError, LinkRefused, OSError) as group:
                # One cause ends both directions; which of them met it first does not matter.
                raise _first_leaf(group) from None
            finally:
                if self._scope is scope:
                    self._scope = None

    async def _write(self, stream: Stream, cursor: int, heard: trio.Event) -> None:
        said, acknowledged = False, -1
        while not (said and heard.is_set()):
            changed = self._changed
            for ack in [ack for ack in self._given if ack.segment > acknowledged]:
                await stream.send(encode_small(ack))
                acknowledged = ack.segment
            if cursor < self._kept:
                signature, payload = self._ring.read_sent(self.place.link, cursor)
                await stream.send(frame_header(cursor, signature), payload)
                cursor += 1
            elif self.state.complete and not said:
                await stream.send(encode_small(Bye()))
                said = True
            else:
                await changed.wait()
        self.done.set()

    async def _read(self, stream: Stream, heard: trio.Event) -> None:
        while not heard.is_set():
            await self._room(self.place.link)
            match decode_message(await stream.receive(self._limit)):
                case Frame(seq, signature, payload):
                    # Shielded: once it is counted it must reach the ring and the worker.
                    with trio.CancelScope(shield=True):
                        async with self._receiving:
                            await self._frame(seq, signature, payload)
                case Ack() as ack:
                    self._acknowledged(ack)
                case Bye():
                    if not self.state.complete:
                        raise LinkRefused("the peer said goodbye before the end")
                    heard.set()
                    self._wake()
                case Hello():
                    raise LinkRefused("a second Hello")

    async def _frame(self, seq: int, signature: bytes, payload: memoryview) -> None:
        if self._stopped:
            raise LinkRefused("the slot was closed")
        fresh = self.state.admits(seq, payload.nbytes)
        value = digest(payload)
        if not self._signer.check_frame(self._peer_key, self.place.other, seq, value, signature):
            raise LinkRefused(f"frame {seq} is not signed by the neighbour's session key")
        self.state.consume(seq, value)
        if not fresh:
            return
        await self._ring.append(self.place.link, "received", seq, signature, payload)
        if (seq + 1) % self.state.segment_frames == 0:
            segment = seq // self.state.segment_frames
            root = self.state.roots(segment)[1]
            signed = self._signer.sign_ack(self.place.other, segment, root)
            self._given.append(Ack(segment, root, signed))
        self._wake()
        self._deliver(self.place.link, seq, payload)

    def _acknowledged(self, ack: Ack) -> None:
        end = (ack.segment + 1) * self.state.segment_frames
        if self.state.produced < end <= self.state.peer_wanted:
            return  # what our predecessor sent: it is compared by digest before we send it (LINK-5)
        if end > self.state.produced:
            raise LinkRefused(f"segment {ack.segment} was acknowledged before it was sent")
        if not self._signer.check_ack(self._peer_key, self.place, ack):
            raise LinkRefused("an acknowledgement that the neighbour did not sign")
        if not self.state.keeps(ack.segment):
            return  # late: settled and forgotten, there is nothing left to compare it with
        if ack.root != self.state.roots(ack.segment)[0]:
            raise LinkMismatch(f"segment {ack.segment}: the peer received other bytes than we sent")
        self.acks[ack.segment] = ack

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


def _first_leaf(group: BaseExceptionGroup[Exception]) -> Exception:
    """A LinkMismatch or disk error if there is one, else the first."""

    def rank(error: Exception) -> float:
        return (
            0 if isinstance(error, LinkMismatch) else 1 if isinstance(error, OSError) else math.inf
        )

    leaves: list[Exception] = []
    todo: list[BaseException] = [group]
    while todo:
        error = todo.pop()
        if isinstance(error, BaseExceptionGroup):
            todo.extend(error.exceptions)
        elif isinstance(error, Exception):
            leaves.append(error)
    return min(leaves, key=rank)
