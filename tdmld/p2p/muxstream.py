"""One stream of the light muxer; see `fastmux` for the wire and the rules of flow control."""

import io
import struct
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING

import trio
from libp2p.abc import IMuxedConn, IMuxedStream
from libp2p.stream_muxer.exceptions import MuxedStreamClosed, MuxedStreamEOF, MuxedStreamReset

from tdmld.p2p.memory import CHUNK_BYTES
from tdmld.p2p.shield import acquire

if TYPE_CHECKING:
    from tdmld.p2p.fastmux import FastMux

FRAME_BYTES = 512 * 1024
"""A peer may send no larger ones; ours are smaller (`turns`)."""
SMALL_BYTES = 16 * 1024
"""A message up to here overtakes bulk: it costs those who wait less than they would notice."""
WINDOW_BYTES = 1024 * 1024
WINDOW_MAX_BYTES = 8 * 1024 * 1024
"""1.3 Gbit/s at 50 ms, and what one stream may park here at most."""
_FEW_TRIPS = 4

HEADER = struct.Struct("!BII")
DATA, OPEN, CREDIT, FIN, RST, PING, PONG = range(7)

Buffer = bytes | memoryview


class Body:
    """A message that is being received: what arrives is decrypted into its final place."""

    __slots__ = ("_file", "_filled", "_view")

    def __init__(self, size: int) -> None:
        # Zeroed pages cost nothing before they are touched, and a BytesIO gives its bytes away
        # without a copy when nobody else holds them.
        self._file = io.BytesIO(bytes(size))
        self._view = self._file.getbuffer()
        self._filled = 0

    @property
    def filled(self) -> int:
        return self._filled

    @property
    def missing(self) -> int:
        return len(self._view) - self._filled

    def room(self, most: int) -> memoryview:
        """Where at most `most` of the missing bytes go; then say `add`."""
        return self._view[self._filled : self._filled + most]

    def add(self, size: int) -> None:
        self._filled += size

    def append(self, data: Buffer) -> None:
        self.room(len(data))[:] = data
        self._filled += len(data)

    def finish(self) -> bytes:
        self._view.release()
        return self._file.getvalue()


