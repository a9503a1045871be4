"""Whatever was gossiped in the last minute can be asked for, by whoever was away; and asking is
bounded, whoever asks."""

import os
from collections.abc import Callable

import msgspec
import pytest
import trio
import trio.testing

from tdmld.p2p import GossipMessage, Host, Stream, catchup, gossip, open_host, recent
from tdmld.p2p.catchup import PROTOCOL, Ask, Have, Want
from tdmld.p2p.errors import ProtocolRefused, StreamError
from tests.p2p.support import connected_pair, hosts, info, seed, until
from tests.p2p.test_gossip import FAST, TOPIC, accept, collect, join, known


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


# ---- hosts ---------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything ten times as fast, and without what gossip itself repeats to who joins."""
    monkeypatch.setattr(gossip, "_GOSSIP_WINDOW", 0)
    monkeypatch.setattr(recent, "SETTLE_SECONDS", 0.2)
    monkeypatch.setattr(catchup, "PACE_SECONDS", 0.5)
    monkeypatch.setattr(catchup, "FIRST_SECONDS", 0.05)
    monkeypatch.setattr(catchup, "SPACING_SECONDS", 0.1)


async def settle(host: Host) -> None:
    """Until what was published is offered."""
    await trio.sleep(recent.SETTLE_SECONDS + 0.01)


async def nothing_more(channel: trio.MemoryReceiveChannel[GossipMessage]) -> None:
    await trio.sleep(0.5)
    with pytest.raises(trio.WouldBlock):
        channel.receive_nowait()


async def test_who_was_away_gets_what_was_said_meanwhile():
    async with connected_pair(gossip=True, limits=FAST) as (a, b):
        mine, _ = await join(a, b)
        sent = [b"message %d" % number for number in range(50)]
        for message in sent:
            await a.publish(TOPIC, message)
        await settle(a)
        async with open_host(seed(9), limits=FAST) as late:
            channel = await late.subscribe(TOPIC, limit=1000, validate=accept)
            late.add_peer(info(b))
            with trio.fail_after(10):
                received = [await channel.receive() for _ in sent]
            assert sorted(message.data for message in received) == sorted(sent)
            assert {message.source for message in received} == {a.peer_id}
            await nothing_more(channel)
            for held in late._gossip.recent._log.values():
                original = a._gossip.recent.get(held.key, held.born)
                assert original is not None
                assert abs(original.born - held.born) < 0.1  # its age came with it
            # The next message comes by gossip, and once.
            await a.publish(TOPIC, b"now")
            assert await collect(channel, 1) == [b"now"]
            await nothing_more(channel)
        with pytest.raises(trio.WouldBlock):
            mine.receive_nowait()


async def test_an_author_that_is_killed_loses_nothing_that_one_peer_has():
    """It does not hear itself, but passes on what it said in its earlier life."""
    async with hosts(2, gossip=True) as (a, b):
        yours = await b.subscribe(TOPIC, limit=1000, validate=accept)
        async with open_host(seed(9)) as author:
            await author.subscribe(TOPIC, limit=1000, validate=accept)
            author.add_peer(info(b))
            await until(lambda: known(author) == known(b) == 1)
            await author.publish(TOPIC, b"last words")
            assert await collect(yours, 1) == [b"last words"]
        await settle(b)
        async with open_host(seed(9)) as author:
            mine = await author.subscribe(TOPIC, limit=1000, validate=accept)
            author.add_peer(info(b))
            await until(lambda: len(author._gossip.recent) == 1)
            await b.disconnect(author.peer_id)
            others = await a.subscribe(TOPIC, limit=1000, validate=accept)
            a.add_peer(info(author))
            assert await collect(others, 1) == [b"last words"]
            await nothing_more(mine)


async def test_what_one_peer_caught_up_with_reaches_those_behind_it(
    monkeypatch: pytest.MonkeyPatch,
):
    """a - b - c: gossip does not forward what b asked for; c learns that there is news."""
    monkeypatch.setattr(catchup, "PACE_SECONDS", 1000.0)
    async with hosts(3, gossip=True) as (a, b, c):
        await a.subscribe(TOPIC, limit=1000, validate=accept)
        await a.publish(TOPIC, b"to nobody")
        channels = [await host.subscribe(TOPIC, limit=1000, validate=accept) for host in (b, c)]
        c.add_peer(info(b))
        await until(lambda: known(b) == 1)
        await settle(a)
        b.add_peer(info(a))
        for channel in channels:
            assert await collect(channel, 1) == [b"to nobody"]


async def test_a_topic_joined_later_is_asked_for():
    async with connected_pair(gossip=True) as (a, b):
        await a.subscribe(TOPIC, limit=1000, validate=accept)
        await b.subscribe("other", limit=1000, validate=accept)
        await a.publish(TOPIC, b"early")
        await trio.sleep(1)
        channel = await b.subscribe(TOPIC, limit=1000, validate=accept)
        assert await collect(channel, 1) == [b"early"]


async def test_what_was_asked_for_is_checked_like_everything():
    asked: list[bytes] = []

    def picky(forwarder: str, data: bytes) -> bool | None:
        asked.append(data)
        assert forwarder == a.peer_id
        return None if data == b"bad" else True

    async with hosts(1, gossip=True) as (a,):
        await a.subscribe(TOPIC, limit=1000, validate=accept)
        for data in (b"bad", b"good", bytes(101)):
            await a.publish(TOPIC, data)
        await settle(a)
        async with open_host(seed(9)) as late:
            channel = await late.subscribe(TOPIC, limit=100, validate=picky)
            late.add_peer(info(a))
            assert await collect(channel, 1) == [b"good"]
            await until(lambda: len(asked) > catchup.REFUSALS)
            await nothing_more(channel)  # nor is anything asked for again
            assert sorted(asked) == [b"bad"] * catchup.REFUSALS + [b"good"]
            assert len(late._gossip.recent) == 1


