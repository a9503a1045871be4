"""Who is connected: redial, restart, freeze, simultaneous dials, limits, start and end."""

import signal
import time
from contextlib import AsyncExitStack, suppress

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from libp2p.peer.id import ID

from tdmld.chain.crypto import KeyPair
from tdmld.p2p import Host, Limits, PeerConnected, PeerDisconnected, PeerInfo, Stream, open_host
from tdmld.p2p.connector import SIMULTANEOUS_SECONDS, decide
from tdmld.p2p.errors import DialFailed, ListenFailed, ProtocolRefused, StreamBroken, StreamError
from tests.p2p.support import (
    ECHO,
    QUICK,
    SINK,
    RemoteHost,
    connected_pair,
    count_tasks,
    free_port,
    hosts,
    info,
    says_hello,
    seed,
    until,
)


async def test_a_kept_peer_is_redialled_at_once_when_it_drops():
    async with connected_pair() as (a, b):
        changes = a.changes()
        await b.disconnect(a.peer_id)
        started = time.monotonic()
        assert await changes.receive() == PeerDisconnected(b.peer_id)
        assert await changes.receive() == PeerConnected(b.peer_id)
        assert time.monotonic() - started < 1
        assert await says_hello(b, a.peer_id)


async def test_a_stream_opens_although_the_connection_breaks_under_it():
    async with connected_pair() as (a, b):
        for _ in range(5):
            [conn] = b._swarm.get_connections()
            await conn.muxed_conn._session.close()
            assert await says_hello(a, b.peer_id)


async def test_a_peer_that_is_not_kept_is_left_alone():
    async with connected_pair() as (a, b):
        a.remove_peer(b.peer_id)
        assert b.peer_id in a.connected()
        await a.disconnect(b.peer_id)
        with pytest.raises(DialFailed, match="no address of"):
            await a.open_stream(b.peer_id, ECHO)


async def test_a_stranger_is_not_dialled_at_addresses_that_others_told():
    """The library dials what it heard of as soon as it has fewer connections than it likes."""
    async with hosts(3) as (a, b, c):
        known = [a._inner.get_addrs()[0].__class__(b.addresses[0])]
        a._swarm.peerstore.add_addrs(b._inner.get_id(), known, 1000)
        c.add_peer(info(a))
        await until(lambda: c.peer_id in a.connected())
        c.remove_peer(a.peer_id)
        await c.disconnect(a.peer_id)
        await trio.testing.wait_all_tasks_blocked(0.2)
        assert not b.connected()


async def test_a_failed_dial_says_what_was_tried_and_is_not_remembered_against_the_peer():
    """The library refuses to dial for a minute after one failure."""
    port = free_port()
    address = f"/ip4/127.0.0.1/tcp/{port}"
    async with hosts(1) as (a,):
        peer = PeerInfo(_name(2), (address,))
        a.add_peer(peer)
        with pytest.raises(DialFailed, match=f"{address}: Connection refused"):
            await a.open_stream(peer.peer_id, ECHO)
        assert "Connection refused" in a.peers()[0].last_error
        async with open_host(seed(2), [address], gossip=False) as b:
            started = time.monotonic()
            await until(lambda: a.peer_id in b.connected())
            assert time.monotonic() - started < 2
            assert a.peers()[0].last_error == ""


async def test_the_second_address_is_used_when_the_first_is_dead():
    async with hosts(2) as (a, b):
        dead = f"/ip4/127.0.0.1/tcp/{free_port()}"
        a.add_peer(PeerInfo(b.peer_id, (dead, *b.addresses)))
        assert await says_hello(a, b.peer_id)


async def test_new_addresses_of_a_kept_peer_are_dialled_at_once():
    async with hosts(2, limits=Limits(redial_first_seconds=60, redial_last_seconds=60)) as (a, b):
        a.add_peer(PeerInfo(b.peer_id, (f"/ip4/127.0.0.1/tcp/{free_port()}",)))
        await until(lambda: a.peers()[0].last_error != "")
        a.add_peer(info(b))
        await until(lambda: b.peer_id in a.connected(), seconds=2)


