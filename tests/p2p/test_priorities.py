"""Small messages overtake bulk, bulk is never kept waiting for ever, frames fit their line."""

import os
import sys
import time
from pathlib import Path

import pytest
import trio
import trio.testing

from tdmld.p2p import PeerInfo, Stream
from tdmld.p2p.tcp import TcpConnection
from tdmld.p2p.turns import FRAME_LEAST_BYTES, FRAME_MOST_BYTES, FrameSize, Turns
from tests.p2p.support import ECHO, MOST, SINK, hosts, until
from tests.p2p.test_fastmux import DATA, OPEN, muxer

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "lib"))
from wan import home_line, open_wan


async def order_of(kinds: str) -> str:
    """In which order those get their turn who came in the order of `kinds` (u urgent, b bulk)."""
    turns, served = Turns(), ""

    async def one(kind: str) -> None:
        nonlocal served
        await turns.take(urgent=kind == "u")
        served += kind
        turns.release()

    await turns.take(urgent=False)
    async with trio.open_nursery() as nursery:
        for kind in kinds:
            nursery.start_soon(one, kind)
            await trio.testing.wait_all_tasks_blocked()
        turns.release()
    return served


async def test_urgent_ones_go_first_and_each_kind_in_order():
    assert await order_of("bubu") == "uubb"


async def test_bulk_gets_its_turn_among_any_number_of_urgent_ones():
    assert await order_of("b" + "u" * 40) == "u" * 16 + "b" + "u" * 24


async def test_one_who_stops_waiting_keeps_nobody_waiting():
    turns = Turns()
    await turns.take(urgent=False)
    with trio.move_on_after(0):
        await turns.take(urgent=True)
    turns.release()
    with trio.fail_after(1):
        await turns.take(urgent=False)


@pytest.mark.parametrize(
    ("rate", "least", "most"),
    [(1e4, FRAME_LEAST_BYTES, FRAME_LEAST_BYTES), (12.5e6, 16_384, 49_152), (1e9, 1e5, 1.4e5)],
)
def test_frames_take_a_few_milliseconds_whatever_the_line(rate: float, least: float, most: float):
    size = FrameSize()
    assert size.bytes == FRAME_LEAST_BYTES
    for _ in range(50):
        size.sent(size.bytes, size.bytes / rate)
        assert FRAME_LEAST_BYTES <= size.bytes <= FRAME_MOST_BYTES
    assert least <= size.bytes <= most


async def test_a_small_write_passes_between_the_frames_of_a_large_one():
    async with muxer() as (mux, peer):
        bulk, small = await mux.open_stream(), await mux.open_stream()
        assert [(await peer.receive())[0] for _ in range(2)] == [OPEN, OPEN]
        async with trio.open_nursery() as nursery:
            await mux.turns.take(urgent=True)  # the line is busy
            nursery.start_soon(bulk.write, bytes(500_000))
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(small.write, b"vote")
            await trio.testing.wait_all_tasks_blocked()
            mux.turns.release()
            assert await peer.receive() == (DATA, 4, 4, b"vote")
            received = 0
            while received < 500_000:
                received += (await peer.receive())[2]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says the round trip of a socket")
async def test_the_kernel_holds_little_between_near_peers():
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    dialled = await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1])
    async with listener, dialled, await listener.accept() as accepted:
        writer, _ = TcpConnection(dialled, None), TcpConnection(accepted, None)
        held = 0
        with trio.move_on_after(0.3):
            while held < 1 << 25:
                await writer.write(bytes(1 << 14))
                held += 1 << 14
    assert held < 1 << 20


async def test_on_a_slow_line_bulk_fills_it_and_small_messages_do_not_wait_behind():
    """20 ms and 40 Mbit/s: the 6 MB on their way take over a second, a question 40 ms."""
    payload = os.urandom(6_000_000)
    taken = trio.Event()
    trips: list[float] = []

    async def sink(stream: Stream) -> None:
        assert await stream.receive(MOST) == payload
        taken.set()

    async with hosts(2) as (a, b):
        b.set_handler(SINK, sink)
        target = ("127.0.0.1", int(b.addresses[0].split("/")[-1]))
        async with open_wan(target, home_line(0.02, 40.0)) as wan:
            a.add_peer(PeerInfo(b.peer_id, (f"/ip4/127.0.0.1/tcp/{wan.port}",)))
            await until(lambda: b.peer_id in a.connected())
            bulk = await a.open_stream(b.peer_id, SINK)
            question = await a.open_stream(b.peer_id, ECHO)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(bulk.send, payload)
                await trio.sleep(0.2)  # the line is full by then
                while not taken.is_set():
                    began = time.perf_counter()
                    await question.send(bytes(1024))
                    assert await question.receive(2000) == bytes(1024)
                    trips.append(time.perf_counter() - began)
    # Behind the bulk that waits it would be over a second; some patience for a busy machine.
    assert sorted(trips)[len(trips) // 2] < 0.25
    assert len(trips) > 3
