"""What a witness that lies, or does half of what it is asked, does to the asker."""

import time
from collections.abc import Sequence

import msgspec
import pytest
import trio

from tdmld.chain.codec import decode, encode
from tdmld.chain.crypto import KeyPair
from tdmld.chain.transactions import DIAL_OPEN, DIAL_PAIR, sign_receipt
from tdmld.node import reach
from tdmld.node.errors import CarrierUnavailable
from tdmld.node.peers import PeerRecord
from tdmld.node.reachask import is_near
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
    protocol,
)
from tdmld.node.reachwitness import Witness
from tdmld.p2p import Stream
from tests.node.test_reach import CHAIN, RELAYED, Node, nodes
from tests.p2p.support import free_port, until


def answers(witness: Node, asker: Node, **said: str | None) -> list[Request]:
    """Let a witness answer what `said` says: `seen`, where it dialled the `daemon` and the
    `carrier` (None: it refuses to dial). Gives what it is asked, as it comes."""
    asked: list[Request] = []

    async def serve(stream: Stream) -> None:
        raw = await stream.receive(MAX_REACH_BYTES)
        request: Request = decode(Request, raw, MAX_REACH_BYTES)  # type: ignore[arg-type]
        asked.append(request)
        session = asker.session.public
        receipt = sign_receipt(witness.key, CHAIN, asker.key.public, session, DIAL_OPEN, 100)
        answer: Answer = Refused("too many dials are under way here", False)
        match request:
            case Observe():
                answer = Observed(said["seen"] or "", 0)
            case DialDaemon() if said["daemon"] is not None:
                answer = Reached(said["daemon"])
            case DialBack() if said["carrier"] is not None:
                answer = Receipt(receipt, said["carrier"])
        await stream.send(encode(answer))

    witness.host.set_handler(protocol(CHAIN), serve)
    return asked


@pytest.mark.parametrize("at", ["/ip4/8.8.8.8/tcp/53", "/ip4/999.1.1.1/tcp/1", "no address", ""])
async def test_a_witness_cannot_put_an_address_into_our_record(at: str) -> None:
    """A record that others cannot decode would even end this daemon."""
    async with nodes(2) as (a, b), trio.open_nursery() as nursery:
        answers(b, a, seen="127.0.0.1", daemon=a.host.listening[0], carrier=at)
        before = a.reach.carrier_addresses
        nursery.start_soon(a.reach.run)
        await until(lambda: a.reach.daemon_state == "open")
        assert a.reach.carrier_addresses == before
        assert a.reach.carrier_state == "unknown"
        nursery.cancel_scope.cancel()


async def test_a_witness_that_sees_us_nowhere_is_not_asked_to_dial() -> None:
    async with nodes(2) as (a, b), trio.open_nursery() as nursery:
        nowhere = "999.999.999.999"
        a.carrier.addresses = ("/ip4/0.0.0.0/tcp/9",)
        asked = answers(b, a, seen=nowhere, daemon=None, carrier=f"/ip4/{nowhere}/tcp/9")
        nursery.start_soon(a.reach.run)
        await until(lambda: bool(a.reach.findings))
        assert asked == [Observe()]
        nursery.cancel_scope.cancel()