async def test_after_kill_9_and_restart_a_stream_opens_within_a_second():
    async with hosts(1, limits=QUICK) as (a,), RemoteHost(2) as remote:
        a.add_peer(remote.info)
        assert await says_hello(a, remote.info.peer_id)
        stream = await a.open_stream(remote.info.peer_id, ECHO)
        remote.signal(signal.SIGKILL)
        with trio.fail_after(1), pytest.raises(StreamBroken):
            await stream.receive(100)
        await until(lambda: a.peers()[0].last_error != "")  # at least one dial failed
        await remote.start()
        with trio.fail_after(1):
            assert await says_hello(a, remote.info.peer_id)


async def test_a_frozen_peer_is_noticed_and_comes_back():
    async with hosts(1, limits=QUICK) as (a,), RemoteHost(2) as remote:
        a.add_peer(remote.info)
        assert await says_hello(a, remote.info.peer_id)
        changes = a.changes()
        remote.signal(signal.SIGSTOP)
        with trio.fail_after(3):
            assert await changes.receive() == PeerDisconnected(remote.info.peer_id)
        remote.signal(signal.SIGCONT)
        with trio.fail_after(5):
            assert await changes.receive() == PeerConnected(remote.info.peer_id)
            assert await says_hello(a, remote.info.peer_id)


async def test_a_frozen_peer_is_noticed_within_20_s_and_its_link_comes_back():
    """With the limits of every host; a link is a stream that is opened anew when it breaks."""
    async with hosts(1) as (a,), RemoteHost(2) as remote, trio.open_nursery() as nursery:
        peer, changes, answers = remote.info.peer_id, a.changes(), [0]
        a.add_peer(remote.info)
        nursery.start_soon(_keep_link, a, peer, answers)
        assert await changes.receive() == PeerConnected(peer)
        await until(lambda: answers[0] > 3)
        remote.signal(signal.SIGSTOP)
        with trio.fail_after(20):
            assert await changes.receive() == PeerDisconnected(peer)
        assert not a.peers()[0].connected
        before = answers[0]
        remote.signal(signal.SIGCONT)
        with trio.fail_after(10):
            assert await changes.receive() == PeerConnected(peer)
        await until(lambda: answers[0] > before + 3)
        assert a.peers()[0].score == 0
        nursery.cancel_scope.cancel()


async def _keep_link(host: Host, peer: str, answers: list[int]) -> None:
    while True:
        with suppress(DialFailed, ProtocolRefused, StreamError):
            async with await host.open_stream(peer, ECHO) as stream:
                while True:
                    await stream.send(b"frame")
                    assert await stream.receive(100) == b"frame"
                    answers[0] += 1
                    await trio.sleep(0.02)
        await trio.sleep(0.02)


