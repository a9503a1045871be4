"""A dial back proves an identity at an address and leaves no trace."""

import pytest
import trio
import trio.testing

from tdmld.chain.crypto import KeyPair
from tdmld.p2p import dialback
from tdmld.p2p.dialback import Prober
from tdmld.p2p.errors import AddressInvalid, DialFailed
from tests.p2p.support import connected_pair, count_tasks, free_port, hosts, says_hello, seed, until


async def test_the_address_where_the_peer_is_comes_back() -> None:
    async with hosts(1) as (host,):
        dead = f"/ip4/127.0.0.1/tcp/{free_port()}"
        found = await Prober(seed(7)).probe(host.peer_id, [dead, *host.addresses])
        assert found == host.addresses[0]


async def test_nothing_is_registered_and_nothing_stays() -> None:
    async with hosts(1) as (host,):
        await Prober(seed(7)).probe(host.peer_id, host.addresses)
        await trio.testing.wait_all_tasks_blocked(0.1)
        before = count_tasks()
        for _ in range(5):
            await Prober(seed(7)).probe(host.peer_id, host.addresses)
        assert host.connected() == frozenset()
        await until(lambda: count_tasks() <= before)


async def test_a_connection_that_the_two_have_is_not_disturbed() -> None:
    async with connected_pair() as (a, b):
        since = [peer.connected_since for peer in a.peers()]
        await Prober(seed(1)).probe(b.peer_id, b.addresses)
        assert await says_hello(a, b.peer_id)
        assert await says_hello(b, a.peer_id)
        assert [peer.connected_since for peer in a.peers()] == since


async def test_another_identity_at_the_address_is_a_failure() -> None:
    async with hosts(1) as (host,):
        with pytest.raises(DialFailed, match="the peer there is"):
            await Prober(seed(7)).probe(KeyPair(seed(9)).address, host.addresses)


async def test_a_closed_port_is_a_failure_with_its_reason() -> None:
    with pytest.raises(DialFailed, match="refused"):
        await Prober(seed(7)).probe(KeyPair(seed(9)).address, [f"/ip4/127.0.0.1/tcp/{free_port()}"])


async def test_no_address_and_no_direct_address_are_refused() -> None:
    peer_id = KeyPair(seed(9)).address
    with pytest.raises(DialFailed, match="no direct address"):
        await Prober(seed(7)).probe(peer_id, [])
    relayed = f"/ip4/127.0.0.1/tcp/4001/p2p/{peer_id}/p2p-circuit"
    with pytest.raises(AddressInvalid):
        await Prober(seed(7)).probe(peer_id, [relayed])


async def test_one_who_accepts_and_is_silent_costs_bounded_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dialback, "ATTEMPT_SECONDS", 0.3)
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    async with listeners[0]:
        with trio.fail_after(3), pytest.raises(DialFailed, match="no answer"):
            await Prober(seed(7)).probe(KeyPair(seed(9)).address, [f"/ip4/127.0.0.1/tcp/{port}"])


async def test_one_who_sends_garbage_is_a_failure() -> None:
    async def garbage(stream: trio.SocketStream) -> None:
        await stream.send_all(b"\x13/multistream/1.0.0\nHTTP/1.1 400 no\r\n\r\n" * 20)

    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listener.socket.getsockname()[1]
        nursery.start_soon(trio.serve_listeners, garbage, [listener])
        with pytest.raises(DialFailed):
            await Prober(seed(7)).probe(KeyPair(seed(9)).address, [f"/ip4/127.0.0.1/tcp/{port}"])
        nursery.cancel_scope.cancel()
