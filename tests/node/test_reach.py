"""Who can be reached, who says so, and what hostile askers get."""

import math
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import pytest
import trio

from tdmld.chain.codec import decode, encode
from tdmld.chain.crypto import KeyPair, verify
from tdmld.chain.transactions import DIAL_OPEN, DIAL_PAIR, receipt_bytes, sign_receipt
from tdmld.node import reach, reachask, reachwitness
from tdmld.node.errors import MachineError
from tdmld.node.peers import PeerBook, PeerRecord
from tdmld.node.reach import Reachability, ReachPolicy
from tdmld.node.reachask import Trial
from tdmld.node.reachbook import Offers
from tdmld.node.reachverdict import announced, candidates, verdict
from tdmld.node.reachwire import (
    MAX_REACH_BYTES,
    Answer,
    DialBack,
    DialDaemon,
    Observe,
    Observed,
    Pair,
    Reached,
    Receipt,
    Refused,
    Request,
    ip_of,
    protocol,
)
from tdmld.node.reachwitness import Witness
from tdmld.p2p import Host, Limits, PeerInfo, Stream, open_host
from tdmld.p2p.dialback import Prober
from tdmld.p2p.errors import P2PError, StreamError
from tdmld.p2p.upnp import Mapping, PortMapper
from tests.p2p.support import free_port, info, until

CHAIN = b"c" * 32
RELAYED = f"/ip4/127.0.0.1/tcp/9/p2p/{KeyPair(b'r' * 32).address}/p2p-circuit"


class FakeCarrier:
    """A carrier in this process: its host, and what the daemon asks of it."""

    def __init__(self, host: Host, seed: bytes) -> None:
        self.host = host
        self.addresses = host.listening
        self.changed = trio.Event()
        self.relays: list[PeerInfo] = []
        self.relaying: tuple[bytes, ...] = ()
        self.direct: dict[str, bool] = {}
        self.dials = 0
        self._prober = Prober(seed)

    async def dial_back(self, session: str, addresses: Sequence[str]) -> str:
        self.dials += 1
        try:
            return await self._prober.probe(session, addresses)
        except P2PError as error:  # as the control socket gives it on
            raise MachineError(str(error)) from error

    async def connect_direct(self, session: str, addresses: Sequence[str], seconds: float) -> bool:
        if session in self.direct:
            return self.direct[session]
        self.host.add_peer(PeerInfo(session, tuple(addresses)))
        return await self.host.connect_direct(session, seconds)

    async def set_relays(self, relays: Sequence[PeerInfo]) -> None:
        self.relays = list(relays)

    async def set_relaying(self, keys: Sequence[bytes]) -> None:
        self.relaying = tuple(keys)


@dataclass
class Node:
    key: KeyPair
    session: KeyPair
    host: Host
    carrier: FakeCarrier
    book: PeerBook
    reach: Reachability
    height: list[int] = field(default_factory=lambda: [100])

    def record(self, *, relays: bool = False) -> PeerRecord:
        return PeerRecord(
            self.key.public,
            time.time_ns(),
            self.host.listening,
            self.session.public,
            self.carrier.addresses,
            relays,
        )

    async def ask(self, witness: "Node", request: Request) -> Answer:
        stream = await self.host.open_stream(witness.key.address, protocol(CHAIN))
        async with stream:
            await stream.send(encode(request))
            raw = await stream.receive(MAX_REACH_BYTES)
        return decode(Answer, raw, MAX_REACH_BYTES)  # type: ignore[arg-type]


@asynccontextmanager
async def nodes(count: int, policy: ReachPolicy | None = None) -> AsyncIterator[list[Node]]:
    """Nodes that are all connected and know each other; nobody's `reach.run` runs. Each has an
    owner of its own."""
    made: list[Node] = []
    limits = Limits(connections=32)
    async with AsyncExitStack() as stack:
        for number in range(1, count + 1):
            key, session = KeyPair(bytes([number]) * 32), KeyPair(bytes([100 + number]) * 32)
            host = await stack.enter_async_context(open_host(key.seed, gossip=False, limits=limits))
            outside = await stack.enter_async_context(
                open_host(session.seed, gossip=False, limits=limits)
            )
            carrier = FakeCarrier(outside, session.seed)
            book = PeerBook(CHAIN)
            height = [100]
            service = Reachability(
                host,
                key,
                CHAIN,
                book,
                carrier,  # type: ignore[arg-type]
                session.public,
                policy or ReachPolicy(receipt_blocks=100, receipts=count - 1),
                height=lambda height=height: height[0],  # type: ignore[misc]
                owner_of=lambda node: b"owner of " + node,
            )
            made.append(Node(key, session, host, carrier, book, service, height))
        tell_all(made)
        for a in made:
            for b in made:
                if a is not b and a.key.address < b.key.address:
                    a.host.add_peer(info(b.host))
        await until(lambda: all(len(node.host.connected()) == count - 1 for node in made))
        yield made


