"""The muxer's own rules, against a peer that speaks the frames by hand over a plain pipe."""

import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest
import trio
import trio.testing
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import MuxedStreamEOF, MuxedStreamReset

from tdmld.chain.crypto import KeyPair
from tdmld.p2p.fastmux import FastMux
from tdmld.p2p.keepalive import is_alive
from tdmld.p2p.muxstream import FRAME_BYTES, WINDOW_BYTES, WINDOW_MAX_BYTES
from tests.p2p.support import seed

DATA, OPEN, CREDIT, FIN, RST, PING, PONG = range(7)
PEER = ID.from_base58(KeyPair(seed(1)).address)


class Pipe:
    """A secure session without security, for one side."""

    is_initiator = False

    def __init__(self, stream: trio.StapledStream) -> None:
        self._stream = stream

    async def read(self, n: int) -> bytes:
        return bytes(await self._stream.receive_some(n))

    async def write(self, data: bytes) -> None:
        await self._stream.send_all(data)

    async def close(self) -> None:
        await self._stream.aclose()


class ByHand:
    """The peer: sends and receives single frames; it is the dialler, so its streams are odd."""

    def __init__(self, stream: trio.StapledStream) -> None:
        self._stream = stream

    async def send(self, kind: int, number: int, value: int = 0, payload: bytes = b"") -> None:
        await self._stream.send_all(struct.pack("!BII", kind, number, value) + payload)

    async def data(self, number: int, payload: bytes) -> None:
        await self.send(DATA, number, len(payload), payload)

    async def receive(self) -> tuple[int, int, int, bytes]:
        with trio.fail_after(2):
            kind, number, value = struct.unpack("!BII", await self._exactly(9))
            return kind, number, value, await self._exactly(value if kind == DATA else 0)

    async def _exactly(self, size: int) -> bytes:
        received = b""
        while len(received) < size:
            more = await self._stream.receive_some(size - len(received))
            if not more:
                raise EOFError
            received += more
        return received


@asynccontextmanager
async def muxer(**options: int) -> AsyncIterator[tuple[FastMux, ByHand]]:
    ours, theirs = trio.testing.memory_stream_pair()
    mux = FastMux(Pipe(ours), PEER, **options)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(mux.start)
        await mux.event_started.wait()
        yield mux, ByHand(theirs)
        await mux.close()


async def ended(mux: FastMux) -> bool:
    await trio.testing.wait_all_tasks_blocked()
    return mux.is_closed


async def test_a_stream_is_opened_used_and_closed():
    async with muxer() as (mux, peer):
        await peer.send(OPEN, 1)
        await peer.data(1, b"question")
        stream = await mux.accept_stream()
        assert await stream.read(100) == b"question"
        await stream.write(b"answer")
        await stream.close()
        assert await peer.receive() == (DATA, 1, 6, b"answer")
        assert await peer.receive() == (FIN, 1, 0, b"")
        await peer.send(FIN, 1)
        await trio.testing.wait_all_tasks_blocked()
        assert not mux._streams


async def test_reads_take_what_is_there_and_no_more_than_asked():
    async with muxer() as (mux, peer):
        await peer.send(OPEN, 1)
        await peer.data(1, b"abcdef")
        await peer.data(1, b"gh")
        await peer.send(FIN, 1)
        stream = await mux.accept_stream()
        await trio.testing.wait_all_tasks_blocked()
        assert [await stream.read(4), await stream.read(3), await stream.read(9)] == [
            b"abcd",
            b"efg",
            b"h",
        ]
        with pytest.raises(MuxedStreamEOF):
            await stream.read(1)


async def test_a_writer_sends_its_window_and_then_waits_for_credit():
    async with muxer() as (mux, peer):
        stream = await mux.open_stream()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.write, bytes(WINDOW_BYTES + 10))
            assert (await peer.receive())[:2] == (OPEN, 2)
            sent = 0
            while sent < WINDOW_BYTES:
                kind, _, size, _ = await peer.receive()
                assert kind == DATA
                assert size <= FRAME_BYTES
                sent += size
            assert sent == WINDOW_BYTES
            await trio.testing.wait_all_tasks_blocked()
            assert nursery.child_tasks
            await peer.send(CREDIT, 2, 10)
            assert (await peer.receive())[2] == 10


@pytest.mark.parametrize("ending", ["close", "close_write"])
async def test_the_end_does_not_overtake_data_that_are_being_written(ending: str):
    async with muxer() as (mux, peer):
        stream = await mux.open_stream()
        assert (await peer.receive())[:2] == (OPEN, 2)
        async with trio.open_nursery() as nursery:
            await mux.turns.take(urgent=True)  # the line is busy
            nursery.start_soon(stream.write, b"last words")
            await trio.testing.wait_all_tasks_blocked()
            await getattr(stream, ending)()
            await trio.testing.wait_all_tasks_blocked()
            mux.turns.release()
            assert await peer.receive() == (DATA, 2, 10, b"last words")
            assert await peer.receive() == (FIN, 2, 0, b"")


