"""The light muxer that our own nodes speak: `/tdmld/fastmux/1.0.0`. Others fall back to Yamux.

Wire: frames of a 9-byte header (type u8, stream u32, value u32, big endian); DATA is followed by
`value` bytes, at most `FRAME_BYTES`. The dialler opens odd stream numbers, the listener even ones.

    DATA n     n bytes of the stream          FIN      the sender will write no more
    OPEN       the stream begins              RST      the sender forgot the stream
    CREDIT n   n more bytes may be sent       PING n / PONG n   liveness and round trip

Flow control: a stream starts with `WINDOW_BYTES` of credit; what the application has taken is
granted again, and a reader that awaits a large message may widen its window to `WINDOW_MAX_BYTES`
(`expect`), so that a peer can never park more than it was granted. A peer that overruns breaks the
connection.

Cancellation: a frame is written whole or not at all (the secure session shields its writes).
Waiting for credit can be cancelled. Control frames never wait in a caller: they are queued, sent
with the next data or by the flusher, and so a reset costs nothing and cannot block. Small messages
of other streams pass between frames.
"""

import struct
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from typing import Protocol, cast

import trio
from libp2p.abc import IMuxedConn, IMuxedStream, ISecureConn
from libp2p.connection_types import ConnectionType
from libp2p.custom_types import TProtocol
from libp2p.io.exceptions import IOException
from libp2p.network.connection.exceptions import RawConnError
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import (
    MuxedConnUnavailable,
    MuxedStreamClosed,
    MuxedStreamEOF,
    MuxedStreamReset,
)
from multiaddr import Multiaddr

from tdmld.p2p.shield import shielded

PROTOCOL = TProtocol("/tdmld/fastmux/1.0.0")

FRAME_BYTES = 512 * 1024
"""Large enough to amortize a system call and a lock, small enough that others wait under a
millisecond."""
WINDOW_BYTES = 1024 * 1024
WINDOW_MAX_BYTES = 8 * 1024 * 1024
INBOUND_STREAMS = 256
"""Streams a peer may have open towards us; the host's own limit is lower."""
_CONTROL_FRAMES = 4096
"""Control frames waiting because the peer does not read: more means it never will."""
_SMALL_BYTES = 16 * 1024
"""Below this a frame is joined with its header: one TLS record instead of several."""
_DIE_SECONDS = 2.0
_CLOSE_SECONDS = 0.2
"""Time for the last FIN frames when a connection is closed in good order."""

_HEADER = struct.Struct("!BII")
_DATA, _OPEN, _CREDIT, _FIN, _RST, _PING, _PONG = range(7)

_BROKEN = (IOException, RawConnError, trio.ClosedResourceError)
"""How a secure session fails."""

Buffer = bytes | memoryview


class _GatheringSession(Protocol):
    async def write_parts(self, parts: Sequence[Buffer]) -> None: ...