def tell_all(made: list[Node], *, relays: bool = False) -> None:
    """Everybody has everybody's newest record."""
    for node in made:
        signed = node.book.sign(node.key, node.record(relays=relays))
        for other in made:
            if other is not node:
                other.book.add(signed)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "EARLIEST_SECONDS", 0.02)
    monkeypatch.setattr(reach, "CHECK_SECONDS", 0.2)
    monkeypatch.setattr(reach, "PAIR_FIRST_SECONDS", 0.1)


# the witness -------------------------------------------------------------------------------------


async def test_a_witness_says_where_it_sees_the_asker() -> None:
    async with nodes(2) as (a, b):
        answer = await a.ask(b, Observe())
        assert isinstance(answer, Observed)
        assert answer.ip == "127.0.0.1"
        assert abs(answer.time_ms - time.time_ns() // 1_000_000) < 5000


async def test_a_carrier_that_was_dialled_gets_a_receipt_that_verifies() -> None:
    async with nodes(2) as (a, b):
        answer = await a.ask(b, DialBack(a.session.public, a.carrier.addresses))
        assert isinstance(answer, Receipt)
        receipt = answer.receipt
        assert (receipt.witness, receipt.kind, receipt.height) == (b.key.public, DIAL_OPEN, 100)
        message = receipt_bytes(a.key.public, a.session.public, DIAL_OPEN, 100)
        assert verify(b.key.public, "dial", CHAIN, message, receipt.signature)
        assert answer.address == a.carrier.addresses[0]
        assert a.session.address not in b.carrier.host.connected()


async def test_a_carrier_that_is_not_there_gets_none() -> None:
    async with nodes(2) as (a, b):
        dead = (f"/ip4/127.0.0.1/tcp/{free_port()}",)
        answer = await a.ask(b, DialBack(a.session.public, dead))
        assert isinstance(answer, Refused)
        assert answer.tried
        assert "refused" in answer.reason


async def test_the_daemon_itself_is_dialled_too() -> None:
    async with nodes(2) as (a, b):
        assert await a.ask(b, DialDaemon(a.host.listening)) == Reached(a.host.listening[0])


@pytest.mark.parametrize("foreign", ["/ip4/127.0.0.2/tcp/80", "/ip4/8.8.8.8/tcp/53"])
async def test_nobody_else_is_dialled(foreign: str) -> None:
    async with nodes(2) as (a, b):
        mixed = (*a.carrier.addresses, foreign)
        for request in (DialBack(a.session.public, mixed), DialDaemon(mixed)):
            answer = await a.ask(b, request)
            assert isinstance(answer, Refused)
            assert "is not where I see you" in answer.reason
            assert not answer.tried
        assert b.carrier.dials == 0


async def test_a_session_of_somebody_else_gets_no_receipt() -> None:
    async with nodes(3) as (a, b, c):
        for request in (
            DialBack(c.session.public, c.carrier.addresses),
            Pair(c.session.public),
        ):
            answer = await a.ask(b, request)
            assert isinstance(answer, Refused)
            assert "does not name the session" in answer.reason
        assert b.carrier.dials == 0


async def test_another_identity_at_the_address_gets_no_receipt() -> None:
    async with nodes(3) as (a, b, c):
        answer = await a.ask(b, DialBack(a.session.public, c.carrier.addresses))
        assert isinstance(answer, Refused)
        assert answer.tried


async def test_a_flood_of_requests_is_refused_and_others_are_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with nodes(3) as (a, b, c):
        answers = [await a.ask(b, DialDaemon(a.host.listening)) for _ in range(30)]
        refused = [answer for answer in answers if isinstance(answer, Refused)]
        assert 5 <= len(refused) <= 15
        assert "too many requests" in refused[-1].reason
        assert isinstance(await c.ask(b, DialDaemon(c.host.listening)), Reached)


async def test_many_identities_share_what_their_address_may() -> None:
    async with nodes(1) as (a,):
        witness = Witness(a.host, a.key, CHAIN, a.book, a.carrier, lambda: 1, lambda node: node)
        peers = [f"identity {number}" for number in range(400)]
        granted = sum(witness._allowed(peer, "203.0.113.7", 100, dials=True) for peer in peers)
        assert 60 <= granted <= 70
        others = sum(
            witness._allowed(peer, f"203.0.113.{number % 200}", 100, dials=True)
            for number, peer in enumerate(peers)
        )
        assert granted + others <= 125


async def test_dials_at_a_time_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reachwitness, "DIALS_AT_ONCE", 2)
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    silent = (f"/ip4/127.0.0.1/tcp/{listeners[0].socket.getsockname()[1]}",)
    async with nodes(2) as (a, b), trio.open_nursery() as nursery:
        answers: list[Answer] = []

        async def ask() -> None:
            answers.append(await a.ask(b, DialDaemon(silent)))

        for _ in range(5):
            nursery.start_soon(ask)
        await until(lambda: len(answers) == 3)
        assert all("too many dials" in a.reason for a in answers if isinstance(a, Refused))
        nursery.cancel_scope.cancel()


