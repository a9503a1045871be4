"""Hostile peers over real sockets: while each attack goes on, an honest peer is served as when all
is quiet; afterwards the attacker is banned, the honest one is not, and nothing of the attack is
left.

What is compared is how many of the honest peer's requests succeed, not how fast.
"""

import os
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import pytest
import trio
import trio.testing
from libp2p.abc import INetConn
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.identity.identify_push.identify_push import ID_PUSH
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V12
from libp2p.pubsub.pb import rpc_pb2
from libp2p.security.secio.transport import ID as SECIO
from libp2p.utils.varint import encode_varint_prefixed

from tdmld.p2p import Host, Limits, Stream, open_host
from tdmld.p2p.errors import P2PError, StreamError
from tdmld.p2p.fastmux import FastMux
from tdmld.p2p.muxstream import CREDIT, PING, RST, WINDOW_BYTES
from tdmld.p2p.rawstream import negotiate
from tests.p2p.support import ECHO, SINK, count_tasks, echo, info, seed, until

TOPIC = "/test/hostile/1"
LIMITS = Limits(handshake_seconds=0.4, buffer_bytes=4 << 20)
HOSTILE = "127.0.0.2"
"""Attackers without an identity come from here, the honest peer from 127.0.0.1."""
ROUND_TRIPS, MESSAGES = 40, 10
MULTISTREAM = b"\x13/multistream/1.0.0\n"
GONE = (BaseLibp2pError, P2PError, OSError, trio.BrokenResourceError, trio.ClosedResourceError)