async def test_a_peer_that_overruns_its_window_loses_the_connection():
    async with muxer() as (mux, peer):
        await peer.send(OPEN, 1)
        for _ in range(WINDOW_BYTES // FRAME_BYTES):
            await peer.data(1, bytes(FRAME_BYTES))
        assert not await ended(mux)
        await peer.data(1, b"x")
        assert await ended(mux)


async def test_what_is_read_is_granted_again_and_a_large_message_widens_the_window():
    async with muxer() as (mux, peer):
        await peer.send(OPEN, 1)
        stream = await mux.accept_stream()
        stream.expect(64 * 1024 * 1024)
        assert await peer.receive() == (CREDIT, 1, WINDOW_MAX_BYTES - WINDOW_BYTES, b"")
        stream.expect(64 * 1024 * 1024)
        for _ in range(4):
            await peer.data(1, bytes(FRAME_BYTES))
        await trio.testing.wait_all_tasks_blocked()
        assert len(await stream.read(4 * FRAME_BYTES)) == 4 * FRAME_BYTES
        assert await peer.receive() == (CREDIT, 1, 4 * FRAME_BYTES, b"")


async def test_a_window_that_is_used_up_in_a_few_round_trips_is_doubled():
    async with muxer() as (mux, peer):
        await peer.send(OPEN, 1)
        stream = await mux.accept_stream()

        async def take_a_window() -> int:
            granted = 0
            for _ in range(WINDOW_BYTES // FRAME_BYTES):
                await peer.data(1, bytes(FRAME_BYTES))
                assert len(await stream.take(FRAME_BYTES)) == FRAME_BYTES
                granted += (await peer.receive())[2]
            return granted

        assert await take_a_window() == WINDOW_BYTES
        mux.round_trip = 60.0  # a very long line
        await take_a_window()
        assert await peer.receive() == (CREDIT, 1, WINDOW_BYTES, b"")


async def test_a_cancelled_take_loses_nothing():
    async with muxer() as (mux, peer):
        await peer.send(OPEN, 1)
        await peer.data(1, b"abc")
        stream = await mux.accept_stream()
        await trio.testing.wait_all_tasks_blocked()
        with trio.move_on_after(0):
            await stream.take(6)
        assert stream.partial
        await peer.data(1, b"defgh")
        assert await stream.take(6) == b"abcdef"
        assert not stream.partial
        assert await stream.read(9) == b"gh"


@pytest.mark.parametrize(
    "frame",
    [(99, 1, 0), (DATA, 1, FRAME_BYTES + 1), (OPEN, 2, 0), (OPEN, 1, 0)],
    ids=["unknown kind", "frame too large", "our parity", "number used again"],
)
async def test_a_peer_that_breaks_the_protocol_loses_the_connection(frame: tuple[int, int, int]):
    async with muxer() as (mux, peer):
        await peer.send(OPEN, 1)
        assert not await ended(mux)
        await peer.send(*frame)
        assert await ended(mux)


async def test_frames_of_unknown_streams_are_answered_or_ignored():
    async with muxer() as (mux, peer):
        await peer.data(7, b"what?")
        assert await peer.receive() == (RST, 7, 0, b"")
        for kind in (CREDIT, FIN, RST):
            await peer.send(kind, 7, 5)
        await peer.send(PONG, 0, 12345)
        assert not await ended(mux)


async def test_streams_above_the_limit_are_reset_at_once_and_a_place_becomes_free_again():
    async with muxer(inbound_streams=2) as (mux, peer):
        for number in (1, 3):
            await peer.send(OPEN, number)
            await mux.accept_stream()
        await peer.send(OPEN, 5)
        assert await peer.receive() == (RST, 5, 0, b"")
        await peer.send(RST, 1)
        await peer.send(OPEN, 7)
        await trio.testing.wait_all_tasks_blocked()
        assert sorted(mux._streams) == [3, 7]


async def test_data_before_a_clean_end_survive_a_reset_after_it():
    async with muxer() as (mux, peer):
        await peer.send(OPEN, 1)
        await peer.data(1, b"last words")
        await peer.send(FIN, 1)
        await peer.send(RST, 1)
        stream = await mux.accept_stream()
        await trio.testing.wait_all_tasks_blocked()
        assert await stream.read(100) == b"last words"
        with pytest.raises(MuxedStreamReset):
            await stream.write(b"anybody there?")


async def test_what_came_before_a_reset_can_be_read_and_then_the_reader_learns_of_it():
    async with muxer() as (mux, peer):
        await peer.send(OPEN, 1)
        await peer.data(1, b"half a mes")
        await peer.send(RST, 1)
        stream = await mux.accept_stream()
        await trio.testing.wait_all_tasks_blocked()
        assert await stream.read(100) == b"half a mes"
        with pytest.raises(MuxedStreamReset):
            await stream.read(100)


async def test_data_without_a_clean_end_are_void_when_the_connection_ends():
    async with muxer() as (mux, peer):
        await peer.send(OPEN, 1)
        await peer.data(1, b"half a mes")
        stream = await mux.accept_stream()
        await trio.testing.wait_all_tasks_blocked()
        await mux.close()
        with pytest.raises(MuxedStreamReset):
            await stream.read(100)


async def test_a_ping_is_answered_and_measured():
    async with muxer() as (mux, peer):
        await peer.send(PING, 0, 42)
        assert await peer.receive() == (PONG, 0, 42, b"")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mux.ping)
            kind, _, number, _ = await peer.receive()
            assert kind == PING
            await peer.send(PONG, 0, number)


async def test_a_late_answer_behind_bulk_data_is_a_sign_of_life_and_silence_is_not():
    async with muxer() as (mux, peer):
        conn = SimpleNamespace(muxed_conn=mux)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(peer.send, CREDIT, 1, 1)
            assert await is_alive(conn, 0.05) == 0.05
        assert await is_alive(conn, 0.05) is None


async def test_a_peer_that_pings_and_never_reads_loses_the_connection():
    ours, theirs = trio.testing.lockstep_stream_pair()
    mux = FastMux(Pipe(ours), PEER)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(mux.start)
        flood = struct.pack("!BII", PING, 0, 1) * 10_000
        with trio.fail_after(5), pytest.raises(trio.BrokenResourceError):
            await theirs.send_all(flood)
        assert await ended(mux)
