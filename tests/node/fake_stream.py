"""Two ends of an in-memory message stream that behaves like `tdmld.p2p.Stream`."""

from collections.abc import Callable
from types import TracebackType

import trio

from tdmld.p2p.errors import MessageTooLarge, StreamBroken, StreamClosed


class FakeStream:
    def __init__(
        self,
        peer_id: str,
        out: "trio.MemorySendChannel[bytes]",
        into: "trio.MemoryReceiveChannel[bytes]",
    ) -> None:
        self.peer_id = peer_id
        self.sent = 0
        self.blamed: list[str] = []
        self.break_after: int | None = None
        self._out, self._into = out, into

    async def send(self, *parts: bytes | memoryview) -> None:
        if self.break_after is not None and self.sent >= self.break_after:
            await self.reset()
        try:
            await self._out.send(b"".join(bytes(part) for part in parts))
        except (trio.ClosedResourceError, trio.BrokenResourceError):
            raise StreamBroken("fake stream broke") from None
        self.sent += 1

    def blame(self, why: str) -> None:
        self.blamed.append(why)

    async def receive(self, limit: int) -> bytes:
        try:
            message = await self._into.receive()
        except trio.EndOfChannel:
            raise StreamClosed("fake stream closed") from None
        except trio.ClosedResourceError:
            raise StreamBroken("fake stream broke") from None
        if len(message) > limit:
            await self.reset()
            raise MessageTooLarge(f"{len(message)} > {limit}")
        return message

    async def close(self) -> None:
        self._out.close()

    async def reset(self) -> None:
        self._out.close()
        self._into.close()

    async def __aenter__(self) -> "FakeStream":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await (self.close() if error is None else self.reset())


def stream_pair(a: str, b: str) -> tuple[FakeStream, FakeStream]:
    """(a's end, whose peer is b; b's end, whose peer is a)."""
    a_out, b_in = trio.open_memory_channel[bytes](8)
    b_out, a_in = trio.open_memory_channel[bytes](8)
    return FakeStream(b, a_out, a_in), FakeStream(a, b_out, b_in)


class FakeHost:
    """Opens streams to handlers in the same program."""

    def __init__(self, peer_id: str) -> None:
        self.peer_id = peer_id
        self.routes: dict[str, Callable[[FakeStream], object]] = {}
        self.nursery: trio.Nursery | None = None
        self.opened: list[FakeStream] = []

    async def open_stream(self, peer_id: str, protocol: str) -> FakeStream:
        mine, theirs = stream_pair(self.peer_id, peer_id)
        self.opened.append(mine)
        assert self.nursery is not None
        self.nursery.start_soon(self._serve, self.routes[peer_id], theirs)
        return mine

    async def _serve(self, handler: Callable[[FakeStream], object], stream: FakeStream) -> None:
        # What the adapter promises: an exception of a handler resets its stream only.
        try:
            async with stream:
                await handler(stream)  # type: ignore[misc]
        except Exception:
            await stream.reset()