async def test_when_nothing_is_missing_little_is_said(monkeypatch: pytest.MonkeyPatch):
    rows: list[int] = []

    def noting(*fields: object) -> Have:
        have = Have(*fields)
        rows.append(len(have.rows))
        return have

    monkeypatch.setattr(catchup, "Have", noting)
    monkeypatch.setattr(
        catchup, "_receive", lambda stream, kind, limit: receive(stream, kind, limit)
    )
    receive = receiving(Have, noting)
    async with connected_pair(gossip=True, limits=FAST) as (a, b):
        await join(a, b)
        for number in range(20):
            await a.publish(TOPIC, b"%d" % number)
        await until(lambda: len(rows) > 4 and sum(rows) >= 20)
        said = len(rows)
        await until(lambda: len(rows) > said + 4)
    assert sum(rows) <= 40  # each side lists each message once


def receiving(real: type, alias: Callable[..., object]) -> Callable[..., object]:
    """`catchup._receive` that knows the class behind a function put in its place."""

    async def receive(stream: Stream, kind: object, limit: int) -> object:
        return msgspec.msgpack.decode(
            await stream.receive(limit), type=real if kind is alias else kind
        )

    return receive


async def test_a_peer_without_the_protocol_is_soon_left_alone(monkeypatch: pytest.MonkeyPatch):
    opened: list[str] = []

    async def refusing(peer_id: str, protocol: str) -> Stream:
        opened.append(protocol)
        raise ProtocolRefused("as a foreign peer does")

    async with connected_pair(gossip=True) as (a, b):
        monkeypatch.setattr(a, "open_stream", refusing)
        await join(a, b)
        await until(lambda: len(opened) >= catchup.TRIES)
        await trio.sleep(1)  # some turns more, in which nothing may be opened
        assert opened == [PROTOCOL] * catchup.TRIES


# ---- hostile peers -------------------------------------------------------------------------------


def encode(message: object) -> bytes:
    return msgspec.msgpack.encode(message)


async def answer(stream: Stream, frame: bytes) -> bytes:
    await stream.send(frame)
    return await stream.receive(1000)


def ask(*topics: str) -> bytes:
    return encode(Ask(topics or (TOPIC,), b"", 0, bytes(8), 0))


@pytest.mark.parametrize("frame", [b"", b"\xff", os.urandom(100), encode(Want(())), bytes(1 << 20)])
async def test_garbage_gets_no_answer_and_the_host_lives(frame: bytes):
    async with connected_pair(gossip=True) as (a, b):
        await join(a, b)
        stream = await a.open_stream(b.peer_id, PROTOCOL)
        with trio.fail_after(5), pytest.raises(StreamError):
            await answer(stream, frame)
        async with await a.open_stream(b.peer_id, PROTOCOL) as stream:
            await stream.send(ask())
            assert msgspec.msgpack.decode(await stream.receive(1000), type=Have).rows == ()


async def test_nobody_gets_more_than_its_share(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(catchup, "MAX_BYTES", 300_000)
    monkeypatch.setattr(catchup, "SERVED_BYTES_PER_SECOND", 1.0)
    async with hosts(2, gossip=True, limits=FAST) as (a, b):
        await b.subscribe(TOPIC, limit=20_000, validate=accept)
        for number in range(20):
            await b.publish(TOPIC, b"%d" % number + bytes(10_000))
        await settle(b)
        a.add_peer(info(b))
        await until(lambda: bool(a.connected()))
        got = answers = 0
        with trio.fail_after(20):
            for _ in range(10):
                try:
                    async with await a.open_stream(b.peer_id, PROTOCOL) as stream:
                        await stream.send(ask())
                        have = msgspec.msgpack.decode(await stream.receive(10_000), type=Have)
                        answers += 1
                        keys = tuple(key for key, _ in have.rows)
                        await stream.send(encode(Want(10 * keys)))
                        while True:
                            got += len(await stream.receive(20_000))
                except StreamError:
                    pass
        assert 200_000 < got < 300_000
        assert answers <= 2


@pytest.mark.parametrize("lie", ["other message", "garbage", "short", "silence"])
async def test_a_peer_that_lies_gains_nothing(lie: str):
    """It offers what it has not got, and gives something else."""
    said: list[Want] = []

    async def liar(stream: Stream) -> None:
        await stream.receive(1000)
        await stream.send(encode(Have(bytes(8), 7, ((key(1), 10),), True)))
        said.append(msgspec.msgpack.decode(await stream.receive(1000), type=Want))
        match lie:
            case "other message":
                (raw,) = [held.raw for held in a._gossip.recent._log.values()]
                await stream.send(bytes(4), raw)
                with pytest.raises(StreamError):  # it hears no more of us
                    await stream.receive(1000)
            case "garbage":
                await stream.send(bytes(4), b"\xff" * 100)
            case "short":
                await stream.send(b"123")

    async with hosts(2, gossip=True) as (a, b):
        a.set_handler(PROTOCOL, liar)
        await a.subscribe(TOPIC, limit=1000, validate=accept)
        await a.publish(TOPIC, b"true, but not what was asked for")
        channel = await b.subscribe(TOPIC, limit=1000, validate=accept)
        b.add_peer(info(a))
        await until(lambda: len(said) >= 2)
        assert said[0] == Want((key(1),))
        assert key(1) not in b._gossip.recent
        while True:
            try:
                channel.receive_nowait()
            except trio.WouldBlock:
                break
        await a.publish(TOPIC, b"by gossip")
        assert await collect(channel, 1) == [b"by gossip"]
