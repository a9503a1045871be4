"""Being reached through relays: reservations, relayed addresses, circuits."""

from contextlib import suppress
from typing import Any

import pytest
import trio
import trio.testing
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import StopMessage

from tdmld.p2p import PeerInfo, RelayPolicy, circuit, rawstream
from tdmld.p2p.addresses import RelayedAddress, TcpAddress, parse_address, parse_direct
from tdmld.p2p.connector import SIMULTANEOUS_SECONDS, decide
from tdmld.p2p.errors import AddressInvalid, DialFailed, StreamBroken
from tests.p2p.relays import OPEN, connect, path, relayed_hosts, relayed_only, reserve
from tests.p2p.support import ECHO, echo, free_port, hosts, info, says_hello, until

RELAY_ID = "12D3KooWK99VoVxNE7XzyBwXEzW7xhK7Gpv85r9F3V3fyKSUKPH5"


# Addresses


def test_a_relayed_address_names_the_relay_and_how_to_reach_it():
    text = f"/ip4/1.2.3.4/tcp/4001/p2p/{RELAY_ID}/p2p-circuit"
    address = parse_address(text)
    direct = TcpAddress("1.2.3.4", 4001, "/ip4/1.2.3.4/tcp/4001")
    assert address == RelayedAddress(direct, ID.from_base58(RELAY_ID), text)
    assert parse_address(direct.text) == direct


@pytest.mark.parametrize(
    "text",
    [
        f"/ip4/1.2.3.4/tcp/4001/p2p/{RELAY_ID}",
        "/ip4/1.2.3.4/tcp/4001/p2p-circuit",
        f"/p2p/{RELAY_ID}/p2p-circuit",
        f"/ip4/1.2.3.4/tcp/4001/p2p/{RELAY_ID}/p2p-circuit/p2p/{RELAY_ID}",
        f"/ip4/1.2.3.4/udp/4001/p2p/{RELAY_ID}/p2p-circuit",
        f"/ip4/1.2.3.4/tcp/4001/p2p/{RELAY_ID}/p2p-circuit/p2p/{RELAY_ID}/p2p-circuit",
    ],
)
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(AddressInvalid):
        parse_address(text)


def test_nobody_listens_on_a_relayed_address():
    with pytest.raises(AddressInvalid, match="direct"):
        parse_direct(f"/ip4/1.2.3.4/tcp/4001/p2p/{RELAY_ID}/p2p-circuit")


# Which connection stays


@pytest.mark.parametrize("existing", ["inbound", "outbound"])
@pytest.mark.parametrize("new", ["inbound", "outbound"])
@pytest.mark.parametrize("age", [0.0, 100.0])
@pytest.mark.parametrize("smaller", [True, False])
def test_a_direct_connection_replaces_a_relayed_one(
    existing: Any, new: Any, age: float, smaller: bool
) -> None:
    paths: Any = {"existing_path": "relayed", "new_path": "direct"}
    assert decide(existing, age, new, we_are_smaller=smaller, **paths) == "replace"


@pytest.mark.parametrize("age", [0.0, SIMULTANEOUS_SECONDS + 1])
def test_a_relayed_connection_replaces_a_direct_one_only_when_the_peer_has_lost_that(
    age: float,
) -> None:
    paths: Any = {"existing_path": "direct", "new_path": "relayed"}
    accepted = decide("outbound", age, "inbound", we_are_smaller=True, **paths)
    assert accepted == ("replace" if age > SIMULTANEOUS_SECONDS else "refuse")
    for smaller in (True, False):
        assert decide("inbound", age, "outbound", we_are_smaller=smaller, **paths) == "refuse"


async def test_nobody_dials_while_a_connection_is_being_replaced():
    async with hosts(2) as (a, b):
        peer_id, where = ID.from_base58(b.peer_id), [parse_address(b.addresses[0])]
        async with trio.open_nursery() as nursery, a._connector._admission_of(peer_id):
            nursery.start_soon(a._peers.connect_to, peer_id, where)
            await trio.testing.wait_all_tasks_blocked(0.2)
            assert not b._connector._pending
        assert b.peer_id in a.connected()


# Circuits


async def test_two_hosts_that_nobody_can_dial_speak_through_a_relay():
    async with relayed_hosts(2, OPEN) as ([relay], [a, b]):
        await connect(a, await reserve(b, relay))
        assert await says_hello(a, b.peer_id)
        assert await says_hello(b, a.peer_id)
        assert path(a, b) == path(b, a) == "relayed"
        [seen] = [peer for peer in a.peers() if peer.peer_id == b.peer_id]
        assert seen.remote == b.addresses[0]
        assert seen.transport == "/tls/1.0.0 /tdmld/fastmux/1.0.0"
        assert relay.relay_use is not None
        assert relay.relay_use.circuits == 1