class Scene:
    """A victim and an honest peer that is connected with it and shares its gossip."""

    def __init__(self, victim: Host, honest: Host, heard: trio.MemoryReceiveChannel) -> None:
        self.victim, self.honest, self.heard = victim, honest, heard
        self.port = int(victim.addresses[0].rsplit("/", 1)[1])
        self.sent = 0

    async def served(self) -> tuple[int, int]:
        """How many of the honest peer's round trips, on an open and on new streams, and of its
        gossip messages succeed."""
        done = 0
        async with await self.honest.open_stream(self.victim.peer_id, ECHO) as opened:
            for number in range(ROUND_TRIPS):
                done += await _echoes(opened)
                if number % 4 == 0:
                    async with await self.honest.open_stream(self.victim.peer_id, ECHO) as new:
                        done += await _echoes(new)
        sent = set()
        for _ in range(MESSAGES):
            self.sent += 1
            sent.add(b"fine %d" % self.sent)
            await self.honest.publish(TOPIC, b"fine %d" % self.sent)
        arrived = set()
        with trio.move_on_after(10):
            while sent - arrived:
                arrived.add((await self.heard.receive()).data)
        return done, len(sent & arrived)

    async def under(self, attack: Callable[[], Awaitable[None]]) -> tuple[int, int]:
        """The same while the attack goes on."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(attack)
            await trio.sleep(0.2)
            served = await self.served()
            nursery.cancel_scope.cancel()
        return served


async def _echoes(stream: Stream) -> bool:
    body = os.urandom(1024)
    with trio.move_on_after(5):
        await stream.send(body)
        return await stream.receive(2048) == body
    return False


def _reads_nothing(host: Host) -> Callable[[Stream], Awaitable[None]]:
    async def wait(stream: Stream) -> None:
        while stream.peer_id in host.connected():  # noqa: ASYNC110 (nothing announces it)
            await trio.sleep(0.02)

    return wait


def _validate(forwarder: str, data: bytes) -> bool:
    return not data.startswith(b"bad")


@asynccontextmanager
async def scene() -> AsyncIterator[Scene]:
    async with AsyncExitStack() as stack:
        victim, honest = [
            await stack.enter_async_context(open_host(seed(number), limits=LIMITS))
            for number in (1, 2)
        ]
        for host in (victim, honest):
            host.set_handler(ECHO, echo)
        victim.set_handler(SINK, _reads_nothing(victim))
        heard = await victim.subscribe(TOPIC, limit=1000, validate=_validate)
        await honest.subscribe(TOPIC, limit=1000, validate=_validate)
        honest.add_peer(info(victim))
        pubsub = honest._gossip._pubsub
        await until(lambda: len(pubsub.peer_topics.get(TOPIC, ())) == 1)
        yield Scene(victim, honest, heard)


async def nothing_is_left(victim: Host, tasks: int) -> None:
    await until(lambda: not victim._connector._pending)
    await until(lambda: count_tasks() <= tasks + 2)
    await until(lambda: victim._peers.memory.used == 0)


# Without an identity


async def _dial(port: int) -> trio.SocketStream:
    return await trio.open_tcp_stream("127.0.0.1", port, local_address=HOSTILE)


async def garbage(port: int) -> None:
    async with await _dial(port) as stream:
        await stream.send_all(b"\x13" + os.urandom(3000))
        await _until_closed(stream)


async def another_protocol(port: int) -> None:
    async with await _dial(port) as stream:
        await stream.send_all(b"GET / HTTP/1.1\r\nHost: " + b"x" * 200 + b"\r\n\r\n")
        await _until_closed(stream)


async def plaintext(port: int) -> None:
    """Refused, as is secio: who offers nothing else does not get in."""
    async with await _dial(port) as stream:
        await stream.send_all(MULTISTREAM)
        for name in (b"/plaintext/2.0.0\n", str(SECIO).encode() + b"\n"):
            await stream.send_all(bytes([len(name)]) + name)
        await _until_closed(stream)


async def half_of_a_handshake(port: int) -> None:
    outgoing = ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    tls = context.wrap_bio(ssl.MemoryBIO(), outgoing)
    with suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    async with await _dial(port) as stream:
        await stream.send_all(MULTISTREAM + b"\x0b/tls/1.0.0\n")
        await stream.send_all(outgoing.read())
        await _until_closed(stream)


async def silence(port: int) -> None:
    async with await _dial(port) as stream:
        await _until_closed(stream)


async def a_byte_now_and_then(port: int) -> None:
    async with await _dial(port) as stream:
        for byte in MULTISTREAM:
            await stream.send_all(bytes([byte]))
            await trio.sleep(0.05)
        await _until_closed(stream)


async def _until_closed(stream: trio.SocketStream) -> None:
    while await stream.receive_some(65536):
        pass


async def _again(one: Callable[[int], Awaitable[None]], port: int) -> None:
    while True:
        with suppress(*GONE):
            await one(port)
        await trio.sleep(0.001)


@pytest.mark.parametrize(
    "one",
    [
        garbage,
        another_protocol,
        plaintext,
        half_of_a_handshake,
        silence,
        a_byte_now_and_then,
    ],
)
async def test_a_flood_of_strangers_keeps_nobody_else_out(one: Callable[[int], Awaitable[None]]):
    """A hundred sockets at a time, again and again."""
    async with scene() as here:
        quiet, tasks = await here.served(), count_tasks()

        async def attack() -> None:
            async with trio.open_nursery() as nursery:
                for _ in range(100):
                    nursery.start_soon(_again, one, here.port)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(attack)
            assert await here.served() == quiet
            await until(lambda: here.victim.bans.address(HOSTILE) is not None, seconds=20)
            nursery.cancel_scope.cancel()
        assert here.victim.connected() == {here.honest.peer_id}
        assert here.victim.bans.address("127.0.0.1") is None
        assert await here.served() == quiet
        await nothing_is_left(here.victim, tasks)


# With an identity


class Attacker:
    """A host of our own whose connections are used against the rules."""

    def __init__(self, host: Host, victim: Host) -> None:
        self.host, self.victim = host, victim

    async def connection(self) -> INetConn:
        """The present one to the victim, or a new one; it redials as others do."""
        while True:
            found = [conn for conn in self.host._swarm.get_connections() if not conn.is_closed]
            if found:
                return found[0]
            await trio.sleep(0.01)

    async def mux(self) -> FastMux:
        muxed = (await self.connection()).muxed_conn
        assert isinstance(muxed, FastMux)
        return muxed


async def oversize(attacker: Attacker) -> None:
    async with await attacker.host.open_stream(attacker.victim.peer_id, ECHO) as stream:
        await stream._inner.write(b"\xff\xff\xff\xff")
        await stream.receive(10)


async def streams(attacker: Attacker) -> None:
    mux = await attacker.mux()
    opened = [await mux.open_stream() for _ in range(500)]
    await trio.sleep(0.01)
    for stream in opened:
        await stream.reset()


async def overdraw(attacker: Attacker) -> None:
    """More than the window, on a stream that nobody reads."""
    stream = await attacker.host.open_stream(attacker.victim.peer_id, SINK)
    raw = stream._fast
    piece = memoryview(bytes(WINDOW_BYTES // 4))
    for _ in range(8):
        await raw._mux.send_data(raw._number, len(piece), [piece])
    await stream.receive(10)


async def pings(attacker: Attacker) -> None:
    await _frames(await attacker.mux(), PING)


async def empty_frames(attacker: Attacker) -> None:
    await _frames(await attacker.mux(), CREDIT)


async def resets(attacker: Attacker) -> None:
    await _frames(await attacker.mux(), RST)


async def _frames(mux: FastMux, kind: int) -> None:
    for number in range(2000):
        mux.queue_control(kind, 0 if kind == PING else 99_999, number)
    await trio.sleep(0.005)


async def garbage_in_negotiation(attacker: Attacker) -> None:
    stream = await (await attacker.connection()).new_stream()
    await stream.write(MULTISTREAM + b"\x05\xff\xfe\xfd\xfc\n")
    while await stream.read(1000):
        pass


async def invalid_gossip(attacker: Attacker) -> None:
    """Signed by itself, and refused by the topic's rule."""
    for number in range(20):
        await attacker.host._gossip._pubsub.publish(TOPIC, b"bad %d" % number + os.urandom(8))
    await trio.sleep(0.05)