class FastMuxStream(IMuxedStream):
    """One stream. One reader at a time; writers are serialized, a write is contiguous."""

    def __init__(self, conn: "FastMux", number: int) -> None:
        self.muxed_conn: IMuxedConn = conn
        self._mux = conn
        self._number = number
        self._chunks: deque[bytes] = deque()
        self._head = 0
        """How much of the first chunk has been taken already."""
        self._body: Body | None = None
        """Where the next bytes go, when a reader waits for a certain count of them."""
        self.held = 0
        """Bytes of the chunks, with what each costs besides."""
        self._granted = WINDOW_BYTES
        """What the peer may still send."""
        self._window = WINDOW_BYTES
        self._taken = 0
        """Taken by the application, not yet granted again."""
        self._window_began = trio.current_time()
        self._window_taken = 0
        """Granted again since then."""
        self._credit = WINDOW_BYTES
        self._readable = trio.Event()
        self._writable = trio.Event()
        self._write_lock = trio.Lock()
        self._ended = False
        """The peer said FIN."""
        self._closed = False
        """We said FIN, or will when the frame that is being written is out."""
        self._in_frame = False
        self._deaf = False
        """The application will read no more."""
        self._reset = False

    # Reading

    async def read(self, n: int | None = None) -> bytes:
        """Up to `n` bytes; MuxedStreamEOF at the peer's FIN, MuxedStreamReset when broken."""
        if n == 0:
            return b""
        while not self._chunks:
            await self._more()
        return b"".join(self._pull(WINDOW_BYTES if n is None or n < 0 else n))

    async def take(self, size: int) -> bytes:
        """Exactly `size` bytes. Cancelled, it loses nothing, but must be repeated with this size
        before anything else is read. Errors as `read`; see `partial`."""
        if self._body is None:
            self._body = Body(size)
            for chunk in self._pull(size):
                self._body.append(chunk)
        while self._body is not None and self._body.missing:
            await self._more()
        if self._body is None:
            raise MuxedStreamReset("the stream was reset")
        body, self._body = self._body, None
        return body.finish()

    @property
    def partial(self) -> bool:
        """Whether a part of what `take` waits for has come."""
        return self._body is not None and self._body.filled > 0

    async def _more(self) -> None:
        if self._ended:
            raise MuxedStreamEOF("the peer closed the stream")
        if self._reset or self._deaf:
            raise MuxedStreamReset("the stream was reset")
        self._readable = trio.Event()
        await self._readable.wait()

    def _pull(self, limit: int) -> list[bytes]:
        """At most `limit` of the bytes that are here, as the chunks in which they came."""
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
                self._hold(-len(chunk) - CHUNK_BYTES)
        self._on_taken(size)
        return taken

    def _on_taken(self, size: int) -> None:
        """The application has so much more; grant it again, not byte by byte."""
        self._taken += size
        if (
            self._taken >= self._window // 4
            and not (self._ended or self._reset)
            and (not self._chunks or not self._mux.memory.is_scarce)
        ):
            self._grant(self._taken)
            self._window_taken += self._taken
            self._taken = 0
            self._widen_if_too_small()

    def _widen_if_too_small(self) -> None:
        """A window that is used up in a few round trips limits the line: double it."""
        if self._window_taken >= self._window:
            now = trio.current_time()
            if now - self._window_began < _FEW_TRIPS * self._mux.round_trip:
                self.expect(2 * self._window)
            self._window_began, self._window_taken = now, 0

    def _hold(self, size: int) -> None:
        if size:
            self.held += size
            self._mux.hold(self, size)

    def expect(self, size: int) -> None:
        """The application has agreed to take `size` bytes: let the peer send far ahead."""
        window = min(size, WINDOW_MAX_BYTES)
        if self._mux.memory.is_scarce:
            return
        if window > self._window and not self._ended and not self._reset:
            self._grant(window - self._window)
            self._window = window

    def _grant(self, size: int) -> None:
        self._granted += size
        self._mux.queue_control(CREDIT, self._number, size)

    # Writing

    async def write(self, data: bytes) -> None:
        await self.write_parts((data,))

    async def write_parts(
        self, parts: Iterable[Buffer], *, urgent_bytes: int = SMALL_BYTES
    ) -> None:
        """Write the parts one after another without joining large ones.

        A write of at most `urgent_bytes` overtakes bulk of other streams. Cancelled before the last
        frame, it has sent a prefix: reset the stream then.
        """
        views = [memoryview(part).cast("B") for part in parts]
        left = sum(len(view) for view in views)
        urgent = left <= urgent_bytes
        views.reverse()
        await acquire(self._write_lock)
        try:
            while left:
                await trio.lowlevel.checkpoint_if_cancelled()
                while self._credit <= 0 and not (self._reset or self._closed):
                    self._writable = trio.Event()
                    await self._writable.wait()
                if self._closed and not self._reset:
                    raise MuxedStreamClosed("the stream is closed for writing")
                self._in_frame = True
                try:
                    left -= await self._write_frame(views, left, urgent=urgent)
                finally:
                    self._in_frame = False
                    self._say_fin()
        finally:
            self._write_lock.release()

    async def _write_frame(self, views: list[memoryview], most: int, *, urgent: bool) -> int:
        """When it is our turn, as much as fits into a frame; gives its size."""
        await self._mux.turns.take(urgent=urgent)
        try:
            if self._reset:
                raise MuxedStreamReset("the stream was reset")
            size = min(most, self._credit, self._mux.frame_bytes)
            self._credit -= size
            await self._mux.send_data(self._number, size, _split(views, size))
            return size
        finally:
            self._mux.turns.release()

    async def close(self) -> None:
        """Say FIN and read no more; a peer that goes on sending gets a reset. Never blocks."""
        self._discard()
        if not self._reset:
            self._deaf = True
            self._readable.set()
            await self.close_write()

    async def close_write(self) -> None:
        """Say FIN but go on reading. Never blocks."""
        if self._closed or self._reset:
            return
        self._closed = True
        self._writable.set()
        self._say_fin()

    def _say_fin(self) -> None:
        """If it is due; not during a frame, or it would overtake the data."""
        if not self._closed or self._reset or self._in_frame:
            return
        self._mux.queue_control(FIN, self._number, 0)
        if self._ended:
            self._mux.forget(self._number)

    async def reset(self) -> None:
        """Drop the stream in both directions. Never blocks."""
        self.drop()

    def drop(self) -> None:
        """`reset` for callers that are no tasks."""
        self._discard()
        if not self._reset:
            self._break()
            self._mux.queue_control(RST, self._number, 0)
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
        self._body = None
        self._chunks.clear()
        self._head = 0
        self._hold(-self.held)

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

    def room(self, most: int) -> memoryview | None:
        """Where the next bytes go, at most `most`, when a reader waits for them; then say
        `on_filled`. None: give them to `on_data`."""
        return self._body.room(most) if self._body is not None and self._body.missing else None

    def on_filled(self, size: int) -> None:
        """So many bytes were put into `room`; the stream may have been reset meanwhile."""
        if self._body is not None:
            self._body.add(size)
            self._on_taken(size)
            if not self._body.missing:
                self._readable.set()

    def on_data(self, chunk: bytes) -> None:
        if self._reset or self._deaf:
            return
        room = self.room(len(chunk))
        if room is not None:
            room[:] = chunk[: len(room)]
            self.on_filled(len(room))
            chunk = chunk[len(room) :]
        if chunk:
            self._chunks.append(chunk)
            self._readable.set()
            self._hold(len(chunk) + CHUNK_BYTES)

    def on_credit(self, size: int) -> None:
        self._credit += size
        self._writable.set()

    def on_fin(self) -> None:
        self._ended = True
        self._readable.set()
        if self._closed:
            self._mux.forget(self._number)

    def on_reset(self) -> None:
        """RST: what came before it can still be read, then the reader learns of it."""
        self._break()

    def on_lost(self) -> None:
        """The connection's end. Data before a FIN stay readable; of others nobody may know."""
        if not self._ended:
            self._discard()
        self._break()


def _split(views: list[memoryview], size: int) -> list[memoryview]:
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