async def test_a_direct_address_is_taken_although_a_relayed_one_stands_first():
    listen = ("/ip4/127.0.0.1/tcp/0",)
    async with relayed_hosts(2, OPEN, listen=listen) as ([relay], [a, b]):
        await reserve(b, relay)
        await connect(a, PeerInfo(b.peer_id, b.addresses[::-1]))
        assert path(a, b) == "direct"


async def test_the_relayed_address_is_used_when_the_direct_one_is_dead():
    async with relayed_hosts(2, OPEN) as ([relay], [a, b]):
        relayed = await reserve(b, relay)
        dead = "/ip4/127.0.0.1/tcp/1"
        await connect(a, PeerInfo(b.peer_id, (dead, *relayed.addresses)))
        assert path(a, b) == "relayed"


async def test_a_relay_cannot_pass_off_one_peer_for_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with relayed_hosts(3, OPEN) as ([relay], [a, b, c]):
        relayed = await reserve(b, relay)
        await reserve(c, relay)
        assert relay._relay is not None
        honest = relay._relay._stop

        async def splice(source: ID, target: ID, quota: Any) -> Any:
            return await honest(source, ID.from_base58(c.peer_id), quota)

        monkeypatch.setattr(relay._relay, "_stop", splice)
        a.add_peer(relayed)
        await until(lambda: any("the peer there is" in peer.last_error for peer in a.peers()))
        assert b.peer_id not in a.connected()
        assert a.peer_id not in c.connected()


async def test_a_circuit_is_not_taken_from_a_relay_without_a_reservation():
    async with hosts(2) as (a, b):
        a.add_peer(info(b))
        await until(lambda: a.peer_id in b.connected())
        conn = b._swarm.get_connections(ID.from_base58(a.peer_id))[0]
        stream = await rawstream.negotiate(conn, circuit.STOP)
        ask = StopMessage(type=StopMessage.CONNECT)
        ask.peer.id = ID.from_base58(RELAY_ID).to_bytes()
        with suppress(StreamBroken):
            await rawstream.send(stream, ask)
        with pytest.raises(StreamBroken):
            await rawstream.receive(stream, StopMessage)
        assert await says_hello(a, b.peer_id)


async def test_a_relay_is_not_reached_through_a_relay():
    async with relayed_hosts(2, OPEN) as ([relay], [a, b]):
        await connect(a, await reserve(b, relay))
        address = parse_direct(relay.addresses[0])
        through: RelayedAddress = circuit.relayed_through(address, ID.from_base58(b.peer_id))
        with pytest.raises(DialFailed, match="through another"):
            await a._circuits.dial(ID.from_base58(relay.peer_id), through)


# Reservations


async def test_addresses_grow_and_shrink_with_the_reservations_and_somebody_is_told():
    async with relayed_hosts(1, OPEN) as ([relay], [host]):
        changes = host.address_changes()
        assert host.addresses == ()
        await reserve(host, relay)
        with trio.fail_after(5):
            await changes.receive()
        assert host.addresses == (f"{relay.addresses[0]}/p2p/{relay.peer_id}/p2p-circuit",)
        host.set_relays([])
        with trio.fail_after(5):
            await changes.receive()
        assert host.addresses == ()


async def test_the_changes_end_with_the_host():
    async with hosts(1) as (host,):
        changes = host.address_changes()
    with pytest.raises(trio.EndOfChannel):
        await changes.receive()


async def test_no_more_relays_are_used_than_the_limits_say_the_first_by_preference():
    async with relayed_hosts(1, OPEN, OPEN, OPEN) as (relays, [host]):
        await reserve(host, *relays)
        await until(lambda: len(host.addresses) == 2)
        assert {relay.addresses[0] for relay in relays[:2]} == {
            address.split("/p2p/")[0] for address in host.addresses
        }
        assert relays[2].relay_use is not None
        assert relays[2].relay_use.reservations == 0


async def test_another_relay_takes_the_place_of_one_that_refuses():
    refusing = RelayPolicy(reservations=0)
    async with relayed_hosts(1, refusing, refusing, OPEN) as (relays, [host]):
        await reserve(host, *relays)
        assert relays[2].peer_id in host.addresses[0]