async def test_a_witness_that_dialled_one_of_two_is_asked_again_soon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It may be busy, or not have our newest record yet."""
    monkeypatch.setattr(reach, "EARLIEST_SECONDS", 0.01)
    monkeypatch.setattr(reach, "CHECK_SECONDS", 0.1)
    monkeypatch.setattr(reach, "FAILURE_SECONDS", 0.3)
    async with nodes(2) as (a, b), trio.open_nursery() as nursery:
        asked = answers(b, a, seen="127.0.0.1", daemon=a.host.listening[0], carrier=None)
        nursery.start_soon(a.reach.run)
        await until(lambda: sum(isinstance(request, DialBack) for request in asked) > 1, 5)
        nursery.cancel_scope.cancel()


async def test_a_refusal_without_a_dial_takes_back_no_half_of_what_was_found() -> None:
    async with nodes(2) as (a, b), trio.open_nursery() as nursery:
        at = a.carrier.addresses[0]
        answers(b, a, seen="127.0.0.1", daemon=a.host.listening[0], carrier=at)
        nursery.start_soon(a.reach.run)
        await until(lambda: a.reach.carrier_state == "open")
        answers(b, a, seen="127.0.0.1", daemon=a.host.listening[0], carrier=None)
        await a.reach.refresh(10)
        assert a.reach.carrier_state == "open"
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("owner", [None, b"the same for all"])
async def test_whose_word_does_not_count_is_not_asked_all_the_time(
    owner: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reach, "EARLIEST_SECONDS", 0.01)
    monkeypatch.setattr(reach, "CHECK_SECONDS", 0.05)
    async with nodes(2) as (a, b), trio.open_nursery() as nursery:
        a.reach._owner_of = lambda node: owner
        nursery.start_soon(a.reach.run)
        await until(lambda: a.reach.carrier_state == "open")
        await trio.sleep(0.5)
        assert b.carrier.dials == 1
        assert a.reach.receipts() == ()
        nursery.cancel_scope.cancel()


async def test_records_of_nodes_that_are_gone_keep_nobody_from_a_direct_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reach, "EARLIEST_SECONDS", 0.01)
    async with nodes(2) as (a, b), trio.open_nursery() as nursery:
        behind = PeerRecord(b.key.public, time.time_ns(), (), b.session.public, (RELAYED,), False)
        a.book.add(b.book.sign(b.key, behind))
        for n in range(150, 200):  # most of them come before b in the order in which they are tried
            gone = KeyPair(bytes([n]) * 32)
            a.book.sign(gone, msgspec.structs.replace(behind, node=gone.public))
        a.carrier.addresses = (f"/ip4/127.0.0.1/tcp/{free_port()}",)
        b.book.add(a.book.sign(a.key, a.record()))
        a.carrier.direct[b.session.address] = b.carrier.direct[a.session.address] = True
        nursery.start_soon(a.reach.run)
        await until(lambda: [r.kind for r in a.reach.receipts()] == [DIAL_PAIR])
        nursery.cancel_scope.cancel()


async def test_who_moves_to_another_network_is_dialled_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or what was found of the old one would be announced, and believed, for ten minutes."""
    monkeypatch.setattr(reach, "EARLIEST_SECONDS", 0.01)
    monkeypatch.setattr(reach, "CHECK_SECONDS", 0.05)
    async with nodes(2) as (a, b), trio.open_nursery() as nursery:
        nursery.start_soon(a.reach.run)
        await until(lambda: a.reach.settled)
        assert b.carrier.dials == 1
        monkeypatch.setattr(reach, "interface_addresses", lambda: ("192.168.7.7",))
        await until(lambda: b.carrier.dials == 2, 5)
        # That the router has another address shows only in connections that are made anew.
        await b.host.disconnect(a.key.address)
        await until(lambda: b.carrier.dials == 3, 5)
        nursery.cancel_scope.cancel()


# Witnesses that are asked


async def test_whoever_calls_itself_a_relay_is_not_dialled_for_a_pair() -> None:
    """Anybody may sign a record that names a victim's address."""
    async with nodes(3) as (a, b, relay):
        claims = msgspec.structs.replace(
            relay.record(relays=True), session_addresses=("/ip4/127.0.0.9/tcp/25",)
        )
        b.book.add(relay.book.sign(relay.key, claims))
        through = f"/ip4/127.0.0.9/tcp/25/p2p/{relay.session.address}/p2p-circuit"
        b.book.add(
            a.book.sign(a.key, msgspec.structs.replace(a.record(), session_addresses=(through,)))
        )
        dialled: list[str] = []

        async def note(session: str, addresses: Sequence[str], seconds: float) -> bool:
            dialled.extend(addresses)
            return False

        b.carrier.connect_direct = note  # type: ignore[method-assign]
        owners: dict[bytes, bytes] = {}
        Witness(b.host, b.key, CHAIN, b.book, b.carrier, lambda: 1, owners.get)
        for expected in ([], [through]):
            await a.ask(b, Pair(a.session.public))
            assert dialled == expected
            owners[relay.key.public] = b"an owner"


async def test_a_carrier_that_is_being_restarted_has_dialled_nobody() -> None:
    async with nodes(2) as (a, b):

        async def gone(session: str, addresses: Sequence[str]) -> str:
            raise CarrierUnavailable("the carrier process is being restarted; try again soon")

        b.carrier.dial_back = gone  # type: ignore[method-assign]
        answer = await a.ask(b, DialBack(a.session.public, a.carrier.addresses))
        assert isinstance(answer, Refused)
        assert not answer.tried


@pytest.mark.parametrize(
    ("us", "witness", "near"),
    [
        ("8.8.8.8", "9.9.9.9", False),
        ("8.8.8.8", "8.8.8.8", True),
        ("192.168.1.2", "192.168.1.3", True),
        ("127.0.0.1", "127.0.0.1", True),
        ("100.64.0.9", "9.9.9.9", True),
        ("2a00:1::1", "2a00:1::2", True),
        ("2a00:1::1", "2a00:1:0:1::2", False),
        ("2a00:1::1", "", False),
        ("8.8.8.8", "2a00:1::1", False),
    ],
)
def test_who_stands_on_our_side_of_the_router(us: str, witness: str, near: bool) -> None:
    assert is_near(us, witness) == near