class FastMuxStream(IMuxedStream):
    """One stream. One reader at a time; writers are serialized, a write is contiguous."""

    def __init__(self, conn: "FastMux", number: int) -> None:
        self.muxed_conn: IMuxedConn = conn
        self._mux = conn
        self._number = number
        self._chunks: deque[bytes] = deque()
        self._head = 0
        """How much of the first chunk has been taken already."""
        self._granted = WINDOW_BYTES
        """What the peer may still send."""
        self._window = WINDOW_BYTES
        self._taken = 0
        """Taken by the application, not yet granted again."""
        self._credit = WINDOW_BYTES
        self._readable = trio.Event()
        self._writable = trio.Event()
        self._write_lock = trio.Lock()
        self._ended = False
        """The peer said FIN."""
        self._closed = False
        """We said FIN."""
        self._deaf = False
        """The application will read no more."""
        self._reset = False

    # Reading

    async def read(self, n: int | None = None) -> bytes:
        """Up to `n` bytes; MuxedStreamEOF at the peer's FIN, MuxedStreamReset when broken."""
        return b"".join(await self.read_chunks(WINDOW_BYTES if n is None or n < 0 else n))

    async def read_chunks(self, limit: int) -> list[bytes]:
        """At least one byte and at most `limit`, as the chunks in which they came (no copy)."""
        if limit == 0:
            return []
        while not self._chunks:
            if self._ended:
                raise MuxedStreamEOF("the peer closed the stream")
            if self._reset or self._deaf:
                raise MuxedStreamReset("the stream was reset")
            self._readable = trio.Event()
            await self._readable.wait()
        taken: list[bytes] = []
        size = 0
        while self._chunks and size < limit:
            chunk = self._chunks[0]
            end = min(len(chunk), self._head + limit - size)
            taken.append(chunk if end - self._head == len(chunk) else chunk[self._head : end])
            size += end - self._head
            self._head = end
            if end == len(chunk):
                self._chunks.popleft()
                self._head = 0
        self._taken += size
        if self._taken >= self._window // 4 and not self._ended and not self._reset:
            self._grant(self._taken)
            self._taken = 0
        return taken

    def expect(self, size: int) -> None:
        """The application has agreed to take `size` bytes: let the peer send far ahead."""
        window = min(size, WINDOW_MAX_BYTES)
        if window > self._window and not self._ended and not self._reset:
            self._grant(window - self._window)
            self._window = window

    def _grant(self, size: int) -> None:
        self._granted += size
        self._mux.queue_control(_CREDIT, self._number, size)

    # Writing

    async def write(self, data: bytes) -> None:
        await self.write_parts((data,))

    async def write_parts(self, parts: Iterable[Buffer]) -> None:
        """Write the parts one after another without joining large ones.

        Cancelled before the last frame, it has sent a prefix: reset the stream then.
        """
        views = [memoryview(part).cast("B") for part in parts]
        left = sum(len(view) for view in views)
        views.reverse()
        async with self._write_lock:
            while left:
                while self._credit <= 0 and not (self._reset or self._closed):
                    self._writable = trio.Event()
                    await self._writable.wait()
                if self._reset:
                    raise MuxedStreamReset("the stream was reset")
                if self._closed:
                    raise MuxedStreamClosed("the stream is closed for writing")
                size = min(left, self._credit, FRAME_BYTES)
                self._credit -= size
                left -= size
                await self._mux.send_data(self._number, size, _take(views, size))

    async def close(self) -> None:
        """Say FIN and read no more; a peer that goes on sending gets a reset. Never blocks."""
        if not self._reset:
            self._deaf = True
            self._discard()
            self._readable.set()
            await self.close_write()

    async def close_write(self) -> None:
        """Say FIN but go on reading. Never blocks."""
        if self._closed or self._reset:
            return
        self._closed = True
        self._writable.set()
        self._mux.queue_control(_FIN, self._number, 0)
        if self._ended:
            self._mux.forget(self._number)

    async def reset(self) -> None:
        """Drop the stream in both directions. Never blocks."""
        if not self._reset:
            self._break()
            self._discard()
            self._mux.queue_control(_RST, self._number, 0)
            self._mux.forget(self._number)

    def set_deadline(self, ttl: int) -> None:
        """Not supported: use a cancel scope."""

    def get_remote_address(self) -> tuple[str, int] | None:
        return self._mux.get_remote_address()

    async def __aenter__(self) -> "FastMuxStream":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # Called by the connection

    def _wake(self) -> None:
        self._readable.set()
        self._writable.set()

    def _discard(self) -> None:
        self._chunks.clear()
        self._head = 0

    def _break(self) -> None:
        self._reset = True
        self._wake()

    def on_announced(self, size: int) -> bool:
        """A DATA frame of `size` bytes begins; False when the peer was not granted that much."""
        self._granted -= size
        return self._granted >= 0 and not self._ended

    @property
    def is_deaf(self) -> bool:
        return self._deaf

    def on_data(self, chunk: bytes) -> None:
        if not (self._reset or self._deaf):
            self._chunks.append(chunk)
            self._readable.set()

    def on_credit(self, size: int) -> None:
        self._credit += size
        self._writable.set()

    def on_fin(self) -> None:
        self._ended = True
        self._readable.set()
        if self._closed:
            self._mux.forget(self._number)

    def on_break(self) -> None:
        """RST or the connection's end. Data before a FIN stay readable, others are worthless."""
        if not self._ended:
            self._discard()
        self._break()


def _take(views: list[memoryview], size: int) -> list[memoryview]:
    """Split `size` bytes off the end of a reversed list of views."""
    taken: list[memoryview] = []
    while size:
        view = views.pop()
        if len(view) > size:
            views.append(view[size:])
            view = view[:size]
        size -= len(view)
        taken.append(view)
    return taken


