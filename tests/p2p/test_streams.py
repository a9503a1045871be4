"""Messages on streams: whole or not at all, bounded, and never able to harm other streams."""

import os

import pytest
import trio
import trio.testing

from tdmld.chain import crypto
from tdmld.p2p import Stream, open_host
from tdmld.p2p.errors import (
    MessageTooLarge,
    ProtocolRefused,
    StreamBroken,
    StreamClosed,
)
from tests.p2p.support import ECHO, MOST, SINK, connected_pair, drain, echo, says_hello, seed


async def test_a_host_is_named_by_the_public_key_of_its_seed():
    key = crypto.KeyPair(seed(7))
    async with open_host(key.seed, gossip=False) as host:
        assert host.peer_id == key.address


async def test_messages_keep_their_boundaries_and_may_be_sent_in_parts():
    async with connected_pair() as (a, b), await a.open_stream(b.peer_id, ECHO) as stream:
        assert stream.peer_id == b.peer_id
        await stream.send(b"one", memoryview(b" two"), bytearray(b" three"))
        await stream.send()
        await stream.send(b"four")
        assert [await stream.receive(100) for _ in range(3)] == [b"one two three", b"", b"four"]


async def test_the_side_that_was_dialled_opens_streams_too():
    async with connected_pair() as (a, b):
        assert await says_hello(b, a.peer_id)
        assert b.peers()[0].direction == "inbound"


async def test_a_payload_of_64_mib_comes_back_intact():
    payload = os.urandom(1 << 20) * 64
    async with connected_pair() as (a, b), await a.open_stream(b.peer_id, ECHO) as stream:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send, payload)
            assert await stream.receive(len(payload)) == payload
        [peer] = a.peers()
        assert peer.messages_out == peer.messages_in == 1
        for counted in (peer.bytes_out, peer.bytes_in):
            assert len(payload) < counted < 1.01 * len(payload)


async def test_many_tasks_may_send_on_one_stream_without_mixing_messages():
    async with connected_pair() as (a, b), await a.open_stream(b.peer_id, ECHO) as stream:
        sent = [bytes([number]) * (number * 20_000) for number in range(1, 20)]
        received = []
        async with trio.open_nursery() as nursery:
            for message in sent:
                nursery.start_soon(stream.send, message)
            for _ in sent:
                received.append(await stream.receive(MOST))
        assert sorted(received) == sent


async def test_an_oversized_message_is_refused_before_its_body_is_read():
    ended = []

    async def greedy(stream: Stream) -> None:
        with pytest.raises(MessageTooLarge, match=r"announced 4000000 bytes .* 1000 are allowed"):
            await stream.receive(1000)
        ended.append(host_b.peers()[0].messages_in)
        with pytest.raises(MessageTooLarge):
            await stream.receive(1000)

    async with connected_pair() as (a, host_b):
        host_b.set_handler(SINK, greedy)
        stream = await a.open_stream(host_b.peer_id, SINK)
        with pytest.raises(StreamBroken):
            await stream.send(bytes(4_000_000))
        assert ended == [0]
        assert host_b.peers()[0].score > 0
        assert await says_hello(a, host_b.peer_id)


async def test_a_message_of_exactly_the_limit_is_taken():
    async with connected_pair() as (a, b), await a.open_stream(b.peer_id, ECHO) as stream:
        await stream.send(bytes(1000))
        assert await stream.receive(1000) == bytes(1000)


@pytest.mark.parametrize("sent", [b"\0\0", b"\0\0\0\x0ahalf"])
async def test_a_truncated_message_breaks_the_stream(sent: bytes):
    async def liar(stream: Stream) -> None:
        await stream._inner.write(sent)
        await stream._inner.close()

    async with connected_pair() as (a, b):
        b.set_handler(SINK, liar)
        stream = await a.open_stream(b.peer_id, SINK)
        with pytest.raises(StreamBroken):
            await stream.receive(100)


async def test_a_stream_that_ends_between_messages_is_closed_not_broken():
    async def polite(stream: Stream) -> None:
        await stream.send(b"bye")

    async with connected_pair() as (a, b):
        b.set_handler(SINK, polite)
        stream = await a.open_stream(b.peer_id, SINK)
        assert await stream.receive(100) == b"bye"
        for _ in range(2):
            with pytest.raises(StreamClosed):
                await stream.receive(100)
        with pytest.raises(StreamClosed):
            await stream.send(b"too late")