async def test_a_busy_connection_is_not_taken_for_a_dead_one():
    limits = Limits(keepalive_seconds=0.05, keepalive_timeout_seconds=0.3)
    async with connected_pair(limits=limits) as (a, b), await a.open_stream(b.peer_id, ECHO) as s:
        for _ in range(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(s.send, bytes(8_000_000))
                await s.receive(8_000_000)


async def test_two_hosts_that_dial_each_other_end_with_one_usable_connection():
    for _ in range(5):
        async with hosts(2) as (a, b):
            a.add_peer(info(b))
            b.add_peer(info(a))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(says_hello, a, b.peer_id)
                nursery.start_soon(says_hello, b, a.peer_id)
            await until(lambda: len(a._swarm.get_connections()) == 1)
            await until(lambda: len(b._swarm.get_connections()) == 1)
            assert await says_hello(a, b.peer_id)
            assert await says_hello(b, a.peer_id)
            assert {a.peers()[0].direction, b.peers()[0].direction} == {"inbound", "outbound"}


@given(age=st.floats(0, SIMULTANEOUS_SECONDS))
def test_both_ends_of_simultaneous_dials_keep_the_same_connection(age: float):
    # The smaller side has its own dial first and then sees the other's; the larger side likewise.
    assert decide("outbound", age, "inbound", we_are_smaller=True) == "refuse"
    assert decide("outbound", age, "inbound", we_are_smaller=False) == "replace"
    # ... and in the other order of arrival.
    assert decide("inbound", age, "outbound", we_are_smaller=True) == "replace"
    assert decide("inbound", age, "outbound", we_are_smaller=False) == "refuse"


@pytest.mark.parametrize("smaller", [True, False])
@pytest.mark.parametrize("existing", ["inbound", "outbound"])
def test_a_peer_that_dials_again_later_has_lost_the_old_connection(existing, smaller):
    later = SIMULTANEOUS_SECONDS + 1
    assert decide(existing, later, "inbound", we_are_smaller=smaller) == "replace"
    assert decide(existing, later, "outbound", we_are_smaller=smaller) == "refuse"


async def test_a_peer_that_restarts_unnoticed_replaces_its_old_connection():
    """Power loss: the old connection is still open here when the same identity dials again."""
    async with hosts(1) as (a,), AsyncExitStack() as stack:
        first = await stack.enter_async_context(open_host(seed(2), gossip=False))
        first.add_peer(info(a))
        await until(lambda: first.peer_id in a.connected())
        async with open_host(seed(2), gossip=False) as second:
            second.set_handler(ECHO, _hello)
            first.remove_peer(a.peer_id)
            second.add_peer(info(a))
            await until(lambda: a.peer_id in second.connected())
            await until(lambda: not first.connected())
            await until(lambda: len(a._swarm.get_connections()) == 1)
            stream = await a.open_stream(second.peer_id, ECHO)
            assert await stream.receive(10) == b"hello"


async def _hello(stream: Stream) -> None:
    await stream.send(b"hello")


async def test_connections_come_and_go_without_leaving_tasks_or_using_up_places():
    """The library keeps a task and one of its 250 places for every connection that ever came in."""
    async with hosts(2, limits=Limits(connections=3)) as (a, b):
        counts = []
        for _ in range(8):
            b.add_peer(info(a))
            await until(lambda: b.peer_id in a.connected() and a.peer_id in b.connected())
            b.remove_peer(a.peer_id)
            await b.disconnect(a.peer_id)
            await until(lambda: not a.connected() and not b.connected())
            await trio.testing.wait_all_tasks_blocked(0.02)
            counts.append(count_tasks())
        assert counts[-1] <= counts[1]


async def test_strangers_beyond_the_limit_are_refused_and_kept_peers_are_not():
    async with open_host(seed(9), gossip=False, limits=Limits(connections=2)) as full:
        full.set_handler(ECHO, _hello)
        async with hosts(4) as (a, b, c, kept):
            for host in (a, b):
                host.add_peer(info(full))
            await until(lambda: len(full.connected()) == 2)
            c.add_peer(info(full))
            with pytest.raises(DialFailed):
                await c.open_stream(full.peer_id, ECHO)
            assert full.connected() == {a.peer_id, b.peer_id}
            full.add_peer(PeerInfo(kept.peer_id))
            kept.add_peer(info(full))
            await until(lambda: kept.peer_id in full.connected())


async def test_a_peer_may_open_only_so_many_streams():
    async with connected_pair(limits=Limits(streams_per_peer=8)) as (a, b):
        async with AsyncExitStack() as stack:
            for _ in range(8):
                await stack.enter_async_context(await a.open_stream(b.peer_id, ECHO))
            with pytest.raises(ProtocolRefused):
                await a.open_stream(b.peer_id, ECHO)
        await until(lambda: not b._inbound_streams)
        assert await says_hello(a, b.peer_id)
        assert b.peers()[0].score > 0


async def test_our_own_address_is_not_dialled():
    async with hosts(1) as (a,):
        a.add_peer(info(a))
        assert a.peers() == ()


async def test_a_port_in_use_is_refused_with_the_remedy():
    """Also between two of our own: the library lets them share a port and its peers."""
    async with hosts(1) as (a,):
        with pytest.raises(ListenFailed, match="in use by another process; stop it, or listen on"):
            async with open_host(seed(2), a.addresses, gossip=False):
                pass
    async with open_host(seed(2), a.addresses, gossip=False):
        pass  # free again at once


@pytest.mark.parametrize("address", ["/ip4/192.0.2.1/tcp/0", "nonsense", "/ip4/127.0.0.1/udp/1"])
async def test_an_address_that_cannot_be_listened_on_is_refused(address: str):
    with pytest.raises(ListenFailed):
        async with open_host(seed(2), [address], gossip=False):
            pass


async def test_leaving_the_block_tells_the_peers_and_leaves_no_task():
    before = count_tasks()
    async with hosts(1, gossip=True) as (a,):
        async with open_host(seed(2)) as b:
            b.set_handler(SINK, _wait)
            a.add_peer(info(b))
            stream = await a.open_stream(b.peer_id, SINK)
            changes = b.changes()
            started = time.monotonic()
        assert time.monotonic() - started < 2
        with pytest.raises(StreamBroken):
            await stream.receive(100)
        assert [change async for change in changes][-1] == PeerDisconnected(a.peer_id)
    await until(lambda: count_tasks() <= before)


async def _wait(stream: Stream) -> None:
    await trio.sleep_forever()


async def test_an_exception_of_the_block_comes_out_as_itself():
    with pytest.raises(KeyError, match="mine"):
        async with open_host(seed(1)):
            raise KeyError("mine")


async def test_a_cancelled_block_ends_in_time_although_a_peer_takes_no_data():
    async with hosts(1) as (a,), RemoteHost(2) as remote:
        async with trio.open_nursery() as nursery:
            b = await nursery.start(_run_host)
            b.add_peer(remote.info)
            stream = await b.open_stream(remote.info.peer_id, ECHO)
            remote.signal(signal.SIGSTOP)
            nursery.start_soon(_stuff, stream)
            await trio.testing.wait_all_tasks_blocked(0.1)
            nursery.cancel_scope.cancel()
            started = time.monotonic()
        assert time.monotonic() - started < 2
        assert a.peers() == ()


async def _run_host(task_status) -> None:
    async with open_host(seed(3), gossip=False) as host:
        task_status.started(host)
        await trio.sleep_forever()


async def _stuff(stream: Stream) -> None:
    with suppress(StreamBroken):
        await stream.send(bytes(50_000_000))


def _name(number: int) -> str:
    from tdmld.chain.crypto import KeyPair

    return KeyPair(seed(number)).address


async def test_addresses_that_are_hearsay_are_dialled_less_and_less():
    """They may be a victim's, and what one node is told all are told."""
    limits = Limits(redial_first_seconds=0.01, redial_last_seconds=0.02)
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    victim = f"/ip4/127.0.0.1/tcp/{listener.socket.getsockname()[1]}"
    knocks = 0

    async def knock(stream):
        nonlocal knocks
        knocks += 1
        await stream.aclose()

    async with trio.open_nursery() as nursery, open_host(seed(1), limits=limits) as a:
        nursery.start_soon(trio.serve_listeners, knock, [listener])
        liar = PeerInfo(KeyPair(seed(9)).address, (victim,))
        for number in range(40):
            # A new record each time changes nothing.
            a.add_peer(PeerInfo(liar.peer_id, (victim,) * (1 + number % 2)), patient=True)
            await trio.sleep(0.05)
        assert knocks <= 25
        knocks = 0
        a.add_peer(liar)
        await until(lambda: knocks > 20, 5)
        nursery.cancel_scope.cancel()


async def test_where_hearsay_has_led_to_the_peer_it_is_redialled_soon():
    limits = Limits(redial_first_seconds=0.01, redial_last_seconds=0.02)
    async with open_host(seed(1), limits=limits) as a, open_host(seed(2)) as b:
        entry = a._peers.entry(ID.from_base58(b.peer_id))
        a.add_peer(info(b), patient=True)
        assert entry.patient
        await until(lambda: b.peer_id in a.connected())
        a.add_peer(info(b), patient=True)
        assert not entry.patient
        a.add_peer(PeerInfo(b.peer_id, ("/ip4/127.0.0.1/tcp/9",)), patient=True)
        assert entry.patient