async def test_garbage_ends_its_stream_and_in_the_end_its_sender() -> None:
    async with nodes(2) as (a, b):
        for garbage in (b"", b"\xc1", encode(Observe())[:-1], b"x" * (MAX_REACH_BYTES + 1)) * 10:
            if b.host.bans.peer(a.key.address) is not None:
                break
            stream = await a.host.open_stream(b.key.address, protocol(CHAIN))
            await stream.send(garbage)
            with pytest.raises(StreamError):
                await stream.receive(MAX_REACH_BYTES)
        assert b.host.bans.peer(a.key.address) is not None


async def test_a_direct_path_between_carriers_is_witnessed() -> None:
    async with nodes(2) as (a, b):
        answer = await a.ask(b, Pair(a.session.public))
        assert isinstance(answer, Receipt)
        assert answer.receipt.kind == DIAL_PAIR
        b.carrier.direct[a.session.address] = False
        assert isinstance(await a.ask(b, Pair(a.session.public)), Refused)


async def test_a_pair_is_sought_where_the_asker_is_seen_and_through_known_relays() -> None:
    async with nodes(3) as (a, b, relay):
        tell_all([relay], relays=True)
        for signed in relay.book.signed():
            b.book.add(signed)
        through = f"{relay.carrier.addresses[0]}/p2p/{relay.session.address}/p2p-circuit"
        elsewhere = f"/ip4/8.8.8.8/tcp/53/p2p/{relay.session.address}/p2p-circuit"
        claimed = (a.carrier.addresses[0], "/ip4/8.8.8.8/tcp/53", RELAYED, through, elsewhere)
        record = PeerRecord(a.key.public, time.time_ns(), (), a.session.public, claimed, False)
        b.book.add(a.book.sign(a.key, record))
        dialled: list[str] = []

        async def note(session: str, addresses: Sequence[str], seconds: float) -> bool:
            dialled.extend(addresses)
            return False

        b.carrier.connect_direct = note  # type: ignore[method-assign]
        assert isinstance(await a.ask(b, Pair(a.session.public)), Refused)
        assert dialled == [a.carrier.addresses[0], through]


# the service -------------------------------------------------------------------------------------


async def test_a_node_that_is_dialled_is_open_relays_and_has_receipts() -> None:
    async with nodes(3) as made, trio.open_nursery() as nursery:
        a = made[0]
        assert not a.reach.settled
        nursery.start_soon(a.reach.run)
        await until(lambda: len(a.reach.receipts()) == 2)
        await until(lambda: bool(a.carrier.relaying))
        assert (a.reach.daemon_state, a.reach.carrier_state) == ("open", "open")
        assert a.reach.settled
        witnesses = [receipt.witness for receipt in a.reach.receipts()]
        assert witnesses == sorted(node.key.public for node in made[1:])
        assert made[1].key.public in a.carrier.relaying
        assert a.reach.carrier_addresses == a.carrier.addresses
        nursery.cancel_scope.cancel()


async def test_a_node_that_nobody_can_dial_looks_for_relays() -> None:
    async with nodes(3) as made, trio.open_nursery() as nursery:
        a, relay, _ = made
        tell_all([relay], relays=True)
        for signed in relay.book.signed():
            a.book.add(signed)
        shut = (f"/ip4/127.0.0.1/tcp/{free_port()}",)
        a.carrier.addresses = shut
        nursery.start_soon(a.reach.run)
        await until(lambda: bool(a.carrier.relays))
        assert a.reach.carrier_state == "closed"
        assert a.carrier.relays == [PeerInfo(relay.session.address, relay.carrier.addresses)]
        assert a.reach.receipts() == ()
        assert not a.carrier.relaying
        changed = a.reach.changed
        a.carrier.addresses = (*shut, RELAYED)
        a.carrier.changed.set()
        a.carrier.changed = trio.Event()
        with trio.fail_after(5):
            await changed.wait()
        assert RELAYED in a.reach.carrier_addresses
        nursery.cancel_scope.cancel()