async def test_a_lost_connection_breaks_its_streams():
    async with connected_pair() as (a, b):
        stream = await a.open_stream(b.peer_id, ECHO)
        await b.disconnect(a.peer_id)
        with pytest.raises(StreamBroken):
            await stream.receive(100)


async def test_a_local_close_ends_a_waiting_receive():
    async with connected_pair() as (a, b):
        stream = await a.open_stream(b.peer_id, ECHO)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(drain, stream)
            await trio.testing.wait_all_tasks_blocked(0.01)
            await stream.close()


async def test_a_handler_that_raises_harms_its_stream_only(caplog: pytest.LogCaptureFixture):
    async def faulty(stream: Stream) -> None:
        raise KeyError("boom")

    async def very_faulty(stream: Stream) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(faulty, stream)

    async with connected_pair() as (a, b):
        for handler in (faulty, very_faulty):
            b.set_handler(SINK, handler)
            stream = await a.open_stream(b.peer_id, SINK)
            with pytest.raises(StreamBroken):
                await stream.receive(100)
        assert await says_hello(a, b.peer_id)
    assert "the handler of Stream(/test/sink/1" in caplog.text


async def test_an_unknown_protocol_is_refused():
    async with connected_pair() as (a, b):
        with pytest.raises(ProtocolRefused, match="does not serve /nowhere"):
            await a.open_stream(b.peer_id, "/nowhere")
        assert await says_hello(a, b.peer_id)


async def test_a_cancelled_receive_loses_nothing():
    payload = os.urandom(3_000_000)
    async with connected_pair() as (a, b), await a.open_stream(b.peer_id, ECHO) as stream:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send, payload)
            cancelled = 0
            while True:
                with trio.move_on_after(0.002) as scope:
                    received = await stream.receive(MOST)
                    break
                cancelled += scope.cancelled_caught
        assert received == payload
        assert cancelled


async def test_a_send_cancelled_under_back_pressure_resets_its_stream_and_no_other():
    """The library's own write leaves half a record behind: all streams of the connection die."""
    ends: list[BaseException] = []
    asleep = trio.Event()

    async def slow(stream: Stream) -> None:
        await asleep.wait()
        ends.append(await drain(stream))

    async with connected_pair() as (a, b):
        b.set_handler(SINK, slow)
        other = await a.open_stream(b.peer_id, ECHO)
        for _ in range(20):
            stream = await a.open_stream(b.peer_id, SINK)
            with trio.move_on_after(0.01) as scope:
                await stream.send(bytes(20_000_000))
            assert scope.cancelled_caught
            with pytest.raises(StreamBroken):
                await stream.send(b"more")
            await other.send(b"still here")
            assert await other.receive(100) == b"still here"
        asleep.set()
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert [type(end) for end in ends] == [StreamBroken] * 20


async def test_small_messages_pass_while_a_bulk_message_waits_for_its_reader():
    """The library's muxer kills a stream whose reader sleeps for five seconds; ours only waits."""
    release = trio.Event()
    done = trio.Event()

    async def sleepy(stream: Stream) -> None:
        await release.wait()
        assert await stream.receive(MOST) == bytes(10_000_000)
        done.set()

    async with connected_pair() as (a, b):
        b.set_handler(SINK, sleepy)
        bulk = await a.open_stream(b.peer_id, SINK)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bulk.send, bytes(10_000_000))
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert await says_hello(a, b.peer_id)
            release.set()
        with trio.fail_after(5):
            await done.wait()


async def test_a_reader_may_compute_for_longer_than_the_librarys_patience():
    """Its muxer gives a stream up when the peer grants nothing for five seconds."""
    done = trio.Event()

    async def busy(stream: Stream) -> None:
        await trio.sleep(6)
        assert await stream.receive(MOST) == bytes(20_000_000)
        done.set()

    async with connected_pair() as (a, b):
        b.set_handler(SINK, busy)
        stream = await a.open_stream(b.peer_id, SINK)
        await stream.send(bytes(20_000_000))
        with trio.fail_after(5):
            await done.wait()


async def test_a_handler_may_answer_and_leave_while_the_request_is_still_coming():
    async def hasty(stream: Stream) -> None:
        await stream.send(b"no, thank you")

    async with connected_pair() as (a, b):
        b.set_handler(SINK, hasty)
        b.set_handler(ECHO, echo)
        stream = await a.open_stream(b.peer_id, SINK)
        with pytest.raises((StreamBroken, StreamClosed)):
            await stream.send(bytes(10_000_000))
        assert await says_hello(a, b.peer_id)