async def test_another_relay_takes_the_place_of_one_that_disconnects():
    async with relayed_hosts(2, OPEN, OPEN, OPEN) as (relays, [a, b]):
        await reserve(b, *relays)
        await until(lambda: len(b.addresses) == 2)
        lost = next(relay for relay in relays if relay.peer_id in b.addresses[0])
        b._circuits._candidates[ID.from_base58(lost.peer_id)].addresses = ()
        await lost.disconnect(b.peer_id)
        await until(lambda: lost.peer_id not in "".join(b.addresses) and len(b.addresses) == 2)
        await connect(a, relayed_only(b))
        assert await says_hello(a, b.peer_id)


async def test_a_reservation_is_renewed_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(circuit, "_RENEW_LEAST_SECONDS", 0.1)
    brief = RelayPolicy(strangers=OPEN.strangers, reservation_seconds=0.5)
    async with relayed_hosts(2, brief) as ([relay], [a, b]):
        relayed = await reserve(b, relay)
        changes = b.address_changes()
        await trio.sleep(1.0)  # two lives of a reservation
        with pytest.raises(trio.WouldBlock):
            changes.receive_nowait()
        await connect(a, relayed)
        assert await says_hello(a, b.peer_id)


async def test_wrong_candidates_change_nothing():
    async with relayed_hosts(1, OPEN) as ([relay], [host]):
        await reserve(host, relay)
        with pytest.raises(AddressInvalid):
            host.set_relays([PeerInfo(relay.peer_id, ("nonsense",))])
        assert len(host.addresses) == 1


async def test_a_host_that_listens_nowhere_works_outbound():
    async with relayed_hosts(1, OPEN) as ([open_one], [closed]):
        open_one.set_handler(ECHO, echo)
        assert closed.addresses == ()
        await connect(closed, info(open_one))
        assert await says_hello(closed, open_one.peer_id)
        assert await says_hello(open_one, closed.peer_id)


async def test_what_the_relay_holds_is_ciphertext(monkeypatch: pytest.MonkeyPatch) -> None:
    canary = b"a-canary-that-only-the-two-ends-may-see"
    seen = bytearray()
    async with relayed_hosts(2, OPEN) as ([relay], [a, b]):
        relayed = await reserve(b, relay)
        carry = relay._relay._carry  # type: ignore[union-attr]

        async def tapped(near: Any, far: Any, quota: Any) -> None:
            await carry(_Tap(near, seen), _Tap(far, seen), quota)

        monkeypatch.setattr(relay._relay, "_carry", tapped)
        await connect(a, relayed)
        stream = await a.open_stream(b.peer_id, ECHO)
        async with stream:
            await stream.send(canary * 1000)
            assert await stream.receive(1 << 20) == canary * 1000
        assert len(seen) > 2 * 1000 * len(canary)
        assert canary not in seen
        assert b.peer_id.encode() not in seen


class _Tap:
    """A stream of the relay, whose bytes are kept."""

    def __init__(self, inner: Any, seen: bytearray) -> None:
        self._inner = inner
        self._seen = seen

    async def read(self, size: int) -> bytes:
        data: bytes = await self._inner.read(size)
        self._seen += data
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


async def test_a_relay_that_takes_us_and_drops_us_is_troubled_less_and_less(monkeypatch):
    """Each time our addresses change, and everybody is told."""
    monkeypatch.setattr(circuit, "_RETRY_FIRST_SECONDS", 0.05)
    async with relayed_hosts(1, OPEN) as ([relay], [host]):
        for flaps in range(1, 5):
            await reserve(host, relay)
            [candidate] = host._circuits._candidates.values()
            await relay.disconnect(host.peer_id)
            await until(lambda: not relayed_only(host).addresses)
            assert candidate.failures == flaps
        monkeypatch.setattr(circuit, "_PROVEN_SECONDS", 0.1)
        await until(lambda: bool(relayed_only(host).addresses))
        await trio.sleep(0.2)
        await relay.disconnect(host.peer_id)
        await until(lambda: not relayed_only(host).addresses)
        assert candidate.failures == 1


async def test_a_relay_that_is_dead_for_days_ends_nothing():
    async with relayed_hosts(1, OPEN) as ([relay], [host]):
        dead = PeerInfo(RELAY_ID, (f"/ip4/127.0.0.1/tcp/{free_port()}",))
        host.set_relays([dead])
        [candidate] = host._circuits._candidates.values()
        candidate.failures = 5000
        await until(lambda: candidate.failures == 5001)
        host.set_relays([dead, info(relay)])
        await until(lambda: bool(relayed_only(host).addresses))