async def test_two_that_nobody_can_dial_seek_a_direct_path() -> None:
    async with nodes(3) as made, trio.open_nursery() as nursery:
        a, b, _ = made
        behind = b.record().__class__(
            b.key.public, time.time_ns(), (), b.session.public, (RELAYED,), False
        )
        a.book.add(b.book.sign(b.key, behind))
        a.carrier.addresses = (f"/ip4/127.0.0.1/tcp/{free_port()}",)
        tell_all([a])
        for other in made[1:]:
            for signed in a.book.signed():
                other.book.add(signed)
        a.carrier.direct[b.session.address] = True
        b.carrier.direct[a.session.address] = False  # the first attempt fails
        nursery.start_soon(a.reach.run)
        await until(lambda: any(due < math.inf for due, _ in a.reach._pair_due.values()))
        assert not a.reach.settled
        b.carrier.direct[a.session.address] = True
        await until(lambda: a.reach.settled)
        assert [receipt.kind for receipt in a.reach.receipts()] == [DIAL_PAIR]
        nursery.cancel_scope.cancel()


async def test_receipts_grow_old_and_are_renewed() -> None:
    async with nodes(2) as (a, b), trio.open_nursery() as nursery:
        nursery.start_soon(a.reach.run)
        await until(lambda: len(a.reach.receipts()) == 1)
        a.height[0] = b.height[0] = 170
        await until(lambda: bool(a.reach.receipts()) and a.reach.receipts()[0].height == 170)
        a.height[0] = 500
        assert a.reach.receipts() == ()
        nursery.cancel_scope.cancel()


async def test_one_owner_has_one_voice() -> None:
    async with nodes(3) as made:
        a = made[0]
        assert len(a.reach.witnesses()) == 2
        offers = Offers(
            a.book, a.key.public, lambda node: b"me" if node == a.key.public else b"the other"
        )
        assert len(offers.witnesses(a.host.connected(), (), 8)) == 1


async def test_a_pair_receipt_is_collected_on_request() -> None:
    async with nodes(2) as (a, b):
        receipt = await a.reach.pair_receipt(b.key.public)
        assert receipt is not None
        assert a.reach.receipts() == (receipt,)
        b.carrier.direct[a.session.address] = False
        assert await a.reach.pair_receipt(b.key.public) is None


async def test_a_witness_that_lies_is_not_believed() -> None:
    async with nodes(2) as (a, b):

        async def lie(stream: Stream) -> None:
            await stream.receive(MAX_REACH_BYTES)
            # Of its own, but for another session than ours.
            forged = sign_receipt(b.key, CHAIN, a.key.public, b"s" * 32, DIAL_PAIR, 100)
            await stream.send(encode(Receipt(forged, "")))

        b.host.set_handler(protocol(CHAIN), lie)
        assert await a.reach.pair_receipt(b.key.public) is None
        assert a.reach.receipts() == ()


async def test_refresh_asks_again() -> None:
    async with nodes(2) as (a, b), trio.open_nursery() as nursery:
        nursery.start_soon(a.reach.run)
        await until(lambda: bool(a.reach.findings))
        before = a.reach.findings[b.key.address].at
        await a.reach.refresh(10)
        assert a.reach.findings[b.key.address].at > before
        nursery.cancel_scope.cancel()


async def test_a_witness_that_is_tired_takes_nothing_back() -> None:
    async with nodes(2) as (a, b), trio.open_nursery() as nursery:
        nursery.start_soon(a.reach.run)
        await until(lambda: a.reach.carrier_state == "open")

        async def refuse(stream: Stream) -> None:
            await stream.receive(MAX_REACH_BYTES)
            await stream.send(encode(Refused("too many requests", False)))

        b.host.set_handler(protocol(CHAIN), refuse)
        await a.reach.refresh(10)
        assert a.reach.carrier_state == "open"
        assert len(a.reach.receipts()) == 1
        nursery.cancel_scope.cancel()