class FastMux(IMuxedConn):
    """One multiplexed connection. `start` runs it; the swarm does that in a task of its own."""

    on_close: Callable[[], Awaitable[None]] | None
    """Set by the swarm; awaited once when the connection ends for any reason."""

    def __init__(
        self, conn: ISecureConn, peer_id: ID, *, inbound_streams: int = INBOUND_STREAMS
    ) -> None:
        self.peer_id = peer_id
        self.on_close = None
        self.event_started = trio.Event()
        self._session = conn
        self._gather: _GatheringSession | None = (
            cast(_GatheringSession, conn) if hasattr(conn, "write_parts") else None
        )
        self._streams: dict[int, FastMuxStream] = {}
        self._next = 1 if conn.is_initiator else 2
        self._inbound_limit = inbound_streams
        self._inbound_open = 0
        self._highest_inbound = 0
        self._accepted_send, self._accepted = trio.open_memory_channel[FastMuxStream](
            inbound_streams
        )
        self._write_lock = trio.Lock()
        self._control: list[bytes] = []
        self._control_added = trio.Event()
        self._dead = False
        self._pings: dict[int, trio.Event] = {}
        self._next_ping = 0
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
        self.queue_control(_OPEN, number, 0)
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
            self.queue_control(_PING, 0, number)
            await answered.wait()
        finally:
            self._pings.pop(number, None)
        if self._dead:
            raise MuxedConnUnavailable("the connection is closed")
        return trio.current_time() - started

    async def close(self) -> None:
        """Send what control frames wait, then close. Takes at most `_CLOSE_SECONDS`."""
        if not self._dead and self.event_started.is_set() and self._control:
            with shielded(_CLOSE_SECONDS), suppress(*_BROKEN):
                async with self._write_lock:
                    await self._write(())
        await self._die()

    def get_remote_address(self) -> tuple[str, int] | None:
        return self._session.get_remote_address()

    def get_transport_addresses(self) -> list[Multiaddr]:
        return self._session.get_transport_addresses()

    def get_connection_type(self) -> ConnectionType:
        return self._session.get_connection_type()

    # Sending

    async def send_data(self, number: int, size: int, views: Sequence[memoryview]) -> None:
        """One DATA frame, whole, whatever happens to the caller; MuxedStreamReset when dead."""
        header = _HEADER.pack(_DATA, number, size)
        parts: Sequence[Buffer] = (
            (b"".join((header, *views)),) if size <= _SMALL_BYTES else (header, *views)
        )
        with trio.CancelScope(shield=True):
            async with self._write_lock:
                if self._dead:
                    raise MuxedStreamReset("the connection is closed")
                try:
                    await self._write(parts)
                except _BROKEN as error:
                    await self._die()
                    raise MuxedStreamReset(f"the connection broke: {error}") from error

    def queue_control(self, kind: int, number: int, value: int) -> None:
        """Send a control frame as soon as possible without waiting for it."""
        if self._dead:
            return
        self._control.append(_HEADER.pack(kind, number, value))
        self._control_added.set()

    async def _write(self, parts: Sequence[Buffer]) -> None:
        """With the lock held: what control frames wait, then `parts`."""
        control, self._control = self._control, []
        if control:
            parts = (b"".join(control), *parts)
        if not parts:
            return
        if self._gather is not None:
            await self._gather.write_parts(parts)
        else:
            await self._session.write(b"".join(parts))

    async def _flush_control(self) -> None:
        while not self._dead:
            await self._control_added.wait()
            self._control_added = trio.Event()
            try:
                async with self._write_lock:
                    await self._write(())
            except _BROKEN:
                await self._session.close()  # the reader notices and ends the connection
                return

    # Receiving

    async def _read_frames(self) -> None:
        try:
            while len(self._control) <= _CONTROL_FRAMES:
                kind, number, value = _HEADER.unpack(await self._exactly(_HEADER.size))
                self.last_received = trio.current_time()
                if kind == _DATA:
                    await self._on_data(number, value)
                elif not self._on_control(kind, number, value):
                    return
        except (*_BROKEN, EOFError):
            return  # the usual end of a connection; `_die` tells everybody

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
            raise EOFError("the peer broke flow control")
        if stream is None:
            self.queue_control(_RST, number, 0)
        elif stream.is_deaf:
            await stream.reset()
        while size:
            chunk = await self._session.read(size)
            if not chunk:
                raise EOFError
            size -= len(chunk)
            if stream is not None:
                stream.on_data(chunk)

    def _on_control(self, kind: int, number: int, value: int) -> bool:
        """False when the peer breaks the protocol."""
        if kind == _OPEN:
            return self._on_open(number)
        if kind == _PING:
            self.queue_control(_PONG, 0, value)
        elif kind == _PONG:
            if (answered := self._pings.get(value)) is not None:
                answered.set()
        elif kind in (_CREDIT, _FIN, _RST):
            stream = self._streams.get(number)
            if stream is None:
                return True
            if kind == _CREDIT:
                stream.on_credit(value)
            elif kind == _FIN:
                stream.on_fin()
            else:
                stream.on_break()
                self.forget(number)
        else:
            return False
        return True

    def _on_open(self, number: int) -> bool:
        if number % 2 == self._next % 2 or number <= self._highest_inbound:
            return False
        self._highest_inbound = number
        if self._inbound_open >= self._inbound_limit:
            self.queue_control(_RST, number, 0)
            return True
        stream = FastMuxStream(self, number)
        try:
            self._accepted_send.send_nowait(stream)
        except (trio.WouldBlock, trio.BrokenResourceError):
            self.queue_control(_RST, number, 0)
            return True
        self._streams[number] = stream
        self._inbound_open += 1
        return True

    # Ending

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
            stream.on_break()
        self._streams.clear()
        for answered in self._pings.values():
            answered.set()
        self._control.clear()
        self._control_added.set()
        with suppress(*_BROKEN):
            await self._session.close()
        if self.on_close is not None:
            await self.on_close()
