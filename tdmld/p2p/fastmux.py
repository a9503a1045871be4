"""The light muxer that our own nodes speak: `/tdmld/fastmux/1.0.0`. Others fall back to Yamux.

Wire: frames of a 9-byte header (type u8, stream u32, value u32, big endian); DATA is followed by
`value` bytes, at most `FRAME_BYTES`. The dialler opens odd stream numbers, the listener even ones.

    DATA n     n bytes of the stream          FIN      the sender will write no more
    OPEN       the stream begins              RST      the sender forgot the stream
    CREDIT n   n more bytes may be sent       PING n / PONG n   liveness and round trip

Flow control: a stream starts with `WINDOW_BYTES` of credit; what the application has taken is
granted again. A reader that awaits a large message, or takes a window in a few round trips, widens
it up to `WINDOW_MAX_BYTES`. So a peer can never park more than it was granted; one that overruns
breaks the connection.

Order: one frame at a time; control frames first, then small writes, then bulk in turns (`turns`),
in frames that leave in a few milliseconds.

Cancellation: a frame is written whole or not at all (the secure session shields its writes).
Waiting for credit or for the turn can be cancelled. Control frames never wait in a caller: they are
queued, sent with the next data or by the flusher, and so a reset costs nothing and cannot block.

docs/spec/transport.md says it for others to implement.
"""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

import trio
from libp2p.abc import IMuxedConn, ISecureConn
from libp2p.connection_types import ConnectionType
from libp2p.custom_types import TProtocol
from libp2p.io.exceptions import IOException
from libp2p.network.connection.exceptions import RawConnError
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import (
    MuxedConnUnavailable,
    MuxedStreamReset,
)
from multiaddr import Multiaddr

from tdmld.p2p.accounting import Offence
from tdmld.p2p.memory import Memory
from tdmld.p2p.muxstream import (
    CREDIT,
    DATA,
    FIN,
    FRAME_BYTES,
    HEADER,
    OPEN,
    PING,
    PONG,
    RST,
    SMALL_BYTES,
    WINDOW_BYTES,
    Buffer,
    FastMuxStream,
)
from tdmld.p2p.shield import shielded
from tdmld.p2p.tls import RECORD_BYTES, TlsSession
from tdmld.p2p.turns import FrameSize, Turns

PROTOCOL = TProtocol("/tdmld/fastmux/1.0.0")

INBOUND_STREAMS = 256
"""Streams a peer may have open towards us; the host's own limit is lower."""
_CONTROL_FRAMES = 4096
"""Control frames waiting because the peer does not read: more means it never will."""
_FRAMES_PER_SECOND = 20_000.0
"""Frames with hardly any content that one connection may send us: six for each stream opened, one
for each 256 KiB taken; a tenth of a core's time."""
_FRAMES_AT_ONCE = 40_000.0
_PING_FRAMES = 4.0
"""A ping counts as so many: it makes us answer."""
_FULL_BYTES = 512
"""Data from which a frame is worth its header."""
_FRAMES_A_TURN = 512
"""Handled before other tasks get their turn: 3 ms."""
_THROTTLE_SECONDS = 0.1
_DIE_SECONDS = 2.0
_CLOSE_SECONDS = 0.2
"""Time for the last FIN frames when a connection is closed in good order."""

_BROKEN = (IOException, RawConnError, trio.ClosedResourceError)
"""How a secure session fails."""


Accuse = Callable[[ID, Offence, str], None]


class BrokenRules(Exception):
    """The peer does not keep to the protocol: the connection ends."""


