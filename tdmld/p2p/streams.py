"""A stream of messages: u32 big-endian length, then the body.

One `Stream` may be used by one receiving task and any number of sending tasks at the same time.
"""

import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

import trio
from libp2p.abc import INetStream
from libp2p.io.exceptions import IOException
from libp2p.network.stream.exceptions import StreamClosed as LibClosed
from libp2p.network.stream.exceptions import StreamEOF
from libp2p.stream_muxer.exceptions import MuxedStreamEOF, MuxedStreamError

from tdmld.p2p.accounting import Account, Offence
from tdmld.p2p.errors import MessageTooLarge, StreamBroken, StreamClosed
from tdmld.p2p.muxstream import FastMuxStream
from tdmld.p2p.shield import acquire, shielded

_LENGTH = struct.Struct("!I")
_FOREIGN_READ_BYTES = 64 * 1024
_FOREIGN_WRITE_BYTES = 1024 * 1024
"""Pieces for a foreign muxer, which takes only `bytes` and copies them several times."""
_CLOSE_SECONDS = 1.0
_BROKEN = (IOException, MuxedStreamError, trio.ClosedResourceError, trio.BrokenResourceError)

Part = bytes | bytearray | memoryview
_Ending = Callable[[], Awaitable[None]]


class Stream:
    """A two-way stream of messages with an authenticated peer; made by `Host`, not directly.

    `send` and `receive` raise StreamClosed after a clean end and StreamBroken otherwise.
    """

    def __init__(
        self, inner: INetStream, peer_id: str, protocol: str, account: Account, most: int
    ) -> None:
        self.peer_id = peer_id
        """Whom we speak to; proved by the secure channel."""
        self.protocol = protocol
        self._inner = inner
        muxed = getattr(inner, "muxed_stream", None)
        self._fast = muxed if isinstance(muxed, FastMuxStream) else None
        self._account = account
        self._most = most
        self._send_lock = trio.Lock()
        self._receiving = False
        self._finished: StreamClosed | StreamBroken | MessageTooLarge | None = None
        # The message being received; kept so that a cancelled `receive` can be repeated. On a fast
        # stream it is kept there.
        self._chunks: list[bytes] = []
        self._size = 0
        self._expected: int | None = None

    def __repr__(self) -> str:
        return f"Stream({self.protocol} with {self.peer_id})"

    async def send(self, *parts: Part) -> None:
        """Send one message made of the parts; they are not joined, and may be reused on return.

        Blocks while the peer does not take the data. Cancelled while other tasks send: nothing was
        sent. Cancelled later: the stream is reset, so that the peer never takes half a message for
        one. Delivery is not acknowledged: that is the protocol's business.
        """
        size = sum(memoryview(part).nbytes for part in parts)
        if size > self._most:
            raise ValueError(f"a message has at most {self._most} bytes, not {size}")
        await acquire(self._send_lock)
        try:
            self._raise_if_finished()
            complete = False
            try:
                await self._write((_LENGTH.pack(size), *parts))
                complete = True
            except _BROKEN as error:
                raise self._end(_after_failure(error)) from error
            finally:
                if not complete:
                    await self._reset_shielded()
        finally:
            self._send_lock.release()
        self._account.messages_out += 1

    async def receive(self, limit: int) -> bytes:
        """The next message, of at most `limit` bytes.

        A larger one is refused before its body is read: MessageTooLarge, and the stream is reset.
        Cancelled, it loses nothing: the next call continues. StreamClosed when the peer closed
        between two messages.
        """
        if self._receiving:
            raise RuntimeError("two tasks receive from one stream")
        self._raise_if_finished()
        self._receiving = True
        try:
            # Fast data need not block anywhere: give other tasks their turn.
            await trio.lowlevel.checkpoint()
            if self._expected is None:
                self._expected = await self._receive_length(min(limit, self._most))
            body = await self._exactly(self._expected)
            self._expected = None
        except _BROKEN as error:
            failure = self._end(self._failure(error))
            if isinstance(failure, StreamBroken):
                await self._reset_shielded()
            raise failure from error
        finally:
            self._receiving = False
        self._account.messages_in += 1
        return body

    def blame(self, why: str, offence: Offence = Offence.MALFORMED) -> None:
        """The peer did on this stream what no honest one does: see `accounting`."""
        self._account.accuse(offence, f"{why} ({self.protocol})")

    async def close(self) -> None:
        """End the stream in good order. What was sent still arrives. Idempotent, takes at most 1
        s."""
        if self._finished is None:
            self._end(StreamClosed("the stream was closed here"))
            await self._quietly(self._inner.close)
        elif isinstance(self._finished, StreamClosed):
            await self._quietly(self._inner.close)

    async def reset(self) -> None:
        """Drop the stream: the peer gets StreamBroken. Idempotent."""
        if self._finished is None:
            self._end(StreamBroken("the stream was reset here"))
        await self._reset_shielded()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close after success, reset after an error."""
        if error is None:
            await self.close()
        else:
            await self.reset()

    async def _write(self, parts: tuple[Part, ...]) -> None:
        if self._fast is not None:
            await self._fast.write_parts(memoryview(part) for part in parts)
            return
        joined = bytearray()
        for part in parts:
            view = memoryview(part).cast("B")
            for start in range(0, len(view), _FOREIGN_WRITE_BYTES):
                joined += view[start : start + _FOREIGN_WRITE_BYTES]
                if len(joined) >= _FOREIGN_WRITE_BYTES:
                    await self._inner.write(bytes(joined))
                    joined.clear()
        if joined:
            await self._inner.write(bytes(joined))

    async def _receive_length(self, limit: int) -> int:
        (size,) = _LENGTH.unpack(await self._exactly(_LENGTH.size))
        if size > limit:
            refusal = MessageTooLarge(
                f"{self.peer_id} announced {size} bytes on {self.protocol}; "
                f"{limit} are allowed here"
            )
            self._finished = refusal
            self._account.accuse(Offence.OVERSIZE, str(refusal))
            await self._reset_shielded()
            raise refusal
        if self._fast is not None and size > 0:
            self._fast.expect(size)
        return int(size)

    async def _exactly(self, size: int) -> bytes:
        if self._fast is not None:
            return await self._fast.take(size)
        while self._size < size:
            chunk = await self._inner.read(min(size - self._size, _FOREIGN_READ_BYTES))
            if not chunk:
                raise MuxedStreamEOF
            self._chunks.append(chunk)
            self._size += len(chunk)
        chunks, self._chunks, self._size = self._chunks, [], 0
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    @property
    def _in_a_message(self) -> bool:
        """Whether a part of a message, or of its length, was received."""
        begun = self._size > 0 if self._fast is None else self._fast.partial
        return begun or self._expected is not None

    def _failure(self, error: BaseException) -> StreamClosed | StreamBroken:
        if isinstance(error, (StreamEOF, MuxedStreamEOF)):
            if self._in_a_message:
                return StreamBroken(f"{self.peer_id} closed {self.protocol} in mid-message")
            return StreamClosed(f"{self.peer_id} closed {self.protocol}")
        return _after_failure(error)

    def _end(self, failure: StreamClosed | StreamBroken) -> StreamClosed | StreamBroken:
        """Remember the first reason and return it: later failures are its consequences."""
        if self._finished is None or isinstance(self._finished, MessageTooLarge):
            self._finished = failure
        return self._finished

    def _raise_if_finished(self) -> None:
        if self._finished is not None:
            raise type(self._finished)(str(self._finished))

    async def _reset_shielded(self) -> None:
        if self._finished is None:
            self._finished = StreamBroken("the stream was reset here in the middle of a message")
        await self._quietly(self._inner.reset)

    async def _quietly(self, ending: _Ending) -> None:
        """End the stream even while cancelled; a foreign muxer may block, so not for long."""
        with shielded(_CLOSE_SECONDS), suppress(*_BROKEN):
            await ending()


def _after_failure(error: BaseException) -> StreamClosed | StreamBroken:
    if isinstance(error, LibClosed):
        return StreamClosed("the stream is closed for writing")
    return StreamBroken(f"the stream broke: {error or type(error).__name__}")