async def forged_gossip(attacker: Attacker) -> None:
    stream = await negotiate(await attacker.connection(), TProtocol(PROTOCOL_ID_V12))
    message = {"from_id": b"\x00\x24\x08\x01\x12\x20" + bytes(32), "signature": bytes(64)}
    for _ in range(20):
        many = [
            rpc_pb2.Message(data=os.urandom(20), topicIDs=[TOPIC], seqno=bytes(8), **message)
            for _ in range(50)
        ]
        await stream.write(encode_varint_prefixed(rpc_pb2.RPC(publish=many).SerializeToString()))
    await trio.sleep(0.01)


@pytest.mark.parametrize(
    "attack",
    [
        oversize,
        streams,
        overdraw,
        pings,
        empty_frames,
        resets,
        garbage_in_negotiation,
        invalid_gossip,
        forged_gossip,
    ],
)
async def test_a_peer_that_breaks_rules_is_banned_and_others_are_served(
    attack: Callable[[Attacker], Awaitable[None]],
):
    async with scene() as here:
        quiet, tasks = await here.served(), count_tasks()
        async with open_host(seed(66), limits=LIMITS) as host:
            attacker = Attacker(host, here.victim)
            if "gossip" in attack.__name__:
                await host.subscribe(TOPIC, limit=1000, validate=lambda source, data: True)
            host.add_peer(info(here.victim))
            await attacker.connection()

            async def again() -> None:
                while True:
                    with suppress(*GONE, StreamError):
                        await attack(attacker)
                    await trio.lowlevel.checkpoint()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(again)
                assert await here.served() == quiet
                await until(lambda: here.victim.bans.peer(host.peer_id) is not None, seconds=20)
                await until(lambda: host.peer_id not in here.victim.connected())
                assert await here.served() == quiet
                nursery.cancel_scope.cancel()
        assert here.victim.bans.peer(here.honest.peer_id) is None
        assert here.victim.connected() == {here.honest.peer_id}
        await nothing_is_left(here.victim, tasks)


async def parked_bytes(attacker: Attacker) -> None:
    """As much as the window allows, on as many streams as there may be, in frames of one byte."""
    stream = await attacker.host.open_stream(attacker.victim.peer_id, SINK)
    raw = stream._fast
    for _ in range(50):
        for _ in range(600):
            await raw._mux.send_data(raw._number, 1, [memoryview(b"x")])
        await trio.lowlevel.checkpoint()
    attacker.host.parked.append(stream)  # type: ignore[attr-defined]


async def parked_windows(attacker: Attacker) -> None:
    stream = await attacker.host.open_stream(attacker.victim.peer_id, SINK)
    attacker.host.parked.append(stream)  # type: ignore[attr-defined]
    await stream._fast.write_parts([bytes(WINDOW_BYTES - 1000)])


@pytest.mark.parametrize("attack", [parked_bytes, parked_windows])
async def test_what_is_never_read_is_bounded_and_others_are_served(
    attack: Callable[[Attacker], Awaitable[None]],
):
    """Nobody breaks a rule: every stream keeps to its window."""
    async with scene() as here:
        quiet, most = await here.served(), 0
        async with open_host(seed(66), gossip=False, limits=LIMITS) as host:
            host.parked = []  # type: ignore[attr-defined]
            host.add_peer(info(here.victim))
            attacker = Attacker(host, here.victim)
            await attacker.connection()

            async def again() -> None:
                nonlocal most
                while True:
                    with suppress(*GONE, StreamError):
                        await attack(attacker)
                    most = max(most, here.victim._peers.memory.used)
                    await trio.lowlevel.checkpoint()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(again)
                assert await here.served() == quiet
                await until(lambda: most > LIMITS.buffer_bytes // 2, seconds=20)
                assert await here.served() == quiet
                nursery.cancel_scope.cancel()
        assert most <= LIMITS.buffer_bytes
        assert here.victim.bans.peer(host.peer_id) is None
        await until(lambda: here.victim._peers.memory.used == 0)


async def test_what_a_peer_says_of_itself_is_bounded():
    """Identify pushes of a megabyte, again and again."""
    async with scene() as here:
        quiet = await here.served()
        async with open_host(seed(66), limits=LIMITS) as host:
            host.add_peer(info(here.victim))
            attacker = Attacker(host, here.victim)
            handled = 0
            from libp2p.identity.identify.pb.identify_pb2 import Identify

            names = [f"/p/{number}" for number in range(60_000)]
            large = Identify(protocols=names).SerializeToString()

            async def push() -> None:
                nonlocal handled
                while True:
                    with suppress(*GONE, StreamError):
                        stream = await negotiate(await attacker.connection(), ID_PUSH)
                        await stream.write(encode_varint_prefixed(large))
                        while await stream.read(100):
                            pass
                    handled += 1
                    await trio.lowlevel.checkpoint()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(push)
                assert await here.served() == quiet
                await until(lambda: handled > 20)
                nursery.cancel_scope.cancel()
            store = here.victim._inner.get_peerstore()
            assert len(store.get_protocols(host._inner.get_id())) <= 256
            account = here.victim._peers.account(host._inner.get_id())
            assert account.pushes is not None
            assert account.pushes.value > 8