class FastMux(IMuxedConn):
    """One multiplexed connection. `start` runs it; the swarm does that in a task of its own."""

    on_close: Callable[[], Awaitable[None]] | None
    """Set by the swarm; awaited once when the connection ends for any reason."""

    def __init__(
        self,
        conn: ISecureConn,
        peer_id: ID,
        *,
        inbound_streams: int = INBOUND_STREAMS,
        memory: Memory | None = None,
        accuse: Accuse = lambda peer, offence, why: None,
    ) -> None:
        """`memory` is the host's; `accuse` hears what the peer did against the rules."""
        self.peer_id = peer_id
        self.held = 0
        self._holding: set[FastMuxStream] = set()
        """Streams with bytes that nobody has taken, also such as are over."""
        self.memory = memory or Memory(INBOUND_STREAMS * WINDOW_BYTES)
        self._accuse = accuse
        self._frames = _FRAMES_AT_ONCE
        self._frames_at = trio.current_time()
        self.on_close = None
        self.event_started = trio.Event()
        self._session = conn
        self._tls = conn if isinstance(conn, TlsSession) else None
        """The same when it can gather and scatter."""
        self._streams: dict[int, FastMuxStream] = {}
        self._next = 1 if conn.is_initiator else 2
        self._inbound_limit = inbound_streams
        self._inbound_open = 0
        self._highest_inbound = 0
        self._accepted_send, self._accepted = trio.open_memory_channel[FastMuxStream](
            inbound_streams
        )
        self.turns = Turns()
        """Who may write a frame."""
        self._frame_size = FrameSize()
        self._control: list[bytes] = []
        self._control_added = trio.Event()
        self._dead = False
        self._pings: dict[int, trio.Event] = {}
        self._next_ping = 0
        self.round_trip = 0.0
        """The shortest seen, in seconds; 0 before the first."""
        self.last_received = trio.current_time()

    @property
    def is_initiator(self) -> bool:
        return self._session.is_initiator

    @property
    def is_established(self) -> bool:
        return self.event_started.is_set() and not self._dead

    @property
    def is_closed(self) -> bool:
        return self._dead

    async def start(self) -> None:
        """Run until the connection ends. Raises nothing but cancellation."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._flush_control)
                self.event_started.set()
                await self._read_frames()
                nursery.cancel_scope.cancel()
        finally:
            self.event_started.set()
            # Shielded: the swarm and the peers must learn of the end even while we are cancelled.
            with shielded(_DIE_SECONDS):
                await self._die()

    async def open_stream(self) -> FastMuxStream:
        if self._dead:
            raise MuxedConnUnavailable("the connection is closed")
        number = self._next
        self._next += 2
        stream = self._streams[number] = FastMuxStream(self, number)
        self.queue_control(OPEN, number, 0)
        return stream

    async def accept_stream(self) -> FastMuxStream:
        try:
            return await self._accepted.receive()
        except trio.EndOfChannel:
            raise MuxedConnUnavailable("the connection is closed") from None

    async def ping(self) -> float:
        """Seconds for a round trip. Cancel it to give up; MuxedConnUnavailable when the end
        comes."""
        if self._dead:
            raise MuxedConnUnavailable("the connection is closed")
        number = self._next_ping
        self._next_ping = (number + 1) & 0xFFFFFFFF
        answered = self._pings[number] = trio.Event()
        started = trio.current_time()
        try:
            self.queue_control(PING, 0, number)
            await answered.wait()
        finally:
            self._pings.pop(number, None)
        if self._dead:
            raise MuxedConnUnavailable("the connection is closed")
        took = trio.current_time() - started
        self.round_trip = min(took, self.round_trip or took)
        return took

    async def close(self) -> None:
        """Send what control frames wait, then close. Takes at most `_CLOSE_SECONDS`."""
        if not self._dead and self.event_started.is_set() and self._control:
            with shielded(_CLOSE_SECONDS), suppress(*_BROKEN):
                await self.turns.take(urgent=True)
                try:
                    await self._write(b"", ())
                finally:
                    self.turns.release()
        await self._die()

    def get_remote_address(self) -> tuple[str, int] | None:
        return self._session.get_remote_address()

    def get_transport_addresses(self) -> list[Multiaddr]:
        return self._session.get_transport_addresses()

    def get_connection_type(self) -> ConnectionType:
        return self._session.get_connection_type()

    # Sending

    @property
    def frame_bytes(self) -> int:
        """The most for the next DATA frame: with its header it fills whole TLS records."""
        return self._frame_size.bytes - HEADER.size

    async def send_data(self, number: int, size: int, views: Sequence[memoryview]) -> None:
        """With the turn held: one DATA frame, whole, whatever happens to the caller.

        MuxedStreamReset when the connection is dead.
        """
        if self._dead:
            raise MuxedStreamReset("the connection is closed")
        began = trio.current_time()
        try:
            await self._write(HEADER.pack(DATA, number, size), views)
        except _BROKEN as error:
            with shielded(_DIE_SECONDS):
                await self._die()
            raise MuxedStreamReset(f"the connection broke: {error}") from error
        if size > SMALL_BYTES // 2:
            self._frame_size.sent(size, trio.current_time() - began)

    def queue_control(self, kind: int, number: int, value: int) -> None:
        """Send a control frame as soon as possible without waiting for it."""
        if self._dead:
            return
        self._control.append(HEADER.pack(kind, number, value))
        self._control_added.set()

    async def _write(self, header: bytes, views: Sequence[memoryview]) -> None:
        """With the turn held: what control frames wait, then a frame."""
        control, self._control = self._control, []
        head = b"".join((*control, header))
        if self._tls is not None:
            await self._tls.write_parts(_records(head, views))
        elif head:
            await self._session.write(b"".join((head, *views)))

    async def _flush_control(self) -> None:
        while not self._dead:
            await self._control_added.wait()
            self._control_added = trio.Event()
            if not self._control:
                continue  # they left with a frame
            await self.turns.take(urgent=True)
            try:
                await self._write(b"", ())
            except _BROKEN:
                await self._session.close()  # the reader notices and ends the connection
                return
            finally:
                self.turns.release()

    # Receiving

    async def _read_frames(self) -> None:
        turn = 0
        try:
            while len(self._control) <= _CONTROL_FRAMES:
                kind, number, value = HEADER.unpack(await self._exactly(HEADER.size))
                self.last_received = trio.current_time()
                if kind != DATA or value < _FULL_BYTES:
                    # Many small frames come in one read: they must not keep others waiting.
                    turn = (turn + 1) % _FRAMES_A_TURN
                    if turn == 0:
                        await trio.lowlevel.checkpoint()
                    self._frames -= _PING_FRAMES if kind == PING else 1
                    if self._frames < 0:
                        await self._throttle()
                if kind == DATA:
                    await self._on_data(number, value)
                elif not self._on_control(kind, number, value):
                    raise BrokenRules(f"a frame of kind {kind} for stream {number}")
            self._accuse(self.peer_id, Offence.UNREAD, f"{_CONTROL_FRAMES} answers wait")
        except BrokenRules as error:
            self._accuse(self.peer_id, Offence.FLOW_CONTROL, str(error))
        except (*_BROKEN, EOFError):
            return  # the usual end of a connection; `_die` tells everybody

    async def _throttle(self) -> None:
        """Read on when the peer has frames left."""
        now = trio.current_time()
        gained = (now - self._frames_at) * _FRAMES_PER_SECOND
        self._frames = min(self._frames + gained, _FRAMES_AT_ONCE)
        self._frames_at = now
        if self._frames < 0:
            self._accuse(self.peer_id, Offence.CONTROL_FLOOD, "it is read more slowly now")
            await trio.sleep(_THROTTLE_SECONDS)

    async def _exactly(self, size: int) -> bytes:
        data = await self._session.read(size)
        while len(data) < size:
            more = await self._session.read(size - len(data)) if data else b""
            if not more:
                raise EOFError
            data += more
        return data

    async def _on_data(self, number: int, size: int) -> None:
        stream = self._streams.get(number)
        if size > FRAME_BYTES or (stream is not None and not stream.on_announced(size)):
            raise BrokenRules(f"{size} bytes for stream {number} were too many")
        if stream is None:
            self.queue_control(RST, number, 0)
        elif stream.is_deaf:
            await stream.reset()
        while size:
            if (
                self._tls is not None
                and stream is not None
                and (room := stream.room(size)) is not None
            ):
                filled = await self._tls.read_into(room)
                del room  # or its message could not be given away without a copy
                stream.on_filled(filled)
            else:
                chunk = await self._session.read(size)
                filled = len(chunk)
                if stream is not None:
                    stream.on_data(chunk)
            if not filled:
                raise EOFError
            size -= filled

    def _on_control(self, kind: int, number: int, value: int) -> bool:
        """False when the peer breaks the protocol."""
        if kind == OPEN:
            return self._on_open(number)
        if kind == PING:
            self.queue_control(PONG, 0, value)
        elif kind == PONG:
            if (answered := self._pings.get(value)) is not None:
                answered.set()
        elif kind in (CREDIT, FIN, RST):
            stream = self._streams.get(number)
            if stream is None:
                return True
            if kind == CREDIT:
                stream.on_credit(value)
            elif kind == FIN:
                stream.on_fin()
            else:
                stream.on_reset()
                self.forget(number)
        else:
            return False
        return True

    def _on_open(self, number: int) -> bool:
        if number % 2 == self._next % 2 or number <= self._highest_inbound:
            return False
        self._highest_inbound = number
        if self._inbound_open >= self._inbound_limit or self.memory.refuses_stream(self):
            self.queue_control(RST, number, 0)
            return True
        stream = FastMuxStream(self, number)
        try:
            self._accepted_send.send_nowait(stream)
        except (trio.WouldBlock, trio.BrokenResourceError):
            self.queue_control(RST, number, 0)
            return True
        self._streams[number] = stream
        self._inbound_open += 1
        return True

    # Ending

    def hold(self, stream: FastMuxStream, size: int) -> None:
        """Called by a stream on which so much more, or less, waits for its reader."""
        if stream.held:
            self._holding.add(stream)
        else:
            self._holding.discard(stream)
        self.memory.hold(self, size)

    def relieve(self) -> None:
        """Drop the stream on which most waits for its reader: memory is out."""
        max(self._holding, key=lambda stream: stream.held).drop()

    def forget(self, number: int) -> None:
        """Called by a stream that is over in both directions."""
        if self._streams.pop(number, None) is not None and number % 2 != self._next % 2:
            self._inbound_open -= 1

    async def _die(self) -> None:
        if self._dead:
            return
        self._dead = True
        self._accepted_send.close()
        for stream in list(self._streams.values()):
            stream.on_lost()
        self._streams.clear()
        for answered in self._pings.values():
            answered.set()
        self._control.clear()
        self._control_added.set()
        with suppress(*_BROKEN):
            await self._session.close()
        if self.on_close is not None:
            await self.on_close()


def _records(head: bytes, views: Sequence[memoryview]) -> list[Buffer]:
    """What to encrypt one after another: `head` shares its record with the beginning of the data,
    so that no record is nearly empty; the rest is not copied."""
    lead = RECORD_BYTES - len(head) % RECORD_BYTES
    copied: list[Buffer] = [head]
    left: list[Buffer] = []
    for view in views:
        if lead:
            copied.append(view[:lead])
            lead, view = lead - len(copied[-1]), view[lead:]
        if view:
            left.append(view)
    joined = b"".join(copied)
    return [joined, *left] if joined else left
