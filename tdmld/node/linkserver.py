"""A link on its streams: connects, greets, always reads, sends what is due, says goodbye.

The numbered log (`link.LinkLog`) decides; this shell moves bytes. At most one stream serves a link;
a newer one replaces it. One end dials, with back-off: that whose link is "down", of a lane link the
smaller lane's; the other one once when it is opened or gets a new neighbour, so that nobody waits
for a back-off, and when nobody came for a while: the end that dials may have said its goodbye to a
peer that was opened again since (LINK-7).
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
from tdmld.node.ring import Restored, SlotRing, cause_of
from tdmld.p2p import Host, Stream
from tdmld.p2p.errors import P2PError
from tdmld.train.digest import digest

log = logging.getLogger(__name__)

HELLO_SECONDS = 15.0
"""A peer that opened a stream and does not greet in this time is dropped."""
REDIAL_FIRST_SECONDS = 0.1
REDIAL_LAST_SECONDS = 5.0
PATIENCE_SECONDS = 3.0
"""So long the end that does not dial waits for the other one."""
EARLY_ACKS = 256
"""Acknowledgements of what a predecessor sent, kept until our worker has made it too."""

Room = Callable[[str], Awaitable[None]]
Deliver = Callable[[str, int, memoryview], None]
Broken = Callable[[str, str], None]


class LinkServer:
    """One end of one link of a live slot.

    `room(link)` waits until one more frame can be taken (the peer then waits too): LINK-3 bounds
    what an honest peer sends, but a peer's Hello says itself what it holds of ours.
    `deliver(link, seq, payload)` takes a verified frame that is in the ring.
    `broken(text, cause)` is called when the slot must stop: LinkMismatch ("link"), or the disk.
    """

    def __init__(
        self,
        state: LinkLog,
        ring: SlotRing,
        signer: LinkSigner,
        peer: str,
        room: Room,
        deliver: Deliver,
        broken: Broken,
    ) -> None:
        self.state = state
        self.peer = peer
        self.done = trio.Event()
        """Both ends said goodbye."""
        self._peer_key = public_key(peer)
        self._ring = ring
        self._signer = signer
        self._limit = message_limit(state.frame_bytes)
        self._room = room
        self._deliver = deliver
        self._broken = broken
        self._scope: trio.CancelScope | None = None
        self._changed = trio.Event()
        self._peer_changed = trio.Event()
        self._kept = state.produced
        """Frames of ours below it are in the ring, if any: what may be sent."""
        self._logged = state.produced
        """Frames of ours below it were logged in an earlier life of this slot (LINK-8)."""
        self._receiving = trio.Lock()
        """One arriving frame at a time, also when a newer stream replaces the one it came on."""
        self._stopped = False
        self._untried = True
        """Whether this end has not dialled since it was opened or got another neighbour."""
        self._given: list[Ack] = []
        """Our acknowledgements of segments that somebody may still need, said on every new stream:
        one that was on its way when a stream broke is lost."""
        self._early: dict[int, Ack] = {}
        """The peer's, of what a predecessor of ours sent and we have not made yet, by segment."""
        self.acks: dict[int, Ack] = {}
        """The peer's acknowledgements of what we sent, by segment."""

    @property
    def place(self) -> Place:
        """Our end."""
        return self.state.place

    @property
    def dials(self) -> bool:
        """Whether this is the end that dials: both know it from the link's names."""
        ours, theirs = self.place, self.state.other
        return ours.link == "down" or (theirs.link != "down" and ours.lane < theirs.lane)

    @property
    def connected(self) -> bool:
        """Whether a stream serves this link now."""
        return self._scope is not None

    def restore(self, found: Restored) -> None:
        """Go on with what the ring has (LINK-8); before anything else."""
        state = self.state
        state.restore(*found)
        self._kept = self._logged = state.produced
        frames = state.segment_frames
        for segment in range(found.first // frames, state.consumed // frames):
            self._acknowledge(segment)

    def set_peer(self, session: str, incarnation: int) -> None:
        """Somebody else has the other end now; older news change nothing (LINK-4)."""
        if session == self.peer and incarnation == self.state.peer_incarnation:
            return
        key = public_key(session)
        if not self.state.set_peer(incarnation):
            return
        log.info("link %s is to %s now", self.place.link, session)
        self.peer, self._peer_key = session, key
        if self.done.is_set():
            self.done = trio.Event()
        if self._scope is not None:
            self._scope.cancel()
        self._untried = True
        self._peer_changed.set()
        self._peer_changed = trio.Event()
        self._wake()

    async def produce(self, seq: int, payload: memoryview) -> None:
        """The worker's frame `seq`: sign, keep, send when a peer is there. One call at a time;
        ValueError (out of order), LinkMismatch, OSError (disk)."""
        value = digest(payload)
        if self.state.produce(seq, value):
            signature = self._signer.sign_frame(self.place, seq, value)
            await self._ring.append(self.place.link, "sent", seq, signature, payload, value)
            self._kept += 1
            self._wake()
        if (seq + 1) % self.state.segment_frames == 0:
            early = self._early.pop(seq // self.state.segment_frames, None)
            if early is not None:
                self._compare(early)

    async def stop(self) -> None:
        """Let the stream go and write no more to the ring; returns when nothing is being written.
        Not cancelled."""
        self._stopped = True
        if self._scope is not None:
            self._scope.cancel()
        with trio.CancelScope(shield=True):
            async with self._receiving:
                pass

    def discard(self, keep_from: int) -> None:
        """Frames and acknowledgements of segments < `keep_from` are of no use any more."""
        self._ring.forget(self.place.link, self.state.discard(keep_from))
        self.acks = {number: ack for number, ack in self.acks.items() if number >= keep_from}
        self._given = [ack for ack in self._given if ack.segment >= keep_from]

    async def keep(self, host: Host, protocol: str) -> None:
        """Dial whenever it is this end's turn and no stream is there. Cancel to stop."""
        pause = REDIAL_FIRST_SECONDS
        while True:
            await self._until_due()
            self._untried = False
            before, somebody = self._progress, self._peer_changed
            try:
                stream = await host.open_stream(self.peer, protocol)
                async with stream:
                    await stream.send(encode_small(self.state.hello()))
                    await self._greeted(stream, await self._first(stream))
            except (P2PError, LinkRefused) as error:
                log.info("link %s to %s: %s", self.place.link, self.peer, error)
            if self._progress != before or somebody.is_set():
                pause = REDIAL_FIRST_SECONDS
            if not self.done.is_set():
                with trio.move_on_after(pause):
                    await somebody.wait()
                pause = min(pause * 2, REDIAL_LAST_SECONDS)

    @property
    def _progress(self) -> tuple[int, int]:
        return self.state.consumed, self.state.produced

    async def _until_due(self) -> None:
        """Wait until there is something to dial for."""
        patience = math.inf
        while True:
            changed = self._changed
            if self.done.is_set() or self.connected:
                patience = math.inf
            elif self.dials or self._untried or trio.current_time() >= patience:
                return
            else:
                patience = min(patience, trio.current_time() + PATIENCE_SECONDS)
            with trio.move_on_at(patience):
                await changed.wait()

    async def answer(self, stream: Stream, hello: Hello) -> None:
        """Serve a stream that the peer opened and greeted on. LinkRefused, P2PError."""
        if stream.peer_id != self.peer:
            raise LinkRefused(f"{stream.peer_id} has not the other end of this link")
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
            self._broken(f"link {self.place.link} to {self.peer}: {error}", "link")
            raise
        except OSError as error:
            self._broken(f"link {self.place.link}: {disk_text(error)}", cause_of(error))

    async def _serve(self, stream: Stream, cursor: int) -> None:
        if self._stopped:
            # Meanwhile: nobody would ever end this stream.
            raise LinkRefused("the slot was closed")
        if self._scope is not None:
            self._scope.cancel()
        heard = trio.Event()
        done = self.done  # of this peer: another one's is another one
        failure: Exception | None = None
        with trio.CancelScope() as scope:
            self._scope = scope
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write, stream, cursor, heard, done)
                    await self._read(stream, heard)
            except* (P2PError, LinkRefused, OSError) as group:
                # One cause ends both directions; which of them met it first does not matter.
                # Raised below: here a cancellation at the same moment would come into its group.
                failure = _first_leaf(group)
            finally:
                if self._scope is scope:
                    self._scope = None
                    self._wake()
        if failure is not None:
            raise failure

    async def _write(
        self, stream: Stream, cursor: int, heard: trio.Event, done: trio.Event
    ) -> None:
        said, acknowledged = False, -1
        # One buffer a stream; untouched pages of it cost nothing.
        buffer = memoryview(bytearray(self.state.frame_bytes))
        while not (said and heard.is_set()):
            changed = self._changed
            for ack in [ack for ack in self._given if ack.segment > acknowledged]:
                await stream.send(encode_small(ack))
                acknowledged = ack.segment
            if cursor < self._kept:
                await self._send_frame(stream, cursor, buffer)
                cursor += 1
            elif self.state.complete and not said:
                await stream.send(encode_small(Bye()))
                said = True
            else:
                await changed.wait()
        done.set()
        self._wake()

    async def _send_frame(self, stream: Stream, seq: int, buffer: memoryview) -> None:
        signature, payload = await self._ring.read_sent(self.place.link, seq, buffer)
        if seq < self._logged:
            signature = self._signer.sign_frame(self.place, seq, self.state.sent_digest(seq))
        await stream.send(frame_header(seq, signature), payload)

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
        if not self._signer.check_frame(self._peer_key, self.state.other, seq, value, signature):
            raise LinkRefused(f"frame {seq} is not signed by the other end's session key")
        self.state.consume(seq, value)
        if not fresh:
            return
        await self._ring.append(self.place.link, "received", seq, signature, payload, value)
        if (seq + 1) % self.state.segment_frames == 0:
            self._acknowledge(seq // self.state.segment_frames)
        self._wake()
        self._deliver(self.place.link, seq, payload)

    def _acknowledge(self, segment: int) -> None:
        """Say to the peer, now and on every new stream, that we have all of a segment."""
        root = self.state.roots(segment)[1]
        signed = self._signer.sign_ack(self.state.other, segment, root)
        self._given.append(Ack(segment, root, signed))

    def _acknowledged(self, ack: Ack) -> None:
        end = (ack.segment + 1) * self.state.segment_frames
        if end > max(self.state.produced, self.state.peer_wanted):
            raise LinkRefused(f"segment {ack.segment} was acknowledged before it was sent")
        if not self._signer.check_ack(self._peer_key, self.place, ack):
            raise LinkRefused("an acknowledgement that the other end did not sign")
        if end <= self.state.produced:
            self._compare(ack)
        elif len(self._early) < EARLY_ACKS:
            self._early[ack.segment] = ack

    def _compare(self, ack: Ack) -> None:
        """What the peer received is what we sent, or our predecessor did (LINK-5, LINK-6)."""
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