async def test_a_witness_that_is_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reachask, "OBSERVE_SECONDS", 0.2)
    async with nodes(2) as (a, b), trio.open_nursery() as nursery:

        async def silent(stream: Stream) -> None:
            await trio.sleep_forever()

        b.host.set_handler(protocol(CHAIN), silent)
        nursery.start_soon(a.reach.run)
        await until(lambda: bool(a.reach.findings))
        assert "no answer" in a.reach.findings[b.key.address].failure
        assert a.reach.carrier_state == "unknown"
        nursery.cancel_scope.cancel()


async def test_a_forwarded_port_is_announced_and_dialled() -> None:
    async with nodes(1) as (a,):
        port = int(a.carrier.addresses[0].rpartition("/")[2])
        before = a.reach.carrier_addresses
        a.reach.mapper = PortMapper((port,))
        a.reach.mapper.state.mappings = {port: Mapping("", "198.41.0.4", 9000, "")}
        assert a.reach.carrier_addresses == ("/ip4/198.41.0.4/tcp/9000", *before)
        assert a.reach.daemon_addresses == a.host.listening
        assert a.reach._carrier_at("198.41.0.4") == ("/ip4/198.41.0.4/tcp/9000",)
        a.reach.mapper.state.mappings = {port: Mapping("", "100.64.0.9", 9000, "")}
        assert a.reach.carrier_addresses == before


async def test_without_anybody_to_ask_it_settles_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reach, "PATIENCE_SECONDS", 0.1)
    async with nodes(1) as (a,), trio.open_nursery() as nursery:
        nursery.start_soon(a.reach.run)
        await until(lambda: a.reach.settled)
        assert a.reach.carrier_state == "unknown"
        nursery.cancel_scope.cancel()


# conclusions -------------------------------------------------------------------------------------

YES, NO, MAYBE = Trial(True, "/ip4/1.2.3.4/tcp/1"), Trial(False, why="no"), Trial(None)


@pytest.mark.parametrize(
    ("trials", "state"),
    [
        ([], "unknown"),
        ([(MAYBE, True)], "unknown"),
        ([(YES, False)], "open"),
        ([(NO, False)], "closed"),
        ([(YES, True), (NO, True)], "open"),
        ([(YES, True), (NO, True), (NO, True)], "closed"),
        ([(YES, False), (YES, False), (NO, True)], "closed"),
        ([(NO, False), (YES, True)], "open"),
    ],
)
def test_what_trials_mean(trials: list[tuple[Trial, bool]], state: str) -> None:
    assert verdict(trials) == state


def test_candidates_are_ours_at_the_address_that_is_seen() -> None:
    listening = ("/ip4/192.168.1.5/tcp/4001",)
    assert candidates("203.0.113.7", listening, ("/ip4/203.0.113.7/tcp/9000",)) == (
        "/ip4/203.0.113.7/tcp/9000",
        "/ip4/203.0.113.7/tcp/4001",
    )
    assert candidates("192.168.1.5", listening, ()) == ("/ip4/192.168.1.5/tcp/4001",)
    assert candidates("203.0.113.7", ("/ip4/127.0.0.1/tcp/4001",), ()) == ()
    assert candidates("127.0.0.1", ("/ip4/127.0.0.1/tcp/4001",), ()) == ("/ip4/127.0.0.1/tcp/4001",)
    assert candidates("", listening, ()) == ()


def test_what_was_tried_in_vain_is_not_announced() -> None:
    mapped, relayed, own = ["/ip4/1.1.1.1/tcp/1"], [RELAYED], ["/ip4/10.0.0.2/tcp/1"]
    assert announced([], [NO], mapped, relayed, own, state="closed") == (RELAYED, *own)
    assert announced(["/dns4/me.example/tcp/1"], [YES], mapped, [], own, state="open") == (
        "/dns4/me.example/tcp/1",
        "/ip4/1.2.3.4/tcp/1",
        "/ip4/1.1.1.1/tcp/1",
        "/ip4/10.0.0.2/tcp/1",
    )


@pytest.mark.parametrize(
    ("text", "ip"),
    [
        ("/ip4/1.2.3.4/tcp/5", "1.2.3.4"),
        ("/ip6/::ffff:1.2.3.4/tcp/5", "1.2.3.4"),
        ("/ip6/FD00::2/tcp/5", "fd00::2"),
        ("/dns4/a.example/tcp/5", ""),
        (RELAYED, ""),
        ("", ""),
    ],
)
def test_ip_addresses_have_one_spelling(text: str, ip: str) -> None:
    assert ip_of(text) == ip
