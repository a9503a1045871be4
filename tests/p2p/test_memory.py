"""What all muxers of a host may hold for readers: hard, and fair."""

import pytest
import trio
import trio.testing
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import info_from_p2p_addr
from multiaddr import Multiaddr

from tdmld.chain.crypto import KeyPair
from tdmld.p2p import Limits, Stream, open_host
from tdmld.p2p.memory import Memory
from tdmld.p2p.muxstream import WINDOW_BYTES
from tests.p2p.support import MOST, SINK, connected_pair, foreign_host, seed, until


def peer(number: int) -> ID:
    return ID.from_base58(KeyPair(seed(number)).address)


class Holder:
    def __init__(self, memory: Memory, number: int) -> None:
        self.memory, self.peer_id, self.held = memory, peer(number), 0
        self.relieved = 0

    def take(self, size: int) -> None:
        self.memory.hold(self, size)

    def relieve(self) -> None:
        self.relieved += 1
        self.memory.hold(self, -self.held)


def test_at_the_bound_the_greatest_holder_loses_and_kept_peers_last():
    memory = Memory(100, lambda one: one == peer(1))
    kept, small, large = (Holder(memory, number) for number in (1, 2, 3))
    kept.take(60)
    small.take(10)
    large.take(30)
    assert memory.used == 100
    small.take(1)
    assert (kept.relieved, small.relieved, large.relieved) == (0, 0, 1)
    kept.take(40)
    assert (kept.relieved, small.relieved) == (0, 1)
    kept.take(1)
    assert kept.relieved == 1
    assert memory.used == 0


def test_from_half_of_the_bound_only_those_below_their_share_open_streams():
    memory = Memory(100)
    small, large = Holder(memory, 2), Holder(memory, 3)
    large.take(50)
    assert not memory.refuses_stream(large)
    small.take(5)
    assert memory.refuses_stream(large)
    assert not memory.refuses_stream(small)


async def test_while_memory_is_scarce_those_who_read_are_served_all_the_same():
    limits = Limits(buffer_bytes=WINDOW_BYTES)
    async with connected_pair(limits=limits) as (a, b):
        done = trio.Event()

        async def read(stream: Stream) -> None:
            assert len(await stream.receive(MOST)) == 20_000_000
            done.set()

        async def read_nothing(stream: Stream) -> None:
            await done.wait()

        b.set_handler(SINK, read)
        b.set_handler("/test/parked/1", read_nothing)
        reading = await a.open_stream(b.peer_id, SINK)
        async with await a.open_stream(b.peer_id, "/test/parked/1") as parked:
            await parked.send(bytes(6 * WINDOW_BYTES // 10))
            await until(lambda: b._peers.memory.is_scarce)
            await reading.send(bytes(20_000_000))
            with trio.fail_after(10):
                await done.wait()
            await reading.close()
        await until(lambda: b._peers.memory.used == 0)


@pytest.mark.parametrize("ended", ["peer closes", "connection dies", "reset"])
async def test_nothing_is_counted_for_streams_that_are_over(ended: str):
    async with connected_pair() as (a, b):
        arrived, over = trio.Event(), trio.Event()

        async def wait(stream: Stream) -> None:
            arrived.set()
            await over.wait()

        b.set_handler(SINK, wait)
        stream = await a.open_stream(b.peer_id, SINK)
        await stream.send(bytes(500_000))
        await arrived.wait()
        await until(lambda: b._peers.memory.used > 500_000)
        if ended == "peer closes":
            await stream.close()
        elif ended == "connection dies":
            await a.disconnect(b.peer_id)
        else:
            await stream.reset()
        await trio.testing.wait_all_tasks_blocked(0.02)
        over.set()
        await until(lambda: b._peers.memory.used == 0)


async def test_a_foreign_muxer_that_holds_too_much_is_closed():
    """The library grants 256 KiB to each of 128 streams, whoever reads them or not."""
    foreign = foreign_host(5)
    limits = Limits(buffer_bytes=4 << 20)
    async with open_host(seed(1), gossip=False, limits=limits) as ours:

        async def wait(stream: Stream) -> None:
            while stream.peer_id in ours.connected():  # noqa: ASYNC110 (nothing announces it)
                await trio.sleep(0.02)

        ours.set_handler(SINK, wait)
        async with foreign.run(listen_addrs=[Multiaddr("/ip4/127.0.0.1/tcp/0")]):
            target = info_from_p2p_addr(Multiaddr(f"{ours.addresses[0]}/p2p/{ours.peer_id}"))
            await foreign.connect(target)
            await until(lambda: bool(ours.connected()))
            for _ in range(10):
                stream = await foreign.new_stream(ID.from_base58(ours.peer_id), [TProtocol(SINK)])
                await stream.write(bytes(250_000))
            await until(lambda: not ours.connected())
            await until(lambda: ours._peers.memory.used == 0)
            await foreign.close()
